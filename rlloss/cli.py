"""The command line `rlloss`. It imports torch and other heavy modules only when a command needs them."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

NEEDED = ("trl", "transformers", "datasets", "accelerate", "tokenizers", "packaging", "yaml", "rich")
"""Modules that `demo` and `train` import beyond rlloss itself. The extra [trl] installs them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 success, 1 a library is missing or does not fit, 2 bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:  # TRL parses its options, --help included
        return _train(argv[1:])
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "demo":
        return _demo(arguments)
    if arguments.command == "report":
        return _report(arguments)
    if arguments.command == "plan":
        return _plan(arguments)
    if arguments.command == "doctor":
        from rlloss.doctor import doctor

        found = doctor(benchmark=not arguments.no_benchmark)
        print(found)
        return 0 if found.ok else 1
    parser.print_help()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlloss", description="Losses for RL post-training of language models.")
    parser.add_argument("--version", action="version", version=f"rlloss {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a tiny model by GRPO, plain and with remedies, and report what was measured",
        description="Train a tiny model on arithmetic by GRPO with real generation, plain and with remedies, and write "
        "a report that opens offline. Fetches nothing.",
    )
    demo.add_argument("--quick", action="store_true", help="half the steps of everything")
    demo.add_argument("--steps", type=_positive, help="optimizer steps per arm (default: 120, with --full 300)")
    demo.add_argument(
        "--full", action="store_true",
        help="every remedy against plain GRPO over several seeds; goes on where it was interrupted (about 15 minutes)",
    )  # fmt: skip
    demo.add_argument("--seeds", type=_positive, help="with --full, how many (default: 3)")
    demo.add_argument("--arms", nargs="+", metavar="ARM", help="with --full, these remedies (default: all)")
    demo.add_argument("--seed", type=int, help="of weights, data and sampling (default: 0); --full has several")
    demo.add_argument("--output", default="rlloss_demo", help="directory to write to (default: %(default)s)")
    commands.add_parser(
        "train",
        help="train your own model by GRPO; train --init prints a YAML file to start from",
        add_help=False,
    )
    plan = commands.add_parser(
        "plan",
        help="say what the lm_head of a model costs, from its config.json alone",
        description="What the lm_head of a model costs in a micro-batch: matrix products and logits held, of rlloss's "
        "plans, plain logits, TRL's and Liger's heads. Reads the config alone, no weights.",
    )
    plan.add_argument("model", metavar="MODEL_OR_CONFIG", help="config.json, a folder that has one, or a Hub id")
    plan.add_argument("--completions", type=_positive, default=16, help="of a micro-batch (default: %(default)s)")
    plan.add_argument("--tokens", type=_positive, default=1024, help="columns of a completion (default: %(default)s)")
    plan.add_argument("--rho", type=float, default=1.0, help="share of the tokens with a gradient (default: 1)")
    plan.add_argument("--fill", type=float, default=1.0, help="share of the columns that count (default: 1)")
    plan.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32 (default: %(default)s)")
    plan.add_argument("--lora", action="store_true", help="the head is not trained")
    plan.add_argument(
        "--memory_budget",
        metavar="SIZE",
        help='that a plan may take, such as "1GiB" (default: a third of plain logits)',
    )
    plan.add_argument("--device", default="cuda", help="cuda or cpu: whose tiles (default: %(default)s)")
    plan.add_argument("--json", action="store_true", help="print it as JSON")
    doctor = commands.add_parser(
        "doctor",
        help="look whether this machine and its libraries fit, and say what to do if not",
        description="Versions, device and backend, results against fp64, and a benchmark of ten seconds. The exit "
        "status is 1 if something is wrong; what to do stands below it.",
    )
    doctor.add_argument("--no-benchmark", action="store_true", help="leave the benchmark out")
    report = commands.add_parser(
        "report",
        help="make one HTML page of a training run: metrics, and completions coloured by entropy",
        description="Make one HTML page, which opens offline, of the folder of a training run: the plots of "
        "metrics.jsonl, the tokens of highest entropy, and the completions of tokens/*.jsonl token by token.",
    )
    report.add_argument(
        "run_dir", metavar="RUN_DIR", nargs="+",
        help="folder with tokens/*.jsonl, metrics.jsonl or trainer_state.json; several are drawn over one another",
    )  # fmt: skip
    report.add_argument("--output", metavar="FILE", help="page to write (default: report.html in the first RUN_DIR)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}, expected at least 1")
    return value


def _version() -> str:
    from rlloss import __version__

    return __version__


def _missing(command: str) -> bool:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f'rlloss {command}: error: not installed: {", ".join(missing)}. pip install "rlloss[trl]"', file=sys.stderr
        )
    return bool(missing)


def _demo(arguments: argparse.Namespace) -> int:
    if _missing("demo"):
        return 1
    if arguments.quick and (arguments.full or arguments.steps):
        print("rlloss demo: error: --quick: found --full or --steps beside it, expected neither", file=sys.stderr)
        return 2
    ignored = {"--seed": arguments.seed} if arguments.full else {"--seeds": arguments.seeds, "--arms": arguments.arms}
    for option, value in ignored.items():
        if value is not None:
            where = "with" if arguments.full else "without"
            print(f"rlloss demo: error: {option}: found {value}, expected none {where} --full", file=sys.stderr)
            return 2
    try:
        if arguments.full:
            from rlloss.integrations.trl.demo.compare import run_comparison

            run_comparison(
                arguments.output, steps=arguments.steps or 300, seeds=arguments.seeds or 3, arms=arguments.arms
            )
        else:
            from rlloss.integrations.trl.demo.run import QUICK, run_demo

            sizes: dict[str, Any] = QUICK if arguments.quick else {"steps": arguments.steps or 120}
            run_demo(arguments.output, seed=arguments.seed or 0, **sizes)
    except ValueError as error:
        if not arguments.full:
            raise
        print(f"rlloss demo: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"rlloss demo: error: --output: found {error.filename!r}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _train(argv: Sequence[str]) -> int:
    from rlloss.integrations.trl.train_help import USAGE, one_screen, template

    asked = next((argv[i : i + 2] for i, word in enumerate(argv) if word in ("-h", "--help", "--init")), [])
    if asked[:1] == ["--init"]:
        return _write_template(template(), *asked[1:])
    if asked and asked[1:] != ["all"]:
        print(one_screen())
        return 0
    if _missing("train"):
        return 1
    from rlloss.integrations.trl.train import UserError, run
    from rlloss.integrations.trl.train_options import everything

    if asked:
        print(everything())
        return 0
    try:
        run(argv)
    except UserError as error:
        print(f"usage: {USAGE}\nrlloss train: error: {error}", file=sys.stderr)
        return 2
    return 0


def _write_template(text: str, file: str | None = None) -> int:
    if file is None:
        print(text, end="")
        return 0
    if file.startswith("-"):
        print(f"rlloss train: error: --init: found {file!r}, expected a file, or nothing behind it", file=sys.stderr)
        return 2
    try:
        with open(file, "x", encoding="utf-8") as opened:
            opened.write(text)
    except OSError as error:
        print(f"rlloss train: error: --init: found {file!r}: {error.strerror}", file=sys.stderr)
        return 2
    print(file)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    import json

    from rlloss.plan import head_costs

    try:
        found = head_costs(
            arguments.model, completions=arguments.completions, tokens=arguments.tokens, rho=arguments.rho,
            fill=arguments.fill, dtype=arguments.dtype, frozen_head=arguments.lora,
            memory_budget=arguments.memory_budget, device=arguments.device,
        )  # fmt: skip
    except OSError as error:
        print(f"rlloss plan: error: model: {error.strerror}: {error.filename}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"rlloss plan: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.to_dict(), indent=1) if arguments.json else found)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from rlloss.report.run_report import write_run_report

    try:
        folders = arguments.run_dir
        path = write_run_report(folders if len(folders) > 1 else folders[0], arguments.output)
    except (OSError, ValueError) as error:
        print(f"rlloss report: error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
