"""Compute loss, metrics and coefficients in one Triton launch, for "cispo" and the losses that clip."""

import math
from typing import Any

import torch
from torch import Tensor

from rlloss import backends
from rlloss.config import KL_ESTIMATORS, LossConfig
from rlloss.loss_types import LOSSES, LossType
from rlloss.losses import surrogates
from rlloss.losses.acting_tokens import Tokens
from rlloss.losses.aggregate import default_denominator
from rlloss.losses.coefficients import Coefficients
from rlloss.losses.inputs import LossInputs
from rlloss.operators import operator


def fits(inputs: LossInputs) -> bool:
    """Return whether the kernel knows the loss and its settings, and runs on these tensors."""
    alone = inputs.kept is None and inputs.config.entropy_bonus_tokens == "kept"
    return alone and knows(inputs.loss_type, inputs.logp)


def knows(loss_type: LossType, x: Tensor) -> bool:
    return loss_type.kernel is not None and x.numel() > 0 and backends.of(x) is backends.triton


def _run(
    logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampler_ratio: Tensor | None,
    behavior_logp: Tensor | None,
    entropy: Tensor | None,
    cutoff: Tensor | None,
    last: Tensor | None,
    denominator: Tensor | None,
    settings: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = backends.triton
    tensors = (
        logp, advantage, mask, old_logp, ref_logp, sampler_ratio, behavior_logp, entropy, cutoff, last, denominator
    )  # fmt: skip
    tensors = kernels.TokenTensors(*[x if x is None else x.contiguous() for x in tensors])
    loss, summary, coef, kept = kernels.token_pass(tensors, kernels.TokenSettings(*settings))
    return loss, summary, coef, mask.new_empty(0) if kept is None else kept


def _fake(logp, *rest):
    kept = logp.shape if backends.triton.TokenSettings(*rest[-1]).entropy_coef != 0.0 else (0,)
    return (
        logp.new_empty(()),
        logp.new_empty(len(backends.triton.SUMMARY)),
        torch.empty_like(logp, memory_format=torch.contiguous_format),
        logp.new_empty(kept, dtype=torch.bool),
    )


_token_pass = operator("token_pass", fake=_fake)(_run)


def kernel_settings(config: LossConfig) -> Any:
    """Return the settings that the kernels read, as `TokenSettings`."""
    loss_type = LOSSES[config.loss_type]
    low, gain, loss_bound = surrogates.clip_bounds(config)
    high = 1.0 + config.epsilon_high
    if loss_type.caps_ratio:
        low, high = 0.0, config.epsilon_high
        gain = loss_bound = high

    def bound(value: float | None, none: float = math.nan) -> float:
        return none if value is None else float(value)

    return backends.triton.TokenSettings(
        cispo=float(loss_type.kernel == "cispo"),
        low=low,
        high=high,
        gain=gain,
        loss_bound=loss_bound,
        delta=bound(config.delta),
        max_log_ratio=bound(config.max_log_ratio),
        sequence=float((loss_type.level or config.ratio_level) == "sequence"),
        mean_of_sequence=float(loss_type.mean_of_sequence),
        kept_counts=float(config.entropy_denominator == "kept"),
        kl_estimator=1.0 + KL_ESTIMATORS.index(config.kl_estimator),
        kl_bias_correction=float(config.kl_bias_correction),
        beta=float(config.beta),
        off_policy_threshold=bound(config.off_policy_threshold, math.inf),
        entropy_coef=float(config.entropy_coef),
    )


def fused_pass(inputs: LossInputs, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor], Coefficients]:
    """Return (loss, metrics, coefficients) of `policy_loss`."""
    config, entropy, denominator = inputs.config, inputs.entropy, inputs.denominator
    if denominator is None and inputs.loss_type.divided_by != "tokens":
        denominator = default_denominator(inputs.mask, inputs.loss_type, config)
    cutoff, last = (None, None) if tokens.selection is None else tokens.selection
    settings = kernel_settings(config)
    if isinstance(denominator, Tensor):
        denominator = denominator.to(torch.float32)
    elif denominator is not None:
        settings, denominator = settings._replace(denominator=float(denominator)), None
    if entropy is None:
        settings = settings._replace(entropy_coef=0.0)
    loss, summary, coef, kept = _token_pass(
        inputs.logp, inputs.advantage, inputs.mask, inputs.old_logp, inputs.ref_logp, tokens.sampler_ratio,
        inputs.behavior_logp if config.off_policy_threshold is not None else None, entropy, cutoff, last, denominator,
        list(settings),
    )  # fmt: skip
    metrics = dict(zip(backends.triton.SUMMARY, summary.unbind(), strict=True))
    scale, kept_scale = metrics.pop("scale"), metrics.pop("kept_scale")
    coefficients = Coefficients(coef, scale)
    if settings.entropy_coef != 0.0:
        coefficients = Coefficients(coef, scale, kept, -settings.entropy_coef * kept_scale)
    unwanted = {"loss"}
    unwanted |= set() if inputs.ref_logp is not None else {"kl"}
    unwanted |= set() if entropy is not None else {"entropy", "entropy_kept"}
    unwanted |= set() if tokens.cutoff is not None else {"entropy_cutoff"}
    metrics = {name: value for name, value in metrics.items() if name not in unwanted}
    metrics |= {} if tokens.picked is None else {"selected": tokens.picked.sum().float()}
    return loss, metrics, coefficients
