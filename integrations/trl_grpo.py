"""GRPO with TRL: change one import.

    from rlloss.integrations.trl_grpo import GRPOConfig, GRPOTrainer

TRL generates, scores and runs its fused lm_head; the loss after it is rlloss's, for every loss type of TRL and "gspo".
Same options, same metrics.
"""

import logging
import math
import statistics
import warnings
from collections.abc import Callable

import torch
from packaging.version import Version

try:
    import trl
except ImportError as error:
    raise ImportError('rlloss.integrations.trl_grpo needs TRL: pip install "rlloss[trl]"') from error

from rlloss import checks
from rlloss.config import RATIO_LEVELS, READ_BY, LossConfig, SapoConfig, VespoConfig
from rlloss.integrations.trl_config import GRPOConfig as GRPOConfig
from rlloss.integrations.trl_lm_head import patch_trl
from rlloss.integrations.trl_lm_head import why_not as why_no_patch
from rlloss.integrations.zero_advantage import ZeroAdvantage, counted_tokens, dead_completions
from rlloss.losses import LOSSES, default_denominator, means, policy_loss
from rlloss.masks import entropy_cutoff, top_entropy_mask
from rlloss.surrogates import cispo, clip, sapo, vespo

TESTED_TRL = (Version("1.14.0"), Version("1.17.0"))  # from, up to but without
# What `_get_per_token_logps_and_entropies` takes for models that see more than text.
MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
# The settings of LossConfig that only some losses read (config.READ_BY), in a trainer of TRL.
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
}  # fmt: skip
# Among the losses that are divided by a count of tokens, those that take this micro-batch's own.
OWN_TOKEN_COUNT = ("bnpo",)
# What a surrogate counts: TRL's name -> that of rlloss's mean.
MEANS: dict[Callable[..., object], dict[str, str]] = {
    clip: {
        "clip_ratio/low_mean": "clip_low",
        "clip_ratio/high_mean": "clip_high",
        "clip_ratio/region_mean": "clip_region",
    },
    cispo: {"cispo_clip_ratio": "clip_high"},
    sapo: {},
    vespo: {"vespo/phi_seq_mean": "weight"},
}
# What is not added up over ranks: rlloss's name -> TRL's, and how the ranks' numbers become one.
OVER_RANKS = {
    "clip_low_min": ("clip_ratio/low_min", min),
    "clip_high_max": ("clip_ratio/high_max", max),
    "policy_loss": ("policy_loss", statistics.fmean),
}

logger = logging.getLogger(__name__)

_missing = [
    name
    for name in ("_compute_loss", "_get_per_token_logps_and_entropies")
    if not hasattr(getattr(trl, "GRPOTrainer", None), name)
]
if _missing:
    raise ImportError(
        f"TRL {trl.__version__} does not fit rlloss: its GRPOTrainer has no {' and no '.join(_missing)}; expected "
        f"TRL >= {TESTED_TRL[0]}, < {TESTED_TRL[1]}"
    )
IN_TESTED_RANGE = TESTED_TRL[0] <= Version(Version(trl.__version__).base_version) < TESTED_TRL[1]
if not IN_TESTED_RANGE:
    warnings.warn(
        f"rlloss is tested with TRL >= {TESTED_TRL[0]}, < {TESTED_TRL[1]}; found {trl.__version__}", stacklevel=2
    )


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's GRPOTrainer with rlloss's loss. Takes rlloss's or TRL's GRPOConfig.

    Logs TRL's metrics under their names, and `live_share` (tokens with a nonzero gradient), `zero_advantage_share`
    (completions without one), with top_entropy_quantile < 1 also `entropy/kept_share` and `entropy/cutoff`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._zero_advantage = ZeroAdvantage(self, MULTIMODAL)
        if (theirs := self._why_trls_own()) is not None:
            logger.info("The loss with %s is TRL's own.", theirs)
        self._make_loss_config()  # a setting that does not fit raises now and not in the first step

    def _why_trls_own(self) -> str | None:
        """Why the loss is TRL's own: a loss type of a newer TRL, or a hook of TRL that a subclass overrides."""
        if IN_TESTED_RANGE:  # another TRL may have more, and says itself what it does not know
            checks.one_of("loss_type", self.loss_type, LOSSES)
        if self.loss_type not in LOSSES:
            return f"loss_type={self.loss_type!r}"
        called = {
            "get_high_entropy_mask": self.top_entropy_quantile < 1.0,
            "get_off_policy_mask": self.off_policy_mask_threshold is not None,
            "get_gamma_weights": LOSSES[self.loss_type].surrogate is vespo,
        }
        for name, is_called in called.items():
            if is_called and getattr(type(self), name, None) is not getattr(trl.GRPOTrainer, name, None):
                return f"{name} overridden"
        return None

    def _make_loss_config(self) -> LossConfig | None:
        """The trainer's options as a LossConfig; None where the loss is TRL's own."""
        entropy_denominator = getattr(self.args, "entropy_denominator", "all")
        theirs = self._why_trls_own()
        self._zero_advantage.check(theirs)
        if theirs is not None:
            checks.require(
                entropy_denominator == "all", "entropy_denominator", repr(entropy_denominator),
                f"'all' with {theirs}, where the loss is TRL's own",
            )  # fmt: skip
            return None
        checks.one_of("importance_sampling_level", self.importance_sampling_level, RATIO_LEVELS)
        corrected = self.beta != 0.0 and self.args.use_bias_correction_kl
        read = READ_BY[self.loss_type]
        if corrected and LOSSES[self.loss_type].level == "product":
            read = read | {"ratio_level"}  # for the KL alone
        return LossConfig(
            loss_type=self.loss_type,
            top_entropy_quantile=self.top_entropy_quantile,
            entropy_denominator=entropy_denominator,
            beta=self.beta,
            kl_bias_correction=corrected,
            off_policy_threshold=self.off_policy_mask_threshold,
            entropy_coef=self._entropy_coef_now(),
            **{name: option(self) for name, option in OPTIONS.items() if name in read},
        )

    def _compute_loss(self, model, inputs):
        config = self._make_loss_config()  # callbacks may change the trainer's settings between steps
        if config is None:
            return super()._compute_loss(model, inputs)
        mode = "train" if self.model.training else "eval"
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1.0
        whole = inputs
        model, inputs = self._zero_advantage.apart(model, whole)
        mask = counted_tokens(inputs)
        logp, entropy, aux_loss = self._token_stats(model, inputs)

        cutoff = None
        if config.top_entropy_quantile < 1.0:
            group = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
            cutoff = entropy_cutoff(entropy, mask, config.top_entropy_quantile, process_group=group)
        denominator = self._denominator(config, inputs, mode, entropy, mask, cutoff)
        if denominator is None and inputs is not whole:
            denominator = default_denominator(counted_tokens(whole), LOSSES[self.loss_type], config)
        loss, metrics = policy_loss(
            logp,
            inputs["advantages"],
            mask,
            config=config,
            old_logp=inputs.get("old_per_token_logps"),
            ref_logp=inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            sampler_ratio=self._sampler_ratio(inputs),
            sampler_logp=None if config.off_policy_threshold is None else inputs.get("sampling_per_token_logps"),
            entropy=entropy,
            cutoff=cutoff,
            denominator=denominator,
        )
        if self._has_entropy_bonus():  # TRL logs the loss without it, and divided where its own divisor counts windows
            without = loss.detach() + config.entropy_coef * means(metrics)["entropy_kept"]
            metrics["policy_loss"] = without if denominator is None else without / accumulation
        loss = loss / accumulation
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        dead = dead_completions(whole).float()
        metrics |= {"dead": dead.sum(), "completions": torch.ones_like(dead).sum()}
        self._log_loss_metrics(mode, metrics)
        return loss

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before and self._why_trls_own() is None:
            self._zero_advantage.look_ahead(self._buffered_inputs or [])
        return inputs

    def _why_trls_call(self) -> str | None:
        """Why the model has to be called by TRL or a subclass itself."""
        if not hasattr(trl.trainer.utils, "add_fused_lm_head"):
            return f"TRL {trl.__version__}, whose model returns logits"
        for name in ("_get_per_token_logps_and_entropies", "_token_stats"):
            if name in vars(self) or getattr(type(self), name) is not getattr(GRPOTrainer, name):
                return f"{name} overridden"
        return None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        """TRL's, with rlloss's lm_head in the place of TRL's, inside the model's forward."""
        plan = getattr(self.args, "lm_head_plan", "auto")
        if plan == "trl" or why_no_patch() is not None:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with patch_trl(plan=plan, memory_budget=getattr(self.args, "lm_head_memory_budget", None)):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _token_stats(self, model, inputs):
        """(logp, entropy, aux loss or None) of the completions."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        return self._get_per_token_logps_and_entropies(
            model,
            ids,
            attention_mask,
            inputs["completion_ids"].size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs[name] for name in MULTIMODAL if name in inputs},
        )

    def _sampler_ratio(self, inputs):
        """TRL's vLLM correction; None: 1."""
        if LOSSES[self.loss_type].level == "product":  # part of the ratio itself, wherever TRL has made one
            return inputs.get("importance_sampling_ratio")
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        return inputs["importance_sampling_ratio"] if corrects else None

    def _denominator(self, config, inputs, mode, entropy, mask, cutoff):
        """For a mean over tokens this process's share of those of an average micro-batch; None: this call's own."""
        if LOSSES[self.loss_type].divided_by != "tokens" or self.loss_type in OWN_TOKEN_COUNT:
            return None
        denominator = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if mode == "train":  # it counts the generation batch, which is steps_per_generation micro-batches
            denominator = denominator / self.args.steps_per_generation
        if config.entropy_denominator == "kept":
            kept = top_entropy_mask(entropy, mask, config.top_entropy_quantile, cutoff=cutoff)
            kept, tokens = self.accelerator.reduce(torch.stack([kept.sum(), mask.sum()]), reduction="sum")
            denominator = denominator * kept.clamp(min=1) / tokens.clamp(min=1)
        return denominator

    def _has_entropy_bonus(self) -> bool:
        return getattr(self, "_entropy_bonus_enabled", False)

    def _entropy_coef_now(self) -> float:
        """Of the bonus in this accumulation window. Adaptive: none while the last window's entropy is above target."""
        if not self._has_entropy_bonus():
            return 0.0
        needed = not self.use_adaptive_entropy or self._last_world_entropy <= self.args.entropy_target
        return self.entropy_coef if needed else 0.0

    def _entropy_window(self, mode, metrics):
        """The sums over this rank's window that end with this micro-batch, if it ends one; {} otherwise.

        The attributes are TRL's, which writes and reads them with its checkpoints.
        """
        if mode != "train" or not (self._has_entropy_bonus() and self.use_adaptive_entropy):
            return {}
        stats = torch.stack([metrics["entropy_kept"], metrics["kept"]])
        if self._entropy_window_stats is not None:
            stats = self._entropy_window_stats + stats
        ends = self.accelerator.sync_gradients
        self._entropy_window_stats = None if ends else stats
        return dict(zip(("window_entropy", "window_kept"), stats, strict=True)) if ends else {}

    def _adapt_entropy_coef(self, world_entropy):
        """The controller of Skywork-OR1 (2505.22312): a step up at or below the target, a step down above it."""
        args, self._last_world_entropy = self.args, world_entropy
        if world_entropy <= args.entropy_target:
            self.entropy_coef = min(self.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
        else:
            self.entropy_coef = max(self.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)

    def _log_loss_metrics(self, mode, metrics):
        """TRL's metrics of this micro-batch and ours: one reduction of sums, at most one gather of the rest."""
        log, surrogate = self._metrics[mode], LOSSES[self.loss_type].surrogate
        sums = {name: value for name, value in metrics.items() if name not in OVER_RANKS}
        sums |= self._entropy_window(mode, metrics)
        reduced = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum")
        reduced = dict(zip(sums, reduced, strict=True))
        averages = means(reduced) | {"zero_advantage_share": reduced["dead"] / reduced["completions"].clamp(min=1)}
        if "window_kept" in reduced:
            averages["window_entropy"] = reduced["window_entropy"] / reduced["window_kept"].clamp(min=1)
        averages = dict(zip(averages, torch.stack(list(averages.values())).tolist(), strict=True))

        log["zero_advantage_share"].append(averages["zero_advantage_share"])
        names = {"entropy": "entropy", "live_share": "live_share", **MEANS[surrogate]}
        if self.beta != 0.0:
            names["kl"] = "kl"
        if "entropy_cutoff" in averages:
            names |= {"entropy/kept_share": "kept_share", "entropy/cutoff": "entropy_cutoff"}
        for name, mean in names.items():
            log[name].append(averages[mean])

        logged = [name for name in OVER_RANKS if name in metrics and (surrogate is clip or name == "policy_loss")]
        if logged:
            gathered = self.accelerator.gather(torch.stack([metrics[name] for name in logged]).unsqueeze(0))
            for name, of_ranks in zip(logged, gathered.T.tolist(), strict=True):
                trls_name, one_of = OVER_RANKS[name]
                known = [value for value in of_ranks if not math.isnan(value)]  # NaN: no sequence of that rank counts
                log[trls_name].append(one_of(known) if known else math.nan)

        if "window_entropy" in averages:
            self._adapt_entropy_coef(averages["window_entropy"])
        if self._has_entropy_bonus() and mode == "train" and self.accelerator.sync_gradients:
            log["entropy_coef"].append(self.entropy_coef)
