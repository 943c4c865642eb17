"""Describe the lm_head of a call: its weight and bias, the dtypes of its products, and this rank's part of it."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlloss.lm_head.vocab_parallel import Shard


class Settings(NamedTuple):
    """compute_dtype is the dtype of rounded operands. shard is this rank's part of the vocabulary, or None."""

    compute_dtype: torch.dtype
    batch_invariant: bool = False
    shard: Shard | None = None


class Head(NamedTuple):
    """weight [V, D] and bias [V] or None (with a `shard` those of this rank), then the fields of `Settings`."""

    weight: Tensor
    bias: Tensor | None
    compute_dtype: torch.dtype
    batch_invariant: bool = False
    shard: Shard | None = None

    @property
    def V(self) -> int:
        """Number of entries of the whole vocabulary."""
        return len(self.weight) if self.shard is None else self.shard.total

    @property
    def offset(self) -> int:
        """First vocabulary entry of this rank."""
        return 0 if self.shard is None else self.shard.offset

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    def operand(self, x: Tensor) -> Tensor:
        """Return x as an operand of a product: rounded to the compute dtype, then widened unless on a GPU."""
        x = x.to(self.compute_dtype)
        return x if x.is_cuda else x.to(self.sum_dtype)
