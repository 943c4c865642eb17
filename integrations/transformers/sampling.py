"""Entropy-dependent temperature in `generate` of transformers.

from rlloss.integrations.transformers.sampling import EntropyTemperatureProcessor
from rlloss.entropy.temperature import TwoLevelTemperature

processor = EntropyTemperatureProcessor(TwoLevelTemperature(high=1.2))
model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, logits_processor=LogitsProcessorList([processor]))
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
    """Divides each row of scores by the temperature T that `rule` gives for the row's own entropy.

    `generate` runs the processors it is given after those of its own that ban or penalise tokens (min_new_tokens,
    repetition_penalty, bad_words_ids, ...) and before its sampling warpers (temperature, top_k, top_p, min_p, ...). So

    - the entropy, and for dynatemp the number of candidates, are those of the penalised logits at temperature 1;
    - the generation config's `temperature` is applied on top: tokens are sampled from softmax(z / (T temperature)). For
      the rule alone set temperature=1.0, and top_k=0 and top_p=1.0, whatever the model's generation config says;
    - with do_sample=False nothing changes but `scores`: the largest logit stays the largest.

    num_return_sequences: rows are completions already (B = prompts x num_return_sequences). Beam search: scores are
    log-probabilities, whose entropy is the same, but log p / T is no log-probability any more and beams are ranked by
    its sum; it runs, and its record is refused because beams change rows.

    Args:
        rule: from `rlloss.entropy.temperature`.
        record: keep temperature and entropy of every step, 8 bytes a token, on the device of the scores. One
            generation at a time; call `reset` before the next. Assisted decoding and continuous batching, which call
            it out of step, cannot be recorded.
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
        """Forget what is recorded."""
        self._steps: list[tuple[Tensor, Tensor]] = []
        self._last: Tensor | None = None
        self._rows_changed: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [B, L], scores [B, V] -> scores / T [B, V], a new tensor."""
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
        self._rows_changed |= (input_ids[:, :-1] != last).any()  # looked at later: no synchronisation here

    def temperatures(self) -> Tensor:
        """T of every step: fp32 `[B, steps]`; after a row has ended, that of a step whose token was padding."""
        return self._stacked(0)

    def entropies(self) -> Tensor:
        """H of every step before scaling: fp32 `[B, steps]`, in nats."""
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
