"""Complete the model card that TRL writes for a run, and add the part about rlloss."""

import contextlib
import dataclasses
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

try:
    from transformers import TrainingArguments
except ImportError as error:
    raise ImportError('rlloss.integrations.trl.model_card needs transformers: pip install "rlloss[trl]"') from error

from rlloss import __version__
from rlloss.integrations.trl.config import options
from rlloss.report import replace_file

# Options against entropy collapse, against clipping of important tokens, and against rewards without a signal.
REMEDIES = (
    "epsilon_low", "epsilon_high", "max_log_ratio", "off_policy_mask_threshold", "top_entropy_quantile",
    "entropy_denominator", "exact_k", "entropy_scope", "covariance", "entropy_coef", "use_adaptive_entropy",
    "entropy_target", "entropy_bonus_tokens", "dynamic_temperature", "dynamic_sampling_rounds",
    "multi_objective_aggregation", "reward_conditions", "gdpo_token_weighted", "soft_overlong_cache",
)  # fmt: skip
# The options of transformers that change the training result.
TRAINING = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "num_train_epochs",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
)  # fmt: skip
# A card is public: options that may contain paths or secrets are left out. The last two are set by TRL itself.
LEFT_OUT = (
    "model_init_kwargs", "transformers_continuous_batching_config", "generation_batch_size", "pad_to_multiple_of",
)  # fmt: skip
LEFT_OUT_FAMILIES = ("vllm_server_", "vllm_group_", "log_", "num_completions_to_print")
NO_MODEL, NO_HUB_ID = "[None](https://huggingface.co/None)", 'model="None"'
VERSIONS = "### Framework versions\n"


def options_that_differ(args: Any) -> dict[str, Any]:
    """Return the options of a GRPOConfig (TRL's or rlloss's) that differ from their defaults, in field order."""
    of_transformers = {field.name for field in dataclasses.fields(TrainingArguments)}
    found = {}
    for field in dataclasses.fields(args):
        name = field.name
        wanted = name in TRAINING or name not in of_transformers
        if not wanted or name in LEFT_OUT or name.startswith(LEFT_OUT_FAMILIES):
            continue
        value, default = getattr(args, name), field.default
        if default is dataclasses.MISSING:
            default = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        if name == "steps_per_generation":
            default = args.gradient_accumulation_steps
        if name == "epsilon" and options(args).epsilon_low is not None:
            continue  # another name for an option
        if value != default:
            found[name] = getattr(value, "value", value)  # the value of an enum
    return found


def dataset_of(dataset: Any) -> str | None:
    """Return the Hub id of a dataset, read from the name of its cache folder. None: not known."""
    for file in getattr(dataset, "cache_files", None) or ():
        for part in Path(file["filename"]).parts:
            if "___" in part:
                return part.replace("___", "/")
    return None


def complete_card(trainer: Any, dataset: str | None) -> None:
    """Complete README.md in the output folder of a trainer of TRL. dataset: Hub id or file. None: not known."""
    args = trainer.args
    path, model = Path(args.output_dir, "README.md"), str(getattr(trainer.model.config, "_name_or_path", ""))
    text = path.read_text(encoding="utf-8")
    name = Path(model).name if Path(model).is_dir() else model
    if name:
        text = text.replace(NO_MODEL, f"the local model `{name}`")
    text = text.replace(f"This model is a fine-tuned version of {NO_MODEL}", "This is a fine-tuned model")
    text = text.replace(NO_HUB_ID, f'model="{args.output_dir}"')
    options = options_that_differ(args)
    loss_type = options.pop("loss_type", args.loss_type)
    remedies = {name: options.pop(name) for name in REMEDIES if name in options}
    theirs = trainer._why_trls_own()
    lines = [
        "### rlloss",
        "",
        f"Trained with rlloss {__version__}, `loss_type={loss_type!r}`"
        + ("." if theirs is None else f", by TRL's own loss ({theirs})."),
        "",
        *([f"- Model: `{name}`"] if name else []),
        *([f"- Dataset: `{dataset}`"] if dataset else []),
        f"- Remedies: {_listed(remedies)}",
        f"- Other options that differ from TRL's defaults: {_listed(options)}",
        "",
    ]
    section = "\n".join(lines)
    if VERSIONS in text:
        before, after = text.split(VERSIONS, 1)
        text = f"{before}{section}\n{VERSIONS}\n- rlloss: {__version__}\n{after.lstrip()}"
    else:
        text = f"{text.rstrip()}\n\n{section}"
    replace_file(path, text)


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in options.items()) or "none"


def about_run(trainer: Any) -> dict[str, Any]:
    """Return the content of run.json for a run: model, date, versions, device, options that differ from defaults."""
    model = str(getattr(trainer.model.config, "_name_or_path", ""))
    versions = {"rlloss": __version__}
    for name in ("torch", "triton", "trl", "transformers"):
        with contextlib.suppress(PackageNotFoundError):  # some builds of Triton have another distribution name
            versions[name] = version(name)
    device = trainer.accelerator.device
    return {
        "model": (Path(model).name if Path(model).is_dir() else model) or type(trainer.model).__name__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "options": {name: str(value) for name, value in options_that_differ(trainer.args).items()},
    }
