"""Which tokens count: selections as bool [B, T], True = counts."""

import torch
from torch import Tensor

from rlloss import checks

_EXACT_IN_FP32 = 1 << 24  # whole numbers up to here are exact in fp32


def completion_mask(completion_ids: Tensor, eos_token_id: int) -> Tensor:
    """Tokens [B, T] up to and including the first end-of-sequence token."""
    is_eos = completion_ids == eos_token_id
    return is_eos.cumsum(-1) - is_eos.to(torch.int64) == 0


def not_truncated(completion_ids: Tensor, eos_token_id: int) -> Tensor:
    """Sequences [B] that ended by themselves: DAPO's overlong filtering (2503.14476) drops the others."""
    return (completion_ids == eos_token_id).any(-1)


def entropy_cutoff(entropy: Tensor, mask: Tensor, rho: float, *, process_group=None) -> Tensor:
    """The entropy at or above which a token is among the top rho: the (1 - rho) quantile, linearly interpolated.

    Args:
        entropy: `[...]` floating point, in nats.
        mask: `[...]` bool; only these tokens count. NaN entropies do not.
        rho: in [0, 1]; 1 gives the smallest entropy, 0 the largest.
        process_group: ranks whose tokens count together (one gather of the entropies). None: this process alone.

    Returns:
        0-d fp32 tensor (fp64 for fp64 entropies) without gradient; +inf if no token counts. The number of tokens is
        not limited (torch.quantile's is, to 2^24). Source: 2506.01939, Eq. 6.
    """
    checks.floating("entropy", entropy)
    checks.boolean("mask", mask)
    checks.same_shape("mask", mask, entropy.shape, "like entropy")
    checks.require(0.0 <= rho <= 1.0, "rho", rho, "a number in [0, 1]")
    entropy = _full_precision(entropy.detach())
    counted = mask & ~entropy.isnan()
    values = torch.where(counted, entropy, torch.inf).flatten()
    if process_group is not None:
        values = _gathered(values, process_group)
    ordered = values.sort().values
    # An infinite entropy cannot be: it marks what does not count.
    n = (ordered < torch.inf).sum()
    position = _quantile_position(n, rho, ordered.numel(), ordered.dtype)
    below = position.floor()
    padded = torch.cat([ordered, ordered.new_full((1,), torch.inf)])
    low = padded[below.long()]
    high = padded[position.ceil().long()]
    return torch.where(n > 0, torch.lerp(low, high, (position - below).to(low.dtype)), torch.inf)


def _quantile_position(n: Tensor, rho: float, at_most: int, dtype: torch.dtype) -> Tensor:
    """Where the (1 - rho) quantile of n ordered values lies, as torch.quantile computes it: in the values' dtype, while
    fp32 can count `at_most` values."""
    if at_most > _EXACT_IN_FP32:
        dtype = torch.float64
    return torch.full((), 1.0 - rho, dtype=dtype, device=n.device) * (n - 1).clamp(min=0).to(dtype)


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _gathered(values: Tensor, process_group) -> Tensor:
    """All ranks' values; a shorter rank is filled up with +inf."""
    distributed = torch.distributed
    sizes = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(process_group.size())]
    distributed.all_gather(sizes, torch.tensor([values.numel()], device=values.device), group=process_group)
    longest = int(torch.cat(sizes).max())
    padded = torch.nn.functional.pad(values, (0, longest - values.numel()), value=torch.inf)
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded, group=process_group)
    return torch.cat(parts)


def top_entropy_mask(
    entropy: Tensor, mask: Tensor, rho: float, *, cutoff: Tensor | float | None = None, exact_k: bool = False
) -> Tensor:
    """Tokens that count and are among the top rho by entropy: bool, shaped like `mask`.

    By default every token at or above the cutoff (`cutoff`, or this call's `entropy_cutoff`), so ties may keep more;
    with `exact_k` as many as without ties, floor(rho (n - 1)) + 1 of n, the first of equal ones. A NaN
    entropy is kept: it must show.
    """
    if not exact_k:
        cutoff = entropy_cutoff(entropy, mask, rho) if cutoff is None else cutoff
        entropy = _full_precision(entropy.detach())  # a bf16 entropy would round the cutoff it is compared with
        return mask & ((entropy >= cutoff) | entropy.isnan())
    checks.require(cutoff is None, "cutoff", "a tensor", "None with exact_k, which counts tokens instead")
    checks.require(0.0 <= rho <= 1.0, "rho", rho, "a number in [0, 1]")
    entropy = _full_precision(entropy.detach())
    counted = mask & ~entropy.isnan()
    order = torch.where(counted, entropy, -torch.inf).flatten().sort(descending=True, stable=True).indices
    n = counted.sum()
    k = n - _quantile_position(n, rho, order.numel(), entropy.dtype).ceil().long()
    kept = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    kept[order] = torch.arange(order.numel(), device=order.device) < k
    return (kept.view(mask.shape) & counted) | (mask & entropy.isnan())


def off_policy_mask(advantage: Tensor, logp: Tensor, behavior_logp: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """Sequences (or tokens, for advantages per token) to keep: advantage >= 0, or mean behavior_logp - logp of the
    sequence at most `threshold` (2512.02556 Eq. 9).

    advantage [B, 1] or [B, T], the others [B, T]; returns bool shaped like advantage. A NaN log-probability (a token
    the sampler could not score) is no evidence and counts as 0.
    """
    drift = torch.where(mask, behavior_logp - logp.detach(), 0.0).nan_to_num(nan=0.0)
    mean_drift = drift.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return (advantage >= 0) | (mean_drift <= threshold)
