"""Change how TRL calls the model for log-probabilities: rows without gradient, fewer columns, temperatures per token.

TRL calls the model itself. A `ModelCall` takes the model's place and turns that call into the calls that are needed.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlloss.integrations.trl.lm_head import token_temperatures


class Parts(NamedTuple):
    """Rows that run with gradient (`live`), and rows that run before them without (`dead`). If a row is in both, its
    result with gradient is used."""

    live: list[int]
    dead: list[int]


class ModelCall:
    """Stands in for a model that returns log-probabilities.

    A call returns the model's own result if the model ran once on the whole batch. Otherwise it returns a namespace
    with the model's `[B, L - 1]` tensors, 0 in columns that were cut off.

    Args:
        model: takes tensors `[B, L]` of prompt and completion by keyword, and returns `log_probs` and other tensors
            `[B, L - 1]` by name.
        completions: the micro-batch. The width of the completions and the tool mask are read: tokens that a tool wrote
            get no label, so the head does not score them.
        parts: None: one call for all rows.
        reach: number of columns of each completion up to its last token. Each call is cut after its longest completion,
            rounded up to a `multiple`. Left padding stays, because positions count it. None: no column is cut off.
        multiple: see `reach`.
        temperatures: `[N, T]`. The head divides the logits of each token by its temperature. Each call takes the next B
            rows. None: the trainer's temperature.
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
            # The call with gradient must not reuse weights that autocast cast, and cached, without gradient.
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
        """Call the model. `token_temperature` `[B, L]` belongs to the token in a column, not to the one it predicts."""
        temperature = inputs.pop("token_temperature", None)
        if temperature is None:
            return self._model(**inputs)
        # The head's rows are those with a label. A label stands one column after the state that predicts it.
        with token_temperatures(temperature[:, 1:][inputs["labels"][:, 1:] != -100]):
            return self._model(**inputs)

    def _length(self, rows: list[int], L: int) -> int:
        if self._reach is None:
            return L
        length = L - self._T + max(self._reach[i] for i in rows)
        return min(L, max(-(-length // self._multiple), 1) * self._multiple)

    def _run_rows(self, inputs: dict[str, Any], rows: list[int], L: int) -> dict[str, Tensor]:
        """Run these rows and return the model's per-token outputs, padded to the full length."""
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
