"""Gauges of entropy collapse: sums over tokens, which add up over micro-batches and ranks, and what they say.

sums = diagnose(logp, advantage, mask, entropy=entropy, old_logp=old_logp)   # on the device, nothing is read back
total = unpack(all_reduce(pack(sums)), sums)                                 # one vector for all ranks
log = {name: value.item() for name, value in gauges(total).items()}
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss import checks

# A group's accuracy in [0, 1/4), [1/4, 1/2), [1/2, 3/4), [3/4, 1].
DIFFICULTIES = ("hardest", "hard", "easy", "easiest")
LOW_ENTROPY = 0.01  # nats; about half of the tokens of a reasoning model lie below (2506.01939, section 2)
QUANTILES = {"p50": 0.5, "p80": 0.8, "p95": 0.95}
_ALWAYS = ("tokens", "nonfinite", "moments")  # sums that `diagnose` always gives
# Neighbouring edges differ by 1.94 %; the last, 16.4 nats, is the entropy of a uniform choice among 13 million.
_FIRST_EDGE, _OCTAVES, _EDGES_PER_OCTAVE = 1e-3, 14, 36
_PLACES = 1024  # of an entropy in its bin: whole numbers, whose sums are the same in any order


@torch.no_grad()
def diagnose(
    logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    entropy: Tensor | None = None,
    old_logp: Tensor | None = None,
    group: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Sums over the tokens that count. Added up over micro-batches and ranks they are the sums of the whole.

    Args:
        logp: `[B, T]` log-probability of each token under the policy, in nats.
        advantage: `[B]`, or `[B, T]` for one per token.
        mask: `[B, T]` bool, True = counts. What stands in the other columns does not matter, NaN included.
        entropy: `[B, T]` in nats.
        old_logp: `[B, T]` log-probability under the policy that the batch was made with.
        group: `[B]`, the accuracy of each sequence's group: its mean reward, in [0, 1]. NaN: not known, in no bin.
        compute_dtype: in which the model computed, where log-probabilities are more precise than that. Sets what
            counts as rounding in `on_policy`. None: the dtype of logp or old_logp, the coarser one.

    Returns:
        name -> detached fp64 tensor on the device. Nothing is read back, so the host does not wait. 0-d: `tokens`
        (of the mask) and `nonfinite` (those with a NaN or infinity in an argument). `moments` `[6]`: what `gauges`
        makes the covariances of, and with `group` also `difficulty_moments` `[4, 6]`, by accuracy (`DIFFICULTIES`).
        With `entropy`, 0-d: `entropies` (their count), `entropy`, `low_entropies` (below 0.01 nats); `[3, 506]`:
        `entropy_histogram` (count, sum and sum of squares of the places in each bin). With `old_logp`, 0-d: `ratios`
        (their count), `on_policy` (abs(logp - old_logp) within rounding, below), `abs_log_ratio`, `kl` (k3: r - 1 -
        log r).

        Two passes over one token differ by rounding where their batches have another shape. A pass rounds the token's
        logit and the logsumexp to half an eps of compute_dtype each, which is 2 eps for the difference of two passes,
        and adds up D products in fp32, which errs by sqrt(D) eps of fp32, 64 for D = 4096. Both are relative to the
        size of the logits, here taken as 1 + abs(logp): `on_policy` counts up to (2 eps + 64 eps_fp32) (1 + abs(logp)),
        in fp32 8e-6 at a logp of 0, in bf16 0.016.

        A token with a NaN or infinite number is left out of every sum that reads that number, and counted in
        `nonfinite`: one broken token shows, and does not blank the gauges of all others.

    Raises:
        ValueError, TypeError: an argument does not fit; it is named. Accuracies outside [0, 1] raise on the CPU; on
            another device, where the check costs a synchronisation, only under `RLLOSS_CHECK=1`.
    """
    if not (compute_dtype is None or (isinstance(compute_dtype, torch.dtype) and compute_dtype.is_floating_point)):
        raise TypeError(f"compute_dtype: found {compute_dtype!r}, expected a floating-point torch.dtype or None")
    given = [logp, old_logp]
    logp, advantage, entropy, old_logp = _checked(logp, advantage, mask, entropy, old_logp, group)
    dtypes = [x.dtype for x in given if x is not None] if compute_dtype is None else [compute_dtype]
    broken = ~(logp.isfinite() & advantage.isfinite())
    # Raw moments and no shifted ones, because those would need one shift for all micro-batches. The product of two
    # fp32 numbers is exact in fp64, so a covariance is off by about 2^-53 |mean x| |mean a|.
    scored = mask & ~broken
    prob_advantage = logp.exp() * advantage
    # Count, x, a, p a, x a, x p a for x = logp, p = exp(logp), a = advantage.
    columns = (scored, logp, advantage, prob_advantage, logp * advantage, logp * prob_advantage)
    of_sequences = torch.stack([torch.where(scored, x.double(), 0.0).sum(-1) for x in columns], dim=-1)
    sums = {"moments": of_sequences.sum(0)}
    if group is not None:
        bins = torch.arange(len(DIFFICULTIES), device=logp.device)
        bin = (group.detach().double() * len(DIFFICULTIES)).floor().clamp(max=len(DIFFICULTIES) - 1)
        member = bin == bins[:, None]  # NaN is in none
        sums["difficulty_moments"] = torch.where(member[:, :, None], of_sequences, 0.0).sum(1)
    if entropy is not None:
        broken = broken | ~entropy.isfinite()
        sums |= _entropy_sums(entropy, mask & entropy.isfinite())
    if old_logp is not None:
        broken = broken | ~old_logp.isfinite()
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        rounding = (2 * eps + 64 * min(eps, torch.finfo(torch.float32).eps)) * (1 + logp.abs())
        sums |= _ratio_sums(logp - old_logp, rounding, mask & logp.isfinite() & old_logp.isfinite())
    return {"tokens": mask.sum().double(), "nonfinite": (mask & broken).sum().double(), **sums}


def gauges(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the sums of `diagnose` say, once they are added up over micro-batches and ranks.

    Returns 0-d fp64 tensors on the device; NaN where nothing counts (a bin without a token, for instance):

    ======================================  ============================================================================
    ``cov/logp_advantage``                  Cov(log pi, A) over tokens, divided by their count. A natural policy
                                            gradient changes the entropy by about -eta times it (2505.22617)
    ``cov/logp_prob_advantage``             Cov(log pi, pi A): the same for a plain policy gradient
    ``cov/.../hardest`` to ``/easiest``     both, among the sequences of a bin of group accuracy (with ``group``)
    ``difficulty/hardest_share`` to ...     share of the scored tokens in that bin
    ``entropy/mean``                        nats
    ``entropy/p50``, ``/p80``, ``/p95``     nats; from the histogram, interpolated by the mean and standard deviation of
                                            the bin's entropies. The value that so many of the tokens do not exceed
                                            is at most 2 % or 0.001 nats away, the median of entropies that share a bin
                                            at most their standard deviation. From 16.4 nats on, 16.4
    ``entropy/below_0.01_share``            share of the tokens below 0.01 nats
    ``on_policy_share``                     share of the tokens whose ratio is 1 within rounding: no clip acts
    ``abs_log_ratio``                       mean of abs(logp - old_logp)
    ``approx_kl``                           mean of r - 1 - log r: KL(old || policy) of tokens that the old one sampled
    ``nonfinite_share``                     share of the tokens with a NaN or infinity
    ======================================  ============================================================================
    """
    checks.tensors("sums", sums, _ALWAYS)
    result = {"nonfinite_share": sums["nonfinite"] / sums["tokens"]}
    covariances = _covariances(sums["moments"])
    result |= {f"cov/{name}": value for name, value in covariances.items()}
    if "difficulty_moments" in sums:
        moments = sums["difficulty_moments"]
        shares = moments[:, 0] / sums["moments"][0]
        for name, values in _covariances(moments).items():
            result |= {f"cov/{name}/{bin}": values[i] for i, bin in enumerate(DIFFICULTIES)}
        result |= {f"difficulty/{bin}_share": shares[i] for i, bin in enumerate(DIFFICULTIES)}
    if "entropies" in sums:
        result["entropy/mean"] = sums["entropy"] / sums["entropies"]
        result["entropy/below_0.01_share"] = sums["low_entropies"] / sums["entropies"]
        for name, share in QUANTILES.items():
            result[f"entropy/{name}"] = _quantile(sums["entropy_histogram"], share)
    if "ratios" in sums:
        result["on_policy_share"] = sums["on_policy"] / sums["ratios"]
        result["abs_log_ratio"] = sums["abs_log_ratio"] / sums["ratios"]
        result["approx_kl"] = sums["kl"] / sums["ratios"]
    return result


def pack(sums: dict[str, Tensor]) -> Tensor:
    """The sums as one vector, for one reduction over ranks. Ranks agree if they gave `diagnose` the same arguments."""
    checks.tensors("sums", sums, _ALWAYS)
    return torch.cat([value.reshape(-1) for value in sums.values()])


def unpack(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of a vector that `pack` made of sums shaped `like` these."""
    checks.tensors("like", like, _ALWAYS)
    checks.floating("vector", vector)
    checks.same_shape("vector", vector, (sum(value.numel() for value in like.values()),), "one number for each of like")
    parts = vector.split([value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


class EntropyFit:
    """How the entropy moved with the covariance over a run: a line through pairs (cov_t, entropy_{t+1} - entropy_t).

    2505.22617 derives a change of about -eta cov; `slope` is what this run shows of -eta, and `correlation` how well
    a line describes it. It is a summary of the steps that were taken, never called a prediction of those to come.
    Sums are exact fractions, so a long run loses nothing.
    """

    def __init__(self) -> None:
        self.count = 0
        """Pairs so far."""
        self._last: tuple[float, float] | None = None
        self._x = self._y = self._xx = self._xy = self._yy = Fraction(0)

    def update(self, entropy: float | Tensor, cov: float | Tensor) -> None:
        """The mean entropy (nats) and the covariance of one step. With a NaN or infinity, no pair has this step."""
        checks.scalar("entropy", entropy)
        checks.scalar("cov", cov)
        entropy, cov = float(entropy), float(cov)
        if self._last is not None and math.isfinite(entropy):
            x, y = Fraction(self._last[1]), Fraction(entropy) - Fraction(self._last[0])
            self.count += 1
            self._x, self._y = self._x + x, self._y + y
            self._xx, self._xy, self._yy = self._xx + x * x, self._xy + x * y, self._yy + y * y
        self._last = (entropy, cov) if math.isfinite(entropy) and math.isfinite(cov) else None

    @property
    def slope(self) -> float:
        """Of the least-squares line, in nats per unit of covariance; NaN while all covariances are one."""
        spread = self.count * self._xx - self._x**2
        return float((self.count * self._xy - self._x * self._y) / spread) if spread else math.nan

    @property
    def correlation(self) -> float:
        """Pearson's, in [-1, 1]; NaN while all covariances, or all changes of the entropy, are one."""
        product = (self.count * self._xx - self._x**2) * (self.count * self._yy - self._y**2)
        if not product:
            return math.nan
        covariance = self.count * self._xy - self._x * self._y
        return math.copysign(math.sqrt(covariance**2 / product), covariance)


class Trend(NamedTuple):
    """slope: change from one value to the next. error: its standard error. last: the line at the last value."""

    slope: float
    error: float
    last: float

    def after(self, steps: float) -> float:
        """The line `steps` values after the last."""
        return self.last + steps * self.slope

    def falls(self, significance: float) -> bool:
        """Whether the slope is more than `significance` standard errors below 0."""
        return self.slope < -significance * self.error

    def rises(self, significance: float) -> bool:
        """Whether the slope is more than `significance` standard errors above 0."""
        return self.slope > significance * self.error


def trend(values: Sequence[float]) -> Trend:
    """The least-squares line through at least three values at equal distances.

    The standard error is that of independent residuals times sqrt((1 + r) / (1 - r)) for their correlation r from one
    to the next, where that is above 0: neighbouring steps of a training run err alike.
    """
    n = len(values)
    checks.require(n >= 3, "values", f"{n} of them", "at least 3")
    middle, mean = (n - 1) / 2, math.fsum(values) / n
    spread = n * (n * n - 1) / 12  # sum of (i - middle)^2
    slope = math.fsum((i - middle) * (value - mean) for i, value in enumerate(values)) / spread
    residuals = [value - mean - slope * (i - middle) for i, value in enumerate(values)]
    squares = math.fsum(r * r for r in residuals)
    neighbours = math.fsum(a * b for a, b in zip(residuals[1:], residuals, strict=False))
    correlation = min(max(neighbours / squares, 0.0), 0.95) if squares > 0 else 0.0
    inflation = (1 + correlation) / (1 - correlation)
    return Trend(slope, math.sqrt(squares / (n - 2) / spread * inflation), mean + slope * middle)


def _covariances(moments: Tensor) -> dict[str, Tensor]:
    count, x, a, pa, xa, xpa = moments.unbind(-1)
    x = x / count
    return {"logp_advantage": xa / count - x * (a / count), "logp_prob_advantage": xpa / count - x * (pa / count)}


@functools.cache
def _entropy_bins(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(edges between the bins, where each bin begins, its width); the last bin is open."""
    steps = torch.arange(_OCTAVES * _EDGES_PER_OCTAVE + 1, dtype=torch.float64)
    edges = _FIRST_EDGE * 2.0 ** (steps / _EDGES_PER_OCTAVE)
    low = torch.cat([edges.new_zeros(1), edges])
    width = torch.cat([edges, edges.new_full((1,), math.inf)]) - low
    return edges.to(device), low.to(device), width.to(device)  # made on the CPU: the same bits everywhere


def _entropy_sums(entropy: Tensor, counted: Tensor) -> dict[str, Tensor]:
    edges, low, width = _entropy_bins(entropy.device)
    bins = low.numel()
    index = torch.bucketize(entropy, edges, right=True)
    place = (entropy - low[index]) / width[index] * _PLACES
    place = torch.where(counted, place.floor().clamp(0, _PLACES - 1), 0.0).flatten()
    index = torch.where(counted, index, bins).flatten()  # the last: not counted
    # Not bincount, which waits for the host on a GPU.
    powers = torch.stack([torch.ones_like(place), place, place * place])
    histogram = torch.zeros(3, bins + 1, dtype=torch.float64, device=entropy.device).index_add_(1, index, powers)
    return {
        "entropies": counted.sum().double(),
        "entropy": torch.where(counted, entropy, 0.0).sum(),
        "low_entropies": (counted & (entropy < LOW_ENTROPY)).sum().double(),
        "entropy_histogram": histogram[:, :bins],
    }


def _ratio_sums(log_ratio: Tensor, rounding: Tensor, counted: Tensor) -> dict[str, Tensor]:
    log_ratio = torch.where(counted, log_ratio, 0.0)
    return {
        "ratios": counted.sum().double(),
        "on_policy": (counted & (log_ratio.abs() <= rounding)).sum().double(),
        "abs_log_ratio": log_ratio.abs().sum(),
        "kl": (log_ratio.expm1() - log_ratio).sum(),
    }


def _quantile(histogram: Tensor, share: float) -> Tensor:
    """In the bin of the smallest value that at least `share` of the values do not exceed; NaN if there is none.

    Its values count as spread evenly, with their mean and standard deviation.
    """
    _, low, width = _entropy_bins(histogram.device)
    upto = histogram[0].cumsum(0)
    wanted = share * upto[-1]
    bin = torch.searchsorted(upto, wanted).clamp(max=low.numel() - 1)
    # take, because an index that is a 0-d tensor is read back from the device.
    here, total, squares = (row.take(bin) for row in histogram)
    mean, fraction = total / here, (wanted - (upto.take(bin) - here)) / here
    std = (squares / here - mean * mean).clamp(min=0.0).sqrt()
    place = (mean + 0.5 + math.sqrt(3) * std * (2 * fraction - 1)).clamp(0, _PLACES) / _PLACES
    return low.take(bin) + torch.where(width.take(bin).isfinite(), place * width.take(bin), 0.0)


def _checked(
    logp: Tensor, advantage: Tensor, mask: Tensor, entropy: Tensor | None, old_logp: Tensor | None, group: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Check the arguments against each other; return those per token as fp64 [B, T]."""
    checks.tokens(logp, advantage, mask)
    B, T = logp.shape
    for name, x in {"entropy": entropy, "old_logp": old_logp}.items():
        if x is not None:
            checks.floating(name, x)
            checks.same_shape(name, x, logp.shape, "like logp")
            checks.same_device(name, x, logp, "logp")
    if group is not None:
        checks.floating("group", group)
        checks.same_shape("group", group, (B,), "[B], one accuracy for each sequence")
        checks.same_device("group", group, logp, "logp")
        if checks.values_checked(group):
            outside = group[(group < 0.0) | (group > 1.0 + 1e-6)]  # a mean is rounded
            checks.require(outside.numel() == 0, "group", outside.tolist(), "accuracies in [0, 1], or NaN")
    advantage = advantage if advantage.dim() == 2 else advantage.unsqueeze(1)
    entropy, old_logp = (None if x is None else x.detach().double() for x in (entropy, old_logp))
    return logp.detach().double(), advantage.detach().double().expand(B, T), entropy, old_logp
