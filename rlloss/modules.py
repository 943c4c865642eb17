"""These `nn.Module` classes compute the loss of a training step from logits, or from hidden states and the lm_head."""

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
    """Return the config, or make one from a `loss_type` and settings."""
    if isinstance(config, LossConfig):
        checks.require(not settings, "config", "a LossConfig", f"a loss_type or nothing beside {', '.join(settings)}")
        return config
    if config is not None:
        checks.of_type("config", config, str, "a LossConfig, a loss_type or None")
        settings = {"loss_type": config, **settings}
    return LossConfig(**settings)


class GRPOLoss(nn.Module):
    """Compute the loss of `config` from logits, as `token_stats` followed by `policy_loss` do.

    The backward does not read rows without a gradient (masked, clipped, of low entropy, advantage 0). With the Triton
    kernels, "cispo" and the losses that clip need one launch between the two passes over the logits.

    Args:
        config: a `LossConfig`, or a loss_type with its settings as keywords: `GRPOLoss("grpo", beta=0.04)` is
            `GRPOLoss(LossConfig("grpo", beta=0.04))`. None: `LossConfig()`.
        inplace_grad: write the gradient over the logits in the backward, under the conditions of `token_stats`.
        single_launch: let the forward also write the gradient, while a row is in the cache. Loss and gradient do not
            change. It needs eager Triton, and settings under which a token's coefficient depends on no other token: a
            ratio per token, no off-policy mask, top_entropy_quantile=1 or a `cutoff`. The gradient is held until the
            backward. It saves time if the incoming gradient is 1 and costs time otherwise, so do not divide the loss by
            the number of micro-batches; put that number into `denominator`. None: used if the settings allow it and
            the rows in flight fit the GPU's cache. True: raise if the settings forbid it. False: never used.

    Raises:
        ValueError, TypeError: an argument does not fit; the error names it.
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
        """Compute the loss of a batch of completions from its logits. `policy_loss` describes the arguments at length.

        Args:
            logits: `[B, T, V]` that predict the completion (already shifted); any float dtype, any strides.
            target: `[B, T]` int64, the token ids of the completion.
            advantage: `[B]`, or `[B, T]` for one per token.
            mask: `[B, T]` bool, True: the token counts. Other columns are never read.
            old_logp: `[B, T]` log-probability in nats under the policy that sampled. None: every ratio is 1.
            ref_logp: `[B, T]` log-probability under the reference; needed if and only if `config.beta` is not 0.
            sampler_ratio: `[B, T]` or `[B, 1]`, weight of the surrogate, from `rlloss.sampler_ratio`.
            sampler_logp: `[B, T]` log-probability under the inference engine, for `config.off_policy_threshold`.
            temperature: float, or `[B, T]`: logits are divided by it, as in sampling.
            softcap, logit_scale: logits become softcap * tanh(logit_scale * logits / softcap); softcap None: no tanh.
            cutoff: keep tokens with entropy >= cutoff; None: this call's own quantile.
            denominator: divisor of the summed loss. Pass the count of the whole batch when you accumulate over
                micro-batches or ranks. None: this call's own count: tokens, kept tokens, B, or
                B * max_completion_length.
            kept: `[B, T]` bool, the tokens kept by entropy, if the batch was split.
            selected: `[B, T]` bool, the tokens picked by covariance, if the batch was split.

        Returns:
            `PolicyLoss(loss, metrics)`: a 0-d loss with gradient, and detached sums for `rlloss.means`.

        Raises:
            ValueError, TypeError: an argument does not fit, is missing or would have no effect; the error names it.
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
    """Compute the loss of `config` from hidden states and the lm_head, as `linear_token_stats` and `policy_loss` do.

    The `[B, T, V]` logits never exist as a whole. The forward runs matrix products for tokens that count. The backward
    runs them for tokens with a gradient (not masked, not clipped, not of low entropy, advantage not 0).

    Args:
        config: as for `GRPOLoss`.
        plan: "recompute", "keep" and "jacobian" are described at `linear_token_stats`. "gradient_in_forward" computes
            the gradients of hidden and weight in the forward, from the logits of one chunk of rows at a time, and holds
            them: 1 + 2r products for a share r of live rows. It needs settings under which a token's coefficient
            depends on no other token (a ratio per token, no off-policy mask, top_entropy_quantile=1 or a `cutoff`).
            "auto" is described there too. `explain_plan` tells you which one it takes.
        memory_budget: as for `linear_token_stats`.
        batch_invariant: make the bits of a row's logp independent of the rows around it.
        vocab_group: process group over which the vocabulary is split, as for `linear_token_stats`.
        static_capacity: (rows, live), the fixed numbers of tokens that count and of tokens with a gradient, as for
            `linear_token_stats`. A call then does not synchronise and can be captured in a CUDA graph. Not possible
            with the plan "gradient_in_forward".

    Raises:
        ValueError, TypeError: an argument does not fit; the error names it.
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
        """Compute the loss of a batch of completions from its hidden states and the lm_head.

        `policy_loss` describes most of the arguments at length.

        Args:
            hidden: `[B, T, D]` that predict the completion (already shifted), as `completion_inputs` returns them;
                bf16, fp16, fp32 or fp64.
            weight: `[V, D]`, the weight of the lm_head.
            target: `[B, T]` int64, the token ids of the completion.
            advantage: `[B]`, or `[B, T]` for one per token.
            bias: `[V]`, or None.
            mask: `[B, T]` bool, True: the token counts. Other columns are never read.
            old_logp: `[B, T]` log-probability in nats under the policy that sampled. None: every ratio is 1.
            ref_logp: `[B, T]` log-probability under the reference; needed if and only if `config.beta` is not 0.
            sampler_ratio: `[B, T]` or `[B, 1]`, weight of the surrogate, from `rlloss.sampler_ratio`.
            sampler_logp: `[B, T]` log-probability under the inference engine, for `config.off_policy_threshold`.
            temperature: float, or `[B, T]`: logits are divided by it, as in sampling.
            softcap, logit_scale: logits become softcap * tanh(logit_scale * logits / softcap); softcap None: no tanh.
            cutoff: keep tokens with entropy >= cutoff; None: this call's own quantile.
            denominator: divisor of the summed loss. Pass the count of the whole batch when you accumulate over
                micro-batches or ranks. None: this call's own count: tokens, kept tokens, B, or
                B * max_completion_length.
            kept: `[B, T]` bool, the tokens kept by entropy, if the batch was split.
            selected: `[B, T]` bool, the tokens picked by covariance, if the batch was split.

        Returns:
            `PolicyLoss(loss, metrics)`: a 0-d loss with gradient, and detached sums for `rlloss.means`.

        Raises:
            ValueError, TypeError: an argument does not fit, is missing or would have no effect; the error names it.
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
