"""Test log-ratios that overflow, underflow or are NaN: zeros stay exact, and a bad token affects no other."""

import itertools
import math
from functools import partial

import pytest
import torch

from rlloss import LossConfig, policy_loss
from rlloss.backends import backend
from rlloss.config import CovarianceConfig
from rlloss.loss_types import LOSSES
from tests.support.loss_cases import (
    BACKENDS,
    CLIPPED,
    COVARIANCE,
    LEVELS,
    LOSS_TYPES,
    SILENCES,
    TYPES_AND_LEVELS,
    arguments,
    batch,
    converted,
    make_config,
    ours,
    textbook,
    value_and_gradients,
)

# All tokens of the band are picked, or none: the log-ratio of one token does not change the pick of another.
NO_CONTEST = {
    "clip_cov": {"covariance": CovarianceConfig(ratio=1.0, low=0.05, selection="top")},
    "kl_cov": {"covariance": CovarianceConfig(at_least_one=False)},
}
LOG_RATIOS = [20.0, -20.0, 88.0, -88.0, 100.0, -100.0, math.inf, -math.inf, math.nan]
BAD = (0, 1)  # the sequence and the token whose log-ratio is bad
IN_FP64 = 2400.0  # replaces infinity in fp64: e^600, also the mean over 4 tokens, is finite in fp64 and not in fp32


@pytest.fixture(autouse=True)
def general_path():
    """Use the general path. tests/losses/test_token_pass.py sweeps the kernel against it."""
    with backend("torch"):
        yield


def swept(log_ratio: float, sign: float, per_token: bool) -> dict:
    """Three full sequences of ratios near 1, and one token of the first with this log-ratio; fp32 values in fp64."""
    g = torch.Generator().manual_seed(0)
    logp = (-2 * torch.rand(3, 4, generator=g)).double()
    old_logp = logp + (0.05 * torch.randn(3, 4, generator=g)).double()
    old_logp[BAD] = logp[BAD] - log_ratio
    advantage = torch.tensor([1.5 * sign, 1.0, -0.75], dtype=torch.float64)
    return {
        "logp": logp.float().double(),
        "old_logp": old_logp.float().double(),
        "advantage": advantage[:, None].repeat(1, 4) if per_token else advantage,
        "mask": torch.ones(3, 4, dtype=torch.bool),
        "entropy": torch.zeros(3, 4, dtype=torch.float64),
    }


def settings_of(loss_type: str) -> list[dict]:
    bounded = [] if loss_type == "vespo" else [{"max_log_ratio": 30.0}]
    return [{}, *bounded, *([{"delta": 4.0}] if loss_type in CLIPPED else [])]


@pytest.mark.parametrize("log_ratio", LOG_RATIOS)
@pytest.mark.parametrize("loss_type, level", TYPES_AND_LEVELS)
def test_a_bad_token(loss_type, level, log_ratio):
    for settings, sign, per_token in itertools.product(settings_of(loss_type), (1.0, -1.0, 0.0), (False, True)):
        config = make_config(loss_type, level, **{**NO_CONTEST.get(loss_type, {}), **settings})
        case = (settings, sign, per_token)
        loss, gradient, _ = value_and_gradients(ours(config), swept(log_ratio, sign, per_token), torch.float32)
        _, healthy, _ = value_and_gradients(ours(config), swept(0.0, sign, per_token), torch.float32)
        own = torch.zeros(3, 4, dtype=torch.bool)
        own[BAD if level == "token" else 0] = True  # a ratio of the sequence concerns all of it
        assert gradient[~own].isfinite().all() and torch.equal(gradient[~own], healthy[~own]), case

        if math.isnan(log_ratio):
            assert gradient[own].isnan().all() if sign else (gradient[own] == 0).all(), case
            assert loss.isnan() if sign else loss.isfinite(), case
            continue
        finite = max(-IN_FP64, min(IN_FP64, log_ratio)) if level != "token" else max(-600.0, min(600.0, log_ratio))
        x = swept(finite, sign, per_token)
        exact_loss, exact, _ = value_and_gradients(partial(textbook, config=config), x, torch.float64)
        assert (gradient[exact == 0] == 0).all(), case
        # In fp32 larger values are infinite, and smaller ones are 0.
        torch.testing.assert_close(gradient.float(), exact.float(), rtol=2e-5, atol=1e-38)
        torch.testing.assert_close(loss.float(), exact_loss.float(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type, level", TYPES_AND_LEVELS)
def test_the_sweep_reaches_zeros_and_live_tokens(loss_type, level):
    """By the formula some bad tokens are live, and those alone that a clip, gate or weight silences are dead."""
    compute = partial(textbook, config=make_config(loss_type, level, **NO_CONTEST.get(loss_type, {})))
    cases = [swept(log_ratio, sign, False) for log_ratio in (20.0, -20.0) for sign in (1.0, -1.0)]
    dead = {value_and_gradients(compute, x, torch.float64)[1][BAD].item() == 0 for x in cases}
    assert dead == ({True, False} if LOSSES[loss_type].surrogate in SILENCES else {False})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss_type, level", TYPES_AND_LEVELS)
def test_what_stands_in_masked_columns_does_not_matter(loss_type, level, bad):
    everything = {"beta": 0.1, "kl_bias_correction": True, "top_entropy_quantile": 0.5, "off_policy_threshold": 0.3}
    for settings, per_token in itertools.product(({}, everything), (False, True)):
        config = make_config(loss_type, level, **settings)
        x = batch(3, per_token=per_token)
        expected = value_and_gradients(ours(config, sampled=True), x, torch.float32)
        names = ["logp", "old_logp", "ref_logp", "entropy", "sampler_ratio", "sampler_logp"]
        for name in [*names, *(["advantage"] if per_token else [])]:
            x[name] = torch.where(x["mask"], x[name], bad)
        found = value_and_gradients(ours(config, sampled=True), x, torch.float32)
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True)), (settings, per_token)
        assert expected[0].isfinite() and (found[1][~x["mask"]] == 0).all()


@pytest.mark.parametrize("name", ["logp", "ref_logp", "advantage", "sampler_ratio"])
@pytest.mark.parametrize("loss_type, level", TYPES_AND_LEVELS)
def test_a_nan_stays_in_its_own_token_or_sequence(loss_type, level, name):
    none = {name: {"covariance": CovarianceConfig(at_least_one=False)} for name in COVARIANCE}
    own = none.get(loss_type, {})
    config = make_config(loss_type, level, beta=0.1, kl_bias_correction=True, top_entropy_quantile=0.5, **own)
    x = batch(4, per_token=True)
    x["mask"][:] = True
    x["entropy"][1, 2] = 5.0
    healthy = value_and_gradients(ours(config, sampled=True), x, torch.float32)[1]
    x[name][1, 2] = math.nan
    found = value_and_gradients(ours(config, sampled=True), x, torch.float32)[1]
    own = torch.zeros(4, 7, dtype=torch.bool)
    own[1] = True
    if level == "token":
        own[1] = torch.arange(7) == 2
    assert torch.equal(found[~own], healthy[~own])
    assert found[1, 2].isnan()


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("loss_type", ["cispo", "vespo", "gspo"])
def test_a_broken_ratio_of_a_sequence_leaves_its_masked_columns_alone(loss_type, on):
    config = make_config(loss_type, LEVELS[loss_type][-1])
    x = swept(math.nan, 1.0, False)
    x["mask"][0, 2:] = False
    gradient = value_and_gradients(ours(config), x, torch.float32, on)[1]
    assert gradient[0, :2].isnan().any() and (gradient[0, 2:] == 0).all() and gradient[1:].isfinite().all()


@pytest.mark.parametrize("loss_type, level", TYPES_AND_LEVELS)
def test_an_entropy_of_nan_is_kept_and_reaches_no_gradient_of_logp(loss_type, level):
    config = make_config(loss_type, level, top_entropy_quantile=0.5, entropy_coef=0.1)
    x = converted(batch(5), torch.float32)
    x["mask"][:] = True

    def compute(x):
        return policy_loss(**arguments(x, config), config=config, cutoff=0.5).loss

    gradients = []
    for entropy in (5.0, math.nan):
        x["entropy"][1, 2] = entropy
        loss, *found = value_and_gradients(compute, x, torch.float32)
        gradients.append(found)
    assert loss.isnan()
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_ratio_that_overflows_where_the_token_is_not_kept(loss_type):
    for level in LEVELS[loss_type]:
        if level == "sequence":
            continue  # one ratio for all: the kept tokens overflow too
        logp = torch.zeros(1, 3, requires_grad=True)
        old_logp, entropy = torch.tensor([[-200.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 1.0]])
        config = make_config(loss_type, level, top_entropy_quantile=0.5)
        loss = policy_loss(
            logp, torch.tensor([-1.0]), torch.ones(1, 3, dtype=torch.bool), config=config, old_logp=old_logp,
            entropy=entropy,
        ).loss  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, logp)
        assert loss.isfinite() and gradient[0, 0] == 0 and gradient.isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow")  # of numpy, in the interpreter
@pytest.mark.parametrize("on", BACKENDS)
def test_an_unclipped_overflow_stays_infinite_unless_bounded(on):
    x = {
        "logp": torch.zeros(1, 2), "advantage": torch.tensor([-1.0]), "mask": torch.ones(1, 2, dtype=torch.bool),
        "old_logp": torch.tensor([[-100.0, 0.0]]), "entropy": torch.zeros(1, 2),
    }  # fmt: skip
    assert value_and_gradients(ours(LossConfig()), x, torch.float32, on)[0] == math.inf
    for bounded in (LossConfig(delta=4.0), LossConfig(max_log_ratio=20.0)):
        loss, gradient, _ = value_and_gradients(ours(bounded), x, torch.float32, on)
        assert loss.isfinite() and gradient.tolist() == [[0.0, 0.5]]


@pytest.mark.parametrize("on", BACKENDS)
def test_an_infinite_ratio_in_a_metric_does_not_reach_the_loss(on):
    x = converted(swept(math.inf, 1.0, False), torch.float32, on)
    with backend(on):
        loss, metrics = policy_loss(**x)
    assert loss.isfinite() and metrics["ratio"] == math.inf and metrics["clip_high"] == 1


EPS = 16 * torch.finfo(torch.float32).eps  # of a few operations


def by_both(config: LossConfig, x: dict, on: str, sampled=False) -> list[torch.Tensor]:
    """Compare loss and gradient in fp32 with the textbook in fp64."""
    x = {name: value.float().double() if value.is_floating_point() else value for name, value in x.items()}
    found = value_and_gradients(ours(config, sampled), x, torch.float32, on)[:2]
    exact = value_and_gradients(partial(textbook, config=config, sampled=sampled), x, torch.float64)[:2]
    for f, e in zip(found, exact, strict=True):
        torch.testing.assert_close(f.float(), e.float(), rtol=EPS, atol=1e-37)
    return [*found]


def two_tokens(**given) -> dict:
    ones = torch.ones(1, 2, dtype=torch.bool)
    x = {"logp": torch.tensor([[-1.0, -1.0]]), "advantage": torch.zeros(1), "mask": ones, "entropy": torch.zeros(1, 2)}
    x["old_logp"] = x["ref_logp"] = x["logp"]
    return x | {name: torch.tensor(value) for name, value in given.items()}


@pytest.mark.filterwarnings("ignore:overflow")  # of numpy, in the interpreter
@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("to_ref, log_ratio", [(104, -104), (200, -150), (90, -20), (3, -1), (-104, 80), (50, 20)])
def test_a_kl_times_its_ratio_where_their_exponents_cancel(to_ref, log_ratio, level, on):
    """With a ratio per token, its product with the KL has a term e^(ref_logp - old_logp) without logp. The slope of the
    rest is -d e^(log ratio), which a sum of slopes loses even in fp64."""
    logp = -300.0
    x = two_tokens(logp=[[-1.0, logp]], old_logp=[[-1.0, logp - log_ratio]], ref_logp=[[-1.0, logp + to_ref]])
    config = LossConfig("bnpo", beta=0.04, kl_bias_correction=True, ratio_level=level)
    if level == "sequence":
        x["old_logp"][0, 0] -= log_ratio
        loss, gradient = by_both(config, x, on)
        assert loss.isfinite() and (gradient != 0).all()
        return
    exact, _, _ = value_and_gradients(partial(textbook, config=config), converted(x, torch.float64), torch.float64)
    loss, gradient, _ = value_and_gradients(ours(config), x, torch.float32, on)
    torch.testing.assert_close(loss, exact, rtol=EPS, atol=0)
    slope = torch.tensor([[0.0, -0.02 * to_ref * math.exp(log_ratio)]], dtype=torch.float64)
    torch.testing.assert_close(gradient, slope, rtol=EPS, atol=1e-37)
    if (to_ref, log_ratio) == (104, -104):
        assert loss.item() == pytest.approx(0.02)


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("loss_type", ["bnpo", "vespo"])
@pytest.mark.parametrize("settings", [{}, {"kl_bias_correction": True}, {"kl_estimator": "k1"}, {"kl_estimator": "k2"}])
@pytest.mark.parametrize("to_ref", [100.0, -100.0])
def test_a_bound_of_the_log_ratio_bounds_the_kl_too(loss_type, settings, to_ref, on):
    x = two_tokens(ref_logp=[[-1.5, -1.0 + to_ref]])
    config = LossConfig(loss_type, beta=0.04, max_log_ratio=20.0, **settings)
    loss, gradient = by_both(config, x, on)
    assert loss.isfinite() and (gradient[0, 1] == 0) == ("kl_bias_correction" not in settings) and gradient[0, 0] != 0
    with backend(on):
        live = policy_loss(**arguments(converted(x, torch.float32, on), config), config=config).metrics["live"]
    assert live == (gradient != 0).sum()
    if to_ref > 0 and not settings:
        x = converted(x, torch.float32, on)
        assert value_and_gradients(ours(LossConfig(loss_type, beta=0.04)), x, torch.float32, on)[0] == math.inf


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("log_ratio, weight, sign", [(120.0, 1e-36, -1.0), (-120.0, 1e36, 1.0), (85.0, 1e-3, -1.0)])
def test_a_ratio_times_the_samplers_where_their_exponents_cancel(log_ratio, weight, sign, level, on):
    x = two_tokens(sampler_ratio=[[1.0, weight]], advantage=[sign])
    x["old_logp"] = x["logp"] - torch.tensor([[log_ratio if level == "sequence" else 0.0, log_ratio]])
    if level == "sequence":
        x["sampler_ratio"] = torch.tensor([[weight]])
    none = CovarianceConfig(at_least_one=False)
    own = {"cispo": {"epsilon_high": 1e38}, "kl_cov": {"covariance": none}, "clip_cov": {"covariance": none}}
    for loss_type in ("dapo", "cispo", "clip_cov", "kl_cov"):
        if level in LEVELS[loss_type] and not (loss_type == "cispo" and log_ratio > 0):
            config = make_config(loss_type, level, **own.get(loss_type, {}))
            loss, gradient = by_both(config, x, on, sampled=True)
            assert loss.isfinite() and gradient[0, 1] != 0


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_probabilities_of_zero_by_both_agree(estimator, level, on):
    """Value and other gradients are as for any log-probability that is equal in both."""
    config = LossConfig(beta=0.1, kl_estimator=estimator, kl_bias_correction=True, ratio_level=level)
    x = two_tokens(advantage=[1.0])
    expected = value_and_gradients(ours(config), x, torch.float32, on)[:2]
    for name in ("logp", "old_logp", "ref_logp"):
        x[name] = torch.tensor([[-1.0, -math.inf]])
    found = value_and_gradients(ours(config), x, torch.float32, on)[:2]
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True)) and found[1].isfinite().all()
    x.pop("old_logp")
    with backend(on):
        x = converted(x, torch.float32, on)
        assert policy_loss(config=config, **x).loss == found[0]


def test_the_ratio_of_kl_cov_cancels_in_advantage_and_penalty():
    x = {"logp": torch.tensor([[-0.5, -2.8]], requires_grad=True), "old_logp": torch.tensor([[-24.2, -26.3]])}
    config = LossConfig("kl_cov", covariance=CovarianceConfig(ratio=1.0, penalty="k3", kl_coef=1.0))
    loss = policy_loss(advantage=torch.ones(1), mask=torch.ones(1, 2, dtype=torch.bool), config=config, **x).loss
    loss.backward()
    # (kl_coef - A) r - kl_coef (1 + log r), the mean of two tokens.
    torch.testing.assert_close(loss.detach(), torch.tensor(-1.0 - (23.7 + 23.5) / 2))
    assert x["logp"].grad.tolist() == [[-0.5, -0.5]]


@pytest.mark.parametrize("on", BACKENDS)
def test_a_corrected_kl_beyond_fp32_keeps_a_gradient_within_it(on):
    logp = torch.tensor([[-100.0, -1.0]], requires_grad=True)
    x = {"old_logp": torch.tensor([[-145.0, -1.0]]), "ref_logp": torch.tensor([[-0.5, -1.0]])}
    config = LossConfig("bnpo", beta=0.04, kl_bias_correction=True)
    with backend(on):
        loss = policy_loss(logp, torch.zeros(1), torch.ones(1, 2, dtype=torch.bool), config=config, **x).loss
        loss.backward()
    assert loss == math.inf
    # -d r beta / 2 with d = 99.5 and r = e^45, whose exponent fp32 rounds by 45 half eps
    expected = torch.tensor([[-99.5 * math.exp(45) * 0.04 / 2, 0.0]])
    torch.testing.assert_close(logp.grad, expected, rtol=100 * torch.finfo(torch.float32).eps, atol=0.0)
