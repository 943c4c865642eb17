"""Reduce the losses of tokens to one number: means over sequences, and the divisor of the sum."""

import torch
from torch import Tensor

from rlloss.config import LossConfig
from rlloss.loss_types import LOSSES, LossType


def default_denominator(counted: Tensor, loss_type: LossType, config: LossConfig) -> Tensor | float:
    """Return the divisor from this call's own tokens; see `denominator` of `policy_loss`."""
    B = max(counted.shape[0], 1)
    if loss_type.divided_by == "tokens":
        return counted.sum().clamp(min=1)
    return B if loss_type.divided_by == "sequences" else B * (config.max_completion_length or 1)


def over_sequence(x: Tensor, counted: Tensor, loss_type: LossType) -> Tensor:
    """Return the terms [B, T] of the sum that the divisor divides."""
    return x / counted.sum(-1, keepdim=True).clamp(min=1) if loss_type.mean_of_sequence else x


def divisor(
    counted: Tensor, loss_type: LossType, denominator: Tensor | float | None, config: LossConfig
) -> Tensor | float:
    if denominator is None:
        return default_denominator(counted, loss_type, config)
    if isinstance(denominator, Tensor):
        return torch.where(counted.any(), denominator.reshape(()), 1.0)  # if nothing counts, the loss is 0 / 1
    return denominator


def row_local(config: LossConfig, cutoff: object, denominator: object) -> bool:
    """Return whether a token's coefficient depends only on its own row, the mask and the given arguments."""
    loss_type = LOSSES[config.loss_type]
    selects = config.top_entropy_quantile < 1.0
    counts_kept = config.entropy_denominator == "kept" and (denominator is None or loss_type.mean_of_sequence)
    return (
        loss_type.row_local
        and config.ratio_level == "token"
        and config.off_policy_threshold is None
        and not (selects and (cutoff is None or config.entropy_coef != 0.0 or counts_kept))
    )
