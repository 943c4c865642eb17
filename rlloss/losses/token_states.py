"""Why a token teaches or does not: one state per token, read off the gradient of the loss itself."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from rlloss import checks
from rlloss.config import LossConfig
from rlloss.losses import acting_tokens
from rlloss.losses.acting_tokens import Tokens, choose_tokens
from rlloss.losses.inputs import LossInputs, check
from rlloss.losses.loss import token_pass


class TokenState(IntEnum):
    """What a token is to a loss. Of several reasons for a gradient of 0 the first of this list is given."""

    MASKED = 0
    """Does not count: padding, a tool's output, a truncated completion that is left out."""

    DEAD = 1
    """Advantage 0."""

    DROPPED = 2
    """Entropy below the cutoff of `top_entropy_quantile`."""

    OFF_POLICY = 3
    """Left out by `off_policy_threshold` or by a `sampler_ratio` of 0."""

    SELECTED = 4
    """Left out by "clip_cov"."""

    CLIPPED = 5
    """The surrogate is flat here: the ratio is clipped or beyond `max_log_ratio`, or a weight has become 0."""

    PENALISED = 6
    """Has a gradient, and "kl_cov" adds its penalty to it."""

    LIVE = 7
    """Has a gradient. NaN is live."""

    @property
    def letter(self) -> str:
        """The state in a log of tokens: m d e o v c p l, in the order of this list."""
        return LETTERS[self]

    @property
    def is_live(self) -> bool:
        return self in (TokenState.PENALISED, TokenState.LIVE)


LETTERS = "mdeovcpl"


def token_states(
    logp: Tensor, advantage: Tensor, mask: Tensor, *, config: LossConfig | None = None, **given: Any
) -> Tensor:
    """The `TokenState` of each token of a batch: `[B, T]` int8, on the device of `logp`.

    A token is LIVE or PENALISED exactly where `policy_loss` has a gradient that is not 0 with respect to its
    log-probability, or to its entropy with `config.entropy_coef`. So a token without a surrogate is live all the same
    where a KL or the ratio of its sequence moves it. The other states say why there is no gradient.

    Args:
        logp: `[B, T]` log-probability of each token under the policy, in nats. Its graph, if any, is left alone.
        advantage: `[B]` or `[B, T]`.
        mask: `[B, T]` bool, True = counts.
        config: `LossConfig()` if None.
        given: the other arguments of `policy_loss`, as the loss got them. What is not given is found as there, from
            the tokens of this call.

    Raises:
        ValueError, TypeError: as `policy_loss`.

    It computes what `policy_loss` does once more, on [B, T] numbers; twice for "clip_cov" and "kl_cov".
    """
    checks.tokens(logp, advantage, mask)
    config = LossConfig() if config is None else config
    return states_of(LossInputs(logp, advantage, mask, config, **given))


def states_of(given: LossInputs) -> Tensor:
    """`token_states`, its arguments as one bundle."""
    inputs = check(given._replace(logp=given.logp.detach()))
    mask, loss_type, tokens = inputs.mask, inputs.loss_type, choose_tokens(inputs)
    gradient = _gradient(inputs, tokens)
    live, picked = (gradient != 0).any(0), torch.zeros_like(mask)
    unpicked = tokens._replace(picked=None, sampler_ratio=inputs.sampler_ratio)
    if loss_type.picks is not None:
        # A token was picked where its gradient is not the one that it has when none is.
        other = _gradient(inputs, unpicked._replace(picked=picked))
        picked = ((other != gradient) & ~gradient.isnan()).any(0)
    kept = acting_tokens.kept(inputs, tokens)
    reasons = {
        TokenState.MASKED: ~mask,
        TokenState.PENALISED: live & picked & (loss_type.picked == "penalised"),
        TokenState.LIVE: live,
        TokenState.DEAD: inputs.advantage == 0,
        TokenState.DROPPED: ~kept,
        TokenState.OFF_POLICY: ~acting_tokens.acting(inputs, unpicked, kept),
        TokenState.SELECTED: picked,
    }
    states = torch.full(mask.shape, TokenState.CLIPPED, dtype=torch.int8, device=mask.device)
    for state, holds in reversed(reasons.items()):
        states = states.masked_fill(holds, state)
    return states


def _gradient(inputs: LossInputs, tokens: Tokens) -> Tensor:
    """d loss / d logp and d loss / d entropy, [2, B, T]. In fp32 at least: in fp16 they would underflow to 0."""
    _, _, coefficients = token_pass(inputs, tokens)
    g_logp, g_entropy = coefficients.gradients()
    return torch.stack([g_logp, torch.zeros_like(g_logp) if g_entropy is None else g_entropy.to(g_logp.dtype)])
