"""What holds for any setting of policy_loss: the live count, finite gradients, precision, the module's arguments."""

import math
import random

import pytest
import torch

from rlloss import GRPOLoss, LossConfig, policy_loss, token_stats
from rlloss.config import KL_ESTIMATORS, LOSS_TYPES
from rlloss.masks import top_entropy_mask


def draw(seed: int) -> tuple[LossConfig, dict]:
    """A random LossConfig and a batch full of zeros, clips, overflows and NaN where the mask is False."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    B, T = r.choice([1, 3]), r.choice([1, 5])
    rho, beta = r.choice([1.0, 1.0, 0.4, 0.0]), r.choice([0.0, 0.0, 0.1])
    loss_type = r.choice(LOSS_TYPES)
    settings = {
        "ratio_level": r.choice(["token", "sequence"]),
        "epsilon_low": r.choice([0.0, 0.2, 1.5]),
        "epsilon_high": r.choice([0.0, 0.28, math.inf]),
        "delta": r.choice([None, 0.9, 1.1, 4.0]),
        "max_log_ratio": r.choice([None, 0.3, 30.0]),
        "top_entropy_quantile": rho,
        "exact_k": rho < 1 and r.random() < 0.5,
        "beta": beta,
        "kl_estimator": r.choice(KL_ESTIMATORS) if beta else "k3",
        "kl_bias_correction": beta != 0 and r.random() < 0.5,
        "off_policy_threshold": r.choice([None, None, 0.1]),
        "max_completion_length": 9 if loss_type == "dr_grpo" else None,
    }
    if rho < 1 and beta == 0 and loss_type != "dr_grpo":
        settings["entropy_denominator"] = r.choice(["all", "kept"])
    config = LossConfig(loss_type, **settings)

    mask = torch.rand(B, T, generator=g) < 0.8
    logp = -2 * torch.rand(B, T, generator=g)
    advantage = torch.randn((B, T) if r.random() < 0.5 else (B,), generator=g)
    advantage[torch.rand(advantage.shape, generator=g) < 0.2] = 0.0
    old_logp = logp + 0.5 * torch.randn(B, T, generator=g)
    ref_logp = torch.where(torch.rand(B, T, generator=g) < 0.4, logp, logp + 0.3)
    entropy = torch.rand(B, T, generator=g)
    x = {"advantage": advantage, "mask": mask, "old_logp": old_logp if r.random() < 0.8 else None, "entropy": entropy}
    if r.random() < 0.5:
        x["sampler_ratio"] = torch.rand(B, r.choice([1, T]), generator=g) * 2
        x["sampler_ratio"][torch.rand(x["sampler_ratio"].shape, generator=g) < 0.3] = 0.0
    if beta:
        x["ref_logp"] = ref_logp
    for name in ("old_logp", "entropy", "ref_logp", "sampler_ratio"):
        if x.get(name) is not None and x[name].shape == mask.shape:
            x[name] = torch.where(mask, x[name], math.nan)
    return config, {"logp": torch.where(mask, logp, math.nan), **x}


@pytest.mark.parametrize("first", range(0, 2000, 200))
def test_live_counts_the_tokens_with_a_gradient(first):
    for seed in range(first, first + 200):
        config, x = draw(seed)
        logp = x.pop("logp").requires_grad_()
        loss, metrics = policy_loss(logp, **x, config=config)
        (gradient,) = torch.autograd.grad(loss, logp)
        assert loss.isfinite() and gradient.isfinite().all(), (seed, config)
        assert metrics["live"].item() == (gradient != 0).sum().item(), (seed, config)
        assert (gradient[~x["mask"]] == 0).all(), (seed, config)


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
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


def test_entropies_in_bf16_are_compared_in_fp32():
    entropy = torch.tensor([[1.0, 1.0078125, 1.015625, 1.0234375]], dtype=torch.bfloat16)
    mask = torch.ones(1, 4, dtype=torch.bool)
    for rho in (0.3, 0.5, 0.6):
        assert torch.equal(top_entropy_mask(entropy, mask, rho), top_entropy_mask(entropy.float(), mask, rho))
    config = LossConfig(top_entropy_quantile=0.5)
    metrics = policy_loss(torch.zeros(1, 4), torch.ones(1), mask, config=config, entropy=entropy).metrics
    assert metrics["kept"] == 2 and metrics["entropy"].item() == entropy.double().sum().item()


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_kl_of_zero_is_not_multiplied_by_an_infinite_ratio(estimator):
    logp = torch.zeros(1, 2, requires_grad=True)
    config = LossConfig(beta=0.1, kl_bias_correction=True, kl_estimator=estimator)
    loss = policy_loss(
        logp, torch.tensor([1.0]), torch.ones(1, 2, dtype=torch.bool), config=config,
        old_logp=torch.tensor([[-100.0, 0.0]]), ref_logp=torch.zeros(1, 2),
    ).loss  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logp)
    assert loss.isfinite() and gradient.tolist() == [[0.0, -0.5]]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_sequences_are_a_zero(loss_type):
    config = LossConfig(loss_type, max_completion_length=9 if loss_type == "dr_grpo" else None)
    for T in (0, 4):
        nothing = torch.zeros(0, T, dtype=torch.bool)
        assert policy_loss(torch.zeros(0, T), torch.zeros(0), nothing, config=config).loss == 0


@pytest.mark.parametrize("arguments, error, message", [
    ({"denominator": 0.0}, ValueError, "denominator: found 0.0"),
    ({"denominator": torch.ones(2)}, ValueError, r"denominator: found shape \(2,\), expected one number"),
    ({"cutoff": torch.ones(2, 3)}, ValueError, r"cutoff: found shape \(2, 3\), expected one number"),
    ({"config": "dapo"}, TypeError, "config: found str, expected a LossConfig"),
])  # fmt: skip
def test_more_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        policy_loss(torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3, dtype=torch.bool), **arguments)


@pytest.mark.parametrize("name, value", [("epsilon_low", "0.2"), ("beta", None), ("delta", "4")])
def test_settings_of_the_wrong_type_are_named(name, value):
    with pytest.raises(TypeError, match=f"{name}: found {value!r}, expected a number"):
        LossConfig(**{name: value})


def test_the_off_policy_threshold_is_positive():
    for value in (-1.0, 0.0, math.nan):
        with pytest.raises(ValueError, match="off_policy_threshold: found"):
            LossConfig(off_policy_threshold=value)
