"""Run `rlloss demo`: GRPO with real generation through TRL, on a policy small enough for two CPU cores.

After one warm start, each arm trains from the same weights with the same seed and prompts: plain GRPO, and GRPO with
three remedies against early loss of entropy. The report shows the measurements, whichever arm is better.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as TerminalTable
from transformers import TrainerCallback

from rlloss import __version__, report
from rlloss.integrations.transformers.collapse_monitor import CollapseMonitor, Finding
from rlloss.integrations.trl import GRPOConfig, GRPOTrainer
from rlloss.integrations.trl.demo import task
from rlloss.integrations.trl.demo.arms import ARMS as ARMS
from rlloss.integrations.trl.demo.arms import ArmResult as ArmResult
from rlloss.integrations.trl.demo.arms import ArmSpec as ArmSpec
from rlloss.integrations.trl.demo.arms import start_and_end as start_and_end
from rlloss.integrations.trl.demo.arms import verdict as verdict
from rlloss.integrations.trl.demo.arms import what_never_acted as what_never_acted
from rlloss.integrations.trl.run_summary import RunSummary
from rlloss.report.run_report import write_run_report

WARM_START_STEPS, HELD_OUT_SAMPLES = 240, 8
LOGS = ("run.json", "metrics.jsonl", "findings.jsonl")
"""Files that a run appends to, in addition to those in tokens/."""
QUICK = {"steps": 60, "warm_start_steps": 120, "held_out_samples": 4}
STEPS_PER_GENERATION, NUM_ITERATIONS = 4, 2
UPDATES_PER_GENERATION = STEPS_PER_GENERATION * NUM_ITERATIONS
"""More than 1: with one update per generation every ratio is exactly 1 and no clip can act."""

REWARD_METRICS = {f"rewards/{reward.__name__}/mean": reward.__name__ for reward in task.REWARDS}


@dataclass
class DemoResult:
    report: Path
    history: Path
    arms: list[ArmResult]
    warm_start_held_out: dict[str, tuple[float, float]]
    seconds: dict[str, float]


def run_demo(
    output_dir: str | Path = "rlloss_demo",
    *,
    steps: int = 120,
    seed: int = 0,
    warm_start_steps: int = WARM_START_STEPS,
    held_out_samples: int = HELD_OUT_SAMPLES,
    arms: Sequence[ArmSpec] = ARMS,
    console: Console | None = None,
) -> DemoResult:
    """Warm-start a model, train and score every arm, print a table, and write ``report.html`` and ``history.json``.

    `steps`: optimizer steps per arm. `held_out_samples`: completions per held-out prompt. The demo runs on CUDA if
    available, otherwise on the CPU. It downloads nothing.
    """
    for name, value in (
        ("steps", steps),
        ("warm_start_steps", warm_start_steps),
        ("held_out_samples", held_out_samples),
    ):
        if value < 1:
            raise ValueError(f"{name}: found {value}, expected at least 1")
    if not arms:
        raise ValueError("arms: found none, expected at least one")
    console = console or Console()
    output = report.make_folder(output_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = task.make_tokenizer()
    training, held_out = task.make_problems(seed=seed)
    dataset = task.make_dataset(training)
    model: Any = task.make_model(seed=seed)
    model.to(device)
    results: list[ArmResult] = []
    began = time.perf_counter()
    with one_thread(), quiet(), progress_bars(console) as progress:
        bar = progress.add_task("warm start", total=warm_start_steps, note="")
        for loss in task.warm_start(model, tokenizer, training, steps=warm_start_steps, seed=seed):
            progress.update(bar, advance=1, note=f"loss {loss:.2f}")
        seconds = {"warm start": time.perf_counter() - began}
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        start_scores = task.evaluate(model, tokenizer, held_out, samples=held_out_samples, seed=seed)
        for arm in arms:
            bar = progress.add_task(arm.name, total=steps, note="")
            arm_began = time.perf_counter()
            model.load_state_dict(weights)
            callback = ShowProgress(progress, bar)
            result = ArmResult(arm.name, arm.options, [], {}, 0.0)
            folder = fresh_run_folder(output / result.folder)
            result.history, found = train_arm(
                Student(model, tokenizer, dataset), arm.options, steps, seed, folder, callback, max(1, steps // 4)
            )
            arm_seconds = time.perf_counter() - arm_began
            result.warnings = [f"Step {finding.step}: {finding.message}" for finding in found]
            result.held_out = task.evaluate(model, tokenizer, held_out, samples=held_out_samples, seed=seed)
            result.inactive, result.seconds = what_never_acted(result.history, arm.options), arm_seconds
            results.append(result)
            seconds[arm.name] = arm_seconds
    seconds["all"] = time.perf_counter() - began
    result = DemoResult(output / "report.html", output / "history.json", results, start_scores, seconds)
    command = f"rlloss demo --steps {steps} --seed {seed}"
    if arms is ARMS and {"steps": steps, "warm_start_steps": warm_start_steps,
                         "held_out_samples": held_out_samples} == QUICK:  # fmt: skip
        command = f"rlloss demo --quick --seed {seed}"
    elif (warm_start_steps, held_out_samples, arms) != (WARM_START_STEPS, HELD_OUT_SAMPLES, ARMS):
        command = (
            f"rlloss.integrations.trl.demo.run.run_demo(steps={steps}, seed={seed}, "
            f"warm_start_steps={warm_start_steps}, held_out_samples={held_out_samples}"
            f"{'' if arms is ARMS else ', arms=...'})"
        )
    _write(result, command, steps=steps, seed=seed, device=device, held_out=len(held_out), samples=held_out_samples)
    _print(result, console)
    return result


def fresh_run_folder(folder: Path) -> Path:
    """Remove the logs of an earlier demo from the folder, and return it. Other files stay."""
    report.make_folder(folder)
    for log in (*LOGS, *(folder / "tokens").glob("process-*.jsonl")):
        (folder / log).unlink(missing_ok=True)
    return folder


class Student(NamedTuple):
    """The model to train, with its tokenizer and dataset."""

    model: Any
    tokenizer: Any
    dataset: Any


def train_arm(
    student: Student, options, steps, seed, folder, callback, token_log_steps=0
) -> tuple[list[dict[str, float | None]], list[Finding]]:
    """Train the model in place. Return the metrics of each step, and the findings of the CollapseMonitor."""
    model, tokenizer, dataset = student
    monitor = CollapseMonitor()
    settings = {"loss_type": "dapo", **options}
    config = GRPOConfig(
        output_dir=str(folder),
        token_log_steps=token_log_steps,
        max_steps=steps,
        seed=seed,
        num_generations=8,
        per_device_train_batch_size=64,
        steps_per_generation=STEPS_PER_GENERATION,
        num_iterations=NUM_ITERATIONS,
        max_completion_length=task.MAX_COMPLETION_LENGTH,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        temperature=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        gradient_checkpointing=False,
        **settings,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=list(task.REWARDS),
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[callback, monitor],
    )
    for callback_class in (transformers.PrinterCallback, RunSummary):  # the demo prints its own progress
        trainer.remove_callback(callback_class)
    trainer.train()
    history = [_finite(row) for row in trainer.state.log_history if "entropy" in row]
    if options.get("top_entropy_quantile", 1.0) >= 1.0:
        for row in history:  # without a mask every token is kept
            row.setdefault("entropy/kept_share", 1.0)
    return history, monitor.findings


def _finite(row: dict[str, Any]) -> dict[str, float | None]:
    """The row with None for numbers that JSON cannot hold."""
    return {
        key: float(value) if value is not None and math.isfinite(value) else None
        for key, value in row.items()
        if value is None or isinstance(value, int | float)
    }


class ShowProgress(TrainerCallback):
    def __init__(self, progress: Progress, task) -> None:
        self.progress, self.task, self.rewards = progress, task, ""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "entropy" not in logs:
            return
        if all(logs.get(key) is not None for key in REWARD_METRICS):
            self.rewards = "".join(f"{n.split('_')[0]} {logs[key]:.2f}, " for key, n in REWARD_METRICS.items())
        note = f"{self.rewards}entropy {logs['entropy']:.2f}"
        self.progress.update(self.task, completed=state.global_step, note=note)


def progress_bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<12}"), BarColumn(bar_width=10), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}", style="dim"), console=console)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread inside this context. Small matrices gain nothing from more, and lose if the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers except for errors, the progress bars of datasets, and the warnings of both libraries."""
    verbosity, bars = transformers.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    monitor = logging.getLogger(CollapseMonitor.__module__)  # its findings are in the report
    level = monitor.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|trl|accelerate|datasets|torch)\.")
        transformers.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        monitor.setLevel(logging.ERROR)
        try:
            yield
        finally:
            monitor.setLevel(level)
            transformers.logging.set_verbosity(verbosity)
            if not bars:
                datasets.enable_progress_bars()


def _cell(pair: tuple[float, float], digits: int = 3) -> str:
    texts = ["not measured" if math.isnan(v) else f"{v:.{digits}f}" for v in pair]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} → {texts[1]}"


def _training_table(result: DemoResult) -> report.Table:
    rows = []
    for name, metric in (
        ("answer right", "rewards/answer_right/mean"),
        ("format right", "rewards/format_right/mean"),
        ("entropy (nats)", "entropy"),
        ("clipped below", "clip_ratio/low_mean"),
        ("clipped above", "clip_ratio/high_mean"),
        ("kept share", "entropy/kept_share"),
        ("live share", "rlloss/live_share"),
    ):
        rows.append([name, *(_cell(start_and_end(arm.history, metric)) for arm in result.arms)])
    rows.append(["seconds", *(f"{arm.seconds:.0f}" for arm in result.arms)])
    if any(arm.inactive for arm in result.arms):
        rows.append(["inactive", *(", ".join(arm.inactive) or "no" for arm in result.arms)])
    if any(arm.warnings for arm in result.arms):
        rows.append(["warnings of the monitor", *(str(len(arm.warnings)) for arm in result.arms)])
    caption = "In training: mean over the first tenth of the steps → mean over the last tenth."
    return report.Table(["metric", *(arm.name for arm in result.arms)], rows, caption)


def _held_out_table(result: DemoResult) -> report.Table:
    columns = [result.warm_start_held_out, *(arm.held_out for arm in result.arms)]
    rows = [
        [name.replace("_", " "), *(f"{scores[name][0]:.3f} ± {scores[name][1]:.3f}" for scores in columns)]
        for name in REWARD_METRICS.values()
    ]
    caption = "On held-out prompts, the same for all: mean ± standard error over prompts. One seed."
    return report.Table(["reward", "warm start", *(arm.name for arm in result.arms)], rows, caption)


def plotted(history: Sequence[dict[str, float | None]], metric: str) -> list[float | None]:
    """Return one value per step. The rewards of a generation hold for all steps that train on it."""
    values = [row.get(metric) for row in history]
    if metric in REWARD_METRICS:
        for i in range(1, len(values)):
            values[i] = values[i - 1] if values[i] is None else values[i]
    return values


def _write(
    result: DemoResult, command: str, *, steps: int, seed: int, device: torch.device, held_out: int, samples: int
) -> None:
    versions = {"rlloss": __version__} | {name: version(name) for name in ("torch", "trl", "transformers")}
    versions["python"] = platform.python_version()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread"
    timing = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    paragraphs = [
        "A Llama of 0.5 million parameters, warm-started on imperfect arithmetic text, was trained by GRPO with real "
        "generation, once per arm from the same weights with the same seed and prompts. Two rewards: the number is the "
        "answer (whatever surrounds it), and the completion is well formed (whatever the number).",
        f"{steps} optimizer steps per arm on 64 completions each, 8 completions per prompt, {UPDATES_PER_GENERATION} "
        f"updates per generation ({STEPS_PER_GENERATION} batches, {NUM_ITERATIONS} times each), learning rate 2e-4, "
        f"loss type dapo, temperature 1. Held-out scores: {held_out} prompts, {samples} samples each, seen by neither "
        "warm start nor training. Without an entropy mask the kept share is 1 by definition.",
        f"Seed {seed}. Seconds: {timing}. On {where}. " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".",
        "Every metric of every step is in history.json beside this file. To repeat:",
    ]
    write_run_report(
        [result.report.parent / arm.folder for arm in result.arms],
        result.report,
        title="rlloss demo: " + " against ".join(arm.name for arm in result.arms),
        found=[*verdict(result.arms), *findings(result.arms)],
        tables=[_held_out_table(result), _training_table(result)],
        paragraphs=paragraphs,
        command=command,
    )
    record = {
        "command": command,
        "versions": versions,
        "device": where,
        "seed": seed,
        "updates_per_generation": UPDATES_PER_GENERATION,
        "seconds": result.seconds,
        "warm_start_held_out": result.warm_start_held_out,
        "arms": [vars(arm) for arm in result.arms],
    }
    report.replace_file(result.history, json.dumps(record, indent=1, allow_nan=False))


def findings(arms: Sequence[ArmResult]) -> list[str]:
    return [f"{arm.name}. {warning}" for arm in arms for warning in arm.warnings]


def _print(result: DemoResult, console: Console) -> None:
    for table in (_training_table(result), _held_out_table(result)):
        shown = TerminalTable()
        for number, name in enumerate(table.header):
            shown.add_column(name, justify="right" if number else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(table.caption, style="dim", highlight=False)
        console.print(shown)
    for sentence in [*verdict(result.arms), *findings(result.arms)]:
        console.print(sentence, highlight=False)
    console.print(f"{result.seconds['all']:.0f} s. Report: {result.report}  History: {result.history}")
