"""Entropy-dependent temperature in vLLM, chosen by each request.

    LLM(model, logits_processors=["rlloss.integrations.vllm.sampling:EntropyTemperature"])
    SamplingParams(temperature=1.0, extra_args={"entropy_temperature": {"rule": "two_level", "high": 1.2}})

Over HTTP, where extra arguments are flat, the settings are text:
"vllm_xargs": {"entropy_temperature": "{\\"rule\\": \\"two_level\\", \\"high\\": 1.2}"}.

The settings are those of `rlloss.entropy.temperature_rule`. Requests without them are left as they are. vLLM divides
by the request's own `temperature` afterwards, so sampled is from softmax(z / (T temperature)), and then applies min_p,
top_k and top_p. A greedy request, which would ignore the rule, is refused. z is what reaches the processor: with the V1
model runner the logits before, with model runner V2 those after the repetition, presence and frequency penalties.

vLLM has two interfaces for processors. `EntropyTemperature` fits both and becomes `EntropyTemperatureV1` or
`EntropyTemperatureV2`, whichever the model runner asks for; name it alone, or install it as an entry point of the group
"vllm.logits_processors", which reaches engines that somebody else starts. If both are configured, only the last
processor created for an engine is active.

- Model runner V2 asks `validate_params` of processors that are named, not of entry points alone. There a request with
  bad settings raises when it enters the batch, which ends the engine: on a server, name the class.
- With speculative decoding V1 refuses named processors and leaves out entry points; V2 runs them.
- The log-probabilities that vLLM returns are those before scaling unless logprobs_mode is "processed_logprobs".
"""

import importlib
import json
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rlloss import checks
from rlloss.entropy.temperature import TemperatureRule, scale_logits, temperature_rule


def _interface(module: str) -> Any:
    """vLLM's LogitsProcessor of that module, or a base without methods where this vLLM, or all of it, is missing."""
    try:
        return importlib.import_module(module).LogitsProcessor
    except (ImportError, AttributeError):
        return type("NoInterface", (), {})


V1Interface: Any = _interface("vllm.v1.sample.logits_processor")
V2Interface: Any = _interface("vllm.v1.worker.gpu.sample.logits_processor.interface")

KEY = "entropy_temperature"
GREEDY = 1e-5  # vLLM samples greedily below it


def rule_of(sampling_params: Any) -> TemperatureRule | None:
    """The rule that a request asks for in `extra_args`, None without; ValueError if it cannot be had."""
    settings = (getattr(sampling_params, "extra_args", None) or {}).get(KEY)
    if settings is None:
        return None
    if isinstance(settings, str):
        try:
            settings = json.loads(settings)
        except ValueError as error:
            raise ValueError(f"{KEY}: found {settings!r}, expected settings or their JSON") from error
    try:
        rule = temperature_rule(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{KEY}: {error}") from error
    temperature = sampling_params.temperature
    checks.require(temperature >= GREEDY, "temperature", temperature, f"above 0: greedy requests ignore {KEY}")
    return rule


class _Processor:
    """What both interfaces share."""

    _alive: "weakref.WeakSet[_Processor]" = weakref.WeakSet()

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError for settings that cannot be used."""
        rule_of(sampling_params)

    def _register(self, vllm_config: Any) -> None:
        """Named and installed, the class is loaded twice for an engine; logits must be divided once."""
        self._engine = vllm_config
        self._superseded = False
        for other in list(self._alive):
            if other._engine is vllm_config:
                other._superseded = True
        self._alive.add(self)


def _distinct(rules: Iterable[TemperatureRule | None]) -> list[TemperatureRule]:
    return list(dict.fromkeys(rule for rule in rules if rule is not None))


class EntropyTemperatureV1(_Processor, V1Interface):
    """For the V1 model runner: row i of the logits is request i of the batch, and the batch says how it changed."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self._register(vllm_config)
        self._device = device
        self._rules: dict[int, TemperatureRule] = {}
        self._plan: tuple[int, list[tuple[TemperatureRule, Tensor | None]]] | None = None

    def is_argmax_invariant(self) -> bool:
        """False: it does keep the argmax, but those that say so run after the division by `temperature`."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """batch_update: vLLM's BatchUpdate, or None where the batch is as it was."""
        if batch_update is None:
            return
        self._plan = None
        for row in batch_update.removed:
            self._rules.pop(row, None)
        for row, params, *_ in batch_update.added:
            self._place(row, rule_of(params))
        for source, destination, direction in batch_update.moved:
            there = self._rules.pop(destination, None)
            self._place(destination, self._rules.pop(source, None))
            if direction.name == "SWAP":
                self._place(source, there)

    def _place(self, row: int, rule: TemperatureRule | None) -> None:
        # A request may take the row of another that was not removed before.
        if rule is None:
            self._rules.pop(row, None)
        else:
            self._rules[row] = rule

    def apply(self, logits: Tensor) -> Tensor:
        """logits [batch size, V], scaled in place."""
        if not self._rules or self._superseded:
            return logits
        if self._plan is None or self._plan[0] != len(logits):
            self._plan = len(logits), self._masks(len(logits))
        for rule, mask in self._plan[1]:
            scale_logits(logits, rule, mask=mask, inplace=True)
        return logits

    def _masks(self, batch_size: int) -> list[tuple[TemperatureRule, Tensor | None]]:
        """The rules of the batch, and the rows that each is for; None: all."""
        rules = [self._rules.get(row) for row in range(batch_size)]
        masks = []
        for rule in _distinct(rules):
            asked = [other == rule for other in rules]
            masks.append((rule, None if all(asked) else torch.tensor(asked).to(self._device)))
        return masks


class EntropyTemperatureV2(_Processor, V2Interface):
    """For model runner V2: a request keeps a slot, and each step says of which slot every row of logits is."""

    def __init__(self, vllm_config: Any, req_states: Any):
        self._register(vllm_config)
        self._device = req_states.device
        self._rules: list[TemperatureRule | None] = [None] * req_states.max_num_reqs
        self._numbers: dict[TemperatureRule, int] = {}
        self._number_of_slot = torch.full((req_states.max_num_reqs,), -1, device=self._device)
        self._stale = False

    def is_argmax_invariant(self) -> bool:
        """As in V1, for versions of the interface that ask."""
        return False

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Put a request into a slot, over whatever was there; True if its logits are scaled."""
        rule = rule_of(sampling_params)
        self._stale |= rule != self._rules[req_idx]
        self._rules[req_idx] = rule
        return rule is not None

    def apply_staged_writes(self) -> None:
        """Bring what `add_request` changed to the device."""
        if not self._stale:
            return
        self._stale = False
        self._numbers = {rule: number for number, rule in enumerate(_distinct(self._rules))}
        numbers = [-1 if rule is None else self._numbers[rule] for rule in self._rules]
        self._number_of_slot = torch.tensor(numbers).to(self._device)

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """logits [rows, V], scaled in place; ctx: vLLM's LogitsContext. Does not wait for the device."""
        if self._superseded:
            return logits
        slots = [slot for slot in ctx.idx_mapping_np.tolist() if slot >= 0]
        asked = [self._rules[slot] for slot in slots]
        rules = _distinct(asked)
        if not rules:
            return logits
        if len(rules) == 1 and None not in asked:
            scale_logits(logits, rules[0], inplace=True)
            return logits
        # A row that is padding has slot -1.
        slot_of_row = ctx.expanded_idx_mapping.long()
        number_of_row = torch.where(slot_of_row >= 0, self._number_of_slot[slot_of_row.clamp(min=0)], -1)
        for rule in rules:
            scale_logits(logits, rule, mask=number_of_row == self._numbers[rule], inplace=True)
        return logits


class EntropyTemperature(_Processor, V1Interface, V2Interface):
    """The processor for either model runner: what is made is an EntropyTemperatureV1 or an EntropyTemperatureV2."""

    def __new__(cls, vllm_config: Any, *arguments: Any, **named: Any) -> Any:
        """(vllm_config, device, is_pin_memory) for V1, (vllm_config, req_states) for V2."""
        kind = EntropyTemperatureV1 if len(arguments) + len(named) == 2 else EntropyTemperatureV2
        return kind(vllm_config, *arguments, **named)
