"""Seconds and bytes of a call, contenders in turns, and the time that a run may take."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from rlloss.logits.statistics import choose_backend

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LEAST = 3  # samples of a contender, however short the time is
# About ten milliseconds, in which the host gets ahead of the GPU, as it is in training: the GPU's work is timed, and
# not the host's way to its launches.
HEAD_START_CYCLES = 20_000_000

T = TypeVar("T")
Start = Callable[[], Callable[[], object]]  # the forward, with gradient; it returns the backward


def refuse_interpreter() -> None:
    if choose_backend(torch.empty(1, device=DEVICE)) == "interpreter":
        raise RuntimeError("TRITON_INTERPRET: found 1, expected unset: the interpreter's speed says nothing")


def seconds(run: Callable[[], object]) -> float:
    """Of one call; on a GPU between two events on the stream."""
    if not CUDA:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def phases(start: Start, head_start: int = HEAD_START_CYCLES) -> tuple[float, float]:
    """Seconds of the forward, `start()`, and of the backward that it returns. Results are freed off the clock.

    head_start: cycles for which a GPU waits at the beginning.
    """
    if not CUDA:
        begin = time.perf_counter()
        backward = start()
        middle = time.perf_counter()
        found = backward()
        end = time.perf_counter()
        del found
        return middle - begin, end - middle
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda._sleep(head_start)
    events[0].record()
    backward = start()
    events[1].record()
    found = backward()
    events[2].record()
    events[2].synchronize()
    del found
    return events[0].elapsed_time(events[1]) / 1e3, events[1].elapsed_time(events[2]) / 1e3


def in_turns(
    clocks: Mapping[str, Callable[[], tuple[float, ...]]], rounds: int, limit: float = math.inf, *, warm: bool = True
) -> dict[str, list[tuple[float, ...]]]:
    """Samples of each: what its clock returns.

    The contenders take turns, so that what disturbs the machine disturbs them all; each turn another one begins.

    Args:
        rounds: the most samples of each.
        limit: seconds after which no turn begins that would not fit, once there are LEAST of them.
        warm: whether a turn comes first that counts for nothing.
    """
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in clocks}
    names = list(clocks)
    begin = time.monotonic()
    for turn in range(rounds + warm):
        spent = time.monotonic() - begin
        if turn >= LEAST + warm and spent + spent / turn > limit:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            elapsed = clocks[name]()
            if turn >= warm:
                samples[name].append(elapsed)
    return samples


def warm(limit: float) -> bool:
    """Whether a turn that counts for nothing comes first: not where time is short on a CPU, where the check was one."""
    return CUDA or limit == math.inf


def beside_copies(
    logits: torch.Tensor, clocks: Mapping[str, Callable[[], tuple[float, ...]]], rounds: int, limit: float
) -> tuple[dict[str, list[tuple[float, ...]]], dict[str, dict]]:
    """(samples of `in_turns`, what no step out of place goes below in the same turns): "copy" of the logits into memory
    that was there, and "zeros", a fresh gradient; of each {"bytes", "seconds"}."""
    buffer = torch.empty_like(logits)
    floors = {
        "copy": (2 * buffer.nbytes, lambda: buffer.copy_(logits)),
        "zeros": (buffer.nbytes, lambda: torch.zeros_like(buffer)),
    }
    of_floors = {name: lambda run=run: (seconds(run),) for name, (_, run) in floors.items()}
    samples = in_turns({**of_floors, **clocks}, rounds, limit, warm=warm(limit))
    found = {
        name: {"bytes": count, "seconds": [x for (x,) in samples.pop(name)]} for name, (count, _) in floors.items()
    }
    return samples, found


def split(samples: list[tuple[float, ...]]) -> dict[str, list[float]]:
    """{"forward", "backward", "seconds"} of samples of `phases`; "seconds" is both."""
    return {
        "forward": [forward for forward, _ in samples],
        "backward": [backward for _, backward in samples],
        "seconds": [forward + backward for forward, backward in samples],
    }


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory a call holds above its inputs, its results included."""
    return with_peak(run)[1]


def with_peak(run: Callable[[], T]) -> tuple[T, int]:
    """What a call returns, and `peak_bytes`."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = run()
        torch.cuda.synchronize()
        return found, torch.cuda.max_memory_allocated() - before
    # Every allocation and release of torch's CPU allocator; the resident set would also count what malloc keeps.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return found, peak


class Budget:
    """The time that a run may take, shared out among what is still to be measured."""

    def __init__(self, minutes: float):
        self.minutes = minutes
        self.end = time.monotonic() + 60.0 * minutes

    @property
    def left(self) -> float:
        """Seconds; not below 0."""
        return max(0.0, self.end - time.monotonic())

    @property
    def longest_step(self) -> float:
        """Seconds that a step of a peer may take: it is run four times at least, in each of many cells."""
        return 60.0 * self.minutes / 50.0
