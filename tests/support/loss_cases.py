"""Make batches of completions and settings of every loss type, and compute the loss from `rlloss.reference`."""

import dataclasses
import math

import torch

from rlloss import LossConfig, policy_loss, reference
from rlloss.backends import backend, triton
from rlloss.config import CovarianceConfig, SapoConfig, VespoConfig
from rlloss.loss_types import LOSSES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = "triton" if DEVICE == "cuda" else "interpreter"  # the backend of the kernel for the losses that clip
LENGTH = 9  # max_completion_length of dr_grpo
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo")
BACKENDS = ("torch", FUSED) if triton else ("torch",)
# Loss types that do not allow both ratio levels.
_OWN_LEVELS = {"gspo": ("sequence",), "vespo": (None,), "clip_cov": ("token",), "kl_cov": ("token",)}
# The settings of LossConfig that each loss reads. Then the denominators of the papers and codes, written independently
# of the table.
READ_BY = {name: {x for x in row.reads if "." not in x} for name, row in LOSSES.items()}
LOSS_TYPES = tuple(LOSSES)
SILENCES = ("clip", "sapo", "vespo")  # surrogates whose clip, gate or weight makes a gradient exactly 0
OVER = {
    **dict.fromkeys(("grpo", "sapo", "gspo"), "sequence means"),
    **dict.fromkeys(("bnpo", "dapo", "cispo", "vespo", "clip_cov", "kl_cov"), "tokens"),
    "luspo": "sequences",
    "dr_grpo": "length",
}
LEVELS = {name: _OWN_LEVELS.get(name, ("token", "sequence")) for name in LOSS_TYPES}
# Settings that pick enough tokens in a small batch, and always the same ones.
COVARIANCE = {
    "clip_cov": CovarianceConfig(ratio=0.2, low=0.05, high=2.0, selection="top"),
    "kl_cov": CovarianceConfig(ratio=0.2, kl_coef=0.7),
}
TYPES_AND_LEVELS = [(name, level) for name, levels in LEVELS.items() for level in levels]


def make_config(loss_type="dapo", level=None, **settings) -> LossConfig:
    """A LossConfig with the settings that the loss type requires."""
    if level is not None:
        settings["ratio_level"] = level
    if loss_type == "dr_grpo":
        settings["max_completion_length"] = LENGTH
    if loss_type == "cispo":
        settings.setdefault("epsilon_high", 1.3)
    if loss_type in COVARIANCE:
        settings.setdefault("covariance", COVARIANCE[loss_type])
    return LossConfig(loss_type, **settings)


def batch(seed: int, B=4, T=7, *, per_token=False, spread=0.4, level="token") -> dict[str, torch.Tensor]:
    """All inputs of `policy_loss`, in fp64. The first sequence is empty. level: level of the sampler's ratio."""
    g = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logp = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    lengths[0] = 0
    advantage = noise(B, T) if per_token else noise(B)
    advantage[1] = 0.0 if seed % 3 == 2 else advantage[1]
    x = {
        "logp": logp,
        "advantage": advantage,
        "mask": torch.arange(T) < lengths[:, None],
        "old_logp": logp + spread * noise(B, T),
        "ref_logp": logp + spread * noise(B, T),
        "entropy": torch.rand(B, T, generator=g, dtype=torch.float64),
        "sampler_logp": logp + spread * noise(B, T),
        "sampler_ratio": (spread * noise(B, T if level == "token" else 1)).exp(),
    }
    x["sampler_ratio"].view(-1)[-1] = 0.0
    return x


def arguments(x: dict, config: LossConfig, sampled=False) -> dict:
    """The arguments of `policy_loss` for a batch under `config`. sampled: include those that the sampler gives."""
    names = ["logp", "advantage", "mask", "old_logp", "entropy"]
    names += ["ref_logp"] if config.beta else []
    names += ["sampler_ratio"] if sampled else []
    names += ["sampler_logp"] if sampled and config.off_policy_threshold is not None else []
    return {name: x[name] for name in names}


def textbook(x: dict, config: LossConfig, sampled=False) -> torch.Tensor:
    """The loss from `rlloss.reference`, one formula after the other."""
    mask, logp, old_logp = x["mask"], x["logp"], x["old_logp"]
    advantage = x["advantage"] if x["advantage"].dim() == 2 else x["advantage"][:, None]
    sampler_ratio = x["sampler_ratio"] if sampled else None
    ratio = reference.ratio(logp, old_logp, mask, "sequence" if config.loss_type == "gspo" else config.ratio_level)
    if config.max_log_ratio is not None:
        ratio = ratio.clamp(math.exp(-config.max_log_ratio), math.exp(config.max_log_ratio))
    if config.loss_type == "cispo":
        loss = reference.cispo(ratio, advantage, logp, config.epsilon_high)
    elif config.loss_type == "sapo":
        loss = reference.sapo(ratio, advantage, config.sapo.temperature_pos, config.sapo.temperature_neg)
    elif config.loss_type == "vespo":
        log_w = reference.vespo_log_w(logp, old_logp, mask, sampler_ratio)
        c = config.vespo
        loss = reference.vespo(log_w, advantage, logp, (c.k_pos, c.lambda_pos), (c.k_neg, c.lambda_neg))
        sampler_ratio = None
    elif config.loss_type != "kl_cov":
        loss = reference.clip_surrogate(ratio, advantage, config.epsilon_low, config.epsilon_high, config.delta)

    acts = kept = mask
    if config.top_entropy_quantile < 1:
        acts = kept = reference.top_entropy(x["entropy"].detach(), mask, config.top_entropy_quantile)
    if config.off_policy_threshold is not None:
        behavior_logp = x["sampler_logp"] if sampled else old_logp
        drift = torch.where(mask, behavior_logp - logp, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        acts = acts & ((advantage >= 0) | (drift <= config.off_policy_threshold))
    if sampler_ratio is not None:
        acts = acts & (sampler_ratio != 0)
    if config.loss_type in COVARIANCE:
        picked = textbook_pick(x, config, acts, advantage)
        if config.loss_type == "kl_cov":
            c = config.covariance
            loss = reference.kl_cov(ratio, advantage, picked, c.kl_coef, c.penalty)
        else:
            acts = acts & ~picked
    if sampler_ratio is not None:
        loss = loss * sampler_ratio
    loss = torch.where(acts, loss, 0.0)
    if config.beta:
        kl = reference.kl(logp, x["ref_logp"], config.kl_estimator, config.max_log_ratio or math.inf)
        loss = loss + config.beta * (kl * ratio if config.kl_bias_correction else kl)
    counted = kept if config.entropy_denominator == "kept" else mask
    loss = reference.aggregate(loss, counted, OVER[config.loss_type], LENGTH)
    if config.entropy_coef:
        loss = loss - config.entropy_coef * x["entropy"][kept].mean()
    return loss


def textbook_pick(x: dict, config: LossConfig, acts: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """Pick the tokens with the largest covariance, one after the other."""
    c, logp = config.covariance, x["logp"].detach()
    covariance = reference.covariance(logp, advantage, x["mask"])
    ratio = (logp - x["old_logp"]).exp()
    if config.max_log_ratio is not None:
        ratio = ratio.clamp(math.exp(-config.max_log_ratio), math.exp(config.max_log_ratio))
    unclipped = reference.clip_surrogate(ratio, advantage, math.inf, math.inf, config.delta)
    clipped = reference.clip_surrogate(ratio, advantage, config.epsilon_low, config.epsilon_high, config.delta)
    allowed = acts.clone()
    if config.loss_type == "clip_cov":
        allowed &= (covariance >= c.low) & (covariance <= c.high) & (clipped == unclipped)
        if config.delta is not None:
            allowed &= (advantage > 0) | (ratio <= max(config.delta, 1 + config.epsilon_high))
            allowed &= (advantage < 0) | (ratio <= min(config.delta, 1 + config.epsilon_high))
    k = math.floor(c.ratio * int(x["mask"].sum()))
    order = sorted(allowed.nonzero().tolist(), key=lambda i: -covariance[tuple(i)].item())
    picked = torch.zeros_like(acts)
    for i in order[: max(k, 1) if c.at_least_one else k]:
        picked[tuple(i)] = True
    return picked


def ours(config: LossConfig, sampled=False, **more):
    return lambda x: policy_loss(**arguments(x, config, sampled), config=config, **more).loss


def converted(x: dict, dtype: torch.dtype, on: str = "torch") -> dict:
    """A copy of a batch with floats of `dtype`, on the device of the backend `on`."""
    device = "cpu" if on == "torch" else DEVICE
    return {k: v.detach().to(device, v.dtype if v.dtype == torch.bool else dtype, copy=True) for k, v in x.items()}


def value_and_gradients(
    compute, x: dict, dtype: torch.dtype, on: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, d loss / d logp, d loss / d entropy), computed in `dtype` by the backend `on` and returned in fp64."""
    x = converted(x, dtype, on)
    x["logp"].requires_grad_()
    x["entropy"].requires_grad_()
    with backend(on):
        loss = compute(x)
        gradients = torch.autograd.grad(loss, (x["logp"], x["entropy"]), materialize_grads=True)
    loss, g_logp, g_entropy = (value.detach().double().cpu() for value in (loss, *gradients))
    return loss, g_logp, g_entropy


_BOTH = [
    {},
    {"beta": 0.1},
    {"beta": 0.1, "kl_estimator": "k1"},
    {"beta": 0.1, "kl_estimator": "k2", "kl_bias_correction": True},
    {"beta": 0.1, "kl_bias_correction": True},
    {"top_entropy_quantile": 0.3},
    {"top_entropy_quantile": 0.0, "beta": 0.1},
    {"top_entropy_quantile": 0.5, "entropy_coef": 0.2},
    {"off_policy_threshold": 0.05},
]
_BOUNDED_KL = [
    {"max_log_ratio": 0.3, "beta": 0.1},
    {"max_log_ratio": 0.3, "beta": 0.1, "kl_bias_correction": True},
    {"max_log_ratio": 0.3, "beta": 0.1, "kl_bias_correction": True, "kl_estimator": "k1"},
]
_BOUNDED = [{"max_log_ratio": 0.3}, *_BOUNDED_KL]
_KEPT = [{"top_entropy_quantile": 0.5, "entropy_denominator": "kept"}]
_CLIP = [
    {"epsilon_low": 0.1, "epsilon_high": 0.5},
    {"delta": 1.5},
    {"delta": 1.1},
    {"beta": 0.1, "kl_bias_correction": True, "delta": 3.0},
]


def settings_of(loss_type: str) -> list[dict]:
    """The settings that the loss type reads, each with some interesting value."""
    kept = [] if loss_type in ("dr_grpo", "luspo") else _KEPT
    if loss_type in COVARIANCE:
        c = COVARIANCE[loss_type]
        more = [{"covariance": dataclasses.replace(c, ratio=0.01)}, {"covariance": dataclasses.replace(c, ratio=1.0)}]
        more += [{"covariance": dataclasses.replace(c, ratio=0.01, at_least_one=False)}]
        more += [] if loss_type == "clip_cov" else [{"covariance": dataclasses.replace(c, penalty="k3")}]
        return _BOTH + _BOUNDED + kept + more + (_CLIP if loss_type == "clip_cov" else [])
    if loss_type == "vespo":
        sequence = {"beta": 0.1, "kl_bias_correction": True, "ratio_level": "sequence"}
        return _BOTH + _BOUNDED_KL + kept + [sequence, {"vespo": VespoConfig(1.5, 0.7, 1.0, 2.5)}]
    own = {
        "cispo": [{"epsilon_high": 1.0}, {"epsilon_high": 5.0}],
        "sapo": [{"sapo": SapoConfig(0.3, 4.0)}],
    }
    return _BOTH + _BOUNDED + kept + own.get(loss_type, _CLIP if "delta" in READ_BY[loss_type] else [])
