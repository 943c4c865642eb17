"""`PolicyLoss` holds a loss and its metrics as sums; `means` divides the sums by their counts."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlloss import checks
from rlloss.losses.surrogates import Surrogate


class PolicyLoss(NamedTuple):
    """Loss (0-d, differentiable) and metrics (name -> detached 0-d fp32 tensor on the device) of a batch.

    Every metric is a sum, except `clip_low_min` and `clip_high_max`. These are the smallest share of tokens clipped
    below and the largest share clipped above in a sequence (NaN if no sequence counts).

    - Counts: `tokens` (mask), `sequences`, `kept` (by entropy), `live` (with a gradient), `selected` (picked by
      covariance; "clip_cov" and "kl_cov" only), and `ratios` (importance ratios: one per token, or one per sequence if
      the loss has one ratio and one advantage per sequence).
    - Sums over tokens: `surrogate`, `kl`, `entropy`, `entropy_kept`, `entropy_cutoff`.
    - Sums over ratios: `ratio`; `clip_low`, `clip_high`, `clip_region` for losses that clip; `weight` for "vespo".
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def means(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Divide each sum by its count, and add the shares of tokens that are kept, live and selected.

    Args:
        metrics: `PolicyLoss.metrics`, summed over micro-batches and ranks first.

    Returns:
        name -> 0-d fp32 tensor: a mean per token, kept token or ratio, and `kept_share`, `live_share`,
        `selected_share` (if present) of the tokens that count.

    Raises:
        ValueError, TypeError: metrics lacks `tokens`, `kept` or `live`, or one of them is no tensor.
    """
    checks.tensors("metrics", metrics, ("tokens", "kept", "live"))
    over = {
        "tokens": ("surrogate", "kl", "entropy", "entropy_cutoff"),
        "ratios": ("ratio", "clip_low", "clip_high", "clip_region", "weight"),
        "kept": ("entropy_kept",),
    }
    result = {
        name: metrics[name] / metrics[count].clamp(min=1)
        for count, names in over.items()
        for name in names
        if name in metrics
    }
    for share in ("kept", "live", *(("selected",) if "selected" in metrics else ())):
        result[f"{share}_share"] = metrics[share] / metrics["tokens"].clamp(min=1)
    return result


def ratio_metrics(surrogate: Surrogate, log_ratio: Tensor, mask: Tensor, per_sequence: bool) -> dict[str, Tensor]:
    """Return sums over ratios, counted once per sequence if neither ratio nor advantage differs within it."""
    counted = mask.new_ones(mask.shape[0], 1) if per_sequence and mask.shape[1] != 1 else mask
    count = counted.sum(-1)
    result = {"ratios": count.sum(), "ratio": torch.where(counted, log_ratio.exp(), 0.0).sum()}
    if surrogate.weight is not None:
        result["weight"] = torch.where(counted, surrogate.weight, 0.0).sum()
    if surrogate.clip_low is None or surrogate.clip_high is None:
        return result
    low, high = surrogate.clip_low & counted, surrogate.clip_high & counted

    def share(clipped: Tensor, missing: float) -> Tensor:
        shares = torch.where(count > 0, clipped.sum(-1).float() / count.clamp(min=1), missing)
        return torch.cat([shares, shares.new_full((1,), missing)])  # so that amin and amax of no sequence exist

    nothing = ~(count > 0).any()
    return result | {
        "clip_low": low.sum(),
        "clip_high": high.sum(),
        "clip_region": (low | high).sum(),
        "clip_low_min": torch.where(nothing, torch.nan, share(low, torch.inf).amin()),
        "clip_high_max": torch.where(nothing, torch.nan, share(high, -torch.inf).amax()),
    }
