"""Register functions as torch operators that cost nothing extra in an eager call.

A tracer sees the operator registered with torch.library; an eager call runs the function itself. torch spends 0.1 to
0.3 ms on each call of a registered operator. An eager step from logits makes four such calls, which would take longer
than its kernel launches.
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
    """Decorator: register a function as "rlloss::name" and return a function that calls it in either way.

    The first argument is a tensor. fake, setup_context and backward are those of torch.library's `register_fake` and
    `register_autograd`. Without a backward, a gradient through the operator is an error. If the backward calls such an
    operator, a second derivative is an error.
    """

    def of(run: Callable) -> Callable:
        registered = torch.library.custom_op(f"rlloss::{name}", mutates_args=())(run)
        registered.register_fake(fake)
        direct: Any = run
        if backward is not None:
            registered.register_autograd(backward, setup_context=setup_context)
            direct = _function(run, setup_context, backward)

        def call(*arguments):
            x = arguments[0]
            if torch.compiler.is_compiling() or type(x) not in _PLAIN or not checks.has_values(x):
                return registered(*arguments)
            if backward is None and torch.is_grad_enabled():
                if any(isinstance(y, Tensor) and y.requires_grad for y in arguments):
                    return registered(*arguments)
            return direct(*arguments)

        return call

    return of


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
