"""Forward and gradient in one launch: the row's gradient is written while the row is still in the cache.

Possible where a coefficient follows from its own row. The gradient, for an incoming gradient of 1, is held until the
backward, which multiplies it in place by what really comes in, decided on the device: nothing happens if that is 1. A
second backward (`retain_graph`) computes it anew from the logits, so that what the first one returned stays as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlloss import backends, ops
from rlloss.config import KL_ESTIMATORS, LossConfig
from rlloss.losses import LOSSES, PolicyLoss, checked, default_denominator, policy_loss, row_local
from rlloss.token_pass import fits, kernel_bounds


def why_two_launches(
    logits: Tensor, config: LossConfig, cutoff: Tensor | float | None, denominator: Tensor | float | None
) -> str | None:
    """What forbids the single launch; None: nothing."""
    if torch.compiler.is_compiling():
        return "a call inside torch.compile"
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return "logits without a gradient"
    if logits.dtype == torch.float16:
        return "fp16 logits, whose gradient without its loss scale would underflow"
    if not fits(LOSSES[config.loss_type].surrogate, logits):
        return f"loss_type={config.loss_type!r} and {logits.dtype} logits {tuple(logits.shape)} on {logits.device}"
    if not row_local(config, cutoff, denominator):
        return "settings by which a token's coefficient depends on other tokens"
    return None


def single_launch_loss(
    logits: Tensor,
    target: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    config: LossConfig,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    given: dict[str, Any],
    two_launches: Callable[[Tensor], PolicyLoss],
) -> PolicyLoss:
    """`two_launches(logits)`, whose arguments the others are, in one; `given` are those that go to `policy_loss`."""
    ops.check_call(logits, target, mask, temperature, softcap, logit_scale)
    scaling = (temperature, softcap, logit_scale)
    loss, names, *values = _SingleLaunch.apply(logits, target, advantage, mask, scaling, config, given, two_launches)
    return PolicyLoss(loss, dict(zip(names, values, strict=True)))


class _SingleLaunch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, advantage, mask, scaling, config, given, two_launches):
        result, grad, live = _run(logits, target, advantage, mask, *scaling, config, given)
        ctx.held = grad, live
        ctx.two_launches = two_launches
        ctx.save_for_backward(logits)
        ctx.mark_non_differentiable(*result.metrics.values())
        return result.loss, tuple(result.metrics), *result.metrics.values()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_loss, *_):
        (logits,) = ctx.saved_tensors
        held, ctx.held = ctx.held, None
        if held is None:
            with torch.enable_grad():
                leaf = logits.detach().requires_grad_()
                (grad,) = torch.autograd.grad(ctx.two_launches(leaf).loss, leaf, g_loss)
        else:
            grad, live = held
            backends.triton_gradient.scale_rows(grad, live, g_loss.to(torch.float32))
        return grad, *(None for _ in range(7))


def _run(
    logits, target, advantage, mask, temperature, softcap, logit_scale, config: LossConfig, given
) -> tuple[PolicyLoss, Tensor, Tensor]:
    loss_type = LOSSES[config.loss_type]
    stand_in = torch.empty(mask.shape, dtype=torch.float32, device=logits.device)  # only its shape and dtype matter
    arguments = (given["old_logp"], given["ref_logp"], given["sampler_ratio"], given["sampler_logp"])
    _, advantage_2d, old_logp, ref_logp, sampler_ratio, _, _ = checked(
        stand_in, advantage, mask, config, *arguments, stand_in, given["cutoff"], given["denominator"]
    )
    cispo, (low, _, gain, loss_bound) = kernel_bounds(loss_type.surrogate, config)
    cutoff = given["cutoff"]
    if cutoff is not None:
        cutoff = torch.as_tensor(cutoff, dtype=torch.float32, device=logits.device).reshape(())
    logp, entropy, grad, live = backends.triton_gradient.loss_gradient(
        logits,
        target.contiguous(),
        mask.contiguous(),
        temperature.to(torch.float32).contiguous() if isinstance(temperature, Tensor) else temperature,
        softcap,
        logit_scale,
        *(None if x is None else x.contiguous() for x in (advantage_2d, old_logp, ref_logp, sampler_ratio)),
        cutoff,
        _weights(mask, config, given["denominator"]),
        cispo=cispo,
        low=low,
        gain=gain,
        loss_bound=loss_bound,
        max_log_ratio=config.max_log_ratio,
        beta=float(config.beta),
        kl_estimator=1 + KL_ESTIMATORS.index(config.kl_estimator),
        kl_bias_correction=config.kl_bias_correction,
        bonus=config.entropy_coef != 0.0,
    )
    return policy_loss(logp, advantage, mask, config=config, entropy=entropy, **given), grad, live


def _weights(mask: Tensor, config: LossConfig, denominator: Tensor | float | None) -> Tensor:
    """[2, B]: by what the coefficients of logp and of entropy in each sequence are multiplied."""
    loss_type = LOSSES[config.loss_type]
    count = mask.sum(-1)
    if denominator is None:
        denominator = default_denominator(mask, loss_type, config)
    of_sequence = (
        1.0 / count.clamp(min=1) if loss_type.mean_of_sequence else torch.ones_like(count, dtype=torch.float32)
    )
    of_entropy = (-config.entropy_coef / count.sum().clamp(min=1)).expand_as(of_sequence)
    return torch.stack([of_sequence.to(torch.float32) / denominator, of_entropy]).to(torch.float32)
