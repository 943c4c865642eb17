"""GRPO on the user's own model, prompts and reward functions, from the command line or a YAML file.

    rlloss train --model DIR_OR_ID --dataset prompts.jsonl --reward rewards:is_right --output_dir out
    accelerate launch -m rlloss.cli train --config train.yaml

Every field of GRPOConfig and of TRL's ModelConfig (LoRA, quantisation, dtype) is an option; the parser is TRL's, so a
YAML key is the option's name and the command line wins over the file.
"""

# TRL and transformers export their names lazily, which type checkers take for private.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from rlloss.integrations.trl_grpo import GRPOConfig, GRPOTrainer

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_TRUE, _FALSE = ("true", "last"), ("false", "none", "")


class UserError(Exception):
    """Something the user gave does not fit; the message says what was found and what was expected."""


class _Collect(argparse.Action):
    """``--reward a --reward b c`` is [a, b, c]; given at all, it replaces what a config file says."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = getattr(namespace, self.dest, None)
        given = [] if given is self.default or given is None else given
        setattr(namespace, self.dest, [*given, *(values if isinstance(values, list) else [str(values)])])


@dataclass
class TrainArguments:
    """What to train on; how to train is GRPOConfig."""

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


def load_reward(name: str) -> Callable[..., Any]:
    """The function called ``module:function``, with the current directory first on the import path.

    Raises UserError if `name` has another form, or the module, the attribute or its callability is missing. An error
    inside the module itself is passed on as it is.
    """
    module_name, separator, attribute = name.partition(":")
    if not (separator and module_name and attribute):
        raise UserError(f"--reward: found {name!r}, expected module:function, such as rewards:is_right")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only if the module that was asked for is the missing one, not something that it imports.
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise
        raise UserError(
            f"--reward {name}: no module {error.name!r}, expected one that is installed or a file in {here}"
        ) from None
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            functions = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
            raise UserError(
                f"--reward {name}: module {module_name!r} has no {attribute!r}, expected a function; it has "
                f"{', '.join(functions) or 'none'}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"--reward {name}: found {type(found).__name__}, expected a function")
    return found


def load_rewards(names: Sequence[str]) -> list[Callable[..., Any]]:
    """`load_reward` for each; function names must differ, because metrics are logged under them."""
    if not names:
        raise UserError("--reward: found none, expected at least one module:function")
    functions = [load_reward(name) for name in names]
    labels = [getattr(function, "__name__", repr(function)) for function in functions]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(
                f"--reward: found {labels.count(label)} functions named {label!r}, expected different names: metrics "
                "are logged as rewards/<name>/mean"
            )
    return functions


def load_prompts(source: str, *, split: str = "train", config: str | None = None) -> Dataset | IterableDataset:
    """The dataset at `source` (see TrainArguments.dataset), checked to have rows and a usable column ``prompt``."""
    path = Path(source)
    if path.suffix in FILE_FORMATS and not path.is_file():
        raise UserError(f"--dataset: found no file {source!r} in {os.getcwd()}, expected an existing file")
    if path.is_file() and path.suffix not in FILE_FORMATS:
        raise UserError(f"--dataset: found the file {source!r}, expected one of {', '.join(FILE_FORMATS)}")
    try:
        if path.is_file():
            dataset = load_dataset(FILE_FORMATS[path.suffix], data_files={split: str(path)}, split=split)
        else:
            dataset = load_dataset(source, name=config, split=split)
    except Exception as error:  # datasets raises many kinds; the cause is kept and named
        kind = "file" if path.is_file() else "directory" if path.is_dir() else "Hub id (there is no such file here)"
        raise UserError(f"--dataset {source}: this {kind} could not be read: {_one_line(error)}") from error
    _check_prompts(dataset, source)
    return dataset


def _check_prompts(dataset: Any, source: str) -> None:
    columns = dataset.column_names or []
    if "prompt" not in columns:
        raise UserError(f"--dataset {source}: found the columns {', '.join(columns)}, expected one named 'prompt'")
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise UserError(f"--dataset {source}: found no rows, expected at least one")
    prompts: Any = dataset["prompt"] if isinstance(dataset, Dataset) else ()  # a stream is read only once
    for number, prompt in enumerate(prompts):
        conversation = isinstance(prompt, list) and bool(prompt)
        if conversation and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in prompt):
            continue
        if not isinstance(prompt, str) or not prompt:
            raise UserError(
                f"--dataset {source}: row {number} has the prompt {str(prompt)[:60]!r}, expected a string or a list of "
                "{'role', 'content'}"
            )


def find_checkpoint(value: str | None, output_dir: str) -> str | None:
    """`--resume_from_checkpoint` as a path: "true" or "last" mean the newest checkpoint in `output_dir`."""
    if value is None or value.lower() in _FALSE:
        return None
    if value.lower() in _TRUE:
        last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if last is None:
            raise UserError(f"--resume_from_checkpoint {value}: found no checkpoint-* in --output_dir {output_dir}")
        return last
    if not (Path(value) / "trainer_state.json").is_file():
        raise UserError(
            f"--resume_from_checkpoint: found no trainer_state.json in {value!r}, expected a checkpoint-* directory, "
            "'last' or 'true'"
        )
    return value


def parse(argv: Sequence[str]) -> tuple[TrainArguments, GRPOConfig, ModelConfig]:
    """The three groups of options from `argv` and from the YAML file after ``--config``."""
    groups: Any = (TrainArguments, GRPOConfig, ModelConfig)
    parser = TrlParser(groups, prog="rlloss train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    if not is_torch_bf16_gpu_available():
        parser.set_defaults(bf16=False)  # TRL's default would be refused on this machine
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    config_file = next((b for a, b in zip(argv, argv[1:], strict=False) if a == "--config"), None)
    if config_file is not None and not Path(config_file).is_file():
        raise UserError(f"--config: found no file {config_file!r} in {os.getcwd()}, expected a YAML file")
    try:
        arguments, config, model_config = parser.parse_args_and_config(args=list(argv))
    except ValueError as error:
        raise UserError(_one_line(error)) from error
    if arguments.model and model_config.model_name_or_path:
        raise UserError("--model and --model_name_or_path: found both, expected one: they mean the same")
    if isinstance(arguments.reward, str):  # a YAML file with a single entry
        arguments.reward = [arguments.reward]
    arguments.model = arguments.model or model_config.model_name_or_path
    for option, value in (("--model", arguments.model), ("--dataset", arguments.dataset)):
        if not value:
            raise UserError(f"{option}: found none, expected one on the command line or in the --config file")
    return arguments, config, model_config


def run(argv: Sequence[str]) -> None:
    """Train as `argv` says, then save model and tokenizer to ``--output_dir``. Raises UserError for bad input."""
    arguments, config, model_config = parse(argv)
    assert arguments.model is not None and arguments.dataset is not None
    rewards = load_rewards(arguments.reward)
    with config.main_process_first(desc="reading the dataset"):
        dataset = load_prompts(arguments.dataset, split=arguments.dataset_split, config=arguments.dataset_config)
    assert config.output_dir is not None
    checkpoint = find_checkpoint(config.resume_from_checkpoint, config.output_dir)
    looks_local = arguments.model.startswith((".", "/", "~")) or arguments.model.count("/") > 1
    if looks_local and not Path(arguments.model).is_dir():
        raise UserError(f"--model: found no directory {arguments.model!r}, expected one with a model and its tokenizer")
    chosen = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
    }
    try:
        peft_config, quantization_config = get_peft_config(model_config), get_quantization_config(model_config)
    except (ImportError, ValueError) as error:  # a library that these options need, or two of them that exclude another
        raise UserError(_one_line(error)) from error
    given: Any = config.model_init_kwargs or {}
    config.model_init_kwargs = chosen | given
    try:
        trainer = GRPOTrainer(
            model=arguments.model,
            reward_funcs=rewards,
            args=config,
            train_dataset=dataset,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
    except OSError as error:  # how transformers says that there is no such model or tokenizer
        here = "" if Path(arguments.model).is_dir() else f"no such directory in {os.getcwd()}, and as a Hub id "
        raise UserError(f"--model {arguments.model}: {here}it could not be loaded: {_one_line(error)}") from error
    except ValueError as error:  # settings that exclude one another
        raise UserError(_one_line(error)) from error
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(config.output_dir)
    if config.push_to_hub:
        trainer.push_to_hub()
    accelerator = trainer.accelerator
    accelerator.print(f"Saved model and tokenizer to {config.output_dir}")
    # The model's DDP wrapper has to go before the process group: the last to hold the group joins gloo's thread, and
    # the wrapper would do that under the GIL, for which that thread may be waiting.
    del trainer
    accelerator.free_memory()
    accelerator.end_training()


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
