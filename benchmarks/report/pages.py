"""Build tables and figures of the results for README.md and docs/. `python -m docs.generate` writes them there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.readings import OURS, SAME, Result, median, share_of_copy
from benchmarks.report.summary import load, memory, milliseconds

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CPU, GPU = "cpu-2-cores", "nvidia-h200"
Show = Callable[[Result, str], str | None]


def entry(result: Result, name: str) -> dict[str, Any]:
    """Return the entry of a contender or a limit. The plan that the default chose has no entry with numbers."""
    found = (result["peers"] | result["limits"]).get(name, {})
    return result["peers"][OURS] if found.get("status") == SAME else found


def ms(result: Result, name: str) -> str | None:
    seconds = median(entry(result, name))
    return None if seconds is None else milliseconds(seconds)


def peak(result: Result, name: str) -> str | None:
    found = entry(result, name).get("peak_bytes")
    return None if found is None else memory(found)


def of_trl(result: Result, name: str) -> str | None:
    seconds, trl = median(entry(result, name)), median(entry(result, "TRL"))
    return None if name == "TRL" or not seconds or not trl else f"{seconds / trl:.2f} of TRL's"


def bandwidth(result: Result, name: str) -> str | None:
    share = share_of_copy(result, name)
    return None if share is None else f"{share:.0%} of a copy's bandwidth"


def found(results: list[Result], wanted: dict[str, Any]) -> Result:
    """Return the result with these fields; `model` may be one of several. A run may have left it out."""
    of = {"kind": "step", "fill": 1.0} | wanted
    model = of.pop("model", None)
    of_these = (
        r
        for r in results
        if all(r[name] == value for name, value in of.items()) and (model is None or model in r["model"].split(", "))
    )
    return next(of_these, {"status": "not measured"})


def table(folder: str, suite: str, rows: dict[str, str], columns: dict[str, dict[str, Any]], *shows: Show) -> list[str]:
    """Make a table and a line with device and date. rows: {label: contender}. columns: {label: fields of a result}."""
    report = load(RESULTS / folder)[suite]
    where, results = report["conditions"], report["results"]
    lines = ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for label, name in rows.items():
        cells = []
        for wanted in columns.values():
            result = found(results, wanted)
            status = result["status"] if result["status"] != "measured" else entry(result, name).get("status", "")
            if status != "measured":
                cells.append(status.partition(":")[0])
            else:
                cells.append(", ".join(text for show in shows if (text := show(result, name)) is not None))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "trl", "liger-kernel"))
    return [*lines, "", f"*Medians; {where['device']}; {versions}; commit {where['commit']}, {where['date'][:10]}.*"]


def picture() -> list[str]:
    """Return the plot of an update step, with its numbers in words."""
    (result,) = (r for r in load(RESULTS / CPU)["step"]["results"] if r["kind"] == "step")
    said = []
    for name in ("TRL", "rlloss"):
        of = entry(result, name)
        said.append(f"{name} {1e3 * (median(of) or 0.0):,.0f} ms and {of['peak_bytes'] / 2**20:,.0f} MiB")
    return [f"![Time and memory of an update step: {', '.join(said)}](benchmarks/results/{CPU}/step.svg)"]


def _rhos(**wanted: Any) -> dict[str, dict[str, Any]]:
    return {"rho 0.2": {"rho": 0.2} | wanted, "rho 1": {"rho": 1.0} | wanted}


def _columns(of: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return columns for rho 0.2 and 1 of each entry."""
    return {f"{label}, {rho}": w for label, wanted in of.items() for rho, w in _rhos(**wanted).items()}


def _step(folder: str) -> list[str]:
    rows = {
        "TRL": "TRL", "TRL's trainer inside `patch_trl()`": "TRL, patch_trl()", "rlloss's trainer": "rlloss",
        "the backbone alone, all completions": "backbone, all completions",
        "generation in transformers, besides": "generation",
    }  # fmt: skip
    kinds = {"beta 0, ms": "step", "beta 0.04, ms": "beta 0.04"}
    columns = {label: {"kind": kind, "fill": 0.5} for label, kind in kinds.items()}
    return table(folder, "step", rows, columns, ms, of_trl, peak)


PLANS = {"rlloss, default": OURS, "rlloss `recompute`": "rlloss recompute", "rlloss `keep`": "rlloss keep"}
FROZEN = {"rlloss `jacobian`": "rlloss jacobian"}
TRL_CPU, PLAIN = {"TRL's lm_head on CPU": "TRL"}, {"plain logits": "naive"}
LIGER = {"Liger's chunked loss (no entropies, no selection)": "Liger"}
BARE = {"the bare products of `recompute`": "bare 1 + 3r", "of `keep`": "bare 1 + 2r"}
FROM_LOGITS = {
    "forward": {"kind": "forward", "rho": 1.0},
    "forward and backward, 20 % live": {"rho": 0.2},
    "all live": {"rho": 1.0},
}
TABLES: dict[str, Callable[[], list[str]]] = {
    "step, in a picture": picture,
    "step": lambda: _step(CPU),
    "step on a GPU": lambda: _step(GPU),
    "step with LoRA": lambda: table(
        CPU, "step",
        {"TRL": "TRL", "TRL's trainer inside `patch_trl()`": "TRL, patch_trl()", "rlloss's trainer": "rlloss",
         'rlloss\'s trainer, `zero_advantage="keep"`': "rlloss keep"},
        {f"rho {rho:g}, ms": {"kind": "LoRA", "rho": rho, "fill": 0.5} for rho in (0.2, 0.5, 1.0)},
        ms, of_trl, peak,
    ),
    "hidden states": lambda: table(
        CPU, "hidden", PLANS | TRL_CPU | PLAIN | LIGER | BARE,
        _columns({f"{dtype}, fill {fill:g}": {"model": "small", "dtype": dtype, "fill": fill}
                  for dtype, fill in (("float32", 0.5), ("float32", 1.0), ("bfloat16", 0.5))}),
        ms, peak,
    ),
    "hidden states, frozen head": lambda: table(
        CPU, "hidden", PLANS | FROZEN | TRL_CPU | PLAIN,
        _rhos(model="small", dtype="float32", kind="frozen head"),
        ms, peak,
    ),
    "hidden states, D 4096": lambda: table(
        CPU, "hidden", PLANS | TRL_CPU | PLAIN, _rhos(model="wide", dtype="float32"), ms, peak,
    ),
    "real heads": lambda: table(
        CPU, "hidden", PLANS | TRL_CPU | PLAIN | {"torch.compile of plain logits": "torch.compile"} | BARE,
        _rhos(model="Qwen2.5-0.5B", dtype="float32"),
        ms,
    ),
    "logits": lambda: table(
        CPU, "logits",
        {"rlloss": "rlloss", "torch eager": "torch eager", "torch.compile": "torch.compile", "TRL on CPU": "TRL torch",
         "a fresh gradient of zeros": "zeros"},
        {f"{dtype}, {label}": wanted | {"model": "small", "dtype": dtype}
         for dtype in ("float32", "bfloat16") for label, wanted in FROM_LOGITS.items()},
        ms, peak,
    ),
    "logits on a GPU": lambda: table(
        GPU, "logits",
        {"rlloss": "rlloss", "TRL's kernel": "TRL kernel", "Liger's kernels, no entropies": "Liger kernels",
         "torch.compile": "torch.compile"},
        FROM_LOGITS, ms, bandwidth,
    ),
    "loss on a GPU": lambda: table(
        GPU, "loss",
        {"rlloss": "rlloss", "TRL's kernel, loss in torch": "TRL kernel", "Liger, no entropies": "Liger",
         "torch.compile": "torch.compile"},
        _rhos(), ms, peak,
    ),
    "frozen head on a GPU": lambda: table(
        GPU, "hidden", PLANS | FROZEN | {"TRL": "TRL"} | PLAIN,
        _columns({name: {"model": model, "kind": "frozen head"}
                  for name, model in (("D 896", "Qwen2.5-0.5B"), ("D 4096", "Qwen3-8B"))}),
        ms, peak,
    ),
    "hidden states on a GPU": lambda: table(
        GPU, "hidden",
        PLANS | {"TRL": "TRL"} | PLAIN | {"cut-cross-entropy, no entropies": "cut-cross-entropy"},
        _columns({"D 896": {"model": "Qwen2.5-0.5B"}, "D 4096": {"model": "Qwen3-8B"}}), ms, peak,
    ),
}  # fmt: skip
