"""Train with TRL's GRPOTrainer and rlloss's losses. You change one import::

    from rlloss.integrations.trl import GRPOConfig, GRPOTrainer

TRL generates and scores the completions. rlloss computes the lm_head and the loss, for every loss type of TRL and its
own. TRL's options and metrics keep their names and meaning.
"""

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch

from rlloss import checks
from rlloss.config import RATIO_LEVELS, LossConfig
from rlloss.entropy.bonus import bonus_now
from rlloss.entropy.diagnostics import diagnose
from rlloss.integrations.transformers.collapse_monitor import CollapseMonitor, Finding
from rlloss.integrations.transformers.token_log import MetricsLog, TokenLog
from rlloss.integrations.trl import compat
from rlloss.integrations.trl.advantages import RewardsToAdvantages
from rlloss.integrations.trl.config import (
    NOT_READ_BY_COVARIANCE,
    OPTIONS,
    TrlLossConfig,
    options,
    trls_settings,
)
from rlloss.integrations.trl.config import GRPOConfig as GRPOConfig
from rlloss.integrations.trl.generation_batch import Rollout, content_key
from rlloss.integrations.trl.lm_head import LmHead, patch_with
from rlloss.integrations.trl.metrics import LogOrder, LossMetrics
from rlloss.integrations.trl.model_call import ModelCall
from rlloss.integrations.trl.model_card import about_run, complete_card, dataset_of
from rlloss.integrations.trl.run_summary import RunSummary
from rlloss.integrations.trl.zero_advantage import ZeroAdvantage, counted_tokens, dead_completions
from rlloss.loss_types import LOSSES
from rlloss.losses.aggregate import default_denominator
from rlloss.losses.inputs import LossInputs
from rlloss.losses.loss import loss_of
from rlloss.losses.metrics import means
from rlloss.losses.token_states import states_of
from rlloss.rewards.resolution import group_accuracy
from rlloss.tokens.masks import entropy_cutoff, top_entropy_mask

# Arguments of `_get_per_token_logps_and_entropies` for multimodal models.
MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
logger = logging.getLogger(__name__)


class GRPOTrainer(compat.trl.GRPOTrainer):
    """TRL's GRPOTrainer with rlloss's loss. It takes the same arguments, and rlloss's or TRL's GRPOConfig.

    It logs TRL's metrics under their names, and in addition, depending on the option `gauges`:

    - `rlloss/live_share` (share of tokens with a nonzero gradient) and `rlloss/zero_advantage_share` (share of
      completions whose whole advantage is 0);
    - `entropy/kept_share` and `entropy/cutoff`, with top_entropy_quantile < 1;
    - the gauges of `rlloss.entropy`, once per optimizer step;
    - the numbers of `rlloss.rewards.reward_resolution`, once per generation, with several rewards;
    - the work of the lm_head, see `rlloss.integrations.trl.run_summary`.

    Raises:
        ValueError: an option has a wrong value or would be ignored, or no parameter of the model is trainable.
    """

    dataset_name: str | None = None
    """Name of the training set for the model card: a Hub id or a file. None: read it from the dataset's cache."""

    def __init__(self, *args, **kwargs):
        self._said: set[str] = set()
        self._check_before_loading(kwargs.get("args", args[2] if len(args) > 2 else None))
        super().__init__(*args, **kwargs)
        compat.check(self)
        checks.require(
            any(p.requires_grad for p in self.model.parameters()), "model",
            f"{type(self.model).__name__} ({self.model.config._name_or_path!r}), none of whose parameters requires a "
            "gradient", "one to train: load an adapter with is_trainable=True, or give a peft_config",
        )  # fmt: skip
        self._zero_advantage = ZeroAdvantage(self, MULTIMODAL)
        self._rollout = Rollout(self, MULTIMODAL)
        self._rewards_to_advantages = RewardsToAdvantages(self, MULTIMODAL)
        self._summary = RunSummary(self)
        self.add_callback(self._summary)
        self._loss_metrics, self._log_order = LossMetrics(self, self._summary.tokens), LogOrder()
        self._token_log = self._make_token_log()
        watches = options(self.args).collapse_monitor
        if watches and not any(isinstance(c, CollapseMonitor) for c in self.callback_handler.callbacks):
            self.add_callback(CollapseMonitor())
        if (theirs := self._why_trls_own()) is not None:
            logger.info("The loss with %s is TRL's own.", theirs)
        self._make_loss_config()  # a wrong setting raises here, not in the first step

    def _check_before_loading(self, args: Any) -> None:
        """Raise for wrong settings before the weights are loaded."""
        if args is None:
            return
        compat.before_loading(self, args)
        self._zero_advantage, self._rollout = ZeroAdvantage(self, MULTIMODAL), Rollout(self, MULTIMODAL)
        with contextlib.suppress(AttributeError):  # checks that need the model run later
            self._make_loss_config()

    def _warn_once(self, message: str) -> None:
        if not hasattr(self, "accelerator"):
            return  # repeated when there is one
        if message not in self._said:
            self._said.add(message)
            if self.accelerator.is_main_process:
                logger.warning("%s", message)

    def _make_token_log(self) -> TokenLog | None:
        if options(self.args).token_log_steps == 0:
            return None
        checks.require(
            self._why_trls_own() is None, "token_log_steps", self.args.token_log_steps,
            f"0 with {self._why_trls_own()}, where the loss is TRL's own",
        )  # fmt: skip
        folder = str(self.args.output_dir)
        if self.accelerator.is_main_process:
            self.add_callback(MetricsLog(folder, lambda: about_run(self), self._findings))
        log = TokenLog(folder, compat.tokenizer(self), self.accelerator.process_index)
        self.add_callback(log)
        return log

    def _findings(self) -> list[Finding]:
        """The findings of all monitors among the callbacks."""
        monitors = [c for c in self.callback_handler.callbacks if isinstance(c, CollapseMonitor)]
        return [finding for monitor in monitors for finding in monitor.findings]

    def _why_trls_own(self) -> str | None:
        """Why TRL computes the loss: an unknown loss type, a replaced hook, or a setting that only rlloss refuses.
        None: rlloss computes it."""
        if compat.IN_TESTED_RANGE and not self._overrides(
            "_compute_loss"
        ):  # others may know more loss types, and raise themselves
            checks.one_of("loss_type", self.loss_type, tuple(LOSSES))
        if self.loss_type not in LOSSES:
            return f"loss_type={self.loss_type!r}"
        loss_type = LOSSES[self.loss_type]
        called = {
            "get_high_entropy_mask": self.top_entropy_quantile < 1.0,
            "get_off_policy_mask": self.off_policy_mask_threshold is not None,
            "get_gamma_weights": "vespo" in loss_type.reads,
            "get_sapo_token_loss": "sapo" in loss_type.reads,
        }
        for name, is_called in called.items():
            if is_called and compat.is_replaced(self, name):
                return f"{name} overridden"
        checks.one_of("importance_sampling_level", self.importance_sampling_level, RATIO_LEVELS)
        if not loss_type.in_trl:
            return None
        try:
            TrlLossConfig(**trls_settings(self))
        except ValueError as refused:
            no_length = "max_completion_length" in loss_type.reads and self.max_completion_length is None
            if no_length or self.top_entropy_quantile < 0.0:  # TRL fails in the first step
                raise
            self._warn_once(f"{refused}. TRL runs with it all the same, by its own loss.")
            return f"a setting that rlloss refuses ({refused})"
        return None

    def _overrides(self, name: str) -> bool:
        return name in vars(self) or getattr(type(self), name) is not getattr(GRPOTrainer, name)

    def _make_loss_config(self) -> LossConfig | None:
        """Return the trainer's options as a LossConfig. None: TRL computes the loss."""
        entropy_denominator = options(self.args).entropy_denominator
        theirs = self._why_trls_own()
        self._zero_advantage.check(theirs)
        exact_k = options(self.args).exact_k
        bonus_tokens = options(self.args).entropy_bonus_tokens
        max_log_ratio = options(self.args).max_log_ratio
        if theirs is not None:
            for name, found, expected in (
                ("entropy_denominator", entropy_denominator, "all"),
                ("exact_k", exact_k, False),
                ("max_log_ratio", max_log_ratio, None),
                ("entropy_bonus_tokens", bonus_tokens, "kept"),
            ):
                checks.require(
                    found == expected, name, repr(found), f"{expected!r} with {theirs}, where the loss is TRL's own"
                )
            self._rollout.check(None, theirs, None)
            return None
        read = LOSSES[self.loss_type].reads
        for name, default in NOT_READ_BY_COVARIANCE.items():
            if "covariance" in read and name not in read:
                checks.require(
                    OPTIONS[name](self) == default, name, OPTIONS[name](self),
                    f"none: leave it out, loss_type={self.loss_type!r} does not read it",
                )  # fmt: skip
        checks.require(
            bonus_tokens == "kept" or compat.has_entropy_bonus(self), "entropy_bonus_tokens", repr(bonus_tokens),
            "'kept' without an entropy bonus (entropy_coef or use_adaptive_entropy), where it has no effect",
        )  # fmt: skip
        settings = trls_settings(self)
        config = TrlLossConfig(
            **settings,
            entropy_denominator=entropy_denominator,
            exact_k=exact_k,
            max_log_ratio=max_log_ratio,
            entropy_bonus_tokens=bonus_tokens if settings["entropy_coef"] != 0.0 else "kept",
        )
        if LOSSES[self.loss_type].caps_ratio and config.epsilon_high < 1.0:
            self._warn_once(
                f"loss_type={self.loss_type!r} caps the importance ratio at epsilon_high={config.epsilon_high} (TRL "
                "takes it from epsilon where it is not given), so nearly every token has that weight. The cap is "
                "meant to be above 1: ScaleRL (2510.13786) takes epsilon_high=5.0."
            )
        self._rollout.check(config, None, self._why_trls_call())
        return config

    def _compute_loss(self, model, inputs):
        config = self._make_loss_config()  # callbacks may change the trainer's settings between steps
        if config is None:
            return super()._compute_loss(model, inputs)
        mode = "train" if self.model.training else "eval"
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1.0
        whole = inputs
        self._summary.loss_begins(whole["completion_ids"])
        if config.top_entropy_quantile < 1.0:
            self._rollout.open_window(whole, config)
        model, inputs = self._zero_advantage.apart(model, whole, self._why_trls_call())
        mask = counted_tokens(inputs)
        logp, entropy, aux_loss = self._token_stats(model, inputs)

        cutoff, kept = self._selection(config, inputs, entropy, mask)
        denominator = self._denominator(config, inputs, mode, entropy, mask, cutoff, kept)
        if denominator is None and inputs is not whole:
            denominator = default_denominator(counted_tokens(whole), LOSSES[self.loss_type], config)
        given = LossInputs(
            logp,
            inputs["advantages"],
            mask,
            config,
            old_logp=inputs.get("old_per_token_logps"),
            ref_logp=inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            sampler_ratio=self._sampler_ratio(inputs),
            sampler_logp=None if config.off_policy_threshold is None else inputs.get("sampling_per_token_logps"),
            entropy=entropy,
            cutoff=cutoff,
            denominator=denominator,
            kept=kept,
            selected=inputs.get("selected_tokens"),
        )
        loss, metrics = loss_of(given)
        self._write_tokens(inputs, given)
        # TRL logs the loss without the bonus. A loss whose divisor covers the window is divided by the accumulation.
        if compat.has_entropy_bonus(self):
            of = "entropy_kept" if config.entropy_bonus_tokens == "kept" else "entropy"
            without = loss.detach() + config.entropy_coef * means(metrics)[of]
            metrics["policy_loss"] = without if denominator is None else without / accumulation
        loss = loss / accumulation
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
            compat.log_of(self, mode)["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        dead = dead_completions(whole).float()
        metrics |= {"dead": dead.sum(), "completions": dead.new_full((), len(dead))}
        metrics["counted"] = mask.sum().float() if inputs is whole else counted_tokens(whole).sum().float()
        self._loss_metrics.log(mode, metrics, self._gauges(logp, entropy, mask, inputs))
        if self.accelerator.sync_gradients:
            self._rollout.close_window()
        return loss

    def training_step(self, *args, **kwargs):
        with self._summary.micro_batch():
            return super().training_step(*args, **kwargs)

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._summary.log(compat.log_of(self, "train"))
        self._log_order.bring(compat.log_of(self, mode), options(self.args).gauges)
        super().log(logs, start_time)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        dataset = dataset_name or self.dataset_name or dataset_of(self.train_dataset)
        on_hub = dataset is not None and not Path(dataset).exists()
        model_name = model_name or Path(self.hub_model_id or str(self.args.output_dir)).name
        super().create_model_card(model_name, dataset if on_hub else None, tags)
        if self.is_world_process_zero():
            complete_card(self, dataset)

    def _gauges(self, logp, entropy, mask, inputs):
        old_logp = inputs.get("old_per_token_logps")
        return diagnose(
            logp, inputs["advantages"], mask, entropy=entropy, old_logp=logp if old_logp is None else old_logp,
            group=inputs.get("group_accuracy"), compute_dtype=self._compute_dtype(),
        )  # fmt: skip

    def _compute_dtype(self) -> torch.dtype:
        of_model: Any = self.model.dtype
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(self.accelerator.mixed_precision)) or of_model

    def _write_tokens(self, inputs: dict, given: LossInputs) -> None:
        steps = options(self.args).token_log_steps
        if self._token_log is None or not self.model.training or self.state.global_step % steps:
            return
        assert given.entropy is not None
        rewards = dict(zip(self.reward_func_names, inputs["rewards"].T, strict=True)) if "rewards" in inputs else None
        self._token_log.write(
            self.state.global_step, inputs["prompt_ids"], inputs["completion_ids"], given.mask, given.entropy.detach(),
            states_of(given), given.advantage, rewards, prompt_mask=inputs["prompt_mask"].bool(),
        )  # fmt: skip

    def _prepare_inputs(self, generation_batch):
        before = compat.buffered(self)
        inputs = super()._prepare_inputs(generation_batch)
        config, buffered = self._make_loss_config(), compat.buffered(self)
        if config is None:
            return inputs
        if not self.model.training:
            self._rollout.select([inputs], config, compat.micro_batches(self))
        elif buffered is not None and buffered is not before:
            self._rollout.select(buffered, config, compat.micro_batches(self))
            self._zero_advantage.look_ahead(buffered)
        return inputs

    def _calculate_rewards(self, *args, **kwargs):
        return self._rewards_to_advantages.checked(super()._calculate_rewards, *args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = self._rewards_to_advantages.complete(inputs, self._generate_once)
        rewards, B = self._rewards_to_advantages.rewards, len(output["advantages"])
        if rewards is not None:
            G: Any = self.num_generations if self.model.training else self.num_generations_eval
            own = slice(self.accelerator.process_index * B, (self.accelerator.process_index + 1) * B)
            output |= {"rewards": rewards[own], "group_accuracy": group_accuracy(rewards, num_generations=G)[own]}
        return output

    def _generate_once(self, inputs):
        """Make one generation batch with the entries that its micro-batches need. Dynamic sampling makes several."""
        with self._rollout.generation():
            output = super()._generate_and_score_completions(inputs)
            return self._rollout.complete(output, self._make_loss_config())

    def _generate_single_turn(self, *args, **kwargs):
        with self._rollout.sampling():
            return super()._generate_single_turn(*args, **kwargs)

    def _why_trls_call(self) -> str | None:
        """Why TRL or a subclass has to call the model itself, or None."""
        if (reason := compat.why_returns_logits()) is not None:
            return reason
        for name in ("_get_per_token_logps_and_entropies", "_token_stats"):
            if self._overrides(name):
                return f"{name} overridden"
        name = "_get_per_token_logps_and_entropies"
        return f"{name} overridden" if compat.is_replaced(compat.trl.GRPOTrainer, name) else None

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """Call TRL's hook with rlloss's lm_head inside the model's forward."""
        if self._rollout.wants_entropy:
            kwargs["compute_entropy"] = True
        trls_pass = not isinstance(model, ModelCall)
        if trls_pass:
            model = self._rollout.in_generation(model, input_ids, attention_mask, logits_to_keep)
        patch = contextlib.nullcontext()
        if options(self.args).lm_head_plan != "trl" and compat.why_no_lm_head() is None:
            patch = patch_with(self._lm_head())
            patch.head.on_call = self._summary.saw
        with patch:
            result = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        if trls_pass:
            self._rollout.remember(result)
        return result

    def _lm_head(self) -> LmHead:
        chosen = options(self.args)
        budget = checks.memory_budget("lm_head_memory_budget", chosen.lm_head_memory_budget)
        bonus = compat.has_entropy_bonus(self)
        every = self.beta != 0.0 or (bonus and chosen.entropy_bonus_tokens == "all")
        live_share = 1.0 if every else self.top_entropy_quantile
        return LmHead(chosen.lm_head_plan, budget, False, live_share, bonus)

    def _token_stats(self, model, inputs):
        """Return (logp, entropy, auxiliary loss or None) of the completions."""
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
        """Return TRL's correction for vLLM. None: 1."""
        if LOSSES[self.loss_type].level == "product":  # part of the ratio itself, if TRL computed one
            return inputs.get("importance_sampling_ratio")
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        return inputs["importance_sampling_ratio"] if corrects else None

    def _selection(self, config, inputs, entropy, mask):
        """Return (cutoff or None, kept tokens or None) for top_entropy_quantile: stored ones, or this micro-batch's."""
        cutoff, kept, rho = inputs.get("entropy_cutoff"), inputs.get("kept_tokens"), config.top_entropy_quantile
        if rho == 1.0 or cutoff is not None or kept is not None:
            return cutoff, kept
        group = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
        if config.exact_k:
            key = content_key(inputs)
            return None, top_entropy_mask(entropy, mask, rho, exact_k=True, sequence_key=key, process_group=group)
        return entropy_cutoff(entropy, mask, rho, process_group=group), None

    def _denominator(self, config, inputs, mode, entropy, mask, cutoff, kept):
        """Return the divisor of a mean over tokens: this process's part of an average micro-batch, or None: default."""
        loss_type = LOSSES[self.loss_type]
        if loss_type.divided_by != "tokens" or loss_type.own_token_count:
            return None
        denominator = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if mode == "train":  # it counts a generation batch of steps_per_generation micro-batches
            denominator = denominator / self.args.steps_per_generation
        if config.entropy_denominator == "kept":
            counts = inputs.get("kept_and_all")
            if counts is None:
                if kept is None:
                    kept = top_entropy_mask(entropy, mask, config.top_entropy_quantile, cutoff=cutoff)
                counts = self.accelerator.reduce(torch.stack([kept.sum(), mask.sum()]), reduction="sum")
            kept, tokens = counts
            denominator = denominator * kept.clamp(min=1) / tokens.clamp(min=1)
        return denominator

    def _entropy_coef_now(self) -> float:
        """Return the entropy bonus's coefficient. If adaptive: 0 while the last window's entropy is above target."""
        if not compat.has_entropy_bonus(self):
            return 0.0
        if not self.use_adaptive_entropy:
            return self.entropy_coef
        return bonus_now(self.entropy_coef, compat.world_entropy(self), self.args.entropy_target)
