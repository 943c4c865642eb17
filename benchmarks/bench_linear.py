"""Time and memory from hidden states to the gradient of the loss: `rlloss.LinearGRPOLoss` against its peers, each first
checked against fp64.

Under pytest (`make bench`) pytest-benchmark times one contender after the other. As a program,

    python benchmarks/bench_linear.py [--rounds 9] [--scaling]

the contenders take turns; it prints Markdown tables and writes them with all samples to
benchmarks/results/<device>/linear.{md,json}, or files of another --name. --scaling adds how time and memory grow with
each size.
"""

import argparse
import functools
import gc
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).parent)]  # in a checkout

import linear_scaling  # noqa: E402
from bench_token_stats import CUDA, DEVICE, ROOT, conditions, peak_bytes, refuse_interpreter, seconds  # noqa: E402
from linear_peers import (  # noqa: E402
    Case,
    Peer,
    Reference,
    Shape,
    bare_products,
    explained,
    make_case,
    peers,
    products,
    solve,
)

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


def _relative(found: Tensor, expected: Tensor) -> float:
    """Of the whole; inf where what was found is not finite."""
    error = (found.double() - expected).norm() / expected.norm().clamp(min=torch.finfo(expected.dtype).tiny)
    return error.nan_to_num(nan=torch.inf).item()


def check(peer: Peer, case: Case, references: dict[float, Reference]) -> dict[str, float]:
    """The errors of loss, mean entropy and gradients.

    The loss of an on-policy batch says only which tokens are kept and what it is divided by; the gradients say more.
    The weight's rows of the targets stand apart: they are far larger than the others.

    Raises:
        ArithmeticError: an error above what rounding to the dtype explains, or a dead row of hidden that is not 0.
    """
    own = peer.case(case)
    expected, live, _ = references[own.rho]
    found = peer.step(own)
    if found.hidden.flatten(0, 1)[~live].ne(0).any():  # NaN is not 0 either
        raise ArithmeticError(f"{peer.name}: the gradient of a dead row is not 0")
    is_target = torch.zeros_like(expected.weight[:, 0], dtype=torch.bool)
    is_target[own.target.flatten()[live]] = True
    scale = own.advantage.abs().mean().double()
    errors = {
        "loss": ((found.loss.double() - expected.loss).abs() / scale).nan_to_num(nan=torch.inf).item(),
        "gradient of hidden": _relative(found.hidden, expected.hidden),
        "gradient of weight at targets": _relative(found.weight[is_target], expected.weight[is_target]),
        "gradient of weight elsewhere": _relative(found.weight[~is_target], expected.weight[~is_target]),
    }
    if found.entropy is not None:
        assert expected.entropy is not None
        errors["entropy"] = _relative(found.entropy, expected.entropy)
    rounding = 4 * torch.finfo(found.weight.dtype).eps
    for name, error in errors.items():
        allowed = 1e-5 + (0.0 if name == "loss" else rounding)
        if not error <= allowed:
            raise ArithmeticError(f"{peer.name}: {name} is off by {error:.2g}, allowed {allowed:.2g}")
    return errors


def examine(peer: Peer, case: Case, references: dict[float, Reference]) -> dict:
    """{"status"} and, of a peer that is there and right, "errors", "rho", "units", "plan" and "peak_bytes"."""
    if reason := peer.absent():
        return {"status": reason}
    try:
        errors = check(peer, case, references)
        own = peer.case(case)
        units = products(peer, own)
        gc.collect()
        entry = {"status": "measured", "errors": errors, "rho": own.rho, "units": units}
        entry["plan"] = None if peer.plan is None else explained(peer.plan, own)
        return entry | {"peak_bytes": peak_bytes(lambda: peer.step(own))}
    except (ArithmeticError, torch.OutOfMemoryError) as error:
        if peer.plan is not None:
            raise
        return {"status": f"wrong: {error}" if isinstance(error, ArithmeticError) else "out of memory"}


def in_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, after a turn to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            elapsed = seconds(runs[name])
            if turn:
                samples[name].append(elapsed)
    return samples


def compare(shape: Shape, dtype: torch.dtype, rho: float, contenders: list[Peer], rounds: int) -> dict:
    """Everyone in turns, and the bare products: {"peers": {name: see `examine`, "seconds"}, "bare": {name: ...}}.

    Of the bare products in tiles and whole those that are faster are taken.
    """
    case, references = solved(shape, dtype, rho)
    found = {peer.name: examine(peer, case, references) for peer in contenders}
    runs: dict[str, Callable[[], object]] = {}
    for peer in contenders:
        if found[peer.name]["status"] == "measured":
            runs[peer.name] = functools.partial(peer.step, peer.case(case))
    for name, (again, fresh) in BARE.items():
        for how in ("in tiles", "whole"):
            runs[f"{name}, {how}"] = bare_products(case, again=again, tiled=how == "in tiles", fresh=fresh)
    samples = in_turns(runs, rounds)
    for peer in contenders:
        found[peer.name]["seconds"] = samples.get(peer.name, [])
    bare = {}
    for name, (again, _) in BARE.items():
        ways = {how: samples[f"{name}, {how}"] for how in ("in tiles", "whole")}
        fastest = min(ways, key=lambda how: statistics.median(ways[how]))
        bare[name] = {"status": "measured", "seconds": ways[fastest], "taken": fastest, "all": ways}
        bare[name]["units"] = 1 + (3 if again else 2) * case.live / case.counted
    return {
        "shape": shape._asdict(),
        "dtype": str(dtype)[6:],
        "rho": rho,
        "counted": case.counted,
        "live": case.live,
        "unit_flop": case.unit,
        "peers": found,
        "bare": bare,
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
    errors = ", ".join(f"{error:.0e}" for error in entry.get("errors", {}).values())
    how = f", {entry['taken']}" if "taken" in entry else ""
    return (
        f"| {name}{how} | {1e3 * median:.4g} [{1e3 * low:.4g}, {1e3 * high:.4g}]{other} | {memory} | "
        f"{entry['units']:.2f} | {errors} |"
    )


def markdown(report: dict, contenders: list[Peer]) -> str:
    where = report["conditions"]
    load = f" Load average before: {where['load'][0]}, after: {where['load_after'][0]}." if where["load"] else ""
    lines = [
        f"{where['device']}, {where['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
        + f"; commit {where['commit']}, {where['date']}; {where['rounds']} rounds in turns.{load}",
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
    if "scaling" in report:
        lines += ["", *linear_scaling.markdown(report["scaling"])]
    return "\n".join([*lines, "", *(f"- {peer.name}: {peer.note}." for peer in contenders)]) + "\n"


CASES = [(shape, dtype, rho) for shape in SHAPES for dtype in DTYPES for rho in RHOS]


@pytest.mark.parametrize("peer", peers(), ids=lambda p: p.name)
@pytest.mark.parametrize("shape, dtype, rho", CASES, ids=[f"{tuple(s)}-{str(d)[6:]}-rho {rho}" for s, d, rho in CASES])
def test_linear(benchmark, shape, dtype, rho, peer):
    refuse_interpreter()
    benchmark.group = f"{shape}, {str(dtype)[6:]}, rho {rho}"
    case, references = solved(shape, dtype, rho)
    entry = examine(peer, case, references)
    if entry["status"] != "measured":
        pytest.skip(f"{peer.name}: {entry['status']}")
    benchmark.extra_info.update(entry["errors"] | {"peak_bytes": entry["peak_bytes"], "units": entry["units"]})
    own = peer.case(case)

    def synchronised():
        peer.step(own)
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=20 if CUDA else 5, warmup_rounds=1)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="Time rlloss.LinearGRPOLoss against its peers, in turns.")
    parser.add_argument("--rounds", type=int, default=20 if CUDA else 9, help="samples of each (default %(default)s)")
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=("B", "T", "D", "V"))
    parser.add_argument("--dtypes", nargs="+", choices=[str(d)[6:] for d in DTYPES])
    parser.add_argument("--rho", type=float, nargs="+", default=list(RHOS))
    parser.add_argument("--scaling", action="store_true", help="how time and memory grow with N, V, D and r, too")
    parser.add_argument("--scaling-base", type=int, nargs=3, metavar=("N", "V", "D"), default=linear_scaling.BASE)
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
    if options.scaling:
        print("scaling", file=sys.stderr, flush=True)
        report["scaling"] = linear_scaling.measure(tuple(options.scaling_base), options.rounds)
    report["conditions"]["load_after"] = conditions(options.rounds)["load"]
    folder = options.out / report["conditions"]["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{options.name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = markdown(report, contenders)
    (folder / f"{options.name}.md").write_text(text, encoding="utf-8")
    print(text)
    return report


if __name__ == "__main__":
    main()
