"""Test the gauges against hand-worked numbers, fp64 formulas, splits of a batch, verl's covariance and the theory."""

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlloss.entropy.diagnostics import DIFFICULTIES, EntropyFit, diagnose, gauges, pack, trend, unpack
from tests.losses import test_peers

NAN = math.nan
verl = test_peers.verl  # its fixture


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def batch(seed: int, B=5, T=11, *, per_token=False, dtype=torch.float32) -> dict:
    g = torch.Generator().manual_seed(seed)
    logp = (-3 * torch.rand(B, T, generator=g)).to(dtype)
    old_logp = logp + (0.3 * torch.randn(B, T, generator=g)).to(dtype)
    same = torch.rand(B, T, generator=g) < 0.4
    return {
        "logp": logp,
        "advantage": torch.randn((B, T) if per_token else (B,), generator=g).to(dtype),
        "mask": torch.rand(B, T, generator=g) < 0.7,
        "entropy": (torch.randn(B, T, generator=g) * 2 - 2).exp().to(dtype),
        "old_logp": torch.where(same, logp, old_logp),
        "group": torch.rand(B, generator=g),
    }


def read(sums) -> dict[str, float]:
    return {name: value.item() for name, value in gauges(sums).items()}


def covariance(x, y):
    return torch.cov(torch.stack([x.double(), y.double()]), correction=0)[0, 1].item()


def assert_same(found: dict, expected: dict, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True), name


def test_by_hand():
    log2 = math.log(2)
    found = read(
        diagnose(
            f64([[-1.0, -3.0, NAN]]), f64([[1.0, -1.0, NAN]]), torch.tensor([[True, True, False]]),
            entropy=f64([[0.005, 3.0, NAN]]), old_logp=f64([[-1.0, -3.0 - log2, NAN]]),
        )
    )  # fmt: skip
    assert found["cov/logp_advantage"] == pytest.approx(1.0)  # ((-1 + 2) 1 + (-3 + 2) (-1)) / 2
    assert found["cov/logp_prob_advantage"] == pytest.approx((math.exp(-1) + math.exp(-3)) / 2)
    assert found["entropy/mean"] == pytest.approx(1.5025)
    assert found["entropy/below_0.01_share"] == 0.5
    assert found["on_policy_share"] == 0.5
    assert found["abs_log_ratio"] == pytest.approx(log2 / 2)
    assert found["approx_kl"] == pytest.approx((1 - log2) / 2)  # r = 1: 0; r = 2: 2 - 1 - log 2
    assert found["nonfinite_share"] == 0.0


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_direct_formulas(dtype, per_token):
    for seed in range(5):
        x = batch(seed, per_token=per_token, dtype=dtype)
        mask, group = x["mask"], x["group"]
        found = read(diagnose(**x))
        advantage = x["advantage"].view(5, -1).expand(5, 11)
        bins = {
            "": torch.ones(5, dtype=torch.bool),
            **{f"/{name}": (group >= i / 4) & (group < (i + 1) / 4) for i, name in enumerate(DIFFICULTIES)},
        }
        for name, sequences in bins.items():
            kept = mask & sequences[:, None]
            if not kept.any():
                assert math.isnan(found[f"cov/logp_advantage{name}"])
                continue
            logp, a = x["logp"][kept].double(), advantage[kept].double()
            assert found[f"cov/logp_advantage{name}"] == pytest.approx(covariance(logp, a), rel=1e-12, abs=1e-15)
            expected = covariance(logp, logp.exp() * a)
            assert found[f"cov/logp_prob_advantage{name}"] == pytest.approx(expected, rel=1e-12, abs=1e-15)
            if name:
                share = kept.sum().item() / mask.sum().item()
                assert found[f"difficulty{name}_share"] == pytest.approx(share, rel=1e-12)
        entropy, difference = x["entropy"][mask].double(), (x["logp"].double() - x["old_logp"].double())[mask]
        assert found["entropy/mean"] == pytest.approx(entropy.mean().item(), rel=1e-12)
        assert found["entropy/below_0.01_share"] == (entropy < 0.01).double().mean().item()
        eps = torch.finfo(dtype).eps
        rounding = (2 * eps + 64 * min(eps, 2**-23)) * (1 + x["logp"][mask].double().abs())
        assert found["on_policy_share"] == (difference.abs() <= rounding).double().mean().item()
        assert found["abs_log_ratio"] == pytest.approx(difference.abs().mean().item(), rel=1e-12)
        assert found["approx_kl"] == pytest.approx((difference.exp() - 1 - difference).mean().item(), rel=1e-12)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(seed=st.integers(0, 1000), rows=st.sets(st.integers(1, 4)), columns=st.sets(st.integers(1, 10)))
def test_any_split_gives_the_whole(seed, rows, columns):
    x = batch(seed, per_token=bool(seed % 2))
    x["logp"][1, 1], x["entropy"][2, 2], x["group"][seed % 5] = NAN, math.inf, NAN
    whole = diagnose(**x)
    total = torch.zeros_like(pack(whole))
    row_edges, column_edges = [0, *sorted(rows), 5], [0, *sorted(columns), 11]
    for (r, s), (c, d) in itertools.product(itertools.pairwise(row_edges), itertools.pairwise(column_edges)):
        part = {name: v[r:s] if v.ndim == 1 else v[r:s, c:d] for name, v in x.items()}
        total += pack(diagnose(**part))
    assert_same(read(unpack(total, whole)), read(whole))


def test_a_spread_far_below_the_mean():
    """Relative error seen: 2e-8 = 2^-53 * 700 * 3000 / 0.01; sums in fp32 have no correct digit."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 500, generator=g)
    logp, advantage = -700 + 0.01 * noise, 3000 + noise + torch.randn(64, 500, generator=g)
    found = read(diagnose(logp, advantage, torch.ones(64, 500, dtype=torch.bool)))["cov/logp_advantage"]
    x, a = ([Fraction(v) for v in values.flatten().tolist()] for values in (logp, advantage))
    exact = sum(p * q for p, q in zip(x, a, strict=True)) / len(x) - sum(x) / len(x) * (sum(a) / len(a))
    assert found == pytest.approx(float(exact), rel=1e-7)
    in_fp32 = (logp * advantage).mean() - logp.mean() * advantage.mean()
    assert abs(in_fp32.item() / float(exact) - 1) > 0.5


def test_verls_covariance(verl):
    """verl's Clip-Cov counts tokens whose covariance exceeds a bound. Bisection of the bound finds each covariance."""
    x = batch(3, B=3, T=5, per_token=True, dtype=torch.float64)
    tokens = int(x["mask"].sum())

    def above(bound: float) -> int:
        config = test_peers.ActorConfig()
        config.policy_loss = SimpleNamespace(clip_cov_ratio=1.0, clip_cov_lb=bound, clip_cov_ub=math.inf)
        metrics = verl.compute_policy_loss_clip_cov(
            x["logp"], x["logp"], x["advantage"], x["mask"].double(), "token-mean", config
        )[1]
        share = metrics["actor/pg_clipfrac"]
        return round(float(share) * tokens)

    covariances = []
    for rank in range(tokens):
        low, high = -50.0, 50.0
        for _ in range(45):
            middle = (low + high) / 2
            low, high = (middle, high) if above(middle) > rank else (low, middle)
        covariances.append(low)
    found = read(diagnose(x["logp"], x["advantage"], x["mask"]))["cov/logp_advantage"]
    assert found == pytest.approx(math.fsum(covariances) / tokens, abs=1e-9)  # verl adds 1e-8 to a count
    assert abs(found) > 1e-3


@pytest.mark.parametrize("gauge, natural", [("cov/logp_advantage", True), ("cov/logp_prob_advantage", False)])
def test_the_entropy_of_a_softmax_policy_moves_by_minus_eta_times_the_covariance(gauge, natural):
    """2505.22617, section 3: one state, tokens weighted by their probability, centred advantages."""
    counts = f64([1.0, 2.0, 5.0, 8.0])
    p = counts / counts.sum()
    a = f64([2.0, -1.0, 0.7, -0.2])
    a = a - (p * a).sum()
    tokens = torch.arange(4).repeat_interleave(counts.long())
    cov = read(diagnose(p.log()[tokens][None], a[tokens][None], torch.ones(1, 16, dtype=torch.bool)))[gauge]

    def entropy(z):
        return -(z.softmax(0) * z.log_softmax(0)).sum().item()

    eta, step = 1e-6, a if natural else p * a
    moved = (entropy(p.log() + eta * step) - entropy(p.log() - eta * step)) / (2 * eta)
    assert moved == pytest.approx(-cov, rel=1e-6)


@pytest.mark.parametrize("name", ["log-normal", "half near zero", "two modes", "zeros", "large", "one", "two"])
def test_quantiles_lie_within_two_percent_or_a_thousandth(name):
    g = torch.Generator().manual_seed(1)
    n = 20000
    values = {
        "log-normal": (2 * torch.randn(n, generator=g) - 2).exp(),
        "half near zero": torch.where(torch.rand(n, generator=g) < 0.5, 1e-5, 1.0) * torch.rand(n, generator=g),
        "two modes": torch.where(torch.rand(n, generator=g) < 0.79, 0.02, 3.0),
        "zeros": torch.zeros(n) - 1e-7,  # rounding can leave an entropy below 0
        "large": 12 * torch.rand(n, generator=g),
        "one": torch.tensor([0.672]),
        "two": torch.tensor([0.1, 2.0]),
    }[name]
    entropy = torch.cat([values, torch.full((7,), 9.0)])[None]
    mask = torch.arange(entropy.numel())[None] < values.numel()
    zeros = torch.zeros_like(entropy)
    found = read(diagnose(zeros, zeros, mask, entropy=entropy))
    for quantile, share in {"p50": 0.5, "p80": 0.8, "p95": 0.95}.items():
        exact = np.quantile(values.double().numpy(), share, method="inverted_cdf")
        assert found[f"entropy/{quantile}"] == pytest.approx(exact, rel=0.02, abs=1e-3)
        if name in ("log-normal", "large"):  # without ties it is far closer
            assert found[f"entropy/{quantile}"] == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("std", [0.003, 0.02, 0.05])
def test_a_quantile_moves_with_the_entropies_and_not_from_bin_to_bin(std):
    """The bins at 3.7 nats are 0.071 wide. Each step of the mean is 0.003."""
    noise = std * torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mean in np.arange(3.69, 3.77, 0.003):
        entropy = (mean + noise)[None]
        zeros = torch.zeros_like(entropy)
        found = read(diagnose(zeros, zeros, zeros == 0, entropy=entropy))
        for name, share in {"p50": 0.5, "p80": 0.8, "p95": 0.95}.items():
            exact = np.quantile(entropy.numpy(), share, method="inverted_cdf")
            # The bound is relative to std: values are assumed uniform within a bin, and normal values are not.
            assert abs(found[f"entropy/{name}"] - exact) <= 0.3 * std, (name, mean)


ROUNDED = [(torch.float32, None, 1e-6), (torch.bfloat16, None, 0.01), (torch.float32, torch.bfloat16, 0.01)]


@pytest.mark.parametrize("dtype, compute_dtype, noise", ROUNDED, ids=str)
def test_a_ratio_of_rounding_is_on_policy_and_one_of_an_update_is_not(dtype, compute_dtype, noise):
    logp = -(1 + torch.arange(64, dtype=torch.float64) / 8)[None]
    mask = torch.ones_like(logp, dtype=torch.bool)
    for factor, share in ((0.0, 1.0), (1.0, 1.0), (30.0, 0.0)):
        moved = logp + factor * noise * (1 + logp.abs())
        sums = diagnose(
            moved.to(dtype), torch.ones(1, dtype=dtype), mask, old_logp=logp.to(dtype), compute_dtype=compute_dtype
        )
        assert read(sums)["on_policy_share"] == share


def test_beyond_the_last_edge_the_quantile_is_that_edge():
    entropy = f64([[20.0, 30.0, 40.0]])
    found = read(diagnose(entropy, entropy, entropy > 0, entropy=entropy))
    assert found["entropy/p50"] == found["entropy/p95"] == pytest.approx(1e-3 * 2**14)
    assert found["entropy/mean"] == 30.0


def test_a_broken_token_is_left_out_where_it_is_read_and_counted():
    x = batch(0, per_token=True)
    clean, reads = read(diagnose(**x)), {
        "logp": ("cov", "difficulty", "on_policy", "abs", "approx"), "advantage": ("cov", "difficulty"),
        "entropy": ("entropy",), "old_logp": ("on_policy", "abs", "approx"),
    }  # fmt: skip
    at = tuple(x["mask"].nonzero()[3].tolist())
    without = {**x, "mask": x["mask"].clone()}
    without["mask"][at] = False
    without = read(diagnose(**without))
    for name, broken in itertools.product(reads, (NAN, math.inf, -math.inf)):
        y = {**x, name: x[name].clone()}
        y[name][at] = broken
        found = read(diagnose(**y))
        assert found.pop("nonfinite_share") == pytest.approx(1 / x["mask"].sum().item())
        expected = {k: (without if k.startswith(reads[name]) else clean)[k] for k in found}
        assert_same(found, expected)


def test_bins_of_accuracy():
    group = f64([0.0, 0.2, 0.25, 0.5, 0.7, 0.75, 1.0, NAN])
    sums = diagnose(torch.zeros(8, 2), torch.zeros(8), torch.ones(8, 2, dtype=torch.bool), group=group)
    found = read(sums)
    assert [found[f"difficulty/{name}_share"] for name in DIFFICULTIES] == [4 / 16, 2 / 16, 4 / 16, 4 / 16]


def test_an_empty_mask_says_nothing():
    x = batch(0)
    x["mask"] = torch.zeros_like(x["mask"])
    sums = diagnose(**x)
    assert all((value == 0).all() for value in sums.values())
    assert all(math.isnan(value) for value in read(sums).values())
    empty = diagnose(torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 3, dtype=torch.bool))
    assert empty["tokens"] == 0


def test_what_is_not_given_is_not_said():
    x = batch(0)
    found = read(diagnose(x["logp"].requires_grad_(), x["advantage"], x["mask"]))
    assert found.keys() == {"nonfinite_share", "cov/logp_advantage", "cov/logp_prob_advantage"}


def test_nothing_is_read_back_from_the_device():
    # A meta tensor has no data: any .item(), bool() or tolist() of it raises.
    sums = diagnose(**{name: value.to("meta") for name, value in batch(0).items()})
    assert {(value.dtype, value.requires_grad) for value in sums.values()} == {(torch.float64, False)}
    assert all(value.shape == () for value in gauges(unpack(pack(sums), sums)).values())


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_gpu():
    x = {name: value.cuda() for name, value in batch(0, B=64, T=999).items()}
    read(diagnose(**x))  # makes the histogram's edges
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = gauges(unpack(pack(diagnose(**x)), diagnose(**x)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same({name: value.item() for name, value in found.items()}, read(diagnose(**batch(0, B=64, T=999))), 1e-11)


def test_entropy_fit_by_hand():
    fit = EntropyFit()
    assert math.isnan(fit.slope) and math.isnan(fit.correlation)
    for entropy, cov in ((1.0, 0.0), (1.0, 1.0), (0.5, 2.0), (-0.75, 9.0)):
        fit.update(entropy, torch.tensor(cov))
    # Pairs (0, 0), (1, -0.5), (2, -1.25): the means 1 and -1.75 / 3, sum dx dy = -1.25, sum dx^2 = 2, dy^2 = 4.75 / 6.
    assert fit.count == 3
    assert fit.slope == -0.625
    assert fit.correlation == pytest.approx(-1.25 / math.sqrt(2 * 4.75 / 6), rel=1e-15)


def test_entropy_fit_skips_what_is_not_finite_and_loses_nothing():
    fit, line = EntropyFit(), EntropyFit()
    for entropy, cov in ((1.0, 2.0), (NAN, 1.0), (1.0, 1.0), (2.0, NAN), (3.0, 5.0), (1.0, 7.0)):
        fit.update(entropy, cov)
    assert fit.count == 2  # (1, 1) and (5, -2)
    assert fit.slope == -0.75 and fit.correlation == -1.0
    entropy = 2.0**30
    for step in range(2000):  # covariances of 2^40 + 0 or 1, which fp64 sums of squares would lose
        line.update(entropy, 2.0**40 + step % 2)
        entropy -= 2.0**-10 * (step % 2)
    assert line.slope == -(2.0**-10) and line.correlation == -1.0


def test_trend_by_hand_and_as_numpy():
    line = trend([1.0, 2.0, 4.0])  # residuals 1/6, -1/3, 1/6
    assert line == pytest.approx((1.5, math.sqrt(1 / 6 / 2), 7 / 3 + 1.5))
    assert line.after(2) == pytest.approx(7 / 3 + 4.5)
    assert line.rises(5.0) and not line.rises(5.5) and not line.falls(0.0)  # 1.5 / 0.289 = 5.2
    values = [1.0, -1.0, 2.0, 0.5, 3.0, 1.0]
    (slope, level), cov = np.polyfit(np.arange(6), values, 1, cov=True)
    assert trend(values) == pytest.approx((slope, math.sqrt(cov[0, 0]), level + 5 * slope))
    assert trend([2.0] * 4) == (0.0, 0.0, 2.0) and not trend([2.0] * 4).falls(0.0)
    with pytest.raises(ValueError, match="values: found 2 of them, expected at least 3"):
        trend([1.0, 2.0])


def test_the_error_of_a_trend_knows_that_neighbours_err_alike():
    """With noise of correlation 0.6 the slopes scatter by their error within 25 %; uncorrected by twice the error."""
    g = torch.Generator().manual_seed(0)
    slopes, errors = [], []
    for _ in range(300):
        noise = torch.randn(150, generator=g, dtype=torch.float64).tolist()
        values = list(itertools.accumulate(noise, lambda x, e: 0.6 * x + e))
        line = trend(values[-100:])
        slopes.append(line.slope)
        errors.append(line.error)
    assert np.std(slopes) == pytest.approx(np.mean(errors), rel=0.25)
