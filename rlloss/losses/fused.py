"""The token pass as a registered operator: loss, metrics and coefficients of the losses that clip, in one launch."""

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
    """Whether the kernel knows the loss and its settings, and runs on the tensors."""
    alone = inputs.kept is None and inputs.config.entropy_bonus_tokens == "kept"
    return alone and knows(inputs.loss_type, inputs.logp)


def knows(loss_type: LossType, x: Tensor) -> bool:
    return loss_type.kernel is not None and x.numel() > 0 and backends.of(x) is backends.triton


def _run(
    logp: Tensor,
    entropy: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampler_ratio: Tensor | None,
    behavior_logp: Tensor | None,
    cutoff: Tensor | None,
    last: Tensor | None,
    denominator: Tensor | None,
    number: float | None,
    cispo: bool,
    sequence: bool,
    mean_of_sequence: bool,
    kept_counts: bool,
    bounds: list[float],
    delta: float | None,
    max_log_ratio: float | None,
    beta: float,
    kl_estimator: int,
    kl_bias_correction: bool,
    off_policy_threshold: float | None,
    entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    low, high, gain, loss_bound = bounds
    tensors = (advantage, mask, old_logp, ref_logp, sampler_ratio, behavior_logp, entropy, cutoff, last)
    return backends.triton.token_pass(
        logp.contiguous(),
        *(None if x is None else x.contiguous() for x in tensors),
        number if denominator is None else denominator.to(torch.float32),
        cispo=cispo,
        sequence=sequence,
        mean_of_sequence=mean_of_sequence,
        kept_counts=kept_counts,
        low=low,
        high=high,
        gain=gain,
        loss_bound=loss_bound,
        delta=delta,
        max_log_ratio=max_log_ratio,
        beta=beta,
        kl_estimator=kl_estimator,
        kl_bias_correction=kl_bias_correction,
        off_policy_threshold=off_policy_threshold,
        entropy_coef=entropy_coef,
    )


def _fake(logp, entropy, *settings):
    kept = logp.shape if settings[-1] != 0.0 else (0,)
    return (
        logp.new_empty(()),
        logp.new_empty(len(backends.triton.SUMMARY)),
        torch.empty_like(logp, memory_format=torch.contiguous_format),
        logp.new_empty(kept, dtype=torch.bool),
    )


_token_pass = operator("token_pass", fake=_fake)(_run)


def kernel_bounds(config: LossConfig) -> tuple[bool, list[float]]:
    """(whether it is CISPO, [low, high, gain, loss_bound]) as kernels/surrogates.py takes them."""
    if LOSSES[config.loss_type].kernel == "cispo":
        return True, [0.0, config.epsilon_high, config.epsilon_high, config.epsilon_high]
    low, gain, loss_bound = surrogates.clip_bounds(config)
    return False, [low, 1.0 + config.epsilon_high, gain, loss_bound]


def fused_pass(inputs: LossInputs, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor], Coefficients]:
    """(loss, metrics, coefficients) of `policy_loss`."""
    config, entropy, denominator = inputs.config, inputs.entropy, inputs.denominator
    if denominator is None and inputs.loss_type.divided_by != "tokens":
        denominator = default_denominator(inputs.mask, inputs.loss_type, config)
    cispo, bounds = kernel_bounds(config)
    cutoff, last = (None, None) if tokens.selection is None else tokens.selection
    as_tensor = isinstance(denominator, Tensor)
    bonus = config.entropy_coef if entropy is not None else 0.0
    loss, summary, coef, kept = _token_pass(
        inputs.logp,
        entropy,
        inputs.advantage,
        inputs.mask,
        inputs.old_logp,
        inputs.ref_logp,
        tokens.sampler_ratio,
        inputs.behavior_logp if config.off_policy_threshold is not None else None,
        cutoff,
        last,
        denominator if as_tensor else None,
        None if as_tensor or denominator is None else float(denominator),
        cispo,
        inputs.level == "sequence",
        inputs.loss_type.mean_of_sequence,
        config.entropy_denominator == "kept",
        bounds,
        None if config.delta is None else float(config.delta),
        None if config.max_log_ratio is None else float(config.max_log_ratio),
        float(config.beta),
        1 + KL_ESTIMATORS.index(config.kl_estimator),
        config.kl_bias_correction,
        None if config.off_policy_threshold is None else float(config.off_policy_threshold),
        float(bonus),
    )
    metrics = dict(zip(backends.triton.SUMMARY, summary.unbind(), strict=True))
    scale, kept_scale = metrics.pop("scale"), metrics.pop("kept_scale")
    coefficients = Coefficients(coef, scale)
    if bonus != 0.0:
        coefficients = Coefficients(coef, scale, kept, -bonus * kept_scale)
    unwanted = {"loss"}
    unwanted |= set() if inputs.ref_logp is not None else {"kl"}
    unwanted |= set() if entropy is not None else {"entropy", "entropy_kept"}
    unwanted |= set() if tokens.cutoff is not None else {"entropy_cutoff"}
    metrics = {name: value for name, value in metrics.items() if name not in unwanted}
    metrics |= {} if tokens.picked is None else {"selected": tokens.picked.sum().float()}
    return loss, metrics, coefficients
