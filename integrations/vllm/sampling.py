"""Sample with an entropy-dependent temperature in vLLM. Each request chooses its own rule::

    LLM(model, logits_processors=["rlloss.integrations.vllm.sampling:EntropyTemperature"])
    SamplingParams(temperature=1.0, extra_args={"entropy_temperature": {"rule": "two_level", "high": 1.2}})

Over HTTP extra arguments are flat, so pass the settings as JSON text::

    "vllm_xargs": {"entropy_temperature": "{\\"rule\\": \\"two_level\\", \\"high\\": 1.2}"}

The settings are those of `rlloss.entropy.temperature_rule`. Requests without settings are not changed. vLLM divides by
the request's own `temperature` afterwards, so tokens are sampled from softmax(z / (T * temperature)). Then it applies
min_p, top_k and top_p. Greedy requests would ignore the rule and are refused. The processor receives z before the
repetition, presence and frequency penalties with the V1 model runner, and after them with model runner V2.

vLLM has two interfaces for processors. `EntropyTemperature` becomes `EntropyTemperatureV1` or `EntropyTemperatureV2`,
as the model runner requires. Name this class when you create the engine, or install it as an entry point of the group
"vllm.logits_processors", which also reaches engines that you do not start yourself. If both are configured, only the
last processor created for an engine is active.

- Model runner V2 calls `validate_params` of named processors only. With an entry point alone, a request with bad
  settings raises when it enters the batch, and that ends the engine. On a server, name the class.
- With speculative decoding, V1 refuses named processors and skips entry points. V2 runs both.
- vLLM returns log-probabilities before scaling, unless logprobs_mode is "processed_logprobs".
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
    """vLLM's LogitsProcessor of this module. If the module is missing, an empty base class."""
    try:
        return importlib.import_module(module).LogitsProcessor
    except (ImportError, AttributeError):
        return type("NoInterface", (), {})


V1Interface: Any = _interface("vllm.v1.sample.logits_processor")
V2Interface: Any = _interface("vllm.v1.worker.gpu.sample.logits_processor.interface")

KEY = "entropy_temperature"
GREEDY = 1e-5  # vLLM samples greedily below this temperature


def rule_of(sampling_params: Any) -> TemperatureRule | None:
    """Return the rule that a request asks for in its `extra_args`.

    Args:
        sampling_params: vLLM's SamplingParams.

    Returns:
        The rule, or None if the request has no settings.

    Raises:
        ValueError: the settings are not a rule, or the request is greedy.
    """
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
    """The part that both interfaces share."""

    _alive: "weakref.WeakSet[_Processor]" = weakref.WeakSet()

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Check the settings of a request.

        Raises:
            ValueError: see `rule_of`.
        """
        rule_of(sampling_params)

    def _register(self, vllm_config: Any) -> None:
        """Switch off the engine's earlier processor: a class both named and installed must not divide twice."""
        self._engine = vllm_config
        self._superseded = False
        for other in list(self._alive):
            if other._engine is vllm_config:
                other._superseded = True
        self._alive.add(self)


def _distinct(rules: Iterable[TemperatureRule | None]) -> list[TemperatureRule]:
    return list(dict.fromkeys(rule for rule in rules if rule is not None))


class EntropyTemperatureV1(_Processor, V1Interface):
    """The processor for the V1 model runner. Row i of the logits belongs to request i of the batch."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self._register(vllm_config)
        self._device = device
        self._rules: dict[int, TemperatureRule] = {}
        self._plan: tuple[int, list[tuple[TemperatureRule, Tensor | None]]] | None = None

    def is_argmax_invariant(self) -> bool:
        """False, although the argmax stays: vLLM runs invariant processors after the division by `temperature`."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow a change of the batch. batch_update: vLLM's BatchUpdate, or None if nothing changed."""
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
        # A request may take the row of another request without a removal.
        if rule is None:
            self._rules.pop(row, None)
        else:
            self._rules[row] = rule

    def apply(self, logits: Tensor) -> Tensor:
        """Scale logits `[batch size, V]` in place and return them."""
        if not self._rules or self._superseded:
            return logits
        if self._plan is None or self._plan[0] != len(logits):
            self._plan = len(logits), self._masks(len(logits))
        for rule, mask in self._plan[1]:
            scale_logits(logits, rule, mask=mask, inplace=True)
        return logits

    def _masks(self, batch_size: int) -> list[tuple[TemperatureRule, Tensor | None]]:
        """The rules of the batch, each with a mask of its rows. None: all rows."""
        rules = [self._rules.get(row) for row in range(batch_size)]
        masks = []
        for rule in _distinct(rules):
            asked = [other == rule for other in rules]
            masks.append((rule, None if all(asked) else torch.tensor(asked).to(self._device)))
        return masks


class EntropyTemperatureV2(_Processor, V2Interface):
    """The processor for model runner V2. A request keeps one slot, and each step maps rows of logits to slots."""

    def __init__(self, vllm_config: Any, req_states: Any):
        self._register(vllm_config)
        self._device = req_states.device
        self._rules: list[TemperatureRule | None] = [None] * req_states.max_num_reqs
        self._numbers: dict[TemperatureRule, int] = {}
        self._number_of_slot = torch.full((req_states.max_num_reqs,), -1, device=self._device)
        self._stale = False

    def is_argmax_invariant(self) -> bool:
        """False, as in V1. Some versions of the interface ask."""
        return False

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Assign a slot to a request, replacing the previous one. Return whether its logits are scaled."""
        rule = rule_of(sampling_params)
        self._stale |= rule != self._rules[req_idx]
        self._rules[req_idx] = rule
        return rule is not None

    def apply_staged_writes(self) -> None:
        """Copy the changes of `add_request` to the device."""
        if not self._stale:
            return
        self._stale = False
        self._numbers = {rule: number for number, rule in enumerate(_distinct(self._rules))}
        numbers = [-1 if rule is None else self._numbers[rule] for rule in self._rules]
        self._number_of_slot = torch.tensor(numbers).to(self._device)

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Scale logits `[rows, V]` in place and return them, without synchronisation. ctx: vLLM's LogitsContext."""
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
        # Padding rows have slot -1.
        slot_of_row = ctx.expanded_idx_mapping.long()
        number_of_row = torch.where(slot_of_row >= 0, self._number_of_slot[slot_of_row.clamp(min=0)], -1)
        for rule in rules:
            scale_logits(logits, rule, mask=number_of_row == self._numbers[rule], inplace=True)
        return logits


class EntropyTemperature(_Processor, V1Interface, V2Interface):
    """The processor for both model runners. Creates an `EntropyTemperatureV1` or an `EntropyTemperatureV2`."""

    def __new__(cls, vllm_config: Any, *arguments: Any, **named: Any) -> Any:
        """Take (vllm_config, device, is_pin_memory) for V1, or (vllm_config, req_states) for V2."""
        kind = EntropyTemperatureV1 if len(arguments) + len(named) == 2 else EntropyTemperatureV2
        return kind(vllm_config, *arguments, **named)
