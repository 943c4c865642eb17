"""Run `rlloss train`: GRPO on your own model, prompts and reward functions, from the command line or a YAML file::

    rlloss train --model DIR_OR_ID --dataset prompts.jsonl --reward rewards:is_right --output_dir out
    torchrun --nproc_per_node 2 -m rlloss.cli train --config train.yaml

Every field of GRPOConfig and of TRL's ModelConfig (LoRA, quantisation, dtype) is an option. TRL's parser reads them: a
YAML key is the name of an option, and the command line overrides the file. All checks that do not need the model's
weights run before the weights are loaded.
"""

# TRL and transformers export their names lazily, which type checkers take for private.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset, load_dataset
from transformers import TrainerCallback

from rlloss.integrations.trl import GRPOConfig, GRPOTrainer
from rlloss.integrations.trl.checkpoints import what_is_wrong
from rlloss.integrations.trl.train_options import TrainArguments, UserError, one_line
from rlloss.integrations.trl.train_options import parse as parse
from rlloss.report import make_folder
from trl import ModelConfig, get_peft_config, get_quantization_config

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_TRUE, _FALSE = ("true", "last"), ("false", "none", "")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def load_reward(name: str) -> Callable[..., Any]:
    """Import the function ``module:function``, with the current directory first on the import path.

    Raises:
        UserError: `name` has another form, the module or the function is missing, or it is not callable. Errors inside
            the module are passed on unchanged.
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
        # Only if the requested module is missing, not a module that it imports.
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
    """Call `load_reward` for each name. The function names must differ, because metrics are logged under them."""
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
    """Load the dataset at `source` (see TrainArguments.dataset). It must have rows and a valid column ``prompt``."""
    path = Path(source)
    if path.suffix in FILE_FORMATS and not path.is_file():
        raise UserError(f"--dataset: found no file {source!r} in {os.getcwd()}, expected an existing file")
    if path.is_file() and path.suffix not in FILE_FORMATS:
        raise UserError(f"--dataset: found the file {source!r}, expected one of {', '.join(FILE_FORMATS)}")
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"--dataset {source}: found no rows, expected at least one")
    try:
        if path.is_file():
            dataset = load_dataset(FILE_FORMATS[path.suffix], data_files={split: str(path)}, split=split)
        else:
            dataset = load_dataset(source, name=config, split=split)
        problem = _wrong_prompt(dataset)
    except Exception as error:  # datasets raises many types; the message names the cause
        if path.suffix == ".jsonl" and (line := _wrong_line(path)) is not None:
            raise UserError(f"--dataset {source}: {line}") from error
        if "corresponds to no data" in str(error):
            raise UserError(f"--dataset {source}: found no rows, expected at least one") from error
        kind = "file" if path.is_file() else "directory" if path.is_dir() else "Hub id (there is no such file here)"
        cause = one_line(error.__cause__ or error)
        raise UserError(f"--dataset {source}: this {kind} could not be read: {cause}") from error
    if problem is not None:
        line = _wrong_line(path) if path.suffix == ".jsonl" and "prompt" in (dataset.column_names or []) else None
        raise UserError(f"--dataset {source}: {line or problem}")
    return dataset


PROMPT = "expected a string or a list of {'role', 'content'}"


def _wrong_prompt(dataset: Any) -> str | None:
    columns = dataset.column_names or []
    if "prompt" not in columns:
        return f"found the columns {', '.join(columns)}, expected one named 'prompt'"
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        return "found no rows, expected at least one"
    prompts: Any = dataset["prompt"] if isinstance(dataset, Dataset) else ()  # a stream can be read only once
    for number, prompt in enumerate(prompts):
        if not _is_prompt(prompt):
            return f"row {number} has the prompt {str(prompt)[:60]!r}, {PROMPT}"
    return None


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, list) and prompt:
        return all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in prompt)
    return isinstance(prompt, str) and bool(prompt)


def _wrong_line(path: Path) -> str | None:
    """Describe the first line of a .jsonl file that is not an object with a prompt. None: there is none."""
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            empty = False
            try:
                row = json.loads(line.decode("utf-8-sig").strip())
            except json.JSONDecodeError as error:
                return f"line {number} is not JSON: {error.msg} at column {error.colno}"
            except (ValueError, RecursionError) as error:
                return f"line {number} could not be read: {one_line(error)}"
            if not isinstance(row, dict):
                return f"line {number} holds {str(row)[:60]!r}, expected an object with a 'prompt'"
            if "prompt" not in row:
                return f"line {number} has {', '.join(row) or 'nothing'}, expected a 'prompt'"
            if not _is_prompt(row["prompt"]):
                return f"line {number} has the prompt {str(row['prompt'])[:60]!r}, {PROMPT}"
    return "found no rows, expected at least one" if empty else None


def find_checkpoint(value: str | None, output_dir: str) -> str | None:
    """Turn `--resume_from_checkpoint` into a path. "true", "last": the newest complete checkpoint in `output_dir`."""
    value = str(value)  # YAML has booleans
    if value.lower() in _FALSE:
        return None
    if value.lower() not in _TRUE:
        if (found := what_is_wrong(value)) is not None:
            raise UserError(
                f"--resume_from_checkpoint: found {found} in {value!r}, expected a complete checkpoint-* directory, "
                "'last' or 'true'"
            )
        return value
    names = [path.name for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    steps = sorted((int(match[1]) for match in map(_CHECKPOINT.fullmatch, names) if match), reverse=True)
    skipped = []
    for step in steps:
        path = os.path.join(output_dir, f"checkpoint-{step}")
        if (found := what_is_wrong(path)) is None:
            if skipped:
                why = ", ".join(skipped)
                print(f"rlloss train: resumes from checkpoint-{step}; skipped as not complete: {why}", file=sys.stderr)
            return path
        skipped.append(f"checkpoint-{step} ({found})")
    but = f"; not complete: {', '.join(skipped[:5])}{', ...' if len(skipped) > 5 else ''}" if skipped else ""
    whole = "complete checkpoint" if skipped else "checkpoint-*"
    raise UserError(f"--resume_from_checkpoint {value}: found no {whole} in --output_dir {output_dir}{but}")


class _WrittenOver(TrainerCallback):
    """Removes the last file of a checkpoint that this run overwrites, so that it is incomplete until it is written."""

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and state.is_world_process_zero:
            Path(str(args.output_dir), f"checkpoint-{state.global_step}", "trainer_state.json").unlink(missing_ok=True)

    on_epoch_end = on_step_end


def run(argv: Sequence[str]) -> None:
    """Train with the options in `argv`, then save model and tokenizer to ``--output_dir``.

    Raises:
        UserError: the input does not fit.
    """
    try:
        trainer, checkpoint = _prepare(*parse(argv))
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from error
    config = trainer.args
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(config.output_dir)
    if config.push_to_hub:
        trainer.push_to_hub()
    accelerator = trainer.accelerator
    accelerator.print(f"Saved model and tokenizer to {config.output_dir}")
    # Delete the model's DDP wrapper before the process group. The last owner of the group joins gloo's thread; the
    # wrapper would do so while it holds the GIL, for which that thread may wait: a deadlock.
    del trainer
    accelerator.free_memory()
    accelerator.end_training()


def _say_what_is_there(output_dir: str) -> None:
    """Tell the user if the output folder has logs of an earlier run: a run that is not resumed appends to them."""
    if Path(output_dir, "metrics.jsonl").exists() or any(Path(output_dir, "tokens").glob("*.jsonl")):
        print(
            f"rlloss train: {output_dir} has the logs of an earlier run. They are kept and this run is added; `rlloss "
            "report` shows the newest. Give another --output_dir to keep them apart.", file=sys.stderr,
        )  # fmt: skip


def _check_model_folder(folder: Path) -> None:
    names = [path.name for path in folder.iterdir()]
    missing = [
        what for what, there in (
            ("config.json", {"config.json", "adapter_config.json"} & set(names)),
            ("tokenizer", any(name.startswith(("tokenizer", "vocab", "spiece", "tekken")) for name in names)),
        ) if not there
    ]  # fmt: skip
    if missing:
        found = ", ".join(sorted(names)[:8]) or "nothing"
        raise UserError(f"--model {folder}: found {found}, expected a model with its {' and its '.join(missing)}")


def _prepare(
    arguments: TrainArguments, config: GRPOConfig, model_config: ModelConfig
) -> tuple[GRPOTrainer, str | None]:
    """Return the trainer, and the checkpoint to resume from or None."""
    assert arguments.model is not None and arguments.dataset is not None and config.output_dir is not None
    try:
        make_folder(config.output_dir)
    except OSError as error:
        found = f"{error.filename!r}: {error.strerror}"
        raise UserError(f"--output_dir: found {found}, expected a folder that can be written to") from error
    rewards = load_rewards(arguments.reward)
    with config.main_process_first(desc="reading the dataset"):
        dataset = load_prompts(arguments.dataset, split=arguments.dataset_split, config=arguments.dataset_config)
    decided: list[str | None] = [None, None]
    if config.process_index == 0:
        try:
            decided[0] = find_checkpoint(config.resume_from_checkpoint, config.output_dir)
        except UserError as error:
            decided[1] = str(error)
    checkpoint, problem = broadcast_object_list(decided)
    if problem is not None:
        raise UserError(problem)
    if checkpoint is None and config.process_index == 0:
        _say_what_is_there(config.output_dir)
    looks_local = arguments.model.startswith((".", "/", "~")) or arguments.model.count("/") > 1
    if looks_local and not Path(arguments.model).is_dir():
        raise UserError(f"--model: found no directory {arguments.model!r}, expected one with a model and its tokenizer")
    if Path(arguments.model).is_dir():
        _check_model_folder(Path(arguments.model))
    chosen = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
    }
    try:
        peft_config, quantization_config = get_peft_config(model_config), get_quantization_config(model_config)
    except (ImportError, ValueError) as error:  # a required library is missing, or two options exclude each other
        raise UserError(one_line(error)) from error
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
            callbacks=[_WrittenOver()],
        )
    except OSError as error:
        if error.filename is not None:  # a file that does not belong to the model
            raise
        here = "" if Path(arguments.model).is_dir() else f"no such directory in {os.getcwd()}, and as a Hub id "
        raise UserError(f"--model {arguments.model}: {here}it could not be loaded: {one_line(error)}") from error
    except (ValueError, ImportError) as error:  # options that exclude each other, or a missing library
        raise UserError(one_line(error)) from error
    trainer.dataset_name = arguments.dataset  # for the model card
    return trainer, checkpoint
