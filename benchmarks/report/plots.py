"""Draw the plots of a run as SVG with matplotlib: time against rho, share of the copy bandwidth, peak memory."""

import importlib
import io
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.harness.readings import BARE_OF_PLAN, OURS, Result, fastest_peer, is_ours, median, share_of_copy
from benchmarks.harness.targets import FILL
from rlloss.report import replace_file

# Okabe and Ito's colours, which colour-blind readers can distinguish. rlloss is blue in every figure.
STYLES = {
    OURS: ("#0072B2", "o"),
    "rlloss recompute": ("#3B9AD9", "o"),
    "rlloss two launches": ("#3B9AD9", "o"),
    "rlloss keep": ("#7FBDE8", "o"),
    "rlloss single launch": ("#7FBDE8", "o"),
    "rlloss gradient_in_forward": ("#B5D8F2", "o"),
    "rlloss in place": ("#B5D8F2", "o"),
    "TRL": ("#D55E00", "s"),
    "TRL torch": ("#D55E00", "s"),
    "TRL kernel": ("#D55E00", "s"),
    "naive": ("#7F7F7F", "D"),
    "torch eager": ("#7F7F7F", "D"),
    "torch.compile": ("#000000", "^"),
    "Liger": ("#009E73", "v"),
    "Liger kernels": ("#009E73", "v"),
    "Liger FLSCE": ("#E69F00", "<"),
    "Liger in place": ("#E69F00", "<"),
    "cut-cross-entropy": ("#CC79A7", ">"),
}  # contender: (colour, marker)
OTHER = ("#8C6D31", "P")
NAMES = ("hidden_time", "logits_bandwidth", "hidden_memory", "loss_memory")
LIMIT = "bare products of its plan"
Drawn = list[tuple[str, str]]  # file name and caption


def _pyplot() -> Any:
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        message = "matplotlib: found none, expected it for the plots: pip install -e '.[bench]' (the extra \"bench\")"
        raise ModuleNotFoundError(message, name="matplotlib") from error
    matplotlib.use("svg")
    # Letters become outlines. With a fixed hash salt the same numbers give the same bytes.
    matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "rlloss", "font.size": 9})
    return importlib.import_module("matplotlib.pyplot")


def _names(found: list[Result]) -> list[str]:
    """Return the contenders, rlloss and its plans first."""
    names = dict.fromkeys(name for result in found for name in result["peers"])
    return sorted(names, key=lambda name: not is_ours(name))


def _finish(pyplot: Any, figure: Any, folder: Path, name: str, caption: str) -> tuple[str, str]:
    """Write the figure with its caption underneath."""
    width = int(figure.get_figwidth() * 15)
    lines = textwrap.wrap(caption, width)
    figure.text(0.01, -0.015, "\n".join(lines), ha="left", va="top", fontsize=7.5)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", bbox_inches="tight", metadata={"Date": None})
    replace_file(folder / name, drawn.getvalue())
    pyplot.close(figure)
    return name, caption


def _where(where: dict[str, Any]) -> str:
    note = f" {where['note']}" if where.get("note") else ""
    return f"{where['device']}, commit {where['commit']}, {where['date'][:10]}.{note}"


def _columns(results: list[Result]) -> str:
    return " or ".join(dict.fromkeys(f"{r['B']} x {r['T']}" for r in results)) + " columns"


def _measured(results: list[Result], suite: str, dtype: str) -> list[Result]:
    return [r for r in results if (r["suite"], r["dtype"], r["status"]) == (suite, dtype, "measured")]


def _relative(result: Result, name: str) -> float | None:
    """Return the time of a contender or of the limit, divided by TRL's. Without TRL: by the fastest peer's."""
    peers, bare = result["peers"], result["limits"]
    fastest = fastest_peer(result)
    of = median(peers.get("TRL", {})) or (fastest[1] if fastest else None)
    if name == LIMIT:
        entry = bare.get(BARE_OF_PLAN.get(peers.get(OURS, {}).get("plan_name", ""), ""), {})
    else:
        entry = peers.get(name, {})
    seconds = median(entry)
    return seconds / of if seconds and of else None


def _hidden_time(pyplot: Any, results: list[Result], dtype: str, folder: Path, where: str) -> Drawn:
    found = _measured(results, "hidden", dtype)
    if not found:
        return []
    models = list(dict.fromkeys(r["model"] for r in found))
    fills = sorted({r["fill"] for r in found}, reverse=True)
    names = [name for name in _names(found) if name == OURS or not is_ours(name)]
    size = (3.1 * len(models) + 1.6, 2.9 * len(fills) + 0.3)
    figure, axes = pyplot.subplots(len(fills), len(models), figsize=size, sharey=True, squeeze=False)
    rhos = sorted({r["rho"] for r in found})
    for row, fill in zip(axes, fills, strict=True):
        for axis, model in zip(row, models, strict=True):
            own = sorted((r for r in found if (r["model"], r["fill"]) == (model, fill)), key=lambda r: r["rho"])
            for name in (*names, LIMIT):
                points = [(r["rho"], y) for r in own if (y := _relative(r, name)) is not None]
                if not points:
                    continue
                colour, marker = ("#000000", "") if name == LIMIT else STYLES.get(name, OTHER)
                style = {"linestyle": "--"} if name == LIMIT else {"marker": marker, "markersize": 5}
                axis.plot(*zip(*points, strict=True), label=name, color=colour,
                          linewidth=2.2 if name == OURS else 1.2, **style)  # fmt: skip
            axis.set(xscale="log", yscale="log", title=f"{model}, fill {fill:g}")
            axis.set_xticks(rhos, [f"{rho:g}" for rho in rhos])
            axis.minorticks_off()
            axis.set_xlim(rhos[0] / 1.3, rhos[-1] * 1.3)
            axis.grid(alpha=0.3)
            if not own:
                axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes)
    for axis in axes[-1]:
        axis.set_xlabel("rho, share of tokens with a gradient")
    top, bottom = max(a.get_ylim()[1] for a in axes.flat), min(a.get_ylim()[0] for a in axes.flat)
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if bottom <= t <= top]
    axes[0][0].set_yticks(ticks, [f"{t:g}" for t in ticks])
    for row in axes:
        row[0].set_ylabel("time / TRL's time")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.tight_layout(rect=(0, 0, 1 - 1.5 / size[0], 1))
    figure.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1 - 1.5 / size[0], 0.5))
    caption = (
        f"From hidden states, {dtype}, {_columns(found)}: time of forward and backward divided by that of TRL (of "
        f"the fastest peer where TRL has none), medians; dashed, the limit: the bare matrix products of the plan that "
        f"rlloss took. Peers that keep every token are at rho 1 alone. {where}"
    )
    return [_finish(pyplot, figure, folder, f"hidden_time-{dtype}.svg", caption)]


def _bars(axis: Any, models: list[str], values: dict[str, list[float | None]]) -> None:
    """Draw the bars of all contenders side by side for each model. A missing number leaves a gap."""
    names = [name for name, of in values.items() if any(v is not None for v in of)]
    width = 0.82 / max(1, len(names))
    for i, name in enumerate(names):
        places = [m - 0.41 + width * (i + 0.5) for m in range(len(models))]
        pairs = [(p, v) for p, v in zip(places, values[name], strict=True) if v is not None]
        axis.bar(*zip(*pairs, strict=True), width=0.92 * width, label=name, color=STYLES.get(name, OTHER)[0])
    axis.set_xticks(range(len(models)), [model.replace(", ", "\n") for model in models])
    axis.set_xlim(-0.5, len(models) - 0.5)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def _panels(pyplot: Any, panels: list[tuple[str, list[Result]]], value: Any, label: str) -> tuple[Any, Any]:
    """Draw a figure of bars: panels one below the other, with one legend."""
    models = list(dict.fromkeys(r["model"] for _, found in panels for r in found))
    names = _names([r for _, found in panels for r in found])
    size = (2.3 * len(models) + 3.4, 2.5 * len(panels) + 0.2)
    figure, axes = pyplot.subplots(len(panels), 1, figsize=size, squeeze=False)
    for (title, found), axis in zip(panels, axes[:, 0], strict=True):
        of = {r["model"]: r for r in found}
        _bars(axis, models, {n: [value(of[m], n) if m in of else None for m in models] for n in names})
        axis.set(title=title, ylabel=label)
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.tight_layout(rect=(0, 0, 1 - 1.9 / size[0], 1))
    figure.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1 - 1.9 / size[0], 0.5))
    return figure, axes[:, 0]


def _of(results: list[Result], suite: str, dtype: str, kind: str, rho: float) -> list[Result]:
    return [r for r in _measured(results, suite, dtype) if (r["kind"], r["rho"], r["fill"]) == (kind, rho, FILL)]


def _bandwidth(pyplot: Any, results: list[Result], dtype: str, folder: Path, where: str) -> Drawn:
    panels = [
        ("forward without gradient", _of(results, "logits", dtype, "forward", 1.0)),
        ("forward and backward, rho 1", _of(results, "logits", dtype, "step", 1.0)),
        ("forward and backward, rho 0.2", _of(results, "logits", dtype, "step", 0.2)),
    ]
    panels = [(title, found) for title, found in panels if found]
    if not panels:
        return []

    def percent(result: Result, name: str) -> float | None:
        share = share_of_copy(result, name)
        return None if share is None else 100 * share

    figure, axes = _panels(pyplot, panels, percent, "% of copy bandwidth")
    for axis in axes:
        axis.axhline(100, color="black", linestyle="--", linewidth=1)
    caption = (
        f"From logits, {dtype}, {_columns(panels[0][1])}, fill {FILL:g}: bytes that have to be moved per second, as "
        f"a share of what a copy of the logits reached in the same turns (dashed: the copy), medians. {where}"
    )
    return [_finish(pyplot, figure, folder, f"logits_bandwidth-{dtype}.svg", caption)]


def _memory(pyplot: Any, results: list[Result], dtype: str, folder: Path, where: str) -> Drawn:
    def gibibytes(result: Result, name: str) -> float | None:
        entry = result["peers"].get(name, {})
        return entry["peak_bytes"] / 2**30 if median(entry) and "peak_bytes" in entry else None

    drawn = []
    for suite, of in (("hidden", "from hidden states"), ("loss", "the whole loss from logits")):
        panels = [(f"{of}, rho {rho:g}", _of(results, suite, dtype, "step", rho)) for rho in (0.2, 1.0)]
        panels = [(title, found) for title, found in panels if found]
        if panels:
            figure, _ = _panels(pyplot, panels, gibibytes, "peak memory, GiB")
            caption = (
                f"Peak memory of forward and backward above the inputs, {of}, gradients included, {dtype}, "
                f"{_columns(panels[0][1])}, fill {FILL:g}. {where}"
            )
            drawn.append(_finish(pyplot, figure, folder, f"{suite}_memory-{dtype}.svg", caption))
    return drawn


def _step(pyplot: Any, results: list[Result], folder: Path, where: str) -> Drawn:
    """Draw time and memory of an update step."""
    found = [r for r in results if (r["suite"], r["kind"], r["status"]) == ("step", "step", "measured")]
    if not found:
        return []
    (result,) = found
    shown = {n: e for n in ("TRL", "TRL, patch_trl()", OURS) if (e := result["peers"].get(n, {})) and median(e)}
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.42 * len(shown) + 0.9), sharey=True)
    panels = (
        ("loss and backward of a step, ms", {n: 1e3 * (median(e) or 0.0) for n, e in shown.items()}),
        ("peak memory above model and batch, MiB", {n: e["peak_bytes"] / 2**20 for n, e in shown.items()}),
    )
    for axis, (title, values) in zip(axes, panels, strict=True):
        colours = [STYLES.get(name, ("#E5A87F", ""))[0] for name in values]
        bars = axis.barh(list(values), list(values.values()), color=colours, height=0.72)
        axis.bar_label(bars, [f"{value:,.0f}" for value in values.values()], padding=4)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlim(0, 1.14 * max(values.values()))
        axis.xaxis.set_visible(False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(length=0)
    axes[0].invert_yaxis()
    caption = (
        f"Medians; fp32; a {result['model']}, D {result['D']}, V {result['V']}; {result['B']} completions, "
        f"{result['counted']} tokens, {result['with_signal']} of them with a signal, top-entropy {result['rho']:g}. "
        f"{where}"
    )
    figure.tight_layout()
    return [_finish(pyplot, figure, folder, "step.svg", caption)]


def draw(results: list[Result], conditions: dict[str, Any], folder: Path) -> Drawn:
    """Write all plots that have numbers. Each suite is drawn in its first dtype.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    pyplot, where = _pyplot(), _where(conditions)
    for name in NAMES:
        for old in folder.glob(f"{name}-*.svg"):
            old.unlink()  # plots of dtypes that this run does not have
    drawn = _step(pyplot, results, folder, where)
    dtypes = dict.fromkeys(r["dtype"] for r in results if r["suite"] in ("logits", "loss", "hidden"))
    for dtype in list(dtypes)[:1]:
        for plot in (_hidden_time, _bandwidth, _memory):
            drawn += plot(pyplot, results, dtype, folder, where)
    return drawn
