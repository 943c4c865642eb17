"""Importance ratios, as logarithms: of the policy to the one that made the batch, and of that one to the sampler."""

import math

import torch
from torch import Tensor

from rlloss import checks

SAMPLER_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
_MAX_LOG_WEIGHT = 20.0
_MIN_LOG_WEIGHT = math.log(1e-8)


def sampler_ratio(
    old_logp: Tensor,
    sampler_logp: Tensor,
    mask: Tensor,
    *,
    mode: str = "sequence_mask",
    clip_min: float | None = None,
    clip_max: float | None = 3.0,
) -> Tensor:
    """pi_old / pi_sampler: corrects for an inference engine whose probabilities differ from the trainer's.

    Args:
        old_logp: `[B, T]` log-probability of each token by the trainer's weights at sampling time, in nats.
        sampler_logp: `[B, T]` the same by the engine that sampled. NaN (a token it could not score) counts as equal.
        mask: `[B, T]` bool, True = counts.
        mode: "token_truncate", "token_mask": one ratio per token; "sequence_truncate", "sequence_mask": their product
            over the sequence. "truncate" clamps ratios to [clip_min, clip_max] (TIS), "mask" makes those outside 0
            (MIS).
        clip_min, clip_max: the bounds; None: none.

    Returns:
        `[B, T]` or, for the sequence modes, `[B, 1]`, without gradient, fp32 (fp64 for fp64 log-probabilities); 1 in
        masked columns before clamping. What `policy_loss` takes as `sampler_ratio`.

    Raises:
        ValueError, TypeError: an argument does not fit; it is named.

    Source: the four modes of TRL's `vllm_importance_sampling_mode`.
    """
    checks.one_of("mode", mode, SAMPLER_MODES)
    checks.floating("old_logp", old_logp)
    checks.require(old_logp.dim() == 2, "old_logp", f"shape {tuple(old_logp.shape)}", "[B, T]")
    checks.floating("sampler_logp", sampler_logp)
    checks.same_shape("sampler_logp", sampler_logp, old_logp.shape, "like old_logp")
    checks.boolean("mask", mask)
    checks.same_shape("mask", mask, old_logp.shape, "like old_logp")
    low, high = -math.inf if clip_min is None else clip_min, math.inf if clip_max is None else clip_max
    checks.require(high > 0.0, "clip_max", clip_max, "a number above 0, or None")
    checks.require(low <= high, "clip_min", clip_min, f"a number <= clip_max={clip_max}, or None")
    old_logp, sampler_logp = (
        x.detach() if x.dtype == torch.float64 else x.detach().float() for x in (old_logp, sampler_logp)
    )
    level, bound = mode.split("_")
    log_ratio = torch.where(mask & ~sampler_logp.isnan(), old_logp - sampler_logp, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = log_ratio.exp()
    if bound == "truncate":
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def token(log_ratio: Tensor, mask: Tensor, sampler_ratio: Tensor | None) -> Tensor:
    """One ratio per token."""
    return log_ratio


def sequence(log_ratio: Tensor, mask: Tensor, sampler_ratio: Tensor | None) -> Tensor:
    """[B, 1]: the geometric mean over a sequence (2507.18071 Eq. 7)."""
    return log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def product(log_ratio: Tensor, mask: Tensor, sampler_ratio: Tensor | None) -> Tensor:
    """[B, 1]: the product over a sequence, that to the sampler included, bounded as 2602.10693 does; no gradient."""
    log_weight = log_ratio.detach().clamp(-_MAX_LOG_WEIGHT, _MAX_LOG_WEIGHT).sum(-1, keepdim=True)
    if sampler_ratio is not None:
        if sampler_ratio.shape == mask.shape:
            sampler_ratio = torch.where(mask, sampler_ratio, 1.0)
        log_weight = log_weight + sampler_ratio.log().clamp(_MIN_LOG_WEIGHT, _MAX_LOG_WEIGHT).sum(-1, keepdim=True)
    return log_weight.clamp(_MIN_LOG_WEIGHT, _MAX_LOG_WEIGHT)


LEVELS = {"token": token, "sequence": sequence, "product": product}


def log_ratio(
    logp: Tensor, old_logp: Tensor | None, mask: Tensor, level: str, sampler_ratio: Tensor | None, bound: float | None
) -> Tensor:
    """log(pi / pi_old) [B, T] or [B, 1], 0 where masked, with the gradient of logp; within +-bound if there is one."""
    per_token = torch.where(mask, logp - (logp.detach() if old_logp is None else old_logp), 0.0)
    result = LEVELS[level](per_token, mask, sampler_ratio)
    if bound is None:
        return result
    return torch.where(result.isnan(), result, result.clamp(-bound, bound))  # clamp gives a NaN a gradient of 0


def bounded(log_ratio: Tensor, bound: float | None) -> Tensor:
    """Where `bound` has made the ratio a constant."""
    if bound is None:
        return torch.zeros_like(log_ratio, dtype=torch.bool)
    return log_ratio.detach().abs() >= bound
