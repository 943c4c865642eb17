"""Why a token teaches or does not: one state per token, read off the gradient of the loss itself."""

from __future__ import annotations

from dataclasses import replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from rlloss import checks
from rlloss.config import LossConfig
from rlloss.loss_types import LOSSES
from rlloss.losses.inputs import LossInputs
from rlloss.losses.loss import gradient_of
from rlloss.tokens.masks import off_policy_mask, top_entropy_mask


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
    config = LossConfig() if config is None else config
    checks.tokens(logp, advantage, mask)
    if given.get("entropy") is not None:
        checks.floating("entropy", given["entropy"])
    gradient = _gradient(logp, advantage, mask, config, given)
    live = (gradient != 0).any(0)
    advantage_BT = advantage if advantage.dim() == 2 else advantage.unsqueeze(1)
    picked = torch.zeros_like(mask)
    if LOSSES[config.loss_type].picks is not None:
        # A token was picked where its gradient is not the one that it has when none is.
        unpicked = replace(config, covariance=replace(config.covariance, scope="generation"))
        other = _gradient(logp, advantage, mask, unpicked, {**given, "selected": torch.zeros_like(mask)})
        picked = ((other != gradient) & ~gradient.isnan()).any(0)
    reasons = {
        TokenState.MASKED: ~mask,
        TokenState.PENALISED: live & picked & (LOSSES[config.loss_type].picked == "penalised"),
        TokenState.LIVE: live,
        TokenState.DEAD: advantage_BT == 0,
        TokenState.DROPPED: ~_kept(mask, config, **given),
        TokenState.OFF_POLICY: ~_on_policy(logp, advantage_BT, mask, config, **given),
        TokenState.SELECTED: picked,
    }
    states = torch.full(mask.shape, TokenState.CLIPPED, dtype=torch.int8, device=mask.device)
    for state, holds in reversed(reasons.items()):
        states = states.masked_fill(holds, state)
    return states


def _gradient(logp: Tensor, advantage: Tensor, mask: Tensor, config: LossConfig, given: dict[str, Any]) -> Tensor:
    """d loss / d logp and d loss / d entropy, [2, B, T]. In fp32 at least: in fp16 they would underflow to 0."""
    g_logp, g_entropy = gradient_of(LossInputs(logp.detach(), advantage, mask, config, **given))
    return torch.stack([g_logp, torch.zeros_like(g_logp) if g_entropy is None else g_entropy.to(g_logp.dtype)])


def _kept(mask: Tensor, config: LossConfig, *, entropy: Any = None, kept=None, cutoff=None, **_: Any) -> Tensor:
    """Tokens that the entropy mask keeps."""
    if kept is not None or config.top_entropy_quantile == 1.0:
        return mask if kept is None else kept
    return top_entropy_mask(entropy, mask, config.top_entropy_quantile, cutoff=cutoff, exact_k=config.exact_k)


def _on_policy(
    logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    config: LossConfig,
    *,
    old_logp=None,
    sampler_logp=None,
    sampler_ratio=None,
    **_: Any,
) -> Tensor:
    """Tokens whose surrogate neither the off-policy mask nor a sampler's ratio of 0 leaves out."""
    result = mask
    if config.off_policy_threshold is not None:
        behavior_logp = next((x for x in (sampler_logp, old_logp) if x is not None), logp.detach())
        result = result & off_policy_mask(advantage, logp, behavior_logp, mask, config.off_policy_threshold)
    if sampler_ratio is not None and LOSSES[config.loss_type].level != "product":
        result = result & (sampler_ratio != 0)
    return result
