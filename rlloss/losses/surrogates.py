"""Each surrogate computes a token's loss and its slope from the token's log-ratio and advantage.

Where the loss is flat (clipped, advantage 0, or an underflowed ratio) the slope is exactly 0 whatever the ratio is; a
NaN makes it NaN. The result for a token on which the surrogate does not act is never read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlloss.config import LossConfig

_FAR = 80.0  # e^80 and e^-80 are normal numbers of fp32


class Inputs(NamedTuple):
    """Inputs of a surrogate, without gradient.

    picked marks the tokens with the largest covariance, for "kl_cov". weight is the sampler ratio, which multiplies the
    loss.
    """

    logp: Tensor  # [B, T]
    log_ratio: Tensor  # [B, T], or [B, 1] where a sequence has one
    advantage: Tensor  # [B, T] or [B, 1]
    picked: Tensor | None = None  # [B, T] bool
    weight: Tensor | None = None  # [B, T] or [B, 1]


class Surrogate(NamedTuple):
    """Loss of each token and its slopes, [B, T], or [B, 1] if all tokens of a sequence have the same.

    by_log_ratio and by_logp are d loss / d log ratio and d loss / d logp; None means 0. If both are None, `surrogate`
    takes them from autograd. weighted tells whether loss and slopes already contain the sampler ratio. The other fields
    are for the metrics.
    """

    loss: Tensor
    by_log_ratio: Tensor | None = None
    by_logp: Tensor | None = None
    weighted: bool = False
    clip_low: Tensor | None = None
    clip_high: Tensor | None = None
    weight: Tensor | None = None


Formula = Callable[[Inputs, LossConfig], Surrogate]


def surrogate(name: str, x: Inputs, acts: Tensor, config: LossConfig) -> Surrogate:
    """Return weighted loss and slopes by the formula of that name, 0 for tokens that do not act (acts [B, T] bool)."""
    formula = SURROGATES[name]
    found = formula(x, config)
    if found.by_log_ratio is None and found.by_logp is None:
        found = _differentiated(formula, x, acts, config)
    weight = None if found.weighted else x.weight

    def acting(value: Tensor | None) -> Any:
        if value is not None and weight is not None:
            value = torch.where(value == 0.0, 0.0, value * weight)
        return None if value is None else torch.where(acts, value, 0.0)

    return found._replace(
        loss=acting(found.loss), by_log_ratio=acting(found.by_log_ratio), by_logp=acting(found.by_logp)
    )


def _differentiated(formula: Formula, x: Inputs, acts: Tensor, config: LossConfig) -> Surrogate:
    """Return loss and slopes of a formula that returns only its loss."""
    with torch.inference_mode(False), torch.enable_grad():
        copies: Any = (None if y is None else y.clone() for y in x)  # autograd cannot save inference tensors
        x, acts = Inputs(*copies), acts.clone()
        # Each token gets its own log-ratio, 0 where it does not act, so the formula need not handle an overflow.
        leaves = [torch.where(acts, y.expand_as(acts), 0.0).requires_grad_() for y in (x.log_ratio, x.logp)]
        found = formula(x._replace(log_ratio=leaves[0], logp=leaves[1]), config)
        total = torch.where(acts, found.loss, 0.0).sum()
        if total.requires_grad:
            slopes = torch.autograd.grad(total, leaves, materialize_grads=True)
        else:  # the loss is constant
            slopes = (torch.zeros_like(leaf) for leaf in leaves)
    by_log_ratio, by_logp = (slope.detach() for slope in slopes)
    own: Any = (y.detach() if isinstance(y, Tensor) else y for y in found)
    return Surrogate(*own)._replace(by_log_ratio=by_log_ratio, by_logp=by_logp)


def _apart(x: Inputs, ratio: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """Return (factor, scale, weight), where factor * scale is the ratio times the weight.

    A ratio beyond fp32 times a weight near 0, or the reverse, may be an ordinary number.
    """
    if x.weight is None:
        return ratio, 1.0, 1.0
    beyond = (x.log_ratio - x.log_ratio.clamp(-_FAR, _FAR)).clamp(-1e3, 1e3)  # inf - inf is NaN
    scale = torch.where(x.weight == 0.0, 0.0, x.weight * beyond.exp())
    return (x.log_ratio - beyond).exp(), scale, x.weight


def clip_bounds(config: LossConfig) -> tuple[float, float, float]:
    """Return bounds of the ratio: (lower where A < 0, upper where A > 0, upper where A < 0)."""
    high, delta = 1.0 + config.epsilon_high, config.delta
    gain, loss = (high, torch.inf) if delta is None else (min(delta, high), max(delta, high))
    return 1.0 - config.epsilon_low, gain, loss


def clip(x: Inputs, config: LossConfig) -> Surrogate:
    """-min(r A, clip(r, 1 - low, 1 + high) A), with r <= delta in the first term, as one clamp per sign of A.

    A > 0: r <= min(delta, 1 + high). A < 0: 1 - low <= r <= max(delta, 1 + high), without delta no upper bound. The
    slope is -r A, on a bound too, as with torch.clamp.
    """
    advantage, ratio = x.advantage, x.log_ratio.exp()
    low, upper_gain, upper_loss = clip_bounds(config)
    # torch.where would round the bounds of fp64 ratios to fp32; masked_fill does not.
    upper = torch.full_like(advantage, upper_loss).masked_fill(advantage > 0, upper_gain)
    lower = torch.zeros_like(advantage).masked_fill(advantage < 0, low)
    flat = (ratio > upper) | (ratio < lower) | (advantage == 0)
    frozen = torch.where(advantage == 0, 1.0, torch.minimum(torch.maximum(ratio, lower), upper))
    factor, scale, weight = _apart(x, ratio)
    moving = -advantage * factor * scale
    capped = ratio if config.delta is None else ratio.clamp(max=config.delta)
    return Surrogate(
        torch.where(flat, -advantage * frozen * weight, moving),
        by_log_ratio=torch.where(flat, 0.0, moving),
        weighted=True,
        clip_low=(capped < low) & (advantage < 0),
        clip_high=(capped > 1.0 + config.epsilon_high) & (advantage > 0),
    )


def clipped(log_ratio: Tensor, advantage: Tensor, config: LossConfig) -> Tensor:
    """Return where min(r A, clip(r) A) is the clipped term, [B, T] bool."""
    ratio, (low, gain, loss) = log_ratio.exp(), clip_bounds(config)
    return ((advantage > 0) & (ratio > gain)) | ((advantage < 0) & ((ratio < low) | (ratio > loss)))


def kl_cov(x: Inputs, config: LossConfig) -> Surrogate:
    """-A r without a clip; picked tokens add kl_coef abs(log r) or kl_coef (r - 1 - log r) (2505.22617 Eq. 13).

    Both penalties are flat at r = 1, so on-policy they have no gradient.
    """
    assert x.picked is not None
    ratio, coef = x.log_ratio.exp(), config.covariance.kl_coef
    factor, scale, weight = _apart(x, ratio)
    if config.covariance.penalty == "abs":
        of_ratio = -x.advantage
        value, slope = x.log_ratio.abs() * weight, x.log_ratio.sign() * weight
        penalised = x.picked
    else:  # -A r and kl_coef r may cancel, so they form one term
        penalised = x.picked & (ratio != 1)
        of_ratio = torch.where(penalised, coef - x.advantage, -x.advantage)
        value, slope = -weight - x.log_ratio * weight, -weight * torch.ones_like(ratio)
    term = torch.where(of_ratio == 0, 0.0, of_ratio * factor * scale)
    value, slope = (coef * torch.where(penalised, y, 0.0) for y in (value, slope))
    return Surrogate(term + value, by_log_ratio=term + slope, weighted=True)


def sapo(x: Inputs, config: LossConfig) -> Surrogate:
    """-A sigmoid(t (r - 1)) 4 / t, where t depends on the sign of A (2511.20347 Eq. 5 and 6).

    With s = sigmoid(t (r - 1)) the slope is -4 A r s (1 - s). At r = 1 it equals the slope of -A r.
    """
    advantage, ratio = x.advantage, x.log_ratio.exp()
    t = torch.full_like(advantage, config.sapo.temperature_neg).masked_fill(advantage > 0, config.sapo.temperature_pos)
    g = t * (ratio - 1.0)
    small = torch.where(g > 0, -g, g).sigmoid()  # the smaller of s and 1 - s, without cancellation
    value = torch.where(g > 0, 1.0 - small, small)
    flat = (ratio == 0) | (small == 0) | (advantage == 0)
    return Surrogate(
        -advantage * torch.where(advantage == 0, 1.0, value) * (4.0 / t),
        by_log_ratio=torch.where(flat, 0.0, -4.0 * advantage * (ratio * small * (1.0 - small))),
    )


def cispo(x: Inputs, config: LossConfig) -> Surrogate:
    """-min(r, cap) A log pi, where the capped ratio has no gradient (2506.13585 Eq. 4 and 5)."""
    ratio = x.log_ratio.exp()
    factor, scale, weight = _apart(x, ratio)
    capped = ratio > config.epsilon_high
    slope = _constant(torch.where(capped, config.epsilon_high * weight, factor * scale), x.advantage)
    clip_high = capped & (x.advantage > 0)
    return Surrogate(
        _of_logp(slope, x), by_logp=slope, weighted=True, clip_low=torch.zeros_like(clip_high), clip_high=clip_high
    )


def vespo(x: Inputs, config: LossConfig) -> Surrogate:
    """-phi(w) A log pi, where phi(w) = e^l w^k e^(-l w) has no gradient and w is the sequence's ratio (2602.10693).

    k and l depend on the sign of A; phi(1) = 1.
    """
    gain, c = x.advantage >= 0, config.vespo
    k = torch.full_like(x.advantage, c.k_neg).masked_fill(gain, c.k_pos)
    decay = torch.full_like(x.advantage, c.lambda_neg).masked_fill(gain, c.lambda_pos)
    weight = (decay + k * x.log_ratio - decay * x.log_ratio.exp()).exp()
    slope = _constant(weight, x.advantage)
    return Surrogate(_of_logp(slope, x), by_logp=slope, weight=weight)


def _constant(weight: Tensor, advantage: Tensor) -> Tensor:
    """Return the slope -weight A of the loss -weight A log pi."""
    return torch.where((advantage == 0) | (weight == 0), 0.0, -(weight * advantage))


def _of_logp(slope: Tensor, x: Inputs) -> Tensor:
    return torch.where(slope == 0, 0.0, slope * x.logp)


# Keys are the surrogate names in `rlloss.loss_types`.
SURROGATES: dict[str, Formula] = {"clip": clip, "cispo": cispo, "sapo": sapo, "vespo": vespo, "kl_cov": kl_cov}
