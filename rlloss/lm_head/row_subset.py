"""A subset of the rows: taken out, computed on, and put back into their places.

By default its size is read from the device, one synchronisation a pass. With a fixed capacity nothing is read: unused
slots hold rows of 0 that belong nowhere, and rows that do not fit become NaN.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss import checks


class Capacity(NamedTuple):
    """Room for so many rows that count, and for so many of them that get a gradient."""

    rows: int
    live: int


@dataclass(frozen=True)
class Picked:
    """Rows `index` [n], int64 and ascending, of `total`.

    beyond: with a fixed capacity `[total]` bool, the rows that found no room; the index is then filled up with `total`.
    """

    index: Tensor
    total: int
    beyond: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def take(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """x [total, ...] -> [n, ...], `fill` where the index stands for no row."""
        if self.beyond is None:
            return x.index_select(0, self.index)
        if self.total == 0:
            return x.new_full((len(self), *x.shape[1:]), fill)
        found = x.index_select(0, self.index.clamp(max=self.total - 1))
        nothing = (self.index == self.total).view(-1, *(1,) * (x.dim() - 1))
        return found.masked_fill_(nothing, fill)

    def put(self, values: Tensor) -> Tensor:
        """values [..., n] -> [..., total] with zeros elsewhere, NaN where a row found no room."""
        shape = values.shape[:-1]
        if self.beyond is None:
            out = values.new_zeros((*shape, self.total))
            out[..., self.index] = values
            return out
        out = values.new_zeros((*shape, self.total + 1))
        out[..., self.index] = values
        return out[..., :-1].masked_fill(self.beyond, torch.nan)

    def of(self, inner: "Picked") -> "Picked":
        """Those of these rows that `inner` picks."""
        if inner.beyond is None and self.beyond is None:
            return Picked(self.index.index_select(0, inner.index), self.total)
        beyond = torch.zeros(1, dtype=torch.bool, device=self.index.device)  # that some are, `exceeded` has said
        return Picked(inner.take(self.index).masked_fill_(inner.index == inner.total, self.total), self.total, beyond)


def positions(flags: Tensor, n: int) -> Tensor:
    """The numbers of the first n flags [N] that are set, filled up with N if there are fewer. No host sync."""
    N = len(flags)
    place = flags.cumsum(0)
    slot = torch.where(flags & (place <= n), place - 1, n)
    index = torch.full((n + 1,), N, dtype=torch.int64, device=flags.device)
    return index.scatter_(0, slot, torch.arange(N, device=flags.device))[:n]


def fixed(flags: Tensor, room: int) -> Picked:
    """The first `room` of the rows whose flag is set. No host sync."""
    return Picked(positions(flags, room), len(flags), flags & (flags.cumsum(0) > room))


def fitting(flags: Tensor, room: int, what: str) -> Picked:
    """`fixed`, with an error where looking is free and not all fit."""
    picked = fixed(flags, room)
    if checks.values_checked(flags):
        found = int(flags.sum())
        checks.require(found <= room, "static_capacity", f"room for {room} {what}", f"room for the {found} here")
    return picked


class Survey:
    """How many rows count, and how many of them are candidates: one host sync, none without a mask and candidates.

    mask and candidates: bool, `[N]` after flattening, or None: all. step: rows of a chunk, for `edges`.
    """

    def __init__(self, N: int, mask: Tensor | None, candidates: Tensor | None, step: int):
        self.N = self.n = self.count = N
        self.mask = None if mask is None else mask.reshape(-1)
        self._candidates = None if candidates is None else candidates.reshape(-1)
        self.edges: list[int] | None = None
        if self.mask is None and self._candidates is None:
            return
        self._ask(step)

    def _ask(self, step: int) -> None:
        both = [x for x in (self.mask, self._candidates) if x is not None]
        asked = [both[0].sum().unsqueeze(0)]
        if self._candidates is not None:
            chosen = both[0] & both[-1]
            place = torch.arange(self.N, device=chosen.device) if self.mask is None else self.mask.cumsum(0) - 1
            chunks = chosen.new_zeros(max(-(-self.N // step), 1), dtype=torch.int64)
            asked.append(chunks.scatter_add_(0, place.clamp(min=0) // step, chosen.long()))
        first, *per_chunk = torch.cat(asked).tolist()
        self.n = self.N if self.mask is None else first
        self.count = self.n
        if self._candidates is not None:
            self.edges = list(itertools.accumulate(per_chunk, initial=0))
            self.count = self.edges[-1]

    def rows(self) -> Picked | None:
        """Those that count; None: all."""
        if self.mask is None or self.n == self.N:
            return None
        return Picked(positions(self.mask, self.n), self.N)

    def candidates(self, rows: Picked | None) -> Picked | None:
        """Those of the rows that count which are candidates; None: all."""
        if self._candidates is None or self.count == self.n:
            return None
        flags = self._candidates if rows is None else rows.take(self._candidates)
        return Picked(positions(flags, self.count), self.n)
