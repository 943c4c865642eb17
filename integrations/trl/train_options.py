"""Read the options of `rlloss train` from the command line and a YAML file, and check them."""

# TRL and transformers export their names lazily. Type checkers take such names for private.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import is_torch_bf16_gpu_available

from rlloss import checks
from rlloss.integrations.trl import GRPOConfig
from rlloss.integrations.trl.train_help import OPTIONS, USAGE
from trl import ModelConfig, TrlParser


class UserError(Exception):
    """An input of the user does not fit. The message says what was found and what was expected."""


class _Collect(argparse.Action):
    """Collects ``--reward a --reward b c`` as [a, b, c]. The command line replaces the value of a config file."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = getattr(namespace, self.dest, None)
        given = [] if given is self.default or given is None else given
        setattr(namespace, self.dest, [*given, *(values if isinstance(values, list) else [str(values)])])


@dataclass
class TrainArguments:
    """The model, the dataset and the rewards of a run. GRPOConfig has the other options."""

    model: str | None = field(
        default=None, metadata={"help": "Directory or Hub id of a causal language model with its tokenizer."}
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "A .jsonl, .json, .csv or .parquet file, a directory, or a Hub id. Needs a column 'prompt': a "
            "string, or a conversation (a list of {'role', 'content'}). Other columns go to the reward functions."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset, if it has several."}
    )
    reward: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Reward functions as module:function, one or more; modules are also looked up in the current "
            "directory. Called with completions=[...], prompts=[...] and the dataset's columns, they return one number "
            "(or None: not applicable) per completion.",
            "action": _Collect,
        },
    )


GROUPS: Any = (TrainArguments, GRPOConfig, ModelConfig)


def one_line(error: BaseException) -> str:
    """The message of an error on one line. The name of its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


class _Parser(TrlParser):
    def error(self, message: str):
        raise UserError(message)


def make_parser() -> _Parser:
    parser = _Parser(GROUPS, prog="rlloss train", usage=USAGE, allow_abbrev=False)
    if not is_torch_bf16_gpu_available():
        parser.set_defaults(bf16=False)  # this machine would refuse TRL's default
    return parser


def everything() -> str:
    """The text of `rlloss train --help all`: first the options in OPTIONS, then all others."""
    parser = make_parser()
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100)
    parser.add_argument("--config", metavar="FILE.yaml", help="Options as keys of a YAML file; the command line wins.")
    first = ["config", *(name for options in OPTIONS.values() for name in options)]
    for group in parser._action_groups:
        actions = group._group_actions
        actions.sort(key=lambda action: first.index(action.dest) if action.dest in first else len(first))
    return parser.format_help()


def parse(argv: Sequence[str]) -> tuple[TrainArguments, GRPOConfig, ModelConfig]:
    """Read the three groups of options from `argv` and from the YAML file after ``--config``.

    Raises:
        UserError: an option is unknown, missing or has a wrong value.
    """
    parser = make_parser()
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    known = [option.name for group in GROUPS for option in fields(group) if option.init]
    if "--config" in argv:
        at = argv.index("--config")
        argv, given = argv[:at] + argv[at + 2 :], argv[at + 1 : at + 2]
        if not given or given[0].startswith("--"):
            raise UserError("--config: found no file behind it, expected a YAML file")
        parser.set_defaults_with_config(**_read_settings(given[0], known, parser))
    for extra in parser.parse_known_args(argv)[1][:1]:
        if not extra.startswith("-"):
            raise UserError(f"{extra}: found a value without an option, expected one of `rlloss train --help`")
        raise UserError(_unknown(extra.lstrip("-").partition("=")[0].replace("-", "_"), known))
    try:
        with warnings.catch_warnings():  # transformers warns about TRL's defaults
            warnings.simplefilter("ignore", FutureWarning)
            arguments, config, model_config = parser.parse_args_into_dataclasses(args=argv)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(one_line(error)) from error
    if arguments.model and model_config.model_name_or_path:
        raise UserError("--model and --model_name_or_path: found both, expected one: they mean the same")
    if isinstance(arguments.reward, str):  # a YAML file with a single entry
        arguments.reward = [arguments.reward]
    arguments.model = arguments.model or model_config.model_name_or_path
    for option, value in (("--model", arguments.model), ("--dataset", arguments.dataset)):
        if not value:
            raise UserError(f"{option}: found none, expected one on the command line or in the --config file")
        if not isinstance(value, str):
            raise UserError(f"{option}: found {value!r}, expected one")
    if not isinstance(arguments.reward, list) or not all(isinstance(name, str) for name in arguments.reward):
        raise UserError(f"--reward: found {arguments.reward!r}, expected module:function, or a list of them")
    return arguments, config, model_config


def _read_settings(file: str, known: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the options of a YAML file. Its entry "env" is copied into the environment."""
    if not Path(file).is_file():
        raise UserError(f"--config: found no file {file!r} in {os.getcwd()}, expected a YAML file")
    try:
        settings = yaml.safe_load(Path(file).read_bytes())
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--config {file}: found no YAML: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {file}: found {type(settings).__name__}, expected a mapping of options to values")
    environment = settings.pop("env", {})
    if not isinstance(environment, dict):
        raise UserError(f"--config {file}: env: found {environment!r}, expected a mapping of names to values")
    types = {action.dest: action.type for action in parser._actions if action.nargs is None}
    for name, value in settings.items():
        if name not in known:
            raise UserError(f"--config {file}: {_unknown(name, known)}")
        if isinstance(value, list | dict) and types.get(name) in (int, float):
            raise UserError(f"--config {file}: {name}: found {value!r}, expected a number")
        if not isinstance(value, str | bool | list | dict | None):
            settings[name] = str(value)  # then checked and converted as on the command line
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return settings


def _unknown(name: object, known: Sequence[str]) -> str:
    return checks.unknown_option(name, known, ", expected one of `rlloss train --help all`")
