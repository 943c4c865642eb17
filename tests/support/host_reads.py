"""Count, on a CPU, what the host does for a GPU: operators, among them those that would wait, launches and calls."""

import contextlib
import os
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import rlloss
from rlloss import backends, checks
from rlloss.rewards import advantages
from rlloss.torch_kernels import entropy_quantile

# Operators that read from the device, whose output size only the device knows, or that copy a constant to it.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "is_nonzero", "lift_fresh",
}  # fmt: skip
_HOME = tuple(os.path.realpath(os.path.dirname(rlloss.__file__) + folder) for folder in ("", "/kernels"))


class HostReads(TorchDispatchMode):
    """`found`: the names, in order. Kernel launches are left out, since the interpreter's work is not an operator.

    operators counts torch operators and launches those of kernels. calls counts the calls of and from functions of
    rlloss, operators among them; it does not depend on the version of torch or Triton.
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.operators = self.launches = self.calls = 0

    def profile(self, frame, event, _):
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(_HOME):
            self.calls += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        name = func.__name__.partition(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        repeats = func.__name__ == "repeat_interleave.Tensor" and (kwargs or {}).get("output_size") is None
        if name in WAITING or by_mask or repeats:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_reads(monkeypatch):
    """Count inside this context, without checks of values, which are also left out on a GPU."""
    counter = HostReads()
    with monkeypatch.context() as patch:
        for module in (checks, advantages):
            patch.setattr(module, "values_checked", lambda x: False)
        tolist = torch.Tensor.tolist  # on a CPU no operator

        def listed(x):
            counter.found.append("tolist")
            return tolist(x)

        patch.setattr(torch.Tensor, "tolist", listed)
        if backends.triton is not None:
            from triton.runtime.interpreter import GridExecutor

            launch = GridExecutor.__call__

            def launched(self, *args, **kwargs):
                counter.launches += 1
                profile = sys.getprofile()
                sys.setprofile(None)
                with _disable_current_modes():
                    launch(self, *args, **kwargs)
                sys.setprofile(profile)

            patch.setattr(GridExecutor, "__call__", launched)
        select = entropy_quantile._select  # has a separate path on a CPU

        def selected(*args, **kwargs):
            with _disable_current_modes():
                return select(*args, **kwargs)

        patch.setattr(entropy_quantile, "_select", selected)
        with counter:
            yield counter
