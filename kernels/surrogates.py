"""What one token's log-ratio, advantage and entropy make of it: the formulas of the token pass, as jit helpers."""

import triton
import triton.language as tl

FAR: tl.constexpr = tl.constexpr(80.0)  # e^80 and e^-80 are normal numbers


@triton.jit
def clamped(x, low, high):
    """x within [low, high]; NaN stays NaN."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def minus(a, b):
    """a - b of log-probabilities, 0 where both are -inf: they agree."""
    same = a == b
    return tl.where(same, 0.0, a) - tl.where(same, 0.0, b)


@triton.jit
def surrogate(
    log_ratio, logp, advantage, acts, weight, low, gain, loss, max_log_ratio, WEIGHTED: tl.constexpr,
    CISPO: tl.constexpr,
):  # fmt: skip
    """(loss, d loss / d log ratio or for CISPO d loss / d logp, live, ratio).

    Clip: the ratio is bounded by `gain` where A > 0, by [low, loss] where A < 0. CISPO: `gain` caps the weight. A
    max_log_ratio of NaN is none. WEIGHTED: loss and slope are multiplied by `weight`, which may be near 0 where the
    ratio is beyond fp32: where the ratio moves, their product is that of e^(log ratio within +-FAR) and the rest.
    Written so that a NaN ratio or advantage is live, and a factor of 0 is never multiplied by an overflow.
    """
    ratio = tl.exp(log_ratio)
    moving = ratio
    if WEIGHTED:
        weight = tl.where(acts, weight, 0.0)
        near = clamped(log_ratio, -FAR, FAR)
        moving = tl.exp(near)
        beyond = tl.exp(clamped(log_ratio - near, -1000.0, 1000.0))
        scale = tl.where(acts, weight * tl.where(acts, beyond, 1.0), 0.0)
    moves = acts & (advantage != 0.0)
    if CISPO:
        capped = ratio > gain
        coef = tl.where(capped, gain, moving)
        if WEIGHTED:
            coef *= tl.where(capped, weight, scale)
        live = moves & (coef != 0.0)
        slope = tl.where(live, -(tl.where(live, coef, 0.0) * advantage), 0.0)
        value = tl.where(live, slope * logp, 0.0)
    else:
        upper = tl.where(advantage > 0.0, gain, loss)
        lower = tl.where(advantage < 0.0, low, 0.0)
        clipped = (ratio > upper) | (ratio < lower) | (tl.abs(log_ratio) >= max_log_ratio)
        live = moves & (clipped == 0)
        slope = tl.where(live, -advantage * tl.where(live, moving, 0.0), 0.0)
        frozen = tl.where(advantage == 0.0, 1.0, clamped(ratio, lower, upper))
        value = tl.where(acts, -advantage * tl.where(live, 0.0, frozen), 0.0)
        if WEIGHTED:
            slope = tl.where(live, slope * tl.where(live, scale, 0.0), 0.0)
            value *= weight
        live = live & (slope != 0.0)
        value = tl.where(live, slope, value)
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
def divergence(
    difference, counts, log_ratio, ratio, max_log_ratio, KL: tl.constexpr, BIAS_CORRECTION: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """(KL, d KL / d logp, live, whether it moves the ratio) from ref_logp - logp by the estimator k1, k2 or k3.

    The difference is within +-max_log_ratio (NaN: none), a constant from there on. BIAS_CORRECTION: the KL is
    multiplied by the ratio, and the slope is through the ratio too if that is the token's own (PER_TOKEN). e^difference
    may be infinite where the ratio is 0: there their product is formed from the sum of the exponents.
    """
    free = counts & ((tl.abs(difference) >= max_log_ratio) == 0)
    d = clamped(difference, -max_log_ratio, max_log_ratio)
    if KL == 1:
        apart = counts
        kl = -d
        slope = tl.where(counts, 1.0, 0.0)
    elif KL == 2:
        apart = counts & (d != 0.0)
        kl = d * d * 0.5
        slope = -d
    else:
        e = tl.exp(d)
        apart = counts & (d != 0.0) & (e != 1.0)
        kl = e - d - 1.0
        slope = 1.0 - e
    through = counts & (counts == 0)
    if BIAS_CORRECTION:
        through = apart & ((tl.abs(log_ratio) >= max_log_ratio) == 0)
        weight = tl.where(apart, ratio, 0.0)
        if KL == 3:
            steep = apart & (d > 1.0) & (log_ratio < 0.0)
            both = tl.exp(tl.where(steep, d + log_ratio, 0.0))
            kl = tl.where(steep, both - (1.0 + d) * weight, tl.where(steep, 0.0, kl) * weight)
            slope = tl.where(steep, weight - both, tl.where(steep, 0.0, slope) * weight)
        else:
            kl = kl * weight
            slope = slope * weight
        kl = tl.where(apart, kl, 0.0)
        through = through & (kl != 0.0)
        slope = tl.where(free, slope, 0.0)
        if PER_TOKEN:
            moved = slope + kl
            if KL == 3:
                moved = tl.where(free, -d * weight, moved)  # without the cancellation
            slope = tl.where(through, moved, slope)
    slope = tl.where(apart & (free | through), slope, 0.0)
    return kl, slope, slope != 0.0, through


@triton.jit
def is_kept(entropy, index, cutoff, last, EXACT_K: tl.constexpr):
    """Tokens of the highest entropies; a NaN entropy is kept, so that it shows."""
    broken = entropy != entropy
    if EXACT_K:
        return (entropy > cutoff) | ((entropy == cutoff) & (index <= last)) | broken
    else:
        return (entropy >= cutoff) | broken
