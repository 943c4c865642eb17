"""Store the gradient of a loss as one coefficient per token, which the backward multiplies by the incoming gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlloss.operators import operator


class Coefficients(NamedTuple):
    """d loss / d logp = of_logp * scale. d loss / d entropy = entropy_scale where of_entropy is True.

    of_logp is `[B, T]`, of_entropy `[B, T]` bool, the scales are 0-d. Without an entropy bonus the last two are None.
    """

    of_logp: Tensor
    scale: Tensor
    of_entropy: Tensor | None = None
    entropy_scale: Tensor | None = None

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """Return d loss / d logp and d loss / d entropy, `[B, T]`."""
        g_logp, g_entropy = _scaled(*self, torch.ones_like(self.scale))
        return g_logp, None if self.of_entropy is None else g_entropy


def _fake(logp, of_logp, scale, of_entropy, entropy_scale, g_loss):
    return torch.empty_like(of_logp), of_logp.new_empty((0,) if of_entropy is None else of_logp.shape)


@operator("loss_backward", fake=_fake)
def _gradients(
    logp: Tensor,
    of_logp: Tensor,
    scale: Tensor,
    of_entropy: Tensor | None,
    entropy_scale: Tensor | None,
    g_loss: Tensor,
) -> tuple[Tensor, Tensor]:
    """Multiply the coefficients by g_loss. logp is not read; as an input it makes a second derivative raise, where it
    would otherwise be a silent 0."""
    return _scaled(of_logp, scale, of_entropy, entropy_scale, g_loss)


def _scaled(
    of_logp: Tensor, scale: Tensor, of_entropy: Tensor | None, entropy_scale: Tensor | None, g_loss: Tensor
) -> tuple[Tensor, Tensor]:
    g_logp = (of_logp * (g_loss * scale)).masked_fill_(of_logp == 0.0, 0.0)  # 0, not NaN, also for an infinite g_loss
    if of_entropy is None or entropy_scale is None:
        return g_logp, of_logp.new_empty((0,))
    return g_logp, torch.where(of_entropy, g_loss * entropy_scale, 0.0)


class _WithCoefficients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, entropy, loss, of_logp, scale, of_entropy, entropy_scale):
        ctx.save_for_backward(logp, of_logp, scale, of_entropy, entropy_scale)
        ctx.dtypes = logp.dtype, None if entropy is None else entropy.dtype
        return loss.detach()  # autograd makes of an input itself a view, which does not allow `loss /= n`

    @staticmethod
    def backward(ctx: Any, *gradients: Any):
        g_logp, g_entropy = _gradients(*ctx.saved_tensors, gradients[0])
        of_logp, of_entropy = ctx.dtypes
        wanted = ctx.needs_input_grad[1]
        return g_logp.to(of_logp), g_entropy.to(of_entropy) if wanted else None, *(None,) * 5


def with_gradient(loss: Tensor, logp: Tensor, entropy: Tensor | None, coefficients: Coefficients) -> Tensor:
    """Attach to the loss its gradient in logp `[B, T]` and, with an entropy bonus, in entropy `[B, T]`."""
    bonus = entropy if coefficients.of_entropy is not None else None
    if not (torch.is_grad_enabled() and (logp.requires_grad or (bonus is not None and bonus.requires_grad))):
        return loss
    return _WithCoefficients.apply(logp, bonus, loss, *coefficients)  # type: ignore[return-value]
