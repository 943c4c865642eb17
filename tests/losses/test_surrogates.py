"""Test the surrogates by hand, at their corners, and against finite differences in fp64."""

import itertools
import math
from functools import partial

import pytest
import torch

from rlloss import LossConfig, policy_loss, reference
from rlloss.config import SapoConfig, VespoConfig
from rlloss.loss_types import LOSSES
from tests.support.loss_cases import OVER, TYPES_AND_LEVELS, arguments, batch, make_config, settings_of

FULL = torch.ones(1, 2, dtype=torch.bool)


def of_ratios(ratios: list, advantage: float, config: LossConfig, logp=0.0, **more):
    """(loss, gradient, metrics) of one sequence of tokens with these ratios, in fp64."""
    log_ratio = torch.tensor([ratios], dtype=torch.float64).log()
    logp = torch.full_like(log_ratio, logp).requires_grad_()
    mask = torch.ones_like(log_ratio, dtype=torch.bool)
    found = policy_loss(
        logp, torch.tensor([advantage]), mask, config=config, old_logp=logp.detach() - log_ratio, **more
    )
    return found.loss.item(), torch.autograd.grad(found.loss, logp)[0][0].tolist(), found.metrics


def test_gspo_is_grpo_with_the_geometric_mean():
    # Sequence ratio sqrt(0.5 * 2) = 1 although both tokens are outside the clip range.
    for config in (LossConfig("grpo", ratio_level="sequence"), LossConfig("gspo")):
        loss, gradient, metrics = of_ratios([0.5, 2.0], 3.0, config)
        assert loss == pytest.approx(-3.0) and gradient == pytest.approx([-1.5, -1.5])
        assert metrics["ratios"] == 1 and metrics["live"] == 2


def test_luspo_does_not_divide_by_the_length():
    # Two sequences, ratio of the sequence: of 3 tokens 1.1, of 1 token 0.9. A = 2 and -1.
    ratio = torch.tensor([[1.1, 1.1, 1.1], [0.9, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 3, [True, False, False]])
    logp = ratio.log().requires_grad_()
    config = LossConfig("luspo", ratio_level="sequence")
    loss, metrics = policy_loss(
        logp, torch.tensor([2.0, -1.0]), mask, config=config, old_logp=torch.zeros(2, 3, dtype=torch.float64)
    )
    assert loss.item() == pytest.approx((3 * -2.2 + 0.9) / 2)
    # Every token of the first has r / 3 of three token losses: -A r / B.
    expected = torch.tensor([[-1.1, -1.1, -1.1], [0.45, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], expected)
    assert metrics["surrogate"].item() == pytest.approx(-5.7) and metrics["ratios"] == 2


def test_delta_bounds_only_what_the_clip_leaves_open():
    # A < 0: without delta a large ratio is unbounded; with delta = 4 it stops there, without gradient.
    loss, gradient, _ = of_ratios([1.0, 3.9, 5.0], -1.0, LossConfig(epsilon_high=0.2, delta=4.0))
    assert loss == pytest.approx((1.0 + 3.9 + 4.0) / 3) and gradient == pytest.approx([1 / 3, 1.3, 0.0])
    loss, gradient, _ = of_ratios([1.0, 3.9, 5.0], -1.0, LossConfig(epsilon_high=0.2))
    assert loss == pytest.approx(9.9 / 3) and gradient == pytest.approx([1 / 3, 1.3, 5 / 3])


def test_on_a_bound_of_the_clip_the_gradient_flows():
    config = LossConfig(epsilon_low=0.5, epsilon_high=1.0)  # bounds whose logarithms come back exactly
    assert of_ratios([2.0], 1.0, config)[1] == [-2.0]
    assert of_ratios([0.5], -1.0, config)[1] == [0.5]


def test_cispo_by_hand():
    # log pi = -2, cap 2: weights 0.5, 1, 2 (capped); loss -w A log pi, gradient -w A over 3 tokens.
    for advantage in (1.5, -1.5):
        loss, gradient, metrics = of_ratios(
            [0.5, 1.0, 8.0], advantage, LossConfig("cispo", epsilon_high=2.0), logp=-2.0
        )
        assert loss == pytest.approx(3.5 * 2 * advantage / 3)
        assert gradient == pytest.approx([-w * advantage / 3 for w in (0.5, 1.0, 2.0)])
        assert metrics["live"] == 3 and metrics["clip_low"] == metrics["clip_low_min"] == 0
        # A capped weight counts where A > 0; its token keeps its gradient.
        assert metrics["clip_high"] == metrics["clip_region"] == (1 if advantage > 0 else 0)
        assert metrics["ratio"].item() == pytest.approx(9.5)
    config = LossConfig("cispo", epsilon_high=2.0, ratio_level="sequence")  # sqrt(0.5 * 32) = 4 -> 2
    loss, gradient, metrics = of_ratios([0.5, 32.0], 1.0, config, logp=-2.0)
    assert loss == pytest.approx(4.0) and gradient == pytest.approx([-1.0, -1.0]) and metrics["clip_high"] == 1


def test_sapo_by_hand():
    # t = 2: sigmoid(2 (r - 1)) 4 / 2. r = 1: 1, slope 1. r = 1 + ln(3) / 2: sigmoid(ln 3) = 3/4 -> 1.5, slope 4 r 3/16.
    r = 1 + math.log(3) / 2
    config = LossConfig("sapo", sapo=SapoConfig(temperature_pos=2.0, temperature_neg=1.0))
    loss, gradient, metrics = of_ratios([1.0, r], 0.5, config)
    assert loss == pytest.approx(-0.5 * 2.5 / 2)
    assert gradient == pytest.approx([-0.25, -0.25 * 0.75 * r])
    # t = 1 where A < 0: 4 sigmoid(r - 1). r = 1: 2, slope 1. r = 0: 4 / (1 + e), slope 0.
    loss, gradient, metrics = of_ratios([1.0, 0.0], -0.5, config)
    assert loss == pytest.approx(0.5 * (2 + 4 / (1 + math.e)) / 2) and gradient == pytest.approx([0.25, 0.0])
    assert metrics["live"] == 1 and set(metrics) == {
        "tokens",
        "sequences",
        "kept",
        "live",
        "surrogate",
        "ratios",
        "ratio",
    }


def test_the_slope_of_sapo_is_the_policy_gradient_at_ratio_one():
    for temperature, advantage in itertools.product((0.1, 1.0, 9.0), (2.0, -2.0)):
        config = LossConfig("sapo", sapo=SapoConfig(temperature, temperature))
        assert of_ratios([1.0], advantage, config)[1] == pytest.approx([-advantage])


@pytest.mark.parametrize("log_ratio", [-80.0, -30.0, -12.0, -3.0, 1.0, 3.0])
def test_the_slope_of_sapo_keeps_its_precision_in_fp32(log_ratio):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        logp = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
        config = LossConfig("sapo")
        loss = policy_loss(
            logp, torch.tensor([1.0]), FULL[:, :1], config=config, old_logp=torch.tensor([[-log_ratio]], dtype=dtype)
        ).loss
        gradients.append(torch.autograd.grad(loss, logp)[0].item())
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-5, abs=0)


def test_vespo_by_hand():
    # w = 2 * 0.25 = 1/2. A > 0: e^3 (1/2)^2 e^(-3/2) = e^1.5 / 4; A < 0: e^2 (1/2)^3 e^-1 = e / 8.
    for advantage, phi in ((2.0, math.exp(1.5) / 4), (-2.0, math.e / 8)):
        loss, gradient, metrics = of_ratios([2.0, 0.25], advantage, LossConfig("vespo"), logp=-3.0)
        assert loss == pytest.approx(3 * phi * advantage) and gradient == pytest.approx([-phi * advantage / 2] * 2)
        assert metrics["weight"].item() == pytest.approx(phi) and metrics["ratio"].item() == pytest.approx(0.5)
        assert metrics["ratios"] == 1 and metrics["live"] == 2 and "clip_low" not in metrics
    # An advantage of 0 has the weight of a gain, which is logged, and no gradient.
    loss, gradient, metrics = of_ratios([2.0, 0.25], 0.0, LossConfig("vespo"), logp=-3.0)
    assert loss == 0 and gradient == [0.0, 0.0] and metrics["weight"].item() == pytest.approx(math.exp(1.5) / 4)
    config = LossConfig("vespo", vespo=VespoConfig(k_pos=1.0, lambda_pos=2.0))  # e^2 (1/2) e^-1 = e / 2
    assert of_ratios([2.0, 0.25], 1.0, config)[1] == pytest.approx([-math.e / 4] * 2)


def test_vespo_of_ratio_one_is_the_policy_gradient():
    for advantage in (1.0, -1.0):
        assert of_ratios([1.0, 4.0, 0.25], advantage, LossConfig("vespo"))[1] == pytest.approx([-advantage / 3] * 3)


def test_vespo_takes_the_samplers_ratio_into_the_weight():
    # w = 2 * 0.25 * (4 * 0.5) = 1; and as one ratio of the sequence, 2.
    for sampler_ratio in (torch.tensor([[4.0, 0.5]]), torch.tensor([[2.0]])):
        _, gradient, metrics = of_ratios([2.0, 0.25], 1.0, LossConfig("vespo"), sampler_ratio=sampler_ratio)
        assert gradient == pytest.approx([-0.5, -0.5]) and metrics["ratio"].item() == pytest.approx(1.0)
    # A ratio of 0 is one of 1e-8, and so is the least weight.
    _, gradient, metrics = of_ratios([1.0, 1.0], 1.0, LossConfig("vespo"), sampler_ratio=torch.tensor([[0.0, 1.0]]))
    phi = math.exp(3) * 1e-16
    assert gradient == pytest.approx([-phi / 2] * 2, rel=1e-6) and metrics["ratio"].item() == pytest.approx(1e-8)


def test_vespo_bounds_each_log_ratio_and_their_sum():
    # 40 and -18: 20 - 18 = 2, not 22.
    loss, gradient, metrics = of_ratios([math.exp(40), math.exp(-18)], 1.0, LossConfig("vespo"))
    assert metrics["ratio"].item() == pytest.approx(math.exp(2), rel=1e-5)
    metrics = of_ratios([math.exp(-15), math.exp(-15)], 1.0, LossConfig("vespo"))[2]
    assert metrics["ratio"].item() == pytest.approx(1e-8)


def test_a_weight_that_underflows_is_not_live():
    _, gradient, metrics = of_ratios([0.0, 1.0], 1.0, LossConfig("cispo", epsilon_high=2.0), logp=-2.0)
    assert gradient == [0.0, -0.5] and metrics["live"] == 1
    _, gradient, metrics = of_ratios([math.exp(15), 1.0], 1.0, LossConfig("vespo"), logp=-2.0)  # e^(-3 e^15)
    assert gradient == [0.0, 0.0] and metrics["live"] == metrics["weight"] == 0


@pytest.mark.parametrize("loss_type, level", [p for p in TYPES_AND_LEVELS if "max_log_ratio" in LOSSES[p[0]].reads])
def test_a_bounded_log_ratio_is_a_constant(loss_type, level):
    wide = {"epsilon_high": math.inf} if "epsilon_low" in LOSSES[loss_type].reads else {}
    config = make_config(loss_type, level, max_log_ratio=0.5, **wide)
    loss, gradient, metrics = of_ratios([math.e, math.e], 1.0, config, logp=-2.0)
    at_bound = of_ratios([math.exp(0.5)] * 2, 1.0, make_config(loss_type, level, **wide), logp=-2.0)
    assert loss == pytest.approx(at_bound[0])
    if loss_type == "cispo":  # its weight is one anyway
        assert gradient == pytest.approx(at_bound[1]) and metrics["live"] == 2
    else:
        assert gradient == [0.0, 0.0] and metrics["live"] == 0


KINKS = [math.log(bound) for bound in (0.8, 0.9, 1.1, 1.28, 1.5, 3.0)] + [-0.3, 0.3]


def smooth_batch(seed: int, config: LossConfig, level: str | None, sampled: str | None) -> dict:
    """A batch whose ratios are away from the kinks of every setting in use."""
    x = batch(seed, B=3, T=4, per_token=seed % 2 == 1, level=sampled or "token")
    log_ratio = reference.ratio(x["logp"], x["old_logp"], x["mask"], level or "token").log()
    if torch.stack([(log_ratio - kink).abs() for kink in KINKS]).amin() < 1e-3:
        return smooth_batch(seed + 100, config, level, sampled)
    x["advantage"] = torch.where(x["advantage"] == 0, 1.0, x["advantage"])
    x["sampler_ratio"].clamp_(min=0.1)
    return x


def weights_frozen_at(x: dict, config: LossConfig, sampled):
    """The textbook of a loss with a constant weight. The weight is computed at x, not at the point of evaluation."""
    advantage = x["advantage"] if x["advantage"].dim() == 2 else x["advantage"][:, None]
    one = torch.ones_like(x["logp"])  # -w A log pi with A and log pi of 1 is -w
    if config.loss_type == "cispo":
        ratio = reference.ratio(x["logp"], x["old_logp"], x["mask"], config.ratio_level)
        if config.max_log_ratio is not None:
            ratio = ratio.clamp(math.exp(-config.max_log_ratio), math.exp(config.max_log_ratio))
        weight = -reference.cispo(ratio, one, one, config.epsilon_high)
        sampler_weight = x["sampler_ratio"] if sampled else one
    else:
        c = config.vespo
        log_w = reference.vespo_log_w(x["logp"], x["old_logp"], x["mask"], x["sampler_ratio"] if sampled else None)
        gain, loss = (c.k_pos, c.lambda_pos), (c.k_neg, c.lambda_neg)
        weight = -reference.vespo(log_w, advantage.sign(), one, gain, loss) * advantage.sign()
        sampler_weight = one
    weight = (weight * sampler_weight).detach()

    def compute(logp):
        return reference.aggregate(-weight * advantage * logp, x["mask"], OVER[config.loss_type])

    return compute


def kl_alone(x: dict, config: LossConfig):
    """The KL term of the textbook. Its ratio has a gradient."""

    def compute(logp):
        if config.beta == 0:
            return torch.zeros((), dtype=torch.float64)
        bound = config.max_log_ratio or math.inf
        kl = reference.kl(logp, x["ref_logp"], config.kl_estimator, bound)
        if config.kl_bias_correction:
            ratio = reference.ratio(logp, x["old_logp"], x["mask"], config.ratio_level)
            kl = kl * ratio.clamp(math.exp(-bound), math.exp(bound))
        return config.beta * reference.aggregate(kl, x["mask"], OVER[config.loss_type])

    return compute


def central_differences(function, x: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    gradient = torch.zeros_like(x)
    for index in itertools.product(*(range(n) for n in x.shape)):
        values = []
        for sign in (1.0, -1.0):
            moved = x.clone()
            moved[index] += sign * step
            values.append(function(moved))
        gradient[index] = (values[0] - values[1]) / (2 * step)
    return gradient


SMOOTH = [(t, level, s) for t, level in TYPES_AND_LEVELS for s in settings_of(t) if "top_entropy_quantile" not in s]
# The means are linear and tests/losses/test_losses.py has them all.
THROUGH_THE_RATIO = [case for case in SMOOTH if case[0] in ("dapo", "gspo", "luspo", "sapo")]
WITH_A_WEIGHT = [case for case in SMOOTH if case[0] in ("cispo", "vespo") and "off_policy_threshold" not in case[2]]


def configured(loss_type, level, settings) -> LossConfig:
    return make_config(loss_type, None if "ratio_level" in settings else level, **settings)


@pytest.mark.parametrize("loss_type, level, settings", THROUGH_THE_RATIO, ids=str)
def test_gradcheck(loss_type, level, settings):
    config, alive = configured(loss_type, level, settings), False
    for seed, sampled in ((1, None), (2, "token"), (4, "sequence")):
        x = arguments(smooth_batch(seed, config, level, sampled), config, sampled)
        logp = x.pop("logp").requires_grad_()

        def loss(logp, x=x):
            return policy_loss(logp, **x, config=config).loss

        assert torch.autograd.gradcheck(loss, logp)
        alive |= bool(torch.autograd.grad(loss(logp), logp)[0].any())
    assert alive


@pytest.mark.parametrize("loss_type, level, settings", WITH_A_WEIGHT, ids=str)
def test_finite_differences_with_the_weight_held_fixed(loss_type, level, settings):
    """Finite differences of the loss itself would move the weight, which is a constant by definition."""
    config, differs = configured(loss_type, level, settings), False
    for seed, sampled in ((1, None), (2, "token"), (4, "sequence")):
        x = smooth_batch(seed, config, level, sampled)
        given = arguments(x, config, sampled)
        logp = given.pop("logp").clone().requires_grad_()
        surrogate, kl = weights_frozen_at(x, config, sampled), kl_alone(x, config)
        expected = central_differences(lambda logp: surrogate(logp) + kl(logp), logp.detach())  # noqa: B023
        loss = policy_loss(logp, **given, config=config).loss
        (found,) = torch.autograd.grad(loss, logp)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(loss, surrogate(logp) + kl(logp))

        moving = central_differences(partial(moving_loss, given, config), logp.detach())
        differs |= not torch.allclose(moving, found, rtol=1e-3, atol=1e-4)
    assert differs


def moving_loss(given: dict, config: LossConfig, logp: torch.Tensor) -> torch.Tensor:
    return policy_loss(logp, **given, config=config).loss


def test_gradcheck_of_the_entropy_bonus():
    x = batch(1, B=3, T=4)
    entropy = x["entropy"].requires_grad_()
    config = LossConfig(entropy_coef=0.3, top_entropy_quantile=0.5)

    def loss(logp, entropy):
        return policy_loss(
            logp, x["advantage"], x["mask"], old_logp=x["old_logp"], entropy=entropy, config=config, cutoff=0.4
        ).loss

    assert torch.autograd.gradcheck(loss, (x["logp"].requires_grad_(), entropy))
