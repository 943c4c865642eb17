"""The token pass: log-probabilities and advantages of [B, T] tokens -> loss, metrics, and one coefficient per token.

The kernel that knows reinforcement learning. A program takes a sequence: its ratios, clips, selections, KL, loss and
metrics. It leaves each token's d loss / d logp, up to the common factor `scale`, for the backward of the vocabulary.
The program that finishes last adds up what the others left, in the order of the sequences: one launch, no float
atomics, the same bits every time.

Bytes a token: 4 for each of logp, old_logp, ref_logp, sampler_logp, entropy and per-token advantage or sampler ratio
that is given, 1 for the mask, 4 written, and some of it twice, where a sequence has to know itself before its tokens
can be weighed.
"""

import torch
import triton
import triton.language as tl

from rlloss.kernels.launch import device_of, registers
from rlloss.kernels.surrogates import clamped, clip_flags, divergence, is_kept, minus, surrogate

BLOCK_T = 512
NUM_WARPS = 8

# What a sequence leaves, and what their sums are called.
SUMS = (
    "loss", "surrogate", "kl", "tokens", "sequences", "kept", "live", "ratios", "ratio", "clip_low", "clip_high",
    "clip_region", "entropy", "entropy_kept",
)  # fmt: skip
# After the sums: extreme shares of clipped tokens in a sequence, cutoff times tokens, 1 / denominator, 1 / kept tokens.
SUMMARY = (*SUMS, "clip_low_min", "clip_high_max", "entropy_cutoff", "scale", "kept_scale")
FIELDS = 16  # a power of two that holds the sums and the two shares
LOW_SHARE: tl.constexpr = tl.constexpr(len(SUMS))
HIGH_SHARE: tl.constexpr = tl.constexpr(len(SUMS) + 1)
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _finish(
    partial_ptr, loss_ptr, summary_ptr, B, cutoff, denominator, entropy_coef, TOKENS: tl.constexpr,
    KEPT_COUNTS: tl.constexpr, BONUS: tl.constexpr, FIELDS: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Add up partial [B, FIELDS] in the order of B."""
    fields = tl.arange(0, FIELDS)
    sums = tl.zeros((BLOCK_B, FIELDS), tl.float32)
    least = tl.full((BLOCK_B,), float("inf"), tl.float32)
    most = tl.full((BLOCK_B,), -float("inf"), tl.float32)
    for first in range(0, B, BLOCK_B):
        rows = (first + tl.arange(0, BLOCK_B)).to(tl.int64)
        inside = rows < B
        # Other programs wrote these: read them where they arrive, not in a cache of this processor's own.
        tile = partial_ptr + rows[:, None] * FIELDS + fields[None, :]
        sums += tl.load(tile, mask=inside[:, None] & (fields < LOW_SHARE)[None, :], other=0.0, cache_modifier=".cg")
        share_ptr = partial_ptr + rows * FIELDS
        low = tl.load(share_ptr + LOW_SHARE, mask=inside, other=float("inf"), cache_modifier=".cg")
        high = tl.load(share_ptr + HIGH_SHARE, mask=inside, other=-float("inf"), cache_modifier=".cg")
        least = tl.minimum(least, low)
        most = tl.maximum(most, high)
    totals = tl.sum(sums, axis=0)
    tl.store(summary_ptr + fields, totals, mask=fields < LOW_SHARE)
    loss = tl.sum(tl.where(fields == 0, totals, 0.0), axis=0)
    tokens = tl.sum(tl.where(fields == 3, totals, 0.0), axis=0)
    kept = tl.sum(tl.where(fields == 5, totals, 0.0), axis=0)
    ratios = tl.sum(tl.where(fields == 7, totals, 0.0), axis=0)
    counted = tokens
    if KEPT_COUNTS:
        counted = kept
    if TOKENS:
        denominator = counted
    denominator = tl.where(counted == 0.0, 1.0, denominator)
    loss = loss / denominator
    kept_scale = 1.0 / tl.maximum(kept, 1.0)
    if BONUS:
        entropy_kept = tl.sum(tl.where(fields == 13, totals, 0.0), axis=0)
        loss = loss - entropy_coef * (entropy_kept * kept_scale)
    tl.store(loss_ptr, loss)
    tl.store(summary_ptr + LOW_SHARE, tl.where(ratios > 0.0, tl.min(least, axis=0), float("nan")))
    tl.store(summary_ptr + HIGH_SHARE, tl.where(ratios > 0.0, tl.max(most, axis=0), float("nan")))
    tl.store(summary_ptr + HIGH_SHARE + 1, tl.where(tokens > 0.0, cutoff, 0.0) * tokens)
    tl.store(summary_ptr + HIGH_SHARE + 2, 1.0 / denominator)
    tl.store(summary_ptr + HIGH_SHARE + 3, kept_scale)


@triton.jit(do_not_specialize=["B", "T"])
def token_pass_kernel(
    logp_ptr, advantage_ptr, mask_ptr, old_ptr, ref_ptr, sampler_ratio_ptr, behavior_ptr, entropy_ptr, cutoff_ptr,
    last_ptr, denominator_ptr, coef_ptr, kept_ptr, partial_ptr, ticket_ptr, loss_ptr, summary_ptr,
    B: tl.int32,
    T: tl.int32,
    denominator: tl.float32,
    low: tl.float32,
    high: tl.float32,
    gain: tl.float32,
    loss_bound: tl.float32,
    delta: tl.float32,
    max_log_ratio: tl.float32,
    beta: tl.float32,
    off_policy_threshold: tl.float32,
    entropy_coef: tl.float32,
    CISPO: tl.constexpr,
    SEQUENCE: tl.constexpr,
    MEAN_OF_SEQUENCE: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_DENOMINATOR: tl.constexpr,
    KEPT_COUNTS: tl.constexpr,
    HAS_OLD: tl.constexpr,
    PER_TOKEN_ADVANTAGE: tl.constexpr,
    HAS_SAMPLER_RATIO: tl.constexpr,
    PER_TOKEN_RATIO: tl.constexpr,
    KL: tl.constexpr,
    KL_BIAS_CORRECTION: tl.constexpr,
    OFF_POLICY: tl.constexpr,
    HAS_BEHAVIOR: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    SELECT: tl.constexpr,
    EXACT_K: tl.constexpr,
    BONUS: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Grid (B,). Everything [B, T] is contiguous. partial [B, FIELDS] and ticket (0) are scratch."""
    row = tl.program_id(0).to(tl.int64)
    base = row * T
    lanes = tl.arange(0, BLOCK_T)
    cutoff = 0.0
    last = tl.zeros((), tl.int64)
    if SELECT:
        cutoff = tl.load(cutoff_ptr)
        if EXACT_K:
            last = tl.load(last_ptr)

    # What a sequence has to know of itself before its tokens can be weighed.
    n = 0
    n_kept = 0
    drift = 0.0
    sequence_log_ratio = 0.0
    if SEQUENCE or MEAN_OF_SEQUENCE or OFF_POLICY:
        count = tl.zeros((BLOCK_T,), tl.int32)
        count_kept = tl.zeros((BLOCK_T,), tl.int32)
        total = tl.zeros((BLOCK_T,), tl.float32)
        total_drift = tl.zeros((BLOCK_T,), tl.float32)
        for start in range(0, T, BLOCK_T):
            t = start + lanes
            counts = tl.load(mask_ptr + base + t, mask=t < T, other=0) != 0
            count += counts.to(tl.int32)
            if KEPT_COUNTS:
                entropy = tl.load(entropy_ptr + base + t, mask=counts, other=0.0)
                kept = counts & is_kept(entropy, base + t, cutoff, last, EXACT_K)
                count_kept += kept.to(tl.int32)
            if HAS_OLD and SEQUENCE:
                logp = tl.load(logp_ptr + base + t, mask=counts, other=0.0)
                total += minus(logp, tl.load(old_ptr + base + t, mask=counts, other=0.0))
            if OFF_POLICY and HAS_BEHAVIOR:
                logp = tl.load(logp_ptr + base + t, mask=counts, other=0.0)
                apart = tl.load(behavior_ptr + base + t, mask=counts, other=0.0) - logp
                total_drift += tl.where(apart == apart, clamped(apart, -LARGEST, LARGEST), 0.0)
        n = tl.sum(count, axis=0)
        n_kept = tl.sum(count_kept, axis=0)
        drift = tl.sum(total_drift, axis=0) / tl.maximum(n, 1).to(tl.float32)
        sequence_log_ratio = tl.sum(total, axis=0) / tl.maximum(n, 1).to(tl.float32)
        sequence_log_ratio = clamped(sequence_log_ratio, -max_log_ratio, max_log_ratio)
    weight = 1.0
    if MEAN_OF_SEQUENCE:
        weight = 1.0 / tl.maximum(n, 1).to(tl.float32)
        if KEPT_COUNTS:
            weight = 1.0 / tl.maximum(n_kept, 1).to(tl.float32)
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
    c_moves = tl.zeros((BLOCK_T,), tl.int32)  # tokens that give the ratio of the sequence a gradient
    sequence_advantage = 0.0
    if not PER_TOKEN_ADVANTAGE:
        sequence_advantage = tl.load(advantage_ptr + row)
    sequence_sampler = 1.0
    if HAS_SAMPLER_RATIO and not PER_TOKEN_RATIO:
        sequence_sampler = tl.load(sampler_ratio_ptr + row)
    for start in range(0, T, BLOCK_T):
        t = start + lanes
        counts = tl.load(mask_ptr + base + t, mask=t < T, other=0) != 0
        logp = tl.load(logp_ptr + base + t, mask=counts, other=0.0)
        advantage = tl.zeros((BLOCK_T,), tl.float32) + sequence_advantage
        if PER_TOKEN_ADVANTAGE:
            advantage = tl.load(advantage_ptr + base + t, mask=counts, other=0.0)
        log_ratio = tl.zeros((BLOCK_T,), tl.float32) + sequence_log_ratio
        if HAS_OLD and not SEQUENCE:
            log_ratio = minus(logp, tl.load(old_ptr + base + t, mask=counts, other=0.0))
            log_ratio = clamped(log_ratio, -max_log_ratio, max_log_ratio)
        kept = counts
        if HAS_ENTROPY:
            entropy = tl.load(entropy_ptr + base + t, mask=counts, other=0.0)
            if SELECT:
                kept = counts & is_kept(entropy, base + t, cutoff, last, EXACT_K)
            s_entropy += entropy
            s_entropy_kept += tl.where(kept, entropy, 0.0)
        acts = kept
        if OFF_POLICY:
            apart = tl.zeros((BLOCK_T,), tl.float32) + drift
            acts = acts & ((advantage >= 0.0) | (apart <= off_policy_threshold))
        sampler = tl.zeros((BLOCK_T,), tl.float32) + sequence_sampler
        if HAS_SAMPLER_RATIO:
            if PER_TOKEN_RATIO:
                sampler = tl.load(sampler_ratio_ptr + base + t, mask=counts, other=0.0)
            acts = acts & (sampler != 0.0)

        loss, slope, live, ratio = surrogate(
            log_ratio, logp, advantage, acts, sampler, low, gain, loss_bound, max_log_ratio, HAS_SAMPLER_RATIO, CISPO
        )
        below, above = clip_flags(ratio, advantage, low, high, delta, CISPO)
        s_surrogate += loss
        s_ratio += tl.where(counts, ratio, 0.0)
        c_tokens += counts.to(tl.int32)
        c_kept += kept.to(tl.int32)
        c_low += (below & counts).to(tl.int32)
        c_high += (above & counts).to(tl.int32)

        coef = slope
        own_live = live
        if SEQUENCE and not CISPO:  # each token of the sequence gets the mean of the slopes, below
            s_slope += slope * share
            c_moves += live.to(tl.int32)
            coef = tl.zeros((BLOCK_T,), tl.float32)
            own_live = counts & (counts == 0)
        if KL > 0:
            difference = minus(tl.load(ref_ptr + base + t, mask=counts, other=0.0), logp)
            kl, kl_slope, kl_live, through = divergence(
                tl.where(counts, difference, 0.0), counts, log_ratio, ratio, max_log_ratio, KL, KL_BIAS_CORRECTION,
                not SEQUENCE,
            )  # fmt: skip
            if KL_BIAS_CORRECTION and SEQUENCE:
                s_slope += tl.where(through, beta * kl, 0.0) * share
                c_moves += through.to(tl.int32)
            s_kl += tl.where(counts, kl, 0.0)
            loss += tl.where(counts, beta * kl, 0.0)
            coef += tl.where(kl_live, beta * kl_slope, 0.0)
            own_live = own_live | kl_live
        if BONUS:
            own_live = own_live | kept
            tl.store(kept_ptr + base + t, kept.to(tl.int8), mask=t < T)
        s_loss += loss * weight
        c_live += own_live.to(tl.int32)
        tl.store(coef_ptr + base + t, coef * weight, mask=t < T)

    tokens = tl.sum(c_tokens, axis=0)
    live_count = tl.sum(c_live, axis=0)
    low_count = tl.sum(c_low, axis=0)
    high_count = tl.sum(c_high, axis=0)
    ratio_sum = tl.sum(s_ratio, axis=0)
    ratio_count = tokens
    if SEQUENCE and not PER_TOKEN_ADVANTAGE:
        if T != 1:  # one ratio and one advantage: the sequence is counted once, also when it is empty
            ratio_sum = tl.exp(sequence_log_ratio)
            below, above = clip_flags(ratio_sum, sequence_advantage, low, high, delta, CISPO)
            ratio_count = tokens * 0 + 1
            low_count = below.to(tl.int32)
            high_count = above.to(tl.int32)
    if SEQUENCE:
        slope = tl.sum(s_slope, axis=0)
        if tl.sum(c_moves, axis=0) > 0:
            live_count = tokens
            tl.debug_barrier()
            for start in range(0, T, BLOCK_T):
                t = start + lanes
                counts = tl.load(mask_ptr + base + t, mask=t < T, other=0) != 0
                coef = tl.load(coef_ptr + base + t, mask=counts, other=0.0)
                tl.store(coef_ptr + base + t, coef + slope, mask=counts)

    field_ptr = partial_ptr + row * FIELDS
    counted = tl.maximum(ratio_count, 1).to(tl.float32)
    tl.store(field_ptr, tl.sum(s_loss, axis=0))
    tl.store(field_ptr + 1, tl.sum(s_surrogate, axis=0))
    tl.store(field_ptr + 2, tl.sum(s_kl, axis=0))
    tl.store(field_ptr + 3, tokens.to(tl.float32))
    tl.store(field_ptr + 4, (tokens > 0).to(tl.float32))
    tl.store(field_ptr + 5, tl.sum(c_kept, axis=0).to(tl.float32))
    tl.store(field_ptr + 6, live_count.to(tl.float32))
    tl.store(field_ptr + 7, ratio_count.to(tl.float32))
    tl.store(field_ptr + 8, ratio_sum)
    tl.store(field_ptr + 9, low_count.to(tl.float32))
    tl.store(field_ptr + 10, high_count.to(tl.float32))
    tl.store(field_ptr + 11, (low_count + high_count).to(tl.float32))
    tl.store(field_ptr + 12, tl.sum(s_entropy, axis=0))
    tl.store(field_ptr + 13, tl.sum(s_entropy_kept, axis=0))
    tl.store(field_ptr + LOW_SHARE, tl.where(ratio_count > 0, low_count.to(tl.float32) / counted, float("inf")))
    tl.store(field_ptr + HIGH_SHARE, tl.where(ratio_count > 0, high_count.to(tl.float32) / counted, -float("inf")))

    tl.debug_barrier()  # every thread has stored before one of them says so
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == B - 1:
        if HAS_DENOMINATOR:
            denominator = tl.load(denominator_ptr)
        _finish(
            partial_ptr, loss_ptr, summary_ptr, B, cutoff, denominator, entropy_coef, TOKENS, KEPT_COUNTS, BONUS,
            FIELDS, BLOCK_B,
        )  # fmt: skip


def token_pass(
    logp: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    old_logp: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    sampler_ratio: torch.Tensor | None,
    behavior_logp: torch.Tensor | None,
    entropy: torch.Tensor | None,
    cutoff: torch.Tensor | None,
    last: torch.Tensor | None,
    denominator: torch.Tensor | float | None,
    *,
    cispo: bool,
    sequence: bool,
    mean_of_sequence: bool,
    kept_counts: bool,
    low: float,
    high: float,
    gain: float,
    loss_bound: float,
    delta: float | None,
    max_log_ratio: float | None,
    beta: float,
    kl_estimator: int,
    kl_bias_correction: bool,
    off_policy_threshold: float | None,
    entropy_coef: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss 0-d, summary [len(SUMMARY)], coef [B, T], kept [B, T] bool or empty without an entropy bonus).

    d loss / d logp = coef * summary["scale"]; d loss / d entropy = -entropy_coef * summary["kept_scale"] where kept.

    logp, old_logp, ref_logp, behavior_logp, entropy [B, T], advantage and sampler_ratio [B, T] or [B, 1], all
    contiguous fp32 with B, T >= 1; mask [B, T] bool. cutoff (fp32) and last (int64, exact-k) are what selects by
    entropy, None: every token. behavior_logp is read only with an off_policy_threshold. denominator None: the number
    of tokens, of kept ones with kept_counts. kl_estimator 1, 2 or 3; beta 0: no KL.
    """
    B, T = logp.shape
    device = logp.device
    tensors = (logp, advantage, mask, old_logp, ref_logp, sampler_ratio, behavior_logp, entropy, cutoff)
    has_denominator = isinstance(denominator, torch.Tensor)
    bonus = entropy_coef != 0.0
    coef = torch.empty_like(logp)
    kept = torch.empty((B, T) if bonus else (0,), dtype=torch.int8, device=device)
    partial = torch.empty((B, FIELDS), dtype=torch.float32, device=device)
    summary = torch.empty(len(SUMMARY), dtype=torch.float32, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    ticket = torch.zeros(1, dtype=torch.int32, device=device)
    nothing = float("nan")
    with device_of(logp):
        token_pass_kernel[(B,)](
            *(logp if x is None else x for x in tensors),
            ticket if last is None else last,
            denominator if has_denominator else logp,
            coef, kept, partial, ticket, loss, summary, B, T,
            1.0 if denominator is None or has_denominator else float(denominator),
            low, high, gain, loss_bound,
            nothing if delta is None else float(delta),
            nothing if max_log_ratio is None else float(max_log_ratio),
            beta,
            nothing if off_policy_threshold is None else float(off_policy_threshold),
            entropy_coef,
            CISPO=cispo,
            SEQUENCE=sequence,
            MEAN_OF_SEQUENCE=mean_of_sequence,
            TOKENS=denominator is None,
            HAS_DENOMINATOR=has_denominator,
            KEPT_COUNTS=kept_counts,
            HAS_OLD=old_logp is not None,
            PER_TOKEN_ADVANTAGE=advantage.shape[1] == T and T > 1,
            HAS_SAMPLER_RATIO=sampler_ratio is not None,
            PER_TOKEN_RATIO=sampler_ratio is not None and sampler_ratio.shape[1] == T and T > 1,
            KL=kl_estimator if ref_logp is not None else 0,
            KL_BIAS_CORRECTION=kl_bias_correction,
            OFF_POLICY=off_policy_threshold is not None,
            HAS_BEHAVIOR=behavior_logp is not None,
            HAS_ENTROPY=entropy is not None,
            SELECT=cutoff is not None,
            EXACT_K=last is not None,
            BONUS=bonus,
            FIELDS=FIELDS,
            BLOCK_T=BLOCK_T,
            BLOCK_B=64,
            num_warps=NUM_WARPS, **registers(logp, NUM_WARPS, simple=False),
        )  # fmt: skip
    return loss, summary, coef, kept.view(torch.bool)
