"""These Triton kernels find the exact quantile of the token entropies by radix select.

The bits of an fp32 value become an int32 key whose unsigned order is the order of the values; both zeros have one key.
The key of a rank is found from its top bits in four passes of 8 bits. In each pass, many programs count the next digit
of the values that share the bits known so far. Then one program finds the bin that holds the rank. Two ranks are
followed at once, next below and above the position of a linear interpolation. Between the two kernels the histograms of
several shards may be added up; every shard then finds the quantile of all values.

Nothing is sorted, counts are int64, and nothing is read back to the host. The kernels read 20 N bytes for N values with
a mask and 16 N without. Choosing single tokens takes one more pass and one tile.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from rlloss.kernels.launch import device_of, on_16_bytes, processors

BITS = 8  # a warp counts every bin in its registers; 11 bits would take three passes but spill
BINS = 1 << BITS
BLOCK = 2048
HISTOGRAM_WARPS, NARROW_WARPS, TIES_WARPS = 16, 4, 8
SHIFTS = (24, 16, 8, 0)  # shift of the digit in each pass
# A state holds the known bits of both keys, both ranks among the values that share those bits, the number of values
# that count, and the number of values equal to the upper one that are at or above its rank.
STATE = 6
EXACT_IN_FP32 = 1 << 24  # whole numbers up to here are exact in fp32
SIGN: tl.constexpr = tl.constexpr(-(1 << 31))


@triton.jit
def _keys(entropy_ptr, mask_ptr, offsets, N):
    """Return (keys, bool: the key counts)."""
    inside = offsets < N
    bits = tl.load(entropy_ptr + offsets, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    counted = inside & (magnitude <= 0x7F800000)  # NaN has a larger magnitude than infinity
    if mask_ptr is not None:
        counted = counted & (tl.load(mask_ptr + offsets, mask=inside, other=0) != 0)
    bits = tl.where(magnitude == 0, 0, bits)
    return bits ^ ((bits >> 31) | SIGN), counted


@triton.jit
def _value(key):
    """Return the value of a key (an int64 that holds it)."""
    key = key.to(tl.int32)
    return (key ^ ((~(key >> 31)) | SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def _position(n, fraction, rounded_up_to):
    """Return (n - 1) times the fp32 fraction in fp64, rounded to fp32 if n is at most rounded_up_to."""
    last = tl.maximum(n - 1, 0).to(tl.float64)
    position = last * (last * 0.0 + fraction).to(tl.float32).to(tl.float64)
    return tl.where(n <= rounded_up_to, position.to(tl.float32).to(tl.float64), position)


@triton.jit
def _interpolate(low, high, weight):
    """Return torch.lerp(low, high, weight) in fp32, which ends in one fused multiply-add.

    fp64 holds the product exactly. Its sum is first rounded to an odd last bit, so that rounding to fp32 gives the
    result of the exact sum. Two roundings to nearest might not.
    """
    near_low = weight < 0.5
    start = tl.where(near_low, low, high).to(tl.float64)
    move = (high - low).to(tl.float64) * tl.where(near_low, weight, weight - 1.0).to(tl.float64)
    total = start + move
    moved = total - start
    rest = (start - (total - moved)) + (move - moved)
    bits = total.to(tl.int64, bitcast=True)
    odd = bits + tl.where((rest > 0.0) == (total > 0.0), 1, -1)
    bits = tl.where(((rest > 0.0) | (rest < 0.0)) & ((bits & 1) == 0), odd, bits)
    return bits.to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _find(counts, rank, BINS: tl.constexpr):
    """Return (bin that holds the rank, rank within that bin, number of values in that bin). Ranks start at 0."""
    passed = tl.cumsum(counts, axis=0) <= rank
    found = tl.minimum(tl.sum(passed.to(tl.int32), axis=0), BINS - 1)
    rank -= tl.sum(tl.where(passed, counts, 0), axis=0)
    return found, rank, tl.sum(tl.where(tl.arange(0, BINS) == found, counts, 0), axis=0)


@triton.jit(do_not_specialize=["N", "shift", "known"])
def entropy_histogram_kernel(
    entropy_ptr,
    mask_ptr,
    state_ptr,
    histogram_ptr,
    N: tl.int64,
    shift: tl.int32,
    known: tl.int32,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Any grid. Count, per rank, the digits of the values whose `known` bits equal those of the rank's key.

    The counts are added to histogram [2, BINS]. As long as both ranks share the known bits, its second row stays zero.
    """
    key_low = tl.load(state_ptr).to(tl.int32)
    key_high = tl.load(state_ptr + 1).to(tl.int32)
    apart = key_low != key_high
    low = tl.zeros((BINS,), tl.int32)
    high = tl.zeros((BINS,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, N, tl.num_programs(0).to(tl.int64) * BLOCK):
        key, counted = _keys(entropy_ptr, mask_ptr, start + tl.arange(0, BLOCK), N)
        digit = (key >> shift) & (BINS - 1)
        low += tl.histogram(digit, BINS, mask=counted & ((key & known) == key_low))
        if apart:
            high += tl.histogram(digit, BINS, mask=counted & ((key & known) == key_high))
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram_ptr + bins, low.to(tl.int64), mask=low > 0, sem="relaxed")
    if apart:
        tl.atomic_add(histogram_ptr + BINS + bins, high.to(tl.int64), mask=high > 0, sem="relaxed")


@triton.jit(do_not_specialize=["shift", "fraction", "rounded_up_to"])
def entropy_narrow_kernel(
    histogram_ptr,
    state_ptr,
    next_state_ptr,
    cutoff_ptr,
    shift: tl.int32,
    fraction: tl.float64,
    rounded_up_to: tl.int64,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    INTERPOLATE: tl.constexpr,
    BINS: tl.constexpr,
):
    """Grid (1,). Find the bin of each rank. The first pass counts the values, the last writes the cutoff."""
    bins = tl.arange(0, BINS)
    key_low = tl.load(state_ptr)
    key_high = tl.load(state_ptr + 1)
    counts_low = tl.load(histogram_ptr + bins)
    counts_high = tl.load(histogram_ptr + tl.where(key_low == key_high, 0, BINS) + bins)
    if FIRST:
        n = tl.sum(counts_low, axis=0)
        position = _position(n, fraction, rounded_up_to)
        rank_low = tl.floor(position).to(tl.int64)
        rank_high = tl.ceil(position).to(tl.int64)
    else:
        rank_low = tl.load(state_ptr + 2)
        rank_high = tl.load(state_ptr + 3)
        n = tl.load(state_ptr + 4)
    bin_low, rank_low, _ = _find(counts_low, rank_low, BINS)  # type: ignore
    bin_high, rank_high, equal = _find(counts_high, rank_high, BINS)
    key_low = key_low | (bin_low << shift).to(tl.int64)
    key_high = key_high | (bin_high << shift).to(tl.int64)
    tl.store(next_state_ptr, key_low)
    tl.store(next_state_ptr + 1, key_high)
    tl.store(next_state_ptr + 2, rank_low)
    tl.store(next_state_ptr + 3, rank_high)
    tl.store(next_state_ptr + 4, n)
    tl.store(next_state_ptr + 5, equal - rank_high)
    if LAST:
        cutoff = _value(key_high)
        if INTERPOLATE:
            position = _position(n, fraction, rounded_up_to)
            cutoff = _interpolate(_value(key_low), cutoff, (position - tl.floor(position)).to(tl.float32))
        tl.store(cutoff_ptr, tl.where(n > 0, cutoff, float("inf")))


@triton.jit(do_not_specialize=["N"])
def entropy_ties_kernel(
    entropy_ptr,
    mask_ptr,
    state_ptr,
    ties_ptr,
    N: tl.int64,
    BLOCK: tl.constexpr,
):
    """Grid (tiles,). Count the values of each tile that equal the upper one."""
    tile = tl.program_id(0).to(tl.int64)
    key, counted = _keys(entropy_ptr, mask_ptr, tile * BLOCK + tl.arange(0, BLOCK), N)  # type: ignore
    equal = counted & (key == tl.load(state_ptr + 1).to(tl.int32))
    tl.store(ties_ptr + tile, tl.sum(equal.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["N", "tiles"])
def entropy_last_tie_kernel(
    entropy_ptr,
    mask_ptr,
    state_ptr,
    ties_ptr,
    last_ptr,
    N: tl.int64,
    tiles: tl.int64,
    BLOCK: tl.constexpr,
):
    """Grid (1,). Find the tile of the last tie to keep, and the place of the tie in the tile."""
    lanes = tl.arange(0, BLOCK)
    wanted = tl.load(state_ptr + 5)
    tile = tl.zeros((), tl.int64)
    before = tl.zeros((), tl.int64)
    running = tl.zeros((), tl.int64)
    for start in range(tl.zeros((), tl.int64), tiles, BLOCK):
        inside = start + lanes < tiles
        ties = tl.load(ties_ptr + start + lanes, mask=inside, other=0).to(tl.int64)
        passed = inside & (running + tl.cumsum(ties, axis=0) < wanted)
        tile += tl.sum(passed.to(tl.int64), axis=0)
        before += tl.sum(tl.where(passed, ties, 0), axis=0)
        running += tl.sum(ties, axis=0)
    key, counted = _keys(entropy_ptr, mask_ptr, tile * BLOCK + lanes, N)
    equal = counted & (key == tl.load(state_ptr + 1).to(tl.int32))
    passed = before + tl.cumsum(equal.to(tl.int64), axis=0) < wanted
    last = tile * BLOCK + tl.sum(passed.to(tl.int64), axis=0)
    tl.store(last_ptr, tl.where(tl.load(state_ptr + 4) > 0, last, -1))


def entropy_quantile(
    entropy: torch.Tensor,
    mask: torch.Tensor | None,
    rho: float,
    *,
    rounded_up_to: int,
    reduce: Callable[[torch.Tensor], object] | None = None,
) -> torch.Tensor:
    """Return the linearly interpolated (1 - rho) quantile as a 0-d fp32 tensor; +inf if nothing counts.

    entropy is [N] contiguous fp32. mask is [N] contiguous bool, True: the value counts, or None. NaN does not count.
    The position (1 - rho) (n - 1), with 1 - rho in fp32, is rounded to fp32 if at most `rounded_up_to` values count.
    Each pass calls `reduce` with the histograms, int64 [2, BINS], to change them in place. If it sums them over shards,
    every shard gets the quantile of all. The bits equal torch.quantile of the values that count, except the sign of a
    zero.
    """
    with device_of(entropy):
        return _select(on_16_bytes(entropy), _flags(mask), rho, rounded_up_to, reduce, interpolate=True)[0]


def entropy_top_k(entropy: torch.Tensor, mask: torch.Tensor | None, rho: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cutoff, last): the k-th largest value, 0-d fp32, and the index of the last tie to keep, 0-d int64.

    Of n values that count, k = n - ceil((1 - rho) (n - 1)), where the product is rounded to fp32 as long as fp32 holds
    n exactly. The top k are the values that count with entropy > cutoff, or entropy == cutoff and index <= last, so the
    first of equal values are taken. If nothing counts, the result is (+inf, -1).
    """
    entropy, mask, N = on_16_bytes(entropy), _flags(mask), entropy.numel()
    tiles = max(triton.cdiv(N, BLOCK), 1)
    ties = torch.empty(tiles, dtype=torch.int32, device=entropy.device)
    last = torch.empty((), dtype=torch.int64, device=entropy.device)
    flags = {"BLOCK": BLOCK, "num_warps": TIES_WARPS}
    with device_of(entropy):
        cutoff, state = _select(entropy, mask, rho, EXACT_IN_FP32, None, interpolate=False)
        arguments = (entropy, mask, state, ties)
        entropy_ties_kernel[(tiles,)](*arguments, N, **flags)
        entropy_last_tie_kernel[(1,)](*arguments, last, N, tiles, **flags)
    return cutoff, last


def _flags(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else on_16_bytes(mask)


def _select(entropy, mask, rho, rounded_up_to, reduce, interpolate) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cutoff, last state)."""
    sizes = [STATE] * (len(SHIFTS) + 1) + [2 * BINS] * len(SHIFTS)  # each starts on 16 bytes
    parts = torch.zeros(sum(sizes), dtype=torch.int64, device=entropy.device).split(sizes)
    states, histograms = parts[: len(SHIFTS) + 1], parts[len(SHIFTS) + 1 :]
    cutoff = torch.empty((), dtype=torch.float32, device=entropy.device)
    N = entropy.numel()
    programs = 2 * processors(entropy.device) if entropy.is_cuda else 64
    programs = max(min(triton.cdiv(N, BLOCK), programs), 1)
    for i, shift in enumerate(SHIFTS):
        entropy_histogram_kernel[(programs,)](
            entropy,
            mask,
            states[i],
            histograms[i],
            N,
            shift,
            -(1 << (shift + BITS)) if i else 0,
            BLOCK=BLOCK,
            BINS=BINS,
            num_warps=HISTOGRAM_WARPS,
        )
        if reduce is not None:
            reduce(histograms[i].view(2, BINS))
        entropy_narrow_kernel[(1,)](
            histograms[i],
            states[i],
            states[i + 1],
            cutoff,
            shift,
            1.0 - rho,
            rounded_up_to,
            FIRST=i == 0,
            LAST=i == len(SHIFTS) - 1,
            INTERPOLATE=interpolate and i == len(SHIFTS) - 1,
            BINS=BINS,
            num_warps=NARROW_WARPS,
            enable_fp_fusion=False,  # position - floor(position) must use the rounded position
        )
    return cutoff, states[-1]
