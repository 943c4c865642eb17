"""Who takes part: a contender is checked before it is timed, and one that is wrong gets no number."""

import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.harness.conditions import conditions
from benchmarks.harness.errors import failure
from benchmarks.harness.timing import CUDA, peak_bytes, refuse_interpreter


def examined(find: Callable[[], dict[str, Any]], *, ours: bool, strict: bool) -> dict[str, Any]:
    """{"status": "measured"} and what `find` gives, which may have a status of its own; or why there is no number.

    strict: rlloss being wrong raises, and so does every error but those of arithmetic and of memory.
    """
    try:
        return {"status": "measured"} | find()
    except Exception as error:
        if strict and (ours or not isinstance(error, ArithmeticError | torch.OutOfMemoryError)):
            raise
        return {"status": failure(error)}


def peak_of(step: Callable[[], object], longest_step: float) -> dict[str, Any]:
    """{"peak_bytes"} of a step, or the status of one that takes longer than so many seconds."""
    gc.collect()
    begin = time.monotonic()
    peak = peak_bytes(step)
    took = time.monotonic() - begin
    return {"peak_bytes": peak} if took <= longest_step else {"status": f"not measured: a step takes {took:.2g} s"}


def under_pytest(
    benchmark: Any,
    group: str,
    entry: dict[str, Any],
    run: Callable[[], object],
    *,
    rounds: int = 20 if CUDA else 7,
    warmup_rounds: int = 1,
    setup: Callable[[], Any] | None = None,
) -> None:
    """Time a contender with pytest-benchmark; entry: what examining it gave, and what else is to be known of it."""
    refuse_interpreter()
    if entry["status"] != "measured":
        pytest.skip(entry["status"])
    benchmark.group = group
    benchmark.extra_info.update(conditions() | entry)

    def synchronised() -> None:
        run()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, setup=setup, rounds=rounds, warmup_rounds=warmup_rounds)
