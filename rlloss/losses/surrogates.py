"""Surrogates: what a token's log-ratio and advantage make of its loss, before weights and means.

A token that does not act or is clipped, or whose advantage is 0, gets a gradient of exactly 0 whatever its
log-ratio: its log-ratio is replaced before the exponential, because 0 * inf is NaN.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss.config import LossConfig
from rlloss.losses import ratios

_FAR = 80.0  # e^80 and e^-80 are normal numbers of fp32


class Inputs(NamedTuple):
    """What a surrogate may look at. acts: bool of the shape that log_ratio and advantage have together.

    picked: the tokens with the largest covariance, for "kl_cov". weight: the sampler's ratio. It multiplies the
    loss; 0 removes a token.
    """

    logp: Tensor  # [B, T], with gradient, 0 where it does not act
    log_ratio: Tensor  # [B, T] or [B, 1], with the gradient of logp
    advantage: Tensor  # [B, T] or [B, 1]
    acts: Tensor
    picked: Tensor | None = None
    weight: Tensor | None = None  # [B, T] or [B, 1]


class Surrogate(NamedTuple):
    """loss and live (with a nonzero gradient), [B, T] or [B, 1]; what the metrics count, where the loss has it.

    through_ratio: whether the gradient flows through the ratio (and so through every token that the ratio is made of)
    or through the token's own logp. weighted: whether the loss has been multiplied by the sampler's ratio.
    """

    loss: Tensor
    live: Tensor
    through_ratio: bool
    clip_low: Tensor | None = None
    clip_high: Tensor | None = None
    weight: Tensor | None = None
    weighted: bool = False


def _apart(x: Inputs) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """(exponent, scale, weight): exp(exponent) * scale is the ratio times the weight.

    A ratio beyond fp32 and a weight near 0, or the other way round, may have an ordinary product.
    """
    if x.weight is None:
        return x.log_ratio, 1.0, 1.0
    log_ratio = x.log_ratio.detach()
    beyond = (log_ratio - log_ratio.clamp(-_FAR, _FAR)).clamp(-1e3, 1e3)  # inf - inf is NaN
    scale = torch.where(x.weight == 0.0, 0.0, x.weight * beyond.exp())
    return x.log_ratio - beyond, scale, x.weight


def clip_bounds(config: LossConfig) -> tuple[float, float, float]:
    """(lower bound of the ratio where A < 0, upper bound where A > 0, upper bound where A < 0)."""
    high, delta = 1.0 + config.epsilon_high, config.delta
    gain, loss = (high, torch.inf) if delta is None else (min(delta, high), max(delta, high))
    return 1.0 - config.epsilon_low, gain, loss


def clip(x: Inputs, config: LossConfig) -> Surrogate:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r <= delta in the first term, as one clamp per sign of A:

    A > 0: r <= min(delta, 1 + high);    A < 0: 1 - low <= r <= max(delta, 1 + high), or no upper bound without delta.
    On a bound the gradient flows, as that of torch.clamp.
    """
    advantage, ratio = x.advantage, x.log_ratio.detach().exp()
    low, upper_gain, upper_loss = clip_bounds(config)
    # masked_fill and not where, which would round the bounds of fp64 ratios to fp32.
    upper = torch.full_like(advantage, upper_loss).masked_fill(advantage > 0, upper_gain)
    lower = torch.zeros_like(advantage).masked_fill(advantage < 0, low)
    # Written so that a NaN ratio or advantage is live.
    exponent, scale, weight = _apart(x)
    live = x.acts & ~(ratio > upper) & ~(ratio < lower) & (advantage != 0) & (exponent.detach().exp() * scale != 0)
    live = live & ~ratios.bounded(x.log_ratio, config.max_log_ratio)
    frozen = torch.where(advantage == 0, 1.0, torch.minimum(torch.maximum(ratio, lower), upper))
    moving = -advantage * torch.where(live, exponent, 0.0).exp() * scale
    loss = torch.where(live, moving, -advantage * frozen * weight)
    capped = ratio if config.delta is None else ratio.clamp(max=config.delta)
    clipped_low, clipped_high = capped < low, capped > 1.0 + config.epsilon_high
    clipped_low, clipped_high = clipped_low & (advantage < 0), clipped_high & (advantage > 0)
    return Surrogate(loss, live, True, clipped_low, clipped_high, weighted=True)


def clipped(log_ratio: Tensor, advantage: Tensor, config: LossConfig) -> Tensor:
    """Where min(r A, clip(r) A) is the clipped one, [B, T]."""
    ratio, (low, gain, loss) = log_ratio.detach().exp(), clip_bounds(config)
    return ((advantage > 0) & (ratio > gain)) | ((advantage < 0) & ((ratio < low) | (ratio > loss)))


def kl_cov(x: Inputs, config: LossConfig) -> Surrogate:
    """-A r, and for the picked tokens kl_coef |log r| or kl_coef (r - 1 - log r) (2505.22617 Eq. 13); no clip.

    At r = 1 either penalty is flat: on-policy there is none.
    """
    assert x.picked is not None
    advantage, log_ratio, c = x.advantage, x.log_ratio.detach(), config.covariance
    ratio, moves = log_ratio.exp(), x.acts & ~ratios.bounded(log_ratio, config.max_log_ratio)
    exponent, scale, weight = _apart(x)
    is_abs = c.penalty == "abs"
    penalised = moves & x.picked & ((log_ratio != 0) if is_abs else (ratio != 1))
    in_ratio = penalised & (not is_abs)  # -A r and kl_coef r may cancel: one term
    slope = torch.where(in_ratio, c.kl_coef - advantage, -advantage)
    live = moves & (slope != 0) & (exponent.detach().exp() * scale != 0)
    frozen = torch.where(in_ratio, 0.0, -advantage * torch.where(advantage == 0, 1.0, ratio) * weight)
    loss = torch.where(live, slope * torch.where(live, exponent, 0.0).exp() * scale, frozen)

    of_log = torch.where(penalised, x.log_ratio, 0.0)
    moving = of_log.abs() * weight if is_abs else -weight - of_log * weight
    still = log_ratio.abs() * weight if is_abs else exponent.detach().exp() * scale - weight - log_ratio * weight
    loss = loss + c.kl_coef * torch.where(penalised, moving, torch.where(x.picked, still, 0.0))
    return Surrogate(loss, live | penalised, True, weighted=True)


def sapo(x: Inputs, config: LossConfig) -> Surrogate:
    """-A sigmoid(t (r - 1)) 4 / t, t by the sign of A (2511.20347 Eq. 5 and 6): the slope at r = 1 is that of -A r."""
    advantage = x.advantage
    t = torch.full_like(advantage, config.sapo.temperature_neg).masked_fill(advantage > 0, config.sapo.temperature_pos)

    def gate(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """(sigmoid(g), the smaller of sigmoid(g) and sigmoid(-g), from which the slope is formed without loss)."""
        g = t * (log_ratio.exp() - 1.0)  # not expm1, whose derivative torch forms as its value + 1: 0 for small r
        small = torch.where(g > 0, -g, g).sigmoid()
        return torch.where(g > 0, 1.0 - small, small), small

    value, small = gate(x.log_ratio.detach())
    flat = (x.log_ratio.detach().exp() == 0) | (small == 0)  # the slope is r * sigmoid(g) * sigmoid(-g)
    live = x.acts & (advantage != 0) & ~flat & ~ratios.bounded(x.log_ratio, config.max_log_ratio)
    moving, _ = gate(torch.where(live, x.log_ratio, 0.0))
    loss = -advantage * torch.where(live, moving, torch.where(advantage == 0, 1.0, value)) * (4.0 / t)
    return Surrogate(loss, live, True)


def cispo(x: Inputs, config: LossConfig) -> Surrogate:
    """-min(r, cap) A log pi, the capped ratio without gradient (2506.13585 Eq. 4 and 5)."""
    exponent, scale, weight = _apart(x)
    capped = x.log_ratio.detach().exp() > config.epsilon_high
    loss, live = _weighted_logp(torch.where(capped, config.epsilon_high * weight, exponent.detach().exp() * scale), x)
    clipped_high = capped & (x.advantage > 0)
    return Surrogate(loss, live, False, torch.zeros_like(clipped_high), clipped_high, weighted=True)


def vespo(x: Inputs, config: LossConfig) -> Surrogate:
    """-phi(w) A log pi, phi(w) = e^l w^k e^(-l w) without gradient, w the ratio of the sequence (2602.10693).

    k and l by the sign of A; phi(1) = 1.
    """
    gain, c = x.advantage >= 0, config.vespo
    k = torch.full_like(x.advantage, c.k_neg).masked_fill(gain, c.k_pos)
    decay = torch.full_like(x.advantage, c.lambda_neg).masked_fill(gain, c.lambda_pos)
    log_w = x.log_ratio.detach()
    weight = (decay + k * log_w - decay * log_w.exp()).exp()
    loss, live = _weighted_logp(weight, x)
    return Surrogate(loss, live, False, weight=weight)


def _weighted_logp(weight: Tensor, x: Inputs) -> tuple[Tensor, Tensor]:
    live = x.acts & (x.advantage != 0) & (weight != 0)
    return torch.where(live, -(weight * x.advantage) * torch.where(live, x.logp, 0.0), 0.0), live


# By the names in `rlloss.loss_types`.
SURROGATES: dict[str, Callable[[Inputs, LossConfig], Surrogate]] = {
    "clip": clip, "cispo": cispo, "sapo": sapo, "vespo": vespo, "kl_cov": kl_cov,
}  # fmt: skip
