"""This Triton kernel computes each row's entropy, derives a temperature from it, and divides the row by that.

One program takes one row. It reduces the row as `token_stats` does, chunk by chunk and merged in order, but without a
target that stays out of the sums. It then scales the row while the row is still in the cache.

If the second read of a row hits the cache, each logit is read from memory once. It is written once, or not at all if
only the temperature is requested. A masked row is neither read nor written.
"""

import torch
import triton
import triton.language as tl

from rlloss.kernels.launch import device_of, jit, launch_shape, registers
from rlloss.kernels.online import LN_2, LOG2_E, collapse, fold, merge
from rlloss.kernels.rows import as_rows, row_at, tile_offsets

RULES = ("two_level", "edt", "dynatemp")


@triton.jit
def _chunk(row_ptr, start, stop, V, stride_v, COUNT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return (m, s, w, number of entries above -inf) of entries [start, min(stop, V))."""
    LANES: tl.constexpr = 128 // row_ptr.dtype.element_ty.primitive_bitwidth
    R: tl.constexpr = BLOCK_V // LANES
    m = tl.full((R,), -float("inf"), tl.float32)
    s = tl.zeros((R,), tl.float32)
    w = tl.zeros((R,), tl.float32)
    count = tl.zeros((R,), tl.int32)
    lanes = tile_offsets(R, LANES, ALIGNED)
    # Full blocks carry no mask: a mask with a bound that is not a known multiple of 16 would prevent 16-byte loads.
    full = tl.minimum(stop, V // BLOCK_V * BLOCK_V)
    for first in range(start, full, BLOCK_V):
        offsets = first + lanes
        u = as_rows(tl.load(row_ptr + offsets.to(tl.int64) * stride_v), ALIGNED).to(tl.float32)
        m, s, w, _ = fold(m, s, w, s, u, LOG2_E, False)
        if COUNT:
            count += tl.sum(tl.where(u > -float("inf"), 1, 0), axis=1)
    if stop > full:
        offsets = tl.maximum(start, full) + lanes
        inside = offsets < V
        u = tl.load(row_ptr + offsets.to(tl.int64) * stride_v, mask=inside, other=-float("inf"))
        u = as_rows(u, ALIGNED).to(tl.float32)
        m, s, w, _ = fold(m, s, w, s, u, LOG2_E, False)
        if COUNT:
            count += tl.sum(tl.where(u > -float("inf"), 1, 0), axis=1)
    m_row, s_row, w_row, _ = collapse(m, s, w, s, LOG2_E, False)
    return m_row, s_row, w_row, tl.sum(count, axis=0)


@triton.jit
def _temperature(entropy, count, a, b, c, least, RULE: tl.constexpr):
    """Return the temperature of the rule, or 0 if it is below `least`. A NaN entropy gives NaN."""
    if RULE == "two_level":
        t = tl.where(entropy > c, a, b)
        t = tl.where(entropy == entropy, t, entropy)
    elif RULE == "edt":
        at_zero = entropy <= 0.0
        t = tl.where(at_zero, 0.0, a * tl.exp2(b / tl.where(at_zero, 1.0, entropy)))
        t = tl.maximum(t, c, propagate_nan=tl.PropagateNan.ALL)
    else:
        # One candidate has entropy 0 of at most 0, so the share is 0 / 0. entropy - entropy gives 0 and keeps a NaN.
        several = count > 1
        most = tl.log2(tl.where(several, count, 2).to(tl.float32)) * LN_2
        share = tl.where(several, entropy / most, entropy - entropy)
        share = tl.minimum(share, 1.0, propagate_nan=tl.PropagateNan.ALL)
        power = tl.exp2(c * tl.log2(tl.where(share == 0.0, 1.0, share)))
        t = a + b * tl.where(share == 0.0, 0.0, power)
    return tl.where(t < least, 0.0, t)


@triton.jit
def _scaled(u, bound, inverse, out_ptr):
    return tl.where(u < bound, -float("inf"), u * inverse).to(out_ptr.dtype.element_ty)


@triton.jit
def _write_scaled(row_ptr, out_ptr, V, stride_v, out_v, bound, inverse, BLOCK_V: tl.constexpr):
    """Write u * inverse, or -inf where u is below the bound. An entry is read before it is written, so `out` may be the
    row."""
    lanes = tl.arange(0, BLOCK_V)
    full = V // BLOCK_V * BLOCK_V
    for first in range(0, full, BLOCK_V):
        offsets = (first + lanes).to(tl.int64)
        u = tl.load(row_ptr + offsets * stride_v).to(tl.float32)
        tl.store(out_ptr + offsets * out_v, _scaled(u, bound, inverse, out_ptr))
    if V > full:
        offsets = full + lanes
        inside = offsets < V
        u = tl.load(row_ptr + offsets.to(tl.int64) * stride_v, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets.to(tl.int64) * out_v, _scaled(u, bound, inverse, out_ptr), mask=inside)


@jit(do_not_specialize=["V", "stride_row", "out_row", "chunks"])
def entropy_temperature_kernel(
    logits_ptr,
    mask_ptr,
    temperature_ptr,
    entropy_ptr,
    out_ptr,
    V: tl.int32,
    stride_row: tl.int64,
    stride_v,
    out_row: tl.int64,
    out_v,
    chunks: tl.int32,
    a: tl.float32,
    b: tl.float32,
    c: tl.float32,
    least: tl.float32,
    RULE: tl.constexpr,
    WRITE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK_V: tl.constexpr,
):
    """Grid (N,). mask_ptr may be None. A masked row is neither read nor written: temperature 1, entropy 0."""
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            tl.store(temperature_ptr + row, 1.0)
            tl.store(entropy_ptr + row, 0.0)
            return
    row_ptr = row_at(logits_ptr, row * stride_row, ALIGNED)  # type: ignore
    out_row_ptr = row_at(out_ptr, row * out_row, ALIGNED)  # type: ignore
    m = -float("inf")
    s = 0.0
    w = 0.0
    count = 0
    for chunk in range(chunks):
        stop = tl.minimum(V, (chunk + 1) * CHUNK_V)
        m_c, s_c, w_c, count_c = _chunk(  # type: ignore
            row_ptr, chunk * CHUNK_V, stop, V, stride_v, RULE == "dynatemp", ALIGNED, BLOCK_V
        )
        m, s, w, _ = merge(m, s, w, s, m_c, s_c, w_c, s_c, LOG2_E, False)
        count += count_c
    entropy = (tl.log2(s) - w / s) * LN_2
    temperature = _temperature(entropy, count, a, b, c, least, RULE)
    tl.store(temperature_ptr + row, temperature)
    tl.store(entropy_ptr + row, entropy)
    if WRITE:
        greedy = temperature == 0.0
        bound = tl.where(greedy, m, -float("inf"))
        inverse = 1.0 / tl.where(greedy, 1.0, temperature)
        _write_scaled(row_ptr, out_row_ptr, V, stride_v, out_v, bound, inverse, BLOCK_V)


def entropy_temperature(
    logits: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor | None,
    rule: str,
    constants: tuple[float, float, float],
    least: float,
    *,
    block_v: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (temperature, entropy), both fp32 [N], of logits [N, V] with any strides. `out` receives the scaled rows.

    mask is [N] bool, contiguous, or None. out is None, the logits themselves, or a tensor like them. With (a, b, c) =
    constants the temperature is::

        two_level   a where entropy > c, else b
        edt         max(a 2^(b / entropy), c)
        dynatemp    a + b (entropy / log n)^c,   n entries above -inf

    A temperature below `least` becomes 0: then the largest logits keep their value and all others become -inf.
    """
    N, V = logits.shape
    temperature, entropy = (torch.empty(N, dtype=torch.float32, device=logits.device) for _ in range(2))
    if N == 0:
        return temperature, entropy
    BLOCK_V, CHUNK_V, chunks, num_warps = launch_shape("statistics", logits, V, block_v)
    written = logits if out is None else out
    aligned = _aligned(logits) and _aligned(written)
    with device_of(logits):
        entropy_temperature_kernel[(N,)](
            logits,
            mask,
            temperature,
            entropy,
            written,
            V,
            *logits.stride(),
            *written.stride(),
            chunks,
            *map(float, constants),
            least,
            RULE=rule,
            WRITE=out is not None,
            ALIGNED=aligned,
            BLOCK_V=BLOCK_V,
            CHUNK_V=CHUNK_V,
            num_warps=num_warps,
            **registers(logits, num_warps, simple=aligned),
        )
    return temperature, entropy


def _aligned(x: torch.Tensor) -> bool:
    return x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
