"""These Triton kernels compute log-probability, entropy and lse of each row of logits. They know no RL.

Each logit is read from memory once (plus the one logit of the target). A row is a fixed sequence of chunks. Each chunk
is reduced on its own, and the results are merged in order. One program walks the whole row; when rows are few, one
program takes one chunk. Either way a row's bits do not depend on the rows around it. They may depend on 16-byte
alignment, which changes the layout.

Each entry takes one exponential. Every 16 bytes of entries take one more, to rescale a running result.
"""

import torch
import triton
import triton.language as tl

from rlloss.kernels.launch import device_of, jit, launch_shape, processors, registers
from rlloss.kernels.launch_table import choice
from rlloss.kernels.online import LN_2, add_target, collapse, fold, merge, softcapped
from rlloss.kernels.rows import Rows, as_rows, per_row, row_at, row_offset, scales, tile_offsets


@triton.jit
def _block(row_ptr, offsets, stride_v, softcap, logit_scale, ALIGNED: tl.constexpr):
    """Return u and the numbers of the entries of a full block."""
    logits = as_rows(tl.load(row_ptr + offsets.to(tl.int64) * stride_v), ALIGNED).to(tl.float32)
    return softcapped(logits, softcap, logit_scale), as_rows(offsets, ALIGNED)


@triton.jit
def _largest_before(u, entries, target):
    return tl.max(tl.where(entries < target, u, -float("inf")), axis=1)


@triton.jit
def chunk_stats(
    row_ptr,
    start,
    stop,
    V,
    stride_v,
    target,
    k,
    softcap,
    logit_scale,
    EXTRA: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Return (m, s, w, q, sum u, largest u before the target) of entries [start, min(stop, V)).

    m, s, w and q leave the target out. Without EXTRA the last three are not computed.
    """
    LANES: tl.constexpr = 128 // row_ptr.dtype.element_ty.primitive_bitwidth
    R: tl.constexpr = BLOCK_V // LANES
    m = tl.full((R,), -float("inf"), tl.float32)
    s = tl.zeros((R,), tl.float32)
    w = tl.zeros((R,), tl.float32)
    q = tl.zeros((R,), tl.float32)
    total = tl.zeros((R,), tl.float32)
    rest = tl.zeros((R,), tl.float32)  # separate, because one sum in loop and tail breaks a pass of Triton 3.7
    before = tl.full((R,), -float("inf"), tl.float32)
    lanes = tile_offsets(R, LANES, ALIGNED)

    # Full blocks carry no mask: a mask with a bound that is not a known multiple of 16 would prevent 16-byte loads.
    # Those before and after the block with the target do not compare their entries with it.
    full = tl.minimum(stop, V // BLOCK_V * BLOCK_V)
    place = tl.where((target >= start) & (target < stop), target, -1).to(tl.int32)
    here = (place >= 0) & (place < full)
    own = tl.where(here, place // BLOCK_V * BLOCK_V, full)
    for part in range(tl.where(here, 2, 1)):
        # Computed anew: a number that this loop carries on to the inner one's bound is lost by a pass of Triton 3.7.
        begin = tl.where(part == 0, start, own + BLOCK_V)
        for first in range(begin, tl.where(part == 0, own, full), BLOCK_V):
            u, entries = _block(
                row_ptr, tl.multiple_of(first, BLOCK_V) + lanes, stride_v, softcap, logit_scale, ALIGNED
            )
            m, s, w, q = fold(m, s, w, q, u, k, EXTRA)
            if EXTRA:
                total += tl.sum(u, axis=1)
                before = tl.maximum(before, _largest_before(u, entries, target))
    if here:
        u, entries = _block(row_ptr, tl.multiple_of(own, BLOCK_V) + lanes, stride_v, softcap, logit_scale, ALIGNED)
        m, s, w, q = fold(m, s, w, q, tl.where(entries == place, -float("inf"), u), k, EXTRA)
        if EXTRA:
            total += tl.sum(u, axis=1)
            before = tl.maximum(before, _largest_before(u, entries, target))
    if stop > full:
        offsets = tl.maximum(start, full) + lanes
        inside = offsets < V
        logits = tl.load(row_ptr + offsets.to(tl.int64) * stride_v, mask=inside, other=0.0)
        logits, inside, entries = as_rows(logits, ALIGNED), as_rows(inside, ALIGNED), as_rows(offsets, ALIGNED)
        u = tl.where(inside, softcapped(logits.to(tl.float32), softcap, logit_scale), -float("inf"))
        m, s, w, q = fold(m, s, w, q, tl.where(entries == place, -float("inf"), u), k, EXTRA)
        if EXTRA:
            rest = tl.sum(tl.where(inside, u, 0.0), axis=1)
            before = tl.maximum(before, _largest_before(u, entries, target))
    m_row, s_row, w_row, q_row = collapse(m, s, w, q, k, EXTRA)
    return m_row, s_row, w_row, q_row, tl.sum(total + rest, axis=0), tl.max(before, axis=0)


@triton.jit
def target_u(row_ptr, stride_v, target, inside, softcap, logit_scale):
    """Return u of the target, or -inf if it is outside the vocabulary. Then the row's first entry is read."""
    logit = tl.load(row_ptr + tl.where(inside, target, 0).to(tl.int64) * stride_v).to(tl.float32)
    return tl.where(inside, softcapped(logit, softcap, logit_scale), -float("inf"))


@triton.jit
def _finish(
    row,
    N,
    row_ptr,
    logp_ptr,
    entropy_ptr,
    lse_ptr,
    saved_ptr,
    extra_ptr,
    m,
    s,
    w,
    q,
    total,
    before,
    V,
    stride_v,
    target,
    scale,
    k,
    softcap,
    logit_scale,
):
    inside = (target >= 0) & (target < V)
    u_target = target_u(row_ptr, stride_v, target, inside, softcap, logit_scale)
    m, log_s, s, w, q = add_target(m, s, w, q, u_target, k, extra_ptr is not None)
    logp = tl.where(inside, (u_target - m) * scale - log_s * LN_2, float("nan"))
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, (log_s - w / s) * LN_2)
    tl.store(lse_ptr + row, m * scale + log_s * LN_2)
    tl.store(saved_ptr + row, m)
    tl.store(saved_ptr + N + row, log_s)
    tl.store(saved_ptr + 2 * N + row, logp)
    if extra_ptr is not None:
        tl.store(extra_ptr + row, total * scale / V)
        tl.store(extra_ptr + N + row, (tl.log2(q) - 2.0 * log_s) * LN_2)
        # argmax is the first maximum, so no equal entry may precede the target. In a NaN row no entry is the argmax.
        first = inside & (u_target >= m) & (before < u_target) & (s == s)
        tl.store(extra_ptr + 2 * N + row, tl.where(first, 1.0, 0.0))


@jit(do_not_specialize=["N", "V", "rows_inner", "stride_outer", "stride_inner", "chunks"])
def token_stats_forward_kernel(
    logits_ptr,
    target_ptr,
    mask_ptr,
    temperature_ptr,
    logp_ptr,
    entropy_ptr,
    lse_ptr,
    saved_ptr,
    extra_ptr,
    partial_ptr,
    N: tl.int64,
    V: tl.int32,
    rows_inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    stride_v,
    chunks: tl.int32,
    temperature: tl.float32,
    softcap,
    logit_scale: tl.float32,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK_V: tl.constexpr,
):
    """Grid (N,), or (N * chunks,) with partial [6, N * chunks], which `token_stats_merge_kernel` reads.

    partial_ptr, temperature_ptr, softcap and extra_ptr may be None.
    """
    EXTRA: tl.constexpr = extra_ptr is not None
    pid = tl.program_id(0).to(tl.int64)
    row = pid
    if partial_ptr is not None:
        row = pid // chunks
    if tl.load(mask_ptr + row) == 0:
        return
    row_ptr = row_at(logits_ptr, row_offset(row, rows_inner, stride_outer, stride_inner), ALIGNED)
    target = tl.load(target_ptr + row)
    scale, k = scales(row, temperature, temperature_ptr, softcap, logit_scale)

    if partial_ptr is not None:
        chunk = (pid - row * chunks).to(tl.int32)
        m, s, w, q, total, before = chunk_stats(
            row_ptr, chunk * CHUNK_V, tl.minimum(V, (chunk + 1) * CHUNK_V), V, stride_v, target, k, softcap,
            logit_scale, EXTRA, ALIGNED, BLOCK_V,
        )  # fmt: skip
        slots = N * chunks
        tl.store(partial_ptr + pid, m)
        tl.store(partial_ptr + slots + pid, s)
        tl.store(partial_ptr + 2 * slots + pid, w)
        tl.store(partial_ptr + 3 * slots + pid, q)
        tl.store(partial_ptr + 4 * slots + pid, total)
        tl.store(partial_ptr + 5 * slots + pid, before)
    else:
        m = -float("inf")
        s = 0.0
        w = 0.0
        q = 0.0
        total = 0.0
        before = -float("inf")
        for chunk in range(chunks):
            m_c, s_c, w_c, q_c, total_c, before_c = chunk_stats(
                row_ptr, chunk * CHUNK_V, tl.minimum(V, (chunk + 1) * CHUNK_V), V, stride_v, target, k, softcap,
                logit_scale, EXTRA, ALIGNED, BLOCK_V,
            )  # fmt: skip
            m, s, w, q = merge(m, s, w, q, m_c, s_c, w_c, q_c, k, EXTRA)
            total += total_c
            before = tl.maximum(before, before_c)
        _finish(
            row, N, row_ptr, logp_ptr, entropy_ptr, lse_ptr, saved_ptr, extra_ptr, m, s, w, q, total, before, V,
            stride_v, target, scale, k, softcap, logit_scale,
        )  # fmt: skip


@jit(do_not_specialize=["N", "V", "rows_inner", "stride_outer", "stride_inner", "chunks"])
def token_stats_merge_kernel(
    logits_ptr,
    target_ptr,
    mask_ptr,
    temperature_ptr,
    logp_ptr,
    entropy_ptr,
    lse_ptr,
    saved_ptr,
    extra_ptr,
    partial_ptr,
    N: tl.int64,
    V: tl.int32,
    rows_inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    stride_v,
    chunks: tl.int32,
    temperature: tl.float32,
    softcap,
    logit_scale: tl.float32,
):
    """Grid (N,). Merge the chunks of each row, in the order in which a single program would."""
    EXTRA: tl.constexpr = extra_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    if tl.load(mask_ptr + row) == 0:
        return
    row_ptr = logits_ptr + row_offset(row, rows_inner, stride_outer, stride_inner)
    target = tl.load(target_ptr + row)
    scale, k = scales(row, temperature, temperature_ptr, softcap, logit_scale)
    m = -float("inf")
    s = 0.0
    w = 0.0
    q = 0.0
    total = 0.0
    before = -float("inf")
    slots = N * chunks
    for chunk in range(chunks):
        slot_ptr = partial_ptr + row * chunks + chunk
        m, s, w, q = merge(
            m, s, w, q, tl.load(slot_ptr), tl.load(slot_ptr + slots), tl.load(slot_ptr + 2 * slots),
            tl.load(slot_ptr + 3 * slots), k, EXTRA,
        )  # fmt: skip
        total += tl.load(slot_ptr + 4 * slots)
        before = tl.maximum(before, tl.load(slot_ptr + 5 * slots))
    _finish(
        row, N, row_ptr, logp_ptr, entropy_ptr, lse_ptr, saved_ptr, extra_ptr, m, s, w, q, total, before, V,
        stride_v, target, scale, k, softcap, logit_scale,
    )  # fmt: skip


def token_stats_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None,
    transform: tuple[torch.Tensor | float, float | None, float],
    *,
    entropy: bool = True,
    extra: bool = False,
    split: bool | None = None,
    block_v: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (logp, entropy, lse, saved, extra) of logits [..., V], all in fp32 and 0 where masked.

    target and mask are contiguous with N entries. transform is (temperature, softcap, logit_scale), with temperature a
    number or shaped like target. logp, entropy and lse are shaped like target [...]. saved [3, ...] is (m, log2 s,
    logp) for the backward. extra is [3, ...] (mean logit, log sum p^2, is_top1), or [3, 0]. The entropy is computed
    even if it is not requested, because it costs no memory access. `split` gives each chunk of a row its own program;
    None: if the rows are too few to fill the device.
    """
    rows = Rows(logits)
    shape, like = target.shape, {"dtype": torch.float32, "device": logits.device}
    logp, entropy_out, lse = torch.empty(shape, **like), torch.empty(shape, **like), torch.empty(shape, **like)
    saved = torch.empty((3, *shape), **like)
    more = torch.empty((3, *(shape if extra else (0,))), **like)
    if mask is not None:  # the kernel does not write masked rows
        torch._foreach_zero_([logp, entropy_out, lse, saved, more])  # type: ignore
    if rows.N == 0:
        return logp, entropy_out, lse, saved, more
    BLOCK_V, CHUNK_V, chunks, num_warps = launch_shape("statistics", logits, rows.V, block_v)
    if split is None:
        (few,) = choice("split", logits.device, logits.dtype, rows.V)
        split = chunks > 1 and logits.is_cuda and rows.N < few * processors(logits.device)
    partial = torch.empty((6, rows.N * chunks), dtype=torch.float32, device=logits.device) if split else None
    temperature, softcap, logit_scale = transform
    temperature_ptr, temperature = per_row(temperature)
    arguments = (
        rows.tensor, target, rows.mask(mask), temperature_ptr, logp, entropy_out, lse, saved, more if extra else None,
        partial, rows.N, rows.V, rows.inner, rows.stride_outer, rows.stride_inner, rows.stride_v, chunks, temperature,
        softcap if softcap is None else float(softcap), float(logit_scale),
    )  # fmt: skip
    aligned = rows.aligned()
    with device_of(logits):
        token_stats_forward_kernel[(rows.N * chunks if split else rows.N,)](
            *arguments,
            ALIGNED=aligned,
            BLOCK_V=BLOCK_V,
            CHUNK_V=CHUNK_V,
            num_warps=num_warps,
            **registers(logits, num_warps, simple=aligned and softcap is None and not extra),
        )
        if split:
            token_stats_merge_kernel[(rows.N,)](*arguments, num_warps=1)
    return logp, entropy_out, lse, saved, more
