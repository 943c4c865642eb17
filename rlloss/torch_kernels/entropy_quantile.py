"""The order statistic of the token entropies in plain torch: the twin of kernels/entropy_quantile.py, any device, fp64.

Keys and results are the kernels'. Digits have 11 bits here: three passes, and six for the 64 bits of an fp64 key, where
the last digit begins with bits that are known already. The host never waits for a GPU.
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
    """The linearly interpolated (1 - rho) quantile, 0-d, in the entropies' dtype; +inf if nothing counts.

    entropy [N] fp32 or fp64; mask [N] bool or None, True = counts; NaN does not count. rounded_up_to: see `position`.
    `reduce` is called once a pass with the histograms, int64 [2, BINS], to change them in place: their sum over shards
    gives every shard the quantile of all. Bit for bit torch.quantile of the values that count, but for the sign of a
    zero.
    """
    keys, counted = _keys(entropy), _counted(entropy, mask)
    found, n, _ = _select(keys, counted, rho, entropy.dtype, rounded_up_to, reduce)
    low, high = _values(found, entropy.dtype)
    between = position(n, rho, entropy.dtype, rounded_up_to)
    weight = (between - between.floor()).to(entropy.dtype)
    return torch.where(n > 0, torch.lerp(low, high, weight), torch.inf)


def entropy_top_k(entropy: Tensor, mask: Tensor | None, rho: float) -> tuple[Tensor, Tensor]:
    """(cutoff, last): the k-th largest value, 0-d, and the index of the last one equal to it among the top k, 0-d
    int64, the first of equal ones being taken. k of n that count, see `top_k`.

    The top k are those that count with entropy > cutoff, or entropy == cutoff and index <= last. If nothing counts,
    (+inf, -1).
    """
    keys, counted = _keys(entropy), _counted(entropy, mask)
    found, n, ties = _select(keys, counted, rho, entropy.dtype, EXACT_IN_FP32, None)
    passed = (counted & (keys == found[1])).cumsum(0) < ties
    cutoff = torch.where(n > 0, _values(found, entropy.dtype)[1], torch.inf)
    return cutoff, torch.where(n > 0, passed.sum(), -1)


def _select(
    keys: Tensor, counted: Tensor, rho: float, dtype: torch.dtype, rounded_up_to: int, reduce
) -> tuple[Tensor, Tensor, Tensor]:
    """(keys of the values next below and above the position [2], how many values count, how many of those that equal
    the upper one are at or above its rank)."""
    found = keys.new_zeros(2)
    n = rank = counts = digit = keys.new_zeros((), dtype=torch.int64)
    for shift, known in _passes(keys.dtype.itemsize * 8):
        # Bins of the lower rank, of the upper one where the two are apart, and one that nobody reads.
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
        if keys.device.type == "cpu":  # where the host need not wait, what can no longer be found is left behind
            candidates = slot < 2 * BINS
            keys, counted = keys[candidates], counted[candidates]
    return found, n, counts[1].gather(0, digit[1:]).squeeze(0) - rank[1]


def _histogram(slot: Tensor) -> Tensor:
    """int64 [2, BINS]; the last bin, which nobody reads, is left out. bincount is faster, but waits for a GPU."""
    if slot.device.type == "cpu":
        return slot.bincount(minlength=2 * BINS + 1)[:-1].view(2, BINS)
    one = slot.new_ones(()).expand(slot.shape)
    return slot.new_zeros(2 * BINS + 1).scatter_add_(0, slot, one)[:-1].view(2, BINS)


def _passes(width: int) -> list[tuple[int, int]]:
    """(shift of the digit, which bits of a key are known by then) for keys of `width` bits."""
    shifts = [*range(width - BITS, 0, -BITS), 0]
    return list(zip(shifts, [0, *(-(1 << s) for s in shifts)], strict=False))


def position(n: Tensor, rho: float, dtype: torch.dtype, rounded_up_to: int) -> Tensor:
    """(1 - rho) (n - 1), with 1 - rho in dtype: in fp64, and rounded to dtype where n is at most rounded_up_to."""
    exact = torch.full((), 1.0 - rho, dtype=dtype, device=n.device).double() * (n - 1).clamp(min=0).double()
    return torch.where(n <= rounded_up_to, exact.to(dtype).double(), exact)


def top_k(n: Tensor, rho: float, dtype: torch.dtype) -> Tensor:
    """How many of n are the top rho: n - ceil((1 - rho) (n - 1)), the product rounded as far as fp32 counts exactly."""
    return n - position(n, rho, dtype, EXACT_IN_FP32).ceil()


def _counted(entropy: Tensor, mask: Tensor | None) -> Tensor:
    known = ~entropy.isnan()
    return known if mask is None else known & mask


def _keys(entropy: Tensor) -> Tensor:
    """Integers whose unsigned order is the order of the values; both zeros are one."""
    bits = torch.where(entropy == 0, 0.0, entropy).view(_INTEGER[entropy.dtype])
    return bits ^ ((bits >> (entropy.dtype.itemsize * 8 - 1)) | torch.iinfo(bits.dtype).min)


def _values(keys: Tensor, dtype: torch.dtype) -> Tensor:
    return (keys ^ (~(keys >> (dtype.itemsize * 8 - 1)) | torch.iinfo(keys.dtype).min)).view(dtype)
