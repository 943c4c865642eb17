"""Matrix products with fp32 sums, and a counter of them for users, tests and benchmarks."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KINDS = ("logits", "recompute", "hidden_grad", "weight_grad")


@dataclass
class Products:
    """What matrix products with the lm_head really ran.

    unit: FLOP of the logits of every row that counts, 2 N V D, added up over the calls. flop: FLOP by kind: "logits" of
    the forward, "recompute" of logits in the backward, "hidden_grad" and "weight_grad".
    """

    unit: int = 0
    flop: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    @property
    def units(self) -> float:
        """All products, in products of all rows that count: 3 for plain logits, 1 + 3r for "recompute"."""
        return sum(self.flop.values()) / self.unit if self.unit else 0.0

    def units_of(self, kind: str) -> float:
        return self.flop[kind] / self.unit if self.unit else 0.0


_counters: list[Products] = []
_lock = threading.Lock()  # a backward on a GPU runs in a thread of its own


@contextlib.contextmanager
def count_products() -> Iterator[Products]:
    """Count the matrix products of the lm_head inside: torch's FLOP counter does not see into custom operators.

    with count_products() as products:
        loss.backward()
    print(products.units, products.flop)
    """
    counter = Products()
    with _lock:
        _counters.append(counter)
    try:
        yield counter
    finally:
        with _lock:
            # By identity: counters that counted the same are equal.
            _counters[:] = [c for c in _counters if c is not counter]


def count_unit(rows: int, V: int, D: int) -> None:
    with _lock:
        for counter in _counters:
            counter.unit += 2 * rows * V * D


def _fp32_setting() -> Any:
    """Where torch keeps how oneDNN multiplies fp32; None: this torch has no such place."""
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    return setting if hasattr(setting, "fp32_precision") else None


class _Bf16Operands:
    """A context in which oneDNN rounds fp32 operands to bf16, and neither sums nor results.

    torch keeps this setting for the process: it is changed for a product alone, and put back by the last thread that is
    in one.
    """

    def __init__(self):
        self._inside, self._before = 0, "none"

    def __enter__(self):
        with _lock:
            if self._inside == 0:
                self._before = _fp32_setting().fp32_precision
                _fp32_setting().fp32_precision = "bf16"
            self._inside += 1

    def __exit__(self, *_):
        with _lock:
            self._inside -= 1
            if self._inside == 0:
                _fp32_setting().fp32_precision = self._before


_bf16_operands = _Bf16Operands()


@functools.cache
def has_bf16_units() -> bool:
    """Whether oneDNN rounds fp32 operands to bf16 on this CPU and adds up in fp32, as one small product shows.

    Neither the CPU's flags nor torch's setting say it: of the CPUs with bf16 instructions oneDNN does so only on some.
    """
    if _fp32_setting() is None:
        return False
    with ThreadPoolExecutor(1) as own:  # without the caller's autocast, default device and dispatch modes
        return own.submit(_rounds_operands_alone).result()


def _rounds_operands_alone() -> bool:
    # 1 + 2^-9 is 1 in bf16, and 301 is no number of bf16. Small products never reach oneDNN.
    a = torch.zeros(64, 320, dtype=torch.float32, device="cpu")
    a[:, :301] = 1 + 2**-9
    with _bf16_operands:
        product = torch.mm(a, torch.ones(320, 64, dtype=torch.float32, device="cpu"))
    return bool((product == 301).all())


def operands_in(dtype: torch.dtype | None, operand: Tensor) -> contextlib.AbstractContextManager:
    """Where products of tensors like `operand`, which may be rounded to `dtype`, take the CPU's bf16 units if it has
    them."""
    fit = operand.is_cpu and operand.dtype == torch.float32 and dtype == torch.bfloat16
    return _bf16_operands if fit and has_bf16_units() else contextlib.nullcontext()


def multiply(
    out: Tensor, a: Tensor, b: Tensor, kind: str, *, add: bool = False, dtype: torch.dtype | None = None
) -> None:
    """out = a @ b, or with `add` out += a @ b, the sums in fp32 at least.

    a [M, K] and b [K, N] of one dtype. Where out is wider than they are, the product is not rounded to their dtype on
    the way: on a GPU by the product itself, elsewhere by widening a and b. dtype: to which the operands may be rounded,
    as those of a GPU are; a CPU with bf16 units then multiplies widened bf16 in a fraction of the time of fp32.
    """
    with _lock:
        for counter in _counters:
            counter.flop[kind] += 2 * a.shape[0] * a.shape[1] * b.shape[1]
    widens = out.dtype.itemsize > a.dtype.itemsize
    if widens and a.is_cuda and out.dtype == torch.float32:
        if add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
        return
    if widens:
        a, b = a.to(out.dtype), b.to(out.dtype)
    with operands_in(dtype, a):
        if a.dtype != out.dtype:
            product = torch.mm(a, b)
            out.copy_(out + product if add else product)
        elif add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
