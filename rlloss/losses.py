"""The losses as a table: name = (ratio level, surrogate, aggregation). All on [B, T] floats; no vocabulary."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss import checks, ratios
from rlloss.config import LossConfig
from rlloss.masks import entropy_cutoff, off_policy_mask, top_entropy_mask, top_entropy_selection
from rlloss.surrogates import Inputs, Surrogate, cispo, clip, sapo, vespo
from rlloss.token_pass import fits, token_pass


class PolicyLoss(NamedTuple):
    """loss: 0-d, differentiable. metrics: name -> detached fp32 tensor on the device, a sum over what it counts.

    Counts: `tokens` (mask), `sequences`, `kept` (by entropy), `live` (with a nonzero gradient), `ratios` (importance
    ratios: tokens, or sequences where the loss has one ratio and one advantage per sequence). Sums over tokens:
    `surrogate`, `kl`, `entropy`, `entropy_kept`, `entropy_cutoff`. Sums over ratios: `ratio`; for the losses that
    clip `clip_low`, `clip_high`, `clip_region`; for "vespo" `weight`. The exceptions are `clip_low_min` and
    `clip_high_max`, the extreme shares of a sequence (NaN if no sequence counts).
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class LossType(NamedTuple):
    """level: of the ratio ("token", "sequence", "product"); None: `config.ratio_level`.

    mean_of_sequence: token losses are averaged over their sequence first. divided_by: what the sum is then divided
    by. row_local: a token's coefficient depends on no other token, as long as the ratio is per token and no selection
    looks at others.
    """

    surrogate: Callable[[Inputs, LossConfig], Surrogate]
    level: str | None
    mean_of_sequence: bool
    divided_by: str
    row_local: bool


LOSSES = {
    #                   surrogate, level, mean_of_sequence, divided_by, row_local
    "grpo": LossType(clip, None, True, "sequences", True),
    "bnpo": LossType(clip, None, False, "tokens", True),
    "dr_grpo": LossType(clip, None, False, "length", True),
    "dapo": LossType(clip, None, False, "tokens", True),
    "cispo": LossType(cispo, None, False, "tokens", True),
    "sapo": LossType(sapo, None, True, "sequences", True),
    "gspo": LossType(clip, "sequence", True, "sequences", False),
    "luspo": LossType(clip, None, False, "sequences", True),
    "vespo": LossType(vespo, "product", False, "tokens", False),
}


def default_denominator(counted: Tensor, loss_type: LossType, config: LossConfig) -> Tensor | float:
    """What this call's own tokens give: see the `denominator` of `policy_loss`."""
    B = max(counted.shape[0], 1)
    if loss_type.divided_by == "tokens":
        return counted.sum().clamp(min=1)
    return B if loss_type.divided_by == "sequences" else B * (config.max_completion_length or 1)


def aggregate(
    loss: Tensor, counted: Tensor, loss_type: LossType, denominator: Tensor | float | None, config: LossConfig
) -> Tensor:
    """One number from token losses [B, T] that are 0 where they do not count."""
    if loss_type.mean_of_sequence:
        loss = loss / counted.sum(-1, keepdim=True).clamp(min=1)
    return loss.sum() / (default_denominator(counted, loss_type, config) if denominator is None else denominator)


def row_local(config: LossConfig, cutoff: object, denominator: object) -> bool:
    """Whether a token's coefficient follows from its own row, the mask and what is given."""
    loss_type = LOSSES[config.loss_type]
    selects = config.top_entropy_quantile < 1.0
    counts_kept = config.entropy_denominator == "kept" and (denominator is None or loss_type.mean_of_sequence)
    return (
        loss_type.row_local
        and config.ratio_level == "token"
        and config.off_policy_threshold is None
        and not (selects and (cutoff is None or config.entropy_coef != 0.0 or counts_kept))
    )


def policy_loss(
    logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    config: LossConfig | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_ratio: Tensor | None = None,
    sampler_logp: Tensor | None = None,
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
        sampler_ratio: `[B, T]` or `[B, 1]` finite weight of the surrogate, as `sampler_ratio(...)` makes it or given.
            A 0 removes the surrogate of the token, whatever its log-ratio. "vespo" takes it into the weight of the
            sequence instead, where it is at least 1e-8.
        sampler_logp: `[B, T]` log-probability under the engine that sampled, for `off_policy_threshold`, which takes
            old_logp without it. A NaN (a token it could not score) is no evidence.
        entropy: `[B, T]` in nats. Needed for `top_entropy_quantile` < 1, and with gradient for `entropy_coef`.
        cutoff: keep tokens with entropy >= cutoff; None: the quantile of this call's tokens.
        denominator: what the sum over tokens ("grpo", "gspo", "sapo", "luspo": over sequences) is divided by; whoever
            splits a batch over micro-batches or ranks passes the count of the whole. None: this call's own: mask
            tokens (the kept ones with entropy_denominator="kept"), B for the losses over sequences,
            B * max_completion_length for "dr_grpo".

    Returns:
        `PolicyLoss(loss, metrics)`. An empty mask gives a differentiable 0. Where the Triton kernels run, the losses
        that clip and "cispo" are one launch, which has no second derivative; `rlloss.ops.backend("torch")` has one.

    Raises:
        ValueError, TypeError: an argument does not fit, is missing, or would have no effect; it is named.

    Source: the formulas are in `rlloss.reference`, their papers in `LossConfig`.
    """
    config = LossConfig() if config is None else config
    logp, advantage, old_logp, ref_logp, sampler_ratio, sampler_logp, entropy = checked(
        logp, advantage, mask, config, old_logp, ref_logp, sampler_ratio, sampler_logp, entropy, cutoff, denominator
    )
    loss_type = LOSSES[config.loss_type]
    level = loss_type.level or config.ratio_level
    if denominator is None and loss_type.divided_by != "tokens":
        denominator = default_denominator(mask, loss_type, config)
    if fits(loss_type.surrogate, logp):
        loss, metrics = token_pass(
            logp, entropy, advantage, mask, old_logp, ref_logp, sampler_ratio,
            old_logp if sampler_logp is None else sampler_logp, _selection(entropy, mask, cutoff, config), denominator,
            surrogate=loss_type.surrogate, level=level, mean_of_sequence=loss_type.mean_of_sequence, config=config,
        )  # fmt: skip
        return PolicyLoss(loss, metrics)
    log_ratio = ratios.log_ratio(logp, old_logp, mask, level, sampler_ratio, config.max_log_ratio)

    kept, cutoff = _kept(entropy, mask, cutoff, config)
    acts = kept
    if config.off_policy_threshold is not None:
        behavior_logp = sampler_logp if sampler_logp is not None else logp.detach() if old_logp is None else old_logp
        acts = acts & off_policy_mask(advantage, logp, behavior_logp, mask, config.off_policy_threshold)
    weight = None if level == "product" else sampler_ratio
    if weight is not None:
        acts = acts & (weight != 0)

    per_sequence = log_ratio.shape[1] == 1 and advantage.shape[1] == 1
    selected = acts.any(-1, keepdim=True) if per_sequence else acts
    # Where the weight of a sequence is NaN, a token that does not act would otherwise get 0 * NaN back.
    own_logp = torch.where(acts, logp, 0.0)
    surrogate = loss_type.surrogate(Inputs(own_logp, log_ratio, advantage, selected), config)
    token_loss = torch.where(acts, surrogate.loss.expand_as(mask), 0.0)
    if weight is not None:
        token_loss = token_loss * torch.where(acts, weight, 0.0)
    surrogate_sum = token_loss.detach().sum()

    kl = kl_live = None
    if ref_logp is not None:
        kl_level = config.ratio_level if level == "product" else level
        kl_ratio = ratios.log_ratio(logp, old_logp, mask, kl_level, None, config.max_log_ratio)
        kl, kl_live = _kl(torch.where(mask, ref_logp - logp, 0.0), kl_ratio, mask, config)
        token_loss = token_loss + config.beta * kl

    counted = kept if config.entropy_denominator == "kept" else mask
    loss = aggregate(token_loss, counted, loss_type, denominator, config)
    live = acts & surrogate.live
    if level == "sequence" and surrogate.through_ratio:
        live = live.any(-1, keepdim=True) & mask  # a sequence's ratio depends on each of its tokens
    if kl_live is not None:
        live = live | kl_live
    if entropy is not None and config.entropy_coef != 0.0:
        loss = loss - config.entropy_coef * (torch.where(kept, entropy, 0.0).sum() / kept.sum().clamp(min=1))
        live = live | kept

    metrics = {"tokens": mask.sum(), "sequences": mask.any(-1).sum(), "kept": kept.sum(), "live": live.sum()}
    metrics |= {"surrogate": surrogate_sum, **_ratio_metrics(surrogate, log_ratio, mask, per_sequence)}
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
    over = {
        "tokens": ("surrogate", "kl", "entropy", "entropy_cutoff"),
        "ratios": ("ratio", "clip_low", "clip_high", "clip_region", "weight"),
        "kept": ("entropy_kept",),
    }
    result = {
        name: metrics[name] / metrics[count].clamp(min=1)
        for count, names in over.items()
        for name in names
        if name in metrics
    }
    for share in ("kept", "live"):
        result[f"{share}_share"] = metrics[share] / metrics["tokens"].clamp(min=1)
    return result


def _selection(
    entropy: Tensor | None, mask: Tensor, cutoff: Tensor | float | None, config: LossConfig
) -> tuple[Tensor, Tensor | None] | None:
    """(cutoff, flat index of the last tie to keep or None) of the tokens that the surrogate acts on; None: all."""
    rho = config.top_entropy_quantile
    if entropy is None or rho == 1.0:
        return None
    if cutoff is None:
        return top_entropy_selection(entropy, mask, rho, exact_k=config.exact_k)
    return torch.as_tensor(cutoff, dtype=entropy.dtype, device=entropy.device).reshape(()), None


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
            through_ratio = live.any(-1, keepdim=True) & mask & ~ratios.bounded(log_ratio, config.max_log_ratio)
            live = live | through_ratio
    return kl, live


def _ratio_metrics(surrogate: Surrogate, log_ratio: Tensor, mask: Tensor, per_sequence: bool) -> dict[str, Tensor]:
    """Sums over ratios; one per sequence where neither the ratio nor the advantage differs within it."""
    counted = mask.new_ones(mask.shape[0], 1) if per_sequence and mask.shape[1] != 1 else mask
    count = counted.sum(-1)
    result = {"ratios": count.sum(), "ratio": torch.where(counted, log_ratio.detach().exp(), 0.0).sum()}
    if surrogate.weight is not None:
        result["weight"] = torch.where(counted, surrogate.weight, 0.0).sum()
    if surrogate.clip_low is None or surrogate.clip_high is None:
        return result
    low, high = surrogate.clip_low & counted, surrogate.clip_high & counted

    def share(clipped: Tensor, missing: float) -> Tensor:
        shares = torch.where(count > 0, clipped.sum(-1) / count.clamp(min=1), missing)
        return torch.cat([shares, shares.new_full((1,), missing)])  # the least and the greatest of no sequence

    nothing = ~(count > 0).any()
    return result | {
        "clip_low": low.sum(),
        "clip_high": high.sum(),
        "clip_region": (low | high).sum(),
        "clip_low_min": torch.where(nothing, torch.nan, share(low, torch.inf).amin()),
        "clip_high_max": torch.where(nothing, torch.nan, share(high, -torch.inf).amax()),
    }


def checked(
    logp, advantage, mask, config, old_logp, ref_logp, sampler_ratio, sampler_logp, entropy, cutoff, denominator
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
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
    per_token = {"old_logp": old_logp, "ref_logp": ref_logp, "sampler_logp": sampler_logp, "entropy": entropy}
    for name, x in per_token.items():
        if x is not None:
            checks.floating(name, x)
            checks.same_shape(name, x, logp.shape, "like logp")
    if sampler_ratio is not None:
        checks.floating("sampler_ratio", sampler_ratio)
        checks.require(
            tuple(sampler_ratio.shape) in {(B, 1), (B, T)}, "sampler_ratio", f"shape {tuple(sampler_ratio.shape)}",
            f"[B, 1] = ({B}, 1) or [B, T] = ({B}, {T})",
        )  # fmt: skip
    if ref_logp is None and config.beta != 0.0:
        checks.fail("ref_logp", None, f"a tensor with beta={config.beta}")
    checks.require(ref_logp is None or config.beta != 0.0, "ref_logp", "a tensor", "None with beta=0.0")
    checks.require(
        sampler_logp is None or config.off_policy_threshold is not None, "sampler_logp", "a tensor",
        "None with off_policy_threshold=None, where it has no effect",
    )  # fmt: skip
    needs_entropy = config.top_entropy_quantile < 1.0 or config.entropy_coef != 0.0
    if entropy is None and needs_entropy:
        settings = f"top_entropy_quantile={config.top_entropy_quantile}, entropy_coef={config.entropy_coef}"
        checks.fail("entropy", None, f"a [B, T] tensor with {settings}")
    has_gradient = entropy is not None and entropy.requires_grad
    if config.entropy_coef != 0.0 and not has_gradient and torch.is_grad_enabled():
        checks.fail(
            "entropy", "a tensor without gradient", f"one with gradient with entropy_coef={config.entropy_coef}"
        )
    checks.require(
        cutoff is None or (config.top_entropy_quantile < 1.0 and not config.exact_k), "cutoff", cutoff,
        "None with top_entropy_quantile=1.0 or exact_k, where it has no effect",
    )  # fmt: skip
    logp = logp if logp.dtype == torch.float64 else logp.float()
    if entropy is not None and entropy.dtype != torch.float64:
        entropy = entropy.float()
    advantage = advantage if advantage.dim() == 2 else advantage.unsqueeze(1)
    old_logp, ref_logp, sampler_ratio, sampler_logp = (
        None if x is None else x.detach().to(logp.dtype) for x in (old_logp, ref_logp, sampler_ratio, sampler_logp)
    )
    return logp, advantage.detach().to(logp.dtype), old_logp, ref_logp, sampler_ratio, sampler_logp, entropy
