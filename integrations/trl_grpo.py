"""GRPO with TRL: change one import.

    from rlloss.integrations.trl_grpo import GRPOConfig, GRPOTrainer

TRL generates, scores and runs its fused lm_head; the loss after it is rlloss's. Same options, same metrics. A loss
that rlloss does not have is TRL's own, unchanged.
"""

import dataclasses
import logging
import warnings

import torch
from packaging.version import Version

try:
    import trl
except ImportError as error:
    raise ImportError('rlloss.integrations.trl_grpo needs TRL: pip install "rlloss[trl]"') from error

from rlloss import checks
from rlloss.config import LossConfig
from rlloss.losses import LOSSES, means, policy_loss
from rlloss.masks import entropy_cutoff, off_policy_mask, top_entropy_mask

TESTED_TRL = (Version("1.14.0"), Version("1.17.0"))  # from, up to but without
# What `_get_per_token_logps_and_entropies` takes for models that see more than text.
MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
TRL_LOSSES = ("cispo", "sapo", "luspo", "vespo")  # what TRL has and rlloss has not

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


@dataclasses.dataclass
class GRPOConfig(trl.GRPOConfig):
    """TRL's GRPOConfig, its defaults unchanged, and two options more."""

    epsilon_low: float | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Lower clip bound: ratios below 1 - epsilon_low are clipped. Another name for `epsilon`: give one "
            "of the two. (That `epsilon` was given at its default cannot be seen; epsilon_low then counts.)"
        },
    )
    entropy_denominator: str = dataclasses.field(
        default="all",
        metadata={
            "help": "What the policy loss is divided by when top_entropy_quantile < 1: 'all' tokens (TRL), or the "
            "'kept' ones (Beyond the 80/20 Rule, 2506.01939 Eq. 6; for 'dapo' the accumulation window's token count "
            "times the share kept in the micro-batch)."
        },
    )

    def __post_init__(self):
        if self.epsilon_low is not None:
            default = next(f.default for f in dataclasses.fields(trl.GRPOConfig) if f.name == "epsilon")
            if self.epsilon not in (default, self.epsilon_low):
                raise ValueError(
                    f"epsilon_low: found {self.epsilon_low} and epsilon={self.epsilon}, expected one of the two: they "
                    "are the same bound"
                )
            self.epsilon = self.epsilon_low
        super().__post_init__()


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's GRPOTrainer with rlloss's loss. Takes rlloss's or TRL's GRPOConfig.

    Logs TRL's metrics under their names, and `live_share` (tokens with a nonzero gradient), with
    top_entropy_quantile < 1 also `entropy/kept_share` and `entropy/cutoff`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if (theirs := self._why_trls_own()) is not None:
            logger.info("The loss with %s is TRL's own.", theirs)
        self._make_loss_config()  # a setting that does not fit raises now and not in the first step

    def _why_trls_own(self) -> str | None:
        """What rlloss has no loss for among the trainer's options; None: nothing."""
        if IN_TESTED_RANGE:  # another TRL may have more, and says itself what it does not know
            checks.one_of("loss_type", self.loss_type, [*LOSSES, *TRL_LOSSES])
        if self.loss_type not in LOSSES:
            return f"loss_type={self.loss_type!r}"
        if getattr(self, "_entropy_bonus_enabled", False):
            return "an entropy bonus"
        for name in ("get_high_entropy_mask", "get_off_policy_mask"):
            if getattr(type(self), name, None) is not getattr(trl.GRPOTrainer, name, None):
                return f"{name} overridden"
        return None

    def _make_loss_config(self) -> LossConfig | None:
        """The trainer's options as a LossConfig; None where the loss is TRL's own."""
        entropy_denominator = getattr(self.args, "entropy_denominator", "all")
        theirs = self._why_trls_own()
        if theirs is not None:
            checks.require(
                entropy_denominator == "all", "entropy_denominator", repr(entropy_denominator),
                f"'all' with {theirs}, where the loss is TRL's own",
            )  # fmt: skip
            return None
        return LossConfig(
            loss_type=self.loss_type,
            ratio_level=self.importance_sampling_level,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.args.delta,
            top_entropy_quantile=self.top_entropy_quantile,
            entropy_denominator=entropy_denominator,
            beta=self.beta,
            kl_bias_correction=self.beta != 0.0 and self.args.use_bias_correction_kl,
            max_completion_length=self.max_completion_length if self.loss_type == "dr_grpo" else None,
        )

    def _compute_loss(self, model, inputs):
        config = self._make_loss_config()  # callbacks may change the trainer's settings between steps
        if config is None:
            return super()._compute_loss(model, inputs)
        mode = "train" if self.model.training else "eval"
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1.0
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        logp, entropy, aux_loss = self._token_stats(model, inputs)
        old_logp = inputs.get("old_per_token_logps")

        cutoff = None
        if config.top_entropy_quantile < 1.0:
            group = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
            cutoff = entropy_cutoff(entropy, mask, config.top_entropy_quantile, process_group=group)
        loss, metrics = policy_loss(
            logp,
            inputs["advantages"],
            mask,
            config=config,
            old_logp=old_logp,
            ref_logp=inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            sampler_ratio=self._sampler_ratio(inputs, logp, old_logp, mask),
            entropy=entropy,
            cutoff=cutoff,
            denominator=self._denominator(config, inputs, mode, entropy, mask, cutoff),
        )
        loss = loss / accumulation
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        self._log_loss_metrics(mode, metrics)
        return loss

    def _token_stats(self, model, inputs):
        """(logp, entropy, aux loss or None) of the completions from TRL's fused lm_head."""
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

    def _sampler_ratio(self, inputs, logp, old_logp, mask):
        """Weight of the surrogate: TRL's vLLM correction, 0 for sequences that are too far off-policy; None: 1."""
        ratio = None
        if self.use_vllm and self.vllm_importance_sampling_correction:
            ratio = inputs["importance_sampling_ratio"]
        if self.off_policy_mask_threshold is None:
            return ratio
        advantage = inputs["advantages"]
        advantage = advantage.unsqueeze(1) if advantage.dim() == 1 else advantage
        behavior = inputs.get("sampling_per_token_logps", logp.detach() if old_logp is None else old_logp)
        keep = off_policy_mask(advantage, logp, behavior, mask, self.off_policy_mask_threshold)
        return torch.where(keep, torch.ones_like(advantage) if ratio is None else ratio, 0.0)

    def _denominator(self, config, inputs, mode, entropy, mask, cutoff):
        """For dapo this process's share of the tokens of an average micro-batch; None (this call's own) otherwise."""
        if self.loss_type != "dapo":
            return None
        denominator = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if mode == "train":  # it counts the generation batch, which is steps_per_generation micro-batches
            denominator = denominator / self.args.steps_per_generation
        if config.entropy_denominator == "kept":
            kept = top_entropy_mask(entropy, mask, config.top_entropy_quantile, cutoff=cutoff)
            kept, tokens = self.accelerator.reduce(torch.stack([kept.sum(), mask.sum()]), reduction="sum")
            denominator = denominator * kept.clamp(min=1) / tokens.clamp(min=1)
        return denominator

    def _log_loss_metrics(self, mode, metrics):
        log = self._metrics[mode]
        extremes = {name: metrics.pop(name) for name in ("clip_low_min", "clip_high_max")}
        sums = self.accelerator.reduce(torch.stack(list(metrics.values())), reduction="sum")
        averages = means(dict(zip(metrics, sums, strict=True)))
        averages = dict(zip(averages, torch.stack(list(averages.values())).tolist(), strict=True))
        if self.beta != 0.0:
            log["kl"].append(averages["kl"])
        log["entropy"].append(averages["entropy"])
        for name in ("low", "high", "region"):
            log[f"clip_ratio/{name}_mean"].append(averages[f"clip_{name}"])
        gathered = self.accelerator.gather(torch.stack(list(extremes.values())).unsqueeze(0))
        known = gathered[~gathered.isnan().any(-1)]  # NaN: no sequence of that rank counts
        log["clip_ratio/low_min"].append(known[:, 0].min().item() if len(known) else torch.nan)
        log["clip_ratio/high_max"].append(known[:, 1].max().item() if len(known) else torch.nan)
        log["live_share"].append(averages["live_share"])
        if "entropy_cutoff" in averages:
            log["entropy/kept_share"].append(averages["kept_share"])
            log["entropy/cutoff"].append(averages["entropy_cutoff"])
