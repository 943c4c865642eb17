"""The token pass in plain torch: every loss, on [B, T] floats, its gradient by autograd."""

import torch
from torch import Tensor

from rlloss.losses import acting_tokens, ratios
from rlloss.losses.acting_tokens import Tokens
from rlloss.losses.aggregate import aggregate
from rlloss.losses.inputs import LossInputs
from rlloss.losses.kl import kl_of_tokens
from rlloss.losses.metrics import ratio_metrics
from rlloss.losses.surrogates import SURROGATES, Inputs


def plain_pass(inputs: LossInputs, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of `policy_loss`."""
    logp, advantage, mask, config = inputs[:4]
    level, loss_type = inputs.level, inputs.loss_type
    kept = acting_tokens.kept(inputs, tokens)
    acts = acting_tokens.acting(inputs, tokens, kept)
    in_product = level == "product"  # the sampler's ratio is part of the ratio itself
    log_ratio = ratios.log_ratio(
        logp, inputs.old_logp, mask, level, tokens.sampler_ratio, None if in_product else config.max_log_ratio
    )
    weight = None if in_product or tokens.sampler_ratio is None else torch.where(acts, tokens.sampler_ratio, 0.0)
    per_sequence = log_ratio.shape[1] == 1 and advantage.shape[1] == 1
    # Where the weight of a sequence is NaN, a token that does not act would otherwise get 0 * NaN back.
    own_logp = torch.where(acts, logp, 0.0)
    where = acts.any(-1, keepdim=True) if per_sequence else acts
    surrogate = SURROGATES[loss_type.surrogate](
        Inputs(own_logp, log_ratio, advantage, where, tokens.picked, weight), config
    )
    token_loss = torch.where(acts, surrogate.loss.expand_as(mask), 0.0)
    if weight is not None and not surrogate.weighted:
        token_loss = token_loss * weight
    metrics = {"surrogate": token_loss.detach().sum()}
    live = acts & surrogate.live
    if level == "sequence" and surrogate.through_ratio:
        live = live.any(-1, keepdim=True) & mask  # a sequence's ratio depends on each of its tokens

    if inputs.ref_logp is not None:
        kl_level = config.ratio_level if in_product else level
        kl_ratio = ratios.log_ratio(logp, inputs.old_logp, mask, kl_level, None, config.max_log_ratio)
        difference = torch.where(mask, -ratios.minus(logp, inputs.ref_logp), 0.0)
        kl, kl_live = kl_of_tokens(difference, kl_ratio, mask, config)
        token_loss, live = token_loss + config.beta * kl, live | kl_live
        metrics["kl"] = kl.sum()

    counted = kept if config.entropy_denominator == "kept" else mask
    loss = aggregate(token_loss, counted, loss_type, inputs.denominator, config)
    if inputs.entropy is not None and config.entropy_coef != 0.0:
        of = kept if config.entropy_bonus_tokens == "kept" else mask
        mean = torch.where(of, inputs.entropy, 0.0).sum() / of.sum().clamp(min=1)
        loss, live = loss - config.entropy_coef * mean, live | of

    metrics = {"tokens": mask.sum(), "sequences": mask.any(-1).sum(), "kept": kept.sum(), "live": live.sum(), **metrics}
    metrics |= ratio_metrics(surrogate, log_ratio, mask, per_sequence)
    if inputs.entropy is not None:
        metrics["entropy"] = torch.where(mask, inputs.entropy, 0.0).sum()
        metrics["entropy_kept"] = torch.where(kept, inputs.entropy, 0.0).sum()
    if tokens.cutoff is not None:
        metrics["entropy_cutoff"] = torch.where(mask, tokens.cutoff, 0.0).sum()
    if tokens.picked is not None:
        metrics["selected"] = tokens.picked.sum()
    return loss, {name: value.detach().float() for name, value in metrics.items()}
