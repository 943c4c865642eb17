"""Select exactly k tokens over one or more processes. With keys, the order of the sequences does not matter."""

import torch
from torch import Tensor

from rlloss import checks

_32_BITS = 0xFFFFFFFF


def sequence_key(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """Compute a hash of each sequence's token ids, `[B]` int64, as an identity that does not depend on its place.

    Each part is (token ids `[B, T]` integer, mask `[B, T]` bool), for the prompt, the completion and so on. Padding
    does not matter.
    """
    total = torch.zeros((), dtype=torch.int64, device=parts[0][0].device)
    for number, (ids, mask) in enumerate(parts):
        place = mask.cumsum(-1) * len(parts) + number
        total = total + torch.where(mask, mixed(ids.long() + mixed(place)), 0).sum(-1)
    return mixed(total)


def token_key(mask: Tensor, sequence_key: Tensor) -> Tensor:
    """Compute a key `[B, T]` int64 of each token from its sequence's key `[B]` and its place among those that count."""
    return mixed(mask.cumsum(-1) + mixed(sequence_key).unsqueeze(-1))


def check_sequence_key(key: Tensor | None, mask: Tensor) -> None:
    if key is not None:
        checks.of_dtype("sequence_key", key, (torch.int64,), "torch.int64")
        checks.same_shape("sequence_key", key, mask.shape[:1], "one for each sequence")
        checks.same_device("sequence_key", key, mask, "mask")


def mixed(x: Tensor) -> Tensor:
    """Apply the last step of MurmurHash3 (32 bits, held in int64). Flipping a bit of x flips about half of the bits."""
    x = x & _32_BITS
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _32_BITS
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _32_BITS
    return x ^ (x >> 16)


def largest(
    score: Tensor, candidates: Tensor, k: Tensor | int, *, key: Tensor | None = None, process_group=None
) -> Tensor:
    """Select the k candidates with the largest score, or all if there are fewer.

    Args:
        score: `[...]` floating point; a NaN counts as the largest.
        candidates: `[...]` bool.
        k: number to select, over all processes together. The host does not read a 0-d tensor.
        key: `[...]` int64; of equal scores the largest keys are taken. None, or equal keys: the first ones, in the
            order of processes, then of the flat index.
        process_group: the processes whose tokens count together; they exchange scores and keys. None: this one alone.

    Returns:
        Bool, shaped like `candidates`.
    """
    flat = torch.where(candidates, score.clamp(min=torch.finfo(score.dtype).min), -torch.inf).reshape(-1)
    key = None if key is None else key.reshape(-1)
    start, end = 0, len(flat)
    if process_group is not None:
        start, flat = gathered(flat, process_group)
        key = None if key is None else gathered(key, process_group)[1]
    return candidates & (_places(flat, key)[start : start + end] < k).view(candidates.shape)


def gathered(flat: Tensor, process_group) -> tuple[int, Tensor]:
    """Concatenate vectors of any lengths over the processes. Return (start of this process's part, the whole)."""
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


def _places(flat: Tensor, key: Tensor | None) -> Tensor:
    """Return each element's place in the order from the largest to the smallest."""
    if key is None:
        order = flat.argsort(descending=True, stable=True)
    else:
        order = key.argsort(descending=True, stable=True)
        order = order[flat[order].argsort(descending=True, stable=True)]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(flat), device=flat.device))
