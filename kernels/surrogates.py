"""What one token's log-ratio, advantage and entropy make of it: the formulas of the token pass, as jit helpers."""

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
