"""Write the report of a run from its JSON files: tables, targets, cases in which a peer is faster, plots.

python -m benchmarks.report.summary benchmarks/results/<device>
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness.conditions import sentence
from benchmarks.harness.readings import OURS, Result, is_ours, median, quartiles, share_of_copy
from benchmarks.harness.targets import judge, verdict
from benchmarks.report import plots
from rlloss.report import replace_file

SECTIONS = {
    "hidden": (
        "From hidden states to the gradients of hidden and weight",
        "Entropies included. The bare products of 1 + 3r units are the matrix products of `recompute`, those of 1 + 2r "
        "units those of the other plans, with a fresh gradient of the weight and nothing between them.",
    ),
    "step": (
        "An update step of a TRL trainer",
        "Loss and backward of one micro-batch, half of the groups without a signal; errors are against TRL. The last "
        "rows are parts of a step, and generation beside it.",
    ),
    "logits": (
        "From logits: log-probability, entropy and the gradient of the logits",
        "For a given gradient of the log-probabilities. After the dot: the bytes that have to be moved per second, as "
        "a share of what a copy of the logits reached in the same turns.",
    ),
    "loss": (
        "From logits: the whole loss",
        "`dapo` of an on-policy batch with the tokens of highest entropy. After the dot: as above.",
    ),
    "token pass": (
        "The token pass, from log-probabilities",
        "Loss and its gradient from log-probabilities, without a vocabulary.",
    ),
}  # suite: (title, explanation), in the order of the summary
LEAST_MEMORY = 0.01  # share of a peak; smaller differences are ignored
WITHIN = ", within the spread"


def file_of(folder: Path, suite: str) -> Path:
    return folder / f"{suite.replace(' ', '_')}.json"


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Return {suite: the content that `run.py` wrote} for the suites that have a file."""
    paths = {suite: file_of(folder, suite) for suite in SECTIONS}
    return {suite: json.loads(path.read_text(encoding="utf-8")) for suite, path in paths.items() if path.exists()}


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def memory(count: float) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def _time(entry: dict[str, Any]) -> str:
    """Write `median [quartiles] (forward + backward)` in ms."""
    both, spread = median(entry), quartiles(entry)
    if both is None:
        return entry.get("status", "not measured")
    text = milliseconds(both)
    if spread:
        text += f" [{milliseconds(spread[0])}, {milliseconds(spread[1])}]"
    parts = [median(entry, what) for what in ("forward", "backward")]
    if parts[0] is not None and parts[1] is not None:
        text += f" ({milliseconds(parts[0])} + {milliseconds(parts[1])})"
    return text


def _header(first: str, columns: Iterable[str]) -> list[str]:
    columns = list(columns)
    return [f"| {first} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]


def _label(result: Result) -> str:
    if result["suite"] == "step" and result["kind"] != "LoRA":
        return "beta 0" if result["kind"] == "step" else result["kind"]
    rho = f"rho {result['rho']:g}"
    return {"forward": "forward without gradient", "step": rho}.get(result["kind"], f"{result['kind']}, {rho}")


def _groups(results: list[Result]) -> dict[tuple, list[Result]]:
    """Group by suite, model, dtype and fill, in order. In each group the forward is first, then the order is by rho."""
    found: dict[tuple, list[Result]] = {}
    for result in results:
        found.setdefault((result["suite"], result["model"], result["dtype"], result["fill"]), []).append(result)
    models = list(dict.fromkeys(name for result in results for name in (result["model"] or "").split(", ")))
    order = sorted(
        found,
        key=lambda key: (list(SECTIONS).index(key[0]), key[2], models.index((key[1] or "").split(", ")[0]), -key[3]),
    )
    kinds = ["forward", "step"]  # others follow
    return {
        key: sorted(found[key], key=lambda r: (kinds.index(r["kind"]) if r["kind"] in kinds else 2, r["rho"]))
        for key in order
    }


def _heading(group: list[Result]) -> str:
    """Return a heading with the model, its sizes and the number of tokens."""
    measured = [r for r in group if r["status"] == "measured"]
    first = measured[0]
    notes = [f"{first['B']} x {first['T']} columns"]
    notes += [
        f"{first[name]} of them {word}"
        for name, word in {"counted": "count", "with_signal": "with a signal"}.items()
        if name in first
    ]
    rates = [c["bytes"] / x / 1e9 for r in measured if (c := r["limits"].get("copy")) and (x := median(c))]
    if rates:
        notes.append(f"logits copied at {min(rates):.3g} to {max(rates):.3g} GB/s")
    sizes = [f"{name} {first[name]}" for name in ("D", "V") if first[name]]
    model = f"{first['model']} ({', '.join(sizes)}), " if first["model"] else ""
    return f"**{model}{first['dtype']}, fill {first['fill']:g}** ({', '.join(notes)})"


def _table(group: list[Result]) -> list[str]:
    """Make the table of one model, dtype and fill: one row per contender, one column per rho, then peak memory."""
    measured = [r for r in group if r["status"] == "measured"]
    of_memory = [r for r in group if r["kind"] != "forward" and r["suite"] != "token pass"]
    names = list(dict.fromkeys(name for part in ("peers", "limits") for r in measured for name in r[part]))
    lines = ["", _heading(group), ""]
    lines += _header("ms", [*map(_label, group), *(f"memory, {_label(r)}" for r in of_memory), "largest error"])
    for name in names:
        entries = [(r.get("peers", {}) | r.get("limits", {})).get(name, {}) for r in group]
        times = []
        for result, entry in zip(group, entries, strict=True):
            share = share_of_copy(result, name)
            times.append(_time(entry) + (f" · {share:.0%}" if share is not None else ""))
        peaks = [
            memory(entry["peak_bytes"]) if median(entry) and "peak_bytes" in entry else ""
            for result, entry in zip(group, entries, strict=True)
            if result in of_memory
        ]
        same = len(set(times)) == 1 and not times[0][:1].isdigit()
        cells = [times[0], *("" for _ in times[1:])] if same else times
        errors = [e for entry in entries for e in entry.get("errors", {}).values()]
        lines.append(f"| {name} | " + " | ".join([*cells, *peaks, f"{max(errors):.0e}" if errors else ""]) + " |")
    plans = {_label(r): r["peers"].get(OURS, {}).get("plan_name") for r in measured}
    if any(plans.values()):
        lines += ["", "Plan of rlloss: " + ", ".join(f"{plan} at {rho}" for rho, plan in plans.items() if plan) + "."]
    return lines


def _targets(results: list[Result], device: str) -> list[str]:
    judged = judge(results, device)
    lines = ["", "## Targets", ""]
    if not judged:
        return [*lines, "None is for what was measured on this device."]
    # For logits one result stands for all models with the same vocabulary.
    columns = list(dict.fromkeys((name, j["dtype"]) for j in judged if j["model"] for name in j["model"].split(", ")))
    lines += _header(f"at fill {judged[0]['fill']:g}", ["target", *(f"{model}, {dtype}" for model, dtype in columns)])
    for what, bound in dict.fromkeys((j["what"], j["bound"]) for j in judged):
        own = [j for j in judged if j["what"] == what]
        of = {(name, j["dtype"]): verdict(j) for j in own for name in (j["model"] or "").split(", ")}
        lone = next((verdict(j) for j in own if j["model"] is None), None)
        cells = [lone] + [""] * (len(columns) - 1) if lone else [of.get(c, "") for c in columns]
        lines.append(f"| {what} | {bound} | " + " | ".join(cells) + " |")
    return lines


def losses(results: list[Result]) -> list[str]:
    """List the cases in which a peer has a smaller median time than rlloss (forward and backward, or a forward without
    gradient), or a peak memory that is smaller by more than 1 %."""
    found = []
    for result in (r for r in results if r["status"] == "measured"):
        ours = result["peers"].get(OURS, {})
        own, spread = median(ours), quartiles(ours)
        if own is None:
            continue
        model = f"{result['model']}, " if result["model"] else ""
        where = f"{result['suite']}, {model}{result['dtype']}, {_label(result)}, fill {result['fill']:g}"
        for name, entry in result["peers"].items():
            theirs, of = median(entry), quartiles(entry)
            if is_ours(name) or theirs is None:
                continue
            if theirs < own:
                close = WITHIN if spread and of and of[1] >= spread[0] else ""
                found.append(
                    f"{where}: {name} takes {milliseconds(theirs)} ms, rlloss {milliseconds(own)} "
                    f"({own / theirs:.2f} times as long{close})"
                )
            held, own_held = (e.get("peak_bytes", 0) for e in (entry, ours))
            if held < (1 - LEAST_MEMORY) * own_held:
                found.append(f"{where}: {name} holds {memory(held)}, rlloss {memory(own_held)}")
    return found


def _missing(results: list[Result]) -> list[str]:
    """List the cells without a number, grouped by reason, suite, model and dtype."""
    found: dict[tuple, list[str]] = {}
    for result in (r for r in results if r["status"] != "measured"):
        key = (result["status"], result["suite"], result["model"], result["dtype"])
        found.setdefault(key, []).append(f"{_label(result)} at fill {result['fill']:g}")
    return [
        f"- {suite}{f', {model}' if model else ''}, {dtype}: {'; '.join(cells)}: {status}"
        for (status, suite, model, dtype), cells in found.items()
    ]


def _circumstances(where: dict[str, Any]) -> str:
    note = f" **{where['note']}**" if where.get("note") else ""
    return f"{sentence(where)} Tests before: {where['tests']['summary']} (`{where['tests']['command']}`).{note}"


def summary(reports: dict[str, dict[str, Any]], drawn: list[tuple[str, str]]) -> str:
    """Return the text of summary.md. drawn: file name and caption of each plot."""
    results = [result for report in reports.values() for result in report["results"]]
    where = next(iter(reports.values()))["conditions"]
    lines = [f"# Benchmarks on {where['device']}", ""]
    lines += list(dict.fromkeys(_circumstances(report["conditions"]) for report in reports.values()))
    lines += [
        "",
        "Each contender was first checked against fp64; one that is wrong has no number. They take turns. Cells are "
        "the median [lower, upper quartile] of their samples in milliseconds, then (forward with gradient + backward). "
        "rho: the share of the tokens that count that get a gradient; fill: the share of the columns that count. "
        "Memory: the peak above the inputs, gradients included. Errors: of the loss, entropies, log-probabilities and "
        "gradients, relative but for those of single tokens. All samples are in the JSON files next to this one.",
    ]
    lines += _targets(results, where["device"])
    lines += ["", "## Where a peer is faster, or takes less memory by more than 1 %", ""]
    lines += [f"- {line}" for line in losses(results)] or ["Nowhere, of what was measured."]
    lines += [line for name, caption in drawn for line in ("", f"![{name}]({name})", "", f"*{caption}*")]
    groups = _groups(results)
    for suite, (title, explanation) in SECTIONS.items():
        of_suite = [group for key, group in groups.items() if key[0] == suite]
        if not of_suite:
            continue
        lines += ["", f"## {title}", "", explanation]
        for group in of_suite:
            if any(r["status"] == "measured" for r in group):
                lines += _table(group)
        lines += ["", *(f"- {name}: {note}." for name, note in reports[suite]["notes"].items())]
    missing = _missing(results)
    lines += ["", "## Not measured", "", *(missing or ["Nothing of what was asked for."])]
    return "\n".join(lines) + "\n"


def write(folder: Path) -> Path:
    """Write summary.md and the plots next to the JSON files of a run.

    Raises:
        FileNotFoundError: there are no JSON files.
        ModuleNotFoundError: matplotlib is missing.
    """
    reports = load(folder)
    if not reports:
        raise FileNotFoundError(
            f"{folder}: found none of {', '.join(file_of(Path(), suite).name for suite in SECTIONS)}"
        )
    where = next(iter(reports.values()))["conditions"]
    drawn = plots.draw([result for report in reports.values() for result in report["results"]], where, folder)
    path = folder / "summary.md"
    replace_file(path, summary(reports, drawn))
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make summary.md and the plots of a run from its JSON files.")
    parser.add_argument("folder", type=Path, help="benchmarks/results/<device>")
    print(write(parser.parse_args(arguments).folder))


if __name__ == "__main__":
    main()
