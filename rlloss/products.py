"""Matrix products, each of them counted where someone counts."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

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


def multiply(out: Tensor, a: Tensor, b: Tensor, kind: str, *, add: bool = False) -> None:
    """out = a @ b, or with `add` out += a @ b, the sums in fp32 at least.

    a [M, K] and b [K, N] of one dtype. Where out is wider than they are, the product is not rounded to their dtype on
    the way: on a GPU by the product itself, elsewhere by widening a and b.
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
    if a.dtype != out.dtype:
        product = torch.mm(a, b)
        out.copy_(out + product if add else product)
    elif add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)
