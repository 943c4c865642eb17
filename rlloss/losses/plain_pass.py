"""Compute loss, metrics and one coefficient per token from [B, T] floats in plain torch, for every loss."""

import functools

import torch
from torch import Tensor

from rlloss.losses import acting_tokens
from rlloss.losses.acting_tokens import Tokens
from rlloss.losses.aggregate import divisor, over_sequence
from rlloss.losses.coefficients import Coefficients
from rlloss.losses.inputs import LossInputs, as_scalar
from rlloss.losses.kl import kl_of_tokens
from rlloss.losses.metrics import ratio_metrics
from rlloss.losses.ratios import Ratio, importance_ratio, minus
from rlloss.losses.surrogates import Inputs, surrogate


def plain_pass(inputs: LossInputs, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor], Coefficients]:
    """Return (loss, metrics, coefficients) of `policy_loss`."""
    logp, advantage, mask, config = inputs[:4]
    kept = acting_tokens.kept(inputs, tokens)
    acts = acting_tokens.acting(inputs, tokens, kept)

    def ratio_of(level: str, sampler_ratio: Tensor | None, bound: float | None) -> Ratio:
        return importance_ratio(logp, inputs.old_logp, mask, level, sampler_ratio, bound)

    if inputs.level == "product":  # the ratio itself contains the sampler ratio
        ratio, kl_level, weight = ratio_of("product", tokens.sampler_ratio, None), config.ratio_level, None
    else:
        ratio = ratio_of(inputs.level, None, config.max_log_ratio)
        kl_level, weight = inputs.level, tokens.sampler_ratio
    of_tokens = surrogate(
        inputs.loss_type.surrogate, Inputs(logp, ratio.log, advantage, tokens.picked, weight), acts, config
    )
    loss, slopes = of_tokens.loss, [of_tokens.by_logp]
    if of_tokens.by_log_ratio is not None:
        slopes.append(ratio.to_tokens(of_tokens.by_log_ratio))
    metrics = {"surrogate": loss.sum()}

    if inputs.ref_logp is not None:
        kl_ratio = ratio if kl_level == inputs.level else ratio_of(kl_level, None, config.max_log_ratio)
        kl = kl_of_tokens(torch.where(mask, -minus(logp, inputs.ref_logp), 0.0), kl_ratio, mask, config)
        loss = loss + config.beta * kl.value
        slopes.append(config.beta * kl.by_logp)
        if kl.by_log_ratio is not None:
            slopes.append(kl_ratio.to_tokens(config.beta * kl.by_log_ratio))
        metrics["kl"] = kl.value.sum()

    counted = kept if config.entropy_denominator == "kept" else mask
    slope = functools.reduce(torch.add, [x for x in slopes if x is not None])
    coef = over_sequence(slope, counted, inputs.loss_type)
    divided_by = divisor(counted, inputs.loss_type, inputs.denominator, config)
    loss = over_sequence(loss, counted, inputs.loss_type).sum() / divided_by
    coefficients, live = Coefficients(coef, 1.0 / as_scalar(divided_by, coef)), coef != 0
    if inputs.entropy is not None and config.entropy_coef != 0.0:
        of = kept if config.entropy_bonus_tokens == "kept" else mask
        n = of.sum().clamp(min=1)
        loss = loss - config.entropy_coef * (torch.where(of, inputs.entropy, 0.0).sum() / n)
        live = live | of
        coefficients = coefficients._replace(of_entropy=of, entropy_scale=-config.entropy_coef / as_scalar(n, coef))

    metrics = {"tokens": mask.sum(), "sequences": mask.any(-1).sum(), "kept": kept.sum(), "live": live.sum(), **metrics}
    per_sequence = ratio.log.shape[1] == 1 and advantage.shape[1] == 1
    metrics |= ratio_metrics(of_tokens, ratio.log, mask, per_sequence)
    if inputs.entropy is not None:
        metrics["entropy"] = torch.where(mask, inputs.entropy, 0.0).sum()
        metrics["entropy_kept"] = torch.where(kept, inputs.entropy, 0.0).sum()
    if tokens.cutoff is not None:
        metrics["entropy_cutoff"] = torch.where(mask, tokens.cutoff, 0.0).sum()
    if tokens.picked is not None:
        metrics["selected"] = tokens.picked.sum()
    return loss, {name: value.float() for name, value in metrics.items()}, coefficients
