"""Compute importance ratios pi / pi_old of a batch, and pi_old / pi_sampler to correct for the inference engine."""

import math
from typing import NamedTuple

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
    """Compute pi_old / pi_sampler, which corrects for an inference engine whose probabilities differ from training's.

    Args:
        old_logp: `[B, T]` log-probability of each token under the trainer's weights at sampling time, in nats.
        sampler_logp: `[B, T]` log-probability under the engine that sampled. NaN (a token that the engine could not
            score) counts as equal to old_logp.
        mask: `[B, T]` bool, True: the token counts. For the sequence modes a row must be a whole sequence, not a rank's
            part of one.
        mode: "token_truncate" and "token_mask" give one ratio per token, "sequence_truncate" and "sequence_mask" its
            product over the sequence. "truncate" clamps ratios to [clip_min, clip_max] (TIS); "mask" sets those outside
            to 0 (MIS).
        clip_min, clip_max: the bounds; None: no bound.

    Returns:
        The `sampler_ratio` for `policy_loss`: `[B, T]`, or `[B, 1]` for the sequence modes, without gradient, fp32
        (fp64 for fp64 log-probabilities). Masked columns are 1 before clamping. Where both probabilities are 0 (-inf)
        the ratio is 1; "mask" sets it to 0, because neither policy can have sampled such a token.

    Raises:
        ValueError, TypeError: an argument does not fit; the error names it.

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


class Ratio(NamedTuple):
    """An importance ratio and its chain rule."""

    log: Tensor
    """Logarithm of the ratio, [B, T], or [B, 1] if a sequence has one ratio."""

    free: Tensor | None
    """Where no bound holds `log`, so that it moves with logp, or None for everywhere."""

    of_tokens: Tensor
    """log(pi / pi_old) [B, T] of the tokens from which `log` is made, 0 where masked."""

    mask: Tensor
    level: str

    def to_tokens(self, slope: Tensor) -> Tensor:
        """Return d loss / d logp of each token [B, T] from the slopes [B, T] of each token's loss in `log`.

        The ratio of a sequence contains all its tokens, so each token gets the sum of the slopes ("product") or 1 / n
        of it ("sequence").
        """
        if self.free is not None:
            slope = torch.where(self.free, slope, 0.0)
        if self.level == "token":
            return slope
        if self.level == "sequence":
            each = (slope / self.mask.sum(-1, keepdim=True).clamp(min=1)).sum(-1, keepdim=True)
            return torch.where(self.mask, each, 0.0)
        moves = self.mask & (self.of_tokens.abs() < _MAX_LOG_WEIGHT)
        return torch.where(moves, slope.sum(-1, keepdim=True), 0.0)


def importance_ratio(
    logp: Tensor, old_logp: Tensor | None, mask: Tensor, level: str, sampler_ratio: Tensor | None, bound: float | None
) -> Ratio:
    """Return pi / pi_old per "token", per "sequence" (geometric mean, 2507.18071 Eq. 7) or as a sequence's "product".

    A bound limits its logarithm to +-bound. The product has its own bounds and includes the sampler ratio (2602.10693).
    """
    of_tokens = torch.where(mask, minus(logp, logp if old_logp is None else old_logp), 0.0)
    if level == "product":
        log = _product(of_tokens, mask, sampler_ratio)
        return Ratio(log, (log > _MIN_LOG_WEIGHT) & (log < _MAX_LOG_WEIGHT), of_tokens, mask, level)
    log = of_tokens
    if level == "sequence":
        log = of_tokens.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    if bound is None:
        return Ratio(log, None, of_tokens, mask, level)
    return Ratio(log.clamp(-bound, bound), free(log, bound), of_tokens, mask, level)


def _product(log_ratio: Tensor, mask: Tensor, sampler_ratio: Tensor | None) -> Tensor:
    """Return the log of a sequence's product, [B, 1], with the bounds of the code of 2602.10693."""
    log_weight = log_ratio.clamp(-_MAX_LOG_WEIGHT, _MAX_LOG_WEIGHT).sum(-1, keepdim=True)
    if sampler_ratio is not None:
        if sampler_ratio.shape == mask.shape:
            sampler_ratio = torch.where(mask, sampler_ratio, 1.0)
        log_weight = log_weight + sampler_ratio.log().clamp(_MIN_LOG_WEIGHT, _MAX_LOG_WEIGHT).sum(-1, keepdim=True)
    return log_weight.clamp(_MIN_LOG_WEIGHT, _MAX_LOG_WEIGHT)


def minus(logp: Tensor, other: Tensor) -> Tensor:
    """Return logp - other, with 0 where both are -inf, because the two policies agree there."""
    return torch.where(logp == other, 0.0, logp - other)


def free(log_ratio: Tensor, bound: float) -> Tensor:
    """Return where the log-ratio is inside its bound; a NaN counts as inside."""
    return ~(log_ratio.abs() >= bound)
