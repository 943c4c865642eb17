"""Decide once, before the token pass, on which tokens a loss acts.

A token *counts* if the mask says so, is *kept* by its entropy, and *acts* if neither the off-policy mask nor a sampler
ratio of 0 silences its surrogate. A token is *picked* by its covariance.
"""

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss.losses import ratios
from rlloss.losses.inputs import LossInputs, as_scalar
from rlloss.losses.surrogates import clipped
from rlloss.tokens import covariance
from rlloss.tokens.masks import kept_by_entropy, off_policy_mask, top_entropy_selection


class Tokens(NamedTuple):
    """Selections of tokens for one loss.

    selection is (cutoff, flat index of the last tie to keep, or None) by entropy. It is None if every token that counts
    is kept, or if the caller gave the kept tokens. picked is `[B, T]` bool, or None if the loss picks none.
    sampler_ratio is that of the inputs, with 0 for picked tokens that are left out.
    """

    selection: tuple[Tensor, Tensor | None] | None
    picked: Tensor | None
    sampler_ratio: Tensor | None

    @property
    def cutoff(self) -> Tensor | None:
        """The smallest entropy of a kept token, if the entropy alone decides; else None."""
        return self.selection[0] if self.selection is not None and self.selection[1] is None else None


def choose_tokens(inputs: LossInputs) -> Tokens:
    selection = _by_entropy(inputs)
    if inputs.loss_type.picks is None:
        return Tokens(selection, None, inputs.sampler_ratio)
    tokens = Tokens(selection, None, inputs.sampler_ratio)
    picked = _picked(inputs, tokens) if inputs.selected is None else inputs.mask & inputs.selected
    if inputs.loss_type.picked == "left out":  # a sampler ratio of 0 leaves a token out
        one = inputs.logp.new_ones(()) if inputs.sampler_ratio is None else inputs.sampler_ratio
        return Tokens(selection, picked, torch.where(picked, 0.0, one))
    if inputs.old_logp is None and not torch.compiler.is_compiling():
        _say_on_policy()
    return tokens._replace(picked=picked)


def kept(inputs: LossInputs, tokens: Tokens) -> Tensor:
    """Return the kept tokens, `[B, T]` bool."""
    if inputs.kept is not None:
        return inputs.mask & inputs.kept
    if tokens.selection is None or inputs.entropy is None:
        return inputs.mask
    return kept_by_entropy(inputs.entropy, inputs.mask, *tokens.selection)


def acting(inputs: LossInputs, tokens: Tokens, kept: Tensor) -> Tensor:
    """Return the tokens on which the surrogate acts, `[B, T]` bool."""
    acts, config = kept, inputs.config
    if config.off_policy_threshold is not None:
        behavior = inputs.logp if inputs.behavior_logp is None else inputs.behavior_logp
        acts = acts & off_policy_mask(inputs.advantage, inputs.logp, behavior, inputs.mask, config.off_policy_threshold)
    ratio = tokens.sampler_ratio
    return acts if ratio is None or inputs.level == "product" else acts & (ratio != 0)


def _by_entropy(inputs: LossInputs) -> tuple[Tensor, Tensor | None] | None:
    rho = inputs.config.top_entropy_quantile
    if inputs.entropy is None or rho == 1.0 or inputs.kept is not None:
        return None
    if inputs.cutoff is not None:
        return as_scalar(inputs.cutoff, inputs.entropy), None
    return top_entropy_selection(inputs.entropy, inputs.mask, rho, exact_k=inputs.config.exact_k)


def _picked(inputs: LossInputs, tokens: Tokens) -> Tensor:
    candidates, config = acting(inputs, tokens, kept(inputs, tokens)), inputs.config
    if inputs.loss_type.picked == "left out":
        log_ratio = ratios.importance_ratio(
            inputs.logp, inputs.old_logp, inputs.mask, inputs.level, None, config.max_log_ratio
        ).log
        flat = clipped(log_ratio, inputs.advantage, config)
        candidates = candidates & ~flat & ~log_ratio.isnan()  # a NaN stays in the loss, where it shows
    tokens_of = covariance.Candidates(inputs.logp, inputs.advantage, inputs.mask, candidates)
    return covariance.select(tokens_of, config.loss_type, config.covariance)


@functools.cache
def _say_on_policy() -> None:
    warnings.warn(
        "kl_cov without old_logp: on-policy every ratio is 1, where the penalty has no gradient, so that it cannot "
        "act; train more than one step on a batch",
        stacklevel=6,
    )
