"""Test properties of policy_loss for random settings: live count, finite gradients, splits, permutations, bits."""

import math
import random

import pytest
import torch

from rlloss import GRPOLoss, LossConfig, policy_loss, token_stats
from rlloss.backends import backend, triton
from rlloss.config import KL_ESTIMATORS, CovarianceConfig, SapoConfig, VespoConfig
from rlloss.tokens.masks import top_entropy_mask
from tests.support.loss_cases import BACKENDS, FUSED, LENGTH, LOSS_TYPES, OVER, READ_BY, converted, make_config
from tests.support.rounding import assert_sums_close

COVARIANCES = {
    "clip_cov": [CovarianceConfig(), CovarianceConfig(ratio=0.3, low=0.0), CovarianceConfig(0.3, selection="top")],
    "kl_cov": [CovarianceConfig(), CovarianceConfig(ratio=0.3), CovarianceConfig(ratio=0.3, penalty="k3")],
}
SEQUENCE_LOSSES = [name for name, over in OVER.items() if over.startswith("sequence")]


def draw(seed: int, B: int | None = None, T: int | None = None) -> tuple[LossConfig, dict]:
    """A random LossConfig and a batch full of zeros, clips and ties, and NaN where the mask is False."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    B, T = B or r.choice([1, 3]), T or r.choice([1, 5])
    rho, beta = r.choice([1.0, 1.0, 0.4, 0.0]), r.choice([0.0, 0.0, 0.1])
    loss_type = LOSS_TYPES[seed % len(LOSS_TYPES)]
    corrected = beta != 0 and r.random() < 0.5
    own = {
        "ratio_level": r.choice(["token", "sequence"]),
        "epsilon_low": r.choice([0.0, 0.2, 1.5]),
        "epsilon_high": r.choice([1.0, 1.5, 50.0] if loss_type == "cispo" else [0.0, 0.28, math.inf]),
        "delta": r.choice([None, 0.9, 1.1, 4.0]),
        "max_log_ratio": r.choice([None, 0.3, 30.0]),
        "max_completion_length": LENGTH,
        "sapo": r.choice([SapoConfig(), SapoConfig(0.2, 7.0)]),
        "vespo": r.choice([VespoConfig(), VespoConfig(0.5, 1.0, 1.0, 0.2)]),
        "covariance": r.choice(COVARIANCES.get(loss_type, [None])),
    }
    read = READ_BY[loss_type] | ({"ratio_level"} if corrected and loss_type == "vespo" else set())
    settings = {name: value for name, value in own.items() if name in read} | {
        "top_entropy_quantile": rho,
        "exact_k": rho < 1 and r.random() < 0.5,
        "beta": beta,
        "kl_estimator": r.choice(KL_ESTIMATORS) if beta else "k3",
        "kl_bias_correction": corrected,
        "off_policy_threshold": r.choice([None, None, 0.1]),
        "entropy_coef": r.choice([0.0, 0.0, 0.0, 0.3]),
    }
    if rho < 1 and settings["entropy_coef"]:
        settings["entropy_bonus_tokens"] = r.choice(["kept", "all"])
    if rho < 1 and beta == 0 and loss_type not in ("dr_grpo", "luspo"):
        settings["entropy_denominator"] = r.choice(["all", "kept"])
    config = LossConfig(loss_type, **settings)

    def noise(*shape):
        return torch.randn(*shape, generator=g)

    def some(share, *shape):
        return torch.rand(*shape, generator=g) < share

    mask = some(0.8, B, T)
    logp = -2 * torch.rand(B, T, generator=g)
    advantage = noise(B, T) if r.random() < 0.5 else noise(B)
    advantage[some(0.2, *advantage.shape)] = 0.0
    x = {
        "old_logp": logp + 0.5 * noise(B, T) if r.random() < 0.8 else None,
        "ref_logp": torch.where(some(0.4, B, T), logp, logp + 0.3) if beta else None,
        "sampler_logp": logp + 0.3 * noise(B, T) if config.off_policy_threshold and r.random() < 0.5 else None,
        "entropy": (8 * torch.rand(B, T, generator=g)).round() / 8,
        "logp": logp,
    }
    if r.random() < 0.5:
        x["sampler_ratio"] = torch.rand(B, r.choice([1, T]), generator=g) * 2
        x["sampler_ratio"][some(0.3, *x["sampler_ratio"].shape)] = 0.0
    for name, value in x.items():
        if value is not None and value.shape == mask.shape:
            x[name] = torch.where(mask, value, math.nan)
    return config, {"advantage": advantage, "mask": mask, **x}


def step(config: LossConfig, x: dict, on="torch", **more) -> tuple:
    """(loss, gradient of logp, gradient of the entropy, metrics)."""
    x = dict(x)
    leaves = [x.pop(name).detach().clone().requires_grad_() for name in ("logp", "entropy")]
    with backend(on):
        loss, metrics = policy_loss(leaves[0], entropy=leaves[1], config=config, **x, **more)
        gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return loss.detach(), *gradients, metrics


@pytest.mark.parametrize("first", range(0, 1800, 200))
def test_live_counts_the_tokens_with_a_gradient(first):
    for seed in range(first, first + 200):
        config, x = draw(seed)
        loss, g_logp, g_entropy, metrics = step(config, x)
        assert loss.isfinite() and g_logp.isfinite().all() and g_entropy.isfinite().all(), (seed, config)
        assert metrics["live"] == ((g_logp != 0) | (g_entropy != 0)).sum(), (seed, config)
        assert (g_logp[~x["mask"]] == 0).all() and (g_entropy[~x["mask"]] == 0).all(), (seed, config)


def test_the_drawn_settings_reach_every_value():
    drawn = [draw(seed) for seed in range(1800)]
    for loss_type in LOSS_TYPES:
        of_type = [config for config, _ in drawn if config.loss_type == loss_type]
        several = READ_BY[loss_type] - {"max_completion_length"}
        several |= {"top_entropy_quantile", "exact_k", "beta", "kl_estimator", "kl_bias_correction", "entropy_coef"}
        several |= {"off_policy_threshold", "entropy_bonus_tokens"}
        for name in several:
            assert len({getattr(config, name) for config in of_type}) > 1, (loss_type, name)
    for name in ("old_logp", "sampler_logp", "sampler_ratio"):
        assert {x.get(name) is None for _, x in drawn} == {True, False}


@pytest.mark.skipif(not triton, reason="needs Triton")
def test_live_counts_in_the_kernel_too():
    for seed in range(0, 1800, 131):
        config, x = draw(seed)
        if config.loss_type in ("sapo", "vespo"):
            continue
        loss, g_logp, g_entropy, metrics = step(config, converted_or_none(x), FUSED)
        assert metrics["live"] == ((g_logp != 0) | (g_entropy != 0)).sum(), (seed, config)


def converted_or_none(x: dict) -> dict:
    given = {name: value for name, value in x.items() if value is not None}
    return converted(given, torch.float32, FUSED)


# tests/tokens/test_covariance.py has the losses that pick tokens, for which a split needs a common pick.
@pytest.mark.parametrize(
    "seed", [s for s in range(4 * len(LOSS_TYPES)) if LOSS_TYPES[s % len(LOSS_TYPES)] not in COVARIANCES]
)
def test_micro_batches_with_the_whole_denominator_sum_to_the_whole(seed):
    """There is no entropy bonus, since it is a mean over each call's own tokens. The selection has a common cutoff."""
    config, x = draw(seed, B=8, T=6)
    changes = {"entropy_coef": 0.0, "exact_k": False, "entropy_bonus_tokens": "kept"}
    config = LossConfig(**{**vars(config), **changes})
    x = {k: v.double() if v is not None and v.dtype != torch.bool else v for k, v in x.items()}
    given = {} if config.top_entropy_quantile == 1 else {"cutoff": 0.5}
    whole = step(config, x, **given)
    if config.loss_type in SEQUENCE_LOSSES:
        count = 8
    elif config.loss_type == "dr_grpo":
        count = 8 * LENGTH
    else:
        count = whole[3]["kept" if config.entropy_denominator == "kept" else "tokens"].item()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
    cuts = sorted(random.Random(seed).sample(range(1, 8), 2))
    parts = [order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]]
    loss, gradient = 0.0, torch.empty(8, 6, dtype=torch.float64)
    rest = {name: whole[3][name].item() for name in ("tokens", "kept", "live", "surrogate", "ratios", "ratio")}
    for rows in parts:
        part = step(config, {k: None if v is None else v[rows] for k, v in x.items()}, denominator=count, **given)
        loss, gradient[rows] = loss + part[0], part[1]
        for name in rest:
            rest[name] -= part[3][name].item()
    torch.testing.assert_close(loss, whole[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, whole[1], rtol=1e-12, atol=1e-12)
    assert all(abs(value) < 1e-4 for value in rest.values()), rest


@pytest.mark.parametrize("seed", range(4 * len(LOSS_TYPES)))
def test_permuting_the_sequences_permutes_the_gradients(seed):
    config, x = draw(seed, B=6, T=5)
    config = LossConfig(**{**vars(config), "exact_k": False})  # of equal entropies it keeps the first
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    plain, permuted = step(config, x), step(config, {k: None if v is None else v[order] for k, v in x.items()})
    assert_sums_close(permuted[0], plain[0], 30, size=1)
    # Gradients are divided by whole counts, and no other row enters them: the bits are the same.
    assert torch.equal(permuted[1], plain[1][order]) and torch.equal(permuted[2], plain[2][order])
    assert permuted[3]["live"] == plain[3]["live"]


@pytest.mark.parametrize("on", ["torch", pytest.param(FUSED, marks=pytest.mark.skipif(not triton, reason=""))])
@pytest.mark.parametrize("seed", range(len(LOSS_TYPES)))
def test_twice_the_same_bits(seed, on):
    config, x = draw(seed, B=5, T=7)
    x = converted({k: v for k, v in x.items() if v is not None}, torch.float32, on)
    first, second = step(config, x, on), step(config, x, on)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    for name, value in first[3].items():
        torch.testing.assert_close(value, second[3][name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("shift", [1.0, -64.0, 4096.0])
def test_a_constant_added_to_all_logits_changes_nothing(loss_type, shift):
    """The logits are multiples of 1/256 below 8, so every shifted one is exact in fp32."""
    g = torch.Generator().manual_seed(3)
    B, T, V = 3, 5, 50
    logits = torch.randint(-2048, 2048, (B, T, V), generator=g) / 256.0
    assert torch.equal((logits + shift) - shift, logits)
    target, advantage = torch.randint(0, V, (B, T), generator=g), torch.randn(B, generator=g)
    mask = torch.rand(B, T, generator=g) < 0.8
    old_logp = token_stats(logits, target).logp + 0.3 * torch.randn(B, T, generator=g)
    config = make_config(loss_type, top_entropy_quantile=0.7, entropy_coef=0.1)
    results = []
    for added in (0.0, shift):
        leaf = (logits + added).requires_grad_()
        with backend("torch"):
            loss, metrics = GRPOLoss(config)(leaf, target, advantage, mask=mask, old_logp=old_logp)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0], metrics))
    plain, shifted = results
    # lse is near the shift and is rounded to fp32; its distance to a logit carries that error.
    rounding = 4 * torch.finfo(torch.float32).eps * (1 + abs(shift))
    torch.testing.assert_close(shifted[0], plain[0], rtol=0, atol=20 * rounding)
    torch.testing.assert_close(shifted[1], plain[1], rtol=0, atol=rounding)
    for name in ("tokens", "kept", "live"):
        assert shifted[2][name] == plain[2][name]


@pytest.mark.parametrize("name", [
    "old_logp", "ref_logp", "sampler_ratio", "temperature", "softcap", "logit_scale", "cutoff", "denominator",
])  # fmt: skip
def test_the_module_hands_every_argument_on(name):
    g = torch.Generator().manual_seed(0)
    B, T, V = 3, 5, 40
    logits = 3 * torch.randn(B, T, V, generator=g)
    target, mask = torch.randint(0, V, (B, T), generator=g), torch.rand(B, T, generator=g) < 0.8
    advantage = torch.randn(B, generator=g)
    config = LossConfig(top_entropy_quantile=0.5, beta=0.1 if name == "ref_logp" else 0.0)
    logp = token_stats(logits, target).logp
    given = {
        "old_logp": logp + 0.2 * torch.randn(B, T, generator=g),
        "ref_logp": logp + 0.2 * torch.randn(B, T, generator=g),
        "sampler_ratio": torch.rand(B, T, generator=g),
        "temperature": 0.5,
        "softcap": 4.0,
        "logit_scale": 0.5,
        "cutoff": 2.0,
        "denominator": 7.0,
    }[name]
    old_logp = {} if name == "old_logp" else {"old_logp": logp - 0.1}
    found = GRPOLoss(config)(logits, target, advantage, mask=mask, **old_logp, **{name: given})
    to_stats = {name: given} if name in ("temperature", "softcap", "logit_scale") else {}
    to_loss = {} if to_stats else {name: given}
    stats = token_stats(logits, target, mask=mask, **to_stats)
    expected = policy_loss(
        stats.logp, advantage, mask, config=config, entropy=stats.entropy, **old_logp, **to_loss
    )  # fmt: skip
    assert torch.equal(found.loss, expected.loss)
    if name != "ref_logp":  # without a reference there is no loss to compare with
        without = GRPOLoss(config)(logits, target, advantage, mask=mask, **old_logp)
        assert not torch.equal(found.loss, without.loss)


def test_the_module_gives_the_entropy_its_gradient_for_a_bonus():
    logits = torch.randn(2, 3, 20, requires_grad=True)
    target, mask = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    loss = GRPOLoss(LossConfig(entropy_coef=0.5))(logits, target, torch.zeros(2), mask=mask).loss
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    log_p = exact.log_softmax(-1)
    (0.5 * (log_p.exp() * log_p).sum(-1).mean()).backward()
    assert_sums_close(logits.grad, exact.grad, 20)


def test_entropies_in_bf16_are_compared_in_fp32():
    entropy = torch.tensor([[1.0, 1.0078125, 1.015625, 1.0234375]], dtype=torch.bfloat16)
    mask = torch.ones(1, 4, dtype=torch.bool)
    for rho in (0.3, 0.5, 0.6):
        assert torch.equal(top_entropy_mask(entropy, mask, rho), top_entropy_mask(entropy.float(), mask, rho))
    config = LossConfig(top_entropy_quantile=0.5)
    metrics = policy_loss(torch.zeros(1, 4), torch.ones(1), mask, config=config, entropy=entropy).metrics
    assert metrics["kept"] == 2 and metrics["entropy"].item() == entropy.double().sum().item()


@pytest.mark.filterwarnings("ignore:overflow")  # of numpy, in the interpreter
@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_kl_of_zero_is_not_multiplied_by_an_infinite_ratio(estimator, on):
    config = LossConfig(beta=0.1, kl_bias_correction=True, kl_estimator=estimator)
    x = {
        "logp": torch.zeros(1, 2), "ref_logp": torch.zeros(1, 2), "old_logp": torch.tensor([[-100.0, 0.0]]),
        "advantage": torch.ones(1), "mask": torch.ones(1, 2, dtype=torch.bool), "entropy": torch.zeros(1, 2),
    }  # fmt: skip
    loss, gradient, _, _ = step(config, converted(x, torch.float32, on), on)
    assert loss.isfinite() and gradient.tolist() == [[0.0, -0.5]]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_sequences_are_a_zero(loss_type):
    config = make_config(loss_type)
    for T in (0, 4):
        nothing = torch.zeros(0, T, dtype=torch.bool)
        assert policy_loss(torch.zeros(0, T), torch.zeros(0), nothing, config=config).loss == 0
