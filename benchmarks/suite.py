"""The suite: what is measured in which order, how much of the time each cell gets, and what no time is left for."""

import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks.contenders.hidden import explained
from benchmarks.contenders.hidden import peers as linear_peers
from benchmarks.contenders.hidden_case import Case, Shape, forget_weight, make_case, solve
from benchmarks.contenders.limits import bare_products
from benchmarks.contenders.logits import peers
from benchmarks.contenders.loss import loss_peers
from benchmarks.harness.readings import OURS
from benchmarks.harness.shapes import COLUMNS, FIRST_FILL, FIRST_RHOS, MODELS, lengths
from benchmarks.harness.timing import CUDA, DEVICE, LEAST, Budget, Start, phases
from benchmarks.suites import hidden, logits, loss, token_pass

# name: (its file, its share of the time against the others')
SUITES = {"token pass": ("logits", 1), "logits": ("logits", 2), "loss": ("logits", 2), "hidden": ("hidden", 8)}
BARE = {"bare 1 + 3r": True, "bare 1 + 2r": False}  # name: whether logits are made again
TRIALS = 2 if CUDA else 1  # of the bare products in tiles and whole, before the faster are timed


class Cell(NamedTuple):
    """model: of logits all models with this V, separated by ", "; of the token pass None. kind: "step" (forward and
    backward) or "forward" (without gradient, which no rho changes)."""

    suite: str
    model: str | None
    dtype: str
    rho: float
    fill: float
    kind: str = "step"

    @property
    def file(self) -> str:
        return SUITES[self.suite][0]

    @property
    def size(self) -> tuple[int, int]:
        """(D, V)."""
        assert self.model is not None
        return MODELS[self.model.split(", ")[0]]

    @property
    def first(self) -> bool:
        return self.fill == FIRST_FILL and (self.rho in FIRST_RHOS or self.kind == "forward")

    def __str__(self) -> str:
        model = f"{self.model}, " if self.model else ""
        rho = f", rho {self.rho:g}" if self.kind == "step" else ""
        return f"{self.suite}: {model}{self.dtype}, {self.kind}{rho}, fill {self.fill:g}"


class Options(NamedTuple):
    """columns: (B, T) by suite. rounds: the most samples of each contender. compiled: torch.compile takes part."""

    columns: dict[str, tuple[int, int]] = COLUMNS[DEVICE.type]
    rounds: int = 30
    compiled: bool = True


def cells(
    suites: Sequence[str], models: Sequence[str], dtypes: Sequence[str], rhos: Sequence[float], fills: Sequence[float]
) -> list[Cell]:
    """In the order in which they are measured: rho 0.2 and 1 at fill 1 first, then logits, then hidden states; of a
    model's cells those that share their tensors one after the other."""
    found = []
    for dtype in dtypes:
        for model in models:
            alike = [name for name in models if MODELS[name][1] == MODELS[model][1]]
            for suite in (s for s in suites if s != "token pass"):
                if SUITES[suite][0] == "logits" and model != alike[0]:
                    continue
                of = ", ".join(alike) if SUITES[suite][0] == "logits" else model
                found += [Cell(suite, of, dtype, rho, fill) for fill in fills for rho in rhos]
                if suite == "logits":
                    found += [Cell(suite, of, dtype, 1.0, fill, "forward") for fill in fills]
    found.sort(key=lambda cell: 0 if cell.first else 1 if cell.file == "logits" else 2)
    token_pass = [Cell("token pass", None, "float32", rho, 1.0) for rho in rhos if "token pass" in suites]
    return token_pass + found


def _fastest_bare(case: Case, again: bool) -> tuple[str, Start]:
    """("in tiles" or "whole", the bare products that way): the way that was faster when tried."""
    ways = {how: bare_products(case, again=again, tiled=how == "in tiles", fresh=True) for how in ("in tiles", "whole")}
    tried = {how: [sum(phases(start)) for _ in range(TRIALS)][-1] for how, start in ways.items()}
    taken = min(tried, key=lambda how: tried[how])
    return taken, ways[taken]


def measure_hidden(cell: Cell, options: Options, limit: float, longest_step: float) -> dict[str, Any]:
    begin = time.monotonic()
    (B, T), (D, V) = options.columns["hidden"], cell.size
    given = tuple(lengths(B, T, cell.fill))
    case = make_case(Shape(B, T, D, V), getattr(torch, cell.dtype), cell.rho, DEVICE, given)
    reference = solve(case)
    case = replace(case, cutoff=reference.cutoff)
    bare = {name: _fastest_bare(case, again) for name, again in BARE.items()}
    contenders = linear_peers(compiled=options.compiled)
    taken = f"{OURS} {explained('auto', case).plan}"
    found = hidden.contest(
        case, {cell.rho: reference}, [p for p in contenders if p.name != taken], {n: s for n, (_, s) in bare.items()},
        options.rounds, limit - (time.monotonic() - begin), strict=False, longest_step=longest_step,
    )  # fmt: skip
    same = {taken: {"status": f"is what {OURS} takes", "seconds": []}}
    found["peers"] = {p.name: (found["peers"] | same)[p.name] for p in contenders}
    for name, (taken, _) in bare.items():
        units = 1 + (3 if BARE[name] else 2) * case.live / case.counted
        found["bare"][name] |= {"status": "measured", "taken": taken, "units": units}
    return found


def measure_logits(cell: Cell, options: Options, limit: float, longest_step: float) -> dict[str, Any]:
    (B, T), (_, V) = options.columns["logits"], cell.size
    measure = logits.Measure(cell.kind, cell.fill, cell.rho)
    return logits.compare(
        B * T, V, getattr(torch, cell.dtype), measure, peers(compiled=options.compiled), options.rounds, limit,
        strict=False, longest_step=longest_step,
    )  # fmt: skip


def measure_loss(cell: Cell, options: Options, limit: float, longest_step: float) -> dict[str, Any]:
    return loss.compare(
        (*options.columns["loss"], cell.size[1]), getattr(torch, cell.dtype), cell.rho, cell.fill,
        loss_peers(compiled=options.compiled), options.rounds, limit, strict=False, longest_step=longest_step,
    )  # fmt: skip


def measure_token_pass(cell: Cell, options: Options, limit: float, longest_step: float) -> dict[str, Any]:
    return token_pass.compare(options.columns["token pass"], cell.rho, options.rounds, limit)


MEASURES: dict[str, Callable[[Cell, Options, float, float], dict[str, Any]]] = {
    "token pass": measure_token_pass,
    "logits": measure_logits,
    "loss": measure_loss,
    "hidden": measure_hidden,
}


def describe(cell: Cell, options: Options) -> dict[str, Any]:
    """What a result says of its cell, measured or not."""
    D, V = cell.size if cell.model else (None, None)
    D = D if cell.suite == "hidden" else None
    B, T = options.columns[cell.suite]
    return cell._asdict() | {"B": B, "T": T, "D": D, "V": V}


def _collect() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def forget() -> None:
    """Frees the tensors that are kept from cell to cell."""
    forget_weight()
    logits.make_logits.cache_clear()
    _collect()


def _compact(entry: dict[str, Any]) -> dict[str, Any]:
    """Without the sums of forward and backward, which anyone can add up; nanoseconds."""
    kept = {name: value for name, value in entry.items() if name != "seconds" or "forward" not in entry}
    return {
        name: [round(x, 9) for x in value] if name in ("forward", "backward", "seconds") else value
        for name, value in kept.items()
    }


def _beyond_least(result: dict[str, Any]) -> float:
    """Seconds of the samples without which the result would still have its LEAST."""
    entries = [entry for part in ("peers", "bare") for entry in result.get(part, {}).values()]
    return sum(sum(entry.get(n, [])[LEAST:]) for entry in entries for n in ("forward", "backward", "seconds"))


def run(
    wanted: list[Cell],
    options: Options,
    budget: Budget,
    done: Callable[[list[dict[str, Any]]], None] = lambda results: None,
) -> list[dict[str, Any]]:
    """A result for each cell, in their order: `describe`, "status" and, where that is "measured", what it found.

    done: is given all results after each cell, those that are still to come as not measured.
    """
    spent = f"not measured: too little of the {budget.minutes:g} minutes was left"
    results = [describe(cell, options) | {"status": spent} for cell in wanted]
    took: dict[tuple, float] = {}  # seconds that a cell of this kind takes at least
    held: tuple = ()
    for i, cell in enumerate(wanted):
        kind = (cell.suite, cell.model, cell.dtype, cell.kind)
        if budget.left <= took.get(kind, 0.0):
            continue
        if cell.model and (cell.size, cell.dtype) != held:
            forget()
            held = cell.size, cell.dtype
        shares = [SUITES[c.suite][1] for c in wanted[i:]]
        limit = budget.left * shares[0] / sum(shares)
        print(f"{cell}: {budget.left:.0f} s left, {limit:.1f} s for this", file=sys.stderr, flush=True)
        begin = time.monotonic()
        try:
            found = MEASURES[cell.suite](cell, options, limit, budget.longest_step)
            for part in ("peers", "bare"):
                found[part] = {name: _compact(entry) for name, entry in found.get(part, {}).items()}
            results[i] |= {"status": "measured"} | found
        except Exception as error:
            traceback.print_exc()
            results[i]["status"] = hidden.errors.failure(error)
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
    """Cells that raised, and contenders of rlloss that were wrong or raised."""
    bad = ("wrong", "failed")
    found = []
    for result in results:
        cell = Cell(*(result[name] for name in Cell._fields))
        if result["status"].startswith(bad):
            found.append(f"{cell}: {result['status']}")
        found += [
            f"{cell}: {name}: {entry['status']}"
            for name, entry in result.get("peers", {}).items()
            if name.startswith("rlloss") and entry["status"].startswith(bad)
        ]
    return found
