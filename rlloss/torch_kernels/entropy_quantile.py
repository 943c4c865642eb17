"""This module is kernels/entropy_quantile.py in plain torch, for any device and also for fp64.

Keys and results equal those of the kernels. Digits have 11 bits here, which takes three passes. The 64 bits of an fp64
key take six, where the last digit starts with known bits. The host never waits for a GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BITS = 11
BINS = 1 << BITS
EXACT_IN_FP32 = 1 << 24  # whole numbers up to here are exact in fp32
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def entropy_quantile(
    entropy: Tensor,
    mask: Tensor | None,
    rho: float,
    *,
    rounded_up_to: int,
    reduce: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Return the linearly interpolated (1 - rho) quantile, 0-d, in the entropies' dtype; +inf if nothing counts.

    entropy is [N] fp32 or fp64. mask is [N] bool, True: the value counts, or None. NaN does not count. rounded_up_to is
    that of `position`. Each pass calls `reduce` with the histograms, int64 [2, BINS], to change them in place. If it
    sums them over shards, every shard gets the quantile of all. The bits equal torch.quantile of the values that count,
    except the sign of a zero.
    """
    keys, counted = _keys(entropy), _counted(entropy, mask)
    found, n, _ = _select(keys, counted, rho, entropy.dtype, rounded_up_to, reduce)
    low, high = _values(found, entropy.dtype)
    between = position(n, rho, entropy.dtype, rounded_up_to)
    weight = (between - between.floor()).to(entropy.dtype)
    return torch.where(n > 0, torch.lerp(low, high, weight), torch.inf)


def entropy_top_k(entropy: Tensor, mask: Tensor | None, rho: float) -> tuple[Tensor, Tensor]:
    """Return (cutoff, last): the k-th largest value, 0-d, and the index of the last tie to keep, 0-d int64.

    The top k (see `top_k`) are the values that count with entropy > cutoff, or entropy == cutoff and index <= last, so
    the first of equal values are taken. If nothing counts, the result is (+inf, -1).
    """
    keys, counted = _keys(entropy), _counted(entropy, mask)
    found, n, ties = _select(keys, counted, rho, entropy.dtype, EXACT_IN_FP32, None)
    passed = (counted & (keys == found[1])).cumsum(0) < ties
    cutoff = torch.where(n > 0, _values(found, entropy.dtype)[1], torch.inf)
    return cutoff, torch.where(n > 0, passed.sum(), -1)


def _select(
    keys: Tensor, counted: Tensor, rho: float, dtype: torch.dtype, rounded_up_to: int, reduce
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (keys [2] of the values next below and above the position, number of values that count, number of values
    equal to the upper one at or above its rank)."""
    found = keys.new_zeros(2)
    n = rank = counts = digit = keys.new_zeros((), dtype=torch.int64)
    for shift, known in _passes(keys.dtype.itemsize * 8):
        # Bins of the lower rank, bins of the upper rank once their keys differ, and one unused bin.
        digits = ((keys >> shift) & (BINS - 1)).long()
        prefix = keys & known
        upper = torch.where(prefix == found[1], digits + BINS, 2 * BINS)
        slot = torch.where(counted, torch.where(prefix == found[0], digits, upper), 2 * BINS)
        histogram = _histogram(slot)
        if reduce is not None:
            reduce(histogram)
        if known == 0:
            n = histogram[0].sum()
            between = position(n, rho, dtype, rounded_up_to)
            rank = torch.stack([between.floor(), between.ceil()]).long()
        counts = torch.where(found[0] == found[1], histogram[:1], histogram)
        passed = counts.cumsum(1) <= rank.unsqueeze(1)
        digit = passed.sum(1).clamp(max=BINS - 1)
        rank = rank - torch.where(passed, counts, 0).sum(1)
        found = found | (digit << shift).to(found.dtype)
        if keys.device.type == "cpu":  # the host need not wait, so values that are ruled out can be dropped
            candidates = slot < 2 * BINS
            keys, counted = keys[candidates], counted[candidates]
    return found, n, counts[1].gather(0, digit[1:]).squeeze(0) - rank[1]


def _histogram(slot: Tensor) -> Tensor:
    """Return the histograms, int64 [2, BINS], without the unused last bin. bincount is faster, but waits for a GPU."""
    if slot.device.type == "cpu":
        return slot.bincount(minlength=2 * BINS + 1)[:-1].view(2, BINS)
    one = slot.new_ones(()).expand(slot.shape)
    return slot.new_zeros(2 * BINS + 1).scatter_add_(0, slot, one)[:-1].view(2, BINS)


def _passes(width: int) -> list[tuple[int, int]]:
    """Return (shift of the digit, mask of the bits known before) of each pass for keys of `width` bits."""
    shifts = [*range(width - BITS, 0, -BITS), 0]
    return list(zip(shifts, [0, *(-(1 << s) for s in shifts)], strict=False))


def position(n: Tensor, rho: float, dtype: torch.dtype, rounded_up_to: int) -> Tensor:
    """Return (1 - rho) (n - 1) in fp64, with 1 - rho in dtype; rounded to dtype if n is at most rounded_up_to."""
    exact = torch.full((), 1.0 - rho, dtype=dtype, device=n.device).double() * (n - 1).clamp(min=0).double()
    return torch.where(n <= rounded_up_to, exact.to(dtype).double(), exact)


def top_k(n: Tensor, rho: float, dtype: torch.dtype) -> Tensor:
    """Return how many of n values are the top rho, n - ceil((1 - rho) (n - 1)). The product is rounded to dtype as long
    as fp32 holds n exactly."""
    return n - position(n, rho, dtype, EXACT_IN_FP32).ceil()


def _counted(entropy: Tensor, mask: Tensor | None) -> Tensor:
    known = ~entropy.isnan()
    return known if mask is None else known & mask


def _keys(entropy: Tensor) -> Tensor:
    """Return integers whose unsigned order is the order of the values; both zeros have one key."""
    bits = torch.where(entropy == 0, 0.0, entropy).view(_INTEGER[entropy.dtype])
    return bits ^ ((bits >> (entropy.dtype.itemsize * 8 - 1)) | torch.iinfo(bits.dtype).min)


def _values(keys: Tensor, dtype: torch.dtype) -> Tensor:
    return (keys ^ (~(keys >> (dtype.itemsize * 8 - 1)) | torch.iinfo(keys.dtype).min)).view(dtype)
