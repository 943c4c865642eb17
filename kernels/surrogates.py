"""These jit helpers compute loss, slope, clip flags and KL of one token for the Triton kernels."""

import triton
import triton.language as tl

FAR: tl.constexpr = tl.constexpr(80.0)  # e^80 and e^-80 are normal numbers of fp32


@triton.jit
def clamped(x, low, high):
    """Clamp x to [low, high]. NaN stays NaN; a bound of NaN is no bound."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def minus(a, b):
    """Return a - b of log-probabilities, with 0 where both are -inf, because they agree there."""
    same = a == b
    return tl.where(same, 0.0, a) - tl.where(same, 0.0, b)


@triton.jit
def free(log_ratio, max_log_ratio):
    """Return where the log-ratio is inside the bound (NaN: no bound). A NaN log-ratio counts as inside."""
    return (tl.abs(log_ratio) >= max_log_ratio) == 0


@triton.jit
def surrogate(log_ratio, logp, advantage, acts, weight, low, gain, loss, max_log_ratio, CISPO: tl.constexpr):
    """Return (loss, d loss / d log ratio or for CISPO d loss / d logp, ratio).

    Clip bounds the ratio by `gain` where A > 0 and by [low, loss] where A < 0. CISPO caps the ratio at `gain`. Loss and
    slope are multiplied by `weight`, which may be near 0 where the ratio is beyond fp32. Where the ratio moves, the
    product is therefore formed from e^(log ratio within +-FAR) and the rest. A factor of 0 is never multiplied by an
    overflow. A NaN ratio or advantage gives a slope of NaN.
    """
    ratio = tl.exp(log_ratio)
    weight = tl.where(acts, weight, 0.0)
    near = clamped(log_ratio, -FAR, FAR)
    moving = tl.exp(near)
    beyond = tl.exp(clamped(log_ratio - near, -1000.0, 1000.0))
    scale = tl.where(acts, weight * tl.where(acts, beyond, 1.0), 0.0)
    moves = acts & (advantage != 0.0)
    if CISPO:
        capped = ratio > gain
        coef = tl.where(capped, gain, moving) * tl.where(capped, weight, scale)
        moves = moves & (coef != 0.0)
        slope = tl.where(moves, -(tl.where(moves, coef, 0.0) * advantage), 0.0)
        value = tl.where(moves, slope * logp, 0.0)
    else:
        upper = tl.where(advantage > 0.0, gain, loss)
        lower = tl.where(advantage < 0.0, low, 0.0)
        moves = moves & ((ratio > upper) == 0) & ((ratio < lower) == 0) & free(log_ratio, max_log_ratio)
        slope = tl.where(moves, -advantage * tl.where(moves, moving, 0.0), 0.0)
        slope = tl.where(moves, slope * tl.where(moves, scale, 0.0), 0.0)
        frozen = tl.where(advantage == 0.0, 1.0, clamped(ratio, lower, upper))
        value = tl.where(acts, -advantage * tl.where(moves, 0.0, frozen), 0.0) * weight
        value = tl.where(moves, slope, value)
    return value, slope, ratio


@triton.jit
def clip_flags(ratio, advantage, low, high, delta, CISPO: tl.constexpr):
    """Return (clipped below, clipped above) for the metrics. `high` is 1 + epsilon_high, for CISPO the cap."""
    capped = tl.where(ratio > delta, delta, ratio)
    below = (capped < low) & (advantage < 0.0)
    if CISPO:
        below = below & False
    return below, (capped > high) & (advantage > 0.0)


@triton.jit
def k3(d):
    """Return (e^d - d - 1, 1 - e^d). Near 0 both follow from a series; see `k3` in `rlloss.losses.kl`, its twin."""
    near = tl.abs(d) < 0.5
    t = tl.where(near, d, 0.0)
    series = t * (1.0 / 40320) + 1.0 / 5040
    series = series * t + 1.0 / 720
    series = series * t + 1.0 / 120
    series = series * t + 1.0 / 24
    series = series * t + 1.0 / 6
    series = series * t + 0.5
    small = t * t * series
    e = tl.exp(tl.where(near, 0.0, d))
    return tl.where(near, small, e - d - 1.0), tl.where(near, -d - small, 1.0 - e)


@triton.jit
def divergence(difference, counts, log_ratio, max_log_ratio, estimator, corrected, per_token):
    """Return (KL, d KL / d logp, d KL / d log ratio of the sequence) from ref_logp - logp by estimator k1, k2 or k3.

    The difference is clamped to +-max_log_ratio (NaN: no bound) and is a constant beyond it. With `corrected` the KL is
    multiplied by the ratio; if that is the token's own (per_token), the slope goes through the ratio too. e^difference
    may be infinite where the ratio is 0, so their product is formed from the sum of the exponents.
    """
    moves = counts & free(difference, max_log_ratio)
    d = clamped(difference, -max_log_ratio, max_log_ratio)
    of_k3 = estimator == 3
    kl, slope = k3(tl.where(of_k3, d, 0.0))
    kl = tl.where(of_k3, kl, tl.where(estimator == 2, d * d * 0.5, -d))
    slope = tl.where(of_k3, slope, tl.where(estimator == 2, -d, 1.0))
    apart = counts & (slope != 0.0)
    corrected_here = apart & corrected
    log_r = tl.where(corrected_here, log_ratio, 0.0)
    r = tl.exp(log_r)
    steep = corrected_here & of_k3 & (d > 1.0) & (log_r < FAR)
    both = tl.exp(tl.where(steep, d + log_r, 0.0))
    value = tl.where(steep, both - (1.0 + d) * r, tl.where(steep, 0.0, kl) * r)
    value = tl.where(corrected & (apart == 0), 0.0, value)
    slope = tl.where(steep, r - both, tl.where(steep, 0.0, slope) * r)
    slope = tl.where(apart & moves, slope, 0.0)
    through = corrected_here & free(log_ratio, max_log_ratio)
    total = tl.where(of_k3 & moves, -d * r, slope + value)  # (1 - e^d) r + (e^d - d - 1) r
    return value, tl.where(through & per_token, total, slope), tl.where(through & (per_token == 0), value, 0.0)


@triton.jit
def is_kept(entropy, index, cutoff, last):
    """Return whether a token is above the cutoff, or at the cutoff with an index up to `last`. NaN is kept to show."""
    return (entropy > cutoff) | ((entropy == cutoff) & (index <= last)) | (entropy != entropy)
