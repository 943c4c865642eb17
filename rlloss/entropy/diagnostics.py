"""Measure entropy collapse: `diagnose` computes sums over tokens, and `gauges` turns them into means and covariances.

The sums add up over micro-batches and ranks::

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

# Bins of a group's accuracy: [0, 1/4), [1/4, 1/2), [1/2, 3/4), [3/4, 1].
DIFFICULTIES = ("hardest", "hard", "easy", "easiest")
LOW_ENTROPY = 0.01  # nats; about half of the tokens of a reasoning model lie below (2506.01939, section 2)
QUANTILES = {"p50": 0.5, "p80": 0.8, "p95": 0.95}
_ALWAYS = ("tokens", "nonfinite", "moments")  # sums that `diagnose` always returns
# Neighbouring edges differ by 1.94 %. The last, 16.4 nats, is the entropy of a uniform choice among 13 million.
_FIRST_EDGE, _OCTAVES, _EDGES_PER_OCTAVE = 1e-3, 14, 36
_PLACES = 1024  # places within a bin: whole numbers, so their sums are the same in any order


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
    """Compute sums over the tokens that count, for `gauges`. You can add them up over micro-batches and ranks.

    Args:
        logp: `[B, T]` log-probability of each token under the policy, in nats.
        advantage: `[B]`, or `[B, T]` for one per token.
        mask: `[B, T]` bool, True: the token counts. Values in the other columns do not matter, NaN included.
        entropy: `[B, T]` in nats.
        old_logp: `[B, T]` log-probability under the policy that made the batch.
        group: `[B]`, the accuracy of each sequence's group, that is its mean reward in [0, 1]. NaN: unknown, in no bin.
        compute_dtype: dtype in which the model computed, if it is coarser than that of the log-probabilities. It sets
            the rounding that `on_policy` allows. None: the coarser dtype of logp and old_logp.

    Returns:
        name -> detached fp64 tensor on the device. Nothing is read back, so the host does not wait.

        - Always: `tokens` (0-d, tokens that count), `nonfinite` (0-d, those with a NaN or infinity in an argument) and
          `moments` (`[6]`, the moments of the covariances).
        - With `group`: `difficulty_moments` (`[4, 6]`, the moments by accuracy, see `DIFFICULTIES`).
        - With `entropy`: `entropies` (0-d, number of entropies), `entropy` (0-d), `low_entropies` (0-d, number below
          0.01 nats), and `entropy_histogram` (`[3, 506]`: count, sum and sum of squares of the places in each bin).
        - With `old_logp`, all 0-d: `ratios` (number of ratios), `on_policy` (number with abs(logp - old_logp) within
          rounding), `abs_log_ratio`, and `kl` (k3: r - 1 - log r).

        A token with a NaN or infinity is left out of every sum that reads that number, and counted in `nonfinite`. One
        broken token therefore shows, and does not spoil the gauges of all others.

        `on_policy` counts tokens with abs(logp - old_logp) of at most (2 eps + 64 eps_fp32) (1 + abs(logp)), which at a
        logp of 0 is 8e-6 in fp32 and 0.016 in bf16. Two passes over one token may differ by that much if their batches
        have different shapes. A pass rounds the token's logit and the logsumexp to half an eps of compute_dtype each,
        which gives 2 eps for the difference of two passes. It also adds up D products in fp32 with an error of sqrt(D)
        eps_fp32, where sqrt(D) is 64 for D = 4096. Both are relative to the size of the logits, taken as 1 + abs(logp).

    Raises:
        ValueError, TypeError: an argument does not fit; the error names it. Accuracies outside [0, 1] raise on a CPU,
            and on other devices only with `RLLOSS_CHECK=1`, because the check costs a synchronisation.
    """
    if not (compute_dtype is None or (isinstance(compute_dtype, torch.dtype) and compute_dtype.is_floating_point)):
        raise TypeError(f"compute_dtype: found {compute_dtype!r}, expected a floating-point torch.dtype or None")
    given = [logp, old_logp]
    logp, advantage, entropy, old_logp = _checked(logp, advantage, mask, entropy, old_logp, group)
    dtypes = [x.dtype for x in given if x is not None] if compute_dtype is None else [compute_dtype]
    known = logp.isfinite()
    broken = ~(known & advantage.isfinite())
    # Raw moments, because shifted ones would need one shift for all micro-batches. The product of two fp32 numbers is
    # exact in fp64, so the error of a covariance is about 2^-53 |mean x| |mean a|.
    scored = mask & ~broken
    prob_advantage = logp.exp() * advantage
    # Count, x, a, p a, x a, x p a for x = logp, p = exp(logp), a = advantage.
    columns = (torch.ones_like(logp), logp, advantage, prob_advantage, logp * advantage, logp * prob_advantage)
    of_sequences = torch.where(scored, torch.stack(columns), 0.0).sum(-1).T.contiguous()
    sums = {"moments": of_sequences.sum(0)}
    counts = {"tokens": mask}  # name -> the tokens to count
    if group is not None:
        bins = torch.arange(len(DIFFICULTIES), device=logp.device)
        bin = (group.detach().double() * len(DIFFICULTIES)).floor().clamp(max=len(DIFFICULTIES) - 1)
        member = bin == bins[:, None]  # NaN is in no bin
        sums["difficulty_moments"] = torch.where(member[:, :, None], of_sequences, 0.0).sum(1)
    if entropy is not None:
        finite = entropy.isfinite()
        broken = broken | ~finite
        counts["entropies"] = counted = mask & finite
        counts["low_entropies"] = counted & (entropy < LOW_ENTROPY)
        sums |= _entropy_sums(entropy, counted)
    if old_logp is not None:
        finite = old_logp.isfinite()
        broken = broken | ~finite
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        rounding = (2 * eps + 64 * min(eps, torch.finfo(torch.float32).eps)) * (1 + logp.abs())
        counts["ratios"] = counted = mask & known & finite
        log_ratio = torch.where(counted, logp - old_logp, 0.0)
        counts["on_policy"] = counted & (log_ratio.abs() <= rounding)
        sums |= {"abs_log_ratio": log_ratio.abs().sum(), "kl": (log_ratio.expm1() - log_ratio).sum()}
    counts["nonfinite"] = mask & broken
    of_counts = torch.stack(list(counts.values())).sum((1, 2)).double().unbind()
    return dict(zip(counts, of_counts, strict=True)) | sums


def gauges(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute the gauges of entropy collapse from the sums of `diagnose`.

    Args:
        sums: sums of `diagnose`, added up over micro-batches and ranks.

    Returns:
        name -> 0-d fp64 tensor on the device; NaN if nothing counts (for instance in a bin without a token).

        ====================================  ==========================================================================
        ``cov/logp_advantage``                Cov(log pi, A) over tokens, divided by their count. A natural policy
                                              gradient changes the entropy by about -eta times it (2505.22617)
        ``cov/logp_prob_advantage``           Cov(log pi, pi A): the same for a plain policy gradient
        ``cov/.../hardest`` to ``/easiest``   both, among the sequences of a bin of group accuracy (with ``group``)
        ``difficulty/hardest_share`` to ...   share of the scored tokens in that bin
        ``entropy/mean``                      nats
        ``entropy/p50``, ``/p80``, ``/p95``   nats, from the histogram, interpolated by the mean and standard deviation
                                              of the bin's entropies. The exact quantile is at most 2 % or 0.001 nats
                                              away. If all entropies share a bin, their median is at most their standard
                                              deviation away. From 16.4 nats on the value is 16.4
        ``entropy/below_0.01_share``          share of the tokens below 0.01 nats
        ``on_policy_share``                   share of the tokens whose ratio is 1 within rounding, where no clip acts
        ``abs_log_ratio``                     mean of abs(logp - old_logp)
        ``approx_kl``                         mean of r - 1 - log r, an estimate of KL(old, policy) on tokens of the old
                                              policy
        ``nonfinite_share``                   share of the tokens with a NaN or infinity
        ====================================  ==========================================================================

    Raises:
        ValueError, TypeError: sums lacks `tokens`, `nonfinite` or `moments`, or one of them is no tensor.
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
        quantiles = _quantiles(sums["entropy_histogram"]).unbind()
        result |= {f"entropy/{name}": value for name, value in zip(QUANTILES, quantiles, strict=True)}
    if "ratios" in sums:
        result["on_policy_share"] = sums["on_policy"] / sums["ratios"]
        result["abs_log_ratio"] = sums["abs_log_ratio"] / sums["ratios"]
        result["approx_kl"] = sums["kl"] / sums["ratios"]
    return result


def pack(sums: dict[str, Tensor]) -> Tensor:
    """Return the sums as one vector to reduce over ranks. All ranks must call `diagnose` with the same arguments."""
    checks.tensors("sums", sums, _ALWAYS)
    return torch.cat([value.reshape(-1) for value in sums.values()])


def unpack(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums from a vector of `pack`. `like` holds sums of the same shapes."""
    checks.tensors("like", like, _ALWAYS)
    checks.floating("vector", vector)
    checks.same_shape("vector", vector, (sum(value.numel() for value in like.values()),), "one number for each of like")
    parts = vector.split([value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


class EntropyFit:
    """Fit a line through the pairs (cov_t, entropy of step t + 1 minus entropy of step t) of a run.

    2505.22617 derives a change of the entropy of about -eta cov. `slope` is the run's estimate of -eta, `correlation`
    tells how well a line fits. The fit summarises past steps; it does not predict later ones. Sums are exact fractions,
    so a long run loses no precision.
    """

    def __init__(self) -> None:
        self.count = 0
        """Number of pairs so far."""
        self._last: tuple[float, float] | None = None
        self._x = self._y = self._xx = self._xy = self._yy = Fraction(0)

    def update(self, entropy: float | Tensor, cov: float | Tensor) -> None:
        """Add one step.

        Args:
            entropy: mean entropy in nats, a number or a tensor with one number.
            cov: covariance `cov/logp_advantage` of `gauges`. A step with a NaN or infinity is in no pair.

        Raises:
            ValueError, TypeError: an argument is not one number; the error names it.
        """
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
        """Slope of the least-squares line, in nats per unit of covariance; NaN while all covariances are equal."""
        spread = self.count * self._xx - self._x**2
        return float((self.count * self._xy - self._x * self._y) / spread) if spread else math.nan

    @property
    def correlation(self) -> float:
        """Pearson correlation in [-1, 1]; NaN while all covariances, or all changes of the entropy, are equal."""
        product = (self.count * self._xx - self._x**2) * (self.count * self._yy - self._y**2)
        if not product:
            return math.nan
        covariance = self.count * self._xy - self._x * self._y
        return math.copysign(math.sqrt(covariance**2 / product), covariance)


class Trend(NamedTuple):
    """A line. slope is its change per value, error the standard error of slope, last its height at the last value."""

    slope: float
    error: float
    last: float

    def after(self, steps: float) -> float:
        """Return the height of the line `steps` values after the last."""
        return self.last + steps * self.slope

    def falls(self, significance: float) -> bool:
        """Return whether the slope is more than `significance` standard errors below 0."""
        return self.slope < -significance * self.error

    def rises(self, significance: float) -> bool:
        """Return whether the slope is more than `significance` standard errors above 0."""
        return self.slope > significance * self.error


def trend(values: Sequence[float]) -> Trend:
    """Fit the least-squares line through at least three values at equal distances.

    Neighbouring steps of a training run have similar errors. The standard error of independent residuals is therefore
    multiplied by sqrt((1 + r) / (1 - r)), where r is the correlation of neighbouring residuals, if that is above 0.
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
def _entropy_bins(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (edges between the bins, start of each bin, its width, shares of QUANTILES). The last bin is open."""
    steps = torch.arange(_OCTAVES * _EDGES_PER_OCTAVE + 1, dtype=torch.float64)
    edges = _FIRST_EDGE * 2.0 ** (steps / _EDGES_PER_OCTAVE)
    low = torch.cat([edges.new_zeros(1), edges])
    width = torch.cat([edges, edges.new_full((1,), math.inf)]) - low
    shares = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    # Made on the CPU, so that all devices have the same bits.
    return edges.to(device), low.to(device), width.to(device), shares.to(device)


def _entropy_sums(entropy: Tensor, counted: Tensor) -> dict[str, Tensor]:
    edges, low, width, _ = _entropy_bins(entropy.device)
    bins = low.numel()
    index = torch.bucketize(entropy, edges, right=True)
    place = (entropy - low[index]) / width[index] * _PLACES
    place = torch.where(counted, place.floor().clamp(0, _PLACES - 1), 0.0).flatten()
    index = torch.where(counted, index, bins).flatten()  # the extra last bin holds tokens that do not count
    # bincount would make the host wait for a GPU.
    powers = torch.stack([torch.ones_like(place), place, place * place])
    histogram = torch.zeros(3, bins + 1, dtype=torch.float64, device=entropy.device).index_add_(1, index, powers)
    return {"entropy": torch.where(counted, entropy, 0.0).sum(), "entropy_histogram": histogram[:, :bins]}


def _quantiles(histogram: Tensor) -> Tensor:
    """Return the quantiles QUANTILES [3] of a histogram; NaN if it is empty.

    One lies in the bin of the smallest value that at least its share of the values do not exceed. The values of that
    bin are assumed to be spread evenly, with their mean and standard deviation.
    """
    _, low, width, shares = _entropy_bins(histogram.device)
    upto = histogram[0].cumsum(0)
    wanted = shares * upto[-1]
    bin = torch.searchsorted(upto, wanted).clamp(max=low.numel() - 1)
    (here, total, squares), width = histogram.index_select(1, bin), width.take(bin)
    mean, fraction = total / here, (wanted - (upto.take(bin) - here)) / here
    std = (squares / here - mean * mean).clamp(min=0.0).sqrt()
    place = (mean + 0.5 + math.sqrt(3) * std * (2 * fraction - 1)).clamp(0, _PLACES) / _PLACES
    return low.take(bin) + torch.where(width.isfinite(), place * width, 0.0)


def _checked(
    logp: Tensor, advantage: Tensor, mask: Tensor, entropy: Tensor | None, old_logp: Tensor | None, group: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Check the arguments against each other, and return those per token as fp64 [B, T]."""
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
            outside = group[(group < 0.0) | (group > 1.0 + 1e-6)]  # a mean of ones may be rounded above 1
            checks.require(outside.numel() == 0, "group", outside.tolist(), "accuracies in [0, 1], or NaN")
    advantage = advantage if advantage.dim() == 2 else advantage.unsqueeze(1)
    entropy, old_logp = (None if x is None else x.detach().double() for x in (entropy, old_logp))
    return logp.detach().double(), advantage.detach().double().expand(B, T), entropy, old_logp
