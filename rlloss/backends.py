"""The choice between Triton and plain torch. The only module that imports `rlloss.kernels`.

Backends: "triton" on a GPU, "interpreter" (the same Triton kernels on CPU tensors, under TRITON_INTERPRET=1), "torch"
(tiled torch, anywhere). The choice is made per call from the tensor, and a backward takes that of its forward;
RLLOSS_BACKEND or `backend(...)` forces one, and a forced backend that is missing raises.
"""

import contextlib
import contextvars
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlloss import checks
from rlloss.kernels.launch_table import choice as choice

triton_forward: Any
triton_backward: Any
triton_gradient: Any
triton_quantile: Any
triton_linear: Any
triton_temperature: Any
triton_token_pass: Any
try:
    from rlloss.kernels import entropy_quantile as triton_quantile
    from rlloss.kernels import entropy_temperature as triton_temperature
    from rlloss.kernels import gradient_in_forward as triton_gradient
    from rlloss.kernels import logits_tile as triton_linear
    from rlloss.kernels import token_pass as triton_token_pass
    from rlloss.kernels import token_stats_backward as triton_backward
    from rlloss.kernels import token_stats_forward as triton_forward
except ImportError:  # Triton is published for Linux only
    triton_forward = triton_backward = triton_gradient = triton_quantile = triton_token_pass = None
    triton_linear = triton_temperature = None

BACKENDS = ("triton", "interpreter", "torch")

# Each a list of one name, which `is` tells from the others; empty once its block has ended, in copies of a context too.
_forced: contextvars.ContextVar[tuple[list[str], ...]] = contextvars.ContextVar("forced", default=())
_anywhere: list[str] = []  # the names forced in all threads


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend ("triton", "interpreter" or "torch") for the calls inside, in this thread or asyncio task alone.

    Under torch.compile the forward and the backward each take the one that is forced where they run; a compiled graph
    does not notice that another thread forces the same name.
    """
    checks.one_of("backend", name, BACKENDS)
    mine = [name]
    _forced.set((*_forced.get(), mine))
    _anywhere.append(name)
    try:
        yield
    finally:
        mine.clear()
        _anywhere.remove(name)
        _forced.set(tuple(other for other in _forced.get() if other is not mine))


@torch.compiler.assume_constant_result
def _forced_here() -> str | None:
    forced = [name for mine in _forced.get() for name in mine]
    return forced[-1] if forced else None


def choose_backend(x: Tensor) -> str:
    """The backend for a tensor: what is forced, else Triton where it runs, else torch."""
    checks.of_type("x", x, Tensor, "a tensor")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if x.device.type in ("cuda", "xpu"):
        possible = ["triton", "torch"] if triton_forward is not None and not interpreted else ["torch"]
    else:
        possible = ["interpreter", "torch"] if triton_forward is not None and interpreted else ["torch"]
    if x.dtype == torch.float64:
        possible = ["torch"]
    # torch.compile cannot trace a ContextVar: its value is a constant to it, guarded by the names in `_anywhere`.
    forced = _forced_here() if any(name in _anywhere for name in BACKENDS) else None
    forced = forced or os.environ.get("RLLOSS_BACKEND")
    if not forced:
        return possible[0]
    checks.one_of("RLLOSS_BACKEND", forced, BACKENDS)
    if forced not in possible:
        raise RuntimeError(
            f"backend: {forced!r} was forced, but a {x.dtype} tensor on {x.device} with TRITON_INTERPRET="
            f"{os.environ.get('TRITON_INTERPRET', 'unset')} can use {' or '.join(possible)}"
        )
    return forced
