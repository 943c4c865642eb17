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
        mask: `[B, T]` bool, True = counts. For the sequence modes a row is a whole sequence, not a rank's part of one.
        mode: "token_truncate", "token_mask": one ratio per token; "sequence_truncate", "sequence_mask": their product
            over the sequence. "truncate" clamps ratios to [clip_min, clip_max] (TIS), "mask" makes those outside 0
            (MIS).
        clip_min, clip_max: the bounds; None: none.

    Returns:
        `[B, T]` or, for the sequence modes, `[B, 1]`, without gradient, fp32 (fp64 for fp64 log-probabilities); 1 in
        masked columns before clamping. What `policy_loss` takes as `sampler_ratio`. A probability of 0 by both (-inf)
        is equal, a ratio of 1; "mask" makes it 0 all the same: neither of them can have sampled that.

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
    for name, x in (("sampler_logp", sampler_logp), ("mask", mask)):
        checks.same_device(name, x, old_logp, "old_logp")
    for name, x in (("clip_min", clip_min), ("clip_max", clip_max)):
        if x is not None:
            checks.number(name, x, "a number or None")
    low, high = -math.inf if clip_min is None else clip_min, math.inf if clip_max is None else clip_max
    checks.require(high > 0.0, "clip_max", clip_max, "a number above 0, or None")
    checks.require(low <= high, "clip_min", clip_min, f"a number <= clip_max={clip_max}, or None")
    old_logp, sampler_logp = (
        x.detach() if x.dtype == torch.float64 else x.detach().float() for x in (old_logp, sampler_logp)
    )
    level, bound = mode.split("_")
    log_ratio = torch.where(mask & ~sampler_logp.isnan(), minus(old_logp, sampler_logp), 0.0)
    impossible = (mask & (old_logp == -math.inf)), (mask & (sampler_logp == -math.inf))
    if level == "sequence":
        log_ratio = log_ratio.clamp(-1e30, 1e30).sum(-1, keepdim=True)  # inf - inf is NaN
        impossible = (x.any(-1, keepdim=True) for x in impossible)
    ratio = log_ratio.exp()
    if bound == "truncate":
        return ratio.clamp(low, high)
    by_both = torch.stack([*impossible]).all(0)
    return ratio.masked_fill((ratio < low) | (ratio > high) | by_both, 0.0)


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


class _Minus(torch.autograd.Function):
    """logp - other, 0 where both are -inf: the two policies agree. Its gradient is that of logp."""

    @staticmethod
    def forward(ctx, logp, other):
        return torch.where(logp == other, 0.0, logp - other)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def minus(logp: Tensor, other: Tensor) -> Tensor:
    """logp - other of log-probabilities, 0 where both are -inf: the two policies agree. No gradient for `other`."""
    return _Minus.apply(logp, other.detach())


def log_ratio(
    logp: Tensor, old_logp: Tensor | None, mask: Tensor, level: str, sampler_ratio: Tensor | None, bound: float | None
) -> Tensor:
    """log(pi / pi_old) [B, T] or [B, 1], 0 where masked, with the gradient of logp; within +-bound if there is one."""
    per_token = torch.where(mask, minus(logp, logp if old_logp is None else old_logp), 0.0)
    return within(LEVELS[level](per_token, mask, sampler_ratio), bound)


def within(log_ratio: Tensor, bound: float | None) -> Tensor:
    """The log-ratio within +-bound if there is one, a constant from there on; NaN stays NaN."""
    if bound is None:
        return log_ratio
    return torch.where(bounded(log_ratio, bound), log_ratio.detach().clamp(-bound, bound), log_ratio)


def bounded(log_ratio: Tensor, bound: float | None) -> Tensor:
    """Where `bound` has made the log-ratio a constant."""
    if bound is None:
        return torch.zeros_like(log_ratio, dtype=torch.bool)
    return log_ratio.detach().abs() >= bound
