"""Sample with an entropy-dependent temperature in `generate` of transformers.

Usage::

    from transformers import LogitsProcessorList
    from rlloss.entropy.temperature import TwoLevelTemperature
    from rlloss.integrations.transformers.sampling import EntropyTemperatureProcessor

    processor = LogitsProcessorList([EntropyTemperatureProcessor(TwoLevelTemperature(high=1.2))])
    model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, logits_processor=processor)
"""

import torch
from torch import Tensor

try:
    from transformers import LogitsProcessor
except ImportError as error:
    raise ImportError(
        'rlloss.integrations.transformers.sampling needs transformers: pip install "rlloss[trl]"'
    ) from error

from rlloss import checks
from rlloss.entropy.temperature import TemperatureRule, scale_logits


class EntropyTemperatureProcessor(LogitsProcessor):
    """Divides each row of scores by the temperature T that `rule` gives for the entropy of this row.

    `generate` runs the processors of its caller after its own processors that ban or penalise tokens (min_new_tokens,
    repetition_penalty, bad_words_ids, ...) and before its sampling warpers (temperature, top_k, top_p, min_p, ...).
    Therefore:

    - The entropy is that of the penalised logits at temperature 1. The same holds for dynatemp's number of candidates.
    - The generation config's `temperature` is applied on top: tokens are sampled from softmax(z / (T * temperature)).
      To apply the rule alone, pass temperature=1.0, top_k=0 and top_p=1.0: the model's generation config may differ.
    - With do_sample=False only `scores` changes: the largest logit stays the largest.

    With num_return_sequences, each completion is a row already. In beam search the scores are log-probabilities with
    the same entropy, but log p / T is not a log-probability, and its sum ranks the beams. Beam search runs, but cannot
    be recorded, because beams change rows.

    Args:
        rule: a rule of `rlloss.entropy.temperature`.
        record: store temperature and entropy of every step on the device of the scores, 8 bytes per token. Call
            `reset` before the next generation. Assisted decoding and continuous batching cannot be recorded.

    Raises:
        TypeError: `rule` is not a rule.
    """

    def __init__(self, rule: TemperatureRule, record: bool = False):
        if not isinstance(rule, TemperatureRule):
            raise TypeError(
                f"rule: found {type(rule).__name__}, expected one of rlloss.entropy.temperature, not its settings"
            )
        self.rule = rule
        self.record = record
        self.supports_continuous_batching = not record
        self.reset()

    def reset(self) -> None:
        """Drop the record."""
        self._steps: list[tuple[Tensor, Tensor]] = []
        self._last: Tensor | None = None
        self._rows_changed: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores / T as a new tensor `[B, V]`, from input_ids `[B, L]` and scores `[B, V]`."""
        scaled = scale_logits(scores, self.rule)
        if self.record:
            self._check_step(input_ids)
            self._steps.append((scaled.temperature, scaled.entropy))
        return scaled.logits

    def _check_step(self, input_ids: Tensor) -> None:
        last, self._last = self._last, input_ids
        if last is None:
            self._rows_changed = torch.zeros((), dtype=torch.bool, device=input_ids.device)
            return
        rows, length = last.shape
        if input_ids.shape != (rows, length + 1):
            raise ValueError(
                f"input_ids: found shape {tuple(input_ids.shape)} after {tuple(last.shape)}, expected "
                f"{(rows, length + 1)}: one token a step (assisted decoding cannot be recorded), and reset() before "
                "another generation"
            )
        assert self._rows_changed is not None
        self._rows_changed |= (input_ids[:, :-1] != last).any()  # read later: no synchronisation here

    def temperatures(self) -> Tensor:
        """T of every step, fp32 `[B, steps]`. Steps after the end of a row have the T of padding."""
        return self._stacked(0)

    def entropies(self) -> Tensor:
        """Entropy of every step before scaling, fp32 `[B, steps]`, in nats."""
        return self._stacked(1)

    def _stacked(self, which: int) -> Tensor:
        checks.require(self.record, "record", False, "True: nothing was recorded")
        checks.require(bool(self._steps), "steps", 0, "a generation before its record is asked for")
        changed = bool(self._rows_changed)
        checks.require(
            not changed, "input_ids", "rows that did not go on where they were",
            "a row for each completion (no beam search), and reset() before another generation",
        )  # fmt: skip
        return torch.stack([step[which] for step in self._steps], dim=1)
