"""Write training curves as one HTML file that opens offline, with inline SVG and no external address::

    write_report("report.html", arms, panels=[Panel("entropy", "Entropy", "nats per token")], title="A run")

The page has a light and a dark theme. Python draws the charts, so the page is complete without scripts; a few lines of
JavaScript add the values under the pointer. Every text is escaped. A value that was not measured (None, NaN, infinite)
is a gap in its line, not a zero.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

Value = float | int | None

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34


@dataclass(frozen=True)
class Arm:
    """One run: `steps` (x values) and `series` (metric name -> one value per step, or None if it is missing)."""

    name: str
    steps: Sequence[float]
    series: dict[str, Sequence[Value]]
    settings: str = ""
    note: str = ""
    """Warning for readers who compare this arm, such as that its clip was inactive."""


@dataclass(frozen=True)
class Panel:
    """One chart: the metric `key` of every arm. A bound of None follows the data."""

    key: str
    title: str
    unit: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]] = field(default_factory=list)
    caption: str = ""


def write_report(
    path: str | Path,
    arms: Sequence[Arm],
    *,
    panels: Sequence[Panel],
    title: str,
    tables: Sequence[Table] = (),
    paragraphs: Sequence[str] = (),
    command: str = "",
    groups: Sequence[tuple[str, Sequence[str]]] | None = None,
    found: Sequence[str] = (),
) -> Path:
    """Write the page and return its path. Missing folders are made.

    Args:
        path: the file to write.
        arms: the runs.
        panels: one chart each.
        title: title of the page.
        tables: tables before the charts.
        paragraphs, command: text at the end, what was run and the command that repeats it.
        groups: (title, names of its arms) per section with its own charts, for more arms than a chart can tell apart.
            None: one section.
        found: sentences at the top, what the runs show.

    Raises:
        TypeError: an argument has another type.
        ValueError: there is no arm, a series and its steps differ in length, or a panel or a group names something that
            does not exist.
    """
    of_type("path", path, str | os.PathLike)
    for name, text in (("title", title), ("command", command)):
        of_type(name, text, str)
    for name, values, kind in (
        ("arms", arms, Arm), ("panels", panels, Panel), ("tables", tables, Table), ("paragraphs", paragraphs, str),
        ("groups", groups or (), tuple), ("found", found, str),
    ):  # fmt: skip
        of_type(name, values, list | tuple)
        for value in values:
            of_type(name, value, kind, "a list of ")
    if not arms:
        raise ValueError("arms: found none, expected at least one")
    for arm in arms:
        for key, values in arm.series.items():
            if len(values) != len(arm.steps):
                raise ValueError(
                    f"arms: series {key!r} of arm {arm.name!r} has {len(values)} values, expected {len(arm.steps)}, "
                    "one per step"
                )
    for panel in panels:
        if not any(panel.key in arm.series for arm in arms):
            known = sorted({key for arm in arms for key in arm.series})
            raise ValueError(f"panels: found {panel.key!r}, expected a metric that an arm has: {', '.join(known)}")
    path = Path(path)
    named = {arm.name: arm for arm in arms}
    sections = [("", list(arms))]
    if groups is not None:
        for _, members in groups:
            for name in members:
                if name not in named:
                    raise ValueError(f"groups: found {name!r}, expected names of arms: {', '.join(named)}")
        sections = [(heading, [named[name] for name in members]) for heading, members in groups]
    replace_file(path, _page(sections, panels, title, tables, paragraphs, command, found))
    return path


def asset(name: str) -> str:
    """Return the text of a file in this folder."""
    return files("rlloss.report").joinpath(name).read_text(encoding="utf-8")


def of_type(name: str, found: object, kind: Any, of: str = "") -> None:
    """Raise TypeError unless `found` is of this type, or of a type in this union."""
    if not isinstance(found, kind):
        expected = " or ".join(k.__name__ for k in getattr(kind, "__args__", (kind,)))
        found_in = "a list with " if of else ""
        raise TypeError(f"{name}: found {found_in}{type(found).__name__}, expected {of}{expected}")


def make_folder(path: str | Path) -> Path:
    """Make a folder for output and return its path. Raises OSError, naming it, if it cannot be made or written to."""
    path = Path(path)
    wrong = errno.ENOTDIR if path.exists() and not path.is_dir() else None
    if wrong is None:
        path.mkdir(parents=True, exist_ok=True)
        wrong = None if os.access(path, os.W_OK | os.X_OK) else errno.EACCES
    if wrong is not None:
        raise OSError(wrong, os.strerror(wrong), str(path))
    return path


def replace_file(path: str | Path, content: str | bytes) -> None:
    """Replace the file `path` by one with this content. Missing folders are made. Texts are written in UTF-8.

    The content is written to a file beside `path`, which is then renamed. A failure leaves the old file unchanged. A
    link is replaced, not followed. If `path` exists and is no file, such as /dev/stdout or a named pipe, the content is
    written to it. Raises OSError, naming `path`.
    """
    path = Path(path)
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    beside = path.with_name(f".rlloss-{secrets.token_hex(8)}")
    try:
        with beside.open("xb") as file:
            file.write(data)
        if path.exists() and not path.is_symlink():
            beside.chmod(path.stat().st_mode & 0o777)
        beside.replace(path)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def smooth(values: Sequence[Value], window: int) -> list[float | None]:
    """Return the centred mean over up to `window` finite neighbours. None stays None, so a gap is not bridged."""
    finite = [v if v is not None and math.isfinite(v) else None for v in values]
    half = window // 2
    result: list[float | None] = []
    for i, value in enumerate(finite):
        near = [v for v in finite[max(0, i - half) : i + half + 1] if v is not None]
        result.append(None if value is None else sum(near) / len(near))
    return result


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers inside [low, high], 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5) if m * power >= raw * 0.999), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _finite(values: Sequence[Value]) -> list[float]:
    return [float(v) for v in values if v is not None and math.isfinite(v)]


def _bounds(arms: Sequence[Arm], panel: Panel) -> tuple[float, float]:
    values = [v for arm in arms for v in _finite(arm.series.get(panel.key, ()))]
    low = panel.low if panel.low is not None else min(values, default=0.0)
    high = panel.high if panel.high is not None else max(values, default=1.0)
    if high <= low:
        high = low + (abs(low) or 1.0)
    margin = 0.05 * (high - low)
    return low - (margin if panel.low is None else 0.0), high + (margin if panel.high is None else 0.0)


def chart(
    arms: Sequence[Arm],
    panel: Panel,
    index: int,
    *,
    marks: Sequence[tuple[float, str]] = (),
    band: tuple[int, int] | None = None,
    keys: bool = False,
) -> str:
    """Return one figure in HTML, with a line of `panel.key` per arm against its steps. Its svg has data-panel=`index`.

    marks are (step, text of the event). band is (lower, upper), the numbers of two arms: an area between them replaces
    the line of the upper one. keys tells whether the figure has its own legend, whose buttons switch lines.
    """
    steps = [float(s) for arm in arms for s in arm.steps]
    x_low, x_high = min(steps, default=0.0), max(steps, default=1.0)
    if x_high <= x_low:
        x_high = x_low + 1.0
    y_low, y_high = _bounds(arms, panel)

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return across, down

    parts = []
    for y in ticks(y_low, y_high):
        down = at(x_low, y)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{down + 3.5:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in ticks(x_low, x_high, 6):
        across = at(x, y_low)[0]
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">step</text>'
    )
    if band is not None:
        parts.append(_area(arms[band[0]], arms[band[1]], panel.key, band[1], at))
    for step, text in marks:
        across = at(min(max(step, x_low), x_high), y_low)[0]
        parts.append(
            f'<g class="mark"><line x1="{across:.1f}" x2="{across:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f"<title>{escape(text)}</title></g>"
        )
    for number, arm in enumerate(arms):
        values = arm.series.get(panel.key, ())
        if band is not None and number == band[1]:
            continue
        for kind, line in (("raw", list(values)), ("mean", smooth(values, _window(arm)))):
            path, dots = _path(arm.steps, line, at)
            parts.append(f'<path class="{kind} arm{number % 6} line{number}" d="{path}"/>')
            if kind == "mean":
                parts += [
                    f'<circle class="arm{number % 6} line{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in dots
                ]
    missing = [arm.name for arm in arms if not _finite(arm.series.get(panel.key, ()))]
    absent = f'<p class="absent">not measured: {escape(", ".join(missing))}</p>' if missing else ""
    unit = f" <small>{escape(panel.unit)}</small>" if panel.unit else ""
    return (
        f'<figure><figcaption>{escape(panel.title)}{unit}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(panel.title)} over steps" data-panel="{index}" data-low="{x_low:g}" '
        f'data-high="{x_high:g}">{"".join(parts)}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        f"{_keys(arms) if keys else ''}{absent}</figure>"
    )


def _keys(arms: Sequence[Arm]) -> str:
    """Return a button per line, which shows or hides it."""
    items = "".join(
        f'<li><button type="button" data-line="{number}" aria-pressed="true"><i class="arm{number % 6}"></i>'
        f"{escape(arm.name)}</button></li>"
        for number, arm in enumerate(arms)
    )
    return f'<ul class="keys">{items}</ul>'


def _area(lower: Arm, upper: Arm, key: str, number: int, at) -> str:
    """Return the area between two lines, where both have a value."""
    below = dict(zip(lower.steps, lower.series.get(key, ()), strict=False))
    above = dict(zip(upper.steps, upper.series.get(key, ()), strict=False))
    steps = [s for s in below if below[s] is not None and above.get(s) is not None]
    if len(steps) < 2:
        return ""
    edge = [at(float(s), float(above[s])) for s in steps]  # type: ignore[arg-type]
    edge += [at(float(s), float(below[s])) for s in reversed(steps)]  # type: ignore[arg-type]
    points = "L".join(f"{x:.1f} {y:.1f}" for x, y in edge)
    return f'<path class="band arm{number % 6} line{number}" d="M{points}Z"/>'


def _window(arm: Arm) -> int:
    return max(1, 2 * len(arm.steps) // 25) | 1  # an odd window is centred


def _path(steps: Sequence[float], values: Sequence[Value], at) -> tuple[str, list[tuple[float, float]]]:
    """Return SVG path data with a new stroke after every gap, and lone points, which a stroke would not show."""
    strokes: list[list[tuple[float, float]]] = [[]]
    for step, value in zip(steps, values, strict=False):
        if value is None or not math.isfinite(value):
            strokes.append([])
        else:
            strokes[-1].append(at(float(step), float(value)))
    path = "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in stroke) for stroke in strokes if stroke)
    return path, [stroke[0] for stroke in strokes if len(stroke) == 1]


def table_html(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _legend(arms: Sequence[Arm]) -> str:
    items = []
    for number, arm in enumerate(arms):
        note = f' <strong class="note">{escape(arm.note)}</strong>' if arm.note else ""
        settings = f"<br><small>{escape(arm.settings)}</small>" if arm.settings else ""
        items.append(f'<li><i class="arm{number % 6}"></i><span><b>{escape(arm.name)}</b>{note}{settings}</span></li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _clean(values: Sequence[Value]) -> list[Value]:
    return [v if v is not None and math.isfinite(v) else None for v in values]


def sentences(name: str, said: Sequence[str]) -> str:
    """Return a list of sentences under its name, or "" if there are none."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in said)
    heading = f"<h2>{escape(name)}</h2>" if name else ""
    return f'{heading}<ul class="found">{items}</ul>' if items else ""


def prose(paragraphs: Sequence[str], command: str) -> str:
    text = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs)
    return text + (f"<pre><code>{escape(command)}</code></pre>" if command else "")


def _page(sections, panels, title, tables, paragraphs, command, found) -> str:
    """Return the page. sections are (heading, arms); charts are numbered across all sections."""
    charted = [(arms, panel) for _, arms in sections for panel in panels]
    data = {
        "lines": [
            [[arm.name, [float(x) for x in arm.steps], _clean(arm.series.get(panel.key, ()))] for arm in arms]
            for arms, panel in charted
        ],
        "plot": [LEFT, WIDTH - RIGHT],
    }
    # Inside a script element only "</" could end it. The escape of "<" is the same JSON.
    inline = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    lines = max(_window(arm) for arms, _ in charted for arm in arms)
    explain = f"Thin: every step. Bold: centred mean over {lines} steps." if lines > 1 else "One value per step."
    figures = [chart(arms, panel, index, keys=len(arms) > 1) for index, (arms, panel) in enumerate(charted)]
    charts = [
        f'{f"<h2>{escape(heading)}</h2>{_legend(arms)}" if heading else ""}<div class="charts">'
        f"{''.join(figures[number * len(panels) : (number + 1) * len(panels)])}</div>"
        for number, (heading, arms) in enumerate(sections)
    ]
    legend = "".join(_legend(arms) for heading, arms in sections if not heading)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{asset('charts.css')}</style></head><body><main><h1>{escape(title)}</h1>"
        f"{sentences('', found)}{legend}{''.join(table_html(table) for table in tables)}"
        f'<p class="absent">{explain}</p>{"".join(charts)}'
        f"<section><h2>What was run</h2>{prose(paragraphs, command)}</section></main>"
        '<div id="point" role="tooltip" hidden></div><script type="application/json" id="data">'
        f"{inline}</script><script>{asset('charts.js')}</script></body></html>\n"
    )
