"""List the private parts of TRL that rlloss uses, with the TRL version that introduced each, and give access to them.

No other file names these parts. The hooks are the exception: `rlloss.integrations.trl.trainer` overrides them.
"""

import collections
import contextlib
import copy
import warnings
from collections.abc import Iterator
from types import CodeType
from typing import Any

try:
    from packaging.version import Version

    import trl
    import trl.trainer.utils as utils
except ImportError as error:
    raise ImportError('rlloss.integrations.trl needs TRL: pip install "rlloss[trl]"') from error

TESTED = (Version("1.14.0"), Version("1.17.0"))  # first version, first version that is not tested
# Methods of GRPOTrainer.
HOOKS = {
    "_compute_loss": "1.14",
    "_get_per_token_logps_and_entropies": "1.14",
    "_prepare_inputs": "1.14",
    "_calculate_rewards": "1.14",
    "_generate_and_score_completions": "1.14",
    "_generate_single_turn": "1.14",
}
# Attributes that its constructor sets.
ATTRIBUTES = {
    "_metrics": "1.14",  # {"train" or "eval": {name: values since the last log}}
    "_logs": "1.14",  # the table of completions
    "_step": "1.14",  # micro-batches so far
    "_buffered_inputs": "1.14",  # the micro-batches of a generation batch, or None
    "_tokenizer": "1.14",
    "_entropy_bonus_enabled": "1.14",
    "_last_world_entropy": "1.14",
    "_entropy_window_stats": "1.14",
}
# Functions that its loss calls.
CALLED = ("get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights", "get_sapo_token_loss")
# Names in trl.trainer.utils that are used between the backbone of a model and the loss.
LM_HEAD = {
    "add_fused_lm_head": "1.15",
    "_ChunkedLogProbFunction": "1.14",
    "maybe_gather_lm_head_ctx": "1.14",
    "_use_triton": "1.16",  # whether masked tokens are left out; TRL without this name always leaves them out
    "DTensor": "1.14",  # heads of this type are gathered
}
# The names of LM_HEAD that `patch_trl` replaces.
REPLACED = ("_ChunkedLogProbFunction", "_use_triton", "DTensor")

_missing = [name for name in HOOKS if not hasattr(getattr(trl, "GRPOTrainer", None), name)]
if _missing:
    raise ImportError(
        f"TRL {trl.__version__} does not fit rlloss: its GRPOTrainer has no {' and no '.join(_missing)}; expected "
        f"TRL >= {TESTED[0]}, < {TESTED[1]}"
    )
IN_TESTED_RANGE = TESTED[0] <= Version(Version(trl.__version__).base_version) < TESTED[1]
if not IN_TESTED_RANGE:
    warnings.warn(f"rlloss is tested with TRL >= {TESTED[0]}, < {TESTED[1]}; found {trl.__version__}", stacklevel=2)


def check(trainer: Any) -> None:
    """Raise AttributeError if TRL's constructor did not set one of ATTRIBUTES."""
    missing = [name for name in ATTRIBUTES if not hasattr(trainer, name)]
    if missing:
        raise AttributeError(
            f"TRL {trl.__version__} does not fit rlloss: its trainer has no {' and no '.join(missing)}; expected "
            f"TRL >= {TESTED[0]}, < {TESTED[1]}"
        )


def _function(owner: object, name: str) -> Any:
    """The function that `owner` has under this name, unbound if it is a method. None: there is none."""
    found = getattr(owner, name, None)
    return getattr(found, "__func__", found)


# TRL's own functions. None: missing, or replaced before this import.
_OF_TRL = {
    name: function if getattr(function, "__module__", None) == trl.GRPOTrainer.__module__ else None
    for name in (*CALLED, "_get_per_token_logps_and_entropies")
    for function in [getattr(trl.GRPOTrainer, name, None)]
}


def is_replaced(owner: object, name: str) -> bool:
    """Whether `owner` calls another function than TRL's by this name (one of CALLED, or the log-probability hook)."""
    return _function(owner, name) is not _OF_TRL[name]


def before_loading(trainer: Any, args: Any) -> None:
    """Set the attributes that TRL's trainer copies from its options, so that they are checked before a model loads."""
    for name in (
        "loss_type", "importance_sampling_level", "beta", "top_entropy_quantile", "off_policy_mask_threshold",
        "max_completion_length", "use_vllm", "entropy_coef", "use_adaptive_entropy", "multi_objective_aggregation",
    ):  # fmt: skip
        if hasattr(args, name):
            setattr(trainer, name, getattr(args, name))
    trainer.args, trainer.epsilon_low = args, args.epsilon
    trainer.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    trainer._entropy_bonus_enabled = bool(
        getattr(args, "entropy_coef", 0.0) or getattr(args, "use_adaptive_entropy", False)
    )
    trainer._last_world_entropy = float("inf")


def log_of(trainer: Any, mode: str | None = None) -> dict[str, list[float]]:
    """TRL's metrics, as {name: values since the last log}. mode: "train" or "eval"; None: the present mode."""
    return trainer._metrics[mode or ("train" if trainer.model.training else "eval")]


def logged_advantages(trainer: Any) -> Any:
    """The advantages in TRL's table of completions, a sequence that may be changed in place."""
    return trainer._logs["advantages"]


@contextlib.contextmanager
def unlogged(trainer: Any, mode: str) -> Iterator[None]:
    """Drop the logs that TRL makes inside this context, except the number of tokens seen, which is a running total."""
    metrics, logs = trainer._metrics, trainer._logs
    trainer._metrics = {name: collections.defaultdict(list) for name in metrics}
    trainer._logs = copy.deepcopy(logs)
    try:
        yield
    finally:
        if "num_tokens" in trainer._metrics[mode]:
            metrics[mode]["num_tokens"] = trainer._metrics[mode]["num_tokens"]
        trainer._metrics, trainer._logs = metrics, logs


@contextlib.contextmanager
def kept_rewards(trainer: Any) -> Iterator[list[Any]]:
    """Collect the results of the trainer's `_calculate_rewards` inside this context, also those of a subclass."""
    kept: list[Any] = []
    calculate, own = trainer._calculate_rewards, vars(trainer).get("_calculate_rewards")

    def keep(*args, **kwargs):
        kept.append(calculate(*args, **kwargs))
        return kept[-1]

    trainer._calculate_rewards = keep
    try:
        yield kept
    finally:
        del trainer._calculate_rewards
        if own is not None:
            trainer._calculate_rewards = own


def micro_batches(trainer: Any) -> int:
    """The number of micro-batches so far."""
    return trainer._step


def buffered(trainer: Any) -> list[dict] | None:
    """The micro-batches of the generation batch, or None."""
    return trainer._buffered_inputs


def tokenizer(trainer: Any) -> Any:
    """The trainer's tokenizer. If it has a processor, the tokenizer of the processor."""
    return trainer._tokenizer


def token_stats(trainer: Any, *args, **kwargs) -> Any:
    """Call the trainer's hook for (log-probabilities, entropies, ...) of completions."""
    return trainer._get_per_token_logps_and_entropies(*args, **kwargs)


def has_entropy_bonus(trainer: Any) -> bool:
    return trainer._entropy_bonus_enabled


def world_entropy(trainer: Any) -> float:
    """Mean entropy of the last accumulation window over all processes. inf before the first window."""
    return trainer._last_world_entropy


def set_world_entropy(trainer: Any, value: float) -> None:
    trainer._last_world_entropy = value


def add_to_entropy_window(trainer: Any, stats: Any, ends: bool) -> Any:
    """Add to the sums of the accumulation window and return them. ends: reset after this. TRL checkpoints the sums."""
    if trainer._entropy_window_stats is not None:
        stats = trainer._entropy_window_stats + stats
    trainer._entropy_window_stats = None if ends else stats
    return stats


def why_no_lm_head() -> str | None:
    """Why the lm_head of this TRL cannot be replaced, or None."""
    missing = [name for name in LM_HEAD if name not in ("_use_triton", "DTensor") and not hasattr(utils, name)]
    if missing:
        return f"TRL {trl.__version__} has no {' and no '.join(missing)} in trl.trainer.utils; expected TRL >= 1.15"
    if "_ChunkedLogProbFunction" not in _names(utils.add_fused_lm_head.__code__):
        return f"add_fused_lm_head of TRL {trl.__version__} does not call _ChunkedLogProbFunction; expected TRL < 1.17"
    return None


def why_returns_logits() -> str | None:
    """Why models return logits under this TRL, or None if they do not."""
    return None if hasattr(utils, "add_fused_lm_head") else f"TRL {trl.__version__}, whose model returns logits"


def _names(code: CodeType) -> Iterator[str]:
    """The globals and attributes that a function and its nested functions look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
