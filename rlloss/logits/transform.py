"""Describe the transform that is applied to logits before the softmax."""

from typing import NamedTuple

from torch import Tensor


class Transform(NamedTuple):
    """softcap * tanh(logits * logit_scale / softcap) / temperature. temperature is one per row, or a number for all;
    softcap None means no tanh."""

    temperature: Tensor | float
    softcap: float | None = None
    logit_scale: float = 1.0

    def of(self, rows: slice | Tensor) -> "Transform":
        if not isinstance(self.temperature, Tensor):
            return self
        return self._replace(temperature=self.temperature[rows].contiguous())
