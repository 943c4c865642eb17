"""Exactly k tokens out of many, on one process or over several."""

import torch
from torch import Tensor


def largest(score: Tensor, candidates: Tensor, k: Tensor | int, *, process_group=None) -> Tensor:
    """The k candidates with the largest score, all of them if there are fewer: bool, shaped like `candidates`.

    Args:
        score: `[...]` floating point; a NaN counts as the largest.
        candidates: `[...]` bool.
        k: how many, of all processes together; a 0-d tensor is not looked at by the host.
        process_group: the processes whose tokens count together; they exchange the scores. None: this one alone.

    Of equal scores the first are taken, in the order of processes, then of the flat index.
    """
    flat = torch.where(candidates, score.clamp(min=torch.finfo(score.dtype).min), -torch.inf).reshape(-1)
    if process_group is None:
        return candidates & (_places(flat) < k).view(candidates.shape)
    start, everybody = gathered(flat, process_group)
    return candidates & (_places(everybody)[start : start + len(flat)] < k).view(candidates.shape)


def gathered(flat: Tensor, process_group) -> tuple[int, Tensor]:
    """(where this process's part begins, the parts of all processes one after the other) of vectors of any lengths."""
    distributed = torch.distributed
    ranks, rank = distributed.get_world_size(process_group), distributed.get_rank(process_group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=flat.device) for _ in range(ranks)]
    distributed.all_gather(lengths, torch.tensor([len(flat)], device=flat.device), group=process_group)
    sizes = torch.cat(lengths).tolist()
    padded = flat.new_zeros(max(sizes))
    padded[: len(flat)] = flat
    parts = [torch.zeros_like(padded) for _ in range(ranks)]
    distributed.all_gather(parts, padded, group=process_group)
    return sum(sizes[:rank]), torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _places(flat: Tensor) -> Tensor:
    """Each element's place in the order from the largest to the smallest."""
    order = flat.argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(flat), device=flat.device))
