"""Test the processors for vLLM with calls as from its two model runners. vLLM itself need not be installed."""

import abc
import enum
import gc
import importlib.util
import json
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from rlloss.entropy.temperature import scale_logits, temperature_rule
from rlloss.integrations.vllm import sampling as vllm_sampling
from rlloss.integrations.vllm.sampling import EntropyTemperature, EntropyTemperatureV1, EntropyTemperatureV2

pytestmark = pytest.mark.usefixtures("on_torch")
TWO = {"rule": "two_level", "high": 1.5, "low": 0.7, "cutoff": 2.0}
EDT = {"rule": "edt", "base": 1.2, "theta": 0.9}
DYN = {"rule": "dynatemp", "low": 0.3, "high": 1.6}
V, DEVICE = 40, torch.device("cpu")


@dataclass
class SamplingParams:
    temperature: float = 1.0
    extra_args: dict[str, Any] | None = None


class MoveDirectionality(enum.Enum):
    UNIDIRECTIONAL = enum.auto()
    SWAP = enum.auto()


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: list = field(default_factory=list)
    added: list = field(default_factory=list)
    moved: list = field(default_factory=list)


@dataclass(frozen=True)
class RequestState:
    device: torch.device = DEVICE
    max_num_reqs: int = 8


@dataclass(frozen=True)
class LogitsContext:
    expanded_idx_mapping: torch.Tensor
    idx_mapping_np: np.ndarray


def asking(settings, **options):
    return SamplingParams(extra_args={"entropy_temperature": settings, "other": 1}, **options)


def added(row, settings):
    return row, SamplingParams() if settings is None else asking(settings), None, []


def logits_of(rows, seed=0):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def expected(logits, settings_of_rows):
    """Expected logits, one row at a time."""
    out = logits.clone()
    for i, settings in enumerate(settings_of_rows):
        if settings is not None:
            out[i] = scale_logits(logits[i], temperature_rule(settings)).logits
    return out


def check_v1(processor, settings_of_rows):
    logits = logits_of(len(settings_of_rows))
    wanted = expected(logits, settings_of_rows)
    found = processor.apply(logits)
    assert found is logits and torch.equal(found, wanted)


def test_v1_follows_the_batch():
    processor = EntropyTemperatureV1(object(), DEVICE, False)
    assert processor.is_argmax_invariant() is False
    check_v1(processor, [None, None])
    processor.update_state(None)
    update = processor.update_state
    update(BatchUpdate(4, added=[added(0, TWO), added(1, None), added(2, EDT), added(3, TWO)]))
    check_v1(processor, [TWO, None, EDT, TWO])
    update(None)
    check_v1(processor, [TWO, None, EDT, TWO])
    update(BatchUpdate(4, moved=[(0, 1, MoveDirectionality.SWAP), (2, 3, MoveDirectionality.SWAP)]))
    check_v1(processor, [None, TWO, TWO, EDT])
    # row 1 ends and the last row takes its place; then both in one update, with a new request
    update(BatchUpdate(3, removed=[1], moved=[(3, 1, MoveDirectionality.UNIDIRECTIONAL)]))
    check_v1(processor, [None, EDT, TWO])
    update(BatchUpdate(3, removed=[2], added=[added(2, DYN)], moved=[(2, 0, MoveDirectionality.SWAP)]))
    check_v1(processor, [DYN, EDT, None])
    # a request without settings takes, or moves to, the row of one with settings that was not removed
    update(BatchUpdate(3, added=[added(0, None)]))
    check_v1(processor, [None, EDT, None])
    update(BatchUpdate(2, moved=[(2, 1, MoveDirectionality.UNIDIRECTIONAL)]))
    check_v1(processor, [None, None])
    update(BatchUpdate(2, added=[added(0, DYN), added(1, DYN)]))  # one rule for all
    check_v1(processor, [DYN, DYN])
    update(BatchUpdate(0, removed=[1, 0]))
    assert processor._rules == {}


def test_v1_against_a_ledger_of_random_batches():
    g = np.random.default_rng(0)
    processor, rows = EntropyTemperatureV1(object(), DEVICE, False), []
    kinds = [None, TWO, EDT, DYN]
    for step in range(60):
        gone = sorted(g.choice(len(rows), size=g.integers(0, len(rows) + 1), replace=False).tolist(), reverse=True)
        new = [kinds[i] for i in g.integers(0, 4, size=g.integers(0, 4))]
        # As in vLLM: new requests fill the gaps from below, then rows from the end fill the other gaps.
        gaps, rows, additions, moves = sorted(gone), list(rows), [], []
        for i in gone:
            rows[i] = "gone"
        for settings in new:
            place = gaps.pop(0) if gaps else len(rows)
            rows[place : place + 1] = [settings]
            additions.append(added(place, settings))
        removed = [i for i in gone if rows[i] == "gone"]
        while "gone" in rows:
            if rows[-1] == "gone":
                rows.pop()
            else:
                place = rows.index("gone")
                moves.append((len(rows) - 1, place, MoveDirectionality.UNIDIRECTIONAL))
                rows[place] = rows.pop()
        if len(rows) > 1 and step % 3 == 0:
            i, j = g.choice(len(rows), size=2, replace=False).tolist()
            rows[i], rows[j] = rows[j], rows[i]
            moves.append((i, j, MoveDirectionality.SWAP))
        processor.update_state(BatchUpdate(len(rows), removed, additions, moves))
        if rows:
            check_v1(processor, rows)


def check_v2(processor, settings_of_slots, slots_of_rows):
    processor.apply_staged_writes()
    logits = logits_of(len(slots_of_rows), seed=1)
    wanted = expected(logits, [settings_of_slots.get(slot) for slot in slots_of_rows])
    batch = np.array(list(dict.fromkeys(slots_of_rows)), dtype=np.int32)
    context = LogitsContext(torch.tensor(slots_of_rows, dtype=torch.int32), batch)
    found = processor.apply(logits, context)
    assert found is logits and torch.equal(found, wanted)


def test_v2_finds_the_rows_of_its_requests():
    processor = EntropyTemperatureV2(object(), RequestState())
    slots = {3: TWO, 0: None, 5: EDT, 7: TWO}
    for slot, settings in slots.items():
        asked = processor.add_request(slot, SamplingParams() if settings is None else asking(settings))
        assert asked is (settings is not None)
    check_v2(processor, slots, [5, 3, 0, 7])
    check_v2(processor, slots, [7, 7, 7, 0, 5, 5])  # several rows a request: draft tokens
    check_v2(processor, slots, [0])
    check_v2(processor, slots, [7, 3])  # one rule for all
    check_v2(processor, slots, [-1, 7, 0, -1])  # padding, and not the last slot, 7
    # slots are used again
    for slot, settings in {3: None, 5: DYN, 1: TWO}.items():
        processor.add_request(slot, SamplingParams() if settings is None else asking(settings))
        slots[slot] = settings
    check_v2(processor, slots, [3, 5, 1, 7, 0])
    check_v2(processor, slots, [3, 0])


def test_settings_come_as_text_too():
    processor = EntropyTemperatureV1(object(), DEVICE, False)
    processor.update_state(BatchUpdate(1, added=[added(0, json.dumps(EDT))]))
    check_v1(processor, [EDT])


@pytest.mark.parametrize("kind", [EntropyTemperature, EntropyTemperatureV1, EntropyTemperatureV2])
@pytest.mark.parametrize("params, message", [
    (asking({"rule": "fast"}), "entropy_temperature: rule: found 'fast', expected one of"),
    (asking({"rule": "edt", "base": 1.0}), "entropy_temperature: edt: theta: found nothing"),
    (asking(TWO | {"high": "hot"}), "entropy_temperature: high: found 'hot', expected a number"),
    (asking(1.2), "entropy_temperature: settings: found 1.2, expected a mapping"),
    (asking("{rule: edt}"), "entropy_temperature: found '{rule: edt}', expected settings or their JSON"),
    (asking(TWO, temperature=0.0), "temperature: found 0.0, expected above 0: greedy requests ignore"),
])  # fmt: skip
def test_bad_settings_are_refused_at_admission(kind, params, message):
    with pytest.raises(ValueError, match=message):
        kind.validate_params(params)
    for good in (asking(TWO), asking(json.dumps(DYN)), SamplingParams(), SamplingParams(0.0, {"a": 1}), object()):
        kind.validate_params(good)


def test_named_and_installed_it_divides_once():
    engine, other = object(), object()
    first, second = (EntropyTemperature(engine, DEVICE, False) for _ in range(2))
    stranger = EntropyTemperature(other, DEVICE, False)
    for processor in (first, second, stranger):
        processor.update_state(BatchUpdate(2, added=[added(0, TWO), added(1, EDT)]))
    logits = logits_of(2)
    assert torch.equal(second.apply(first.apply(logits.clone())), expected(logits, [TWO, EDT]))
    check_v1(stranger, [TWO, EDT])
    pair = [EntropyTemperature(engine, RequestState()) for _ in range(2)]
    for processor in pair:
        processor.add_request(2, asking(DYN))
        processor.apply_staged_writes()
    context = LogitsContext(torch.tensor([2, 2]), np.array([2]))
    assert torch.equal(pair[1].apply(pair[0].apply(logits.clone(), context), context), expected(logits, [DYN, DYN]))
    engines = len(vllm_sampling._Processor._alive)
    del first, second, stranger, pair, processor
    gc.collect()
    assert len(vllm_sampling._Processor._alive) <= engines - 5


def fake_vllm(monkeypatch, with_v2: bool) -> tuple[Any, Any]:
    """Fake modules with vLLM's two abstract classes."""

    class V1(abc.ABC):
        @classmethod
        def validate_params(cls, sampling_params):
            return None

        @abc.abstractmethod
        def __init__(self, vllm_config, device, is_pin_memory): ...

        @abc.abstractmethod
        def apply(self, logits): ...

        @abc.abstractmethod
        def is_argmax_invariant(self): ...

        def needs_output_token_ids(self):
            return False

        @abc.abstractmethod
        def update_state(self, batch_update): ...

    class V2(abc.ABC):
        def __init__(self, vllm_config, req_states):
            return None

        @classmethod
        def validate_params(cls, sampling_params):
            return None

        def add_request(self, req_idx, sampling_params):
            return True

        def apply_staged_writes(self):
            return None

        @abc.abstractmethod
        def apply(self, logits, ctx): ...

    names = ["vllm", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.logits_processor"]
    if with_v2:
        names += ["vllm.v1.worker", "vllm.v1.worker.gpu", "vllm.v1.worker.gpu.sample"]
        names += [f"{names[-1]}.logits_processor", f"{names[-1]}.logits_processor.interface"]
    for name in names:
        module: Any = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["vllm.v1.sample.logits_processor"].LogitsProcessor = V1  # type: ignore[attr-defined]
    if with_v2:
        sys.modules[names[-1]].LogitsProcessor = V2  # type: ignore[attr-defined]
    return V1, V2


@pytest.mark.parametrize("with_v2", [True, False])
def test_with_vllm_the_class_is_what_both_loaders_want(monkeypatch, with_v2):
    V1, V2 = fake_vllm(monkeypatch, with_v2)
    spec = importlib.util.spec_from_file_location("loaded_by_vllm", vllm_sampling.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # V1's loader, then V2's: each requires a subclass, and calls it with the arguments of its model runner.
    assert issubclass(module.EntropyTemperature, V1) and issubclass(module.EntropyTemperature, V2) is with_v2
    first = module.EntropyTemperature(object(), DEVICE, False)
    assert isinstance(first, V1) and not first.needs_output_token_ids() and not first.is_argmax_invariant()
    first.update_state(BatchUpdate(2, added=[added(0, TWO), added(1, None)]))
    check_v1(first, [TWO, None])
    named = module.EntropyTemperature(vllm_config=object(), device=DEVICE, is_pin_memory=False)
    assert isinstance(named, module.EntropyTemperatureV1)
    second = module.EntropyTemperature(object(), RequestState())
    assert isinstance(second, V2) is with_v2
    second.add_request(4, asking(EDT))
    check_v2(second, {4: EDT}, [4, 0])
    with pytest.raises(ValueError, match="rule: found None"):
        module.EntropyTemperature.validate_params(asking({}))


def test_without_vllm_the_module_imports():
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    assert vllm_sampling.V1Interface.__name__ == vllm_sampling.V2Interface.__name__ == "NoInterface"
