"""These helpers of the Triton kernels compute softmax statistics in one pass: fold logits in, merge partial results.

For u = the row's logits (after softcap) and k = log2(e) * scale / temperature > 0, a partial result over some of the
entries is, in log2 units and relative to the largest u seen so far::

    m = max u        s = sum 2^(k (u - m))        w = sum 2^(k (u - m)) k (u - m)

The shift comes before the scale: u - m is exact to half an ulp however large the logits are, so an offset common to
the row costs no accuracy. With m, s and w of the whole row, in nats::

    lse = m k ln2 + ln s        logp_v = (k (u_v - m) - log2 s) ln2        entropy = (log2 s - w / s) ln2

The target's entry stays out of the sums until all others are in them (`add_target`). Beside its 1 a small sum of the
others would be rounded away, and 1 - p of a target with p close to 1 is made of nothing else.

Exponents are floored at EXP2_FLOOR: 2^-200 is 0 in fp32, and w then contains 0 * -200 and not 0 * -inf. The floor lets
NaN through, so a NaN (or a +inf, through inf - inf) poisons its own row and no other.

Number of exponentials: `fold` of a tile into R running results takes one per entry and R more, `collapse` R, `merge` 2.
`tanh` for a softcap takes one per entry.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
EXP2_FLOOR: tl.constexpr = tl.constexpr(-200.0)


@triton.jit
def floored(x):
    """Return max(x, EXP2_FLOOR); NaN stays NaN."""
    return tl.maximum(x, EXP2_FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finite_shift(m):
    """Return a maximum that may be subtracted: -inf (no entry above -inf yet) becomes 0."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def tanh(x):
    """Return tanh to about 1 ulp. Below 0.625, where 1 - 2 / (e^2x + 1) would cancel, it is an odd polynomial."""
    square = x * x
    tail = -5.70498872745e-3
    tail = tail * square + 2.06390887954e-2
    tail = tail * square - 5.37397155531e-2
    tail = tail * square + 1.33314422036e-1
    tail = tail * square - 3.33332819422e-1
    small = x + x * square * tail
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2_E)) + 1.0)
    large = tl.where(x < 0.0, -large, large)
    return tl.where(tl.abs(x) < 0.625, small, large)


@triton.jit
def softcapped(logits, softcap, logit_scale):
    """Return u of raw logits. Without a softcap (None) the logit scale is part of k, so u is the logits."""
    if softcap is not None:
        return softcap * tanh(logits * logit_scale / softcap)
    return logits


@triton.jit
def log2_of_one_plus(x):
    """Return log2(1 + x) for x >= -1, to a few ulp of the result however small x is."""
    z = x / (2.0 + x)  # ln(1 + x) = 2 artanh z
    square = z * z
    tail = square * (1.0 / 3.0 + square * (1.0 / 5.0 + square * (1.0 / 7.0)))
    return tl.where(tl.abs(x) < 0.25, 2.0 * LOG2_E * (z + z * tail), tl.log2(1.0 + x))


@triton.jit
def one_minus_exp(x):
    """Return 1 - e^x for x <= 0, to a few ulp of the result however small x is."""
    half = tanh(0.5 * x)
    return -2.0 * half / (1.0 - half)


@triton.jit
def merge(m_a, s_a, w_a, q_a, m_b, s_b, w_b, q_b, k, EXTRA: tl.constexpr):
    """Merge two partial results over disjoint entries. With EXTRA also q = sum 4^(k (u - m)), for log sum p^2."""
    m = tl.maximum(m_a, m_b)
    shift = finite_shift(m)
    d_a = floored((m_a - shift) * k)
    d_b = floored((m_b - shift) * k)
    f_a = tl.exp2(d_a)
    f_b = tl.exp2(d_b)
    s = s_a * f_a + s_b * f_b
    w = (w_a + s_a * d_a) * f_a + (w_b + s_b * d_b) * f_b
    q = q_a
    if EXTRA:
        q = q_a * f_a * f_a + q_b * f_b * f_b
    return m, s, w, q


@triton.jit
def fold(m, s, w, q, u, k, EXTRA: tl.constexpr):
    """Fold a tile u [R, C] into R running results. If a thread has C contiguous entries, no data crosses threads."""
    m_new = tl.maximum(m, tl.max(u, axis=1))
    shift = finite_shift(m_new)
    d_old = floored((m - shift) * k)
    rescale = tl.exp2(d_old)
    t = floored((u - shift[:, None]) * k)
    e = tl.exp2(t)
    w = (w + s * d_old) * rescale + tl.sum(e * t, axis=1)
    s = s * rescale + tl.sum(e, axis=1)
    if EXTRA:
        q = q * rescale * rescale + tl.sum(e * e, axis=1)
    return m_new, s, w, q


@triton.jit
def collapse(m, s, w, q, k, EXTRA: tl.constexpr):
    """Merge R running results into one, as scalars."""
    m_row = tl.max(m, axis=0)
    d = floored((m - finite_shift(m_row)) * k)
    f = tl.exp2(d)
    q_row = 0.0
    if EXTRA:
        q_row = tl.sum(q * f * f, axis=0)
    return m_row, tl.sum(s * f, axis=0), tl.sum((w + s * d) * f, axis=0), q_row


@triton.jit
def add_target(m, s, w, q, u, k, EXTRA: tl.constexpr):
    """Add the target's u to the result over all other entries. Return (m, log2 s, s, w, q) of the row.

    log2 s keeps its digits where the target is the maximum and the others are small. u = -inf adds nothing.
    """
    m_row = tl.maximum(m, u)
    shift = finite_shift(m_row)
    d = floored((m - shift) * k)
    t = floored((u - shift) * k)
    f = tl.exp2(d)
    e = tl.exp2(t)
    others = s * f
    q_row = 0.0
    if EXTRA:
        q_row = q * f * f + e * e
    # e is exactly 1 if the target is the maximum; otherwise the others hold a 1.
    return m_row, log2_of_one_plus(others + (e - 1.0)), others + e, (w + s * d) * f + e * t, q_row
