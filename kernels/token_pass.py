"""This Triton kernel, the token pass, computes loss, metrics and one coefficient per token from [B, T] tokens.

It is the kernel that knows reinforcement learning. A program takes one sequence and computes its ratios, clips,
selections, KL, loss and metrics. It stores each token's d loss / d logp, up to the common factor `scale`, for the
backward of the vocabulary. The program that finishes last adds up the results of all, in the order of the sequences. So
there is one launch, no float atomics, and the same bits every time. Little data moves per token, so unused parts of a
loss are skipped at run time, and a new setting compiles nothing.

Bytes per token: 4 for each of logp, old_logp, ref_logp, sampler_logp, entropy, per-token advantage and per-token
sampler ratio that is given, 1 for the mask, and 4 written. Some are read twice, if the tokens of a sequence need its
statistics first.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rlloss.kernels.launch import device_of, jit, registers
from rlloss.kernels.surrogates import clamped, clip_flags, divergence, is_kept, minus, surrogate

BLOCK_T = 512
NUM_WARPS = 8
NONE = float("nan")  # stands for no bound

# Partial results of a sequence, and the names of their sums.
SUMS = (
    "loss", "surrogate", "kl", "tokens", "sequences", "kept", "live", "ratios", "ratio", "clip_low", "clip_high",
    "clip_region", "entropy", "entropy_kept",
)  # fmt: skip
# The sums, then extreme shares of clipped tokens in a sequence, cutoff times tokens, 1 / denominator, 1 / kept tokens.
SUMMARY = (*SUMS, "clip_low_min", "clip_high_max", "entropy_cutoff", "scale", "kept_scale")
FIELDS = 16  # a power of two that holds the sums and the two shares
N_SUMS: tl.constexpr = tl.constexpr(len(SUMS))
LOSS: tl.constexpr = tl.constexpr(SUMMARY.index("loss"))
SURROGATE: tl.constexpr = tl.constexpr(SUMMARY.index("surrogate"))
KL: tl.constexpr = tl.constexpr(SUMMARY.index("kl"))
TOKENS: tl.constexpr = tl.constexpr(SUMMARY.index("tokens"))
SEQUENCES: tl.constexpr = tl.constexpr(SUMMARY.index("sequences"))
KEPT: tl.constexpr = tl.constexpr(SUMMARY.index("kept"))
LIVE: tl.constexpr = tl.constexpr(SUMMARY.index("live"))
RATIOS: tl.constexpr = tl.constexpr(SUMMARY.index("ratios"))
RATIO: tl.constexpr = tl.constexpr(SUMMARY.index("ratio"))
CLIP_LOW: tl.constexpr = tl.constexpr(SUMMARY.index("clip_low"))
CLIP_HIGH: tl.constexpr = tl.constexpr(SUMMARY.index("clip_high"))
CLIP_REGION: tl.constexpr = tl.constexpr(SUMMARY.index("clip_region"))
ENTROPY: tl.constexpr = tl.constexpr(SUMMARY.index("entropy"))
ENTROPY_KEPT: tl.constexpr = tl.constexpr(SUMMARY.index("entropy_kept"))
LOW_SHARE: tl.constexpr = tl.constexpr(SUMMARY.index("clip_low_min"))
HIGH_SHARE: tl.constexpr = tl.constexpr(SUMMARY.index("clip_high_max"))
CUTOFF: tl.constexpr = tl.constexpr(SUMMARY.index("entropy_cutoff"))
SCALE: tl.constexpr = tl.constexpr(SUMMARY.index("scale"))
KEPT_SCALE: tl.constexpr = tl.constexpr(SUMMARY.index("kept_scale"))
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
EVERY_INDEX: tl.constexpr = tl.constexpr(2**63 - 1)


class TokenTensors(NamedTuple):
    """Inputs of the token pass, contiguous, floats in fp32, with B, T >= 1.

    logp, old_logp, ref_logp, behavior_logp and entropy are `[B, T]`, advantage and sampler_ratio `[B, T]` or `[B, 1]`,
    mask is `[B, T]` bool. cutoff (0-d) and last (0-d int64, of exact-k) select by entropy; None: every token.
    denominator is 0-d, or None for that of the settings.
    """

    logp: torch.Tensor
    advantage: torch.Tensor
    mask: torch.Tensor
    old_logp: torch.Tensor | None = None
    ref_logp: torch.Tensor | None = None
    sampler_ratio: torch.Tensor | None = None
    behavior_logp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    cutoff: torch.Tensor | None = None
    last: torch.Tensor | None = None
    denominator: torch.Tensor | None = None


class TokenSettings(NamedTuple):
    """Settings as numbers only, so that an operator can take them as one list. A NaN stands for no bound."""

    cispo: float
    low: float
    high: float
    """Bounds beyond which the metrics count a token as clipped, 1 - epsilon_low and 1 + epsilon_high, or the cap."""
    gain: float
    """Largest ratio where the advantage is above 0, or the cap."""
    loss_bound: float
    """Largest ratio where the advantage is below 0."""
    delta: float = NONE
    max_log_ratio: float = NONE
    sequence: float = 0.0
    """Not 0 if a sequence has one ratio."""
    mean_of_sequence: float = 0.0
    kept_counts: float = 0.0
    """Not 0 if means divide by the number of kept tokens; else by the number of tokens that count."""
    denominator: float = 0.0
    """Divisor of the loss. 0 stands for the number of those tokens."""
    kl_estimator: float = 3.0
    kl_bias_correction: float = 0.0
    beta: float = 0.0
    off_policy_threshold: float = math.inf
    entropy_coef: float = 0.0


@triton.jit
def _add_up(
    partial_ptr, loss_ptr, summary_ptr, B, cutoff, denominator, kept_counts, entropy_coef, FIELDS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Add up partial [B, FIELDS] in the order of B."""
    fields = tl.arange(0, FIELDS)
    sums = tl.zeros((BLOCK_B, FIELDS), tl.float32)
    least = tl.full((BLOCK_B,), float("inf"), tl.float32)
    most = tl.full((BLOCK_B,), -float("inf"), tl.float32)
    for first in range(0, B, BLOCK_B):
        rows = (first + tl.arange(0, BLOCK_B)).to(tl.int64)
        inside = rows < B
        # Other programs wrote these values, so they are read from L2 and not from this processor's own cache.
        tile = partial_ptr + rows[:, None] * FIELDS + fields[None, :]
        sums += tl.load(tile, mask=inside[:, None] & (fields < N_SUMS)[None, :], other=0.0, cache_modifier=".cg")
        share_ptr = partial_ptr + rows * FIELDS
        low = tl.load(share_ptr + LOW_SHARE, mask=inside, other=float("inf"), cache_modifier=".cg")
        high = tl.load(share_ptr + HIGH_SHARE, mask=inside, other=-float("inf"), cache_modifier=".cg")
        least = tl.minimum(least, low)
        most = tl.maximum(most, high)
    totals = tl.sum(sums, axis=0)
    tl.store(summary_ptr + fields, totals, mask=fields < N_SUMS)
    loss = tl.sum(tl.where(fields == LOSS, totals, 0.0), axis=0)
    tokens = tl.sum(tl.where(fields == TOKENS, totals, 0.0), axis=0)
    kept = tl.sum(tl.where(fields == KEPT, totals, 0.0), axis=0)
    ratios = tl.sum(tl.where(fields == RATIOS, totals, 0.0), axis=0)
    entropy_kept = tl.sum(tl.where(fields == ENTROPY_KEPT, totals, 0.0), axis=0)
    counted = tl.where(kept_counts != 0, kept, tokens)
    denominator = tl.where(denominator == 0.0, counted, denominator)
    denominator = tl.where(counted == 0.0, 1.0, denominator)
    kept_scale = 1.0 / tl.maximum(kept, 1.0)
    bonus = tl.where(entropy_coef == 0.0, 0.0, entropy_coef * (entropy_kept * kept_scale))
    tl.store(loss_ptr, loss / denominator - bonus)
    tl.store(summary_ptr + LOW_SHARE, tl.where(ratios > 0.0, tl.min(least, axis=0), float("nan")))
    tl.store(summary_ptr + HIGH_SHARE, tl.where(ratios > 0.0, tl.max(most, axis=0), float("nan")))
    tl.store(summary_ptr + CUTOFF, tl.where(tokens > 0.0, cutoff, 0.0) * tokens)
    tl.store(summary_ptr + SCALE, 1.0 / denominator)
    tl.store(summary_ptr + KEPT_SCALE, kept_scale)


@jit(
    do_not_specialize=[
        "B", "T", "advantage_row", "advantage_token", "sampler_row", "sampler_token", "look_ahead", "sequence",
        "mean_of_sequence", "kept_counts", "kl_estimator", "kl_bias_correction",
    ]
)  # fmt: skip
def token_pass_kernel(
    logp_ptr, advantage_ptr, mask_ptr, old_ptr, ref_ptr, sampler_ptr, behavior_ptr, entropy_ptr, cutoff_ptr, last_ptr,
    denominator_ptr, coef_ptr, kept_ptr, partial_ptr, ticket_ptr, loss_ptr, summary_ptr,
    B: tl.int32,
    T: tl.int32,
    advantage_row: tl.int32,
    advantage_token: tl.int32,
    sampler_row: tl.int32,
    sampler_token: tl.int32,
    low: tl.float32,
    high: tl.float32,
    gain: tl.float32,
    loss_bound: tl.float32,
    delta: tl.float32,
    max_log_ratio: tl.float32,
    look_ahead: tl.int32,
    sequence: tl.int32,
    mean_of_sequence: tl.int32,
    kept_counts: tl.int32,
    denominator: tl.float32,
    kl_estimator: tl.int32,
    kl_bias_correction: tl.int32,
    beta: tl.float32,
    off_policy_threshold: tl.float32,
    entropy_coef: tl.float32,
    CISPO: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Grid (B,). All [B, T] tensors are contiguous. partial [B, FIELDS] and ticket (0) are scratch.

    sampler_ptr, cutoff_ptr, last_ptr, denominator_ptr and kept_ptr may be None. With kl_estimator 0 ref_ptr is not
    read. look_ahead tells whether the tokens of a sequence need its statistics first.
    """
    row = tl.program_id(0).to(tl.int64)
    base = row * T
    lanes = tl.arange(0, BLOCK_T)
    cutoff = -float("inf")
    last = EVERY_INDEX
    if cutoff_ptr is not None:
        cutoff = tl.load(cutoff_ptr)
    if last_ptr is not None:
        last = tl.load(last_ptr)
    per_token = sequence == 0

    n = 0
    n_kept = 0
    drift = 0.0
    sequence_log_ratio = 0.0
    if look_ahead != 0:
        count = tl.zeros((BLOCK_T,), tl.int32)
        count_kept = tl.zeros((BLOCK_T,), tl.int32)
        total = tl.zeros((BLOCK_T,), tl.float32)
        total_drift = tl.zeros((BLOCK_T,), tl.float32)
        for start in range(0, T, BLOCK_T):
            t = start + lanes
            counts = tl.load(mask_ptr + base + t, mask=t < T, other=0) != 0
            logp = tl.load(logp_ptr + base + t, mask=counts, other=0.0)
            entropy = tl.load(entropy_ptr + base + t, mask=counts, other=0.0)
            count += counts.to(tl.int32)
            count_kept += (counts & is_kept(entropy, base + t, cutoff, last)).to(tl.int32)
            old_logp = tl.load(old_ptr + base + t, mask=counts & (sequence != 0), other=0.0)
            total += minus(logp, old_logp)
            apart = tl.load(behavior_ptr + base + t, mask=counts, other=0.0) - logp
            total_drift += tl.where(apart == apart, clamped(apart, -LARGEST, LARGEST), 0.0)
        n = tl.sum(count, axis=0)
        n_kept = tl.sum(count_kept, axis=0)
        drift = tl.sum(total_drift, axis=0) / tl.maximum(n, 1).to(tl.float32)
        sequence_log_ratio = tl.sum(total, axis=0) / tl.maximum(n, 1).to(tl.float32)
        sequence_log_ratio = clamped(sequence_log_ratio, -max_log_ratio, max_log_ratio)
    n_counted = tl.where(kept_counts != 0, n_kept, n)
    weight = tl.where(mean_of_sequence != 0, 1.0 / tl.maximum(n_counted, 1).to(tl.float32), 1.0)
    share = weight / tl.maximum(n, 1).to(tl.float32)  # the geometric mean gives each token 1 / n of a slope

    s_loss = tl.zeros((BLOCK_T,), tl.float32)
    s_surrogate = tl.zeros((BLOCK_T,), tl.float32)
    s_kl = tl.zeros((BLOCK_T,), tl.float32)
    s_entropy = tl.zeros((BLOCK_T,), tl.float32)
    s_entropy_kept = tl.zeros((BLOCK_T,), tl.float32)
    s_ratio = tl.zeros((BLOCK_T,), tl.float32)
    s_slope = tl.zeros((BLOCK_T,), tl.float32)
    c_tokens = tl.zeros((BLOCK_T,), tl.int32)
    c_kept = tl.zeros((BLOCK_T,), tl.int32)
    c_live = tl.zeros((BLOCK_T,), tl.int32)
    c_low = tl.zeros((BLOCK_T,), tl.int32)
    c_high = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(0, T, BLOCK_T):
        t = start + lanes
        counts = tl.load(mask_ptr + base + t, mask=t < T, other=0) != 0
        logp = tl.load(logp_ptr + base + t, mask=counts, other=0.0)
        advantage = tl.load(advantage_ptr + row * advantage_row + t * advantage_token, mask=counts, other=0.0)
        old_logp = tl.load(old_ptr + base + t, mask=counts & per_token, other=0.0)
        own_log_ratio = clamped(minus(logp, old_logp), -max_log_ratio, max_log_ratio)
        log_ratio = tl.where(per_token, own_log_ratio, sequence_log_ratio)
        entropy = tl.load(entropy_ptr + base + t, mask=counts, other=0.0)
        kept = counts & is_kept(entropy, base + t, cutoff, last)
        s_entropy += entropy
        s_entropy_kept += tl.where(kept, entropy, 0.0)
        apart = tl.zeros((BLOCK_T,), tl.float32) + drift
        acts = kept & ((advantage >= 0.0) | (apart <= off_policy_threshold))
        sampler = tl.full((BLOCK_T,), 1.0, tl.float32)
        if sampler_ptr is not None:
            sampler = tl.load(sampler_ptr + row * sampler_row + t * sampler_token, mask=counts, other=0.0)
            acts = acts & (sampler != 0.0)

        loss, slope, ratio = surrogate(
            log_ratio, logp, advantage, acts, sampler, low, gain, loss_bound, max_log_ratio, CISPO
        )
        below, above = clip_flags(ratio, advantage, low, high, delta, CISPO)
        s_surrogate += loss
        s_ratio += tl.where(counts, ratio, 0.0)
        c_tokens += counts.to(tl.int32)
        c_kept += kept.to(tl.int32)
        c_low += (below & counts).to(tl.int32)
        c_high += (above & counts).to(tl.int32)

        coef = slope
        if not CISPO:
            # With one ratio per sequence, each token gets the mean of these slopes; it is added below.
            s_slope += tl.where(per_token, 0.0, slope * share)
            coef = tl.where(per_token, slope, 0.0)
        if kl_estimator > 0:
            difference = minus(tl.load(ref_ptr + base + t, mask=counts, other=0.0), logp)
            kl, kl_slope, kl_shared = divergence(
                tl.where(counts, difference, 0.0), counts, log_ratio, max_log_ratio, kl_estimator,
                kl_bias_correction != 0, per_token,
            )  # fmt: skip
            s_slope += beta * kl_shared * share
            s_kl += tl.where(counts, kl, 0.0)
            loss += tl.where(counts, beta * kl, 0.0)
            coef += beta * kl_slope
        s_loss += loss * weight
        coef *= weight
        live = coef != 0.0
        if kept_ptr is not None:
            live = live | kept
            tl.store(kept_ptr + base + t, kept.to(tl.int8), mask=t < T)
        c_live += live.to(tl.int32)
        tl.store(coef_ptr + base + t, coef, mask=t < T)

    tokens = tl.sum(c_tokens, axis=0)
    live_count = tl.sum(c_live, axis=0)
    low_count = tl.sum(c_low, axis=0)
    high_count = tl.sum(c_high, axis=0)
    ratio_sum = tl.sum(s_ratio, axis=0)
    ratio_count = tokens
    if (sequence != 0) & (advantage_token == 0) & (T != 1):
        # With one ratio and one advantage the sequence counts once, even if it is empty.
        ratio_sum = tl.exp(sequence_log_ratio)
        below, above = clip_flags(ratio_sum, tl.load(advantage_ptr + row), low, high, delta, CISPO)
        ratio_count = tl.full((), 1, tl.int32)
        low_count = below.to(tl.int32)
        high_count = above.to(tl.int32)
    slope = tl.sum(s_slope, axis=0)
    if slope != 0.0:
        tl.debug_barrier()
        c_live = tl.zeros((BLOCK_T,), tl.int32)
        for start in range(0, T, BLOCK_T):
            t = start + lanes
            counts = tl.load(mask_ptr + base + t, mask=t < T, other=0) != 0
            coef = tl.load(coef_ptr + base + t, mask=counts, other=0.0) + slope
            tl.store(coef_ptr + base + t, coef, mask=counts)
            live = counts & (coef != 0.0)
            if kept_ptr is not None:
                live = live | (tl.load(kept_ptr + base + t, mask=counts, other=0) != 0)
            c_live += live.to(tl.int32)
        live_count = tl.sum(c_live, axis=0)

    field_ptr = partial_ptr + row * FIELDS
    counted = tl.maximum(ratio_count, 1).to(tl.float32)
    tl.store(field_ptr + LOSS, tl.sum(s_loss, axis=0))
    tl.store(field_ptr + SURROGATE, tl.sum(s_surrogate, axis=0))
    tl.store(field_ptr + KL, tl.sum(s_kl, axis=0))
    tl.store(field_ptr + TOKENS, tokens.to(tl.float32))
    tl.store(field_ptr + SEQUENCES, (tokens > 0).to(tl.float32))
    tl.store(field_ptr + KEPT, tl.sum(c_kept, axis=0).to(tl.float32))
    tl.store(field_ptr + LIVE, live_count.to(tl.float32))
    tl.store(field_ptr + RATIOS, ratio_count.to(tl.float32))
    tl.store(field_ptr + RATIO, ratio_sum)
    tl.store(field_ptr + CLIP_LOW, low_count.to(tl.float32))
    tl.store(field_ptr + CLIP_HIGH, high_count.to(tl.float32))
    tl.store(field_ptr + CLIP_REGION, (low_count + high_count).to(tl.float32))
    tl.store(field_ptr + ENTROPY, tl.sum(s_entropy, axis=0))
    tl.store(field_ptr + ENTROPY_KEPT, tl.sum(s_entropy_kept, axis=0))
    tl.store(field_ptr + LOW_SHARE, tl.where(ratio_count > 0, low_count.to(tl.float32) / counted, float("inf")))
    tl.store(field_ptr + HIGH_SHARE, tl.where(ratio_count > 0, high_count.to(tl.float32) / counted, -float("inf")))

    tl.debug_barrier()  # every thread must have stored before the ticket is taken
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == B - 1:
        if denominator_ptr is not None:
            denominator = tl.load(denominator_ptr)
        _add_up(partial_ptr, loss_ptr, summary_ptr, B, cutoff, denominator, kept_counts, entropy_coef, FIELDS, BLOCK_B)


def token_pass(
    tensors: TokenTensors, settings: TokenSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return (loss 0-d, summary [len(SUMMARY)], coef [B, T], kept [B, T] bool or None without an entropy bonus).

    d loss / d logp = coef * summary["scale"]; d loss / d entropy = -entropy_coef * summary["kept_scale"] where kept.
    """
    logp, advantage, mask, old_logp, ref_logp, sampler_ratio, behavior_logp, entropy, cutoff, last, denominator = (
        tensors
    )
    s = settings
    B, T = logp.shape
    coef = torch.empty_like(logp)
    kept = torch.empty((B, T), dtype=torch.int8, device=logp.device) if s.entropy_coef != 0.0 else None
    partial = torch.empty((B, FIELDS), dtype=torch.float32, device=logp.device)
    summary = torch.empty(len(SUMMARY), dtype=torch.float32, device=logp.device)
    loss = torch.empty((), dtype=torch.float32, device=logp.device)
    ticket = torch.zeros(1, dtype=torch.int32, device=logp.device)
    look_ahead = s.sequence or s.mean_of_sequence or s.off_policy_threshold < math.inf
    # logp stands in for a missing tensor: log-ratio and drift become 0, and the value has no other use.
    old_logp, ref_logp, behavior_logp, entropy = (
        logp if x is None else x for x in (old_logp, ref_logp, behavior_logp, entropy)
    )
    with device_of(logp):
        token_pass_kernel[(B,)](
            logp, advantage, mask, old_logp, ref_logp, sampler_ratio, behavior_logp, entropy, cutoff, last,
            denominator, coef, kept, partial, ticket, loss, summary, B, T, *token_strides(advantage, T),
            *token_strides(sampler_ratio, T), s.low, s.high, s.gain, s.loss_bound, s.delta, s.max_log_ratio,
            int(look_ahead), int(s.sequence), int(s.mean_of_sequence), int(s.kept_counts), s.denominator,
            0 if tensors.ref_logp is None else int(s.kl_estimator), int(s.kl_bias_correction), s.beta,
            s.off_policy_threshold, s.entropy_coef,
            CISPO=bool(s.cispo),
            FIELDS=FIELDS,
            BLOCK_T=BLOCK_T,
            BLOCK_B=64,
            num_warps=NUM_WARPS, **registers(logp, NUM_WARPS, simple=False),
        )  # fmt: skip
    return loss, summary, coef, None if kept is None else kept.view(torch.bool)


def token_strides(x: torch.Tensor | None, T: int) -> tuple[int, int]:
    """Return the strides of x, with [B, 1] expanded to [B, T]."""
    return (0, 0) if x is None else (T, 1) if x.shape[1] == T and T > 1 else (1, 0)
