"""This Triton kernel computes log-probability, entropy and the gradient of the loss of each row in one launch.

It serves losses whose coefficients are row-local, so that a row's gradient depends on that row alone. The program that
has just reduced a row writes its gradient while the row is still in the cache. The gradient is for an incoming gradient
of 1; for another one, the backward of `token_stats` writes the live rows anew.

Memory traffic for V entries of b bytes, if the second read of a row hits the cache: 2 b V per row that counts and b V
per masked row in the forward; nothing in the backward, or 2 b V per live row if the incoming gradient is not 1. Two
launches take 3 b V per live row, 2 b V per dead row that counts and b V per masked row.
"""

from typing import NamedTuple

import torch
import triton.language as tl

from rlloss.kernels.launch import device_of, jit, launch_shape, registers
from rlloss.kernels.online import LN_2, add_target, merge
from rlloss.kernels.rows import Rows, per_row, row_at, row_offset, scales
from rlloss.kernels.surrogates import clamped, divergence, is_kept, minus, surrogate
from rlloss.kernels.token_pass import TokenSettings, token_strides
from rlloss.kernels.token_stats_backward import coefs_of_row, write_gradient, write_zeros
from rlloss.kernels.token_stats_forward import chunk_stats, target_u


class LossTensors(NamedTuple):
    """Inputs of the loss, contiguous and fp32.

    old_logp and ref_logp are `[B, T]`, advantage and sampler_ratio `[B, T]` or `[B, 1]`, cutoff is 0-d. weight is
    d loss / d (sum over the sequence) of the token losses `[B]` or, with an entropy bonus, of these and of the
    entropies `[2, B]`.
    """

    advantage: torch.Tensor
    old_logp: torch.Tensor | None
    ref_logp: torch.Tensor | None
    sampler_ratio: torch.Tensor | None
    cutoff: torch.Tensor | None
    weight: torch.Tensor


# Bits of `given`.
OLD: tl.constexpr = tl.constexpr(1)
SAMPLER: tl.constexpr = tl.constexpr(2)
CUTOFF: tl.constexpr = tl.constexpr(4)


@jit(
    do_not_specialize=[
        "V", "T", "rows_inner", "stride_outer", "stride_inner", "out_outer", "out_inner", "chunks",
        "advantage_sequence", "advantage_token", "sampler_sequence", "sampler_token", "given", "kl_estimator",
        "kl_bias_correction",
    ]
)  # fmt: skip
def gradient_in_forward_kernel(
    logits_ptr, target_ptr, mask_ptr, temperature_ptr, advantage_ptr, old_ptr, ref_ptr, sampler_ptr, cutoff_ptr,
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
    softcap,
    logit_scale: tl.float32,
    advantage_sequence: tl.int64,
    advantage_token: tl.int64,
    sampler_sequence: tl.int64,
    sampler_token: tl.int64,
    given: tl.int32,
    low: tl.float32,
    gain: tl.float32,
    loss_bound: tl.float32,
    max_log_ratio: tl.float32,
    kl_estimator: tl.int32,
    kl_bias_correction: tl.int32,
    beta: tl.float32,
    CISPO: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK_V: tl.constexpr,
):  # fmt: skip
    """Grid (N,). weight [2, B] multiplies the coefficients of logp and of entropy in a sequence.

    temperature_ptr, softcap and g_entropy_ptr (without an entropy bonus) may be None. old_ptr, sampler_ptr and
    cutoff_ptr are read if their bit is in `given`, ref_ptr if kl_estimator is above 0.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = row_at(logits_ptr, row_offset(row, rows_inner, stride_outer, stride_inner), ALIGNED)
    out_ptr = row_at(grad_ptr, row_offset(row, rows_inner, out_outer, out_inner), ALIGNED)
    target = tl.load(target_ptr + row)
    inside = (target >= 0) & (target < V)
    scale, k = scales(row, temperature, temperature_ptr, softcap, logit_scale)
    logp = 0.0
    entropy = 0.0
    coef = 0.0
    g_entropy = 0.0
    m = -float("inf")
    log_s = 0.0
    if tl.load(mask_ptr + row) != 0:
        s = 0.0
        w = 0.0
        q = 0.0
        for chunk in range(chunks):
            m_c, s_c, w_c, q_c, _, _ = chunk_stats(
                row_ptr, chunk * CHUNK_V, tl.minimum(V, (chunk + 1) * CHUNK_V), V, stride_v, target, k, softcap,
                logit_scale, False, ALIGNED, BLOCK_V,
            )  # fmt: skip
            m, s, w, q = merge(m, s, w, q, m_c, s_c, w_c, q_c, k, False)
        u_target = target_u(row_ptr, stride_v, target, inside, softcap, logit_scale)
        m, log_s, s, w, q = add_target(m, s, w, q, u_target, k, False)
        logp = tl.where(inside, (u_target - m) * scale - log_s * LN_2, float("nan"))
        entropy = (log_s - w / s) * LN_2

        sequence = row // T
        token = row - sequence * T
        advantage = tl.load(advantage_ptr + sequence * advantage_sequence + token * advantage_token)
        old_logp = tl.load(old_ptr + row, mask=(given & OLD) != 0, other=0.0)
        old_logp = tl.where((given & OLD) != 0, old_logp, logp)
        log_ratio = clamped(minus(logp, old_logp), -max_log_ratio, max_log_ratio)
        cutoff = tl.load(cutoff_ptr, mask=(given & CUTOFF) != 0, other=-float("inf"))
        kept = is_kept(entropy, row, cutoff, row)
        sampler_row_ptr = sampler_ptr + sequence * sampler_sequence + token * sampler_token
        sampler = tl.load(sampler_row_ptr, mask=(given & SAMPLER) != 0, other=1.0)
        _, coef, _ = surrogate(
            log_ratio, logp, advantage, kept & (sampler != 0.0), sampler, low, gain, loss_bound, max_log_ratio, CISPO
        )
        if kl_estimator > 0:
            difference = minus(tl.load(ref_ptr + row), logp)
            _, kl_slope, _ = divergence(
                difference, True, log_ratio, max_log_ratio, kl_estimator, kl_bias_correction != 0, True
            )
            coef += beta * kl_slope
        weight = tl.load(weight_ptr + sequence)
        coef = tl.where(coef == 0.0, 0.0, coef * weight)
        if g_entropy_ptr is not None:
            g_entropy = tl.where(kept, tl.load(weight_ptr + tl.num_programs(0) // T + sequence), 0.0)
    # Stored before the gradient is written, to hold less in registers meanwhile.
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(saved_ptr + row, m)
    tl.store(saved_ptr + tl.num_programs(0) + row, log_s)
    tl.store(saved_ptr + 2 * tl.num_programs(0) + row, logp)
    tl.store(coef_ptr + row, coef)
    if g_entropy_ptr is not None:
        tl.store(g_entropy_ptr + row, g_entropy)
    if (coef == 0.0) & (g_entropy == 0.0):
        write_zeros(out_ptr, 0, V, V, out_v, BLOCK_V)
    else:
        own, level, slope = coefs_of_row(coef, g_entropy, 0.0, logp, entropy, scale)
        level = tl.where(inside, level, float("nan"))
        write_gradient(
            row_ptr, out_ptr, 0, V, V, stride_v, out_v, target, own, level, slope, m, log_s, k, softcap, logit_scale,
            g_entropy_ptr is not None, BLOCK_V,
        )  # fmt: skip


def gradient_in_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    transform: tuple[torch.Tensor | float, float | None, float],
    tensors: LossTensors,
    settings: TokenSettings,
    *,
    block_v: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return (grad like logits, logp [B, T], entropy [B, T], saved [3, N], g_logp [N], g_entropy [N] or None).

    logits is [B, T, V] with N = B T >= 1; target and mask are [B, T] and contiguous; transform is as for
    `token_stats_forward`. `token_stats_backward` reads the results from saved on. Settings of a sequence and of the
    denominator are not read, because `weight` contains them.
    """
    B, T = mask.shape
    rows = Rows(logits)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    out = Rows(grad)
    logp, entropy = (torch.empty((B, T), dtype=torch.float32, device=logits.device) for _ in range(2))
    saved = torch.empty((3, B * T), dtype=torch.float32, device=logits.device)
    coef = torch.empty(B * T, dtype=torch.float32, device=logits.device)
    g_entropy = torch.empty_like(coef) if settings.entropy_coef != 0.0 else None
    BLOCK_V, CHUNK_V, chunks, num_warps = launch_shape("statistics", logits, rows.V, block_v)
    aligned = rows.aligned() and out.aligned()
    temperature, softcap, logit_scale = transform
    temperature_ptr, temperature = per_row(temperature)
    advantage, old_logp, ref_logp, sampler_ratio, cutoff, weight = tensors
    bits = ((old_logp, OLD), (sampler_ratio, SAMPLER), (cutoff, CUTOFF))
    given = sum(bit.value for x, bit in bits if x is not None)
    old_logp, ref_logp, sampler_ptr, cutoff = (
        weight if x is None else x for x in (old_logp, ref_logp, sampler_ratio, cutoff)
    )
    with device_of(logits):
        gradient_in_forward_kernel[(B * T,)](
            rows.tensor, target, mask, temperature_ptr, advantage, old_logp, ref_logp, sampler_ptr, cutoff, weight,
            logp, entropy, saved, coef, g_entropy, out.tensor, rows.V, T, rows.inner, rows.stride_outer,
            rows.stride_inner, rows.stride_v, out.stride_outer, out.stride_inner, out.stride_v, chunks, temperature,
            softcap if softcap is None else float(softcap), float(logit_scale), *token_strides(advantage, T),
            *token_strides(sampler_ratio, T), given, settings.low, settings.gain, settings.loss_bound,
            settings.max_log_ratio, 0 if tensors.ref_logp is None else int(settings.kl_estimator),
            int(settings.kl_bias_correction), settings.beta,
            CISPO=bool(settings.cispo),
            ALIGNED=aligned,
            BLOCK_V=BLOCK_V,
            CHUNK_V=CHUNK_V,
            num_warps=num_warps,
            **registers(logits, num_warps, simple=aligned and softcap is None, most=64),
        )  # fmt: skip
    return grad, logp, entropy, saved, coef, g_entropy
