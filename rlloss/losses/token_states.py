"""`token_states` gives each token a state that says whether it has a gradient, or why it has none."""

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
    """State of a token in a loss. If a gradient is 0 for several reasons, the state is the first one of this list."""

    MASKED = 0
    """The token does not count, such as padding, a tool's output, or a truncated completion that is left out."""

    DEAD = 1
    """Its advantage is 0."""

    DROPPED = 2
    """Its entropy is below the cutoff of `top_entropy_quantile`."""

    OFF_POLICY = 3
    """`off_policy_threshold` or a `sampler_ratio` of 0 left it out."""

    SELECTED = 4
    """"clip_cov" picked it and left it out."""

    CLIPPED = 5
    """The surrogate is flat there. The ratio is clipped or beyond `max_log_ratio`, or a weight has become 0."""

    PENALISED = 6
    """It has a gradient, to which "kl_cov" adds its penalty."""

    LIVE = 7
    """It has a gradient. NaN is live."""

    @property
    def letter(self) -> str:
        """Letter of the state in a log of tokens, one of m d e o v c p l in the order of this list."""
        return LETTERS[self]

    @property
    def is_live(self) -> bool:
        return self in (TokenState.PENALISED, TokenState.LIVE)


LETTERS = "mdeovcpl"


def token_states(
    logp: Tensor, advantage: Tensor, mask: Tensor, *, config: LossConfig | None = None, **given: Any
) -> Tensor:
    """Return the `TokenState` of each token of a batch.

    A token is LIVE or PENALISED exactly if the gradient of `policy_loss` in its log-probability (or, with
    `config.entropy_coef`, in its entropy) is not 0. A token without a surrogate is therefore live if a KL or the ratio
    of its sequence moves it. The other states name the reason for a gradient of 0. The call repeats the work of
    `policy_loss` on [B, T] numbers once, and twice for "clip_cov" and "kl_cov".

    Args:
        logp: `[B, T]` log-probability of each token under the policy, in nats. Its autograd graph is not used.
        advantage: `[B]` or `[B, T]`.
        mask: `[B, T]` bool, True: the token counts.
        config: settings of the loss. None: `LossConfig()`.
        given: the other arguments of `policy_loss`, as the loss got them. A missing one is computed from the tokens of
            this call, as in `policy_loss`.

    Returns:
        `[B, T]` int8, on the device of `logp`.

    Raises:
        ValueError, TypeError: as `policy_loss`.
    """
    checks.tokens(logp, advantage, mask)
    config = LossConfig() if config is None else config
    return states_of(LossInputs(logp, advantage, mask, config, **given))


def states_of(given: LossInputs) -> Tensor:
    """Compute `token_states` from its arguments as one bundle."""
    inputs = check(given._replace(logp=given.logp.detach()))
    mask, loss_type, tokens = inputs.mask, inputs.loss_type, choose_tokens(inputs)
    gradient = _gradient(inputs, tokens)
    live, picked = (gradient != 0).any(0), torch.zeros_like(mask)
    unpicked = tokens._replace(picked=None, sampler_ratio=inputs.sampler_ratio)
    if loss_type.picks is not None:
        # A token was picked if its gradient changes when no token is picked.
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
    """Return d loss / d logp and d loss / d entropy, [2, B, T], in fp32 at least; in fp16 they would underflow to 0."""
    _, _, coefficients = token_pass(inputs, tokens)
    g_logp, g_entropy = coefficients.gradients()
    return torch.stack([g_logp, torch.zeros_like(g_logp) if g_entropy is None else g_entropy.to(g_logp.dtype)])
