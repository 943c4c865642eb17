"""Compute the forward and the gradient in one launch, which writes a row's gradient while the row is in the cache.

This is possible if a row's coefficient depends on that row alone. The gradient, for an incoming gradient of 1, is held
until the backward. For another incoming gradient the device writes the live rows of the held gradient anew, so they are
rounded once. A second backward (`retain_graph`) writes a gradient of its own and leaves the first result unchanged.
"""

import math

import torch
from torch import Tensor

from rlloss import backends
from rlloss.config import LossConfig
from rlloss.logits.statistics import LogitsInputs, check_call
from rlloss.loss_types import LOSSES
from rlloss.losses.aggregate import default_denominator, row_local
from rlloss.losses.fused import kernel_settings, knows
from rlloss.losses.inputs import AwaitingLogp, LossInputs, as_scalar, check
from rlloss.losses.loss import loss_of
from rlloss.losses.metrics import PolicyLoss


def why_two_launches(
    logits: Tensor, config: LossConfig, cutoff: Tensor | float | None, denominator: Tensor | float | None
) -> str | None:
    """Return the reason that forbids the single launch; None: it is possible."""
    if torch.compiler.is_compiling():
        return "a call inside torch.compile"
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return "logits without a gradient"
    if not knows(LOSSES[config.loss_type], logits):
        return f"loss_type={config.loss_type!r} and {logits.dtype} logits {tuple(logits.shape)} on {logits.device}"
    if not row_local(config, cutoff, denominator):
        return "settings by which a token's coefficient depends on other tokens"
    return None


def worthwhile(logits: Tensor) -> bool:
    """Return whether the rows that a GPU processes at once fit its L2 cache, so that the second read of a row hits."""
    if not logits.is_cuda:
        return True
    device = torch.cuda.get_device_properties(logits.device)
    *leading, V = logits.shape
    rows = math.prod(leading)
    (few,), (_, warps), (percent,) = (
        backends.choice(kernel, logits.device, logits.dtype, V) for kernel in ("split", "statistics", "single_launch")
    )
    if rows < few * device.multi_processor_count:  # with two launches, the forward would split the rows
        return False
    at_once = device.multi_processor_count * (device.max_threads_per_multi_processor // (warps * device.warp_size))
    in_flight = min(rows, at_once) * V * logits.element_size()
    return 100 * in_flight <= percent * device.L2_cache_size


class _SingleLaunch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, rows, given, arguments):
        grad, logp, entropy, saved, *coefs = backends.triton.gradient_in_forward(logits, *rows, *arguments)
        loss, metrics = loss_of(given(logp=logp, entropy=entropy))
        ctx.held, ctx.rows = grad, rows
        ctx.set_materialize_grads(False)  # of the metrics, one fill each
        ctx.save_for_backward(logits, saved, entropy, *coefs)
        ctx.mark_non_differentiable(*metrics.values())
        return loss, tuple(metrics), *metrics.values()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_loss, *_):
        if g_loss is None:
            return None, None, None, None
        logits, saved, entropy, *coefs = ctx.saved_tensors
        held, ctx.held = ctx.held, None
        factor = g_loss.to(torch.float32)
        coefs = (None if c is None else (c * factor).masked_fill_(c == 0.0, 0.0) for c in coefs)
        grad = backends.triton.token_stats_backward(
            logits, *ctx.rows, (saved, entropy), (*coefs, None),
            held=None if held is None else (held, factor),
        )  # fmt: skip
        return grad, None, None, None


def single_launch_loss(rows: LogitsInputs, given: AwaitingLogp) -> PolicyLoss:
    """Compute what `token_stats` followed by `policy_loss` would."""
    check_call(rows)
    logits, target, mask, transform = rows
    assert mask is not None
    stand_in = torch.empty(mask.shape, dtype=torch.float32, device=logits.device)  # only shape and dtype are read
    with torch.no_grad():
        inputs = check(given(logp=stand_in, entropy=stand_in))
    cutoff = None if inputs.cutoff is None else as_scalar(inputs.cutoff, stand_in)
    tensors = (inputs.advantage, inputs.old_logp, inputs.ref_logp, inputs.sampler_ratio)
    tensors = backends.triton.LossTensors(
        *(None if x is None else x.contiguous() for x in tensors), cutoff, _weights(inputs)
    )
    if isinstance(transform.temperature, Tensor):
        transform = transform._replace(temperature=transform.temperature.detach().to(torch.float32).contiguous())
    loss, names, *values = _SingleLaunch.apply(
        logits, (target.contiguous(), mask.contiguous(), transform), given, (tensors, kernel_settings(inputs.config))
    )  # type: ignore[misc]
    return PolicyLoss(loss, dict(zip(names, values, strict=True)))


def _weights(inputs: LossInputs) -> Tensor:
    """Return the factors [B] of the coefficients of logp in each sequence, or with an entropy bonus those of logp and
    of entropy [2, B]."""
    mask, config, denominator, loss_type = inputs.mask, inputs.config, inputs.denominator, inputs.loss_type
    if denominator is None:
        denominator = default_denominator(mask, loss_type, config)
    if loss_type.mean_of_sequence:
        of_sequence = 1.0 / mask.sum(-1).float().clamp(min=1)
    else:
        of_sequence = torch.ones(len(mask), dtype=torch.float32, device=mask.device)
    if config.entropy_coef == 0.0:
        return (of_sequence / denominator).to(torch.float32)
    count = mask.sum(-1).float()
    of_entropy = (-config.entropy_coef / count.sum().clamp(min=1)).expand_as(of_sequence)
    return torch.stack([of_sequence.to(torch.float32) / denominator, of_entropy]).to(torch.float32)
