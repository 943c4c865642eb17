"""Compute the KL of the policy to the reference, token by token, and its slopes."""

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
        e = d.exp()
        value, slope, apart = e - d - 1.0, 1.0 - e, mask & (d != 0.0) & (e != 1.0)
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
