"""Test linear_token_stats against an fp64 oracle: numbers, bits, plans, counted products and memory."""

import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from rlloss import LinearGRPOLoss, backends, linear_token_stats, reference
from rlloss.lm_head import vocab_loop
from rlloss.lm_head.call import Expected, HeadInputs, HeadOptions, prepare
from rlloss.logits.statistics import OUTPUTS
from rlloss.torch_kernels import logits_tile
from tests.support.heads import NAMES, problem
from tests.support.loss_cases import BACKENDS, DEVICE
from tests.support.rounding import assert_sums_close
from tests.support.saturation import CLOSE, exact, relative_error, saturated

pytestmark = pytest.mark.usefixtures("on_torch")
PLANS = ("recompute", "keep")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several chunks of rows and blocks of the vocabulary. The last ones are not full."""
    monkeypatch.setattr(vocab_loop, "CPU_ROWS", 8)
    monkeypatch.setattr(vocab_loop, "CPU_WIDTH", 16)


def textbook(x: dict, dtype=None, temperature=1.0, softcap=None, logit_scale=1.0):
    """(logp, entropy, lse) of logits that torch computes in their dtype, or in `dtype`."""
    h, w, b = (None if x.get(name) is None else x[name].to(dtype or x[name].dtype) for name in NAMES)
    logits = h @ w.T if b is None else h @ w.T + b
    logits = logits if dtype == torch.float64 else logits.float()
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(logits.dtype)
    return reference.token_stats(logits, x["target"], temperature, softcap, logit_scale)


def ours(x: dict, **settings):
    stats = linear_token_stats(x["hidden"], x["weight"], x["target"], bias=x.get("bias"), entropy_grad=True, **settings)
    return stats.logp, stats.entropy, stats.lse


def run(compute, x: dict, weights, dtype=None):
    """{name: outputs (logp, entropy, lse) and gradients of their weighted sum}; a weight of 0 selects."""
    given = {name: x[name] for name in NAMES if name in x}
    leaves = {name: v.detach().to(dtype or v.dtype, copy=True).requires_grad_() for name, v in given.items()}
    outputs = compute({**x, **leaves})
    terms = [torch.where(w == 0, 0.0, w * o).sum() for w, o in zip(weights, outputs, strict=True)]
    total = torch.stack(terms).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    named = zip(("logp", "entropy", "lse", *leaves), (*outputs, *gradients), strict=True)
    return {name: value.detach() for name, value in named}


def assert_as_good_as_torch(x: dict, *, live=None, plans=PLANS, **settings) -> None:
    """Outputs and gradients have at most twice the error of torch's own logits in the same dtype."""
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x["target"].shape, generator=g).to(x["target"].device) for _ in range(3)]
    if live is not None:
        weights = [torch.where(live, w, 0.0) for w in weights]
    exact = run(lambda x: textbook(x, torch.float64, **settings), x, weights, torch.float64)
    plain = run(lambda x: textbook(x, **settings), x, weights)
    for plan in plans:
        found = run(lambda x, plan=plan: ours(x, plan=plan, **settings), x, weights)
        for name, e in exact.items():
            assert found[name].dtype == plain[name].dtype and found[name].shape == plain[name].shape
            if e.numel() == 0:
                continue
            assert found[name].isfinite().all(), (plan, name)
            allowed = 2 * (plain[name] - e).abs().max() + 1e-6 * e.abs().max().clamp(min=1e-2)
            assert (found[name] - e).abs().max() <= allowed, (plan, name, (found[name] - e).abs().max(), allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["uniform", "peaked", "-inf"])
@pytest.mark.parametrize("V", [1, 7, 1000, 2049, 5000])
def test_values_and_gradients_are_as_good_as_torchs(V, kind, dtype):
    N = {7: 37, 2049: 1}.get(V, 5)
    assert_as_good_as_torch(problem(kind if V > 4 else "uniform", N, V, dtype=dtype))


@pytest.mark.parametrize("plan", [*PLANS, "gradient_in_forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [2, 33, 1000])
def test_a_target_that_leads_by_far_keeps_its_digits(monkeypatch, V, backend, dtype, plan):
    """Hidden states of one 1 each make the weight's columns the logits, and its gradient theirs."""
    monkeypatch.setattr(vocab_loop, "CPU_ROWS", 4)
    monkeypatch.setattr(vocab_loop, "CPU_WIDTH", max(1, V // 4))
    logits, target = (x.to(DEVICE) for x in saturated(V))
    expected = exact(logits, target)
    weight = logits.T.to(dtype).contiguous().requires_grad_()
    hidden, n = torch.eye(len(target), dtype=dtype, device=DEVICE), len(target)
    rounding = {"rtol": CLOSE + torch.finfo(dtype).eps * (dtype != torch.float32), "atol": 0.0}
    with backends.backend(backend):
        if plan == "gradient_in_forward":
            ones = torch.ones(n, 1, device=DEVICE)
            loss = LinearGRPOLoss(plan=plan)(hidden[:, None], weight, target[:, None], ones, mask=ones.bool()).loss
            outputs = [(-n * loss, expected.grad)]
        else:
            stats = linear_token_stats(hidden, weight, target, entropy_grad=True, plan=plan)
            assert relative_error(stats.logp, expected.logp) <= CLOSE
            assert relative_error(stats.entropy, expected.entropy) <= CLOSE
            outputs = [(stats.logp.sum(), expected.grad), ((stats.logp + 3 * stats.entropy).sum(), None)]
        for output, grad in outputs:
            (found,) = torch.autograd.grad(output, weight, retain_graph=True)
            wanted = expected.grad + 3 * expected.entropy_grad if grad is None else grad
            torch.testing.assert_close(found.T.double(), wanted, **rounding)


SETTINGS = [
    {"temperature": 0.7}, {"softcap": 5.0}, {"logit_scale": 0.0625}, {"temperature": "per token"},
    {"temperature": 0.6, "softcap": 3.0, "logit_scale": 2.5},
    {"temperature": "per token", "softcap": 8.0, "logit_scale": 0.5},
]  # fmt: skip


def with_temperature(settings: dict, x: dict) -> dict:
    if settings.get("temperature") != "per token":
        return settings
    t = torch.linspace(0.4, 2.0, x["target"].numel(), device=x["target"].device)
    return {**settings, "temperature": t.view(x["target"].shape)}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind, dtype, bias", [
    ("uniform", torch.float32, True), ("peaked", torch.bfloat16, False), ("uniform", torch.float16, False),
    ("-inf", torch.float32, True),
])  # fmt: skip
def test_temperature_softcap_scale_and_bias(small_tiles, settings, kind, dtype, bias):
    if kind == "-inf" and "softcap" in settings:
        kind = "uniform"  # softcap turns -inf into a number
    x = problem(kind, 20, 70, dtype=dtype, bias=bias, shape=(4, 5))
    assert_as_good_as_torch(x, **with_temperature(settings, x))


@pytest.mark.skipif(len(BACKENDS) == 1, reason="needs Triton")
@pytest.mark.parametrize("kind, dtype, settings", [
    ("uniform", torch.bfloat16, {}), ("peaked", torch.float32, {"temperature": "per token"}),
    ("-inf", torch.float32, {"temperature": 0.7}),
    ("uniform", torch.float16, {"temperature": 0.6, "softcap": 3.0, "logit_scale": 2.5}),
])  # fmt: skip
def test_the_kernels_too(monkeypatch, kind, dtype, settings):
    monkeypatch.setattr(vocab_loop, "CPU_ROWS", 2)
    monkeypatch.setattr(vocab_loop, "CPU_WIDTH", 130)
    with backends.backend(BACKENDS[-1]):
        x = problem(kind, 3, 200, dtype=dtype, bias=True, on=BACKENDS[-1])
        assert_as_good_as_torch(x, plans=PLANS[:1] if kind == "uniform" else PLANS[1:], **with_temperature(settings, x))


@pytest.mark.parametrize("N", [0, 1, 5, 37])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, "one"])
def test_any_number_of_rows_and_of_live_ones(small_tiles, N, share):
    for dtype in (torch.float32, torch.bfloat16):
        live = torch.arange(N) == N // 2 if share == "one" else torch.arange(N) < share * N
        assert_as_good_as_torch(problem(N=N, V=50, dtype=dtype, bias=True), live=live[torch.randperm(N)])


@pytest.mark.parametrize("on", BACKENDS)
def test_all_outputs(monkeypatch, on):
    monkeypatch.setattr(vocab_loop, "CPU_WIDTH", 150)
    with backends.backend(on):
        x = problem("peaked", 6, 400, on=on)
        x["weight"][200:] = x["weight"][:200]  # ties across blocks: the first of equal entries is the argmax
        x["target"][1::2] %= 200
        x["target"][3] += 200
        settings = {"temperature": 0.8, "softcap": 20.0}
        found = linear_token_stats(x["hidden"], x["weight"], x["target"], outputs=OUTPUTS, **settings)
        some = linear_token_stats(x["hidden"], x["weight"], x["target"], outputs=("is_top1",), **settings)
    z = 20.0 * torch.tanh(x["hidden"].double() @ x["weight"].double().T / 20.0) / 0.8
    assert_sums_close(found.mean_logit, z.mean(-1), 64, size=1)
    squares = z.log_softmax(-1).mul(2).logsumexp(-1)
    assert_sums_close(found.log_sum_sq_probs, squares, 64)
    assert torch.equal(found.is_top1, z.argmax(-1) == x["target"]) and torch.equal(some.is_top1, found.is_top1)
    assert found.is_top1.any() and not found.is_top1[3] and found.is_top1.dtype == torch.bool
    assert some.logp is None and some.entropy is None and some.lse is None and some.mean_logit is None


def test_by_hand():
    # Logits (log 1, log 2, log 5) and (log 4, log 2, log 2): p = (1/8, 1/4, 5/8) and (1/2, 1/4, 1/4).
    weight = torch.tensor([[1.0, 4.0], [2.0, 2.0], [5.0, 2.0]]).log().requires_grad_()
    hidden = torch.eye(2, requires_grad=True)
    stats = linear_token_stats(hidden, weight, torch.tensor([2, 0]), outputs=("logp", "entropy", "lse", "is_top1"))
    log2 = math.log(2)
    torch.testing.assert_close(stats.logp, torch.tensor([math.log(5 / 8), -log2]))
    torch.testing.assert_close(stats.lse, torch.tensor([3 * log2, 3 * log2]))
    torch.testing.assert_close(stats.entropy, torch.tensor([3 * log2 - log2 / 4 - math.log(5) * 5 / 8, 1.5 * log2]))
    assert stats.is_top1.all()
    stats.logp.sum().backward()
    # onehot - p of either row, which is a column here because hidden is the identity.
    torch.testing.assert_close(weight.grad, torch.tensor([[-1 / 8, 1 / 2], [-1 / 4, -1 / 4], [3 / 8, -1 / 4]]))
    expected = torch.tensor([-1 / 8, -1 / 4, 3 / 8]) @ weight.detach()
    torch.testing.assert_close(hidden.grad[0], expected)


def test_the_same_as_trls_chunked_log_probs(small_tiles):
    peer = getattr(pytest.importorskip("trl.kernels"), "ChunkedLogProbFunction", None)
    if peer is None:
        pytest.skip("TRL 1.14 has none")
    x = problem(N=37, V=50, bias=True)
    for settings in ({"temperature": 0.7}, {"temperature": 0.9, "softcap": 4.0, "logit_scale": 0.5}):
        w = [torch.randn(37, generator=torch.Generator().manual_seed(i)) for i in range(2)]

        def theirs(x, s=settings):
            args = (x["target"], s["temperature"], 16, s.get("softcap"), s.get("logit_scale", 1.0))
            return peer.apply(x["hidden"], x["weight"], x["bias"], *args, ("entropy",))[:2]

        expected = run(lambda x: (*theirs(x), x["hidden"].sum(-1)), x, [*w, torch.zeros(37)])
        for plan in PLANS:
            found = run(lambda x, p=plan, s=settings: ours(x, plan=p, **s), x, [*w, torch.zeros(37)])
            for name in ("logp", "entropy", *NAMES):
                assert_sums_close(found[name], expected[name], 50)


@pytest.mark.parametrize("plan", PLANS)
def test_gradcheck_in_fp64(small_tiles, plan):
    x = problem(N=4, V=21, D=3, dtype=torch.float64, bias=True)
    target, mask = x.pop("target"), torch.tensor([True, True, False, True])
    for settings in ({"temperature": 0.7}, {"softcap": 2.0, "logit_scale": 1.5, "mask": mask}):

        def of(h, w, b, s=settings):
            return linear_token_stats(h, w, target, bias=b, entropy_grad=True, plan=plan, **s)[:3]

        assert torch.autograd.gradcheck(of, [v.requires_grad_() for v in x.values()])


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("counts", ["some", "none", "all"])
@pytest.mark.parametrize("plan", PLANS)
def test_masked_rows_reach_nothing(monkeypatch, small_tiles, on, counts, plan):
    if on != "torch":
        monkeypatch.setattr(vocab_loop, "CPU_WIDTH", 50)
    x = problem(N=6, V=50, shape=(2, 3), bias=True, on=on)
    mask = {
        "some": torch.tensor([[True, False, True], [False, False, True]]),
        "none": torch.zeros(2, 3, dtype=torch.bool), "all": torch.ones(2, 3, dtype=torch.bool),
    }[counts].to(x["target"].device)  # fmt: skip
    weights = [torch.where(mask, 1.0 + i, 0.0) for i in range(3)]
    with backends.backend(on):
        clean = run(lambda x: ours(x, plan=plan), x, weights)
        x["hidden"][~mask], x["target"][~mask] = math.nan, -100
        found = run(lambda x: ours(x, plan=plan, mask=mask), x, weights)
        extra = linear_token_stats(x["hidden"], x["weight"], x["target"], mask=mask, outputs=OUTPUTS)
    for name in ("logp", "entropy", "lse"):
        assert (found[name][~mask] == 0).all()
        assert_sums_close(found[name][mask], clean[name][mask], 50)
    for name in NAMES:
        assert_sums_close(found[name], clean[name], 50)
    assert (found["hidden"][~mask] == 0).all()
    assert all((v[~mask] == 0).all() and v.isfinite().all() for v in extra)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_poisons_itself_and_if_live_the_weight(small_tiles, plan, bad):
    x = problem(N=20, V=50)
    clean = ours(x, plan=plan)
    x["hidden"][11, 3] = bad
    for coefficient in (0.0, 1.0):
        weights = [torch.ones(20), torch.ones(20), torch.ones(20)]
        for w in weights:
            w[11] = coefficient
        found = run(lambda x: ours(x, plan=plan), x, weights)
        others = torch.arange(20) != 11
        assert found["logp"][11].isnan() and found["entropy"][11].isnan()
        for name, c in zip(("logp", "entropy", "lse"), clean, strict=True):
            assert torch.equal(found[name][others], c[others])
        assert found["hidden"][others].isfinite().all()
        assert found["hidden"][11].isnan().all() == bool(coefficient)
        assert found["weight"].isfinite().all() != bool(coefficient)


def test_a_row_of_minus_infinity_and_a_target_at_it(small_tiles):
    bias = torch.full((50,), -math.inf)
    hidden, weight = torch.randn(2, 4), torch.randn(50, 4)
    found = linear_token_stats(hidden, weight, torch.tensor([3, 40]), bias=bias)
    assert found.logp.isnan().all() and found.entropy.isnan().all() and (found.lse == -math.inf).all()
    bias[40] = 0.0
    found = linear_token_stats(hidden, weight, torch.tensor([3, 40]), bias=bias)
    assert found.logp.tolist() == [-math.inf, 0.0] and found.entropy.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("plan", PLANS)
def test_a_nan_coefficient_is_live(plan):
    x = problem(N=3)
    found = run(lambda x: ours(x, plan=plan), x, [torch.tensor([0.0, math.nan, 1.0]), torch.zeros(3), torch.zeros(3)])
    assert found["hidden"][1].isnan().all() and found["hidden"][2].isfinite().all() and (found["hidden"][0] == 0).all()


def test_bf16_inputs_give_a_logp_a_hundred_times_closer_than_bf16_logits():
    x = problem(N=64, V=5000, D=256, dtype=torch.bfloat16)
    exact = textbook(x, torch.float64)[0]
    rounded = (x["hidden"].double() @ x["weight"].double().T).bfloat16().double()
    rounded = reference.token_stats(rounded, x["target"])[0]
    found = ours(x)[0]
    assert 100 * (found - exact).abs().max() < (rounded - exact).abs().max()


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_entropy_of_a_peaked_row(on, dtype):
    V = 5000
    weight = torch.tensor([[80.0, 0.0]]).repeat(V, 1)
    weight[0, 1] = 18.375
    x = {"hidden": torch.ones(1, 2), "weight": weight}
    x = {k: v.to(dtype).to("cpu" if on == "torch" else DEVICE) for k, v in x.items()}
    x["target"] = torch.zeros(1, dtype=torch.int64, device=x["hidden"].device)
    exact = textbook(x, torch.float64)[1].item()
    assert 0.8e-3 < exact < 1.2e-3
    with backends.backend(on):
        assert abs(ours(x)[1].item() / exact - 1) < 0.01


@pytest.mark.parametrize("plan", PLANS)
def test_the_weights_gradient_does_not_drift_over_a_thousand_chunks(monkeypatch, plan):
    monkeypatch.setattr(vocab_loop, "CPU_ROWS", 1)
    N, V, D = 1024, 8, 16
    g = torch.Generator().manual_seed(0)
    x = {"hidden": torch.rand(N, D, generator=g) + 0.5, "weight": 0.1 * torch.randn(V, D, generator=g)}
    x = {name: v.bfloat16() for name, v in x.items()}
    x["target"] = torch.zeros(N, dtype=torch.int64)  # every row pushes the same way
    weights = [torch.ones(N), torch.zeros(N), torch.zeros(N)]
    exact = run(lambda x: textbook(x, torch.float64), x, weights, torch.float64)["weight"]
    found = run(lambda x: ours(x, plan=plan), x, weights)["weight"].double() / exact - 1
    p = (x["hidden"].double() @ x["weight"].double().T).softmax(-1)
    p[:, 0] -= 1
    added_up = torch.zeros(V, D, dtype=torch.bfloat16)
    for row in (-p[:, :, None] * x["hidden"].double()[:, None]).bfloat16():
        added_up += row
    drift = added_up.double() / exact - 1
    step = 2**-7
    assert found.abs().max() <= step / 2 * 1.001  # rounded once
    assert found.mean().abs() < step / 16
    assert drift.mean().abs() > 50 * found.mean().abs() and drift.mean().abs() > step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_bits_depend_neither_on_the_plan_nor_on_the_gradient(small_tiles, dtype, softcap):
    x = problem(N=45, V=50, dtype=dtype, bias=True)
    mask = torch.rand(45, generator=torch.Generator().manual_seed(0)) < 0.8
    with torch.no_grad():
        expected = linear_token_stats(
            x["hidden"], x["weight"], x["target"], bias=x["bias"], mask=mask, softcap=softcap
        )  # fmt: skip
    for name in NAMES:
        x[name].requires_grad_()
    gradients = []
    for plan in PLANS:
        for share in (None, 0.0, 0.02, 0.5, 1.0):  # None: all are candidates
            candidates = None if share is None else torch.arange(45) % 50 < 50 * share
            inputs = HeadInputs(x["hidden"], x["weight"], x["target"], x["bias"], mask, softcap=softcap)
            call = prepare(inputs, HeadOptions(plan), Expected(candidates))
            stats = call.stats(OUTPUTS, True)
            assert all(torch.equal(stats[i], expected[i]) for i in range(3)), (plan, share)
            live = mask if candidates is None else mask & candidates
            found = torch.autograd.grad(stats.logp[live].sum(), (x["hidden"], x["weight"]))
            if share == 0.5:
                gradients.append(found)
    # The number of rows may change the bits of a product: "recompute" has live rows only.
    assert_sums_close(*gradients, terms=50)


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_bits_twice(small_tiles, plan):
    x = problem(N=45, V=50, dtype=torch.bfloat16, bias=True)
    first, second = (run(lambda x: ours(x, plan=plan), x, [torch.ones(45)] * 3) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [33, 64])
def test_batch_invariant_rows_do_not_see_each_other(dtype, D):
    x = problem(N=300, V=2500, D=D, dtype=dtype)
    t = torch.linspace(0.5, 2.0, 300)

    def of(rows, keep=False):
        return linear_token_stats(
            x["hidden"][rows].requires_grad_(keep), x["weight"], x["target"][rows], temperature=t[rows],
            batch_invariant=True, plan="keep" if keep else "auto",
        )  # fmt: skip

    among_all = of(torch.arange(300))
    for rows in ([0], [7], [127], [128], [299], [3, 9, 150, 200, 299], [299, 3], list(range(170))[::-1]):
        for keep in (False, True):
            stats = of(torch.tensor(rows), keep)
            assert all(torch.equal(stats[i], among_all[i][rows]) for i in range(3)), (rows, keep)
    mask = torch.arange(300) % 7 == 3
    stats = linear_token_stats(
        x["hidden"], x["weight"], x["target"], mask=mask, temperature=t, batch_invariant=True
    )  # fmt: skip
    assert all(torch.equal(stats[i][mask], among_all[i][mask]) for i in range(3))


def test_batch_invariance_is_as_right_and_has_gradients():
    x = problem(N=130, V=60, bias=True)
    weights = [torch.ones(130)] * 3
    found, expected = (run(lambda x, i=i: ours(x, batch_invariant=i), x, weights) for i in (True, False))
    for name, e in expected.items():
        assert_sums_close(found[name], e, 60)


class Memory(TorchDispatchMode):
    """Peak bytes of the tensors created inside, and the number of entries of the largest one."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in known:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.largest = max(self.largest, storage.nbytes() // x.element_size())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def memory_of_a_step(plan, N, V, D=8, dtype=torch.float32) -> Memory:
    x = problem(N=N, V=V, D=D, dtype=dtype)
    for name in ("hidden", "weight"):
        x[name].requires_grad_()
    with Memory() as memory:
        ours(x, plan=plan)[0].sum().backward()
    return memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recompute_holds_nothing_of_rows_times_vocabulary(monkeypatch, dtype):
    monkeypatch.setattr(vocab_loop, "CPU_ROWS", 100)
    monkeypatch.setattr(vocab_loop, "CPU_WIDTH", 200)
    D, tile = 8, 100 * 200
    peaks = {}
    for N, V in ((250, 500), (1000, 500), (250, 2000), (1000, 2000)):
        memory = memory_of_a_step("recompute", N, V, D, dtype)
        assert memory.largest <= max(N * 2 * D, V * D, tile)
        # The gradients, hidden widened and its gradient in fp32, 40 numbers a row, and a few tiles.
        assert memory.peak <= 4 * (V * D + 3 * N * D + 40 * N + 6 * tile + 4 * 200 * D)
        peaks[N, V] = memory.peak
    # The mixed difference isolates memory that grows as N V, as logits do; the rest is linear in N and in V.
    mixed = peaks[1000, 2000] - peaks[1000, 500] - peaks[250, 2000] + peaks[250, 500]
    assert abs(mixed) < 0.01 * 4 * 750 * 1500
    kept = memory_of_a_step("keep", 1000, 2000, D, dtype)
    assert kept.peak >= 4 * 1000 * 2000 and kept.largest <= 1000 * 200


@pytest.mark.parametrize("live", [1.0, 0.5])
def test_kept_logits_are_released_block_by_block(monkeypatch, live):
    monkeypatch.setattr(vocab_loop, "CPU_WIDTH", 16)
    blocks, alive = [], []
    forward, folder = vocab_loop.forward, logits_tile
    gradient_tile = folder.gradient_tile

    def spied_forward(*args, **kwargs):
        stats, kept = forward(*args, **kwargs)
        assert isinstance(kept, vocab_loop.Kept)
        blocks.extend(StorageWeakRef(block.untyped_storage()) for block in kept.blocks)
        return stats, kept

    def spied_gradient(*args):
        alive.append(sum(not block.expired() for block in blocks))
        return gradient_tile(*args)

    monkeypatch.setattr(vocab_loop, "forward", spied_forward)
    monkeypatch.setattr(folder, "gradient_tile", spied_gradient)
    x = problem(N=20, V=64)
    x["hidden"].requires_grad_()
    loss = (ours(x, plan="keep")[0] * (torch.arange(20) < live * 20)).sum()
    assert len(blocks) == 4 and not any(block.expired() for block in blocks)
    loss.backward()
    # The gradient of a block reuses its memory until the next block. If only some rows are live, those were copied and
    # the blocks freed before.
    assert alive == ([4, 4, 3, 2] if live == 1 else [0] * 4)
    assert all(block.expired() for block in blocks)


def test_leading_shapes_strides_and_int32():
    x = problem(N=24, V=50, bias=True)
    expected = run(ours, x, [torch.ones(24)] * 3)
    columns = torch.cat([x["hidden"], torch.full((24, 1), math.nan)], 1)
    variants = {
        "sequences": (x["hidden"].view(2, 3, 4, -1), x["target"].view(2, 3, 4)),
        "cut": (columns[:, :-1], x["target"].int()),
        "transposed": (x["hidden"].T.contiguous().T, x["target"]),
        "swapped": (x["hidden"].view(4, 6, -1).transpose(0, 1).contiguous().transpose(0, 1), x["target"].view(4, 6)),
    }
    for hidden, target in variants.values():
        for weight in (x["weight"], x["weight"].T.contiguous().T):
            h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            stats = linear_token_stats(h, w, target, bias=x["bias"], entropy_grad=True)
            assert stats.logp.shape == target.shape
            (stats.logp + stats.entropy + stats.lse).sum().backward()
            assert_sums_close(stats.logp.flatten(), expected["logp"], 24)
            assert_sums_close(h.grad.reshape(24, -1), expected["hidden"], 64)
            assert_sums_close(w.grad, expected["weight"], 64)
    alone = linear_token_stats(x["hidden"][0], x["weight"], x["target"][0], bias=x["bias"])
    assert alone.logp.shape == ()
    torch.testing.assert_close(alone.logp, expected["logp"][0])


@pytest.mark.parametrize("wrong", [-1, 9, 10])
def test_a_target_outside_the_vocabulary_that_is_not_looked_at_is_nan(monkeypatch, wrong):
    monkeypatch.setattr("rlloss.logits.statistics.checks.values_checked", lambda x: False)  # as on a GPU
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 4, generator=g).requires_grad_(), torch.randn(9, 4, generator=g)
    logp = linear_token_stats(hidden, weight, torch.tensor([0, wrong, 8])).logp
    (gradient,) = torch.autograd.grad(logp.sum(), hidden)
    assert logp.isnan().tolist() == gradient.isnan().all(-1).tolist() == [False, True, False]
