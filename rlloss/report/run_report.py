"""A training run as one HTML page that opens offline: its metrics, its forking tokens, its completions token by token.

    write_run_report("out")  # reads out/tokens/*.jsonl and out/metrics.jsonl, writes out/report.html

What the files hold is described where they are written, in `rlloss.integrations.token_log`. Every text comes from a
model or a file and is shown as text, whatever it is.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from array import array
from html import escape
from pathlib import Path
from typing import Any

from rlloss.report import charts
from rlloss.report.charts import asset
from rlloss.report.run_log import LIVE, MASKED, MISSING, SCALE, Completion, Counts, RunLog, count, read_run

EDGES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Entropies in nats between the colours. They are the same on every page, so that pages can be compared."""
TABLE_ROWS, MAX_POINTS, MAX_LINES = 100, 500, 6

STATES = {
    # letter of rlloss.tokens.TokenState: its name, and what it says
    "l": ("live", "has a gradient"),
    "p": ("penalised", "has a gradient, with the penalty of KL-Cov"),
    "c": ("clipped", "no gradient: its ratio is clipped, or a weight has become 0"),
    "v": ("selected", "no gradient: left out by Clip-Cov"),
    "o": ("off-policy", "no gradient: left out as off-policy"),
    "e": ("dropped", "no gradient: its entropy is below the cutoff"),
    "d": ("dead", "no gradient: advantage 0"),
    "m": ("masked", "does not count"),
}

CHARTS = (
    # title, unit, metrics in the order of their lines
    ("Entropy", "nats per token", r"entropy(/mean)?", r"entropy/p\d+", r"entropy/cutoff"),
    ("Tokens that teach", "share of tokens", r"(entropy/)?kept_share", r"rlloss/live_share", r"(\w+/)?selected_share"),
    ("Clipped", "share of tokens", r"clip_ratio/(low|high|region)_mean", r"cispo_clip_ratio"),
    ("Covariance of log-probability and advantage", "", r"cov/logp_(prob_)?advantage"),
    ("... by the accuracy of the group", "", r"cov/logp_advantage/.*"),
    ("Change of the entropy against it", "over the run so far", r"cov/entropy_change_.*"),
    ("Sampling temperature", "", r"sampling/temperature/.*"),
    ("Rewards", "", r"reward", r"rewards/.*/mean"),
    ("Spread of the rewards", "standard deviation", r"reward_std", r"rewards/.*/std"),
    ("Groups without a signal", "share", r"rlloss/zero_advantage_share", r"frac_reward_zero_std", r".*zero_variance.*"),
    ("KL to the reference", "nats per token", r"kl"),
    ("Loss", "", r"loss", r"policy_loss"),
    ("Norm of the gradient", "", r"grad_norm"),
    ("Length of the completions", "tokens", r"completions/(min|mean|max)_length"),
)


def write_run_report(run_dir: str | Path, output: str | Path | None = None, *, max_completions: int = 10_000) -> Path:
    """Write the page of a run and return its path; missing folders are made.

    Args:
        run_dir: a folder with ``tokens/*.jsonl``, ``metrics.jsonl``, or both.
        output: the page; None: ``run_dir/report.html``.
        max_completions: of more than these, the page holds evenly spaced ones, and says so. What it counts, it counts
            over all.

    A line that cannot be read, as a killed run leaves one, and what is no file, are left out and named on the page.
    Where the run was resumed, what it had written from that step on is left out.

    Raises FileNotFoundError or NotADirectoryError if there is no such run, ValueError if nothing in it can be read.
    """
    charts.of_type("run_dir", run_dir, str | os.PathLike)
    charts.of_type("output", output, str | os.PathLike | None)
    charts.of_type("max_completions", max_completions, int)
    run_dir = Path(run_dir)
    if max_completions < 1:
        raise ValueError(f"max_completions: found {max_completions}, expected at least 1")
    run = read_run(run_dir)
    path = run_dir / "report.html" if output is None else Path(output)
    charts.replace_file(path, _page(run, run_dir.resolve().name, max_completions))
    return path


def _page(run: RunLog, name: str, max_completions: int) -> str:
    counts = count(run, TABLE_ROWS)
    shown = run.completions
    if len(shown) > max_completions:
        shown = [shown[i * len(shown) // max_completions] for i in range(max_completions)]
    figures, lines = _figures(run)
    plot = [charts.LEFT, charts.WIDTH - charts.RIGHT]
    data = _embedded(run, shown, counts) | {"lines": lines, "plot": plot}
    # Inside a script element only "<" could begin something; as an escape it is the same JSON, and so is all of ASCII.
    inline = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    title = f"rlloss: {name}"
    notes = [
        f"Left out as not readable: {run.left_out()}." if run.unreadable else "",
        f"{len(shown):,} of {len(run.completions):,} completions are on this page, evenly spaced; what is counted, is "
        "counted over all." if len(shown) < len(run.completions) else "",
    ]  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">"
        f"<title>{escape(title)}</title><style>{asset('charts.css')}{asset('page.css')}</style></head><body><main>"
        f'<h1>{escape(name)}</h1><p id="problem" role="alert" hidden></p>'
        f"{''.join(f'<p class=warn>{escape(note)}</p>' for note in notes if note)}{_summary(run, counts)}"
        f"{figures}{_forking(counts) if run.completions else _absent('Completions', 'tokens/*.jsonl')}"
        f"{_completions(counts) if run.completions else ''}</main>"
        f'<div id="tip" role="tooltip" hidden></div><script type="application/json" id="data">{inline}</script>'
        f"<script>{asset('page.js')}</script></body></html>\n"
    )


def _embedded(run: RunLog, shown: list[Completion], counts: Counts) -> dict[str, Any]:
    """What the script reads.

    Of a completion: step, prompt, advantage (or mean, least, greatest), rewards, mean entropy, share live, tokens and
    entropies in base64 as little-endian integers, states.
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
        "states": STATES,
        "table": [[t, n, _rounded(mean), _rounded(live)] for t, n, mean, live in counts.rows],
        "completions": [
            [
                c.step, c.prompt, _advantage(c.advantage), [c.rewards.get(name) for name in rewards], *_means(c),
                _base64(c.tokens if wide else array("H", c.tokens)), _base64(c.entropy), c.state,
            ]
            for c in shown
        ],
    }  # fmt: skip


def _base64(integers: array[int]) -> str:
    if sys.byteorder == "big":
        integers = array(integers.typecode, integers)
        integers.byteswap()
    return base64.b64encode(integers.tobytes()).decode("ascii")


def _means(completion: Completion) -> tuple[float | None, float | None]:
    """(mean entropy in nats, share live) of the tokens that count."""
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


def _figures(run: RunLog) -> tuple[str, list[Any]]:
    """The charts in HTML, and their lines for the pointer: per chart [[name, steps, values], ...]."""
    if not run.metrics:
        return _absent("Metrics", "metrics.jsonl"), []
    left, html, more, lines = dict(run.metrics), [], [], []
    for title, unit, *patterns in CHARTS:
        names = [name for pattern in patterns for name in sorted(left) if re.fullmatch(pattern, name)]
        for start in range(0, len(names), MAX_LINES):
            html.append(_figure(run, names[start : start + MAX_LINES], title, unit, lines))
        for name in names:
            left.pop(name, None)
    for name in sorted(left):
        more.append(_figure(run, [name], name, "", lines))
    rest = (
        f"<details><summary>{len(more)} more metrics</summary><div class=charts>{''.join(more)}</div></details>"
        if more
        else ""
    )
    explain = "<p class=absent>Thin: as logged. Bold: a centred mean. A gap: not a finite number.</p>"
    body = f"{explain}<div class=charts>{''.join(html)}</div>{rest}"
    return f'<section id="metrics"><h2>Metrics</h2>{body}</section>', lines


def _figure(run: RunLog, names: list[str], title: str, unit: str, lines: list[Any]) -> str:
    arms = []
    for name in names:
        steps, values = _thinned(sorted(run.metrics[name].items()))
        arms.append(charts.Arm(name, steps, {"": values}))
    figure = charts.chart(arms, charts.Panel("", title, unit), len(lines))
    lines.append([[arm.name, arm.steps, [_significant(v) for v in arm.series[""]]] for arm in arms])
    keys = "".join(f'<li><i class="arm{n}"></i>{escape(arm.name)}</li>' for n, arm in enumerate(arms))
    return figure.replace("</figcaption>", f"</figcaption><ul class=keys>{keys}</ul>", 1)


def _significant(value: Any) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _thinned(points: list[tuple[int, float | None]]) -> tuple[list[float], list[float | None]]:
    """At most MAX_POINTS points: means of neighbours, and None where none of them has a number."""
    size = -(-len(points) // MAX_POINTS)
    steps, values = [], []
    for start in range(0, len(points), size):
        near = points[start : start + size]
        known = [value for _, value in near if value is not None]
        steps.append(sum(step for step, _ in near) / len(near))
        values.append(sum(known) / len(known) if known else None)
    return steps, values


def _absent(title: str, files: str) -> str:
    return f"<section><h2>{title}</h2><p class=absent>This run has no {escape(files)}.</p></section>"


def _summary(run: RunLog, counts: Counts) -> str:
    steps = [c.step for c in run.completions] or [step for series in run.metrics.values() for step in series]
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


def _completions(counts: Counts) -> str:
    known = max(1, sum(counts.entropy))
    bounds = [0, *(round(edge * SCALE) for edge in EDGES), MISSING]
    shares = [sum(counts.entropy[low:high]) / known for low, high in zip(bounds, bounds[1:], strict=False)]
    scale = "".join(
        f'<li><span class="h{n}">{_percent(share)}</span><small>{"" if n == 0 else f"{EDGES[n - 1]:g}"}</small></li>'
        for n, share in enumerate(shares)
    )
    everything = max(1, sum(counts.states.values()))
    states = "".join(
        f'<button type="button" data-only="{letter}" aria-pressed="false" title="{escape(says)}">'
        f'<span class="t s-{letter}">{name}</span> {_percent(counts.states[letter] / everything)}</button>'
        for letter, (name, says) in STATES.items()
        if counts.states.get(letter)
    )
    return asset("completions.html").format(scale=scale, states=states)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share == 0 or share >= 0.0001 else "&lt; 0.01 %"
