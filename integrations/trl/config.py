"""Extend TRL's GRPOConfig by rlloss's options, and translate the options of a trainer into a LossConfig."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

try:
    from trl.trainer.grpo_config import GRPOConfig as TrlGRPOConfig
except ImportError as error:
    raise ImportError('rlloss.integrations.trl.config needs TRL: pip install "rlloss[trl]"') from error

from rlloss import checks
from rlloss.config import CovarianceConfig, LossConfig, SapoConfig, VespoConfig
from rlloss.entropy.temperature import temperature_rule
from rlloss.integrations.trl.lm_head import PLANS
from rlloss.loss_types import LOSSES

# Settings of LossConfig that only some losses read -> their values in a trainer of TRL.
OPTIONS = {
    "ratio_level": lambda trainer: trainer.importance_sampling_level,
    "epsilon_low": lambda trainer: trainer.epsilon_low,
    "epsilon_high": lambda trainer: trainer.epsilon_high,
    "delta": lambda trainer: trainer.args.delta,
    "max_completion_length": lambda trainer: trainer.max_completion_length,
    "sapo": lambda trainer: SapoConfig(trainer.args.sapo_temperature_pos, trainer.args.sapo_temperature_neg),
    "vespo": lambda trainer: VespoConfig(
        trainer.args.vespo_k_pos, trainer.args.vespo_lambda_pos,
        trainer.args.vespo_k_neg, trainer.args.vespo_lambda_neg,
    ),
    "covariance": lambda trainer: CovarianceConfig(**(given(options(trainer.args).covariance) or {})),
}  # fmt: skip
# Defaults of the TRL options that "clip_cov" or "kl_cov" may not read: other values raise. (With TRL's own losses an
# option that the loss does not read is silently ignored.)
NOT_READ_BY_COVARIANCE = {"ratio_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None}
# Options that accept a fixed set of words.
CHOICES = {
    "gauges": ("basic", "all"),
    "lm_head_plan": (*PLANS, "trl"),
    "zero_advantage": ("auto", "forward_only", "drop", "keep"),
    "entropy_scope": ("microbatch", "window", "generation"),
    "entropy_denominator": ("all", "kept"),
    "entropy_bonus_tokens": ("kept", "all"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum", "gdpo"),
}
logger = logging.getLogger(__name__)


def _naming_unknown_options(cls: type) -> type:
    """Make the constructor's error for an unknown option suggest a similar one."""
    init: Callable[..., None] = cls.__init__

    @functools.wraps(init)
    def __init__(self, *args, **options):
        known = [field.name for field in dataclasses.fields(cls) if field.init]
        for name in options:
            if name not in known:
                raise TypeError(checks.unknown_option(name, known))
        init(self, *args, **options)

    cls.__init__ = __init__
    return cls


@dataclasses.dataclass
class PluginOptions:
    """The options that rlloss adds to TRL's GRPOConfig. The "help" in each field's metadata describes it."""

    epsilon_low: float | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Lower clip bound: ratios below 1 - epsilon_low are clipped. Another name for `epsilon`: give one "
            "of the two. (That `epsilon` was given at its default cannot be seen; epsilon_low then counts.)"
        },
    )
    max_log_ratio: float | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Bound of |log ratio|, and of |log-probability of the reference - that of the policy| in the KL; "
            "beyond it both are constants without gradient. verl bounds both by 20. None: no bound (TRL), where e^100 "
            "is infinite."
        },
    )
    entropy_denominator: str = dataclasses.field(
        default="all",
        metadata={
            "help": "What the policy loss is divided by when top_entropy_quantile < 1: 'all' tokens (TRL), or the "
            "'kept' ones (Beyond the 80/20 Rule, 2506.01939 Eq. 6; where all micro-batches share a "
            "divisor, the window's token count times the share kept in the micro-batch, or in the entropy_scope)."
        },
    )
    exact_k: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "With top_entropy_quantile < 1 keep exactly that share of the tokens, instead of every tie at the "
            "cutoff (where the share reaches down to entropies of 0, ties keep everything)."
        },
    )
    entropy_scope: str = dataclasses.field(
        default="microbatch",
        metadata={
            "help": "Whose entropies set the cutoff of top_entropy_quantile: those of the 'microbatch', of all "
            "processes (TRL); of the accumulation 'window' (one more pass without gradient over each of its "
            "micro-batches); or of the whole 'generation' batch, by the policy that made it: its cutoff holds for all "
            "steps on the batch. The last two do not depend on per_device_train_batch_size."
        },
    )
    entropy_bonus_tokens: str = dataclasses.field(
        default="kept",
        metadata={"help": "Whose mean entropy `entropy_coef` rewards: of the 'kept' tokens (TRL), or of 'all'."},
    )
    covariance: dict | str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Which tokens loss_type 'clip_cov' leaves out or 'kl_cov' penalises (2505.22617), as fields of "
            '`rlloss.losses.CovarianceConfig`: {"ratio": 2e-4, "scope": "generation", ...}. None: its defaults.'
        },
    )
    dynamic_temperature: dict | str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Sampling temperature by the entropy of each token's distribution, as a rule of rlloss.entropy: "
            '{"rule": "two_level", "high": 1.2, "low": 1.0, "cutoff": 0.672} (2506.01939 Eq. 5), "edt" or '
            '"dynatemp". The loss divides each token\'s logits by the same temperature. None: `temperature`.'
        },
    )
    dynamic_sampling_rounds: int = dataclasses.field(
        default=0,
        metadata={
            "help": "Replace groups whose completions all got the same reward by groups of fresh prompts, in at most "
            "this many rounds per generation batch (dynamic sampling, DAPO 2503.14476). Prompts are drawn from the "
            "training set by `seed` and step. Every process has to hold whole groups; text only, without tools. "
            "Metrics of generations and rewards stay those of the first draw. 0: such groups stay."
        },
    )
    reward_conditions: dict | str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Rewards that count as 0 where another one is below a threshold (GDPO, 2601.05242 Eq. 8), by the "
            'names of the reward functions: {"length_reward": ["correct_reward", 1.0]}. Logged rewards stay as they '
            "are. None: none."
        },
    )
    gdpo_token_weighted: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "With multi_objective_aggregation='normalize_then_sum': mean and std of the batch weigh every "
            "completion by its tokens, as verl does. Groups without a signal then get an advantage too."
        },
    )
    soft_overlong_cache: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Adds the reward function 'soft_overlong' with weight 1: 0 up to max_completion_length - "
            "soft_overlong_cache tokens, from there linearly down to -1 (DAPO, 2503.14476 Eq. 13). None: not added."
        },
    )
    zero_advantage: str = dataclasses.field(
        default="auto",
        metadata={
            "help": "What becomes of completions whose whole advantage is 0 (their group got one reward), which carry "
            "no gradient: 'forward_only' runs them without one in a call of their own, for the metrics; 'drop' does "
            "not run them, and the metrics of the loss (entropy, clip ratios, rlloss/live_share) then cover the "
            "completions that ran; 'keep' runs all in one call; 'auto' is 'forward_only' on a CPU, and on a GPU for "
            "each micro-batch in which their backward would take longer than a second call takes the host (0.2 ms a "
            "module of the model), else 'keep'. Loss and gradient are the same. One call is also made where every "
            "completion has a gradient (beta, an entropy bonus), where completions of a call depend on one another "
            "(dropout, images), and under torch.compile, which would compile a graph per shape."
        },
    )
    collapse_monitor: bool = dataclasses.field(
        default=True,
        metadata={
            "help": "Warn in words when the logs show the entropy collapse or explode, a clip that cannot act, or a "
            "reward without a signal, each with what to try (`rlloss.integrations.transformers.collapse_monitor`)."
        },
    )
    gauges: str = dataclasses.field(
        default="basic",
        metadata={
            "help": "What is logged beside TRL's metrics: 'basic': shares of tokens and completions with a gradient, "
            "entropy quantiles, the covariance that moves the entropy, what the lm_head ran, and what a selected "
            "option needs; 'all': also ratios, covariances by the accuracy of the group and what several rewards "
            "resolve."
        },
    )
    token_log_steps: int = dataclasses.field(
        default=0,
        metadata={
            "help": "Write the completions of every n-th optimizer step with each token's entropy and state to "
            "output_dir/tokens, and all metrics to output_dir/metrics.jsonl: `rlloss report output_dir` makes "
            "a page of them. About 3 KB a completion. 0: never."
        },
    )
    lm_head_plan: str = dataclasses.field(
        default="auto",
        metadata={
            "help": "How log-probabilities and entropies are computed from the model's hidden states: 'recompute', "
            "'keep' or, for a frozen lm_head, 'jacobian' (see `rlloss.linear_token_stats`); 'auto': of those that fit "
            "the memory and cost at most a tenth more than the cheapest, the one that holds least; or 'trl': by TRL's "
            "own lm_head."
        },
    )
    lm_head_memory_budget: int | str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Bytes that a plan may hold, also as a size such as '1GiB'. None: at most a third of what plain "
            "logits would, and a sixteenth of the GPU's memory (2 GiB on a CPU)."
        },
    )


def given(option: dict | str | None) -> dict | None:
    """Return an option that is a dict, or None. (`GRPOConfig` has parsed text before.)"""
    return option if isinstance(option, dict) else None


def options(args: Any) -> PluginOptions:
    """Return rlloss's options of a trainer. With TRL's own GRPOConfig all of them have their defaults."""
    return args if isinstance(args, PluginOptions) else PluginOptions()


@_naming_unknown_options
@dataclasses.dataclass
class GRPOConfig(PluginOptions, TrlGRPOConfig):
    """TRL's GRPOConfig with unchanged defaults, plus the options of `PluginOptions`.

    `rlloss train --help all` prints every option with its meaning. `multi_objective_aggregation` also accepts "gdpo",
    another name for "normalize_then_sum". `covariance`, `dynamic_temperature` and `reward_conditions` take a dict, or
    its JSON text.

    Raises:
        TypeError: an option is unknown or has the wrong type.
        ValueError: an option is out of range, would be ignored, or contradicts another option.
    """

    _VALID_DICT_FIELDS = TrlGRPOConfig._VALID_DICT_FIELDS + ["covariance", "dynamic_temperature", "reward_conditions"]

    def __post_init__(self):
        for name, choices in CHOICES.items():
            checks.one_of(name, getattr(self, name), choices)
        if self.multi_objective_aggregation == "gdpo":
            self.multi_objective_aggregation = "normalize_then_sum"  # TRL's name for GDPO
        name = "lm_head_memory_budget"
        self.lm_head_memory_budget = checks.memory_budget(name, self.lm_head_memory_budget)
        checks.require(
            self.lm_head_plan != "trl" or self.lm_head_memory_budget is None, "lm_head_memory_budget",
            self.lm_head_memory_budget, "None with lm_head_plan='trl', where it has no effect",
        )  # fmt: skip
        if self.epsilon_low is not None:
            default = next(f.default for f in dataclasses.fields(TrlGRPOConfig) if f.name == "epsilon")
            if self.epsilon not in (default, self.epsilon_low):
                raise ValueError(
                    f"epsilon_low: found {self.epsilon_low} and epsilon={self.epsilon}, expected one of the two: they "
                    "are the same bound"
                )
            self.epsilon = self.epsilon_low
        super().__post_init__()
        for name in ("covariance", "dynamic_temperature", "reward_conditions"):
            if not isinstance(getattr(self, name), dict | None):
                raise TypeError(f"{name}: found {getattr(self, name)!r}, expected a dict (as JSON or YAML) or None")
        checks.require(
            self.covariance is None or _picks(self.loss_type), "covariance", self.covariance,
            f"None with loss_type={self.loss_type!r}, where it has no effect",
        )  # fmt: skip
        if self.covariance is not None:
            known = [field.name for field in dataclasses.fields(CovarianceConfig)]
            for name in self.covariance:
                checks.one_of("covariance", name, known)
        if isinstance(self.dynamic_temperature, dict):
            temperature_rule(self.dynamic_temperature)
            if self.use_vllm:  # rlloss.integrations.vllm.sampling reads it there
                given: Any = self.generation_kwargs or {}
                extra = {**(given.get("extra_args") or {}), "entropy_temperature": self.dynamic_temperature}
                self.generation_kwargs = {**given, "extra_args": extra}
        for name in ("token_log_steps", "dynamic_sampling_rounds"):
            checks.whole(name, getattr(self, name), 0)
        for name in ("exact_k", "gdpo_token_weighted", "collapse_monitor"):
            checks.flag(name, getattr(self, name))
        self._check_advantages()

    def _check_advantages(self):
        to_sum, scale = self.multi_objective_aggregation != "normalize_then_sum", self.scale_rewards
        if not (to_sum or scale == "group"):
            logger.warning(
                "scale_rewards: found %r, which TRL does not read with multi_objective_aggregation="
                "'normalize_then_sum': each reward is scaled by its group, and their sum by the batch.", scale,
            )  # fmt: skip
        checks.require(
            not (to_sum and self.gdpo_token_weighted), "gdpo_token_weighted", True,
            f"False with multi_objective_aggregation={self.multi_objective_aggregation!r}, where it has no effect",
        )  # fmt: skip
        rounds, cache, G = self.dynamic_sampling_rounds, self.soft_overlong_cache, self.num_generations
        assert G is not None and self.steps_per_generation is not None  # TRL sets them
        rows = self.per_device_train_batch_size * self.steps_per_generation
        checks.require(
            rounds == 0 or rows % G == 0, "dynamic_sampling_rounds", rounds,
            f"0 with {rows} completions per process (per_device_train_batch_size * steps_per_generation), which are no "
            f"whole groups of num_generations={G}",
        )  # fmt: skip
        longest = self.max_completion_length
        if cache is not None:
            checks.whole("soft_overlong_cache", cache, 0)
        checks.require(
            cache is None or (longest is not None and 0 <= cache <= longest), "soft_overlong_cache", cache,
            f"0 to max_completion_length = {longest}",
        )  # fmt: skip


def _picks(loss_type: str) -> bool:
    return loss_type in LOSSES and LOSSES[loss_type].picks is not None


class TrlLossConfig(LossConfig):
    """A LossConfig that does not require cispo's cap `epsilon_high` to be at least 1. TRL's default is 0.2."""

    _least_cap = 0.0


def trls_settings(trainer: Any) -> dict[str, Any]:
    """Return TRL's options of a trainer as arguments of a LossConfig."""
    corrected = trainer.beta != 0.0 and trainer.args.use_bias_correction_kl
    read = LOSSES[trainer.loss_type].reads
    if corrected and LOSSES[trainer.loss_type].level == "product":
        read = read | {"ratio_level"}  # only the KL reads it
    return dict(
        loss_type=trainer.loss_type,
        top_entropy_quantile=trainer.top_entropy_quantile,
        beta=trainer.beta,
        kl_bias_correction=corrected,
        off_policy_threshold=trainer.off_policy_mask_threshold,
        entropy_coef=trainer._entropy_coef_now(),
        **{name: option(trainer) for name, option in OPTIONS.items() if name in read},
    )
