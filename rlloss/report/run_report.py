"""Write a training run as one HTML page that opens offline: metrics, forking tokens, completions token by token::

    write_run_report("out")  # reads out/tokens/*.jsonl and out/metrics.jsonl, writes out/report.html

`rlloss.integrations.transformers.token_log` writes and describes the files. Every text comes from a model or a file. It
is shown as text and never read as HTML.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from array import array
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlloss.report import charts
from rlloss.report.charts import asset
from rlloss.report.findings import found_in
from rlloss.report.run_log import LIVE, MASKED, MISSING, SCALE, TOKEN_LOG, Completion, Counts, RunLog, count, read_run

EDGES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Entropies in nats between two colours. They are the same on every page, so that pages can be compared."""
TABLE_ROWS, MAX_POINTS, MAX_LINES, MAX_CHARTS = 100, 500, 6, 18

STATES = {
    # letter of rlloss.tokens.TokenState: its name, and its meaning
    "l": ("live", "has a gradient"),
    "p": ("penalised", "has a gradient, with the penalty of KL-Cov"),
    "c": ("clipped", "no gradient: its ratio is clipped, or a weight has become 0"),
    "v": ("selected", "no gradient: left out by Clip-Cov"),
    "o": ("off-policy", "no gradient: left out as off-policy"),
    "e": ("dropped", "no gradient: its entropy is below the cutoff"),
    "d": ("dead", "no gradient: advantage 0"),
    "m": ("masked", "does not count"),
}

KINDS = dict.fromkeys("evco", "faded") | dict.fromkeys("dm", "grey")
"""Style of a token without a gradient, faded if this step dropped it, grey if it could not have one at all."""

CHARTS = (
    # title, unit, metrics in the order of their lines
    ("Entropy", "nats per token", r"entropy(/mean)?", r"entropy/p\d+", r"entropy/cutoff"),
    ("Tokens that teach", "share of tokens", r"rlloss/live_share", r"(entropy/)?kept_share", r"(\w+/)?selected_share"),
    ("Clipped", "share of tokens", r"clip_ratio/(low|high|region)_mean", r"cispo_clip_ratio"),
    ("Covariance of log-probability and advantage", "", r"cov/logp_(prob_)?advantage"),
    ("Covariance by the accuracy of the group", "", r"cov/logp_advantage/.*"),
    ("Change of the entropy against the covariance", "over the run so far", r"cov/entropy_change_.*"),
    ("Sampling temperature", "", r"sampling/temperature/.*"),
    ("Rewards", "", r"reward", r"rewards/.*/mean"),
    ("Spread of the rewards", "standard deviation", r"reward_std", r"rewards/.*/std"),
    ("Groups without a signal", "share", r"rlloss/zero_advantage_share", r"frac_reward_zero_std", r".*zero_variance.*"),
    ("KL to the reference", "nats per token", r"kl"),
    ("Loss", "", r"loss", r"policy_loss"),
    ("Norm of the gradient", "", r"grad_norm"),
    ("Length of the completions", "tokens", r"completions/mean_length", r"completions/(min|max)_length"),
)


def write_run_report(
    run_dir: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    max_completions: int = 10_000,
    title: str | None = None,
    found: Sequence[str] | None = None,
    tables: Sequence[charts.Table] = (),
    paragraphs: Sequence[str] = (),
    command: str = "",
) -> Path:
    """Write the page of a run, or of several runs over one another, and return its path. Missing folders are made.

    A path that is no file, or a line that cannot be read (a killed run may leave one), is left out and named on the
    page. If the run was resumed, its earlier lines from that step on are left out.

    Args:
        run_dir: a folder with ``tokens/*.jsonl``, ``metrics.jsonl`` or ``trainer_state.json``, or a list of folders.
        output: path of the page; None: ``report.html`` in the first folder.
        max_completions: largest number of completions on the page. Of more, evenly spaced ones are shown, and the page
            says so. Counts are over all completions.
        title: title of the page; None: the names of the folders.
        found: sentences at the top; None: those of `rlloss.report.findings`.
        tables: tables after the plots.
        paragraphs, command: text at the end, what was run and how to repeat it.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such run.
        TypeError, ValueError: an argument does not fit, or nothing in the run can be read.
    """
    given: list[Any] = list(run_dir) if isinstance(run_dir, list | tuple) else [run_dir]
    for one in given:
        charts.of_type("run_dir", one, str | os.PathLike)
    charts.of_type("output", output, str | os.PathLike | None)
    charts.of_type("max_completions", max_completions, int)
    folders = [Path(one) for one in given]
    if max_completions < 1:
        raise ValueError(f"max_completions: found {max_completions}, expected at least 1")
    if not folders:
        raise ValueError("run_dir: found none, expected at least one folder of a run")
    runs: dict[str, RunLog] = {}
    for folder, name in zip(folders, _names(folders), strict=True):
        runs[name] = read_run(folder, next(iter(runs.values()), None))
    for number, run in enumerate(runs.values()):
        for completion in run.completions:
            completion.run = number
    path = folders[0] / "report.html" if output is None else Path(output)
    about = f"<section><h2>What was run</h2>{charts.prose(paragraphs, command)}</section>" if paragraphs else ""
    said = {name: found_in(run) for name, run in runs.items()} if found is None else {"": list(found)}
    top = "".join(charts.sentences(name if len(said) > 1 else "", of_run) for name, of_run in said.items())
    shown = "".join(charts.table_html(table) for table in tables)
    tabled = f"<section>{shown}</section>" if shown else ""
    name = title or " and ".join(runs)
    charts.replace_file(path, _page(runs, name, max_completions, top + _about(runs), tabled, about))
    return path


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the names of the folders, with their parents if two names are the same."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p[-1:])} ({n})" for n, p in enumerate(parts, 1)]


def _about(runs: dict[str, RunLog]) -> str:
    """Return HTML about the runs. For one run it has model, date, device, versions and, folded, the options that differ
    from TRL's defaults. For several runs it has the values in which they differ."""
    options = {name: _mapping(run.about.get("options")) for name, run in runs.items()}
    facts = {name: _facts(run) for name, run in runs.items()}
    if len(runs) > 1:
        rows = [
            [key, *(of[name].get(key, absent) for name in runs)]
            for of, absent in ((facts, "unknown"), (options, "as TRL"))
            for key in dict.fromkeys(key for known in of.values() for key in known)
            if len({of[name].get(key) for name in runs}) > 1
        ]
        return charts.table_html(charts.Table(["", *runs], rows, "Where the runs differ.")) if rows else ""
    (name,) = runs
    line = " · ".join(map(escape, facts[name].values()))
    table = charts.table_html(charts.Table(["option", "value"], list(map(list, options[name].items()))))
    summary = f"{len(options[name])} options differ from TRL's defaults"
    folded = f"<details><summary>{summary}</summary>{table}</details>" if options[name] else ""
    return (f'<p class="absent">{line}</p>' if line else "") + folded


def _facts(run: RunLog) -> dict[str, str]:
    versions = " ".join(f"{library} {version}" for library, version in _mapping(run.about.get("versions")).items())
    known = {key: str(run.about.get(key) or "") for key in ("model", "date", "device")} | {"versions": versions}
    return {key: fact for key, fact in known.items() if fact}


def _mapping(value: Any) -> dict[str, str]:
    return {str(key): str(of) for key, of in value.items()} if isinstance(value, dict) else {}


def _page(runs: dict[str, RunLog], name: str, max_completions: int, top: str, tables: str, about: str) -> str:
    whole = next(iter(runs.values()))
    if len(runs) > 1:
        completions = [c for run in runs.values() for c in run.completions]
        whole = RunLog(
            whole.texts, whole.prompts, completions, unreadable=[u for r in runs.values() for u in r.unreadable]
        )
    counts = count(whole, TABLE_ROWS)
    shown = whole.completions
    if len(shown) > max_completions:
        shown = [shown[i * len(shown) // max_completions] for i in range(max_completions)]
    figures, lines = _figures(runs)
    plot = [charts.LEFT, charts.WIDTH - charts.RIGHT]
    data = _embedded(whole, shown, counts) | {"lines": lines, "plot": plot, "runs": list(runs)}
    # Inside a script element only "<" could begin markup. Its escape is the same JSON. json.dumps writes ASCII only.
    inline = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    title = f"rlloss: {name}"
    notes = [
        f"Left out as not readable: {whole.left_out()}." if whole.unreadable else "",
        f"{len(shown):,} of {len(whole.completions):,} completions are on this page, evenly spaced; what is "
        "counted, is counted over all." if len(shown) < len(whole.completions) else "",
    ]  # fmt: skip
    absent = _absent("Completions", f"tokens/*.jsonl. {TOKEN_LOG}")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">"
        f"<title>{escape(title)}</title><style>{asset('charts.css')}{asset('page.css')}</style></head><body><main>"
        f'<h1>{escape(name)}</h1><p id="problem" role="alert" hidden></p>'
        f"{''.join(f'<p class=warn>{escape(note)}</p>' for note in notes if note)}{top}{_summary(runs, whole, counts)}"
        f"{figures}{tables}"
        f"{_completions(counts, len(runs) > 1) if shown else absent}{_forking(counts) if shown else ''}{about}"
        f'</main><div id="tip" role="tooltip" hidden></div><div id="point" role="tooltip" hidden></div>'
        f'<script type="application/json" id="data">{inline}</script>'
        f"<script>{asset('charts.js')}{asset('page.js')}</script></body></html>\n"
    )


def _embedded(run: RunLog, shown: list[Completion], counts: Counts) -> dict[str, Any]:
    """Return the data for the script.

    A completion is a list of step, prompt, advantage (or its mean, least and greatest), rewards, mean entropy, share
    live, tokens and entropies (base64 of little-endian integers), states, run.
    """
    rewards = sorted({name for completion in shown for name in completion.rewards})
    wide = len(run.texts) > 0xFFFF
    return {
        "texts": list(run.texts),
        "prompts": list(run.prompts),
        "rewards": rewards,
        "wide": wide,
        "scale": SCALE,
        "missing": MISSING,
        "edges": EDGES,
        "ranks": _ranks(counts),
        "states": STATES,
        "kinds": KINDS,
        "table": [[t, n, _rounded(mean), _rounded(live)] for t, n, mean, live in counts.rows],
        "completions": [
            [
                c.step, c.prompt, _advantage(c.advantage), [c.rewards.get(name) for name in rewards], *_means(c),
                _base64(c.tokens if wide else array("H", c.tokens)), _base64(c.entropy), c.state, c.run,
            ]
            for c in shown
        ],
    }  # fmt: skip


def _ranks(counts: Counts) -> list[float]:
    """Return the entropies in nats between two colours by rank. A tenth of the tokens lies between two of them."""
    return [counts.quantile(n / 10) or 0.0 for n in range(1, 10)]


def _base64(integers: array[int]) -> str:
    if sys.byteorder == "big":
        integers = array(integers.typecode, integers)
        integers.byteswap()
    return base64.b64encode(integers.tobytes()).decode("ascii")


def _means(completion: Completion) -> tuple[float | None, float | None]:
    """Return (mean entropy in nats, share live) of the tokens that count."""
    pairs = list(zip(completion.entropy, completion.state, strict=True))
    known = [quantum for quantum, letter in pairs if letter != MASKED and quantum != MISSING]
    counted = sum(letter != MASKED for letter in completion.state)
    live = sum(letter in LIVE for letter in completion.state)
    return _rounded(sum(known) / len(known) / SCALE if known else None), _rounded(live / counted if counted else None)


def _advantage(advantage: float | list[float] | None) -> float | list[float] | None:
    if not isinstance(advantage, list):
        return advantage
    return [sum(advantage) / len(advantage), min(advantage), max(advantage)] if advantage else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _figures(runs: dict[str, RunLog]) -> tuple[str, list[Any]]:
    """Return the charts in HTML, and their lines for the pointer, [[name, steps, values], ...] per chart."""
    names = {name for run in runs.values() for name in run.metrics}
    if not names:
        return _absent("Metrics", "metrics.jsonl"), []
    html, second, lines = [], [], []
    for title, unit, *patterns in CHARTS:
        own = [name for pattern in patterns for name in sorted(names) if re.fullmatch(pattern, name)]
        names -= set(own)
        if len(runs) > 1:
            of_kind = [_figure({run: (r, name) for run, r in runs.items()}, name, unit, lines) for name in own]
            html, second = html + of_kind[:1], second + of_kind[1:]  # one chart of each kind comes first
            continue
        (run,) = runs.values()
        for start in range(0, len(own), MAX_LINES):
            html.append(_figure({name: (run, name) for name in own[start : start + MAX_LINES]}, title, unit, lines))
    only = next(iter(runs.values()))
    more = [
        _figure({run: (r, name) for run, r in runs.items()} if len(runs) > 1 else {name: (only, name)}, name, "", lines)
        for name in sorted(names)
    ]
    html, more = (html + second)[:MAX_CHARTS], (html + second)[MAX_CHARTS:] + more
    rest = (
        f"<details><summary>{len(more)} more metrics</summary><div class=charts>{''.join(more)}</div></details>"
        if more
        else ""
    )
    explain = (
        "<p class=absent>Thin: as logged. Bold: a centred mean. A gap: not a finite number. Dashed: a finding. A click "
        "shows the completions of that step.</p>"
    )
    body = f"{explain}<div class=charts>{''.join(html)}</div>{rest}"
    return f'<section id="metrics"><h2>Metrics</h2>{body}</section>', lines


def _figure(series: dict[str, tuple[RunLog, str]], title: str, unit: str, lines: list[Any]) -> str:
    """Return one chart in HTML and append its lines. series maps a label to a run and the name of a metric."""
    arms, marks = [], {}
    for label, (run, name) in series.items():
        steps, values = _thinned(sorted(run.metrics.get(name, {}).items()))
        arms.append(charts.Arm(label, steps, {"": values}))
        of = f"{label}: " if label != name else ""
        marks |= {(step, of + message): None for step, _, message in run.findings}
    labels = list(series)
    band = None
    if "entropy/p50" in labels and "entropy/p95" in labels:
        band = labels.index("entropy/p50"), labels.index("entropy/p95")
    if len(labels) == 1 and labels[0].lower() != title.lower() and list(series.values())[0][1] != title:
        unit = ", ".join(filter(None, (unit, labels[0])))
    figure = charts.chart(
        arms, charts.Panel("", title, unit), len(lines), marks=list(marks), band=band, keys=len(arms) > 1
    )
    lines.append([[arm.name, arm.steps, [_significant(v) for v in arm.series[""]]] for arm in arms])
    return figure


def _significant(value: Any) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _thinned(points: list[tuple[int, float | None]]) -> tuple[list[float], list[float | None]]:
    """Reduce to at most MAX_POINTS points by averaging neighbours; None if no neighbour has a number."""
    size = max(1, -(-len(points) // MAX_POINTS))
    steps, values = [], []
    for start in range(0, len(points), size):
        near = points[start : start + size]
        known = [value for _, value in near if value is not None]
        steps.append(sum(step for step, _ in near) / len(near))
        values.append(sum(known) / len(known) if known else None)
    return steps, values


def _absent(title: str, files: str) -> str:
    return f"<section><h2>{title}</h2><p class=absent>This run has no {escape(files)}.</p></section>"


def _summary(runs: dict[str, RunLog], run: RunLog, counts: Counts) -> str:
    of_metrics = [step for r in runs.values() for series in r.metrics.values() for step in series]
    steps = [c.step for c in run.completions] or of_metrics
    first, last = min(steps), max(steps)
    cells = [("steps", f"{first:,} to {last:,}" if first < last else f"{first:,}")]
    if run.completions:
        share = counts.live / counts.tokens if counts.tokens else 0.0
        cells += [
            ("completions", f"{len(run.completions):,}"),
            ("tokens that count", f"{counts.tokens:,}"),
            ("mean entropy", _nats(counts.mean)),
            ("80 % of the tokens are below", _nats(counts.quantile(0.8))),
            ("tokens with a gradient", _percent(share)),
        ]
    return f"<dl id=summary>{''.join(f'<div><dt>{label}</dt><dd>{value}</dd></div>' for label, value in cells)}</dl>"


def _nats(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g} nats"


def _forking(counts: Counts) -> str:
    return asset("forking.html").format(rows=len(counts.rows), at_least=counts.at_least)


def _completions(counts: Counts, several: bool) -> str:
    scales = _scale(counts, EDGES, "absolute") + _scale(counts, _ranks(counts), "ranks")
    everything = max(1, sum(counts.states.values()))
    states = "".join(
        f'<button type="button" data-only="{letter}" aria-pressed="false" title="{escape(says)}">'
        f'<span class="t s-{letter} {KINDS.get(letter, "")}">{name}</span> '
        f"{_percent(counts.states[letter] / everything)}</button>"
        for letter, (name, says) in STATES.items()
        if counts.states.get(letter)
    )
    of_run = '<label>Run <select name="run"></select></label>' if several else ""
    return asset("completions.html").format(scales=scales, states=states, run=of_run)


def _scale(counts: Counts, edges: Sequence[float], name: str) -> str:
    """Return the list of colours, each with its share of the tokens, and the entropies between them."""
    known = max(1, sum(counts.entropy))
    bounds = [0, *(round(edge * SCALE) for edge in edges), MISSING]
    shares = [sum(counts.entropy[low:high]) / known for low, high in zip(bounds, bounds[1:], strict=False)]
    named = ["", *(f"{edge:.2g}" for edge in edges)]
    items = "".join(
        f'<li><span class="h{n}">{_percent(share, 0.1)}</span><small>{named[n]}</small></li>'
        for n, share in enumerate(shares)
    )
    return f'<ol class="scale {name}">{items}</ol>'


def _percent(share: float, least: float = 0.01) -> str:
    """Return the share in percent. A number below `least` percent is shown as "< least"."""
    return f"{100 * share:.3g} %" if share == 0 or 100 * share >= least else f"&lt; {least:g} %"
