"""Define a contender of the benchmarks, and test whether it can run here."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.timing import CUDA, DEVICE
from rlloss import backends


@dataclass(frozen=True)
class Peer:
    """A contender for the cases of one suite.

    start: the forward of a case, with gradient. It returns the backward, which returns the result. forward: the same
    without gradient. prepare: runs before each step, off the clock. module: must be importable. on: "gpu" or "cpu", the
    device that it needs, or "triton" for rlloss's kernels. ignores_rho: it keeps every token at any rho.
    """

    name: str
    note: str
    start: Callable[[Any], Callable[[], Any]]
    forward: Callable[[Any], Any] | None = None
    prepare: Callable[[Any], None] | None = None
    module: str = "torch"
    on: str | None = None
    ignores_rho: bool = False

    def absent(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.on == "gpu" and not CUDA:
            return "needs a GPU"
        if self.on == "cpu" and CUDA:
            return "CPU only"
        if self.on == "triton" and backends.choose_backend(torch.empty(1, device=DEVICE)) == "torch":
            return "needs the Triton kernels"
        return absent(self.module)

    def step(self, case: Any) -> Any:
        if self.prepare is not None:
            self.prepare(case)
        return self.start(case)()


def absent(module: str) -> str | None:
    """Why it cannot be imported, or None."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be loaded: {error}"
    return None
