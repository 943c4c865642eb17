"""What one token's log-ratio, advantage and entropy make of it: the formulas of the token pass, as jit helpers.

And what the token pass costs, in the terms of `rlloss.kernels.rows`, of N tokens, n that count, all arguments being
different tensors. `twice` is read for what a sequence has to know of itself before its tokens can be weighed, and again
with the rest; M sequences, with m tokens that count, have a ratio with a gradient, which goes to each of these tokens;
`sums` are left by the programs, and the last one adds them up.

clip_surrogate_kernel:
    looks = SEQUENCE or MEAN_OF_SEQUENCE or OFF_POLICY
    behavior = OFF_POLICY * HAS_BEHAVIOR
    twice = looks * N + 4 * n * (HAS_OLD * SEQUENCE + behavior + KEPT_COUNTS * looks)
    of_token = 4 * (1 + HAS_OLD + behavior + HAS_ENTROPY + PER_TOKEN_ADVANTAGE + PER_TOKEN_RATIO + (KL > 0))
    of_sequence = 4 * (1 - PER_TOKEN_ADVANTAGE + HAS_SAMPLER_RATIO - PER_TOKEN_RATIO)
    of_program = 4 + 4 * SELECT + 8 * EXACT_K
    sums = 64 * B
    again = twice + M * T + 4 * m + sums + of_program * (B - 1)
    read = again + N + of_token * n + of_sequence * B + of_program + 4 * HAS_DENOMINATOR
    written = (4 + BONUS) * N + 4 * m + sums + 4 * B + 80
    lanes = (T + BLOCK_T - 1) // BLOCK_T * BLOCK_T
    exponentials = B * (lanes * (1 + (KL == 3)) + SEQUENCE * (1 - PER_TOKEN_ADVANTAGE) * (T != 1))
"""

import triton
import triton.language as tl


@triton.jit
def clamped(x, low, high):
    """x within [low, high]; NaN stays NaN."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def surrogate(log_ratio, logp, advantage, acts, low, gain, loss, max_log_ratio, CISPO: tl.constexpr):
    """(loss, d loss / d log ratio or for CISPO d loss / d logp, live, ratio).

    Clip: the ratio is bounded by `gain` where A > 0, by [low, loss] where A < 0. CISPO: `gain` caps the weight. A
    max_log_ratio of NaN is none. Written so that a NaN ratio or advantage is live, and a factor of 0 is never
    multiplied by an overflow.
    """
    ratio = tl.exp(log_ratio)
    moves = acts & (advantage != 0.0)
    if CISPO:
        weight = tl.where(ratio > gain, gain, ratio)
        live = moves & (weight != 0.0)
        slope = tl.where(live, -(tl.where(live, weight, 0.0) * advantage), 0.0)
        value = tl.where(live, slope * logp, 0.0)
    else:
        upper = tl.where(advantage > 0.0, gain, loss)
        lower = tl.where(advantage < 0.0, low, 0.0)
        clipped = (ratio > upper) | (ratio < lower) | (tl.abs(log_ratio) >= max_log_ratio) | (ratio == 0.0)
        live = moves & (clipped == 0)
        slope = tl.where(live, -advantage * tl.where(live, ratio, 0.0), 0.0)
        frozen = tl.where(advantage == 0.0, 1.0, clamped(ratio, lower, upper))
        value = tl.where(acts, -advantage * tl.where(live, ratio, frozen), 0.0)
    return value, slope, live, ratio


@triton.jit
def clip_flags(ratio, advantage, low, high, delta, CISPO: tl.constexpr):
    """(clipped below, clipped above), as the metrics count them; `high` is 1 + epsilon_high, for CISPO the cap."""
    capped = tl.where(ratio > delta, delta, ratio)
    below = (capped < low) & (advantage < 0.0)
    if CISPO:
        below = capped < capped
    return below, (capped > high) & (advantage > 0.0)


@triton.jit
def divergence(difference, counts, KL: tl.constexpr):
    """(KL, d KL / d logp, live) from ref_logp - logp by the estimator k1, k2 or k3."""
    if KL == 1:
        return -difference, tl.where(counts, 1.0, 0.0), counts
    elif KL == 2:
        return difference * difference * 0.5, -difference, counts & (difference != 0.0)
    else:
        e = tl.exp(difference)
        return e - difference - 1.0, 1.0 - e, counts & (difference != 0.0) & (e != 1.0)


@triton.jit
def selected(entropy, index, cutoff, last, EXACT_K: tl.constexpr):
    """Tokens of the highest entropies; a NaN entropy is selected, so that it shows."""
    broken = entropy != entropy
    if EXACT_K:
        return (entropy > cutoff) | ((entropy == cutoff) & (index <= last)) | broken
    else:
        return (entropy >= cutoff) | broken
