"""Multiply matrices with fp32 sums, and count the products for users, tests and benchmarks."""

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
    """Matrix products with the lm_head that ran.

    unit is the FLOP of the logits of every row that counts, 2 N V D, summed over the calls. flop is the FLOP by kind:
    "logits" of the forward, "recompute" of logits in the backward, "hidden_grad" and "weight_grad".
    """

    unit: int = 0
    flop: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    @property
    def units(self) -> float:
        """All products in units of the logits of every row that counts (plain logits 3, "recompute" 1 + 3r)."""
        return sum(self.flop.values()) / self.unit if self.unit else 0.0

    def units_of(self, kind: str) -> float:
        return self.flop[kind] / self.unit if self.unit else 0.0


_counters: list[Products] = []
_lock = threading.Lock()  # autograd runs a backward on a GPU in its own thread


@contextlib.contextmanager
def count_products() -> Iterator[Products]:
    """Count the matrix products of the lm_head inside a block. torch's FLOP counter does not see custom operators.

    Yields:
        `Products`, which grows while the block runs::

            with count_products() as products:
                loss_fn(hidden, weight, target, advantage, mask=mask).loss.backward()
            print(products.units, products.flop)
    """
    counter = Products()
    with _lock:
        _counters.append(counter)
    try:
        yield counter
    finally:
        with _lock:
            # Compared by identity, because two counters with the same counts are equal.
            _counters[:] = [c for c in _counters if c is not counter]


def count_unit(rows: int, V: int, D: int) -> None:
    with _lock:
        for counter in _counters:
            counter.unit += 2 * rows * V * D


def _fp32_setting() -> Any:
    """Return torch's setting of how oneDNN multiplies fp32; None: this torch has none."""
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    return setting if hasattr(setting, "fp32_precision") else None


class _Bf16Operands:
    """Context in which oneDNN rounds fp32 operands to bf16, but neither sums nor results.

    The setting belongs to the process. It is changed only during a product, and the last thread inside restores it.
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
    """Test with one small product whether oneDNN on this CPU rounds fp32 operands to bf16 and adds up in fp32.

    Neither the CPU's flags nor torch's setting tell: oneDNN does it only on some CPUs with bf16 instructions.
    """
    if _fp32_setting() is None:
        return False
    with ThreadPoolExecutor(1) as own:  # a thread without the caller's autocast, default device and dispatch modes
        return own.submit(_rounds_operands_alone).result()


def _rounds_operands_alone() -> bool:
    # 1 + 2^-9 rounds to 1 in bf16, and 301 has no bf16 value. The shapes are large enough to reach oneDNN.
    a = torch.zeros(64, 320, dtype=torch.float32, device="cpu")
    a[:, :301] = 1 + 2**-9
    with _bf16_operands:
        product = torch.mm(a, torch.ones(320, 64, dtype=torch.float32, device="cpu"))
    return bool((product == 301).all())


def operands_in(dtype: torch.dtype | None, operand: Tensor) -> contextlib.AbstractContextManager:
    """Return a context for products of tensors like `operand`. It uses the CPU's bf16 units if there are any and the
    operands may be rounded to `dtype`."""
    fit = operand.is_cpu and operand.dtype == torch.float32 and dtype == torch.bfloat16
    return _bf16_operands if fit and has_bf16_units() else contextlib.nullcontext()


@functools.cache
def writes_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Test with one small product whether this device multiplies operands of a narrow dtype into fp32.

    GPUs before Ampere do not, nor does ROCm in some versions of torch. Only trying tells.
    """
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.mm(a, a, out_dtype=torch.float32, out=out)
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except torch.OutOfMemoryError:
        raise  # says nothing about the device
    except (RuntimeError, TypeError):
        return False
    return True


def multiply(
    out: Tensor, a: Tensor, b: Tensor, kind: str, *, add: bool = False, dtype: torch.dtype | None = None
) -> None:
    """Compute out = a @ b, or with `add` out += a @ b, with sums in fp32 at least.

    a [M, K] and b [K, N] have one dtype. If out is wider, the product is not rounded to their dtype: most GPUs write it
    wide, elsewhere a and b are widened first. dtype is the dtype to which operands may be rounded, as on a GPU. A CPU
    with bf16 units then multiplies widened bf16 in a fraction of the time of fp32.
    """
    with _lock:
        for counter in _counters:
            counter.flop[kind] += 2 * a.shape[0] * a.shape[1] * b.shape[1]
    widens = out.dtype.itemsize > a.dtype.itemsize
    if widens and a.is_cuda and out.dtype == torch.float32 and writes_fp32(a.device, a.dtype):
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
