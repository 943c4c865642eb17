"""The loss of a batch from the log-probabilities of its tokens: all on [B, T] floats, no vocabulary."""

from torch import Tensor

from rlloss.config import LossConfig
from rlloss.losses.acting_tokens import Tokens, choose_tokens
from rlloss.losses.coefficients import Coefficients, with_gradient
from rlloss.losses.fused import fits, fused_pass
from rlloss.losses.inputs import LossInputs, check
from rlloss.losses.metrics import PolicyLoss
from rlloss.losses.plain_pass import plain_pass

DEFAULT = LossConfig()  # torch.compile cannot make one


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
    """The loss of a batch of completions from its log-probabilities.

    Args:
        logp: `[B, T]` log-probability of each token under the policy, in nats, with gradient; fp32 at least inside.
        advantage: `[B]`, or `[B, T]` for one per token.
        mask: `[B, T]` bool, True = counts. What stands in the other columns does not matter, NaN included.
        config: `LossConfig()` if None.
        old_logp: `[B, T]` log-probability under the policy that the batch was made with. None: the batch is
            on-policy, every ratio is exactly 1, and its gradient flows.
        ref_logp: `[B, T]` log-probability under the reference; needed if and only if `config.beta` is not 0.
        sampler_ratio: `[B, T]` or `[B, 1]` finite weight of the surrogate, as `sampler_ratio(...)` makes it or given.
            A 0 removes the surrogate of the token, whatever its log-ratio. "vespo" takes it into the weight of the
            sequence instead, where it is at least 1e-8.
        sampler_logp: `[B, T]` log-probability under the engine that sampled, for `off_policy_threshold`, which takes
            old_logp without it. A NaN (a token it could not score) is no evidence.
        entropy: `[B, T]` in nats. Needed for `top_entropy_quantile` < 1, and with gradient for `entropy_coef`.
        cutoff: keep tokens with entropy >= cutoff; None: the quantile of this call's tokens.
        denominator: divisor of the loss summed over tokens ("grpo", "gspo", "sapo", "luspo": over sequences). Pass the
            count of the whole batch when you accumulate over micro-batches or ranks. None: this call's own: mask
            tokens (the kept ones with entropy_denominator="kept"), B for the losses over sequences,
            B * max_completion_length for "dr_grpo". A tensor may be 0 where nothing counts, as `mask.sum()` is; on a
            GPU it is not looked at.
        kept: `[B, T]` bool, the tokens that the surrogate acts on, for `top_entropy_quantile` < 1: part of the
            `top_entropy_mask` of a batch that was split. None: this call's own.
        selected: `[B, T]` bool, the tokens picked by covariance, part of the `covariance_selection` of a batch that was
            split; needed if and only if `config.covariance.scope` is "generation".

    A row of `[B, T]` has to be a whole sequence. Where sequences are split over ranks, means, ratios and weights of a
    sequence ("grpo", "gspo", "sapo", "vespo", ratio_level="sequence", `off_policy_threshold`) are wrong, and nothing
    shows it: gather the log-probabilities first. `docs/losses.md` has what may stay split.

    Returns:
        `PolicyLoss(loss, metrics)`. An empty mask gives a differentiable 0. There is no second derivative and no
        torch.func transform: asking for one is an error.

    Raises:
        ValueError, TypeError: an argument does not fit, is missing, would have no effect, or requires a gradient, which
            only logp and entropy get; it is named.

    Source: the formulas are in `rlloss.reference`, their papers in `LossConfig`.
    """
    return loss_of(
        LossInputs(
            logp, advantage, mask, DEFAULT if config is None else config, old_logp, ref_logp, sampler_ratio,
            sampler_logp, entropy, cutoff, denominator, kept, selected,
        )
    )  # fmt: skip


def loss_of(given: LossInputs) -> PolicyLoss:
    """`policy_loss`, its arguments as one bundle."""
    loss, metrics, coefficients = _passed(given)
    return PolicyLoss(with_gradient(loss, given.logp, given.entropy, coefficients), metrics)


def gradient_of(given: LossInputs) -> tuple[Tensor, Tensor | None]:
    """d loss / d logp and, with an entropy bonus, d loss / d entropy, `[B, T]`."""
    _, _, coefficients = _passed(given)
    return coefficients.gradients()


def _passed(given: LossInputs) -> tuple[Tensor, dict[str, Tensor], Coefficients]:
    inputs = check(given)
    return token_pass(inputs, choose_tokens(inputs))


def token_pass(inputs: LossInputs, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor], Coefficients]:
    """(loss, metrics, coefficients), in one launch where Triton knows the loss, else in torch."""
    return fused_pass(inputs, tokens) if fits(inputs) else plain_pass(inputs, tokens)
