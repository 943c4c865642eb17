"""The loss of a batch from the log-probabilities of its tokens: all on [B, T] floats, no vocabulary."""

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss import checks
from rlloss.config import LossConfig
from rlloss.loss_types import LOSSES, LossType
from rlloss.losses import ratios
from rlloss.losses.fused import fits, token_pass
from rlloss.losses.inputs import as_scalar, checked
from rlloss.losses.surrogates import SURROGATES, Inputs, Surrogate, clipped
from rlloss.tokens import covariance
from rlloss.tokens.masks import entropy_cutoff, off_policy_mask, top_entropy_mask, top_entropy_selection


class PolicyLoss(NamedTuple):
    """loss: 0-d, differentiable. metrics: name -> detached fp32 tensor on the device, a sum over what it counts.

    Counts: `tokens` (mask), `sequences`, `kept` (by entropy), `live` (with a gradient, also where those of a sequence
    cancel), for "clip_cov" and "kl_cov" `selected` (picked by covariance), `ratios` (importance ratios: tokens, or
    sequences where the loss has one ratio and one advantage per sequence). Sums over tokens:
    `surrogate`, `kl`, `entropy`, `entropy_kept`, `entropy_cutoff`. Sums over ratios: `ratio`; for the losses that
    clip `clip_low`, `clip_high`, `clip_region`; for "vespo" `weight`. The exceptions are `clip_low_min` and
    `clip_high_max`, the extreme shares of a sequence (NaN if no sequence counts).
    """

    loss: Tensor
    metrics: dict[str, Tensor]


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
    if denominator is None:
        denominator = default_denominator(counted, loss_type, config)
    elif isinstance(denominator, Tensor):
        denominator = torch.where(counted.any(), denominator.reshape(()), 1.0)  # 0 of nothing is a loss of 0
    return loss.sum() / denominator


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
    kept: Tensor | None = None,
    selected: Tensor | None = None,
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
        denominator: divisor of the loss summed over tokens ("grpo", "gspo", "sapo", "luspo": over sequences). Pass the
            count of the whole batch when you accumulate over micro-batches or ranks. None: this call's own: mask
            tokens (the kept ones with entropy_denominator="kept"), B for the losses over sequences,
            B * max_completion_length for "dr_grpo". A tensor may be 0 where nothing counts, as `mask.sum()` is; on a
            GPU it is not looked at.
        kept: `[B, T]` bool, the tokens that the surrogate acts on, for `top_entropy_quantile` < 1: part of the
            `top_entropy_mask` of a batch that was split. None: this call's own.
        selected: `[B, T]` bool, the tokens picked by covariance, part of the `covariance_selection` of a batch that was
            split; needed if and only if `config.covariance.scope` is "generation".

    A row of `[B, T]` has to be a whole sequence. Where sequences are split over ranks, means, ratios and weights of a
    sequence ("grpo", "gspo", "sapo", "vespo", ratio_level="sequence", `off_policy_threshold`) are wrong, and nothing
    shows it: gather the log-probabilities first. `docs/losses.md` has what may stay split.

    Returns:
        `PolicyLoss(loss, metrics)`. An empty mask gives a differentiable 0. Where the Triton kernels run, the losses
        that clip and "cispo" are one launch, which has no second derivative; `rlloss.backends.backend("torch")` has
        one.

    Raises:
        ValueError, TypeError: an argument does not fit, is missing, would have no effect, or requires a gradient, which
            only logp and entropy get; it is named.

    Source: the formulas are in `rlloss.reference`, their papers in `LossConfig`.
    """
    config = LossConfig() if config is None else config
    logp, advantage, old_logp, ref_logp, sampler_ratio, sampler_logp, entropy = checked(
        logp, advantage, mask, config, old_logp, ref_logp, sampler_ratio, sampler_logp, entropy, cutoff, denominator,
        kept, selected,
    )  # fmt: skip
    loss_type = LOSSES[config.loss_type]
    level = loss_type.level or config.ratio_level
    if denominator is None and loss_type.divided_by != "tokens":
        denominator = default_denominator(mask, loss_type, config)
    behavior_logp = old_logp if sampler_logp is None else sampler_logp
    log_ratio = functools.partial(ratios.log_ratio, logp, old_logp, mask)

    def surrogate_acts(kept: Tensor) -> Tensor:
        """Where the surrogate acts."""
        acts = kept
        if config.off_policy_threshold is not None:
            behavior = logp.detach() if behavior_logp is None else behavior_logp
            acts = acts & off_policy_mask(advantage, logp, behavior, mask, config.off_policy_threshold)
        return acts if sampler_ratio is None or level == "product" else acts & (sampler_ratio != 0)

    by_entropy, entropy_from = kept, cutoff
    if loss_type.picks is not None:
        if by_entropy is None:
            by_entropy, entropy_from = _kept(entropy, mask, cutoff, config)
        if selected is None:
            candidates = surrogate_acts(by_entropy)
            if loss_type.picked == "left out":
                of_token = log_ratio(level, None, config.max_log_ratio)
                candidates = candidates & ~clipped(of_token, advantage, config) & ~of_token.isnan()  # it must show
            selected = covariance.select(logp, advantage, mask, candidates, config.loss_type, config.covariance)
        else:
            selected = mask & selected
        if loss_type.picked == "left out":  # as a token that the sampler's ratio leaves out
            sampler_ratio = torch.where(selected, 0.0, logp.new_ones(()) if sampler_ratio is None else sampler_ratio)
        elif old_logp is None:
            _say_on_policy()

    if fits(loss_type, logp) and kept is None and config.entropy_bonus_tokens == "kept":
        loss, metrics = token_pass(
            logp, entropy, advantage, mask, old_logp, ref_logp, sampler_ratio, behavior_logp,
            _selection(entropy, mask, cutoff, config), denominator, level=level, config=config,
        )  # fmt: skip
        return PolicyLoss(loss, metrics if selected is None else metrics | {"selected": selected.sum().float()})

    log_ratio = log_ratio(level, sampler_ratio, None if level == "product" else config.max_log_ratio)
    if by_entropy is None:
        by_entropy, entropy_from = _kept(entropy, mask, cutoff, config)
    kept = mask & by_entropy
    acts = surrogate_acts(kept)
    weight = None if level == "product" or sampler_ratio is None else torch.where(acts, sampler_ratio, 0.0)
    per_sequence = log_ratio.shape[1] == 1 and advantage.shape[1] == 1
    acting = acts.any(-1, keepdim=True) if per_sequence else acts
    # Where the weight of a sequence is NaN, a token that does not act would otherwise get 0 * NaN back.
    own_logp = torch.where(acts, logp, 0.0)
    surrogate = SURROGATES[loss_type.surrogate](
        Inputs(own_logp, log_ratio, advantage, acting, selected, weight), config
    )
    token_loss = torch.where(acts, surrogate.loss.expand_as(mask), 0.0)
    if weight is not None and not surrogate.weighted:
        token_loss = token_loss * weight
    surrogate_sum = token_loss.detach().sum()

    kl = kl_live = None
    if ref_logp is not None:
        kl_level = config.ratio_level if level == "product" else level
        kl_ratio = ratios.log_ratio(logp, old_logp, mask, kl_level, None, config.max_log_ratio)
        kl, kl_live = _kl(torch.where(mask, -ratios.minus(logp, ref_logp), 0.0), kl_ratio, mask, config)
        token_loss = token_loss + config.beta * kl

    counted = kept if config.entropy_denominator == "kept" else mask
    loss = aggregate(token_loss, counted, loss_type, denominator, config)
    live = acts & surrogate.live
    if level == "sequence" and surrogate.through_ratio:
        live = live.any(-1, keepdim=True) & mask  # a sequence's ratio depends on each of its tokens
    if kl_live is not None:
        live = live | kl_live
    if entropy is not None and config.entropy_coef != 0.0:
        of = kept if config.entropy_bonus_tokens == "kept" else mask
        loss = loss - config.entropy_coef * (torch.where(of, entropy, 0.0).sum() / of.sum().clamp(min=1))
        live = live | of

    metrics = {"tokens": mask.sum(), "sequences": mask.any(-1).sum(), "kept": kept.sum(), "live": live.sum()}
    metrics |= {"surrogate": surrogate_sum, **_ratio_metrics(surrogate, log_ratio, mask, per_sequence)}
    if kl is not None:
        metrics["kl"] = kl.sum()
    if entropy is not None:
        metrics["entropy"] = torch.where(mask, entropy, 0.0).sum()
        metrics["entropy_kept"] = torch.where(kept, entropy, 0.0).sum()
    if entropy_from is not None:
        metrics["entropy_cutoff"] = torch.where(mask, entropy_from, 0.0).sum()
    if selected is not None:
        metrics["selected"] = selected.sum()
    return PolicyLoss(loss, {name: value.detach().float() for name, value in metrics.items()})


def means(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each sum divided by its count (reduce the sums over ranks and micro-batches first), and kept and live shares."""
    checks.tensors("metrics", metrics, ("tokens", "kept", "live"))
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
    for share in ("kept", "live", *(("selected",) if "selected" in metrics else ())):
        result[f"{share}_share"] = metrics[share] / metrics["tokens"].clamp(min=1)
    return result


def _say_on_policy() -> None:
    if not _said and not torch.compiler.is_compiling():
        _said.append(True)
        warnings.warn(
            "kl_cov without old_logp: on-policy every ratio is 1, where the penalty has no gradient, so that it cannot "
            "act; train more than one step on a batch",
            stacklevel=3,
        )


_said: list[bool] = []


def _selection(
    entropy: Tensor | None, mask: Tensor, cutoff: Tensor | float | None, config: LossConfig
) -> tuple[Tensor, Tensor | None] | None:
    """(cutoff, flat index of the last tie to keep or None) of the tokens that the surrogate acts on; None: all."""
    rho = config.top_entropy_quantile
    if entropy is None or rho == 1.0:
        return None
    if cutoff is None:
        return top_entropy_selection(entropy, mask, rho, exact_k=config.exact_k)
    return as_scalar(cutoff, entropy), None


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
        shares = torch.where(count > 0, clipped.sum(-1).float() / count.clamp(min=1), missing)
        return torch.cat([shares, shares.new_full((1,), missing)])  # the least and the greatest of no sequence

    nothing = ~(count > 0).any()
    return result | {
        "clip_low": low.sum(),
        "clip_high": high.sum(),
        "clip_region": (low | high).sum(),
        "clip_low_min": torch.where(nothing, torch.nan, share(low, torch.inf).amin()),
        "clip_high_max": torch.where(nothing, torch.nan, share(high, -torch.inf).amax()),
    }
