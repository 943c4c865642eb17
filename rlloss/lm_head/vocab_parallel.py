"""A vocabulary split over ranks: each holds some rows of the weight, and all agree on the statistics."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from rlloss.torch_kernels.rows import FLOOR


class Shard(NamedTuple):
    """This rank's entries offset .. offset + its own number of a vocabulary of `total`, in the order of the ranks.

    largest: entries of the largest shard. All ranks plan with it, so that their collectives match.
    """

    group: Any
    offset: int
    total: int
    largest: int

    def merge(self, state: Tensor, k: Tensor | float) -> Tensor:
        """The running statistics [7, N] of all ranks' entries from those of this rank's. k as in the kernels."""
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
        """x added up over the ranks, in place."""
        distributed.all_reduce(x, group=self.group)


def shard_of(weight: Tensor, group: Any) -> Shard:
    """The place of `weight` [V of this rank, D] in the whole. One small collective."""
    own = torch.tensor([len(weight)], dtype=torch.int64, device=weight.device)
    sizes = [torch.zeros_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(sizes, own, group=group)
    counts = [int(size) for size in sizes]
    return Shard(group, sum(counts[: distributed.get_rank(group)]), sum(counts), max(counts))
