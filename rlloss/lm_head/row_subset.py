"""Take a subset of the rows out of a batch, and put results back into their places.

By default the size of the subset is read from the device, with one synchronisation per pass. With a fixed capacity
nothing is read. Unused slots then hold zero rows that belong nowhere, and rows that do not fit become NaN.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss import checks


class Capacity(NamedTuple):
    """Fixed numbers of rows that count, and of rows that get a gradient."""

    rows: int
    live: int


@dataclass(frozen=True)
class Picked:
    """A subset of `total` rows, index [n], int64 and ascending.

    With a fixed capacity, beyond is `[total]` bool and marks the rows that do not fit; `total` then fills unused slots
    of index.
    """

    index: Tensor
    total: int
    beyond: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def take(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Return the rows [n, ...] of x [total, ...], with `fill` in unused slots."""
        if self.beyond is None:
            return x.index_select(0, self.index)
        if self.total == 0:
            return x.new_full((len(self), *x.shape[1:]), fill)
        found = x.index_select(0, self.index.clamp(max=self.total - 1))
        nothing = (self.index == self.total).view(-1, *(1,) * (x.dim() - 1))
        return found.masked_fill_(nothing, fill)

    def put(self, values: Tensor) -> Tensor:
        """Return values [..., n] in their places of [..., total]; other rows are 0, rows that did not fit NaN."""
        nowhere = 0 if self.beyond is None else 1
        out = values.new_zeros((*values.shape[:-1], self.total + nowhere)).index_copy_(-1, self.index, values)
        return out if self.beyond is None else out[..., :-1].masked_fill(self.beyond, torch.nan)

    def of(self, inner: "Picked") -> "Picked":
        """Return the subset of this subset that `inner` selects."""
        if inner.beyond is None and self.beyond is None:
            return Picked(self.index.index_select(0, inner.index), self.total)
        beyond = torch.zeros(1, dtype=torch.bool, device=self.index.device)  # `exceeded` has already handled overflow
        return Picked(inner.take(self.index).masked_fill_(inner.index == inner.total, self.total), self.total, beyond)


class Hold(NamedTuple):
    """What the forward holds for the backward ("logits" or "jacobian"), and of which rows (None: all that count).

    For a subset, edges is the number of its rows before each chunk of rows.
    """

    what: str
    rows: Picked | None = None
    edges: list[int] | None = None

    def count(self, n: int) -> int:
        """Return the number of rows that are held, of n that count."""
        return n if self.rows is None else len(self.rows)

    def of_chunk(self, chunk: int, r: slice) -> tuple[slice, Tensor | None]:
        """Return where the held rows of a chunk, rows r, are among the held ones and within the chunk (None: all)."""
        if self.rows is None or self.edges is None:
            return r, None
        own = slice(self.edges[chunk], self.edges[chunk + 1])
        return own, self.rows.index[own] - r.start


def positions(flags: Tensor, n: int) -> Tensor:
    """Return the positions of the first n set flags [N], filled up with N if there are fewer. No host sync."""
    return torch.nonzero_static(flags, size=n, fill_value=len(flags)).view(-1)


def fixed(flags: Tensor, room: int) -> Picked:
    """Return the first `room` rows whose flag is set. No host sync."""
    return Picked(positions(flags, room), len(flags), flags & (flags.cumsum(0) > room))


def fitting(flags: Tensor, room: int, what: str) -> Picked:
    """Return `fixed`. Raise if not all rows fit and the flags may be read (`checks.values_checked`)."""
    picked = fixed(flags, room)
    if checks.values_checked(flags):
        found = int(flags.sum())
        checks.require(found <= room, "static_capacity", f"room for {room} {what}", f"room for the {found} here")
    return picked


class Survey:
    """Counts the rows that count, and the candidates among them, with one host sync (none without mask and candidates).

    mask and candidates are bool of one shape, `[N]` after flattening, or None for all. step is the number of rows of a
    chunk, for `edges`.
    """

    def __init__(self, N: int, mask: Tensor | None, candidates: Tensor | None, step: int):
        self.N = self.n = self.count = N
        self.mask = None if mask is None else mask.reshape(-1)
        if mask is not None and candidates is not None:
            candidates = mask & candidates
        self._candidates = None if candidates is None else candidates.reshape(-1)
        self.edges: list[int] | None = None
        if self.mask is None and self._candidates is None:
            return
        self._ask(step)

    def _ask(self, step: int) -> None:
        asked = [] if self.mask is None else [self.mask.sum()]
        chosen = self._candidates
        if chosen is not None and self.N <= step:
            asked.append(chosen.sum())
        elif chosen is not None:
            place = torch.arange(self.N, device=chosen.device) if self.mask is None else self.mask.cumsum(0) - 1
            chunks = chosen.new_zeros(-(-self.N // step), dtype=torch.int64)
            asked += chunks.scatter_add_(0, place.clamp(min=0) // step, chosen.long()).unbind()
        counts = torch.stack(asked).tolist()
        self.n = self.count = self.N if self.mask is None else counts.pop(0)
        if chosen is not None:
            self.edges = list(itertools.accumulate(counts, initial=0))
            self.count = self.edges[-1]

    def rows(self) -> Picked | None:
        """Return the rows that count; None: all."""
        if self.mask is None or self.n == self.N:
            return None
        return Picked(positions(self.mask, self.n), self.N)

    def candidates(self, rows: Picked | None) -> Picked | None:
        """Return the candidates among the rows that count; None: all."""
        if self._candidates is None or self.count == self.n:
            return None
        flags = self._candidates if rows is None else rows.take(self._candidates)
        return Picked(positions(flags, self.count), self.n)
