"""Run the suite: order the cells, share the time budget among them, and report the cells that it does not cover."""

import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from benchmarks.contenders.hidden_case import forget_weight
from benchmarks.harness.contest import hold
from benchmarks.harness.errors import failure
from benchmarks.harness.readings import is_ours
from benchmarks.harness.shapes import LLAMA, MODELS, SHARES, Cell
from benchmarks.harness.timing import CUDA, LEAST, Budget
from benchmarks.suites import hidden, logits, loss, step, token_pass

SUITES: dict[str, ModuleType] = {
    "token pass": token_pass, "logits": logits, "loss": loss, "hidden": hidden, "step": step
}  # fmt: skip


def cells(
    suites: Sequence[str], models: Sequence[str], dtypes: Sequence[str], rhos: Sequence[float], fills: Sequence[float]
) -> list[Cell]:
    """Return the cells in the order of measurement.

    First come the token pass and the update step, then rho 0.2 and 1 (model "small" first), then the other cells from
    logits, then those from hidden states. Cells of a model that share tensors are adjacent.

    "small" is measured in all dtypes, other models in the first one. "wide" is measured only from hidden states and
    without padding.
    """
    found = []
    for dtype in dtypes:
        own = [m for m in models if m == "small" or dtype == dtypes[0]]
        of_logits = [m for m in own if m != "wide"]
        for model in own:
            alike = [name for name in of_logits if MODELS[name][1] == MODELS[model][1]]
            for suite in (s for s in ("logits", "loss") if s in suites and model in alike[:1]):
                found += [Cell(suite, ", ".join(alike), dtype, rho, fill) for fill in fills for rho in rhos]
                if suite == "logits":
                    found += [Cell(suite, ", ".join(alike), dtype, 1.0, fill, "forward") for fill in fills]
            if "hidden" in suites:
                found += [
                    Cell("hidden", model, dtype, rho, f) for f in fills if model != "wide" or f == 1.0 for rho in rhos
                ]
                if model != "wide" and 1.0 in fills:
                    found += [Cell("hidden", model, dtype, rho, 1.0, "frozen head") for rho in rhos]
    found.sort(key=lambda cell: (cell.model != "small") if cell.first else 3 if cell.suite == "hidden" else 2)
    first = [Cell("token pass", None, "float32", rho, 1.0) for rho in rhos if "token pass" in suites]
    if "step" in suites:
        first += [Cell("step", str(LLAMA), "float32", 0.2, 0.5, kind) for kind in ("step", "beta 0.04")]
        first += [Cell("step", str(LLAMA), "float32", rho, 0.5, "LoRA") for rho in (0.2, 0.5, 1.0)]
    return first + found


def describe(cell: Cell) -> dict[str, Any]:
    """Return the part of a result that describes its cell, measured or not."""
    (B, T), (D, V) = cell.columns, cell.size
    return cell._asdict() | {"B": B, "T": T, "D": D, "V": V}


def _collect() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def forget() -> None:
    """Free the tensors that are cached from cell to cell."""
    forget_weight()
    logits.make_logits.cache_clear()
    _collect()


def _beyond_least(result: dict[str, Any]) -> float:
    """Seconds of the samples beyond the first LEAST."""
    entries = [entry for part in ("peers", "limits") for entry in result.get(part, {}).values()]
    return sum(sum(entry.get(n, [])[LEAST:]) for entry in entries for n in ("forward", "backward", "seconds"))


def run(
    wanted: list[Cell],
    budget: Budget,
    rounds: int,
    compiled: bool = True,
    done: Callable[[list[dict[str, Any]]], None] = lambda results: None,
) -> list[dict[str, Any]]:
    """Return a result for each cell, in order: `describe`, "status" and, if that is "measured", the measurements.

    rounds: largest number of samples per contender. compiled: whether torch.compile takes part. done: called after each
    cell with all results; cells that are still to come are "not measured".
    """
    spent = f"not measured: too little of the {budget.minutes:g} minutes was left"
    results = [describe(cell) | {"status": spent} for cell in wanted]
    took: dict[tuple, float] = {}  # least seconds for a cell of this kind
    held: tuple = ()
    for i, cell in enumerate(wanted):
        kind = (cell.suite, cell.model, cell.dtype, cell.kind)
        if budget.left <= took.get(kind, 0.0):
            continue
        if cell.model and (cell.size, cell.dtype) != held:
            forget()
            held = cell.size, cell.dtype
        shares = [SHARES[c.suite] for c in wanted[i:]]
        limit = budget.left * shares[0] / sum(shares)
        print(f"{cell}: {budget.left:.0f} s left, {limit:.1f} s for this", file=sys.stderr, flush=True)
        begin = time.monotonic()
        try:
            contest = SUITES[cell.suite].contest(cell, compiled)
            limit -= time.monotonic() - begin
            results[i] |= {"status": "measured"} | hold(contest, rounds, limit, budget.longest_step)
            del contest
        except Exception as error:
            traceback.print_exc()
            results[i]["status"] = failure(error)
            forget()
        _collect()
        seconds = time.monotonic() - begin
        results[i]["took_s"] = round(seconds, 2)
        least = seconds - _beyond_least(results[i])
        took[kind] = min(least, took.get(kind, least))
        done(results)
    forget()
    return results


def failures(results: list[dict[str, Any]]) -> list[str]:
    """List the cells that raised, and the contenders of rlloss that were wrong or raised."""
    bad = ("wrong", "failed")
    found = []
    for result in results:
        cell = Cell(*(result[name] for name in Cell._fields))
        if result["status"].startswith(bad):
            found.append(f"{cell}: {result['status']}")
        found += [
            f"{cell}: {name}: {entry['status']}"
            for name, entry in result.get("peers", {}).items()
            if is_ours(name) and entry["status"].startswith(bad)
        ]
    return found
