"""Test token_stats against an fp64 oracle, for the Triton kernels (in the interpreter) and the torch backend."""

import math

import numpy as np
import pytest
import torch

from rlloss import backends, reference, token_stats
from rlloss.logits.statistics import OUTPUTS
from tests.support.rounding import assert_sums_close
from tests.support.saturation import CLOSE, MARGINS, exact, relative_error, saturated

BACKENDS = ["interpreter", "torch"] if not torch.cuda.is_available() else ["triton", "torch"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=BACKENDS)
def backend(request):
    with backends.backend(request.param):
        yield request.param


def make_logits(kind: str, N: int, V: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, target): "uniform" is flat, "peaked" has p > 0.999, "-inf" has a padded and an empty leading part."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=g) * 2
    target = torch.randint(0, V, (N,), generator=g)
    if kind == "peaked":
        logits[torch.arange(N), target] += 10 + math.log(V) + logits.amax(-1)
        target[::2] = torch.randint(0, V, (len(target[::2]),), generator=g)
    if kind == "-inf" and V > 4:
        logits[:, : V // 3] = -math.inf
        logits[:, -V // 8 :] = -math.inf
        target = target % (V // 4) + V // 3
    return logits.to(dtype).to(DEVICE), target.to(DEVICE)


def run(compute, logits, weights):
    """Outputs (logp, entropy, lse) and the gradient of their weighted sum."""
    leaf = logits.detach().clone().requires_grad_()
    outputs = compute(leaf)[:3]
    torch.stack([(w * o).sum() for w, o in zip(weights, outputs, strict=True)]).sum().backward()
    return [o.detach() for o in outputs], leaf.grad


def assert_as_good_as_torch(logits, target, *, seed=0, **settings):
    """At most twice the error of torch in fp32 on the same logits, with its gradient rounded to their dtype."""
    names = {"logit_scale": "scale"}
    theirs = {names.get(k, k): v for k, v in settings.items()}
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(target.shape, generator=g).to(DEVICE) for _ in range(3)]
    as_double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in theirs.items()}
    exact, exact_grad = run(lambda z: reference.token_stats(z, target, **as_double), logits.double(), weights)
    plain, plain_grad = run(lambda z: reference.token_stats(z.float(), target, **theirs), logits, weights)
    found, found_grad = run(lambda z: token_stats(z, target, entropy_grad=True, **settings), logits, weights)
    for name, x, p, e in zip(("logp", "entropy", "lse"), found, plain, exact, strict=True):
        assert x.dtype == torch.float32
        assert torch.isfinite(x).all(), name
        allowed = 2 * (p - e).abs().max() + 3e-7 * e.abs().max().clamp(min=1)
        assert (x - e).abs().max() <= allowed, (name, (x - e).abs().max(), (p - e).abs().max())
    assert found_grad.dtype == logits.dtype
    allowed = 2 * (plain_grad - exact_grad).abs().max() + 3e-7 * exact_grad.abs().max()
    assert (found_grad - exact_grad).abs().max() <= allowed, (found_grad - exact_grad).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["uniform", "peaked", "-inf"])
@pytest.mark.parametrize("V", [1, 7, 128, 1000, 1025, 5001])
def test_outputs_and_gradients_are_as_good_as_torchs(backend, V, kind, dtype):
    if V <= 4 and kind != "uniform":
        kind = "peaked"
    assert_as_good_as_torch(*make_logits(kind, 5, V, dtype))


@pytest.mark.parametrize("settings", [
    {"temperature": 0.7}, {"temperature": 0.01}, {"temperature": 30.0}, {"softcap": 30.0}, {"logit_scale": 0.0625},
    {"temperature": 0.6, "softcap": 5.0, "logit_scale": 2.5},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["uniform", "peaked"])
def test_temperature_softcap_and_scale(backend, settings, kind):
    logits, target = make_logits(kind, 4, 300, torch.float32)
    assert_as_good_as_torch(logits, target, **settings)


def test_temperature_per_token(backend):
    logits, target = make_logits("uniform", 6, 300, torch.float32)
    temperature = torch.tensor([0.1, 0.5, 1.0, 1.3, 4.0, 0.9], device=DEVICE)
    assert_as_good_as_torch(logits, target, temperature=temperature)
    scalar = token_stats(logits, target, temperature=0.5).logp[1]
    assert torch.equal(token_stats(logits, target, temperature=temperature).logp[1], scalar)


@pytest.mark.parametrize("offset", [100.0, -1000.0])
def test_an_offset_common_to_the_row_changes_little(backend, offset):
    # Exact in fp32: multiples of 1/64 stay representable at this offset, so the true answer does not change at all.
    logits = (torch.randn(4, 700, generator=torch.Generator().manual_seed(1)) * 128).round().to(DEVICE) / 64
    target = torch.arange(4, device=DEVICE)
    plain, moved = token_stats(logits, target), token_stats(logits + offset, target)
    assert torch.equal(plain.logp, moved.logp)
    assert torch.equal(plain.entropy, moved.entropy)


def test_entropy_of_a_peaked_row_with_an_offset_of_100(backend):
    V, target = 151936 if backend != "interpreter" else 20000, torch.zeros(1, dtype=torch.int64, device=DEVICE)
    logits = torch.full((1, V), 80.0, device=DEVICE)
    logits[0, 0] = 80.0 + math.log(V * 25000)
    exact = reference.token_stats(logits.double(), target)[1]
    assert 0.8e-3 < exact.item() < 1.2e-3
    found = token_stats(logits + 20.0, target).entropy
    exact = reference.token_stats((logits + 20.0).double(), target)[1]
    assert abs(found.item() / exact.item() - 1) < 0.01


@pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_target_that_leads_by_far_keeps_its_digits(backend, more):
    cases = [(2, torch.float32, {}), (1000, torch.bfloat16, {}), (5000, torch.float32, {"temperature": 2.0})]
    if more:
        per_token = {"logit_scale": 0.5, "temperature": torch.ones(len(MARGINS), device=DEVICE)}
        cases = [(V, dtype, per_token) for V in (2, 1000, 5000) for dtype in (torch.float16, torch.bfloat16)]
    for V, dtype, settings in cases:
        logits, target = saturated(V)
        expected = exact(logits, target)
        scale = 2.0 if settings else 1.0  # logits twice as large, which the settings halve
        logits = (logits * scale).to(dtype).to(DEVICE).requires_grad_()
        stats = token_stats(logits, target.to(DEVICE), entropy_grad=True, **settings)
        assert relative_error(stats.logp.cpu(), expected.logp) <= CLOSE
        assert relative_error(stats.entropy.cpu(), expected.entropy) <= CLOSE
        rounding = {
            "rtol": CLOSE + torch.finfo(dtype).eps / 2,
            "atol": torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps,
        }
        for output, grad in ((stats.logp, expected.grad), (stats.entropy, expected.entropy_grad)):
            (found,) = torch.autograd.grad(output.sum(), logits, retain_graph=True)
            torch.testing.assert_close(found.double().cpu() * scale, grad, **rounding)


def test_extreme_but_finite_logits(backend):
    logits = torch.full((3, 40), -3e4, device=DEVICE)
    logits[0, 3], logits[1, :] = -2.9e4, 3e4
    logits[2, ::2] = 3e4
    assert_as_good_as_torch(logits, torch.full((3,), 4, device=DEVICE))


def test_a_first_block_of_minus_infinity(backend):
    logits, target = make_logits("uniform", 2, 5000, torch.float32)
    logits[:, :4200] = -math.inf
    assert_as_good_as_torch(logits, target % 800 + 4200)


def test_a_target_at_minus_infinity_is_minus_infinity(backend):
    logits = torch.zeros(1, 8, device=DEVICE)
    logits[0, 3] = -math.inf
    logits.requires_grad_()
    logp = token_stats(logits, torch.tensor([3], device=DEVICE)).logp
    assert logp.item() == -math.inf
    logp.sum().backward()
    expected = torch.full((8,), -1 / 7, device=DEVICE)
    expected[3] = 1.0
    torch.testing.assert_close(logits.grad[0], expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_broken_row_poisons_itself_alone(backend, bad, everywhere):
    logits, target = make_logits("uniform", 3, 300, torch.float32)
    clean = token_stats(logits, target)
    logits[1, slice(None) if everywhere else 17] = bad
    logits.requires_grad_()
    found = token_stats(logits, target, entropy_grad=True)
    assert found.logp[1].isnan() and found.entropy[1].isnan()
    for x, y in zip(found[:3], clean[:3], strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]])
    (found.logp + found.entropy).sum().backward()
    assert logits.grad[1].isnan().all() and logits.grad[[0, 2]].isfinite().all()


def test_a_row_of_minus_infinity_poisons_itself_alone(backend):
    logits, target = make_logits("uniform", 3, 300, torch.float32)
    logits[1] = -math.inf
    found = token_stats(logits, target)
    assert found.logp[1].isnan() and found.entropy[1].isnan() and found.lse[1] == -math.inf
    assert found.logp[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dead_rows_are_zero_and_never_read(backend, dtype):
    N, V = 6, 300
    logits, target = make_logits("uniform", N, V, dtype)
    weight = torch.tensor([0.0, 1.0, 0.0, -2.0, -0.0, 0.0], device=DEVICE)
    dead = weight == 0
    clean = logits.clone().requires_grad_()
    (token_stats(clean, target).logp * weight).sum().backward()
    poisoned = logits.clone().requires_grad_()
    loss = (token_stats(poisoned, target).logp * weight).sum()
    poisoned.data[dead] = math.nan
    loss.backward()
    assert (poisoned.grad[dead] == 0).all()
    assert torch.equal(poisoned.grad[~dead], clean.grad[~dead])
    assert (poisoned.grad[~dead] != 0).any(-1).all()


def test_masked_rows_are_never_read(backend):
    logits, target = make_logits("uniform", 5, 300, torch.float32)
    mask = torch.tensor([True, False, True, False, True], device=DEVICE)
    clean = token_stats(logits, target)
    logits[~mask] = math.nan
    target[~mask] = -100
    logits.requires_grad_()
    found = token_stats(logits, target, mask=mask, entropy_grad=True, outputs=OUTPUTS)
    for x, y in zip(found[:3], clean[:3], strict=True):
        assert torch.equal(x[mask], y[mask]) and (x[~mask] == 0).all()
    (found.logp + found.entropy + found.lse).sum().backward()
    assert (logits.grad[~mask] == 0).all() and logits.grad[mask].isfinite().all()


@pytest.mark.parametrize("live", [[], [2]])
def test_all_rows_dead_and_one_live(backend, live):
    logits, target = make_logits("uniform", 4, 130, torch.float32)
    logits.requires_grad_()
    weight = torch.zeros(4, device=DEVICE)
    weight[live] = 1.0
    (token_stats(logits, target).logp * weight).sum().backward()
    assert [r for r in range(4) if (logits.grad[r] != 0).any()] == live


def test_a_nan_coefficient_is_live(backend):
    logits, target = make_logits("uniform", 3, 130, torch.float32)
    logits.requires_grad_()
    (token_stats(logits, target).logp * torch.tensor([0.0, math.nan, 1.0], device=DEVICE)).sum().backward()
    assert logits.grad[1].isnan().all()
    assert (logits.grad[0] == 0).all() and logits.grad[2].isfinite().all()


def views(kind: str) -> torch.Tensor:
    x = torch.randn(4, 6, 96, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return {
        "shifted": lambda: x[:, :-1],
        "transposed": lambda: x.transpose(0, 1),
        "every other column": lambda: x[..., ::2],
        "a row stride off 16 bytes": lambda: x[..., :95],
        "an odd storage offset": lambda: x[..., 1:90],
        "expanded": lambda: x[:1].expand(3, -1, -1),
        "vocabulary first": lambda: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "four dimensions": lambda: x.view(2, 2, 6, 96)[:, :, :-1].transpose(0, 2),
        "one row": lambda: x[0, 0],
        "no rows": lambda: x[:0],
        "no rows of a matrix": lambda: x[0, :0],
    }[kind]()


@pytest.mark.parametrize("kind", [
    "shifted", "transposed", "every other column", "a row stride off 16 bytes", "an odd storage offset", "expanded",
    "vocabulary first", "four dimensions", "one row", "no rows", "no rows of a matrix",
])  # fmt: skip
def test_any_strides_and_leading_shapes(backend, kind):
    view = views(kind)
    target = torch.randint(0, view.shape[-1], view.shape[:-1], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results, aligned = [], set()
    for logits in (view, view.contiguous()):
        if backend != "torch":
            from rlloss.kernels.rows import Rows

            aligned.add(Rows(logits).aligned())
        leaf = logits.detach().requires_grad_()
        stats = token_stats(leaf, target, entropy_grad=True)
        assert stats.logp.shape == target.shape
        (stats.logp * stats.logp.detach() + stats.entropy).sum().backward()
        results.append((*(s.detach() for s in stats[:3]), leaf.grad))
    # The kernels sum aligned rows in another order than rows that are not aligned.
    assert_sums_close(*results, terms=64 if len(aligned) > 1 else 0)


def test_offsets_beyond_two_to_the_31(backend):
    if DEVICE != "cpu":
        pytest.skip("its logits are host memory that is reserved and never touched")
    far, V = 2**31 + 64, 300
    memory = torch.from_numpy(np.zeros(far + V, dtype=np.float16))  # pages that are not touched are not there
    near = torch.randn(2, V, generator=torch.Generator().manual_seed(0)).half()
    memory[:V], memory[far:] = near[0], near[1]
    logits = memory.as_strided((2, V), (far, 1))
    target = torch.tensor([5, 7])
    assert torch.equal(token_stats(logits, target).logp, token_stats(near, target).logp)
    gradients = []
    for x in (logits, near.clone()):
        x.requires_grad_()
        token_stats(x, target).logp.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_other_outputs(backend):
    logits, target = make_logits("peaked", 6, 700, torch.float32)
    logits[5] = 1.0  # a tie: the first of equal entries is the argmax
    target[5] = 3
    found = token_stats(logits, target, temperature=0.8, softcap=20.0, outputs=OUTPUTS)
    z = 20.0 * torch.tanh(logits.double() / 20.0) / 0.8
    assert_sums_close(found.mean_logit, z.mean(-1), 64, size=1)
    assert_sums_close(found.log_sum_sq_probs, z.log_softmax(-1).mul(2).logsumexp(-1), 64)
    assert torch.equal(found.is_top1, z.argmax(-1) == target)
    assert not found.is_top1[5]
    assert found.mean_logit.requires_grad is False


def test_only_what_was_asked_for_is_returned_and_entropy_is_detached():
    logits, target = make_logits("uniform", 2, 9, torch.float32)
    found = token_stats(logits.requires_grad_(), target, outputs=("logp", "entropy"))
    assert found.lse is None and found.mean_logit is None and found.is_top1 is None
    assert found.logp.requires_grad and not found.entropy.requires_grad


def test_gradcheck_in_fp64():
    logits = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, 0, 10])
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for settings in ({"temperature": 0.7}, {"softcap": 2.0, "logit_scale": 1.5}, {"temperature": temperature}):
        assert torch.autograd.gradcheck(
            lambda z, s=settings: token_stats(z, target, entropy_grad=True, **s)[:3], logits
        )


def test_the_registered_operator_passes_opcheck(backend):
    logits, target = make_logits("uniform", 3, 40, torch.float32)
    arguments = (logits.requires_grad_(), target, None, None, 1.0, None, 1.0, True, True, False)
    torch.library.opcheck(torch.ops.rlloss.token_stats.default, arguments)


def test_a_surrounding_model_compiles_in_one_graph():
    head = torch.nn.Linear(8, 50)

    def loss(hidden, target):
        stats = token_stats(head(hidden), target, entropy_grad=True)
        return (stats.logp + 0.1 * stats.entropy).sum()

    hidden, target = torch.randn(5, 8), torch.randint(0, 50, (5,))
    eager = loss(hidden, target)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, target)
    torch.testing.assert_close(compiled, eager)
    expected = torch.autograd.grad(eager, head.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled, head.weight)[0], expected)


def test_the_gradient_in_place_is_refused_where_the_logits_are_still_needed():
    target = torch.arange(3)
    with pytest.raises(ValueError, match="inplace_grad"):
        token_stats(torch.randn(3, 8, requires_grad=True), target, inplace_grad=True)
    leaf = torch.randn(24, requires_grad=True)
    with pytest.raises(ValueError, match="inplace_grad: found logits that are a leaf, a view of one"):
        token_stats(leaf.view(3, 8), target, inplace_grad=True)
    with pytest.raises(ValueError, match="inplace_grad: found strides"):
        token_stats((leaf * 2).view(8, 3).T, target, inplace_grad=True)

    class KeepsItsOutput(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out = x.exp()
            ctx.save_for_backward(out)
            return out

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    logits = KeepsItsOutput.apply(torch.randn(3, 8, requires_grad=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        token_stats(logits, target, inplace_grad=True).logp.sum().backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_derivative_is_refused(inplace):
    hidden, weight = torch.randn(3, 4), torch.randn(4, 9, requires_grad=True)
    logp = token_stats(hidden @ weight, torch.arange(3), inplace_grad=inplace).logp
    (gradient,) = torch.autograd.grad(logp.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.pow(2).sum(), weight)


def test_an_entropy_without_gradient_may_be_overwritten(backend):
    logits, target = make_logits("uniform", 3, 40, torch.float32)
    stats = token_stats(logits.requires_grad_(), target)
    stats.entropy.mul_(2.0)
    stats.logp.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("weighted", ["logp", "entropy", "lse"])
def test_a_row_is_live_if_any_of_its_gradients_is_not_zero(backend, weighted):
    logits, target = make_logits("uniform", 3, 4100, torch.float32)
    logits.requires_grad_()
    weight = torch.tensor([0.0, 2.0, 0.0], device=DEVICE)
    stats = token_stats(logits, target, entropy_grad=True)
    nothing = torch.zeros(3, device=DEVICE)
    terms = [getattr(stats, name) * (weight if name == weighted else nothing) for name in OUTPUTS[:3]]
    torch.stack(terms).sum().backward()
    exact = logits.detach().double().requires_grad_()
    (reference.token_stats(exact, target)[OUTPUTS.index(weighted)] * weight).sum().backward()
    assert_sums_close(logits.grad, exact.grad, 64)
    assert (logits.grad[[0, 2]] == 0).all() and (logits.grad[1] != 0).any()


def test_int32_targets(backend):
    logits, target = make_logits("peaked", 4, 90, torch.float32)
    mask = torch.tensor([True, False, True, True], device=DEVICE)
    wide, narrow = (token_stats(logits, t, mask=mask, outputs=OUTPUTS) for t in (target, target.int()))
    for x, y in zip(wide, narrow, strict=True):
        assert torch.equal(x, y)


def test_with_and_without_gradient_the_bits_are_the_same(backend):
    logits, target = make_logits("uniform", 5, 300, torch.bfloat16)
    with torch.no_grad():
        old = token_stats(logits, target).logp
    assert torch.equal(token_stats(logits.requires_grad_(), target, entropy_grad=True).logp, old)


def test_a_forced_backend_that_is_missing_raises(monkeypatch):
    missing = "triton" if DEVICE == "cpu" else "interpreter"
    logits, target = torch.zeros(2, 5, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with backends.backend(missing), pytest.raises(RuntimeError, match=f"'{missing}' was forced"):
        token_stats(logits, target)
    monkeypatch.setenv("RLLOSS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="found 'cuda', expected one of 'triton', 'interpreter', 'torch'"):
        token_stats(logits, target)


@pytest.mark.gpu
def test_on_a_gpu_a_target_out_of_range_poisons_its_own_row():
    logits = torch.randn(3, 40, device="cuda", requires_grad=True)
    found = token_stats(logits, torch.tensor([1, 40, -3], device="cuda"))
    assert found.logp[0].isfinite() and found.logp[1:].isnan().all()
    found.logp.sum().backward()
    assert logits.grad[0].isfinite().all() and logits.grad[1:].isnan().all()
