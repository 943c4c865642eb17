"""Time and memory from hidden states to the gradient of the loss: `rlloss.LinearGRPOLoss` against its peers, each first
checked against fp64.

Under pytest (`make bench-pytest`) pytest-benchmark times one contender after the other. As a program,

    python -m benchmarks.suites.hidden [--rounds 9]

the contenders take turns; it prints Markdown tables and writes them with all samples to
benchmarks/results/<device>/linear.{md,json}, or files of another --name.
"""

import argparse
import functools
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.contenders.hidden import Peer, explained, peers, products
from benchmarks.contenders.hidden_case import Case, Reference, Result, Shape, make_case, solve
from benchmarks.contenders.limits import bare_products
from benchmarks.harness import errors
from benchmarks.harness.conditions import ROOT, conditions, sentence
from benchmarks.harness.examine import examined, under_pytest
from benchmarks.harness.timing import CUDA, DEVICE, Start, in_turns, phases, refuse_interpreter, split, warm, with_peak
from rlloss.report import replace_file

SHAPE_A = Shape(8, 128, 896, 32768)
SHAPES = [SHAPE_A, Shape(8, 1024, 2048, 151936), Shape(16, 512, 4096, 128256)] if CUDA else [SHAPE_A]
DTYPES = (torch.float32, torch.bfloat16)
RHOS = (0.2, 1.0)
OURS = "rlloss"


# {name: whether logits are made again, whether the weight's gradient is fresh memory}
BARE = {"bare 1 + 3r": (True, False), "bare 1 + 3r, fresh": (True, True), "bare 1 + 2r": (False, False)}


class Target(NamedTuple):
    """The quotient of two medians (or peaks) that is at most `limit`. what: "seconds" or "peak_bytes"."""

    dtype: str
    rho: float
    what: str
    limit: float
    of: str
    ours: str = OURS


TARGETS = [
    Target("float32", 0.2, "seconds", 1 / 5, "TRL"),
    Target("float32", 0.2, "seconds", 1 / 2.7, "naive"),
    Target("float32", 0.2, "peak_bytes", 0.32, "naive"),
    Target("float32", 1.0, "seconds", 1 / 2.8, "TRL"),
    Target("float32", 1.0, "seconds", 1 / 1.3, "naive"),
    Target("float32", 1.0, "peak_bytes", 0.75, "Liger"),
    Target("bfloat16", 0.2, "seconds", 1 / 4.5, "TRL"),
    Target("bfloat16", 0.2, "seconds", 1 / 1.8, "naive"),
    Target("bfloat16", 0.2, "peak_bytes", 0.32, "naive"),
    Target("float32", 0.2, "seconds", 1.2, "bare 1 + 3r", "rlloss recompute"),
    Target("float32", 1.0, "seconds", 1.2, "bare 1 + 3r", "rlloss recompute"),
    Target("float32", 0.2, "seconds", 1.2, "bare 1 + 3r, fresh", "rlloss recompute"),
    Target("float32", 1.0, "seconds", 1.2, "bare 1 + 3r, fresh", "rlloss recompute"),
]


@functools.lru_cache(maxsize=1)
def solved(shape: Shape, dtype: torch.dtype, rho: float) -> tuple[Case, dict[float, Reference]]:
    """The case and its references: with rho, and with every token kept for those who cannot select."""
    case = make_case(shape, dtype, rho, DEVICE)
    found = {rho: solve(case)}
    found.setdefault(1.0, solve(replace(case, rho=1.0)))
    return replace(case, cutoff=found[rho].cutoff), found


def check(name: str, own: Case, found: Result, reference: Reference) -> dict[str, float]:
    """The errors of loss, mean entropy and gradients of a step of the contender `name` on its `own` case.

    The loss of an on-policy batch says only which tokens are kept and what it is divided by; the gradients say more.
    The weight's rows of the targets stand apart: they are far larger than the others.

    Raises:
        ArithmeticError: an error above what rounding to the dtype explains, or a dead row of hidden that is not 0.
    """
    expected, rows, live, _ = reference
    if found.hidden.flatten(0, 1)[~live].ne(0).any():  # NaN is not 0 either
        raise ArithmeticError(f"{name}: the gradient of a dead row is not 0")
    if not found.weight.sum(dtype=torch.float32).isfinite():
        raise ArithmeticError(f"{name}: the gradient of the weight is not finite")
    is_target = torch.isin(rows, own.target.flatten()[live])
    scale = own.advantage.abs().mean().double()
    weight = found.weight[rows]
    of = {
        "loss": ((found.loss.double() - expected.loss).abs() / scale).nan_to_num(nan=torch.inf).item(),
        "gradient of hidden": errors.relative(found.hidden, expected.hidden),
        "gradient of weight at targets": errors.relative(weight[is_target], expected.weight[is_target]),
        "gradient of weight elsewhere": errors.relative(weight[~is_target], expected.weight[~is_target]),
    }
    if found.entropy is not None:
        assert expected.entropy is not None
        of["entropy"] = errors.relative(found.entropy, expected.entropy)
    allowed = dict.fromkeys(of, errors.allowed(len(found.weight), found.weight.dtype))
    errors.require(name, of, allowed | {"loss": 1e-5})
    return of


def examine(
    peer: Peer,
    case: Case,
    references: dict[float, Reference],
    *,
    strict: bool = True,
    longest_step: float = math.inf,
) -> dict:
    """{"status"} and, of a peer that is there and right, "errors", "rho", "units", "plan" and "peak_bytes".

    strict: rlloss being wrong raises, and so does every error but those of arithmetic and of memory. longest_step:
    seconds above which a peer is not timed.
    """
    if reason := peer.absent():
        return {"status": reason}
    own = peer.case(case)
    if own.rho not in references:
        return {"status": f"keeps every token: at rho {own.rho:g} only"}

    def find() -> dict:
        begin = time.monotonic()
        (found, units), peak = with_peak(lambda: products(peer, own))
        took = time.monotonic() - begin
        of = check(peer.name, own, found, references[own.rho])
        del found
        if CUDA or peer.compiled:
            peer.step(own)  # what compiles and tunes kernels, and the counter of products, take memory of their own
            gc.collect()
            begin = time.monotonic()
            _, peak = with_peak(lambda: peer.step(own))
            took = time.monotonic() - begin
        if took > longest_step and peer.plan is None:
            return {"status": f"not measured: a step takes {took:.2g} s"}
        entry = {"errors": of, "rho": own.rho, "units": units, "peak_bytes": peak}
        plan = None if peer.plan is None else explained(peer.plan, own)
        return entry | ({} if plan is None else {"plan": str(plan), "plan_name": plan.plan})

    return examined(find, ours=peer.plan is not None, strict=strict)


def compare(shape: Shape, dtype: torch.dtype, rho: float, contenders: list[Peer], rounds: int) -> dict:
    """Everyone in turns, and the bare products: see `contest`. Of the bare products in tiles and whole those that are
    faster are taken."""
    case, references = solved(shape, dtype, rho)
    bare = {
        f"{name}, {how}": bare_products(case, again=again, tiled=how == "in tiles", fresh=fresh)
        for name, (again, fresh) in BARE.items()
        for how in ("in tiles", "whole")
    }
    found = contest(case, references, contenders, bare, rounds)
    timed = found.pop("bare")
    found["bare"] = {}
    for name, (again, _) in BARE.items():
        ways = {how: timed[f"{name}, {how}"]["seconds"] for how in ("in tiles", "whole")}
        taken = min(ways, key=lambda how: statistics.median(ways[how]))
        found["bare"][name] = {"status": "measured", **timed[f"{name}, {taken}"], "taken": taken, "all": ways}
        found["bare"][name]["units"] = 1 + (3 if again else 2) * case.live / case.counted
    return {"shape": shape._asdict(), "dtype": str(dtype)[6:], "rho": rho, **found}


def contest(
    case: Case,
    references: dict[float, Reference],
    contenders: list[Peer],
    bare: Mapping[str, Start],
    rounds: int,
    limit: float = math.inf,
    **how,
) -> dict:
    """Everyone in turns: {"counted", "live", "unit_flop", "peers": {name: see `examine`, "forward", "backward",
    "seconds"}, "bare": {name: those three}}. limit: seconds that it may take. how: see `examine`."""
    begin = time.monotonic()
    found = {peer.name: examine(peer, case, references, **how) | {"seconds": []} for peer in contenders}
    clocks = {
        peer.name: functools.partial(phases, functools.partial(peer.start, peer.case(case)))
        for peer in contenders
        if found[peer.name]["status"] == "measured"
    }
    clocks |= {name: functools.partial(phases, start) for name, start in bare.items()}
    samples = in_turns(clocks, rounds, limit - (time.monotonic() - begin), warm=warm(limit))
    for peer in contenders:
        if peer.name in samples:
            found[peer.name] |= split(samples[peer.name])
    return {
        "counted": case.counted,
        "live": case.live,
        "unit_flop": case.unit,
        "peers": found,
        "bare": {name: split(samples[name]) for name in bare},
    }


def judge(results: list[dict]) -> list[dict]:
    """The targets of the shape that they are for: each with "found", None where one side has no number, and "met"."""
    judged = []
    for target in TARGETS:
        for result in results:
            if (result["dtype"], result["rho"], result["shape"]) != (target.dtype, target.rho, SHAPE_A._asdict()):
                continue
            sides = [(result["peers"] | result["bare"]).get(name, {}) for name in (target.ours, target.of)]
            values = [side.get(target.what) or None for side in sides]
            found = None
            if values[0] and values[1]:
                ours, theirs = (float(statistics.median(v) if isinstance(v, list) else v) for v in values if v)
                found = ours / theirs
            judged.append(target._asdict() | {"found": found, "met": None if found is None else found <= target.limit})
    return judged


def _quotient(value: float | None, what: str) -> str:
    if value is None:
        return "no number"
    return f"1/{1 / value:.3g}" if what == "seconds" and value < 0.9 else f"{value:.3g}"


def _judged_lines(judged: list[dict]) -> list[str]:
    lines = ["| | | found | at most | |", "|---|---|---|---|---|"]
    for j in judged:
        what = "time" if j["what"] == "seconds" else "peak memory"
        of = j["of"]
        if of in BARE:
            into = "into a fresh gradient" if BARE[of][1] else "into places that were there before"
            of = f"the bare products of 1 + {3 if BARE[of][0] else 2}r units, {into}"
        verdict = {None: "not measured", True: "met", False: "missed"}[j["met"]]
        found, limit = (_quotient(j[name], j["what"]) for name in ("found", "limit"))
        lines.append(
            f"| {j['dtype']}, rho {j['rho']:g} | {what} of {j['ours']} / {of} | {found} | {limit} | {verdict} |"
        )
    return lines


def _row(name: str, entry: dict, rho: float) -> str:
    if entry["status"] != "measured":
        return f"| {name} | {entry['status']} | | | |"
    low, median, high = statistics.quantiles(entry["seconds"], n=4, method="inclusive")
    other = f" (rho {entry['rho']:g})" if entry.get("rho", rho) != rho else ""
    memory = f"{entry['peak_bytes'] / 2**20:.1f} MiB" if "peak_bytes" in entry else ""
    off = ", ".join(f"{error:.0e}" for error in entry.get("errors", {}).values())
    how = f", {entry['taken']}" if "taken" in entry else ""
    units = "" if entry["units"] is None else f"{entry['units']:.2f}"
    return (
        f"| {name}{how} | {1e3 * median:.4g} [{1e3 * low:.4g}, {1e3 * high:.4g}]{other} | {memory} | {units} | {off} |"
    )


def markdown(report: dict, contenders: list[Peer]) -> str:
    where = report["conditions"]
    lines = [
        sentence(where),
        "",
        "From hidden states to the gradients of hidden and weight, entropies included. Products: matrix products that "
        "ran, in logits of all rows that count. Errors against fp64: loss, gradient of hidden, of weight at the "
        "targets and elsewhere, entropy; relative. Memory: the peak above the inputs, gradients included.",
    ]
    if report["targets"]:
        lines += ["", *_judged_lines(report["targets"])]
    for result in report["results"]:
        shape = Shape(**result["shape"])
        lines += [
            "",
            f"**{shape}, {result['dtype']}, rho {result['rho']:g}** ({result['counted']} rows count, {result['live']} "
            "of them live)",
            "",
            "| | median ms [quartiles] | peak memory | products | errors |",
            "|---|---|---|---|---|",
        ]
        entries = result["peers"] | result["bare"]
        lines += [_row(name, entry, result["rho"]) for name, entry in entries.items()]
        lines += ["", f"Plan of {OURS}: {result['peers'][OURS]['plan']}"]
    return "\n".join([*lines, "", *(f"- {peer.name}: {peer.note}." for peer in contenders)]) + "\n"


CASES = [(shape, dtype, rho) for shape in SHAPES for dtype in DTYPES for rho in RHOS]


@pytest.mark.parametrize("peer", peers(), ids=lambda p: p.name)
@pytest.mark.parametrize("shape, dtype, rho", CASES, ids=[f"{tuple(s)}-{str(d)[6:]}-rho {rho}" for s, d, rho in CASES])
def test_linear(benchmark, shape, dtype, rho, peer):
    case, references = solved(shape, dtype, rho)
    entry = shape._asdict() | {"dtype": str(dtype)[6:]} | examine(peer, case, references)
    own, group = peer.case(case), f"{shape}, {str(dtype)[6:]}, rho {rho}"
    under_pytest(benchmark, group, entry, lambda: peer.step(own), rounds=20 if CUDA else 5)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="Time rlloss.LinearGRPOLoss against its peers, in turns.")
    parser.add_argument("--rounds", type=int, default=20 if CUDA else 9, help="samples of each (default %(default)s)")
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=("B", "T", "D", "V"))
    parser.add_argument("--dtypes", nargs="+", choices=[str(d)[6:] for d in DTYPES])
    parser.add_argument("--rho", type=float, nargs="+", default=list(RHOS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--name", default="linear", help="of the files written (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds: found {options.rounds}, expected at least 2")
    refuse_interpreter()
    contenders = peers()
    shapes = [Shape(*s) for s in options.shape] if options.shape else SHAPES
    report: dict = {"conditions": conditions(options.rounds), "results": []}
    for shape in shapes:
        for dtype in [d for d in DTYPES if options.dtypes is None or str(d)[6:] in options.dtypes]:
            for rho in options.rho:
                print(f"{shape}, {str(dtype)[6:]}, rho {rho:g}", file=sys.stderr, flush=True)
                report["results"].append(compare(shape, dtype, rho, contenders, options.rounds))
    report["targets"] = [] if CUDA else judge(report["results"])
    report["conditions"]["load_after"] = conditions(options.rounds)["load"]
    folder = options.out / report["conditions"]["slug"]
    replace_file(folder / f"{options.name}.json", json.dumps(report, indent=1) + "\n")
    text = markdown(report, contenders)
    replace_file(folder / f"{options.name}.md", text)
    print(text)
    return report


if __name__ == "__main__":
    main()
