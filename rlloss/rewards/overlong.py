"""Compute DAPO's soft penalty on overlong completions (2503.14476, Eq. 13), as a function or as a TRL reward."""

from collections.abc import Sequence, Sized

import torch
from torch import Tensor

from rlloss import checks


@torch.no_grad()
def soft_overlong_penalty(lengths: Tensor, *, max_length: int, cache: int) -> Tensor:
    """Return 0 up to max_length - cache tokens; from there the penalty falls linearly to -1 at max_length and stays -1.

    Args:
        lengths: `[...]` real, number of tokens of each completion.
        max_length: tokens, >= 1. The paper uses 20480.
        cache: tokens of the interval in which the penalty grows, 0 to max_length. With 0 the penalty jumps from 0 at
            max_length to -1 beyond. The paper uses 4096.

    Returns:
        Shaped like lengths, detached, on its device; fp64 for fp64 lengths, else fp32.

    Raises:
        TypeError: lengths is complex, bool or no tensor, or max_length or cache is no int.
        ValueError: max_length or cache is out of range.

    Source: 2503.14476, Eq. 13: (max_length - cache - length) / cache in between.
    """
    _check(max_length, cache)
    checks.real("lengths", lengths)
    left = max_length - cache - lengths.detach().double()
    penalty = (left / cache).clamp(-1.0, 0.0) if cache else torch.where(left < 0, -1.0, left.new_zeros(()))
    return penalty if lengths.dtype == torch.float64 else penalty.float()


class SoftOverlongPenalty:
    """`soft_overlong_penalty` as a TRL reward function, `GRPOTrainer(reward_funcs=[..., SoftOverlongPenalty(...)])`.

    TRL logs it as `rewards/soft_overlong/mean`. It can be pickled, as rollout workers need.

    Args:
        max_length: as for `soft_overlong_penalty`.
        cache: as for `soft_overlong_penalty`.

    Raises:
        TypeError, ValueError: as for `soft_overlong_penalty`.
    """

    __name__ = "soft_overlong"

    def __init__(self, max_length: int, cache: int):
        _check(max_length, cache)
        self.max_length, self.cache = max_length, cache

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_) -> list[float]:
        """Return one penalty per completion, from its token ids. Other arguments of TRL are not read."""
        checks.of_type("completion_ids", completion_ids, Sized, "the token ids of each completion")
        for ids in completion_ids:
            checks.of_type("completion_ids", ids, Sized, "the token ids of each completion")
        lengths = torch.tensor([len(ids) for ids in completion_ids], dtype=torch.float64)
        return soft_overlong_penalty(lengths, max_length=self.max_length, cache=self.cache).tolist()

    def __repr__(self) -> str:
        return f"SoftOverlongPenalty(max_length={self.max_length}, cache={self.cache})"


def _check(max_length: int, cache: int) -> None:
    checks.whole("max_length", max_length, 1)
    checks.whole("cache", cache)
    checks.require(0 <= cache <= max_length, "cache", cache, f"0 to max_length = {max_length}")
