"""How a trainer's model is called for log-probabilities: which rows with gradient, which columns, at what temperatures.

TRL calls the model itself; what stands in its place here makes of that call the one that is needed.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlloss.integrations.trl.lm_head import token_temperatures


class Parts(NamedTuple):
    """Rows run with gradient, and those run before them without; a row in both counts with gradient."""

    live: list[int]
    dead: list[int]


class ModelCall:
    """Called in the place of a model that returns log-probabilities.

    model: called with keywords, tensors `[B, L]` of prompt and completion; gives `log_probs` and other tensors
    `[B, L - 1]` by name. completions: entries of the micro-batch, of which the completions' width and a tool's mask
    are looked at: what a tool wrote gets no label, so that no head scores it. parts: None: one call, as it comes.
    reach: None: no column is cut off; otherwise each call ends at its longest completion, on a multiple of `multiple`.
    Left padding stays, since positions count it. temperatures: `[N, T]`, one for each token. The head divides the
    token's logits by it. Each call takes the next rows. None: the trainer's temperature.

    Returns what the model returns where it was called once and whole; otherwise a namespace of its `[B, L - 1]`
    tensors, 0 where a column was cut off.
    """

    def __init__(
        self,
        model: Any,
        completions: dict[str, Any] | None = None,
        *,
        parts: Parts | None = None,
        reach: list[int] | None = None,
        multiple: int = 1,
        temperatures: Tensor | None = None,
    ):
        completions = completions or {}
        ids = completions.get("completion_ids")
        self._model, self.parts, self._reach, self._multiple = model, parts, reach, multiple
        self._T, self._tool_mask = 0 if ids is None else ids.shape[1], completions.get("tool_mask")
        self._temperatures, self._next = temperatures, 0

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def __call__(self, **inputs):
        B, L = inputs["input_ids"].shape
        if self._tool_mask is not None and "labels" in inputs and self._T > 0:
            labels = inputs["labels"].clone()
            labels[:, -self._T :].masked_fill_(self._tool_mask == 0, -100)
            inputs["labels"] = labels
        if self._temperatures is not None:
            own = self._temperatures[self._next : self._next + B]
            self._next += B
            inputs["token_temperature"] = nn.functional.pad(own, (L - own.shape[1], 0), value=1.0)
        parts = self.parts
        if parts is None or (len(parts.live) == B and not parts.dead and self._length(parts.live, L) == L):
            return self._run(inputs)
        apart = None
        if parts.dead:
            with torch.no_grad():
                apart = self._run_rows(inputs, parts.dead, L)
            # Weights that autocast cast without gradient are not to be taken up by the call with gradient.
            torch.clear_autocast_cache()
        merged = {}
        for name, x in self._run_rows(inputs, parts.live, L).items():
            if len(parts.live) < B:
                live = torch.tensor(parts.live, device=x.device)
                whole = x.new_zeros(B, x.shape[1])
                if apart is not None:
                    whole = whole.index_copy(0, torch.tensor(parts.dead, device=x.device), apart[name])
                x = whole.index_copy(0, live, x)
            merged[name] = x
        return SimpleNamespace(**merged)

    def _run(self, inputs: dict[str, Any]) -> Any:
        """token_temperature `[B, L]` is that of what stands in a column and not of what it predicts."""
        temperature = inputs.pop("token_temperature", None)
        if temperature is None:
            return self._model(**inputs)
        # The head's rows: those with a label, which stands one column further than what predicts it.
        with token_temperatures(temperature[:, 1:][inputs["labels"][:, 1:] != -100]):
            return self._model(**inputs)

    def _length(self, rows: list[int], L: int) -> int:
        if self._reach is None:
            return L
        length = L - self._T + max(self._reach[i] for i in rows)
        return min(L, max(-(-length // self._multiple), 1) * self._multiple)

    def _run_rows(self, inputs: dict[str, Any], rows: list[int], L: int) -> dict[str, Tensor]:
        """The model's per-token outputs of these rows, as long as of the whole."""
        ids = inputs["input_ids"]
        B, length = ids.shape[0], self._length(rows, L)
        index = torch.tensor(rows, device=ids.device)
        part = {}
        for name, x in inputs.items():
            if isinstance(x, Tensor) and x.dim() >= 1 and x.shape[0] == B:
                x = x if len(rows) == B else x[index]
                x = x[:, :length] if x.dim() >= 2 and x.shape[1] == L else x
            part[name] = x
        outputs = self._run(part)
        return {
            name: nn.functional.pad(x, (0, L - length))
            for name, x in outputs.items()
            if isinstance(x, Tensor) and x.dim() == 2 and x.shape[0] == len(rows)
        }
