"""Test policy_loss against the textbook in fp64 and hand-worked means, weights and metrics. Test the module."""

import itertools
import math

import pytest
import torch

from rlloss import GRPOLoss, LossConfig, means, policy_loss, reference, token_stats
from rlloss.backends import backend
from rlloss.loss_types import LOSSES
from tests.support.loss_cases import (
    BACKENDS,
    COVARIANCE,
    DEVICE,
    FUSED,
    LENGTH,
    LEVELS,
    LOSS_TYPES,
    TYPES_AND_LEVELS,
    batch,
    converted,
    make_config,
    ours,
    settings_of,
    textbook,
    textbook_pick,
    value_and_gradients,
)
from tests.support.rounding import assert_sums_close

MATRIX = [(name, level, settings) for name, level in TYPES_AND_LEVELS for settings in settings_of(name)]


@pytest.fixture(autouse=True)
def general_path():
    """Use the general path for all losses, also those with a kernel. Tests of the kernel's path say so."""
    with backend("torch"):
        yield


def assert_as_good_as_torch(config, x, sampled, dtype, on="torch"):
    """The error is at most twice the error of the textbook in this dtype."""

    def book(x):
        return textbook(x, config, sampled)

    exact, plain = value_and_gradients(book, x, torch.float64), value_and_gradients(book, x, dtype)
    found = value_and_gradients(ours(config, sampled), x, dtype, on)
    for f, p, e in zip(found, plain, exact, strict=True):
        rounding = 4 * torch.finfo(dtype).eps * max(1.0, float(e.abs().max()))
        assert (f - e).abs().max() <= 2 * (p - e).abs().max() + rounding, (sampled, dtype)


@pytest.mark.parametrize("loss_type, level, settings", MATRIX, ids=str)
def test_loss_and_gradients_are_as_good_as_torchs(loss_type, level, settings):
    config = make_config(loss_type, None if "ratio_level" in settings else level, **settings)
    cases = ((False, None), (False, "token"), (True, "sequence"), (True, None))  # advantage per token, sampler's ratio
    for seed, (per_token, sampled) in enumerate(cases):
        x = batch(seed, per_token=per_token, level=sampled or "token")
        if loss_type == "vespo":
            x["sampler_ratio"].clamp_(min=0.5)  # it takes a 0 for 1e-8
        for dtype in (torch.float32, torch.float64):
            assert_as_good_as_torch(config, x, sampled, dtype)


@pytest.mark.skipif(FUSED not in BACKENDS, reason="needs Triton")
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("loss_type, level", [pair for pair in TYPES_AND_LEVELS if LOSSES[pair[0]].kernel])
def test_so_are_those_of_the_kernel(loss_type, level, per_token):
    """tests/losses/test_token_pass.py compares it with the general path over many more settings."""
    own = {"delta": 1.5, "epsilon_high": 0.2} if "delta" in LOSSES[loss_type].reads else {"max_log_ratio": 0.4}
    own |= {"top_entropy_quantile": 0.6, "beta": 0.1, "kl_bias_correction": True, "entropy_coef": 0.2}
    config = make_config(loss_type, level, **own)
    assert_as_good_as_torch(config, batch(1, per_token=per_token), "token", torch.float32, FUSED)


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
        "luspo": (first + second) / 2,
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
    assert averages["clip_region"].item() == pytest.approx(2 / 5)
    assert found.metrics["clip_low_min"] == 0 and found.metrics["clip_high_max"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("loss_type, level", TYPES_AND_LEVELS)
def test_an_empty_mask_gives_a_differentiable_zero(loss_type, level):
    for settings in ({}, {"top_entropy_quantile": 0.2, "entropy_coef": 0.1, "beta": 0.1}):
        x = batch(0)
        x["mask"][:] = False
        config = make_config(loss_type, level, **settings)
        for on in BACKENDS:
            for denominator in (None, 7.0, torch.zeros((), device="cpu" if on == "torch" else DEVICE)):
                compute = ours(config, sampled=True, denominator=denominator)
                loss, *gradients = value_and_gradients(compute, x, torch.float32, on)
                assert loss == 0 and all((gradient == 0).all() for gradient in gradients)
        metrics = policy_loss(
            x["logp"], x["advantage"], x["mask"], config=config, entropy=x["entropy"].requires_grad_(),
            ref_logp=x["ref_logp"] if config.beta else None,
        ).metrics  # fmt: skip
        assert metrics["tokens"] == metrics["live"] == metrics["sequences"] == 0
        assert all(v.isfinite() for name, v in metrics.items() if name not in ("clip_low_min", "clip_high_max"))


@pytest.mark.parametrize("loss_type, level", TYPES_AND_LEVELS)
def test_without_old_logp_it_is_that_of_a_detached_copy(loss_type, level):
    config = make_config(loss_type, level, beta=0.1, kl_bias_correction=True)
    for seed, dtype in itertools.product(range(3), (torch.float32, torch.float64)):
        x = batch(seed, per_token=seed == 1)
        del x["sampler_logp"], x["sampler_ratio"]
        copied = value_and_gradients(ours(config), {**x, "old_logp": x["logp"]}, dtype)
        del x["old_logp"]
        absent = value_and_gradients(lambda x: policy_loss(**x, config=config).loss, x, dtype)
        assert torch.equal(absent[0], copied[0]) and torch.equal(absent[1], copied[1])
        metrics = policy_loss(**x, config=config).metrics
        assert metrics["ratio"] == metrics["ratios"] and metrics.get("clip_region", 0) == 0


def test_without_old_logp_the_gradient_is_that_of_the_policy_gradient():
    x = batch(1)
    x["logp"].requires_grad_()
    loss, metrics = policy_loss(x["logp"], x["advantage"], x["mask"])
    counted = torch.where(x["mask"], x["advantage"][:, None], 0.0)
    torch.testing.assert_close(loss, -counted.sum() / x["mask"].sum())
    torch.testing.assert_close(torch.autograd.grad(loss, x["logp"])[0], -counted / x["mask"].sum())
    assert means(metrics)["ratio"] == 1 and metrics["clip_region"] == 0


@pytest.mark.parametrize("loss_type, level", [pair for pair in TYPES_AND_LEVELS if pair[0] != "vespo"])
def test_the_sampler_ratio_weighs_the_surrogate_and_zero_removes_it(loss_type, level):
    x = batch(2)
    x["mask"][:] = True
    x["advantage"] = -x["advantage"].abs() - 0.1
    logp = x["logp"].requires_grad_()
    weight = torch.full((4, 1), 0.5, dtype=torch.float64)
    config = make_config(loss_type, level)

    def loss(old_logp, sampler_ratio=None):
        arguments = {"config": config, "old_logp": old_logp, "sampler_ratio": sampler_ratio}
        return policy_loss(logp, x["advantage"], x["mask"], **arguments).loss

    torch.testing.assert_close(loss(x["old_logp"], weight), loss(x["old_logp"]) / 2)
    weight[0] = 0.0
    old_logp = x["old_logp"].clone()
    old_logp[0] = -2000.0  # overflows fp64 too
    gone = loss(old_logp, weight)
    (gradient,) = torch.autograd.grad(gone, logp)
    assert gone.isfinite() and (gradient[0] == 0).all()


def test_off_policy_sequences_with_a_negative_advantage_are_dropped():
    logp = torch.zeros(4, 3, requires_grad=True)
    advantage = torch.tensor([-1.0, -1.0, 1.0, 0.0])
    drift = torch.tensor([0.3, 0.1, 0.9, 0.9])[:, None].expand(4, 3)
    mask = torch.ones(4, 3, dtype=torch.bool)
    for loss_type in LOSS_TYPES:
        own = {"epsilon_low": 1.0} if "epsilon_low" in LOSSES[loss_type].reads else {}
        config = make_config(loss_type, off_policy_threshold=0.2, **own)
        for given in ({"old_logp": drift}, {"sampler_logp": drift}, {"old_logp": 2 * drift, "sampler_logp": drift}):
            loss = policy_loss(logp, advantage, mask, config=config, **given).loss
            (gradient,) = torch.autograd.grad(loss, logp)
            assert [bool(row.any()) for row in gradient] == [False, True, True, False], (loss_type, given)


def test_a_token_that_the_sampler_could_not_score_is_no_evidence():
    logp = torch.zeros(2, 2, requires_grad=True)
    sampler_logp = torch.tensor([[math.nan, 0.6], [math.nan, 0.2]])  # means 0.3 and 0.1
    loss = policy_loss(
        logp, torch.tensor([-1.0, -1.0]), torch.ones(2, 2, dtype=torch.bool),
        config=LossConfig(off_policy_threshold=0.2), sampler_logp=sampler_logp,
    ).loss  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.tolist() == [[0.0, 0.0], [0.25, 0.25]]


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
        policy_loss(x["logp"].requires_grad_(), *arguments[1:], config=config, entropy=entropy.detach())


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("loss_type, level", TYPES_AND_LEVELS)
def test_every_metric_is_what_it_says(loss_type, level, on):
    config = make_config(loss_type, level, top_entropy_quantile=0.4, beta=0.1)
    for per_token in (False, True):
        x = converted(batch(4, per_token=per_token), torch.float32)
        del x["sampler_logp"], x["sampler_ratio"]
        with backend(on):
            found = policy_loss(**converted(x, torch.float32, on), config=config).metrics
        mask, B, T = x["mask"], *x["mask"].shape
        advantage = x["advantage"].view(B, -1).expand(B, T)
        per_sequence = not per_token and (level == "sequence" or loss_type == "vespo")
        if loss_type == "vespo":
            ratio = reference.vespo_log_w(x["logp"], x["old_logp"], mask).exp().expand(B, T)
        else:
            ratio = reference.ratio(x["logp"], x["old_logp"], mask, level).expand(B, T)
        kept = reference.top_entropy(x["entropy"], mask, 0.4)
        expected = {
            "tokens": mask.sum(), "sequences": 3, "kept": kept.sum(), "entropy": x["entropy"][mask].sum(),
            "entropy_kept": x["entropy"][kept].sum(), "kl": reference.kl(x["logp"], x["ref_logp"])[mask].sum(),
            "entropy_cutoff": x["entropy"][mask].quantile(0.6) * mask.sum(),
            # The first sequence is empty, and its ratio of 1 counts where there is one per sequence.
            "ratios": B if per_sequence else mask.sum(),
            "ratio": ratio[:, 0].sum() if per_sequence else ratio[mask].sum(),
        }  # fmt: skip
        counted = torch.ones(B, 1, dtype=torch.bool) if per_sequence else mask
        width = counted.shape[1]
        if loss_type == "vespo":
            log_w = ratio.log()
            phi = torch.where(
                advantage >= 0, (3 + 2 * log_w - 3 * ratio).exp(), (2 + 3 * log_w - 2 * ratio).exp()
            )[:, :width]  # fmt: skip
            expected["weight"] = phi[counted].sum()
        elif LOSSES[loss_type].logs:
            top = 1.3 if loss_type == "cispo" else 1.28
            low = counted & ((ratio < (0.0 if loss_type == "cispo" else 0.8)) & (advantage < 0))[:, :width]
            high = counted & ((ratio > top) & (advantage > 0))[:, :width]
            shares = [clipped.sum(1)[counted.any(1)] / counted.sum(1)[counted.any(1)] for clipped in (low, high)]
            expected |= {
                "clip_low": low.sum(), "clip_high": high.sum(), "clip_region": (low | high).sum(),
                "clip_low_min": shares[0].min(), "clip_high_max": shares[1].max(),
            }  # fmt: skip
        if loss_type in COVARIANCE:
            given = {**x, "advantage": advantage}
            expected["selected"] = textbook_pick(given, config, kept, advantage).sum()
        assert set(found) == set(expected) | {"surrogate", "live"}
        for name, value in expected.items():
            assert float(found[name]) == pytest.approx(float(value), rel=2e-6), name
        assert all(value.dtype == torch.float32 and not value.requires_grad for value in found.values())
        mean = means(found)
        assert mean["kept_share"] == found["kept"] / found["tokens"] and mean["kl"] == found["kl"] / found["tokens"]
        assert mean["ratio"] == found["ratio"] / found["ratios"]


# The covariance picks depend on the other sequences.
@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name not in COVARIANCE])
def test_the_surrogate_is_the_sum_of_the_token_losses_without_kl(loss_type):
    x = batch(4)
    arguments = {k: x[k] for k in ("logp", "advantage", "mask", "old_logp")}
    found = policy_loss(**arguments, ref_logp=x["ref_logp"], config=make_config(loss_type, beta=0.5)).metrics
    lengths = x["mask"].sum(-1).tolist()
    rows = [{k: v[i : i + 1] for k, v in arguments.items()} for i in range(1, 4)]
    # One sequence alone: each loss is its sum over tokens, divided by something known.
    divisor = {"dr_grpo": lambda n: LENGTH, "luspo": lambda n: 1}.get(loss_type, lambda n: n)
    alone = [
        policy_loss(**row, config=make_config(loss_type)).loss * divisor(lengths[i + 1]) for i, row in enumerate(rows)
    ]
    assert float(found["surrogate"]) == pytest.approx(float(sum(alone)), rel=1e-5)


@pytest.mark.parametrize(
    "loss_type, rho, denominator",
    [(loss_type, rho, "all") for loss_type in LOSS_TYPES for rho in (1.0, 0.3)]
    # Losses with another divisor than tokens have no "kept": see test_loss_config.py.
    + [(loss_type, 0.3, "kept") for loss_type in LOSS_TYPES if loss_type not in ("dr_grpo", "luspo")],
)
def test_the_module_from_logits_equals_the_textbook(loss_type, rho, denominator):
    B, T, V = 3, 5, 60
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, V, generator=g)
    target, advantage = torch.randint(0, V, (B, T), generator=g), torch.randn(B, generator=g)
    mask = torch.rand(B, T, generator=g) < 0.7
    stats = reference.token_stats(logits.double(), target, 0.8)
    old_logp = stats[0] + 0.3 * torch.randn(B, T, generator=g)
    config = make_config(
        loss_type, LEVELS[loss_type][-1], top_entropy_quantile=rho, entropy_denominator=denominator
    )  # fmt: skip

    leaf = logits.clone().requires_grad_()
    hostile = torch.where(mask, target, -100)
    found = GRPOLoss(config)(leaf, hostile, advantage, mask=mask, old_logp=old_logp.float(), temperature=0.8)
    found.loss.backward()
    exact = logits.double().requires_grad_()
    logp, entropy, _ = reference.token_stats(exact, target, 0.8)
    x = {"logp": logp, "advantage": advantage.double(), "mask": mask, "old_logp": old_logp, "entropy": entropy}
    textbook(x, config).backward()
    assert_sums_close(leaf.grad, exact.grad, V)
    dead = int((leaf.grad == 0).all(-1).sum())
    assert found.metrics["live"].item() == B * T - dead
    assert found.metrics["tokens"].item() == mask.sum()


def test_the_module_gives_a_differentiable_zero_for_an_empty_mask():
    logits = torch.full((2, 3, 10), math.nan, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for loss_type in LOSS_TYPES:
        config = make_config(loss_type, top_entropy_quantile=0.2)
        loss = GRPOLoss(config)(logits, torch.full((2, 3), -100), torch.ones(2), mask=nothing).loss
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and (gradient == 0).all()


def test_on_policy_the_ratio_of_a_second_pass_is_exactly_one():
    logits, target = torch.randn(4, 6, 80), torch.randint(0, 80, (4, 6))
    with torch.no_grad():
        old_logp = token_stats(logits, target).logp
    mask = torch.ones(4, 6, dtype=torch.bool)
    for loss_type in LOSS_TYPES:
        found = GRPOLoss(make_config(loss_type))(
            logits.clone().requires_grad_(), target, torch.randn(4), mask=mask, old_logp=old_logp
        )
        assert found.metrics["ratio"] == found.metrics["ratios"]


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("d", [1e-18, 1e-6, 1e-4, 1e-3, 0.02, 0.3, 0.49999, 0.5, 0.7, 2.0])
def test_k3_keeps_its_digits_near_0(d, on):
    """The bounds are derived in `rlloss.losses.kl.k3`."""
    bound = 5 * 2**-24 if d < 0.5 else 4e-6
    for sign in (1.0, -1.0):
        ref_logp = torch.full((1, 8), sign * d, device=DEVICE)
        logp = torch.zeros_like(ref_logp, requires_grad=True)
        config = LossConfig(beta=1.0, kl_estimator="k3")
        with backend(on):
            mask = torch.ones_like(logp, dtype=torch.bool)
            loss, metrics = policy_loss(logp, torch.zeros(1, device=DEVICE), mask, ref_logp=ref_logp, config=config)
            (gradient,) = torch.autograd.grad(loss * 8, logp)
        exact = math.expm1(ref_logp[0, 0].item())
        value = ref_logp[0, 0].double() ** 2 / 2 if d < 1e-7 else exact - ref_logp[0, 0].double()
        assert abs(metrics["kl"] / 8 - value) <= bound * value, metrics["kl"] / 8
        assert (gradient + exact).abs().max() <= bound * abs(exact), gradient
