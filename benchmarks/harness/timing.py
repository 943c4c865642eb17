"""Measure seconds and peak bytes of a call, time contenders in turns, and keep the time budget of a run."""

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
LEAST = 3  # samples of each contender, even without time left
# About ten milliseconds. The host gets ahead of the GPU, as in training, so the GPU's work is timed and not the host's
# launches.
HEAD_START_CYCLES = 20_000_000

Start = Callable[[], Callable[[], object]]  # the forward with gradient; returns the backward


def refuse_interpreter() -> None:
    if choose_backend(torch.empty(1, device=DEVICE)) == "interpreter":
        raise RuntimeError("TRITON_INTERPRET: found 1, expected unset: the interpreter's speed says nothing")


def seconds(run: Callable[[], object]) -> float:
    """Time one call, in seconds. On a GPU: between two events on the stream."""
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
    """Time the forward, `start()`, and the backward that it returns, in seconds. Results are freed off the clock.

    head_start: cycles that a GPU waits at the beginning (default HEAD_START_CYCLES).
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
    """Call the clocks in turns and return the samples of each.

    Disturbances of the machine then affect all contenders. Each turn begins with another contender.

    Args:
        clocks: name -> function that runs the contender once and returns its seconds.
        rounds: largest number of samples of each.
        limit: seconds. After LEAST turns, a turn that would exceed the limit does not begin.
        warm: whether to start with a turn that is not recorded.
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
    """Whether to start with a warm-up turn. On a CPU with a time limit the check was the warm-up."""
    return CUDA or limit == math.inf


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak memory of a call in bytes, with its results and without its inputs."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = run()
        torch.cuda.synchronize()
        del found
        return torch.cuda.max_memory_allocated() - before
    # All allocations and releases of torch's CPU allocator. The resident set would also count memory that malloc keeps.
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
    """The time budget of a run. The suite shares the rest among the cells that are still to be measured."""

    def __init__(self, minutes: float):
        self.minutes = minutes
        self.end = time.monotonic() + 60.0 * minutes

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self.end - time.monotonic())

    @property
    def longest_step(self) -> float:
        """Longest step of a peer in seconds. It runs at least four times in each of many cells."""
        return 60.0 * self.minutes / 50.0
