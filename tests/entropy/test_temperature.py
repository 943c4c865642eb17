"""Test entropy-dependent temperature: hand-worked numbers, an fp64 oracle, both backends, the loss, bad arguments."""

import math

import pytest
import torch

from rlloss import backends, reference, token_stats
from rlloss.entropy.temperature import (
    MIN_TEMPERATURE,
    DynamicTemperature,
    EDTemperature,
    TwoLevelTemperature,
    entropy_temperature,
    scale_logits,
    temperature_rule,
)
from rlloss.torch_kernels.rows import TILE_ENTRIES
from tests.support.rounding import FP32, assert_sums_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["interpreter", "torch"] if DEVICE == "cpu" else ["triton", "torch"]
kernels = pytest.mark.skipif(not backends.triton, reason="needs Triton")
RULES = [
    TwoLevelTemperature(high=1.3, low=0.8, cutoff=2.0),
    EDTemperature(base=1.1, theta=0.6),
    DynamicTemperature(low=0.4, high=1.7, exponent=1.5),
]
GREEDY = [
    TwoLevelTemperature(high=1.3, low=0.0, cutoff=20.0),
    EDTemperature(base=1.0, theta=500.0, minimum=0),
    DynamicTemperature(low=0.0, high=0.01, exponent=2.0),
]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
NAN, INF = math.nan, math.inf


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param != "torch" and not backends.triton:
        pytest.skip("needs Triton")
    with backends.backend(request.param):
        yield request.param


def make_logits(kind: str, N: int, V: int, dtype=torch.float32, seed=0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=g) * 2
    if kind == "uniform":
        logits *= 0.01
    if kind == "peaked":
        logits[torch.arange(N), torch.randint(0, V, (N,), generator=g)] += 10 + math.log(V)
    if kind == "-inf" and V > 4:
        logits[:, : V // 3] = -INF
        logits[:, -V // 8 :] = -INF
    return logits.to(dtype).to(DEVICE)


def oracle(logits: torch.Tensor, rule) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, H) by the formulas, in fp64, for logits [N, V]."""
    z = logits.double()
    H = reference.token_stats(z, z.argmax(-1))[1]
    if rule.name == "two_level":
        T = torch.where(H > rule.cutoff, rule.high, torch.full_like(H, rule.low))
    elif rule.name == "edt":
        T = (rule.base * rule.N ** (rule.theta / H.abs())).clamp(min=rule.minimum)
    else:
        most = (z > -INF).sum(-1).double().log()
        T = rule.low + (rule.high - rule.low) * torch.where(most > 0, H / most, 0.0) ** rule.exponent
    return torch.where(T < MIN_TEMPERATURE, 0.0, T), H


def test_hand_worked_temperatures():
    entropy = torch.tensor([0.0, 0.5, 0.672, 0.7, math.log(4), NAN])
    two_level = TwoLevelTemperature(high=1.2).temperature(entropy)
    torch.testing.assert_close(two_level, torch.tensor([1.0, 1.0, 1.0, 1.2, 1.2, NAN]), equal_nan=True)
    # theta / H = 0, 1, 2, 10 and 100: base times 1, 0.8, 0.64, 0.8^10 and, below 0.01, the minimum
    edt = EDTemperature(base=2.0, theta=0.5).temperature(torch.tensor([INF, 0.5, 0.25, 0.05, 0.005, 0.0, NAN]))
    expected = torch.tensor([2.0, 1.6, 1.28, 2 * 0.8**10, 0.01, 0.01, NAN])
    torch.testing.assert_close(edt, expected, equal_nan=True, rtol=1e-6, atol=0)
    assert EDTemperature(base=2.0, theta=0.5).temperature(torch.tensor([-1e-8])).item() == pytest.approx(0.01)
    # of log 4 nats: nothing, a half, everything; squared a quarter
    share = torch.tensor([0.0, 0.5, 1.0]) * math.log(4)
    linear, square = DynamicTemperature(0.5, 1.5), DynamicTemperature(0.5, 1.5, exponent=2.0)
    torch.testing.assert_close(linear.temperature(share, 4), torch.tensor([0.5, 1.0, 1.5]))
    torch.testing.assert_close(square.temperature(share, 4), torch.tensor([0.5, 0.75, 1.5]))
    by_row = linear.temperature(torch.tensor([0.0, math.log(2), math.log(2), NAN]), torch.tensor([1, 2, 4, 4]))
    torch.testing.assert_close(by_row, torch.tensor([0.5, 1.5, 1.0, NAN]), equal_nan=True)


def test_hand_worked_rows(backend):
    logits = torch.tensor([[5.0, 5.0, 5.0, 5.0], [0.0, -INF, 0.0, -INF], [-INF, -INF, 3.0, -INF]], device=DEVICE)
    entropies = torch.tensor([math.log(4), math.log(2), 0.0], device=DEVICE)
    for rule, expected in [
        (TwoLevelTemperature(high=1.25, low=0.5, cutoff=1.0), [1.25, 0.5, 0.5]),
        (EDTemperature(base=2.0, theta=math.log(4)), [1.6, 1.28, 0.01]),
        (DynamicTemperature(0.5, 1.5), [1.5, 1.5, 0.5]),
    ]:
        scaled = scale_logits(logits, rule)
        T = torch.tensor(expected, device=DEVICE)
        assert_sums_close(scaled.entropy, entropies, 64)
        assert_sums_close(scaled.temperature, T, 64)
        torch.testing.assert_close(scaled.logits, logits / T[:, None], rtol=64 * FP32, atol=0)


@rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["uniform", "spread", "peaked", "-inf"])
@pytest.mark.parametrize("V", [1, 7, 128, 1000, 1025, 5001])
def test_temperature_entropy_and_logits_are_those_of_the_oracle(backend, V, kind, dtype, rule):
    logits = make_logits(kind, 5, V, dtype)
    scaled = scale_logits(logits, rule)
    T, H = oracle(logits, rule)
    assert scaled.temperature.dtype == scaled.entropy.dtype == torch.float32 and scaled.logits.dtype == dtype
    allowed = 64 * FP32 * (H + 1)
    assert ((scaled.entropy - H).abs() <= allowed).all()
    if rule.name == "edt":  # dT / T = theta log(1 / N) dH / H^2
        allowed = 64 * FP32 * T + T * rule.theta * math.log(1 / rule.N) * allowed / H.clamp(min=1e-4) ** 2
    assert ((scaled.temperature - T).abs() <= allowed).all()
    exact = logits.double() / scaled.temperature.double()[:, None]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        scaled.logits.double(), exact, rtol=2 * FP32 if dtype == torch.float32 else eps / 2, atol=1e-6
    )
    for x, y in zip(entropy_temperature(logits, rule), scaled[1:], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("rule", GREEDY, ids=lambda rule: rule.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_temperature_of_0_keeps_the_largest_logits(monkeypatch, backend, dtype, rule):
    logits = make_logits("spread", 4, 3000, dtype)
    logits[1, [5, 2999]] = 30.0  # equal largest ones share
    logits[2, :2990] = -INF
    scaled = scale_logits(logits, rule)
    assert (scaled.temperature == 0).all()
    best = logits.amax(-1, keepdim=True)
    assert torch.equal(scaled.logits, torch.where(logits == best, logits, -INF))
    assert torch.equal(scaled.logits.argmax(-1), logits.argmax(-1))
    assert (scaled.logits > -INF).sum(-1).tolist() == [1, 2, 1, 1]
    monkeypatch.setenv("RLLOSS_CHECK", "1")
    with pytest.raises(ValueError, match="temperature: found an entry that is 0"):
        token_stats(logits, logits.argmax(-1), temperature=scaled.temperature)


@rules
def test_a_bad_row_poisons_only_itself(backend, rule):
    logits = make_logits("spread", 5, 300)
    good = scale_logits(logits, rule)
    logits[0], logits[1, 7], logits[2, 3] = -INF, NAN, INF
    found = scale_logits(logits, rule)
    for x, y in zip(found, good, strict=True):
        assert x[:3].isnan().all()
        assert torch.equal(x[3:], y[3:])


@rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_with_and_without_a_mask(backend, dtype, rule):
    logits = make_logits("spread", 6, 1300, dtype).view(2, 3, 1300)
    fresh = scale_logits(logits, rule)
    overwritten = logits.clone()
    scaled = scale_logits(overwritten, rule, inplace=True)
    assert scaled.logits is overwritten
    for x, y in zip(scaled, fresh, strict=True):
        assert torch.equal(x, y)
    mask = torch.tensor([[True, False, True], [False, False, True]], device=DEVICE)
    partly = scale_logits(logits.clone(), rule, mask=mask, inplace=True)
    # torch on a GPU sums a row in another order if there are fewer rows.
    close = {"rtol": 0, "atol": 0} if backend != "torch" or DEVICE == "cpu" else {"rtol": 1e-2, "atol": 1e-5}
    expected = (
        torch.where(mask[..., None], fresh.logits, logits),
        torch.where(mask, fresh.temperature, 1.0),
        torch.where(mask, fresh.entropy, 0.0),
    )
    for x, y in zip(partly, expected, strict=True):
        torch.testing.assert_close(x, y, **close)
    assert torch.equal(partly.logits[~mask], logits[~mask])
    none = scale_logits(logits.clone(), rule, mask=mask & False, inplace=True)
    assert torch.equal(none.logits, logits) and (none.temperature == 1).all()


@pytest.mark.parametrize("view", [
    lambda x: x[:, :, 1:301], lambda x: x[:, 1:], lambda x: x.transpose(0, 1), lambda x: x[..., ::2],
    lambda x: x[..., :5].transpose(1, 2), lambda x: x[0, 0], lambda x: x[:0],
])  # fmt: skip
def test_any_strides_and_shapes(backend, view):
    base = make_logits("spread", 12, 304).view(4, 3, 304)
    logits = view(base)
    expected = scale_logits(logits.contiguous().clone(), RULES[2])
    other = torch.ones_like(base, dtype=torch.bool)
    view(other)[...] = False
    untouched = base[other].clone()
    for inplace in (False, True):
        scaled = scale_logits(logits, RULES[2], inplace=inplace)
        assert scaled.logits.shape == logits.shape and scaled.temperature.shape == logits.shape[:-1]
        for x, y in zip(scaled, expected, strict=True):
            assert_sums_close(x, y, 64)
    assert torch.equal(base[other], untouched)


@kernels
@rules
@pytest.mark.parametrize("V", [300, 9000])
def test_the_kernel_gives_the_entropy_of_token_stats_and_the_same_bits_alone(V, rule):
    logits = make_logits("spread", 3, V)
    with backends.backend(BACKENDS[0]):
        scaled = scale_logits(logits, rule)
        assert_sums_close(scaled.entropy, token_stats(logits, logits.argmax(-1)).entropy, 64)
        assert torch.equal(scale_logits(logits[1:2], rule).logits[0], scaled.logits[1])  # alone as among others
    with backends.backend("torch"):
        for x, y in zip(scale_logits(logits, rule), scaled, strict=True):
            assert_sums_close(x, y, 64)


@kernels
@pytest.mark.parametrize("block_v", [64, 256])
def test_rows_of_several_chunks(block_v):
    logits = make_logits("-inf", 2, 5000)
    for rule in RULES:
        arguments = (logits, None, None, rule.name, rule.constants(), MIN_TEMPERATURE)
        T, H = backends.triton.entropy_temperature(*arguments, block_v=block_v)
        exact = oracle(logits, rule)
        for x, y in zip((T, H), exact, strict=True):
            assert_sums_close(x, y, 64)


def test_many_rows_over_several_tiles_on_the_torch_backend():
    V, N = 5000, 3 * TILE_ENTRIES // 5000 // 2
    logits = make_logits("-inf", N, V)
    mask = (torch.rand(N, generator=torch.Generator().manual_seed(1)) < 0.6).to(DEVICE)
    for rule in RULES:
        T, _ = oracle(logits, rule)
        with backends.backend("torch"):
            whole, partly = scale_logits(logits, rule), scale_logits(logits.clone(), rule, mask=mask, inplace=True)
        assert_sums_close(whole.temperature, T, 64)
        torch.testing.assert_close(whole.logits.double(), logits.double() / T[:, None], rtol=64 * FP32, atol=0)
        assert torch.equal(partly.logits, torch.where(mask[:, None], whole.logits, logits))


@rules
@pytest.mark.parametrize("kind", ["spread", "peaked", "-inf"])
def test_the_loss_side_sees_the_sampled_distribution(backend, kind, rule):
    logits = make_logits(kind, 12, 400)
    scaled = scale_logits(logits, rule)
    target = torch.multinomial(scaled.logits.softmax(-1), 1).squeeze(-1)
    sampled = scaled.logits.double().log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    trained = token_stats(logits, target, temperature=scaled.temperature).logp
    assert_sums_close(trained, sampled, 64, size=1)
    # and T follows again from the entropies of the unscaled logits
    candidates = (logits > -INF).sum(-1)
    again = rule.temperature(token_stats(logits, target).entropy, candidates)
    assert_sums_close(again, scaled.temperature, 64)


def test_double_precision_and_no_gradient():
    logits = make_logits("spread", 3, 50).double().requires_grad_()
    scaled = scale_logits(logits, RULES[1])
    assert scaled.temperature.dtype == torch.float64 and not scaled.logits.requires_grad
    torch.testing.assert_close(scaled.temperature, oracle(logits.detach(), RULES[1])[0], rtol=1e-13, atol=0)
    assert TwoLevelTemperature(high=1.2).temperature(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32


def test_torch_compile_takes_it():
    logits = make_logits("spread", 4, 64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        y = x + 1
        T, H = scale_logits(y, RULES[2], inplace=True)[1:]
        return y, T, H, entropy_temperature(x, RULES[0])[0]

    expected = scale_logits(logits + 1, RULES[2])
    for x, y in zip(step(logits), (*expected, entropy_temperature(logits, RULES[0])[0]), strict=True):
        assert torch.equal(x, y)


def test_rules_from_settings():
    assert temperature_rule({"rule": "two_level", "high": 1.2}) == TwoLevelTemperature(1.2, 1.0, 0.672)
    assert temperature_rule({"rule": "edt", "base": 1, "theta": 0.1}) == EDTemperature(1.0, 0.1, 0.8, MIN_TEMPERATURE)
    assert temperature_rule({"rule": "dynatemp", "low": 0, "high": 2}) == DynamicTemperature(0.0, 2.0, 1.0)
