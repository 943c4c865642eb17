"""Logits rows -> log-probability, entropy and, in the same launch, the gradient of the loss.

For losses whose coefficients are row-local: what a row's gradient is follows from that row alone, so that the program
which has just reduced it writes the gradient while the row is still in the cache. It is the gradient for an incoming
gradient of 1; where another one comes in, the backward of `token_stats` writes the live rows anew.

Bytes from and to memory for V entries of b bytes, if the second read of a row hits the cache: 2 b V a row that counts,
b V a masked one; then nothing in the backward, or 2 b V a live row if the incoming gradient is not 1. In two launches:
3 b V a live row, 2 b V a dead one that counts, b V a masked one.
"""

import torch
import triton
import triton.language as tl

from rlloss.kernels.launch import device_of, launch_shape, registers
from rlloss.kernels.online import LN_2, merge, softcapped
from rlloss.kernels.rows import Rows, row_offset, scales
from rlloss.kernels.surrogates import clamped, divergence, is_kept, minus, surrogate
from rlloss.kernels.token_stats_backward import write_gradient, write_zeros
from rlloss.kernels.token_stats_forward import chunk_stats


@triton.jit(
    do_not_specialize=["V", "T", "rows_inner", "stride_outer", "stride_inner", "out_outer", "out_inner", "chunks"]
)
def gradient_in_forward_kernel(
    logits_ptr, target_ptr, mask_ptr, temperature_ptr, advantage_ptr, old_ptr, ref_ptr, sampler_ratio_ptr, cutoff_ptr,
    weight_ptr, logp_ptr, entropy_ptr, saved_ptr, coef_ptr, g_entropy_ptr, grad_ptr,
    V: tl.int32,
    T: tl.int64,
    rows_inner: tl.int64,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    stride_v,
    out_outer: tl.int64,
    out_inner: tl.int64,
    out_v,
    chunks: tl.int32,
    temperature: tl.float32,
    softcap: tl.float32,
    logit_scale: tl.float32,
    low: tl.float32,
    gain: tl.float32,
    loss_bound: tl.float32,
    max_log_ratio: tl.float32,
    beta: tl.float32,
    PER_ROW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CISPO: tl.constexpr,
    HAS_OLD: tl.constexpr,
    PER_TOKEN_ADVANTAGE: tl.constexpr,
    HAS_SAMPLER_RATIO: tl.constexpr,
    PER_TOKEN_RATIO: tl.constexpr,
    KL: tl.constexpr,
    KL_BIAS_CORRECTION: tl.constexpr,
    SELECT: tl.constexpr,
    BONUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK_V: tl.constexpr,
):  # fmt: skip
    """Grid (N,). weight [2, B]: what the coefficients of logp and of entropy in a sequence are multiplied by."""
    row = tl.program_id(0).to(tl.int64)
    sequence = row // T
    row_ptr = logits_ptr + row_offset(row, rows_inner, stride_outer, stride_inner)
    out_ptr = grad_ptr + row_offset(row, rows_inner, out_outer, out_inner)
    if ALIGNED:
        row_ptr = tl.multiple_of(row_ptr, 16)
        out_ptr = tl.multiple_of(out_ptr, 16)
    logp = 0.0
    entropy = 0.0
    coef = 0.0
    g_entropy = 0.0
    m = -float("inf")
    log_s = 0.0
    if tl.load(mask_ptr + row) == 0:
        write_zeros(out_ptr, 0, V, V, out_v, BLOCK_V)
    else:
        target = tl.load(target_ptr + row)
        scale, k = scales(row, temperature, temperature_ptr, logit_scale, PER_ROW, HAS_SOFTCAP)
        s = 0.0
        w = 0.0
        q = 0.0
        for chunk in range(chunks):
            m_c, s_c, w_c, q_c, _, _ = chunk_stats(
                row_ptr, chunk * CHUNK_V, tl.minimum(V, (chunk + 1) * CHUNK_V), V, stride_v, target, k, softcap,
                logit_scale, HAS_SOFTCAP, True, False, False, False, ALIGNED, BLOCK_V,
            )  # fmt: skip
            m, s, w, q = merge(m, s, w, q, m_c, s_c, w_c, q_c, k, True, False)
        inside = (target >= 0) & (target < V)
        logit = tl.load(row_ptr + tl.where(inside, target, 0).to(tl.int64) * stride_v).to(tl.float32)
        log_s = tl.log2(s)
        logp = (softcapped(logit, softcap, logit_scale, HAS_SOFTCAP) - m) * scale - log_s * LN_2
        logp = tl.where(inside, logp, float("nan"))
        entropy = (log_s - w / s) * LN_2

        if PER_TOKEN_ADVANTAGE:
            advantage = tl.load(advantage_ptr + row)
        else:
            advantage = tl.load(advantage_ptr + sequence)
        log_ratio = logp - logp
        if HAS_OLD:
            log_ratio = clamped(minus(logp, tl.load(old_ptr + row)), -max_log_ratio, max_log_ratio)
        acts = log_ratio == log_ratio
        acts = acts | (acts == 0)
        if SELECT:
            acts = is_kept(entropy, row, tl.load(cutoff_ptr), row, False)
        kept = acts
        sampler = 1.0
        if HAS_SAMPLER_RATIO:
            if PER_TOKEN_RATIO:
                sampler = tl.load(sampler_ratio_ptr + row)
            else:
                sampler = tl.load(sampler_ratio_ptr + sequence)
            acts = acts & (sampler != 0.0)
        _, coef, _, ratio = surrogate(
            log_ratio, logp, advantage, acts, sampler, low, gain, loss_bound, max_log_ratio, HAS_SAMPLER_RATIO, CISPO
        )
        if KL > 0:
            counts = acts | (acts == 0)
            difference = minus(tl.load(ref_ptr + row), logp)
            _, kl_slope, kl_live, _ = divergence(
                difference, counts, log_ratio, ratio, max_log_ratio, KL, KL_BIAS_CORRECTION, True
            )
            coef += tl.where(kl_live, beta * kl_slope, 0.0)
        weight = tl.load(weight_ptr + sequence)
        coef = tl.where(coef == 0.0, 0.0, coef * weight)
        if BONUS:
            g_entropy = tl.where(kept, tl.load(weight_ptr + tl.num_programs(0) // T + sequence), 0.0)
        if (coef == 0.0) & (g_entropy == 0.0):
            write_zeros(out_ptr, 0, V, V, out_v, BLOCK_V)
        else:
            common = tl.where(inside, -coef - g_entropy * entropy, float("nan"))
            write_gradient(
                row_ptr, out_ptr, 0, V, V, stride_v, out_v, target, coef, common, g_entropy, m, log_s, scale, k,
                softcap, logit_scale, HAS_SOFTCAP, BONUS, BLOCK_V,
            )  # fmt: skip
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(saved_ptr + row, m)
    tl.store(saved_ptr + tl.num_programs(0) + row, log_s)
    tl.store(coef_ptr + row, coef)
    if BONUS:
        tl.store(g_entropy_ptr + row, g_entropy)


def gradient_in_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    temperature: torch.Tensor | float,
    softcap: float | None,
    logit_scale: float,
    advantage: torch.Tensor,
    old_logp: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    sampler_ratio: torch.Tensor | None,
    cutoff: torch.Tensor | None,
    weight: torch.Tensor,
    *,
    cispo: bool,
    low: float,
    gain: float,
    loss_bound: float,
    max_log_ratio: float | None,
    beta: float,
    kl_estimator: int,
    kl_bias_correction: bool,
    bonus: bool,
    block_v: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(grad like logits, logp [B, T], entropy [B, T], saved [2, N], g_logp [N], g_entropy [N] or None).

    logits [B, T, V] with N = B T >= 1. From saved on they are what `token_stats_backward` takes.

    target, mask, old_logp, ref_logp, a temperature tensor [B, T] and advantage, sampler_ratio [B, T] or [B, 1] are
    contiguous, fp32 where they are floats; cutoff 0-d. weight [2, B]: d loss / d (sum over the sequence) of the token
    losses and, with `bonus`, of the entropies. What the others are: `token_pass`.
    """
    B, T = mask.shape
    rows = Rows(logits)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    out = Rows(grad)
    logp, entropy = (torch.empty((B, T), dtype=torch.float32, device=logits.device) for _ in range(2))
    saved = torch.empty((2, B * T), dtype=torch.float32, device=logits.device)
    coef = torch.empty(B * T, dtype=torch.float32, device=logits.device)
    g_entropy = torch.empty_like(coef) if bonus else None
    BLOCK_V, CHUNK_V, chunks, num_warps = launch_shape("statistics", logits, rows.V, block_v)
    per_row, aligned = isinstance(temperature, torch.Tensor), rows.aligned() and out.aligned()
    given = (temperature if per_row else None, advantage, old_logp, ref_logp, sampler_ratio, cutoff)
    with device_of(logits):
        gradient_in_forward_kernel[(B * T,)](
            rows.tensor, target, mask, *(weight if x is None else x for x in given), weight, logp, entropy, saved,
            coef, coef if g_entropy is None else g_entropy, out.tensor, rows.V, T, rows.inner, rows.stride_outer,
            rows.stride_inner, rows.stride_v, out.stride_outer, out.stride_inner, out.stride_v, chunks,
            1.0 if per_row else float(temperature),
            0.0 if softcap is None else float(softcap),
            float(logit_scale), low, gain, loss_bound,
            float("nan") if max_log_ratio is None else float(max_log_ratio),
            beta,
            PER_ROW=per_row,
            HAS_SOFTCAP=softcap is not None,
            CISPO=cispo,
            HAS_OLD=old_logp is not None,
            PER_TOKEN_ADVANTAGE=advantage.shape[1] == T,
            HAS_SAMPLER_RATIO=sampler_ratio is not None,
            PER_TOKEN_RATIO=sampler_ratio is not None and sampler_ratio.shape[1] == T,
            KL=kl_estimator if ref_logp is not None else 0,
            KL_BIAS_CORRECTION=kl_bias_correction,
            SELECT=cutoff is not None,
            BONUS=bonus,
            ALIGNED=aligned,
            BLOCK_V=BLOCK_V,
            CHUNK_V=CHUNK_V,
            num_warps=num_warps,
            **registers(logits, num_warps, simple=aligned and softcap is None),
        )  # fmt: skip
    return grad, logp, entropy, saved, coef, g_entropy
