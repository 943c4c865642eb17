"""Attach sampling temperatures and token selections to a generation batch, for all of its micro-batches.

These entries are added to TRL's micro-batches. `temperatures` [B, T]: the sampling temperature of each token.
`rollout_logp` and `rollout_entropy` [B, T]: from the pass without gradient. `entropy_cutoff` (0-d), `kept_tokens` and
`selected_tokens` [B, T] bool: the loss takes them as `cutoff`, `kept` and `selected`. `kept_and_all` [2]: the number of
kept tokens, and the number of tokens that count.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import LogitsProcessorList
except ImportError as error:
    raise ImportError(
        'rlloss.integrations.trl.generation_batch needs transformers: pip install "rlloss[trl]"'
    ) from error

from rlloss import checks
from rlloss.config import LossConfig
from rlloss.entropy.temperature import temperature_rule
from rlloss.integrations.transformers.sampling import EntropyTemperatureProcessor
from rlloss.integrations.trl import compat
from rlloss.integrations.trl.config import given, options
from rlloss.integrations.trl.model_call import ModelCall
from rlloss.integrations.trl.zero_advantage import counted_tokens
from rlloss.loss_types import LOSSES
from rlloss.tokens.covariance import covariance_selection
from rlloss.tokens.exact_k import sequence_key
from rlloss.tokens.masks import entropy_cutoff, top_entropy_mask

ENTROPY_SCOPES = ("microbatch", "window", "generation")


class Rollout:
    """Applies the options that concern a whole generation batch, in a trainer of TRL."""

    def __init__(self, trainer: Any, multimodal: tuple[str, ...]):
        self.trainer, self.multimodal = trainer, multimodal
        settings = given(options(trainer.args).dynamic_temperature)
        self.rule = temperature_rule(settings) if settings is not None else None
        self._recorded: Tensor | None = None  # temperatures of the present, unfinished generation
        self._generating = False
        self._pass: tuple[Tensor, Tensor] | None = None  # logp and entropy of the first pass without gradient
        self._window: list[dict] = []

    @property
    def _by_engine(self) -> bool:
        return self.trainer.use_vllm

    @property
    def entropy_scope(self) -> str:
        return options(self.trainer.args).entropy_scope

    def check(self, config: LossConfig | None, trls_own: str | None, trls_call: str | None) -> None:
        """Raise ValueError if an option would be ignored. trls_own, trls_call: why TRL computes the loss, or calls the
        model, itself; None: it does not."""
        trainer, args, scope = self.trainer, self.trainer.args, self.entropy_scope
        checks.one_of("entropy_scope", scope, ENTROPY_SCOPES)
        if trls_own is not None:
            where = f"with {trls_own}, where the loss is TRL's own"
            checks.require(self.rule is None, "dynamic_temperature", options(trainer.args).dynamic_temperature,
                           f"None {where}")  # fmt: skip
            checks.require(scope == "microbatch", "entropy_scope", repr(scope), f"'microbatch' {where}")
            return
        assert config is not None
        checks.require(
            scope == "microbatch" or config.top_entropy_quantile < 1.0, "entropy_scope", repr(scope),
            "'microbatch' with top_entropy_quantile=1.0, where it has no effect",
        )  # fmt: skip
        steps, accumulation = args.steps_per_generation, args.gradient_accumulation_steps
        checks.require(
            scope != "window" or steps % accumulation == 0, "entropy_scope", "'window'",
            f"'microbatch' or 'generation' with gradient_accumulation_steps={accumulation}, steps_per_generation="
            f"{steps}: a window would reach into a generation that does not exist yet",
        )  # fmt: skip
        if self.rule is None:
            return
        plan = options(trainer.args).lm_head_plan
        name, found = "dynamic_temperature", args.dynamic_temperature
        checks.require(args.temperature == 1.0, "temperature", args.temperature,
                       "1.0 with dynamic_temperature, which is the temperature itself")  # fmt: skip
        checks.require(plan != "trl", name, found, "None with lm_head_plan='trl', whose head has one temperature")
        why = trls_call or compat.why_no_lm_head()
        checks.require(why is None, name, found, f"None with {why}")
        checks.require(self.rule.lowest > 0.0, name, found,
                       "temperatures above 0: a greedy token has no log-probability to train on")  # fmt: skip
        tools = getattr(trainer, "tools", None) or getattr(trainer, "environments", None)
        checks.require(not tools, name, found, "None with tools: what they write is not sampled")
        checks.require(getattr(trainer, "rollout_func", None) is None, name, found,
                       "None with a rollout_func, which samples by itself")  # fmt: skip
        checks.require(not getattr(args, "use_transformers_continuous_batching", False), name, found,
                       "None with use_transformers_continuous_batching, which records no temperatures")  # fmt: skip

    @contextlib.contextmanager
    def sampling(self):
        """Inside, transformers' `generate` samples by the rule, and the temperatures are stored."""
        if self.rule is None or self._by_engine:
            yield
            return
        processor = EntropyTemperatureProcessor(self.rule, record=True)
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
        generate, own = model.generate, vars(model).get("generate")

        def with_rule(*args, logits_processor=None, **kwargs):
            return generate(
                *args, logits_processor=LogitsProcessorList([*(logits_processor or []), processor]), **kwargs
            )

        model.generate = with_rule
        try:
            yield
        finally:
            del model.generate
            if own is not None:
                model.generate = own
        self._recorded = processor.temperatures()

    @contextlib.contextmanager
    def generation(self):
        """Inside, TRL makes one generation batch: its passes use the temperatures, and the first pass is stored."""
        self._recorded = self._pass = None
        self._generating = True
        try:
            yield
        finally:
            self._generating = False
            self._recorded = self._pass = None

    def in_generation(self, model: Any, ids: Tensor, attention_mask: Tensor, T: int) -> Any:
        """Return the model that TRL calls for a pass over the unfinished generation batch."""
        if self.rule is None or not self._generating:
            return model
        temperatures = self._of_generation(ids, attention_mask, T)
        return model if temperatures is None else ModelCall(model, temperatures=temperatures)

    def _of_generation(self, ids: Tensor, attention_mask: Tensor, T: int) -> Tensor | None:
        """Temperatures [B, T], recorded while sampling. If vLLM sampled: by the rule from the model's entropies."""
        assert self.rule is not None
        if self._recorded is None:
            if not self._by_engine:
                return None
            _, entropy = self._without_gradient(ids, attention_mask, T, None)  # at temperature 1
            vocabulary = self.trainer.accelerator.unwrap_model(self.trainer.model).config.get_text_config().vocab_size
            self._recorded = self.rule.temperature(entropy, vocabulary)
        steps = self._recorded.shape[1]
        if steps < T:  # padding to a multiple adds columns
            self._recorded = nn.functional.pad(self._recorded, (0, T - steps), value=1.0)
        return self._recorded[:, :T].to(ids.device)

    def remember(self, result: tuple) -> None:
        """Store the first pass of a generation batch: TRL runs the policy first and the reference after it."""
        if self._generating and self._pass is None and result[1] is not None:
            self._pass = result[0].detach(), result[1].detach()

    @property
    def wants_entropy(self) -> bool:
        return self._generating and self.entropy_scope == "generation"

    def complete(self, output: dict, config: LossConfig | None) -> dict:
        """Add the entries that the selections and the loss need to TRL's generation batch."""
        T = output["completion_ids"].shape[1]
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention_mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        if self.rule is not None and (temperatures := self._of_generation(ids, attention_mask, T)) is not None:
            output["temperatures"] = temperatures
            self._log_temperatures(temperatures, counted_tokens(output))
        by_entropy = self.entropy_scope == "generation"
        by_covariance = config is not None and _picks_once(config)
        if by_entropy or by_covariance:
            logp, entropy = output.get("old_per_token_logps"), None
            if logp is not None and self._pass is not None:
                logp, entropy = self._pass
            if logp is None or (by_entropy and entropy is None):
                more = {name: output[name] for name in self.multimodal if name in output}
                logp, entropy = self._without_gradient(ids, attention_mask, T, output.get("temperatures"), **more)
            output |= {"rollout_logp": logp} if by_covariance else {}
            output |= {"rollout_entropy": entropy} if by_entropy else {}
        return output

    def _log_temperatures(self, temperatures: Tensor, mask: Tensor) -> None:
        trainer = self.trainer
        t = torch.where(mask, temperatures, 0.0).double()
        n, total, squares = trainer.accelerator.reduce(torch.stack([mask.sum(), t.sum(), t.square().sum()])).tolist()
        log, mean = compat.log_of(trainer), total / max(n, 1.0)
        log["sampling/temperature/mean"].append(mean)
        log["sampling/temperature/std"].append(max(squares / max(n, 1.0) - mean**2, 0.0) ** 0.5)

    def _without_gradient(
        self, ids: Tensor, attention_mask: Tensor, T: int, temperatures: Tensor | None, **more
    ) -> tuple[Tensor, Tensor]:
        model = self.trainer.model
        if self.rule is not None:
            model = ModelCall(model, temperatures=temperatures)
        args, training = self.trainer.args, self.trainer.model.training
        size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        with torch.no_grad():
            return compat.token_stats(self.trainer, model, ids, attention_mask, T, size, compute_entropy=True, **more)[
                :2
            ]

    def select(self, batches: list[dict], config: LossConfig, draw: int) -> None:
        """Select tokens in the whole generation batch, and give each micro-batch its part."""
        masks = [counted_tokens(inputs) for inputs in batches]
        mask = torch.cat(masks)
        if self.entropy_scope == "generation":
            self._keep(batches, masks, torch.cat([inputs["rollout_entropy"] for inputs in batches]), config)
        if _picks_once(config):
            selected = covariance_selection(
                torch.cat([inputs["rollout_logp"] for inputs in batches]),
                torch.cat([inputs["advantages"] for inputs in batches]),
                mask, loss_type=config.loss_type, config=config.covariance, draw=draw,
                sequence_key=torch.cat([content_key(inputs) for inputs in batches]), process_group=self._group(),
            )  # fmt: skip
            for inputs, part in zip(batches, selected.split([len(m) for m in masks]), strict=True):
                inputs["selected_tokens"] = part

    def open_window(self, inputs: dict, config: LossConfig) -> None:
        """Before the first micro-batch of an accumulation window, compute one cutoff for all, by the present policy."""
        trainer = self.trainer
        if self.entropy_scope != "window" or any(inputs is known for known in self._window):
            return
        args, buffered = trainer.args, compat.buffered(trainer)
        self._window = [inputs]
        if trainer.model.training and buffered is not None:
            place = compat.micro_batches(trainer) % args.steps_per_generation
            self._window = buffered[place : place + args.gradient_accumulation_steps]
        entropies = []
        for member in self._window:
            T = member["completion_ids"].shape[1]
            more = {name: member[name] for name in self.multimodal if name in member}
            ids, attention = (
                torch.cat([member[f"prompt_{of}"], member[f"completion_{of}"]], dim=1) for of in ("ids", "mask")
            )
            temperatures = member.get("temperatures")
            entropies.append(self._without_gradient(ids, attention, T, temperatures, **more)[1])
        self._keep(self._window, [counted_tokens(member) for member in self._window], torch.cat(entropies), config)

    def close_window(self) -> None:
        """Drop the window after its last micro-batch."""
        self._window = []

    def _keep(self, batches: list[dict], masks: list[Tensor], entropy: Tensor, config: LossConfig) -> None:
        mask, rho, group = torch.cat(masks), config.top_entropy_quantile, self._group()
        cutoff = None if config.exact_k else entropy_cutoff(entropy, mask, rho, process_group=group)
        if cutoff is None:
            key = torch.cat([content_key(inputs) for inputs in batches])
            kept = top_entropy_mask(entropy, mask, rho, exact_k=True, sequence_key=key, process_group=group)
        else:
            kept = top_entropy_mask(entropy, mask, rho, cutoff=cutoff)
        counts = self.trainer.accelerator.reduce(torch.stack([kept.sum(), mask.sum()]), reduction="sum")
        for inputs, part in zip(batches, kept.split([len(m) for m in masks]), strict=True):
            inputs["kept_and_all"] = counts
            inputs |= {"kept_tokens": part} if cutoff is None else {"entropy_cutoff": cutoff}

    def _group(self):
        return torch.distributed.group.WORLD if self.trainer.accelerator.num_processes > 1 else None


def content_key(inputs: dict) -> Tensor:
    """Hash `[B]` of the token ids of each row. It depends neither on the order of rows nor on the process."""
    return sequence_key(*((inputs[f"{of}_ids"], inputs[f"{of}_mask"].bool()) for of in ("prompt", "completion")))


def _picks_once(config: LossConfig) -> bool:
    return LOSSES[config.loss_type].picks is not None and config.covariance.scope == "generation"
