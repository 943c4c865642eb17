"""Functions as operators: what a tracer sees is registered with torch.library; an eager call runs the function itself.

torch spends a tenth to a third of a millisecond on each call of a registered operator, which an eager step from logits
would pay four times: more than its launches take.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlloss import checks

_PLAIN = (Tensor, torch.nn.Parameter)


def operator(
    name: str, *, fake: Callable, setup_context: Callable | None = None, backward: Callable | None = None
) -> Callable[[Callable], Callable]:
    """A decorator that registers a function as "rlloss::name" and returns what calls it either way.

    The first argument is a tensor. fake, setup_context and backward: as torch.library's `register_fake` and
    `register_autograd` take them; a gradient through an operator without a backward is an error. So is a second
    derivative, where the backward calls such an operator.
    """

    def of(run: Callable) -> Callable:
        registered = torch.library.custom_op(f"rlloss::{name}", mutates_args=())(run)
        registered.register_fake(fake)
        direct: Any = torch.no_grad()(run)
        if backward is not None:
            registered.register_autograd(backward, setup_context=setup_context)
            direct = _function(run, setup_context, backward)

        def call(*arguments):
            x = arguments[0]
            if torch.compiler.is_compiling() or type(x) not in _PLAIN or not checks.has_values(x):
                return registered(*arguments)
            if backward is None and torch.is_grad_enabled() and any(_has_gradient(y) for y in arguments):
                return registered(*arguments)
            return direct(*arguments)

        return call

    return of


def _has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _function(run: Callable, setup_context: Any, backward: Any) -> Callable:
    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = run(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *gradients):
            return backward(ctx, *gradients)

    Eager.__name__ = Eager.__qualname__ = run.__name__.strip("_")
    return Eager.apply
