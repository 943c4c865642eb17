"""Merge statistics over ranks that each hold a part of the vocabulary, that is some rows of the weight."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from rlloss.torch_kernels.rows import FLOOR


class Shard(NamedTuple):
    """This rank's part of a vocabulary of `total` entries. It starts at offset; parts are in the order of the ranks.

    largest is the size of the largest shard. All ranks plan with it, so that their collectives match.
    """

    group: Any
    offset: int
    total: int
    largest: int

    def merge(self, state: Tensor, k: Tensor | float) -> Tensor:
        """Merge this rank's running statistics [7, N] with those of all ranks. k is as in the kernels."""
        m, s, w, q, total, before, u_target = state
        most = torch.stack((m, before))
        distributed.all_reduce(most, op=distributed.ReduceOp.MAX, group=self.group)
        m_all = most[0]
        d = ((m - torch.where(m_all == -torch.inf, 0.0, m_all)) * k).clamp(min=FLOOR[state.dtype])
        f = torch.exp2(d)
        sums = torch.stack((s * f, (w + s * d) * f, q * f * f, total, u_target))
        distributed.all_reduce(sums, group=self.group)
        return torch.stack((m_all, *sums[:4], most[1], sums[4]))

    def sum(self, x: Tensor) -> None:
        """Add x up over the ranks, in place."""
        distributed.all_reduce(x, group=self.group)


def shard_of(weight: Tensor, group: Any) -> Shard:
    """Return the place of `weight` [V of this rank, D] in the whole vocabulary. One small collective."""
    own = torch.tensor([len(weight)], dtype=torch.int64, device=weight.device)
    sizes = [torch.zeros_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(sizes, own, group=group)
    counts = [int(size) for size in sizes]
    return Shard(group, sum(counts[: distributed.get_rank(group)]), sum(counts), max(counts))
