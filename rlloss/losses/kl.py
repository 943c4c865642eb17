"""The KL of the policy to the reference, token by token."""

import torch
from torch import Tensor

from rlloss.config import LossConfig
from rlloss.losses import ratios


def kl_of_tokens(difference: Tensor, log_ratio: Tensor, mask: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """KL(policy || reference) of each token from ref_logp - logp, and where it has a gradient.

    k2 and k3 are flat where the two policies agree; there the importance ratio is left out, which may be infinite.
    """
    fixed = ratios.bounded(difference, config.max_log_ratio)
    difference = ratios.within(difference, config.max_log_ratio)
    d = difference.detach()
    if config.kl_estimator == "k1":
        apart = mask
    else:
        apart = mask & (d != 0.0) & ((d.exp() != 1.0) if config.kl_estimator == "k3" else True)
    if not config.kl_bias_correction:
        return _divergence(difference, config.kl_estimator), apart & ~fixed

    per_sequence = log_ratio.shape != mask.shape
    ratio = torch.where(apart, log_ratio, 0.0)
    through = ~ratios.bounded(log_ratio, config.max_log_ratio)
    # e^d may be infinite and the ratio 0: their product is formed from the sum of the exponents, where the term that is
    # taken away from it cannot be infinite.
    steep = apart & (d > 1.0) & (ratio.detach() < 80.0) & (config.kl_estimator == "k3")
    kl = _divergence(torch.where(steep, 0.0, difference), config.kl_estimator) * ratio.exp()
    steep_d, steep_ratio = torch.where(steep, difference, 0.0), torch.where(steep, ratio, 0.0)
    both = steep_d + steep_ratio
    if not per_sequence:  # ref_logp - old_logp, in which logp is no more
        both = torch.where(through & ~fixed, both.detach(), both)
    kl = torch.where(apart, torch.where(steep, both.exp() - (1.0 + steep_d) * steep_ratio.exp(), kl), 0.0)
    own = apart & ~fixed & (torch.where(steep, both, ratio).detach().exp() != 0.0)
    if per_sequence:
        return kl, own | ((kl.detach() != 0.0).any(-1, keepdim=True) & mask & through)
    shared = torch.where(fixed, kl.detach() != 0.0, ratio.detach().exp() != 0.0)
    return kl, torch.where(through, apart & shared, own)


def _divergence(difference: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return -difference
    return difference.square() / 2.0 if estimator == "k2" else difference.exp() - difference - 1.0
