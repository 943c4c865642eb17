"""Count the reads, writes and launches of kernels in Triton's interpreter."""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from rlloss import backends

needs_interpreter = pytest.mark.skipif(
    backends.triton is None or torch.cuda.is_available(), reason="counts in Triton's interpreter"
)
READ, WRITE = 1, 2


@dataclasses.dataclass
class Launch:
    """One launch of a kernel. accesses: (addresses, bytes of an entry, READ, WRITE or both), without masked ones."""

    kernel: str
    arguments: dict[str, Any]
    accesses: list[tuple[np.ndarray, int, int]] = dataclasses.field(default_factory=list)

    def bytes_of(self, argument: str, kind: int) -> int:
        """Bytes read from, or written to, the memory of one tensor among the arguments."""
        first, last = _memory(self.arguments[argument])
        return sum(int(((a >= first) & (a < last)).sum()) * size for a, size, kinds in self.accesses if kinds & kind)

    def numbers(self) -> dict[str, Any]:
        """The arguments that are not tensors, with flags as 1 and 0, and `programs`."""
        plain = {name: x for name, x in self.arguments.items() if not isinstance(x, torch.Tensor)}
        return {name: int(x) if isinstance(x, bool) else x for name, x in plain.items()}


class Traffic:
    """The launches inside `counted`, in their order."""

    def __init__(self):
        self.all: list[Launch] = []

    @property
    def launches(self) -> collections.Counter:
        """The number of launches of each kernel."""
        return collections.Counter(launch.kernel for launch in self.all)

    def of(self, x: torch.Tensor, kind: int) -> torch.Tensor:
        """How often each entry of `x`, which may have any strides, was READ or WRITTEN: int64, shaped like it."""
        first, last = _memory(x)
        size = x.element_size()
        counts = torch.zeros((last - first) // size, dtype=torch.int64)
        for launch in self.all:
            for addresses, _, kinds in launch.accesses:
                if kinds & kind:
                    own = addresses[(addresses >= first) & (addresses < last)] - np.uint64(first)
                    places = torch.from_numpy(own.astype(np.int64) // size)
                    counts.index_add_(0, places, torch.ones_like(places))
        return counts.as_strided(x.shape, x.stride())


def _memory(x: torch.Tensor) -> tuple[int, int]:
    """The addresses of the first entry of `x` and after the last one."""
    entries = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + entries * x.element_size()


@contextlib.contextmanager
def counted(monkeypatch) -> Iterator[Traffic]:
    from triton.runtime import interpreter

    traffic, builder, executor = Traffic(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    rmw = builder.create_atomic_rmw

    def note(pointers, mask, kind):
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        traffic.all[-1].accesses.append((pointers.data[mask.data.astype(bool)].ravel(), size, kind))

    def counting_load(self, pointers, mask, *rest):
        note(pointers, mask, READ)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        note(pointers, mask, WRITE)
        return store(self, pointers, value, mask, *rest)

    def counting_rmw(self, operation, pointers, value, mask, *rest):
        note(pointers, mask, READ | WRITE)
        return rmw(self, operation, pointers, value, mask, *rest)

    def launched(self, *args, **kwargs):
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        traffic.all.append(Launch(self.fn.__name__, given | {"programs": math.prod(self.grid)}))
        return launch(self, *args, **kwargs)

    with monkeypatch.context() as patch, backends.backend("interpreter"):
        patch.setattr(builder, "create_masked_load", counting_load)
        patch.setattr(builder, "create_masked_store", counting_store)
        patch.setattr(builder, "create_atomic_rmw", counting_rmw)
        patch.setattr(executor, "__call__", launched)
        yield traffic
