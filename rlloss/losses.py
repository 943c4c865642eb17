"""The losses as a table: name = (surrogate, aggregation). Everything here is [B, T] floats; no vocabulary.

A token that is masked, not selected or clipped, or whose advantage is 0, gets a gradient of exactly 0 whatever its
log-ratio: its log-ratio is replaced before the exponential, because 0 * inf is NaN.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss import checks
from rlloss.config import LossConfig
from rlloss.masks import entropy_cutoff, off_policy_mask, top_entropy_mask


class PolicyLoss(NamedTuple):
    """loss: 0-d, differentiable. metrics: name -> detached fp32 tensor on the device, a sum over what it counts.

    Counts: `tokens` (mask), `sequences`, `kept` (by entropy), `live` (with a nonzero gradient), `ratios` (importance
    ratios: tokens, or sequences at ratio level "sequence"). Sums over tokens: `surrogate`, `kl`, `entropy`,
    `entropy_kept`, `entropy_cutoff`. Sums over ratios: `ratio`, `clip_low`, `clip_high`, `clip_region`. The one
    exception are `clip_low_min` and `clip_high_max`, the extreme shares of a sequence (NaN if no sequence counts).
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Surrogate(NamedTuple):
    """loss and live, shaped [B, T] or [B, 1]; clip_low and clip_high as the metrics count them."""

    loss: Tensor
    live: Tensor
    clip_low: Tensor
    clip_high: Tensor


def clip(log_ratio: Tensor, advantage: Tensor, selected: Tensor, config: LossConfig) -> Surrogate:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r <= delta in the first term, as one clamp per sign of A:

    A > 0: r <= min(delta, 1 + high);    A < 0: 1 - low <= r <= max(delta, 1 + high), or no upper bound without delta.
    On a bound the gradient flows, as that of torch.clamp.
    """
    low, high, delta = 1.0 - config.epsilon_low, 1.0 + config.epsilon_high, config.delta
    ratio = log_ratio.detach().exp()
    upper_gain = high if delta is None else min(delta, high)
    upper_loss = torch.inf if delta is None else max(delta, high)
    # masked_fill and not where, which would round the bounds of fp64 ratios to fp32.
    upper = torch.full_like(advantage, upper_loss).masked_fill(advantage > 0, upper_gain)
    lower = torch.zeros_like(advantage).masked_fill(advantage < 0, low)
    # Written so that a NaN ratio or advantage is live.
    live = selected & ~(ratio > upper) & ~(ratio < lower) & (advantage != 0) & ~_bounded(log_ratio, config)
    frozen = torch.where(advantage == 0, 1.0, torch.minimum(torch.maximum(ratio, lower), upper))
    loss = -advantage * torch.where(live, torch.where(live, log_ratio, 0.0).exp(), frozen)
    capped = ratio if delta is None else ratio.clamp(max=delta)
    return Surrogate(loss, live, (capped < low) & (advantage < 0), (capped > high) & (advantage > 0))


def sequence_mean(loss: Tensor, counted: Tensor, denominator: Tensor | float | None, config: LossConfig) -> Tensor:
    """Mean over the counted tokens of each sequence, summed over sequences / their number."""
    per_sequence = loss.sum(-1) / counted.sum(-1).clamp(min=1)
    return per_sequence.sum() / (max(loss.shape[0], 1) if denominator is None else denominator)


def token_mean(loss: Tensor, counted: Tensor, denominator: Tensor | float | None, config: LossConfig) -> Tensor:
    """Sum over tokens / the number of counted tokens."""
    return loss.sum() / (counted.sum().clamp(min=1) if denominator is None else denominator)


def constant_length(loss: Tensor, counted: Tensor, denominator: Tensor | float | None, config: LossConfig) -> Tensor:
    """Sum over tokens / (B * max_completion_length)."""
    assert config.max_completion_length is not None
    default = max(loss.shape[0], 1) * config.max_completion_length
    return loss.sum() / (default if denominator is None else denominator)


class LossType(NamedTuple):
    surrogate: Callable[[Tensor, Tensor, Tensor, LossConfig], Surrogate]
    aggregate: Callable[[Tensor, Tensor, Tensor | float | None, LossConfig], Tensor]


LOSSES = {
    "grpo": LossType(clip, sequence_mean),  # 2402.03300
    "bnpo": LossType(clip, token_mean),
    "dr_grpo": LossType(clip, constant_length),  # 2503.20783
    "dapo": LossType(clip, token_mean),  # 2503.14476
}


def policy_loss(
    logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    config: LossConfig | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_ratio: Tensor | None = None,
    entropy: Tensor | None = None,
    cutoff: Tensor | float | None = None,
    denominator: Tensor | float | None = None,
) -> PolicyLoss:
    """The loss of a batch of completions from its log-probabilities.

    Args:
        logp: `[B, T]` log-probability of each token under the policy, in nats, with gradient; fp32 at least inside.
        advantage: `[B]`, or `[B, T]` for one per token.
        mask: `[B, T]` bool, True = counts. What stands in the other columns does not matter, NaN included.
        config: `LossConfig()` if None.
        old_logp: `[B, T]` log-probability under the policy that the batch was made with. None: the batch is
            on-policy, every ratio is exactly 1, and its gradient flows.
        ref_logp: `[B, T]` log-probability under the reference; needed if and only if `config.beta` is not 0.
        sampler_ratio: `[B, T]` or `[B, 1]` finite weight of the surrogate, e.g. pi_old / pi_sampler truncated or
            masked. A 0 removes the surrogate of the token, whatever its log-ratio.
        entropy: `[B, T]` in nats. Needed for `top_entropy_quantile` < 1, and with gradient for `entropy_coef`.
        cutoff: keep tokens with entropy >= cutoff; None: the quantile of this call's tokens.
        denominator: what the sum over tokens ("grpo": over sequences) is divided by; whoever splits a batch over
            micro-batches or ranks passes the count of the whole. None: this call's own: mask tokens (the kept ones
            with entropy_denominator="kept"), B for "grpo", B * max_completion_length for "dr_grpo".

    Returns:
        `PolicyLoss(loss, metrics)`. An empty mask gives a differentiable 0.

    Raises:
        ValueError, TypeError: an argument does not fit, is missing, or would have no effect; it is named.

    Source: the formulas are in `rlloss.reference`, their papers in `LossConfig`.
    """
    config = LossConfig() if config is None else config
    logp, advantage, old_logp, ref_logp, sampler_ratio, entropy = _checked(
        logp, advantage, mask, config, old_logp, ref_logp, sampler_ratio, entropy, cutoff, denominator
    )
    loss_type = LOSSES[config.loss_type]

    log_ratio = torch.where(mask, logp - (logp.detach() if old_logp is None else old_logp), 0.0)
    if config.ratio_level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    if config.max_log_ratio is not None:
        log_ratio = log_ratio.clamp(-config.max_log_ratio, config.max_log_ratio)

    kept, cutoff = _kept(entropy, mask, cutoff, config)
    acts = kept
    if config.off_policy_threshold is not None:
        behavior_logp = logp.detach() if old_logp is None else old_logp
        acts = acts & off_policy_mask(advantage, logp, behavior_logp, mask, config.off_policy_threshold)
    if sampler_ratio is not None:
        acts = acts & (sampler_ratio != 0)

    one_per_sequence = log_ratio.shape[1] == 1 and advantage.shape[1] == 1
    per_ratio = acts.any(-1, keepdim=True) if one_per_sequence else acts
    surrogate = loss_type.surrogate(log_ratio, advantage, per_ratio, config)
    token_loss = torch.where(acts, surrogate.loss.expand_as(mask), 0.0)
    if sampler_ratio is not None:
        token_loss = token_loss * torch.where(acts, sampler_ratio, 0.0)
    surrogate_sum = token_loss.detach().sum()

    kl = kl_live = None
    if ref_logp is not None:
        kl, kl_live = _kl(torch.where(mask, ref_logp - logp, 0.0), log_ratio, mask, config)
        token_loss = token_loss + config.beta * kl

    counted = kept if config.entropy_denominator == "kept" else mask
    loss = loss_type.aggregate(token_loss, counted, denominator, config)
    live = acts & surrogate.live
    if config.ratio_level == "sequence":
        live = live.any(-1, keepdim=True) & mask  # a sequence's ratio depends on each of its tokens
    if kl_live is not None:
        live = live | kl_live
    if entropy is not None and config.entropy_coef != 0.0:
        loss = loss - config.entropy_coef * (torch.where(kept, entropy, 0.0).sum() / kept.sum().clamp(min=1))
        live = live | kept

    metrics = {"tokens": mask.sum(), "sequences": mask.any(-1).sum(), "kept": kept.sum(), "live": live.sum()}
    metrics |= {"surrogate": surrogate_sum, **_clip_metrics(surrogate, log_ratio, mask)}
    if kl is not None:
        metrics["kl"] = kl.sum()
    if entropy is not None:
        metrics["entropy"] = torch.where(mask, entropy, 0.0).sum()
        metrics["entropy_kept"] = torch.where(kept, entropy, 0.0).sum()
    if cutoff is not None:
        metrics["entropy_cutoff"] = torch.where(mask, cutoff, 0.0).sum()
    return PolicyLoss(loss, {name: value.detach().float() for name, value in metrics.items()})


def means(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each sum divided by its count (reduce the sums over ranks and micro-batches first), and kept and live shares."""
    ratios = ("ratio", "clip_low", "clip_high", "clip_region")
    tokens = ("surrogate", "kl", "entropy", "entropy_cutoff")
    result = {name: metrics[name] / metrics["tokens"].clamp(min=1) for name in tokens if name in metrics}
    result |= {name: metrics[name] / metrics["ratios"].clamp(min=1) for name in ratios}
    if "entropy_kept" in metrics:
        result["entropy_kept"] = metrics["entropy_kept"] / metrics["kept"].clamp(min=1)
    for share in ("kept", "live"):
        result[f"{share}_share"] = metrics[share] / metrics["tokens"].clamp(min=1)
    return result


def _kept(
    entropy: Tensor | None, mask: Tensor, cutoff: Tensor | float | None, config: LossConfig
) -> tuple[Tensor, Tensor | float | None]:
    """(tokens that the surrogate acts on, the entropy at which they begin or None)."""
    rho = config.top_entropy_quantile
    if entropy is None or rho == 1.0:
        return mask, None
    if cutoff is None and not config.exact_k:
        cutoff = entropy_cutoff(entropy, mask, rho)
    return top_entropy_mask(entropy, mask, rho, cutoff=cutoff, exact_k=config.exact_k), cutoff


def _kl(difference: Tensor, log_ratio: Tensor, mask: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """KL(policy || reference) of each token from ref_logp - logp, and where it has a gradient.

    k2 and k3 are flat where the two policies agree; there the importance ratio is left out, which may be infinite.
    """
    flat = difference.detach() == 0.0
    if config.kl_estimator == "k1":
        kl, live = -difference, mask
    elif config.kl_estimator == "k2":
        kl, live = difference.square() / 2.0, mask & ~flat
    else:
        flat = flat | (difference.detach().exp() == 1.0)
        kl, live = difference.exp() - difference - 1.0, mask & ~flat
    if config.kl_bias_correction:
        kl = torch.where(live, kl * torch.where(live, log_ratio, 0.0).exp(), 0.0)
        if log_ratio.shape != mask.shape:
            through_ratio = live.any(-1, keepdim=True) & mask & ~_bounded(log_ratio, config)
            live = live | through_ratio
    return kl, live


def _bounded(log_ratio: Tensor, config: LossConfig) -> Tensor:
    """Where `max_log_ratio` has made the ratio a constant."""
    if config.max_log_ratio is None:
        return torch.zeros_like(log_ratio, dtype=torch.bool)
    return log_ratio.detach().abs() >= config.max_log_ratio


def _clip_metrics(surrogate: Surrogate, log_ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Sums over ratios; one per sequence where neither the ratio nor the advantage differs within it."""
    low, high = surrogate.clip_low, surrogate.clip_high
    per_sequence = low.shape[1] == 1 and mask.shape[1] != 1
    counted = torch.ones_like(low) if per_sequence else mask
    low, high = low & counted, high & counted
    count = counted.sum(-1)

    def share(clipped: Tensor, missing: float) -> Tensor:
        shares = torch.where(count > 0, clipped.sum(-1) / count.clamp(min=1), missing)
        return torch.cat([shares, shares.new_full((1,), missing)])  # the least and the greatest of no sequence

    nothing = ~(count > 0).any()
    return {
        "ratios": count.sum(),
        "ratio": torch.where(counted, log_ratio.detach().exp(), 0.0).sum(),
        "clip_low": low.sum(),
        "clip_high": high.sum(),
        "clip_region": (low | high).sum(),
        "clip_low_min": torch.where(nothing, torch.nan, share(low, torch.inf).amin()),
        "clip_high_max": torch.where(nothing, torch.nan, share(high, -torch.inf).amax()),
    }


def _checked(
    logp, advantage, mask, config, old_logp, ref_logp, sampler_ratio, entropy, cutoff, denominator
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Check the arguments against each other; return them in fp32 or better, detached, the advantage as [B, 1 or T]."""
    if not isinstance(config, LossConfig):
        raise TypeError(f"config: found {type(config).__name__}, expected a LossConfig")
    for name, x in (("cutoff", cutoff), ("denominator", denominator)):
        shape = tuple(x.shape) if isinstance(x, Tensor) else ()
        checks.require(shape in ((), (1,)), name, f"shape {shape}", "one number")
    if denominator is not None and not isinstance(denominator, Tensor):
        checks.positive("denominator", denominator)
    checks.floating("logp", logp)
    checks.require(logp.dim() == 2, "logp", f"shape {tuple(logp.shape)}", "[B, T]")
    checks.boolean("mask", mask)
    checks.same_shape("mask", mask, logp.shape, "like logp")
    B, T = logp.shape
    checks.floating("advantage", advantage)
    checks.require(
        tuple(advantage.shape) in {(B,), (B, T)}, "advantage", f"shape {tuple(advantage.shape)}",
        f"[B] = ({B},) or [B, T] = ({B}, {T})",
    )  # fmt: skip
    for name, x in (("old_logp", old_logp), ("ref_logp", ref_logp), ("entropy", entropy)):
        if x is not None:
            checks.floating(name, x)
            checks.same_shape(name, x, logp.shape, "like logp")
    if sampler_ratio is not None:
        checks.floating("sampler_ratio", sampler_ratio)
        checks.require(
            tuple(sampler_ratio.shape) in {(B, 1), (B, T)}, "sampler_ratio", f"shape {tuple(sampler_ratio.shape)}",
            f"[B, 1] = ({B}, 1) or [B, T] = ({B}, {T})",
        )  # fmt: skip
    checks.require(
        (ref_logp is not None) == (config.beta != 0.0), "ref_logp", "None" if ref_logp is None else "a tensor",
        f"{'a tensor' if config.beta != 0.0 else 'None'} with beta={config.beta}",
    )  # fmt: skip
    needs_entropy = config.top_entropy_quantile < 1.0 or config.entropy_coef != 0.0
    checks.require(
        entropy is not None or not needs_entropy, "entropy", None,
        f"a [B, T] tensor with top_entropy_quantile={config.top_entropy_quantile}, entropy_coef={config.entropy_coef}",
    )  # fmt: skip
    has_gradient = entropy is not None and entropy.requires_grad
    checks.require(
        config.entropy_coef == 0.0 or has_gradient or not torch.is_grad_enabled(),
        "entropy", "a tensor without gradient", f"one with gradient with entropy_coef={config.entropy_coef}",
    )  # fmt: skip
    checks.require(
        cutoff is None or (config.top_entropy_quantile < 1.0 and not config.exact_k), "cutoff", cutoff,
        "None with top_entropy_quantile=1.0 or exact_k, where it has no effect",
    )  # fmt: skip
    logp = logp if logp.dtype == torch.float64 else logp.float()
    if entropy is not None and entropy.dtype != torch.float64:
        entropy = entropy.float()
    advantage = advantage if advantage.dim() == 2 else advantage.unsqueeze(1)
    old_logp, ref_logp, sampler_ratio = (
        None if x is None else x.detach().to(logp.dtype) for x in (old_logp, ref_logp, sampler_ratio)
    )
    return logp, advantage.detach().to(logp.dtype), old_logp, ref_logp, sampler_ratio, entropy
