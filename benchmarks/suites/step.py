"""An update step of a real GRPOTrainer, loss and backward: rlloss's against TRL's on the same generation batch, each
first checked to give the same loss, gradients and metrics.

    python -m benchmarks.suites.step [--rounds 9]

Under pytest (`make bench-pytest`) pytest-benchmark times one contender after the other. As a program the contenders
take turns; it prints a Markdown table and writes it with all samples to benchmarks/results/<device>/step.{md,json}, or
files of another --name. --beta adds the KL to a reference model, by which every completion gets a gradient.
"""

import argparse
import functools
import gc
import importlib.util
import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.contenders.trainers import MODES, RHO, Contender, Result, Size, add_reference, contenders, make_batch
from benchmarks.harness.conditions import ROOT, conditions, sentence
from benchmarks.harness.examine import under_pytest
from benchmarks.harness.timing import CUDA, peak_bytes, refuse_interpreter, seconds
from benchmarks.report.plots import draw_step
from rlloss import count_products
from rlloss.report import replace_file

TARGET = 0.25  # of TRL's time, at most
TOLERANCE = 1e-5
NOTES = (
    "TRL: `GRPOTrainer._compute_loss` and backward",
    "TRL, patch_trl(): the same, its fused lm_head replaced by rlloss's",
    "rlloss: the same of rlloss's GRPOTrainer, by `zero_advantage`; forward_only is its default",
    "backbone: the model without its head, forward and backward; the rest of a step is the head and the loss",
    "generation: as many tokens as the batch has columns, by the same model in transformers; not part of the others",
)


def _furthest(errors: Iterable[float]) -> float:
    """The largest; a NaN, which max() may pass over, is larger than all."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def check(found: Result, expected: Result) -> dict[str, float]:
    """Relative errors of the loss, of all gradients as one vector, and of the parameter and the metric furthest off.

    Raises:
        ArithmeticError: one above 1e-5, or a metric of TRL that is missing.
    """
    missing = set(expected.metrics) - set(found.metrics)
    if missing:
        raise ArithmeticError(f"no {', '.join(sorted(missing))} among the metrics")
    errors = {"loss": abs(found.loss - expected.loss).item() / max(abs(expected.loss.item()), 1e-8)}
    off, whole = [], []
    for name, theirs in expected.gradients.items():
        ours = found.gradients[name]
        if (ours is None) != (theirs is None):
            raise ArithmeticError(f"the gradient of {name} is there on one side alone")
        if ours is not None and theirs is not None:
            off.append((ours - theirs).double().norm().item())
            whole.append(theirs.double().norm().item())
    errors["gradient"] = math.hypot(*off) / max(math.hypot(*whole), 1e-30)
    errors["parameter"] = _furthest(a / max(b, 1e-30) for a, b in zip(off, whole, strict=True))
    errors["metric"] = _furthest(
        0.0 if math.isnan(theirs) and math.isnan(found.metrics[name])
        else abs(found.metrics[name] - theirs) / max(abs(theirs), 0.1)
        for name, theirs in expected.metrics.items()
    )  # fmt: skip
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise ArithmeticError(f"{name} is off by {error:.2g}, allowed {TOLERANCE:.0e}")
    return errors


def backbones(model, inputs: dict) -> dict[str, Callable[[], object]]:
    """The model without its head, forward and backward: of all completions; of those with a signal, cut off after the
    longest, and the forward alone of the others."""
    P = inputs["prompt_ids"].shape[1]
    ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    live = inputs["advantages"] != 0

    def forward(rows: Tensor | slice) -> Tensor:
        end = ids.shape[1] if isinstance(rows, slice) else P + int(inputs["completion_mask"][rows].sum(-1).max())
        return model.model(input_ids=ids[rows, :end], attention_mask=mask[rows, :end], use_cache=False)[0]

    def apart() -> None:
        with torch.no_grad():
            forward(~live)
        forward(live).sum().backward()

    return {
        "backbone, all completions": lambda: forward(slice(None)).sum().backward(),
        "backbone, those without signal forward only": apart,
    }


def generation(model, inputs: dict) -> Callable[[], object]:
    """The completions of a batch sampled, none of them ending early."""
    T = inputs["completion_ids"].shape[1]
    prompt = {"input_ids": inputs["prompt_ids"], "attention_mask": inputs["prompt_mask"]}
    return functools.partial(model.generate, **prompt, do_sample=True, min_new_tokens=T, max_new_tokens=T)


def examine(contender: Contender, inputs: dict, expected: Result | None) -> dict:
    """{"status"} and, of a contender that is there and right, "errors", "units" (of rlloss's head), "peak_bytes"."""
    if contender.why_not is not None:
        return {"status": contender.why_not}
    try:
        with count_products() as products:
            found = contender.result(inputs)
        errors = {} if expected is None else check(found, expected)
    except ArithmeticError as error:
        return {"status": f"wrong: {error}"}
    del found
    gc.collect()
    entry = {"status": "measured", "errors": errors, "units": products.units, "peak_bytes": None}
    entry["peak_bytes"] = peak_bytes(lambda: contender.step(inputs))
    contender.clear()
    return entry


def compare(size: Size, rounds: int, beta: float = 0.0) -> dict:
    """Everyone in turns: {"contenders": {name: see `examine`, "seconds"}, "parts": {name: seconds}, see `judge`}."""
    entrants, inputs = contenders(size, beta), make_batch(size)
    if beta != 0.0:
        add_reference(entrants[0].trainer, inputs)
    expected = entrants[0].result(inputs)
    found = {c.name: examine(c, inputs, None if c is entrants[0] else expected) for c in entrants}
    del expected
    runs: dict[str, tuple[Callable[[], object], Callable[[], None]]] = {}
    for c in entrants:
        if found[c.name]["status"] == "measured":
            runs[c.name] = functools.partial(c.step, inputs), c.clear
    parts = backbones(entrants[0].trainer.model, inputs)
    parts["generation"] = generation(entrants[0].trainer.model, inputs)
    runs |= {name: (run, entrants[0].clear) for name, run in parts.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            run, clear = runs[name]
            clear()
            elapsed = seconds(run)
            clear()
            if turn:  # the first turn warms up
                samples[name].append(elapsed)
    for name, entry in found.items():
        entry["seconds"] = samples.get(name, [])
    mask = inputs["completion_mask"]
    return {
        "size": size._asdict(),
        "beta": beta,
        "counted": int(mask.sum()),
        "with_signal": int(mask[inputs["advantages"] != 0].sum()),
        "contenders": found,
        "parts": {name: samples[name] for name in parts},
        **judge(found),
        **({} if size == Size() and beta == 0.0 else {"target": None, "met": None}),
    }


def judge(found: dict[str, dict]) -> dict:
    """{"ratios": {name: of TRL's time}, "met": whether rlloss's default mode reaches the target; None: no number}."""
    median = {name: statistics.median(entry["seconds"]) for name, entry in found.items() if entry.get("seconds")}
    ratios = {name: value / median["TRL"] for name, value in median.items()} if "TRL" in median else {}
    ours = next((ratios[name] for name in ("rlloss forward_only", "rlloss") if name in ratios), None)
    return {"ratios": ratios, "target": TARGET, "met": None if ours is None else ours <= TARGET}


def _times(values: list[float]) -> str:
    low, median, high = (1e3 * x for x in statistics.quantiles(values, n=4, method="inclusive"))
    return f"{median:.4g} [{low:.4g}, {high:.4g}]"


def markdown(report: dict) -> str:
    where, found = report["conditions"], report["result"]
    size = Size(**found["size"])
    lines = [
        sentence(where),
        "",
        f"Loss and backward of one micro-batch, fp32: {size.B} completions of {size.T} columns after {size.P} of "
        f"prompt, {found['counted']} tokens count, {found['with_signal']} of them in a group with a signal, "
        f"top_entropy_quantile {RHO}, beta {found['beta']:g}; a Llama of {size.layers} layers, D {size.D}, V {size.V}. "
        "Products: of rlloss's lm_head, in logits of all tokens that it was given. Errors against TRL: loss, gradient, "
        "the parameter and the metric furthest off. Memory: the peak above model and batch, gradients included.",
        "",
        "| | median ms [quartiles] | of TRL's time | peak memory | products | errors |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in found["contenders"].items():
        if entry["status"] != "measured":
            lines.append(f"| {name} | {entry['status']} | | | | |")
            continue
        errors = ", ".join(f"{error:.0e}" for error in entry["errors"].values())
        units = f"{entry['units']:.2f}" if entry["units"] else ""
        memory = f"{entry['peak_bytes'] / 2**20:.0f} MiB"
        lines.append(
            f"| {name} | {_times(entry['seconds'])} | {found['ratios'][name]:.3f} | {memory} | {units} | {errors} |"
        )
    lines += [f"| {name} | {_times(values)} | | | | |" for name, values in found["parts"].items()]
    if found["target"] is not None:
        verdict = {None: "not measured", True: "met", False: "missed"}[found["met"]]
        lines += ["", f"Target: at most {found['target']} of TRL's time with rlloss's defaults: {verdict}."]
    lines += ["", *(f"- {note}." for note in NOTES)]
    return "\n".join(lines) + "\n"


@functools.cache
def _prepared(size: Size) -> tuple[dict[str, Contender], dict, Result]:
    entrants, inputs = contenders(size), make_batch(size)
    return {c.name: c for c in entrants}, inputs, entrants[0].result(inputs)


@pytest.mark.parametrize("name", ["TRL", "TRL, patch_trl()", *(f"rlloss {mode}" for mode in MODES)])
def test_step(benchmark, name):
    entrants, inputs, expected = _prepared(Size())
    contender = entrants[name]
    entry = Size()._asdict() | {"dtype": "float32"} | examine(contender, inputs, None if name == "TRL" else expected)
    assert not entry["status"].startswith("wrong"), entry["status"]
    step = functools.partial(contender.step, inputs)
    under_pytest(benchmark, "an update step", entry, step, setup=contender.clear, rounds=20 if CUDA else 5)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="Time an update step of rlloss's GRPOTrainer against TRL's, in turns.")
    parser.add_argument("--rounds", type=int, default=20 if CUDA else 9, help="samples of each (default %(default)s)")
    for name, default in Size()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default %(default)s)")
    parser.add_argument("--beta", type=float, default=0.0, help="of the KL (default %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--name", default="step", help="of the files written (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds: found {options.rounds}, expected at least 2")
    refuse_interpreter()
    size = Size(*(getattr(options, name) for name in Size._fields))
    report: dict = {"conditions": conditions(options.rounds), "result": compare(size, options.rounds, options.beta)}
    report["conditions"]["load_after"] = conditions(options.rounds)["load"]
    folder = options.out / report["conditions"]["slug"]
    replace_file(folder / f"{options.name}.json", json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    replace_file(folder / f"{options.name}.md", text)
    if importlib.util.find_spec("matplotlib"):
        draw_step(report, folder / f"{options.name}.svg")
    print(text)
    return report


if __name__ == "__main__":
    main()
