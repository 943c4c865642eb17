"""policy_loss against the textbook in fp64, hand-worked numbers, and the cases in which peers produce NaN."""

import itertools
import math

import pytest
import torch

from rlloss import GRPOLoss, LossConfig, means, policy_loss, reference, token_stats
from rlloss.config import LOSS_TYPES

LENGTH = 9  # max_completion_length of dr_grpo


def make_config(loss_type="dapo", **settings) -> LossConfig:
    return LossConfig(loss_type, max_completion_length=LENGTH if loss_type == "dr_grpo" else None, **settings)


def batch(seed: int, B=4, T=7, *, per_token=False, spread=0.4) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    lengths[0] = 0
    return {
        "logp": logp,
        "advantage": torch.randn((B, T) if per_token else (B,), generator=g, dtype=torch.float64),
        "mask": torch.arange(T) < lengths[:, None],
        "old_logp": logp + spread * torch.randn(B, T, generator=g, dtype=torch.float64),
        "ref_logp": logp + spread * torch.randn(B, T, generator=g, dtype=torch.float64),
        "entropy": torch.rand(B, T, generator=g, dtype=torch.float64),
    }


def textbook(x: dict, config: LossConfig) -> torch.Tensor:
    """The loss written down from `rlloss.reference`, one formula after the other."""
    advantage = x["advantage"] if x["advantage"].dim() == 2 else x["advantage"][:, None]
    mask = x["mask"]
    ratio = reference.ratio(x["logp"], x["old_logp"], mask, config.ratio_level)
    loss = reference.clip_surrogate(ratio, advantage, config.epsilon_low, config.epsilon_high, config.delta)
    loss = loss.expand_as(mask)
    kept = mask
    if config.top_entropy_quantile < 1:
        kept = reference.top_entropy(x["entropy"], mask, config.top_entropy_quantile)
        loss = torch.where(kept, loss, 0.0)
    if config.beta:
        kl = reference.kl(x["logp"], x["ref_logp"], config.kl_estimator)
        loss = loss + config.beta * (kl * ratio if config.kl_bias_correction else kl)
    counted = kept if config.entropy_denominator == "kept" else mask
    return reference.aggregate(loss, counted, config.loss_type, LENGTH)


def value_and_gradient(compute, x: dict, dtype: torch.dtype):
    x = {k: v if v.dtype == torch.bool else v.detach().to(dtype).clone() for k, v in x.items()}
    x["logp"].requires_grad_()
    loss = compute(x)
    loss.backward()
    return loss.detach().double(), x["logp"].grad.double()


def ours(config: LossConfig):
    def compute(x):
        needed = ("logp", "advantage", "mask", "old_logp", "entropy", *(["ref_logp"] if config.beta else []))
        return policy_loss(**{k: x[k] for k in needed}, config=config).loss

    return compute


SETTINGS = [
    {},
    {"epsilon_low": 0.1, "epsilon_high": 0.5},
    {"delta": 1.5},
    {"delta": 1.1},
    {"beta": 0.1},
    {"beta": 0.1, "kl_estimator": "k1"},
    {"beta": 0.1, "kl_estimator": "k2", "kl_bias_correction": True},
    {"beta": 0.1, "kl_bias_correction": True, "delta": 3.0},
    {"top_entropy_quantile": 0.3},
    {"top_entropy_quantile": 0.0, "beta": 0.1},
    {"top_entropy_quantile": 0.5, "entropy_denominator": "kept"},
]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_are_as_good_as_torchs(loss_type, level, settings, per_token):
    if loss_type == "dr_grpo" and "entropy_denominator" in settings:
        pytest.skip("rejected by LossConfig, see below")
    config = make_config(loss_type, ratio_level=level, **settings)
    for seed in range(5):
        x = batch(seed, per_token=per_token)
        exact = value_and_gradient(lambda x: textbook(x, config), x, torch.float64)
        plain = value_and_gradient(lambda x: textbook(x, config), x, torch.float32)
        for dtype, loose in ((torch.float64, 1e-14), (torch.float32, 1e-7)):
            found = value_and_gradient(ours(config), x, dtype)
            for f, p, e in zip(found, plain, exact, strict=True):
                allowed = (2 * (p - e).abs().max() if dtype == torch.float32 else 0) + loose
                assert (f - e).abs().max() <= allowed


def test_hand_worked():
    # One sequence, A = 2: ratios 0.5, 1, 1.5 -> 0.5, 1, 1.2 (clipped). One with A = -1: ratios 0.5, 1.5 -> 0.8, 1.5.
    ratio = torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.5, 7.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logp = ratio.log().requires_grad_()
    arguments = (torch.tensor([2.0, -1.0]), mask)
    first, second = -2 * (0.5 + 1.0 + 1.2), 0.8 + 1.5
    expected = {
        "dapo": (first + second) / 5,
        "bnpo": (first + second) / 5,
        "grpo": (first / 3 + second / 2) / 2,
        "dr_grpo": (first + second) / (2 * LENGTH),
    }
    for loss_type, value in expected.items():
        config = make_config(loss_type, epsilon_high=0.2)
        found = policy_loss(logp, *arguments, config=config, old_logp=torch.zeros(2, 3))
        assert found.loss.item() == pytest.approx(value, rel=1e-6)
    (gradient,) = torch.autograd.grad(found.loss, logp)
    # -A r / (B * LENGTH) where the ratio moves, 0 where it is clipped or masked.
    expected_gradient = torch.tensor([[-1.0, -2.0, 0.0], [0.0, 1.5, 0.0]]) / 18
    torch.testing.assert_close(gradient, expected_gradient)
    averages = means(found.metrics)
    assert found.metrics["live"] == 3 and averages["live_share"].item() == pytest.approx(3 / 5)
    assert averages["clip_low"].item() == pytest.approx(1 / 5)
    assert averages["clip_high"].item() == pytest.approx(1 / 5)
    assert found.metrics["clip_low_min"] == 0 and found.metrics["clip_high_max"].item() == pytest.approx(1 / 3)


def test_gspo_hand_worked():
    # Sequence ratio sqrt(0.5 * 2) = 1 although both tokens are outside the clip range.
    logp = torch.tensor([[0.5, 2.0]]).log().requires_grad_()
    config = LossConfig("grpo", ratio_level="sequence")
    loss, metrics = policy_loss(
        logp, torch.tensor([3.0]), torch.ones(1, 2, dtype=torch.bool), config=config, old_logp=torch.zeros(1, 2)
    )
    assert loss.item() == pytest.approx(-3.0)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.full((1, 2), -1.5))
    assert metrics["ratios"] == 1 and metrics["live"] == 2


def test_delta_bounds_only_what_the_clip_leaves_open():
    # A < 0: without delta a large ratio is unbounded; with delta = 4 it stops there, without gradient.
    logp = torch.tensor([[1.0, 3.9, 5.0]]).log().requires_grad_()
    config = LossConfig(epsilon_high=0.2, delta=4.0)
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss = policy_loss(logp, torch.tensor([-1.0]), mask, config=config, old_logp=torch.zeros(1, 3)).loss
    assert loss.item() == pytest.approx((1.0 + 3.9 + 4.0) / 3, rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.tensor([[1.0, 3.9, 0.0]]) / 3)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("log_ratio", [20.0, 88.0, 89.0, 100.0, math.inf])
def test_a_clipped_token_whose_ratio_overflows(loss_type, level, log_ratio):
    logp = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]], requires_grad=True)
    old_logp = torch.tensor([[-1.0 - log_ratio, -1.0 - log_ratio], [-1.0, -1.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    for advantage in (1.0, 0.0):  # clipped; and an advantage of 0, which A * inf would turn into NaN
        config = make_config(loss_type, ratio_level=level)
        loss = policy_loss(logp, torch.tensor([advantage, 1.0]), mask, config=config, old_logp=old_logp).loss
        (gradient,) = torch.autograd.grad(loss, logp)
        assert loss.isfinite()
        assert (gradient[0] == 0).all() and gradient[1].isfinite().all() and (gradient[1] != 0).all()


@pytest.mark.parametrize("log_ratio", [-20.0, -88.0, -100.0, -math.inf])
def test_a_clipped_token_whose_ratio_underflows(log_ratio):
    logp = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    old_logp = torch.tensor([[-1.0 - log_ratio, -1.0]])
    loss = policy_loss(logp, torch.tensor([-1.0]), torch.ones(1, 2, dtype=torch.bool), old_logp=old_logp).loss
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient[0, 0] == 0 and gradient[0, 1].isfinite() and gradient[0, 1] != 0


def test_an_unclipped_overflow_stays_infinite_unless_bounded():
    logp = torch.zeros(1, 2, requires_grad=True)
    arguments = {"advantage": torch.tensor([-1.0]), "mask": torch.ones(1, 2, dtype=torch.bool)}
    old_logp = torch.tensor([[-100.0, 0.0]])
    assert policy_loss(logp, **arguments, old_logp=old_logp).loss == math.inf
    for bounded in (LossConfig(delta=4.0), LossConfig(max_log_ratio=20.0)):
        loss = policy_loss(logp, **arguments, config=bounded, old_logp=old_logp).loss
        (gradient,) = torch.autograd.grad(loss, logp)
        assert loss.isfinite() and gradient[0, 0] == 0 and gradient[0, 1] == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_stands_in_masked_columns_does_not_matter(bad):
    for config, per_token in itertools.product(
        (LossConfig(), LossConfig(beta=0.1, top_entropy_quantile=0.5), LossConfig(ratio_level="sequence")),
        (False, True),
    ):
        x = batch(3, per_token=per_token)
        expected = value_and_gradient(ours(config), x, torch.float32)
        for name in ("logp", "old_logp", "ref_logp", "entropy", *(["advantage"] if per_token else [])):
            x[name] = torch.where(x["mask"], x[name], bad)
        found = value_and_gradient(ours(config), x, torch.float32)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_a_nan_stays_in_its_own_token():
    x = batch(5)
    x["mask"][:] = True
    x["old_logp"][1, 2] = math.nan
    _, gradient = value_and_gradient(ours(LossConfig("grpo")), x, torch.float32)
    assert gradient[1, 2].isnan()
    gradient[1, 2] = 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_empty_mask_gives_a_differentiable_zero(loss_type):
    for settings in ({}, {"top_entropy_quantile": 0.2}, {"beta": 0.1}, {"ratio_level": "sequence"}):
        x = batch(0)
        x["mask"][:] = False
        config = make_config(loss_type, **settings)
        loss, gradient = value_and_gradient(ours(config), x, torch.float32)
        assert loss == 0 and (gradient == 0).all()
        metrics = policy_loss(
            x["logp"], x["advantage"], x["mask"], config=config, entropy=x["entropy"],
            ref_logp=x["ref_logp"] if config.beta else None,
        ).metrics  # fmt: skip
        assert all(v.isfinite() for name, v in metrics.items() if name not in ("clip_low_min", "clip_high_max"))


def test_without_old_logp_the_ratio_is_one_and_the_gradient_flows():
    x = batch(1)
    x["logp"].requires_grad_()
    loss, metrics = policy_loss(x["logp"], x["advantage"], x["mask"])
    counted = torch.where(x["mask"], x["advantage"][:, None], 0.0)
    torch.testing.assert_close(loss, -counted.sum() / x["mask"].sum())
    torch.testing.assert_close(torch.autograd.grad(loss, x["logp"])[0], -counted / x["mask"].sum())
    assert means(metrics)["ratio"] == 1 and metrics["clip_region"] == 0


def test_the_sampler_ratio_weighs_the_surrogate_and_zero_removes_it():
    x = batch(2)
    x["mask"][:] = True
    x["logp"].requires_grad_()
    weight = torch.full((4, 1), 0.5, dtype=torch.float64)
    arguments = (x["logp"], x["advantage"], x["mask"])
    plain = policy_loss(*arguments, old_logp=x["old_logp"])
    half = policy_loss(*arguments, old_logp=x["old_logp"], sampler_ratio=weight)
    torch.testing.assert_close(half.loss, plain.loss / 2)
    weight[0] = 0.0
    old_logp = x["old_logp"].clone()
    old_logp[0] = -2000.0  # overflows fp64 too
    gone = policy_loss(x["logp"], -x["advantage"].abs(), x["mask"], old_logp=old_logp, sampler_ratio=weight)
    (gradient,) = torch.autograd.grad(gone.loss, x["logp"])
    assert gone.loss.isfinite() and (gradient[0] == 0).all()


def test_off_policy_sequences_with_a_negative_advantage_are_dropped():
    logp = torch.zeros(4, 3, requires_grad=True)
    advantage = torch.tensor([-1.0, -1.0, 1.0, 0.0])
    old_logp = torch.tensor([0.3, 0.1, 0.9, 0.9])[:, None].expand(4, 3)
    config = LossConfig(off_policy_threshold=0.2, epsilon_low=1.0)
    loss = policy_loss(logp, advantage, torch.ones(4, 3, dtype=torch.bool), config=config, old_logp=old_logp).loss
    (gradient,) = torch.autograd.grad(loss, logp)
    assert [bool(row.any()) for row in gradient] == [False, True, True, False]


def test_the_entropy_bonus_is_the_mean_entropy_of_the_kept_tokens():
    x = batch(6)
    entropy = x["entropy"].requires_grad_()
    arguments = (x["logp"], x["advantage"], x["mask"])
    plain = policy_loss(*arguments, config=LossConfig(top_entropy_quantile=0.5), entropy=entropy)
    config = LossConfig(top_entropy_quantile=0.5, entropy_coef=0.3)
    bonus = policy_loss(*arguments, config=config, entropy=entropy)
    kept = reference.top_entropy(entropy.detach(), x["mask"], 0.5)
    torch.testing.assert_close(bonus.loss - plain.loss, -0.3 * entropy[kept].mean())
    torch.testing.assert_close(torch.autograd.grad(bonus.loss, entropy)[0], -0.3 * kept.double() / kept.sum())
    with pytest.raises(ValueError, match="entropy: found a tensor without gradient"):
        policy_loss(*arguments, config=config, entropy=entropy.detach())


@pytest.mark.parametrize("loss_type, count", [("dapo", "tokens"), ("grpo", "sequences"), ("dr_grpo", "length")])
def test_micro_batches_with_the_whole_denominator_sum_to_the_whole(loss_type, count):
    x = batch(7, B=8)
    config = make_config(loss_type)
    denominator = {"tokens": x["mask"].sum(), "sequences": 8, "length": 8 * LENGTH}[count]
    whole = value_and_gradient(ours(config), x, torch.float64)
    parts = [
        value_and_gradient(
            lambda y: (
                policy_loss(
                    y["logp"], y["advantage"], y["mask"], config=config, old_logp=y["old_logp"], denominator=denominator
                ).loss
            ),
            {k: v[rows] for k, v in x.items()},
            torch.float64,
        )
        for rows in (slice(0, 3), slice(3, 4), slice(4, 8))
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole[1])


@pytest.mark.parametrize("rho, denominator", [(1.0, "all"), (0.3, "all"), (0.3, "kept")])
def test_the_module_from_logits_equals_the_textbook(rho, denominator):
    B, T, V = 3, 5, 60
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, V, generator=g)
    target, advantage = torch.randint(0, V, (B, T), generator=g), torch.randn(B, generator=g)
    mask = torch.rand(B, T, generator=g) < 0.7
    stats = reference.token_stats(logits.double(), target, 0.8)
    old_logp = stats[0] + 0.3 * torch.randn(B, T, generator=g)
    config = LossConfig(top_entropy_quantile=rho, entropy_denominator=denominator)

    leaf = logits.clone().requires_grad_()
    hostile = torch.where(mask, target, -100)
    found = GRPOLoss(config)(leaf, hostile, advantage, mask=mask, old_logp=old_logp.float(), temperature=0.8)
    found.loss.backward()
    exact = logits.double().requires_grad_()
    logp, entropy, _ = reference.token_stats(exact, target, 0.8)
    x = {"logp": logp, "advantage": advantage.double(), "mask": mask, "old_logp": old_logp, "entropy": entropy}
    textbook(x, config).backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)
    dead = int((leaf.grad == 0).all(-1).sum())
    assert found.metrics["live"].item() == B * T - dead
    assert found.metrics["tokens"].item() == mask.sum()


def test_the_module_gives_a_differentiable_zero_for_an_empty_mask():
    logits = torch.full((2, 3, 10), math.nan, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    config = LossConfig(top_entropy_quantile=0.2)
    loss = GRPOLoss(config)(logits, torch.full((2, 3), -100), torch.ones(2), mask=nothing).loss
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_on_policy_the_ratio_of_a_second_pass_is_exactly_one():
    logits, target = torch.randn(4, 6, 80), torch.randint(0, 80, (4, 6))
    with torch.no_grad():
        old_logp = token_stats(logits, target).logp
    mask = torch.ones(4, 6, dtype=torch.bool)
    found = GRPOLoss()(logits.requires_grad_(), target, torch.randn(4), mask=mask, old_logp=old_logp)
    assert found.metrics["ratio"] == found.metrics["ratios"]


@pytest.mark.parametrize("settings, message", [
    ({"loss_type": "gmpo"}, "loss_type: found 'gmpo', expected one of 'grpo', 'bnpo', 'dr_grpo', 'dapo'"),
    ({"ratio_level": "batch"}, "ratio_level: found 'batch', expected one of 'token', 'sequence'"),
    ({"top_entropy_quantile": 1.5}, r"top_entropy_quantile: found 1.5, expected in \[0, 1\]"),
    ({"top_entropy_quantile": math.nan}, "top_entropy_quantile"),
    ({"epsilon_low": -0.1}, "epsilon_low: found -0.1"),
    ({"epsilon_high": -0.1}, "epsilon_high: found -0.1"),
    ({"delta": 0.0}, "delta: found 0.0"),
    ({"max_log_ratio": -1.0}, "max_log_ratio"),
    ({"beta": math.inf}, "beta: found inf"),
    ({"loss_type": "dr_grpo"}, "max_completion_length: found None"),
    ({"max_completion_length": 5}, "max_completion_length: found 5, expected None: it has no effect with loss_type"),
    ({"entropy_denominator": "kept"}, "entropy_denominator: found 'kept'.*no effect with top_entropy_quantile=1.0"),
    ({"entropy_denominator": "some"}, "entropy_denominator: found 'some'"),
    ({"exact_k": True}, "exact_k: found True.*no effect"),
    ({"kl_estimator": "k2"}, "kl_estimator: found 'k2'.*no effect with beta=0.0"),
    ({"kl_bias_correction": True}, "kl_bias_correction.*no effect with beta=0.0"),
    ({"entropy_denominator": "kept", "top_entropy_quantile": 0.2, "beta": 0.1}, "beta: found 0.1.*Eq. 6 has no KL"),
    ({"entropy_denominator": "kept", "top_entropy_quantile": 0.2, "loss_type": "dr_grpo",
      "max_completion_length": 9}, "entropy_denominator: found kept"),
])  # fmt: skip
def test_conflicting_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**settings)


@pytest.mark.parametrize("change, error, message", [
    ({"logp": torch.zeros(3)}, ValueError, r"logp: found shape \(3,\), expected \[B, T\]"),
    ({"logp": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logp: found dtype torch.int64"),
    ({"advantage": torch.zeros(3)}, ValueError, r"advantage: found shape \(3,\), expected \[B\] = \(2,\) or"),
    ({"advantage": torch.zeros(2, dtype=torch.int64)}, TypeError, "advantage: found dtype torch.int64"),
    ({"mask": torch.ones(2, 3)}, TypeError, "mask: found dtype torch.float32, expected torch.bool"),
    ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask: found shape \(2, 4\), expected \(2, 3\)"),
    ({"old_logp": torch.zeros(2, 1)}, ValueError, r"old_logp: found shape \(2, 1\)"),
    ({"ref_logp": torch.zeros(2, 3)}, ValueError, "ref_logp: found a tensor, expected None with beta=0.0"),
    ({"config": LossConfig(beta=0.1)}, ValueError, "ref_logp: found None, expected a tensor with beta=0.1"),
    ({"config": LossConfig(top_entropy_quantile=0.2)}, ValueError, "entropy: found None"),
    ({"cutoff": 0.5}, ValueError, "cutoff: found 0.5, expected None"),
    ({"sampler_ratio": torch.ones(2)}, ValueError, r"sampler_ratio: found shape \(2,\)"),
])  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    good = {"logp": torch.zeros(2, 3), "advantage": torch.zeros(2), "mask": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(error, match=message):
        policy_loss(**{**good, **change})
