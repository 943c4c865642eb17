"""These Triton kernels fold a tile of logits into the running statistics of its rows, or turn it into its gradient.

A tile is [rows, a block of the vocabulary], the result of a matrix product. The kernels know no RL and no matrix
product. A row's running statistics, state [7, N] in fp32, are m, s, w, q of `rlloss.kernels.online` over all entries
but the target, the sum of u, the largest u before the target, and the target's own u. Before the first tile, m and the
largest u are -inf and the others are 0.

Each entry of a tile is read once. Its gradient is written once, in place for fp32.
"""

import torch
import triton.language as tl

from rlloss.kernels.launch import device_of, jit, launch_shape, registers
from rlloss.kernels.online import merge, softcapped
from rlloss.kernels.rows import Rows, per_row, row_at, scales
from rlloss.kernels.token_stats_backward import coefficients, coefs_of_row, write_gradient
from rlloss.kernels.token_stats_forward import chunk_stats


@jit(do_not_specialize=["N", "V", "stride_row", "first", "chunks"])
def fold_tile_kernel(
    tile_ptr,
    target_ptr,
    temperature_ptr,
    running_ptr,
    N: tl.int64,
    V: tl.int32,
    stride_row: tl.int64,
    first: tl.int64,
    chunks: tl.int32,
    temperature: tl.float32,
    softcap,
    logit_scale: tl.float32,
    EXTRA: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK_V: tl.constexpr,
):
    """Grid (R,). V is the width of the tile, `first` its first vocabulary entry, N the stride of the rows of state.

    temperature_ptr and softcap may be None.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = row_at(tile_ptr, row * stride_row, ALIGNED)  # type: ignore
    target = tl.load(target_ptr + row).to(tl.int64) - first
    scale, k = scales(row, temperature, temperature_ptr, softcap, logit_scale)  # type: ignore
    m = tl.load(running_ptr + row)
    s = tl.load(running_ptr + N + row)
    w = tl.load(running_ptr + 2 * N + row)
    q = tl.load(running_ptr + 3 * N + row)
    total = tl.load(running_ptr + 4 * N + row)
    before = tl.load(running_ptr + 5 * N + row)
    for chunk in range(chunks):
        m_c, s_c, w_c, q_c, total_c, before_c = chunk_stats(
            row_ptr, chunk * CHUNK_V, tl.minimum(V, (chunk + 1) * CHUNK_V), V, 1, target, k, softcap, logit_scale,
            EXTRA, ALIGNED, BLOCK_V,
        )  # fmt: skip
        m, s, w, q = merge(m, s, w, q, m_c, s_c, w_c, q_c, k, EXTRA)
        total += total_c
        before = tl.maximum(before, before_c)
    tl.store(running_ptr + row, m)
    tl.store(running_ptr + N + row, s)
    tl.store(running_ptr + 2 * N + row, w)
    if EXTRA:
        tl.store(running_ptr + 3 * N + row, q)
        tl.store(running_ptr + 4 * N + row, total)
        tl.store(running_ptr + 5 * N + row, before)
    if (target >= 0) & (target < V):
        logit = tl.load(row_ptr + target).to(tl.float32)
        tl.store(running_ptr + 6 * N + row, softcapped(logit, softcap, logit_scale))


@jit(do_not_specialize=["V", "stride_row", "out_row", "first", "chunks"])
def gradient_tile_kernel(
    tile_ptr,
    target_ptr,
    temperature_ptr,
    m_ptr,
    log_s_ptr,
    logp_ptr,
    entropy_ptr,
    g_logp_ptr,
    g_entropy_ptr,
    g_lse_ptr,
    out_ptr,
    V: tl.int32,
    stride_row: tl.int64,
    out_row: tl.int64,
    first: tl.int64,
    chunks: tl.int32,
    temperature: tl.float32,
    softcap,
    logit_scale: tl.float32,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK_V: tl.constexpr,
):
    """Grid (R * chunks,). Write the gradient of the tile to out, which may be the tile itself.

    temperature_ptr, softcap and, together, g_entropy_ptr and g_lse_ptr may be None.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid // chunks
    start = (pid - row * chunks).to(tl.int32) * CHUNK_V
    row_ptr = row_at(tile_ptr, row * stride_row, ALIGNED)  # type: ignore
    out = row_at(out_ptr, row * out_row, ALIGNED)  # type: ignore
    g_logp = tl.load(g_logp_ptr + row)
    g_entropy = 0.0
    g_lse = 0.0
    entropy = 0.0
    if g_entropy_ptr is not None:
        g_entropy = tl.load(g_entropy_ptr + row)
        g_lse = tl.load(g_lse_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    target = tl.load(target_ptr + row).to(tl.int64) - first
    scale, k = scales(row, temperature, temperature_ptr, softcap, logit_scale)  # type: ignore
    own, level, slope = coefs_of_row(g_logp, g_entropy, g_lse, tl.load(logp_ptr + row), entropy, scale)
    write_gradient(
        row_ptr, out, start, tl.minimum(V, start + CHUNK_V), V, 1, 1, target, own, level, slope,
        tl.load(m_ptr + row), tl.load(log_s_ptr + row), k, softcap, logit_scale, g_entropy_ptr is not None, BLOCK_V,
    )  # fmt: skip


def fold_tile(
    tile: torch.Tensor,
    start: int,
    target: torch.Tensor,
    state: torch.Tensor,
    transform: tuple[torch.Tensor | float, float | None, float],
    *,
    entropy: bool,
    extra: bool,
    overwrite: bool = False,
) -> None:
    """Fold tile [R, C], contiguous fp32, the raw logits of vocabulary entries start .. start + C - 1, into `state`.

    target is contiguous [R]. transform is (temperature, softcap, logit_scale), with temperature a number or [R]. state
    is [7, R], contiguous along its rows. extra also folds q, the sum and the largest u before the target. Only the
    torch version reads `overwrite`, which lets it change the tile, and `entropy`, without which it does not compute w.
    """
    rows = Rows(tile)
    if rows.N == 0:
        return
    BLOCK_V, CHUNK_V, chunks, num_warps = launch_shape("statistics", tile, rows.V)
    temperature, softcap, logit_scale = transform
    temperature_ptr, temperature = per_row(temperature)
    aligned = rows.aligned()
    with device_of(tile):
        fold_tile_kernel[(rows.N,)](
            tile,
            target,
            temperature_ptr,
            state,
            state.stride(0),
            rows.V,
            rows.stride_inner,
            start,
            chunks,
            temperature,
            softcap if softcap is None else float(softcap),
            float(logit_scale),
            EXTRA=extra,
            ALIGNED=aligned,
            BLOCK_V=BLOCK_V,
            CHUNK_V=CHUNK_V,
            num_warps=num_warps,
            **registers(tile, num_warps, simple=aligned and softcap is None and not extra),
        )


def gradient_tile(
    tile: torch.Tensor,
    start: int,
    target: torch.Tensor,
    transform: tuple[torch.Tensor | float, float | None, float],
    stats: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    coefs: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the gradient of the raw logits in `tile` (as for `fold_tile`), in `dtype`; fp32 overwrites the tile.

    All rows are computed. stats is (m, log2 of the sum, logp, entropy) and coefs (g_logp, g_entropy, g_lse), contiguous
    fp32 [R]. A coefficient of None means 0; the entropy is needed for g_entropy. A target outside the vocabulary has
    no entry.
    """
    rows = Rows(tile)
    out = tile if dtype == tile.dtype else torch.empty(tile.shape, dtype=dtype, device=tile.device)
    if rows.N == 0:
        return out
    out_rows = Rows(out)
    BLOCK_V, CHUNK_V, chunks, num_warps = launch_shape("gradient", out, rows.V)
    (temperature, softcap, logit_scale), (m, log_s, logp, entropy) = transform, stats
    temperature_ptr, temperature = per_row(temperature)
    g_logp, g_entropy, g_lse = coefficients(m, *coefs)
    aligned = rows.aligned() and out_rows.aligned()
    with device_of(tile):
        gradient_tile_kernel[(rows.N * chunks,)](
            tile,
            target,
            temperature_ptr,
            m,
            log_s,
            logp,
            m if entropy is None else entropy,
            g_logp,
            g_entropy,
            g_lse,
            out,
            rows.V,
            rows.stride_inner,
            out_rows.stride_inner,
            start,
            chunks,
            temperature,
            softcap if softcap is None else float(softcap),
            float(logit_scale),
            ALIGNED=aligned,
            BLOCK_V=BLOCK_V,
            CHUNK_V=CHUNK_V,
            num_warps=num_warps,
            **registers(tile, num_warps, simple=aligned and softcap is None),
        )
    return out
