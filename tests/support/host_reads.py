"""Count, on a CPU, the operators that would synchronise the host with a GPU."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from rlloss import backends, checks
from rlloss.rewards import advantages
from rlloss.torch_kernels import entropy_quantile

# Operators that read from the device, whose output size only the device knows, or that copy a constant to it.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "is_nonzero", "lift_fresh",
}  # fmt: skip


class HostReads(TorchDispatchMode):
    """`found`: the names, in order. Kernel launches are left out, since the interpreter's work is not an operator."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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
                with _disable_current_modes():
                    return launch(self, *args, **kwargs)

            patch.setattr(GridExecutor, "__call__", launched)
        select = entropy_quantile._select  # has a separate path on a CPU

        def selected(*args, **kwargs):
            with _disable_current_modes():
                return select(*args, **kwargs)

        patch.setattr(entropy_quantile, "_select", selected)
        with counter:
            yield counter
