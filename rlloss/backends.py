"""Choose between the Triton kernels and plain torch. This is the only module that imports `rlloss.kernels`.

There are three backends: "triton" on a GPU, "interpreter" (the same Triton kernels on CPU tensors, under
TRITON_INTERPRET=1) and "torch" (tiled torch, anywhere). Each call chooses from its tensor; a backward uses the backend
of its forward. RLLOSS_BACKEND or `backend(...)` forces one. If that backend is missing, the call raises.
"""

import contextlib
import contextvars
import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlloss import checks
from rlloss.kernels.launch_table import choice as choice

# Each kernel and its file. The file exists in kernels/ and, as a twin, in torch_kernels/.
FILES = {
    "token_stats_forward": "token_stats_forward",
    "token_stats_backward": "token_stats_backward",
    "fold_tile": "logits_tile",
    "gradient_tile": "logits_tile",
    "entropy_quantile": "entropy_quantile",
    "entropy_top_k": "entropy_quantile",
    "entropy_temperature": "entropy_temperature",
}
IN_TRITON_ALONE = {
    "token_pass": "token_pass",
    "TokenTensors": "token_pass",
    "TokenSettings": "token_pass",
    "SUMMARY": "token_pass",
    "gradient_in_forward": "gradient_in_forward",
    "LossTensors": "gradient_in_forward",
}


class _Kernels:
    """Give access to the functions of `files` as attributes."""

    def __init__(self, package: str, files: dict[str, str]):
        self._modules = {name: importlib.import_module(f"{package}.{file}") for name, file in files.items()}

    def __getattr__(self, name: str) -> Any:
        if name not in self._modules:
            raise AttributeError(f"{name}: no such kernel here; there are {', '.join(self._modules)}")
        return getattr(self._modules[name], name)


plain = _Kernels("rlloss.torch_kernels", FILES)
triton: Any
try:
    triton = _Kernels("rlloss.kernels", FILES | IN_TRITON_ALONE)
except ImportError:  # Triton is published for Linux only
    triton = None

BACKENDS = ("triton", "interpreter", "torch")

# Each entry is a list of one name, told from the others by `is`. A block empties its list at its end, which also
# reaches copies of the context.
_forced: contextvars.ContextVar[tuple[list[str], ...]] = contextvars.ContextVar("forced", default=())
_anywhere: list[str] = []  # names that are forced in any thread


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend ("triton", "interpreter" or "torch") for the calls inside, in this thread or asyncio task only.

    Under torch.compile the forward and the backward each use the backend that is forced where they run. A compiled
    graph does not notice that another thread forces the same name.
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
    return next((mine[0] for mine in reversed(_forced.get()) if mine), None)


def choose_backend(x: Tensor) -> str:
    """Return the backend for a tensor: the forced one, else Triton where it runs, else torch."""
    checks.of_type("x", x, Tensor, "a tensor")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if x.device.type in ("cuda", "xpu"):
        possible = ["triton", "torch"] if triton is not None and not interpreted else ["torch"]
    else:
        possible = ["interpreter", "torch"] if triton is not None and interpreted else ["torch"]
    if x.dtype == torch.float64:
        possible = ["torch"]
    # torch.compile cannot trace a ContextVar. It takes the value as a constant, guarded by the names in `_anywhere`.
    forced = _forced_here() if _anywhere and any(name in _anywhere for name in BACKENDS) else None
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


def of(x: Tensor) -> Any:
    """Return the kernels for a tensor: `triton` (also for the interpreter) or `plain`."""
    return plain if choose_backend(x) == "torch" else triton
