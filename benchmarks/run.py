"""Run all benchmarks with one command: correctness tests, then the suite against its peers, then tables and plots.

    python -m benchmarks.run [--quick] [--minutes 8] [--models ...] [--dtypes ...] [--rounds 30] [--tests PATH ...]

The command writes a JSON file for each suite, summary.md and plots to benchmarks/results/<device>/. If a test fails,
nothing is measured. Cells that do not fit the time budget are reported as "not measured". The budget excludes tests.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import suite
from benchmarks.harness.conditions import commit, conditions
from benchmarks.harness.shapes import DEFAULT_MODELS, FILLS, FIRST_RHOS, MODELS, QUICK_MODELS, RHOS
from benchmarks.harness.timing import CUDA, DEVICE, LEAST, Budget, refuse_interpreter
from benchmarks.report import summary as report
from rlloss.report import replace_file

ROOT = Path(__file__).resolve().parents[1]
# Tests of the code that is timed.
TESTS = [
    "tests/benchmarks/test_hidden.py", "tests/lm_head", "tests/logits", "tests/losses/test_losses.py",
    "tests/losses/test_loss_properties.py", "tests/losses/test_token_pass.py",
]  # fmt: skip
MINUTES = {"cuda": 8.0, "cpu": 20.0}
QUICK_MINUTES = {"cuda": 2.0, "cpu": 5.0}
DTYPES = {"cuda": ["bfloat16"], "cpu": ["float32", "bfloat16"]}


def _pytest(*arguments: str) -> tuple[list[str], subprocess.CompletedProcess]:
    command = ["pytest", "-q", "-p", "no:benchmark", *arguments]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]
    return command, subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)


def run_tests(paths: list[str] | None) -> dict[str, Any] | None:
    """Return {"command", "summary", "seconds"} if all tests pass. Otherwise print the failures and return None.

    paths: None: TESTS, and on a GPU all GPU tests.
    """
    runs = [_pytest(*(paths or TESTS))]
    if CUDA and paths is None and runs[0][1].returncode == 0:
        runs.append(_pytest("-m", "gpu", "tests"))
    for command, found in runs:
        if found.returncode != 0:
            lines = found.stdout.splitlines()
            start = next((i for i, line in enumerate(lines) if "short test summary" in line), max(0, len(lines) - 30))
            print("\n".join(lines[start:]), found.stderr[-3000:], file=sys.stderr)
            print(
                f"{' '.join(command)} ended with {found.returncode}, expected 0: nothing is measured", file=sys.stderr
            )
            return None
    return {
        "command": " && ".join(" ".join(command) for command, _ in runs),
        "summary": "; ".join(found.stdout.strip().splitlines()[-1].strip("= ") for _, found in runs),
    }


def save(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, with each list of numbers on one line."""
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[\s+([-+.\de]+(?:,\s+[-+.\de]+)*)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    replace_file(path, text + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Test, then time rlloss against its peers, then report.")
    parser.add_argument("--quick", action="store_true", help="a few minutes: few models, rho 0.2 and 1, no padding")
    parser.add_argument("--minutes", type=float, help=f"that measuring may take (default {MINUTES[DEVICE.type]:g})")
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], default=DTYPES[DEVICE.type])
    parser.add_argument("--rhos", nargs="+", type=float)
    parser.add_argument("--fills", nargs="+", type=float)
    parser.add_argument("--suites", nargs="+", choices=list(suite.SUITES), default=list(suite.SUITES))
    parser.add_argument("--rounds", type=int, default=30, help="at most so many samples of each (default %(default)s)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile takes part (%(default)s)"
    )
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="run before, instead of the tests of what is timed")
    parser.add_argument("--commit", help="of a checkout without git")
    parser.add_argument("--note", help="what else there is to say about the conditions")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    if options.rounds < LEAST:
        parser.error(f"--rounds: found {options.rounds}, expected at least {LEAST}")
    if options.minutes is not None and not (math.isfinite(options.minutes) and options.minutes >= 0):
        parser.error(f"--minutes: found {options.minutes}, expected 0 or more")
    for name in ("rhos", "fills"):
        if wrong := [x for x in getattr(options, name) or [] if not 0 < x <= 1]:
            parser.error(f"--{name}: found {wrong[0]:g}, expected above 0 and at most 1")
    if options.commit and commit() is not None:
        parser.error(f"--commit: found {options.commit}, expected none where git knows it: {commit()}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Return 0, or 1 if a test failed, or if rlloss gave a wrong result or raised."""
    options = parse(arguments)
    refuse_interpreter()
    tests = run_tests(options.tests)
    if tests is None:
        return 1
    device = DEVICE.type
    models = options.models or (QUICK_MODELS if options.quick else DEFAULT_MODELS)[device]
    rhos = options.rhos or (FIRST_RHOS if options.quick else RHOS)
    fills = options.fills or ([1.0] if options.quick else FILLS)
    minutes = options.minutes if options.minutes is not None else (QUICK_MINUTES if options.quick else MINUTES)[device]
    wanted = suite.cells(options.suites, models, options.dtypes, rhos, fills)
    where = conditions() | {"tests": tests, "minutes": minutes, "note": options.note}
    where["commit"] = options.commit or where["commit"]
    folder = options.out / where["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    notes = {name: suite.SUITES[name].notes(options.compile) for name in dict.fromkeys(cell.suite for cell in wanted)}

    def done(results: list[dict[str, Any]]) -> None:
        where["load_after"] = conditions()["load"]
        for name, of in notes.items():
            own = [result for cell, result in zip(wanted, results, strict=True) if cell.suite == name]
            save(report.file_of(folder, name), {"conditions": where, "notes": of, "results": own})

    begin = time.monotonic()
    results = suite.run(wanted, Budget(minutes), options.rounds, options.compile, done)
    where["took_s"] = round(time.monotonic() - begin)
    done(results)
    print(report.write(folder))
    bad = suite.failures(results)
    print("\n".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
