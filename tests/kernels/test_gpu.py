"""Test on a real GPU: every kernel at real sizes against fp64, no synchronisation with the host, CUDA graphs."""

import contextlib
import warnings

import pytest
import torch

from rlloss import (
    GRPOLoss,
    LinearGRPOLoss,
    LossConfig,
    backends,
    entropy_cutoff,
    linear_token_stats,
    reference,
    token_stats,
)
from rlloss.entropy import TwoLevelTemperature, scale_logits
from rlloss.logits.statistics import OUTPUTS
from rlloss.tokens import top_entropy_mask

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
VOCABULARIES = [7, 1000, 32768, 50257, 151936]  # 50257: no row but the first starts on 16 bytes
ROWS = 300  # more than one program a multiprocessor; 3: split rows


def rows_of(N, V, dtype, seed=0, scale=3.0):
    g = torch.Generator(DEVICE).manual_seed(seed)
    logits = (scale * torch.randn(N, V, generator=g, device=DEVICE)).to(dtype)
    target = torch.randint(0, V, (N,), generator=g, device=DEVICE)
    coefs = torch.randn(3, N, generator=g, device=DEVICE)
    return logits, target, coefs * (torch.rand(N, generator=g, device=DEVICE) < 0.5)


def close(found, expected, dtype, what):
    """Allow for fp32 arithmetic, and for one rounding of the results to a narrower dtype."""
    expected = expected.to(found.dtype) if found.dtype != torch.float32 else expected
    narrow = found.dtype in (torch.bfloat16, torch.float16)
    rtol = torch.finfo(found.dtype).eps if narrow else 2e-5
    # 5e-7: a softcap's slope is a difference, and ex2.approx may err by 2^-22 of 1.
    atol = {torch.float16: 1e-6}.get(dtype, {"gradient": 1e-7, "softcap": 5e-7}.get(what, 2e-5))
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("N", [3, ROWS])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_statistics_and_gradient(N, V, dtype, softcap):
    logits, target, coefs = rows_of(N, V, dtype)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    stats = token_stats(leaf, target, temperature=0.8, softcap=softcap, outputs=OUTPUTS, entropy_grad=True)
    expected = reference.token_stats(exact, target, 0.8, softcap=softcap)
    for name, x, e in zip(("logp", "entropy", "lse"), stats[:3], expected, strict=True):
        close(x.detach(), e.detach(), torch.float32, name)
    (torch.stack(stats[:3]) * coefs).sum().backward()
    (torch.stack(expected) * coefs.double()).sum().backward()
    close(leaf.grad, exact.grad, dtype, "gradient" if softcap is None else "softcap")
    assert (leaf.grad[(coefs == 0).all(0)] == 0).all()
    assert torch.equal(stats.is_top1, logits.float().argmax(-1) == target) or softcap is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_split_have_the_same_bits(dtype):
    logits, target, _ = rows_of(ROWS, 151936, dtype)
    launch = backends.triton.token_stats_forward
    whole, split = (launch(logits, target, None, (1.0, None, 1.0), split=s) for s in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(whole, split, strict=True))


def completions(dtype=torch.bfloat16, V=32768, B=8, T=96):
    g = torch.Generator(DEVICE).manual_seed(0)
    logits = (3 * torch.randn(B, T, V, generator=g, device=DEVICE)).to(dtype)
    target = torch.randint(0, V, (B, T), generator=g, device=DEVICE)
    with torch.no_grad():
        logp = token_stats(logits, target).logp
    given = {
        "mask": torch.rand(B, T, generator=g, device=DEVICE) < 0.7,
        "old_logp": logp + 0.2 * torch.randn(B, T, generator=g, device=DEVICE),
    }
    return logits, target, torch.randn(B, generator=g, device=DEVICE), given


CONFIGS = {
    "dapo": LossConfig(),
    "grpo, sequence": LossConfig("grpo", ratio_level="sequence"),
    "cispo": LossConfig("cispo", epsilon_high=2.0),
    "top-entropy": LossConfig(top_entropy_quantile=0.2),
    "exactly k": LossConfig(top_entropy_quantile=0.2, exact_k=True),
    "bonus": LossConfig(entropy_coef=0.01),
    "sapo": LossConfig("sapo"),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_from_logits_is_that_of_plain_torch_and_repeats_bit_for_bit(config, dtype):
    logits, target, advantage, given = completions(dtype)
    found = []
    for backend in ("triton", "triton", "torch"):
        leaf = logits.clone().requires_grad_()
        with backends.backend(backend):
            loss, metrics = GRPOLoss(CONFIGS[config])(leaf, target, advantage, **given)
        (gradient,) = torch.autograd.grad(loss, leaf)
        found.append((loss.detach(), gradient, metrics))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], found[2][0], rtol=1e-5, atol=1e-6)
    close(found[0][1], found[2][1], dtype, "gradient")
    assert found[0][2]["live"] == found[2][2]["live"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_single_launch_is_the_two_launches(dtype, factor):
    logits, target, advantage, given = completions(dtype)
    found = []
    for switches in ({"single_launch": True}, {"single_launch": False}, {"inplace_grad": True}):
        leaf = logits.clone().requires_grad_()
        loss = GRPOLoss(LossConfig(), **switches)(leaf * 1.0, target, advantage, **given).loss
        found.append((loss.detach(), *torch.autograd.grad(loss * factor, leaf)))
    for other in found[1:]:
        torch.testing.assert_close(found[0][0], other[0], rtol=1e-6, atol=1e-7)
        close(found[0][1], other[1], dtype, "gradient")


@pytest.mark.parametrize("N", [1, 4097, 1 << 20])
@pytest.mark.parametrize("rho", [0.0, 0.2, 1.0])
def test_the_entropy_cutoff_is_torchs_quantile(N, rho):
    g = torch.Generator(DEVICE).manual_seed(0)
    entropy = torch.rand(N, generator=g, device=DEVICE).round(decimals=3)  # ties
    mask = torch.rand(N, generator=g, device=DEVICE) < 0.9
    mask[0] = True
    assert entropy_cutoff(entropy, mask, rho) == torch.quantile(entropy[mask], 1 - rho)
    n = int(mask.sum())
    assert int(top_entropy_mask(entropy, mask, rho, exact_k=True).sum()) == int(rho * (n - 1)) + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_temperature_that_follows_the_entropy(dtype):
    logits, target, _ = rows_of(ROWS, 50257, dtype)
    entropy = token_stats(logits, target).entropy.sort().values
    between = float(entropy[ROWS // 2 - 1 : ROWS // 2 + 1].mean())  # no row lies on the cutoff
    rule = TwoLevelTemperature(high=1.5, low=0.5, cutoff=between)
    found = []
    for backend in ("triton", "torch"):
        with backends.backend(backend):
            found.append(scale_logits(logits, rule))
    for a, b in zip(*found, strict=True):
        close(a, b, dtype, "temperature")
    assert {0.5, 1.5} == set(found[0].temperature.tolist())


@pytest.mark.parametrize("plan, dtype", [
    *((plan, dtype) for plan in ("recompute", "keep") for dtype in DTYPES),
    *(("gradient_in_forward", dtype) for dtype in (torch.bfloat16, torch.float32)),  # fp16 is refused
])  # fmt: skip
def test_from_hidden_states(plan, dtype):
    g = torch.Generator(DEVICE).manual_seed(0)
    B, T, D, V = 4, 700, 256, 50257
    hidden = (torch.randn(B, T, D, generator=g, device=DEVICE) * D**-0.5).to(dtype)
    weight = torch.randn(V, D, generator=g, device=DEVICE).to(dtype)
    target = torch.randint(0, V, (B, T), generator=g, device=DEVICE)
    mask = torch.rand(B, T, generator=g, device=DEVICE) < 0.7
    advantage = torch.randn(B, generator=g, device=DEVICE)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    scale = 2.0**12 if dtype == torch.float16 else 1.0  # a GradScaler's work: gradients of logits are fp16 too
    loss = LinearGRPOLoss(LossConfig(), plan=plan)(*leaves, target, advantage, mask=mask).loss
    found = [g.double() / scale for g in torch.autograd.grad(loss * scale, leaves)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    logp = reference.token_stats(exact[0] @ exact[1].T, target)[0]
    ours = linear_token_stats(hidden.detach(), weight.detach(), target, mask=mask).logp
    assert (ours - logp)[mask].abs().max() < 1e-4
    ratio = torch.exp(logp - logp.detach())
    expected = -(torch.where(mask, ratio * advantage.double().unsqueeze(-1), 0.0)).sum() / mask.sum()
    for a, b in zip(found, torch.autograd.grad(expected, exact), strict=True):
        error = (a - b).norm() / b.norm()
        assert error < 4 * torch.finfo(dtype).eps + 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frozen_heads_jacobian(dtype):
    """A fifth of the targets are the likeliest token."""
    g = torch.Generator(DEVICE).manual_seed(0)
    N, D, V = 2800, 256, 50257
    hidden = (torch.randn(N, D, generator=g, device=DEVICE) * 3 * D**-0.5).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g, device=DEVICE).to(dtype)
    target = torch.randint(0, V, (N,), generator=g, device=DEVICE)
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ weight.double().T
    target[::5] = logits[::5].argmax(-1)
    mask = torch.rand(N, generator=g, device=DEVICE) < 0.7
    coefficients = torch.randn(N, generator=g, device=DEVICE).where(mask, 0.0)
    stats = {plan: linear_token_stats(hidden, weight, target, mask=mask, plan=plan) for plan in ("jacobian", "keep")}
    assert torch.equal(stats["jacobian"].logp, stats["keep"].logp)
    expected = torch.autograd.grad(reference.token_stats(logits, target)[0], exact, coefficients.double())[0]
    for of in stats.values():
        assert of.logp is not None
        found = torch.autograd.grad(of.logp, hidden, coefficients)[0].double()
        assert (found - expected).norm() / expected.norm() < 4 * torch.finfo(dtype).eps + 1e-5


@contextlib.contextmanager
def sync_mode(mode):
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(run):
    """How often the host synchronised with the GPU."""
    with warnings.catch_warnings(record=True) as found, sync_mode("warn"):
        warnings.simplefilter("always")
        run()
    return sum("called a synchronizing" in str(w.message) for w in found)


@pytest.mark.parametrize("switches", [{}, {"single_launch": False}, {"inplace_grad": True}], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_host_does_not_wait_on_the_logits_path(config, switches):
    logits, target, advantage, given = completions()
    leaf = logits.requires_grad_()

    def step():
        GRPOLoss(CONFIGS[config], **switches)(leaf * 1.0, target, advantage, **given).loss.backward()

    step()  # compiles
    with sync_mode("error"):
        step()


def linear_step(plan, capacity=None):
    logits, target, advantage, given = completions(V=64, T=300)
    hidden = logits.requires_grad_()
    weight = torch.randn(32768, 64, device=DEVICE, dtype=hidden.dtype, requires_grad=True)
    config = LossConfig(top_entropy_quantile=0.3)
    loss_fn = LinearGRPOLoss(config, plan=plan, static_capacity=capacity)
    held = []

    def forward():
        held.append(loss_fn(hidden, weight, target, advantage, **given).loss)

    def backward():
        held.pop().backward()

    forward()
    backward()
    return forward, backward


@pytest.mark.parametrize("plan", ["auto", "recompute", "keep"])
def test_the_host_waits_once_in_each_pass_from_hidden_states(plan):
    forward, backward = linear_step(plan)
    assert waits(forward) <= 1 and waits(backward) <= 1


@pytest.mark.parametrize("plan", ["auto", "recompute", "keep"])
def test_with_a_static_capacity_it_does_not_wait(plan):
    forward, backward = linear_step(plan, (2400, 900))
    with sync_mode("error"):
        forward()
        backward()


def captured(step, inputs):
    """(graph, the tensors that it reads, its outputs). The step is warmed up on a side stream, as capture requires."""
    static = [x.clone() for x in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*static)
    return graph, static, outputs


@pytest.mark.parametrize("config, single_launch", [
    ("dapo", True), ("dapo", False), ("top-entropy", False), ("exactly k", False),
])  # fmt: skip
def test_a_cuda_graph_holds_the_logits_path(config, single_launch):
    logits, target, advantage, given = completions()
    loss_fn = GRPOLoss(CONFIGS[config], single_launch=single_launch)

    def step(logits, advantage, mask, old_logp):
        leaf = logits.detach().requires_grad_()
        loss = loss_fn(leaf, target, advantage, mask=mask, old_logp=old_logp).loss
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    graph, static, outputs = captured(step, (logits, advantage, given["mask"], given["old_logp"]))
    for seed in (1, 2):  # other values, other live rows
        g = torch.Generator(DEVICE).manual_seed(seed)
        static[0].copy_(3 * torch.randn(logits.shape, generator=g, device=DEVICE))
        static[1].copy_(torch.randn(len(advantage), generator=g, device=DEVICE))
        static[2].copy_(torch.rand(given["mask"].shape, generator=g, device=DEVICE) < 0.5)
        graph.replay()
        found = [x.clone() for x in outputs]
        assert all(torch.equal(a, b) for a, b in zip(found, step(*static), strict=True))


def test_a_cuda_graph_holds_a_static_capacity():
    hidden, target, advantage, given = completions(V=64, T=300)
    weight = torch.randn(32768, 64, device=DEVICE, dtype=hidden.dtype)
    loss_fn = LinearGRPOLoss(LossConfig(top_entropy_quantile=0.3), plan="recompute", static_capacity=(2400, 900))

    def step(hidden, mask):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        loss = loss_fn(*leaves, target, advantage, mask=mask, old_logp=given["old_logp"]).loss
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    graph, static, outputs = captured(step, (hidden, given["mask"]))
    static[1].copy_(given["mask"].flip(0))
    graph.replay()
    found = [x.clone() for x in outputs]
    for a, b in zip(found, step(*static), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)  # cuBLAS may take other products in a graph
