"""Compute the KL of the policy to the reference, token by token, and its slopes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss.config import LossConfig
from rlloss.losses import ratios
from rlloss.losses.ratios import Ratio


class Divergence(NamedTuple):
    """KL of each token, value [B, T], and its slopes. by_logp is d value / d logp of the token itself. by_log_ratio is
    d value / d log ratio if the KL is multiplied by the ratio of a sequence."""

    value: Tensor
    by_logp: Tensor
    by_log_ratio: Tensor | None = None


def k3(d: Tensor) -> tuple[Tensor, Tensor]:
    """Return (e^d - d - 1, 1 - e^d), to a few roundings where both are near 0.

    There the terms cancel: at d = 1e-3 the rounding of e^d is a tenth of the first result, and a GPU's approximate e^d
    errs four times as much. Within 1/2 the first result is therefore d^2 times the series 1/2! + d/3! + ..., and the
    second follows from it. The terms left out are below 1 unit of 2^-24 of the series (fp64: of 2^-53), its roundings
    below 2, and the two products add 2: 5 units at most. Beyond 1/2, e^d is at most 11 times the first result, so a
    relative error of 2^-22 of e^d, which a GPU may make, and 2^-23 d of its argument become 4e-6 at most.
    """
    near = d.abs() < 0.5
    t = torch.where(near, d, 0.0)
    series = torch.zeros_like(t)
    for n in range(15 if d.dtype == torch.float64 else 8, 1, -1):
        series = series * t + 1 / math.factorial(n)
    small = t * t * series
    e = torch.where(near, 0.0, d).exp()
    return torch.where(near, small, e - d - 1.0), torch.where(near, -d - small, 1.0 - e)


def kl_of_tokens(difference: Tensor, ratio: Ratio, mask: Tensor, config: LossConfig) -> Divergence:
    """Return KL(policy, reference) from d = ref_logp - logp `[B, T]`, times the ratio with `kl_bias_correction`.

    k2 and k3 are flat where the two policies agree. There the importance ratio, which may be infinite, is left out.
    """
    bound, estimator = config.max_log_ratio, config.kl_estimator
    d, moves = difference, mask
    if bound is not None:
        d, moves = difference.clamp(-bound, bound), mask & ratios.free(difference, bound)
    if estimator == "k1":
        value, slope, apart = -d, torch.ones_like(d), mask
    elif estimator == "k2":
        value, slope, apart = d.square() / 2.0, -d, mask & (d != 0.0)
    else:
        (value, slope), apart = k3(d), mask & (d != 0.0)
    if not config.kl_bias_correction:
        return Divergence(value, torch.where(moves, slope, 0.0))

    log_ratio = torch.where(apart, ratio.log, 0.0)
    r = log_ratio.exp()
    # e^d may be infinite and the ratio 0, so their product is formed from the sum of the exponents. `steep` covers only
    # tokens where the subtracted term is finite.
    steep = apart & (d > 1.0) & (log_ratio < 80.0) & (estimator == "k3")
    both = torch.where(steep, d + log_ratio, 0.0).exp()
    value = torch.where(steep, both - (1.0 + d) * r, torch.where(steep, 0.0, value) * r)
    value = torch.where(apart, value, 0.0)
    slope = torch.where(steep, r - both, torch.where(steep, 0.0, slope) * r)
    slope = torch.where(apart & moves, slope, 0.0)
    if ratio.level != "token":
        return Divergence(value, slope, value)
    total = slope + value
    if estimator == "k3":  # (1 - e^d) r + (e^d - d - 1) r
        total = torch.where(moves, -d * r, total)
    through = apart if ratio.free is None else apart & ratio.free
    return Divergence(value, torch.where(through, total, slope))
