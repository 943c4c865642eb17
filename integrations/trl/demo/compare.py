"""Run `rlloss demo --full`: compare every remedy with plain GRPO, over several seeds.

Each seed has its own data, warm start and sampling. Within a seed all arms start from the same weights and prompts, so
each arm is compared with plain GRPO of the same seed. Results are stored: an interrupted comparison continues where it
stopped.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table as TerminalTable

from rlloss import __version__, report
from rlloss.entropy.temperature import DynamicTemperature, entropy_temperature
from rlloss.integrations.trl.demo import task
from rlloss.integrations.trl.demo.arms import (
    ARMS,
    PERCENTILE_80,
    REMEDIES,
    ArmResult,
    ArmSpec,
    start_and_end,
    what_never_acted,
)
from rlloss.integrations.trl.demo.run import (
    HELD_OUT_SAMPLES,
    REWARD_METRICS,
    WARM_START_STEPS,
    ShowProgress,
    Student,
    one_thread,
    plotted,
    progress_bars,
    quiet,
    train_arm,
)
from rlloss.tokens.masks import completion_mask, entropy_cutoff

BASE = ARMS[0]
PANELS = (
    report.Panel("entropy", "Entropy", "nats per token", low=0.0),
    report.Panel("entropy/p80", "Entropy, 80th percentile", "nats", low=0.0),
    report.Panel("rewards/answer_right/mean", "Reward: answer right", "share of completions", low=0.0, high=1.0),
    report.Panel("rewards/format_right/mean", "Reward: format right", "share of completions", low=0.0, high=1.0),
    report.Panel("cov/logp_advantage", "Cov(log-probability, advantage)", "nats"),
    report.Panel("rlloss/live_share", "Live: loss gradient not zero", "share of tokens", low=0.0, high=1.0),
)
# Two-sided 95 % points of Student's t by degrees of freedom. Beyond the table the normal distribution is close enough.
_T95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Difference(NamedTuple):
    """Difference of an arm to plain GRPO: mean over seeds, standard error, and whether the 95 % interval excludes 0."""

    mean: float
    error: float
    distinct: bool


def difference(values: Sequence[float], base: Sequence[float]) -> Difference:
    """Compute the paired difference, seed by seed. With one seed the error is unknown and nothing is distinct."""
    paired = [a - b for a, b in zip(values, base, strict=True)]
    mean, n = statistics.fmean(paired), len(paired)
    if n < 2:
        return Difference(mean, math.nan, False)
    error = statistics.stdev(paired) / math.sqrt(n)
    return Difference(mean, error, abs(mean) > (_T95[n - 1] if n <= len(_T95) else 1.96) * error)


def chosen(names: Sequence[str] | None) -> list[ArmSpec]:
    """Return the arms with these names, or all for None. Plain GRPO always comes first."""
    known = {arm.name: arm for arms in REMEDIES.values() for arm in arms}
    for name in names or ():
        if name not in known and name != BASE.name:
            raise ValueError(f"arms: found {name!r}, expected some of {', '.join(map(repr, known))}")
    return [BASE, *(arm for name, arm in known.items() if names is None or name in names)]


def run_comparison(
    output_dir: str | Path = "rlloss_demo",
    *,
    steps: int = 300,
    seeds: int = 3,
    arms: Sequence[str] | None = None,
    warm_start_steps: int = WARM_START_STEPS,
    held_out_samples: int = HELD_OUT_SAMPLES,
    console: Console | None = None,
) -> dict[str, list[ArmResult]]:
    """Train every arm with every seed, print a table, and write ``comparison.html``, ``.md`` and ``.json``.

    Returns the results of each arm by seed. `arms`: names of arms in `REMEDIES`; None: all. A result in
    ``output_dir/seed-0/<arm>.json`` with the same settings and versions is reused.
    """
    for name, value in (("steps", steps), ("seeds", seeds)):
        if value < 1:
            raise ValueError(f"{name}: found {value}, expected at least 1")
    specs, console, output = chosen(arms), console or Console(), report.make_folder(output_dir)
    versions = {"rlloss": __version__} | {name: version(name) for name in ("torch", "trl", "transformers")}
    settings = {"steps": steps, "warm_start_steps": warm_start_steps, "held_out_samples": held_out_samples}
    results: dict[str, list[ArmResult]] = {spec.name: [] for spec in specs}
    began = time.perf_counter()
    with one_thread(), quiet(), progress_bars(console) as progress:
        for seed in range(seeds):
            start: _Start | None = None
            for spec in specs:
                file = output / f"seed-{seed}" / f"{spec.name.replace(' ', '-')}.json"
                key = {"seed": seed, "options": spec.options, **settings, "versions": versions}
                found = _read(file, key)
                if found is None:
                    task = progress.add_task(f"{spec.name} {seed}", total=steps, note="warm start")
                    start = start or _Start(seed, warm_start_steps)
                    found = start.train(spec, steps, held_out_samples, output, ShowProgress(progress, task))
                    report.replace_file(file, json.dumps({"key": key, "result": vars(found)}, allow_nan=False))
                results[spec.name].append(found)
    seconds = time.perf_counter() - began
    command = f"rlloss demo --full --steps {steps} --seeds {seeds}"
    command += "" if arms is None else " --arms " + " ".join(f'"{name}"' for name in arms)
    _write(output, results, specs, settings | versions | {"seeds": seeds}, command)
    for table in tables(results):
        console.print(table.caption, style="dim", highlight=False)
        console.print(_for_terminal(table))
    console.print(f"{seconds:.0f} s. Report: {output / 'comparison.html'}")
    return results


class _Start:
    """The data and the warm-started weights of one seed."""

    def __init__(self, seed: int, warm_start_steps: int):
        self.seed = seed
        self.tokenizer = task.make_tokenizer()
        training, self.held_out = task.make_problems(seed=seed)
        self.dataset = task.make_dataset(training)
        self.model: Any = task.make_model(seed=seed)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        for _ in task.warm_start(self.model, self.tokenizer, training, steps=warm_start_steps, seed=seed):
            pass
        self.weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.cutoff = entropy_percentile(self.model, self.tokenizer, training[:128], seed=seed)

    def train(self, spec: ArmSpec, steps: int, samples: int, output: Path, callback) -> ArmResult:
        options, began = copy.deepcopy(spec.options), time.perf_counter()
        temperature = options.get("dynamic_temperature", {})
        if temperature.get("cutoff") == PERCENTILE_80:
            temperature["cutoff"] = round(self.cutoff, 4)
        self.model.load_state_dict(self.weights)
        student = Student(self.model, self.tokenizer, self.dataset)
        history, found = train_arm(student, options, steps, self.seed, output / "trainer", callback)
        warned = [f"step {finding.step}: {finding.kind}" for finding in found]
        seconds = time.perf_counter() - began
        scores = task.evaluate(self.model, self.tokenizer, self.held_out, samples=samples, seed=self.seed)
        inactive = what_never_acted(history, options)
        return ArmResult(spec.name, options, history, scores, seconds, inactive, warned)


@torch.no_grad()
def entropy_percentile(model: Any, tokenizer: Any, problems: list, *, seed: int, share: float = 0.2) -> float:
    """Sample completions of the problems, and return the entropy in nats that a `share` of their tokens exceeds."""
    model.eval()
    batch = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True).to(model.device)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        made = model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, output_logits=True,
            max_new_tokens=task.MAX_COMPLETION_LENGTH, return_dict_in_generate=True,
        )  # fmt: skip
    _, entropy = entropy_temperature(torch.stack(made.logits, dim=1), DynamicTemperature(low=1.0, high=1.0))
    ids = made.sequences[:, batch["input_ids"].shape[1] :]
    return entropy_cutoff(entropy, completion_mask(ids, tokenizer.eos_token_id), share).item()


def _read(file: Path, key: dict) -> ArmResult | None:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["key"] != json.loads(json.dumps(key)):
            return None
        result = ArmResult(**record["result"])
        result.held_out = {name: (mean, error) for name, (mean, error) in result.held_out.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # no result yet, or a file of another kind
        return None
    return result


def _of_seeds(results: list[ArmResult], of: str) -> list[float]:
    """Return one number per seed: a held-out score, or the mean of a metric over the last tenth of the steps."""
    if of in REWARD_METRICS.values():
        return [result.held_out[of][0] for result in results]
    return [start_and_end(result.history, of)[1] for result in results]


def tables(results: dict[str, list[ArmResult]]) -> list[report.Table]:
    """Make tables of held-out scores, of the end of training, and of whether each remedy acted."""
    held_out = {"answer right": ("answer_right", 3), "format right": ("format_right", 3)}
    training = {"entropy": ("entropy", 3), "its p80": ("entropy/p80", 3), "live share": ("rlloss/live_share", 2)}
    seeds = len(results[BASE.name])
    acted = [
        [name, _union(of_arm, "inactive") or "none", _first_warnings(of_arm) or "none"]
        for name, of_arm in results.items()
    ]
    return [
        _compared(
            results, held_out,
            f"On held-out prompts. Mean ± standard deviation over {seeds} seeds. The difference to plain GRPO is "
            "paired by seed, and marked * where its 95 % interval leaves out 0; all else is not distinguishable. No "
            "correction for so many comparisons.",
        ),
        _compared(
            results, training,
            "The last tenth of the steps, in the same way. Entropies in nats, those of the dynamic temperature at the "
            "temperatures that sampled.",
        ),
        report.Table(
            ["arm", "inactive parts", "warnings of the monitor"], acted,
            "Whether each remedy acted; and the step of each first warning, seed by seed (-: none).",
        ),
    ]  # fmt: skip


def _compared(results: dict[str, list[ArmResult]], columns: dict[str, tuple[str, int]], caption: str) -> report.Table:
    header, rows = ["arm"], []
    for title in columns:
        header += [title, "to plain"]
    for name, of_arm in results.items():
        row = [name]
        for metric, digits in columns.values():
            values = _of_seeds(of_arm, metric)
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            row.append(f"{statistics.fmean(values):.{digits}f}{spread}")
            d = difference(values, _of_seeds(results[BASE.name], metric))
            row.append("" if name == BASE.name else f"{d.mean:+.{digits}f}{' *' if d.distinct else ''}")
        rows.append(row)
    return report.Table(header, rows, caption)


def _union(results: list[ArmResult], field: str) -> str:
    return "; ".join(", ".join(getattr(result, field)) for result in results if getattr(result, field))


def _first_warnings(results: list[ArmResult]) -> str:
    """List each kind of warning with its first step in every seed. A warning reads "step 22: entropy_collapse"."""
    first: list[dict[str, str]] = []
    for result in results:
        of_seed: dict[str, str] = {}
        for warning in result.warnings:
            step, kind = warning.removeprefix("step ").split(": ", 1)
            of_seed.setdefault(kind, step)
        first.append(of_seed)
    kinds = dict.fromkeys(kind for of_seed in first for kind in of_seed)
    return "; ".join(f"{kind} {', '.join(of_seed.get(kind, '-') for of_seed in first)}" for kind in kinds)


def mean_curve(histories: Sequence[Sequence[dict[str, float | None]]], metric: str) -> list[float | None]:
    """Mean over seeds at each step. None where a seed has no value."""
    curves = zip(*(plotted(history, metric) for history in histories), strict=True)
    return [None if any(v is None for v in at) else statistics.fmean(at) for at in curves]  # type: ignore[type-var]


def _write(output: Path, results: dict, specs: list[ArmSpec], conditions: dict, command: str) -> None:
    about = {spec.name: spec for spec in specs}
    arms = []
    for name, of_arm in results.items():
        inactive = _union(of_arm, "inactive")
        settings = {k: v for k, v in of_arm[0].options.items() if BASE.options.get(k) != v} or of_arm[0].options
        arms.append(
            report.Arm(
                name,
                [float(i + 1) for i in range(len(of_arm[0].history))],
                {panel.key: mean_curve([result.history for result in of_arm], panel.key) for panel in PANELS},
                settings=", ".join(f"{key} {value}" for key, value in settings.items())
                + (f" ({about[name].about})" if about[name].about else ""),
                note=f"inactive: {inactive}" if inactive else "",
            )
        )
    groups = [
        (title, [BASE.name, *(spec.name for spec in of_group if spec.name in results)])
        for title, of_group in REMEDIES.items()
    ]
    seconds = sum(result.seconds for of_arm in results.values() for result in of_arm)
    paragraphs = [
        "A Llama of 0.5 million parameters, warm-started on imperfect arithmetic text, trained by GRPO with real "
        "generation. Two rewards: the number is the answer, and the completion is well formed. A seed has its own "
        "data, warm start and sampling; within it all arms start from the same weights with the same prompts. 64 "
        "completions a step, 8 per prompt, 8 updates per generation, learning rate 2e-4. Curves are means over seeds.",
        "It shows that the parts act and what they do to this model; it is no evidence about large ones, for which the "
        "papers claim their gains.",
        ", ".join(f"{k} {v}" for k, v in conditions.items()) + f"; {seconds:.0f} s of training on one thread.",
    ]
    report.write_report(
        output / "comparison.html", arms, panels=PANELS, title="Remedies against plain GRPO",
        tables=tables(results), paragraphs=paragraphs, command=command,
        groups=[(title, names) for title, names in groups if len(names) > 1],
    )  # fmt: skip
    record = {
        "command": command, "conditions": conditions, "seconds": seconds,
        "arms": {
            name: {
                "options": of_arm[0].options,
                "seeds": [
                    {"held_out": r.held_out, "end": {p.key: _json(_of_seeds([r], p.key)[0]) for p in PANELS},
                     "inactive": r.inactive, "warnings": r.warnings, "seconds": r.seconds}
                    for r in of_arm
                ],
            }
            for name, of_arm in results.items()
        },
    }  # fmt: skip
    text = "\n\n".join(f"{table.caption}\n\n{markdown(table)}" for table in tables(results))
    report.replace_file(output / "comparison.md", f"`{command}`; {paragraphs[-1]}\n\n{text}\n")
    report.replace_file(output / "comparison.json", json.dumps(record, indent=1, allow_nan=False))


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _for_terminal(table: report.Table) -> TerminalTable:
    shown = TerminalTable()
    for number, name in enumerate(table.header):
        shown.add_column(name, justify="right" if number else "left")
    for row in table.rows:
        shown.add_row(*row)
    return shown


def markdown(table: report.Table) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(table.header) + " |", "|---|" + "---:|" * (len(table.header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in table.rows])
