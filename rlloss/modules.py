"""Drop-in loss modules: from logits, or from hidden states, to the loss."""

import functools
from typing import Any

from torch import Tensor, nn

from rlloss import checks
from rlloss.config import LossConfig
from rlloss.lm_head.call import HeadInputs, head_options
from rlloss.lm_head.gradient_in_forward import gradient_in_forward, prepare_loss
from rlloss.logits.gradient_in_forward import single_launch_loss, why_two_launches, worthwhile
from rlloss.logits.statistics import LogitsInputs, stats_of
from rlloss.logits.transform import Transform
from rlloss.losses.inputs import LossInputs
from rlloss.losses.loss import loss_of
from rlloss.losses.metrics import PolicyLoss


def _config(config: LossConfig | str | None, settings: dict[str, Any]) -> LossConfig:
    """The config, or the one that a `loss_type` and settings are short for."""
    if isinstance(config, LossConfig):
        checks.require(not settings, "config", "a LossConfig", f"a loss_type or nothing beside {', '.join(settings)}")
        return config
    if config is not None:
        checks.of_type("config", config, str, "a LossConfig, a loss_type or None")
        settings = {"loss_type": config, **settings}
    return LossConfig(**settings)


class GRPOLoss(nn.Module):
    """The loss of `config` from logits: `token_stats` and `policy_loss`, which have the full description.

    Rows that carry no gradient (masked, clipped, of low entropy, advantage 0) are not read in the backward. Where the
    Triton kernels run, the losses that clip and "cispo" take one launch between the two passes over the logits.

    Args:
        config: a `LossConfig`, or a loss_type, which settings as keywords may follow: `GRPOLoss("grpo", beta=0.04)` is
            `GRPOLoss(LossConfig("grpo", beta=0.04))`. `LossConfig()` if None.
        inplace_grad: write the gradient over the logits in the backward, as `token_stats` does, with its conditions.
        single_launch: let the forward write the gradient too, while a row is in the cache; the loss and the gradient
            are the same. It takes settings by which a token's coefficient depends on no other token: a ratio per
            token, no off-policy mask, top_entropy_quantile=1 or a `cutoff`; eager Triton. The gradient is held until
            the backward. It pays where the incoming gradient is 1, and costs where it is not: rather than dividing
            the loss by a number of micro-batches, put that into the `denominator`. None: where the settings allow it
            and the rows in flight fit the GPU's cache. True: an error where the settings forbid it.
    """

    def __init__(
        self,
        config: LossConfig | str | None = None,
        *,
        inplace_grad: bool = False,
        single_launch: bool | None = None,
        **settings: Any,
    ):
        super().__init__()
        self.config = _config(config, settings)
        checks.flag("inplace_grad", inplace_grad)
        if single_launch is not None:
            checks.flag("single_launch", single_launch)
        self.inplace_grad = inplace_grad
        self.single_launch = single_launch
        checks.require(
            not (inplace_grad and single_launch), "single_launch", True,
            "None or False with inplace_grad=True, which writes in the backward",
        )  # fmt: skip

    def extra_repr(self) -> str:
        return repr(self.config)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        advantage: Tensor,
        *,
        mask: Tensor,
        old_logp: Tensor | None = None,
        ref_logp: Tensor | None = None,
        sampler_ratio: Tensor | None = None,
        sampler_logp: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        cutoff: Tensor | float | None = None,
        denominator: Tensor | float | None = None,
        kept: Tensor | None = None,
        selected: Tensor | None = None,
    ) -> PolicyLoss:
        """The loss of a batch of completions from its logits.

        Args:
            logits: `[B, T, V]`, those that predict the completion (shifted already); any float dtype, any strides.
            target: `[B, T]` int64, the token ids of the completion.
            advantage: `[B]`, or `[B, T]` for one per token.
            mask: `[B, T]` bool, True: the token counts. What stands in other columns is never looked at.
            old_logp: `[B, T]` log-probability in nats under the policy that sampled. None: every ratio is 1.
            ref_logp: `[B, T]` under the reference; needed if and only if `config.beta` is not 0.
            sampler_ratio: `[B, T]` or `[B, 1]`, the weight that `rlloss.sampler_ratio` makes.
            sampler_logp: `[B, T]` under the inference engine, for `config.off_policy_threshold`.
            temperature: float, or `[B, T]`: logits are divided by it, as in sampling.
            softcap, logit_scale: logits are softcap * tanh(logit_scale * logits / softcap); softcap None: no bound.
            cutoff: keep tokens with entropy >= cutoff; None: this call's own quantile.
            denominator: divisor of the summed loss. Pass the count of the whole batch when you accumulate over
                micro-batches or ranks. None: this call's own count: tokens, kept tokens, B, or
                B * max_completion_length.
            kept, selected: `[B, T]` bool, tokens kept by entropy or picked by covariance, of a batch that was split.

        Returns:
            `PolicyLoss(loss, metrics)`: a 0-d loss with gradient; detached sums, which `rlloss.means` divides.

        Raises:
            ValueError, TypeError: an argument does not fit, is missing or would have no effect; it is named.

        `policy_loss` has the same arguments in more words.
        """
        checks.floating("logits", logits)
        checks.require(logits.dim() == 3, "logits", f"shape {tuple(logits.shape)}", "[B, T, V]")
        checks.boolean("mask", mask)
        config, rows = self.config, LogitsInputs(logits, target, mask, Transform(temperature, softcap, logit_scale))
        given = functools.partial(
            LossInputs, advantage=advantage, mask=mask, config=config, old_logp=old_logp, ref_logp=ref_logp,
            sampler_ratio=sampler_ratio, sampler_logp=sampler_logp, cutoff=cutoff, denominator=denominator, kept=kept,
            selected=selected,
        )  # fmt: skip
        reason = "single_launch=False" if self.single_launch is False else None
        if self.inplace_grad:
            reason = "inplace_grad=True"
        if kept is not None:
            reason = "tokens kept by another call"
        reason = reason or why_two_launches(logits, config, cutoff, denominator)
        if reason is None and (self.single_launch or worthwhile(logits)):
            return single_launch_loss(rows, given)
        checks.require(not self.single_launch, "single_launch", True, f"None or False with {reason}")
        stats = stats_of(rows, ("logp", "entropy"), config.entropy_coef != 0.0, self.inplace_grad)
        return loss_of(given(logp=stats.logp, entropy=stats.entropy))


class LinearGRPOLoss(nn.Module):
    """The loss of `config` from hidden states and the lm_head: `linear_token_stats` and `policy_loss`, which have the
    full description.

    There are no `[B, T, V]` logits. Matrix products are run for tokens that count, in the forward, and for those that
    get a gradient (not masked, clipped, of low entropy or of advantage 0), in the backward.

    Args:
        config: as for `GRPOLoss`.
        plan: "recompute", "keep" (see `linear_token_stats`), or "gradient_in_forward": the gradients of hidden and
            weight are made in the forward and held, 1 + 2r products, the logits of a chunk of rows at a time; for
            settings by which a token's coefficient depends on no other token (a ratio per token, no off-policy mask,
            top_entropy_quantile=1 or a `cutoff`). "auto": the one with the fewest products whose memory fits.
            `explain_plan` says which.
        memory_budget: bytes that a plan may take above inputs, gradients and one tile, also as a size such as "1GiB".
            None: 2 V D.
        batch_invariant: the bits of a row's logp do not depend on the rows around it.
        vocab_group: process group over which the vocabulary is split, as for `linear_token_stats`.
        static_capacity: (rows, live), room for so many tokens that count and so many with a gradient, as for
            `linear_token_stats`: no host sync, and fit for a CUDA graph. Not for the plan "gradient_in_forward".
    """

    def __init__(
        self,
        config: LossConfig | str | None = None,
        *,
        plan: str = "auto",
        memory_budget: int | str | None = None,
        batch_invariant: bool = False,
        vocab_group: Any = None,
        static_capacity: tuple[int, int] | None = None,
        **settings: Any,
    ):
        super().__init__()
        self.config = _config(config, settings)
        self.options = head_options(plan, memory_budget, batch_invariant, vocab_group, static_capacity)

    def extra_repr(self) -> str:
        return f"{self.config!r}, plan={self.options.plan!r}"

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        advantage: Tensor,
        *,
        bias: Tensor | None = None,
        mask: Tensor,
        old_logp: Tensor | None = None,
        ref_logp: Tensor | None = None,
        sampler_ratio: Tensor | None = None,
        sampler_logp: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        cutoff: Tensor | float | None = None,
        denominator: Tensor | float | None = None,
        kept: Tensor | None = None,
        selected: Tensor | None = None,
    ) -> PolicyLoss:
        """The loss of a batch of completions from its hidden states and the lm_head.

        Args:
            hidden: `[B, T, D]`, the states that predict the completion (shifted already), as `completion_inputs` gives.
            weight: `[V, D]`, the lm_head's.
            target: `[B, T]` int64, the token ids of the completion.
            advantage: `[B]`, or `[B, T]` for one per token.
            bias: `[V]`, or None.
            mask: `[B, T]` bool, True: the token counts. What stands in other columns is never looked at.
            old_logp: `[B, T]` log-probability in nats under the policy that sampled. None: every ratio is 1.
            ref_logp: `[B, T]` under the reference; needed if and only if `config.beta` is not 0.
            sampler_ratio: `[B, T]` or `[B, 1]`, the weight that `rlloss.sampler_ratio` makes.
            sampler_logp: `[B, T]` under the inference engine, for `config.off_policy_threshold`.
            temperature: float, or `[B, T]`: logits are divided by it, as in sampling.
            softcap, logit_scale: logits are softcap * tanh(logit_scale * logits / softcap); softcap None: no bound.
            cutoff: keep tokens with entropy >= cutoff; None: this call's own quantile.
            denominator: divisor of the summed loss. Pass the count of the whole batch when you accumulate over
                micro-batches or ranks. None: this call's own count: tokens, kept tokens, B, or
                B * max_completion_length.
            kept, selected: `[B, T]` bool, tokens kept by entropy or picked by covariance, of a batch that was split.

        Returns:
            `PolicyLoss(loss, metrics)`: a 0-d loss with gradient; detached sums, which `rlloss.means` divides.

        Raises:
            ValueError, TypeError: an argument does not fit, is missing or would have no effect; it is named.

        `policy_loss` has the same arguments in more words.
        """
        given = functools.partial(
            LossInputs, advantage=advantage, mask=mask, config=self.config, old_logp=old_logp, ref_logp=ref_logp,
            sampler_ratio=sampler_ratio, sampler_logp=sampler_logp, cutoff=cutoff, denominator=denominator, kept=kept,
            selected=selected,
        )  # fmt: skip
        inputs = HeadInputs(hidden, weight, target, bias, mask, temperature, softcap, logit_scale)
        call = prepare_loss(inputs, self.options, advantage, self.config, cutoff, denominator)
        if call.report is not None and call.report.plan == "gradient_in_forward":
            return gradient_in_forward(call, self.config, given)
        stats = call.stats(("logp", "entropy"), self.config.entropy_coef != 0.0)
        return loss_of(given(logp=stats.logp, entropy=stats.entropy))
