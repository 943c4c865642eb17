"""Seconds and bytes of a call, contenders in turns, and the time that a run may take."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from rlloss.backends import choose_backend

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LEAST = 3  # samples of a contender, however short the time is
# About ten milliseconds, in which the host gets ahead of the GPU, as it is in training: the GPU's work is timed, and
# not the host's way to its launches.
HEAD_START_CYCLES = 20_000_000

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


def phases(start: Start, head_start: int | None = None) -> tuple[float, float]:
    """Seconds of the forward, `start()`, and of the backward that it returns. Results are freed off the clock.

    head_start: cycles for which a GPU waits at the beginning (default HEAD_START_CYCLES).
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
    torch.cuda._sleep(HEAD_START_CYCLES if head_start is None else head_start)
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


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory a call holds above its inputs, its results included."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = run()
        torch.cuda.synchronize()
        del found
        return torch.cuda.max_memory_allocated() - before
    # Every allocation and release of torch's CPU allocator; the resident set would also count what malloc keeps.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = run()
    del found
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


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
