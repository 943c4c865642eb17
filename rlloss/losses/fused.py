"""The token pass as a registered operator: loss, metrics and coefficients of the losses that clip, in one launch."""

import torch
from torch import Tensor

from rlloss import backends
from rlloss.config import KL_ESTIMATORS, LossConfig
from rlloss.loss_types import LOSSES, LossType
from rlloss.losses import surrogates
from rlloss.losses.acting_tokens import Tokens
from rlloss.losses.aggregate import default_denominator
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


def _fake_gradients(logp, summary, coef, kept, g_loss, entropy_coef):
    return torch.empty_like(coef), coef.new_empty(kept.shape)


@operator("token_pass_backward", fake=_fake_gradients)
def _gradients(
    logp: Tensor, summary: Tensor, coef: Tensor, kept: Tensor, g_loss: Tensor, entropy_coef: float
) -> tuple[Tensor, Tensor]:
    """logp is not read: as an input it makes a second derivative an error and not a silent 0."""
    g_logp = torch.where(coef == 0.0, 0.0, coef * (g_loss * summary[-2]))
    if entropy_coef == 0.0:
        return g_logp, coef.new_empty(kept.shape)
    return g_logp, torch.where(kept, -entropy_coef * (g_loss * summary[-1]), 0.0)


def _setup_context(ctx, inputs, output):
    _, summary, coef, kept = output
    ctx.entropy_coef = inputs[-1]
    ctx.inputs = len(inputs)
    ctx.mark_non_differentiable(summary, coef, kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], summary, coef, kept)


def _backward(ctx, g_loss, *_):
    g_logp = g_entropy = None
    if g_loss is not None:
        g_logp, g_entropy = _gradients(*ctx.saved_tensors, g_loss, ctx.entropy_coef)
    return g_logp, g_entropy if ctx.entropy_coef != 0.0 else None, *(None for _ in range(ctx.inputs - 2))


_token_pass = operator("token_pass", fake=_fake, setup_context=_setup_context, backward=_backward)(_run)


def kernel_bounds(config: LossConfig) -> tuple[bool, list[float]]:
    """(whether it is CISPO, [low, high, gain, loss_bound]) as kernels/surrogates.py takes them."""
    if LOSSES[config.loss_type].kernel == "cispo":
        return True, [0.0, config.epsilon_high, config.epsilon_high, config.epsilon_high]
    low, gain, loss_bound = surrogates.clip_bounds(config)
    return False, [low, 1.0 + config.epsilon_high, gain, loss_bound]


def fused_pass(inputs: LossInputs, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of `policy_loss`."""
    config, entropy, denominator = inputs.config, inputs.entropy, inputs.denominator
    if denominator is None and inputs.loss_type.divided_by != "tokens":
        denominator = default_denominator(inputs.mask, inputs.loss_type, config)
    cispo, bounds = kernel_bounds(config)
    cutoff, last = (None, None) if tokens.selection is None else tokens.selection
    as_tensor = isinstance(denominator, Tensor)
    bonus = config.entropy_coef if entropy is not None else 0.0
    loss, summary, _, _ = _token_pass(
        inputs.logp,
        entropy if bonus != 0.0 or entropy is None else entropy.detach(),
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
    metrics = dict(zip(backends.triton.SUMMARY, summary.detach().unbind(), strict=True))
    unwanted = {"loss", "scale", "kept_scale"}
    unwanted |= set() if inputs.ref_logp is not None else {"kl"}
    unwanted |= set() if entropy is not None else {"entropy", "entropy_kept"}
    unwanted |= set() if tokens.cutoff is not None else {"entropy_cutoff"}
    metrics = {name: value for name, value in metrics.items() if name not in unwanted}
    return loss, metrics if tokens.picked is None else metrics | {"selected": tokens.picked.sum().float()}
