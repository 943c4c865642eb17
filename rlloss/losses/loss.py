"""`policy_loss` computes the loss of a batch from the log-probabilities [B, T] of its tokens."""

from torch import Tensor

from rlloss.config import LossConfig
from rlloss.losses.acting_tokens import Tokens, choose_tokens
from rlloss.losses.coefficients import Coefficients, with_gradient
from rlloss.losses.fused import fits, fused_pass
from rlloss.losses.inputs import LossInputs, check
from rlloss.losses.metrics import PolicyLoss
from rlloss.losses.plain_pass import plain_pass

DEFAULT = LossConfig()  # made here, because torch.compile cannot make one


def policy_loss(
    logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    config: LossConfig | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_ratio: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    cutoff: Tensor | float | None = None,
    denominator: Tensor | float | None = None,
    kept: Tensor | None = None,
    selected: Tensor | None = None,
) -> PolicyLoss:
    """Compute the loss of a batch of completions from its log-probabilities.

    A row of `[B, T]` must be a whole sequence. If sequences are split over ranks, gather the log-probabilities first.
    Otherwise means, ratios and weights of a sequence ("grpo", "gspo", "sapo", "vespo", ratio_level="sequence",
    `off_policy_threshold`) are wrong without an error. `docs/losses.md` lists what may stay split.

    Args:
        logp: `[B, T]` log-probability of each token under the policy, in nats, with gradient. Any float dtype; computed
            in fp32, or in fp64 for fp64.
        advantage: `[B]`, or `[B, T]` for one per token.
        mask: `[B, T]` bool, True: the token counts. Values in the other columns do not matter, NaN included.
        config: settings of the loss. None: `LossConfig()`.
        old_logp: `[B, T]` log-probability under the policy that made the batch. None: the batch is on-policy; every
            ratio is exactly 1 and its gradient flows.
        ref_logp: `[B, T]` log-probability under the reference; needed if and only if `config.beta` is not 0.
        sampler_ratio: `[B, T]` or `[B, 1]` finite weight of the surrogate, from `rlloss.sampler_ratio` or your own. A 0
            removes the surrogate of the token, whatever its log-ratio. "vespo" instead multiplies it, as at least 1e-8,
            into the weight of the sequence.
        sampler_logp: `[B, T]` log-probability under the engine that sampled, for `off_policy_threshold`. None:
            old_logp. A NaN (a token that the engine could not score) counts as no difference.
        entropy: `[B, T]` in nats. Needed for `top_entropy_quantile` < 1, and with gradient for `entropy_coef`.
        cutoff: keep tokens with entropy >= cutoff. None: the quantile of this call's tokens.
        denominator: divisor of the loss summed over tokens (over sequences for "grpo", "gspo", "sapo", "luspo"). Pass
            the count of the whole batch when you accumulate over micro-batches or ranks. None: this call's own count,
            which is the tokens that count (the kept ones with entropy_denominator="kept"), B for the losses over
            sequences, or B * max_completion_length for "dr_grpo". A tensor may be 0 if nothing counts, as `mask.sum()`
            is; on a GPU its value is not checked. It does not divide the entropy bonus, which is a mean of this call:
            for n micro-batches set `entropy_coef` to the n-th part.
        kept: `[B, T]` bool, the tokens on which the surrogate acts, for `top_entropy_quantile` < 1. Pass this part of
            the `top_entropy_mask` of the whole batch if the batch was split. None: this call selects them.
        selected: `[B, T]` bool, the tokens picked by covariance: this part of the `covariance_selection` of the whole
            batch. Needed if and only if `config.covariance.scope` is "generation".

    Returns:
        `PolicyLoss(loss, metrics)`. An empty mask gives a differentiable 0. A second derivative or a torch.func
        transform raises.

    Raises:
        ValueError, TypeError: an argument does not fit, is missing, would have no effect, or requires a gradient (only
            logp and entropy may); the error names it.

    Source: `rlloss.reference` has the formulas, `LossConfig` their papers.
    """
    return loss_of(
        LossInputs(
            logp, advantage, mask, DEFAULT if config is None else config, old_logp, ref_logp, sampler_ratio,
            sampler_logp, entropy, cutoff, denominator, kept, selected,
        )
    )  # fmt: skip


def loss_of(given: LossInputs) -> PolicyLoss:
    """Compute `policy_loss` from its arguments as one bundle."""
    loss, metrics, coefficients = _passed(given)
    return PolicyLoss(with_gradient(loss, given.logp, given.entropy, coefficients), metrics)


def gradient_of(given: LossInputs) -> tuple[Tensor, Tensor | None]:
    """Return d loss / d logp and, with an entropy bonus, d loss / d entropy, `[B, T]`."""
    _, _, coefficients = _passed(given)
    return coefficients.gradients()


def _passed(given: LossInputs) -> tuple[Tensor, dict[str, Tensor], Coefficients]:
    inputs = check(given)
    return token_pass(inputs, choose_tokens(inputs))


def token_pass(inputs: LossInputs, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor], Coefficients]:
    """Return (loss, metrics, coefficients), from one launch if the Triton kernel knows the loss, else from torch."""
    return fused_pass(inputs, tokens) if fits(inputs) else plain_pass(inputs, tokens)
