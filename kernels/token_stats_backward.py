"""This Triton kernel computes the gradient of `token_stats`: d loss / d logits from three coefficients per row.

The loss enters only through these coefficients. With p = softmax and the incoming g_logp, g_entropy, g_lse of a row::

    d loss / d u_v = [ g_logp 1[v = target] + p_v (g_lse - g_logp - g_entropy (entropy + log p_v)) ] / temperature

g_logp - p g_logp of the target would lose its digits as p goes to 1. It is g_logp (1 - p), with 1 - p = 1 - e^logp made
of the forward's logp, which keeps them.

The chain rule through softcap and logit scale follows. A dead row (all three exactly 0, or masked) is written as zeros,
and its logits are not read.

A live row is read once and written once; a dead row is written once. If a gradient for a factor of 1 is held, nothing
moves if the factor is 1, and only live rows move otherwise.
"""

import torch
import triton
import triton.language as tl

from rlloss.kernels.launch import device_of, jit, launch_shape, registers
from rlloss.kernels.online import LN_2, LOG2_E, floored, one_minus_exp, softcapped, tanh
from rlloss.kernels.rows import Rows, per_row, row_at, row_offset, scales


@triton.jit
def _gradient(
    u,
    logits,
    offsets,
    target,
    own,
    level,
    slope,
    m,
    log_s,
    k,
    softcap,
    logit_scale,
    ENTROPY_GRAD: tl.constexpr,
):
    """Return d loss / d logits of one tile. own, level and slope are those of `coefs_of_row`."""
    t = floored((u - m) * k - log_s)
    p = tl.exp2(t)
    if ENTROPY_GRAD:
        # Where p underflows, t is floored, so p * t is 0 and not 0 * -inf.
        grad = p * (level + slope * t)
    else:
        grad = p * level
    grad = tl.where(offsets == target, own, grad)
    if softcap is not None:
        bend = tanh(logits * logit_scale / softcap)
        grad = grad * (1.0 - bend * bend) * logit_scale
    return grad


@triton.jit
def coefs_of_row(g_logp, g_entropy, g_lse, logp, entropy, scale):
    """Return (own, level, slope): d loss / d u is own for the target, and p (level + slope log2 p) for all others."""
    level = g_lse - tl.where(g_entropy == 0.0, 0.0, g_entropy * entropy)
    slope = -g_entropy * LN_2
    log2_p = floored(logp * LOG2_E)
    own = g_logp * one_minus_exp(logp) + tl.exp2(log2_p) * (level + slope * log2_p)
    return own * scale, (level - g_logp) * scale, slope * scale


@triton.jit
def write_gradient(
    row_ptr, out_ptr, start, stop, V, stride_v, out_v, target, own, level, slope, m, log_s, k, softcap, logit_scale,
    ENTROPY_GRAD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the gradient of entries [start, min(stop, V)) of a row. Each entry is read once and written once."""
    lanes = tl.arange(0, BLOCK_V)
    full = tl.minimum(stop, V // BLOCK_V * BLOCK_V)
    for first in range(start, full, BLOCK_V):
        offsets = first + lanes
        logits = tl.load(row_ptr + offsets.to(tl.int64) * stride_v).to(tl.float32)
        u = softcapped(logits, softcap, logit_scale)
        grad = _gradient(
            u, logits, offsets, target, own, level, slope, m, log_s, k, softcap, logit_scale, ENTROPY_GRAD
        )  # fmt: skip
        tl.store(out_ptr + offsets.to(tl.int64) * out_v, grad.to(out_ptr.dtype.element_ty))
    if stop > full:
        offsets = tl.maximum(start, full) + lanes
        inside = offsets < V
        logits = tl.load(row_ptr + offsets.to(tl.int64) * stride_v, mask=inside, other=0.0).to(tl.float32)
        u = softcapped(logits, softcap, logit_scale)
        grad = _gradient(
            u, logits, offsets, target, own, level, slope, m, log_s, k, softcap, logit_scale, ENTROPY_GRAD
        )  # fmt: skip
        tl.store(out_ptr + offsets.to(tl.int64) * out_v, grad.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def write_zeros(out_ptr, start, stop, V, out_v, BLOCK_V: tl.constexpr):
    """Write zeros to entries [start, min(stop, V)) of a dead row."""
    lanes = tl.arange(0, BLOCK_V)
    full = tl.minimum(stop, V // BLOCK_V * BLOCK_V)
    zeros = tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty)
    for first in range(start, full, BLOCK_V):
        tl.store(out_ptr + (first + lanes).to(tl.int64) * out_v, zeros)
    if stop > full:
        offsets = tl.maximum(start, full) + lanes
        tl.store(out_ptr + offsets.to(tl.int64) * out_v, zeros, mask=offsets < V)


@jit(do_not_specialize=["N", "V", "rows_inner", "stride_outer", "stride_inner", "out_outer", "out_inner", "chunks"])
def token_stats_backward_kernel(
    logits_ptr,
    target_ptr,
    mask_ptr,
    temperature_ptr,
    saved_ptr,
    entropy_ptr,
    g_logp_ptr,
    g_entropy_ptr,
    g_lse_ptr,
    factor_ptr,
    grad_ptr,
    N: tl.int64,
    V: tl.int32,
    rows_inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    stride_v,
    out_outer: tl.int64,
    out_inner: tl.int64,
    out_v,
    chunks: tl.int32,
    temperature: tl.float32,
    softcap,
    logit_scale: tl.float32,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK_V: tl.constexpr,
):
    """Grid (N * chunks,). saved and entropy are the forward's; grad may be the logits themselves.

    temperature_ptr, softcap, factor_ptr and, together, g_entropy_ptr and g_lse_ptr may be None. With factor_ptr, grad
    already holds the gradient for a factor of 1. Then a factor of 1 needs no work, and dead rows never do.
    """
    if factor_ptr is not None:
        if tl.load(factor_ptr) == 1.0:
            return
    pid = tl.program_id(0).to(tl.int64)
    row = pid // chunks
    start = (pid - row * chunks).to(tl.int32) * CHUNK_V
    stop = tl.minimum(V, start + CHUNK_V)
    row_ptr = row_at(logits_ptr, row_offset(row, rows_inner, stride_outer, stride_inner), ALIGNED)
    out_ptr = row_at(grad_ptr, row_offset(row, rows_inner, out_outer, out_inner), ALIGNED)

    g_logp = tl.load(g_logp_ptr + row)
    g_entropy = 0.0
    g_lse = 0.0
    if g_entropy_ptr is not None:
        g_entropy = tl.load(g_entropy_ptr + row)
        g_lse = tl.load(g_lse_ptr + row)
    # NaN is not 0, so a broken coefficient is live and shows itself.
    dead = (g_logp == 0.0) & (g_entropy == 0.0) & (g_lse == 0.0)
    dead = dead | (tl.load(mask_ptr + row) == 0)

    if dead:
        if factor_ptr is None:
            write_zeros(out_ptr, start, stop, V, out_v, BLOCK_V)
    else:
        target = tl.load(target_ptr + row)
        scale, k = scales(row, temperature, temperature_ptr, softcap, logit_scale)
        m = tl.load(saved_ptr + row)
        log_s = tl.load(saved_ptr + N + row)
        entropy = 0.0
        if g_entropy_ptr is not None:
            entropy = tl.load(entropy_ptr + row)
        own, level, slope = coefs_of_row(g_logp, g_entropy, g_lse, tl.load(saved_ptr + 2 * N + row), entropy, scale)
        # The logp of a target outside the vocabulary is NaN, and its gradient is NaN too.
        level = tl.where((target >= 0) & (target < V) | (g_logp == 0.0), level, float("nan"))
        write_gradient(
            row_ptr, out_ptr, start, stop, V, stride_v, out_v, target, own, level, slope, m, log_s, k, softcap,
            logit_scale, g_entropy_ptr is not None, BLOCK_V,
        )  # fmt: skip


def coefficients(
    like: torch.Tensor, g_logp: torch.Tensor | None, g_entropy: torch.Tensor | None, g_lse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Replace None by zeros where the kernel takes no None: for g_logp, and for the other two if only one is given."""

    def filled(g: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros_like(like) if g is None else g

    if g_entropy is None and g_lse is None:
        return filled(g_logp), None, None
    return filled(g_logp), filled(g_entropy), filled(g_lse)


def token_stats_backward(
    logits: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None,
    transform: tuple[torch.Tensor | float, float | None, float],
    stats: tuple[torch.Tensor, torch.Tensor],
    coefs: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    *,
    inplace: bool = False,
    held: tuple[torch.Tensor, torch.Tensor] | None = None,
    block_v: int | None = None,
) -> torch.Tensor:
    """Return the gradient of logits, with their shape and dtype, contiguous or, with `inplace`, in the logits' memory.

    target, mask and transform are as for `token_stats_forward`, which returned stats (saved, entropy). coefs is
    (g_logp, g_entropy, g_lse), each contiguous fp32 with N entries, or None. `inplace` needs contiguous logits. held is
    (gradient for a factor of 1, the factor as 0-d fp32), where coefs already contain the factor. The held gradient is
    corrected in place if the factor is not 1, and returned.
    """
    rows = Rows(logits)
    if held is not None:
        grad = held[0]
    else:
        grad = logits if inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if rows.N == 0:
        return grad
    out = Rows(grad)
    BLOCK_V, CHUNK_V, chunks, num_warps = launch_shape("gradient", logits, rows.V, block_v)
    (temperature, softcap, logit_scale), (saved, entropy) = transform, stats
    g_logp, g_entropy, g_lse = coefficients(next(g for g in coefs if g is not None), *coefs)
    temperature_ptr, temperature = per_row(temperature)
    aligned = rows.aligned() and out.aligned()
    with device_of(logits):
        token_stats_backward_kernel[(rows.N * chunks,)](
            rows.tensor, target, rows.mask(mask), temperature_ptr, saved, entropy, g_logp, g_entropy, g_lse,
            None if held is None else held[1],
            out.tensor, rows.N, rows.V, rows.inner, rows.stride_outer, rows.stride_inner, rows.stride_v,
            out.stride_outer, out.stride_inner, out.stride_v, chunks, temperature,
            softcap if softcap is None else float(softcap),
            float(logit_scale),
            ALIGNED=aligned,
            BLOCK_V=BLOCK_V,
            CHUNK_V=CHUNK_V,
            num_warps=num_warps,
            **registers(logits, num_warps, simple=aligned and softcap is None),
        )  # fmt: skip
    return grad
