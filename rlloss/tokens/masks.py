"""Make masks of tokens (bool [B, T]): those that count, are kept by entropy, or pass the off-policy test."""

import functools
import math

import torch
from torch import Tensor

from rlloss import backends, checks
from rlloss.operators import operator
from rlloss.tokens.exact_k import check_sequence_key, largest, token_key
from rlloss.torch_kernels import entropy_quantile

# Before 2.14, torch.quantile rounds the position q (n - 1) to the values' dtype and takes at most 2^24 values. From
# 2.14 on the position stays in fp64. Both round q: 0.8 in fp32 times 5 is 4.00000006, which fp32 rounds to 4.
_TORCH_ROUNDS = not torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float32, device="cpu").quantile(0.8)
POSITION = {"rounded_up_to": entropy_quantile.EXACT_IN_FP32 if _TORCH_ROUNDS else 0}


def completion_mask(completion_ids: Tensor, eos_token_id: int) -> Tensor:
    """Select the tokens up to and including the first end-of-sequence token.

    Args:
        completion_ids: `[B, T]` int64 or int32 token ids.
        eos_token_id: id of the end-of-sequence token.

    Returns:
        `[B, T]` bool.

    Raises:
        TypeError: an argument does not fit; the error names it.
    """
    is_eos = _is_eos(completion_ids, eos_token_id)
    return is_eos.cumsum(-1) - is_eos.to(torch.int64) == 0


def not_truncated(completion_ids: Tensor, eos_token_id: int) -> Tensor:
    """Select the sequences that contain an end-of-sequence token. DAPO's overlong filtering (2503.14476) drops the
    others.

    Args:
        completion_ids: `[B, T]` int64 or int32 token ids.
        eos_token_id: id of the end-of-sequence token.

    Returns:
        `[B]` bool.

    Raises:
        TypeError: an argument does not fit; the error names it.
    """
    return _is_eos(completion_ids, eos_token_id).any(-1)


def _is_eos(completion_ids: Tensor, eos_token_id: int) -> Tensor:
    checks.token_ids("completion_ids", completion_ids)
    checks.whole("eos_token_id", eos_token_id)
    return completion_ids == eos_token_id


@operator("entropy_quantile", fake=lambda entropy, mask, rho: entropy.new_empty(()))
def _entropy_quantile(entropy: Tensor, mask: Tensor, rho: float) -> Tensor:
    return backends.of(entropy).entropy_quantile(*_rows(entropy, mask), rho, **POSITION)


def _fake_top_k(entropy, mask, rho):
    return entropy.new_empty(()), entropy.new_empty((), dtype=torch.int64)


@operator("entropy_top_k", fake=_fake_top_k)
def _entropy_top_k(entropy: Tensor, mask: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    return backends.of(entropy).entropy_top_k(*_rows(entropy, mask), rho)


def _rows(entropy: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return entropy.reshape(-1).contiguous(), mask.reshape(-1).contiguous()


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def entropy_cutoff(entropy: Tensor, mask: Tensor, rho: float, *, process_group=None) -> Tensor:
    """Compute the cutoff of the top rho by entropy, which is the linearly interpolated (1 - rho) quantile.

    The bits equal those of the installed torch's `torch.quantile(entropy[mask].float(), 1 - rho)`, and so TRL's cutoff.
    Among n sorted values, numbered from 0, the cutoff lies at the position (1 - rho)(n - 1), where 1 - rho is rounded
    to fp32. torch before 2.14 rounds the product to fp32 too, later versions do not: of 6 tokens rho 0.2 keeps 2
    (position 4) before, and 1 (position 4.00000006) since. For more than 2^24 values the position is never rounded.
    fp64 entropies use fp64 throughout.

    Args:
        entropy: `[...]` floating point, in nats.
        mask: `[...]` bool, True: the token counts. NaN entropies do not count.
        rho: in [0, 1]; 1 gives the smallest entropy, 0 the largest.
        process_group: ranks whose tokens count together, on one backend and in one dtype. They exchange a few sums of
            at most 32 KiB, but no entropies. None: this process alone.

    Returns:
        0-d fp32 tensor (fp64 for fp64 entropies) without gradient; +inf if no token counts. The number of tokens is
        not limited, as it is to 2^24 for torch.quantile before 2.14.

    Raises:
        ValueError, TypeError: an argument does not fit; the error names it.

    Source: 2506.01939, Eq. 6.
    """
    entropy = _checked(entropy, mask, rho)
    checks.process_group("process_group", process_group)
    if process_group is None:
        return _entropy_quantile(entropy, mask, rho)
    total = functools.partial(torch.distributed.all_reduce, group=process_group)
    return backends.of(entropy).entropy_quantile(*_rows(entropy, mask), rho, **POSITION, reduce=total)


def top_entropy_selection(entropy: Tensor, mask: Tensor, rho: float, *, exact_k: bool) -> tuple[Tensor, Tensor | None]:
    """Return (cutoff, last), which decide for each token alone whether it is among the top rho.

    entropy and mask are as for `entropy_cutoff`. Both results are 0-d, the cutoff fp32 (fp64 for fp64 entropies), last
    int64 or None. A token that counts is kept if its entropy is NaN, above the cutoff or equal to it. With `exact_k`,
    of the tokens at the cutoff only those with a flat index of at most last are kept; without it last is None. If no
    token counts, the cutoff is +inf and last is -1.
    """
    if not exact_k:
        return entropy_cutoff(entropy, mask, rho), None
    return _entropy_top_k(_checked(entropy, mask, rho), mask, rho)


def _checked(entropy: Tensor, mask: Tensor, rho: float) -> Tensor:
    """Return the entropies without gradient in fp32 or fp64, because bf16 would round the cutoff in comparisons."""
    checks.floating("entropy", entropy)
    checks.boolean("mask", mask)
    checks.same_shape("mask", mask, entropy.shape, "like entropy")
    checks.same_device("mask", mask, entropy, "entropy")
    checks.within("rho", rho, 0, 1)
    return _full_precision(entropy.detach() if entropy.requires_grad else entropy)


def top_entropy_mask(
    entropy: Tensor,
    mask: Tensor,
    rho: float,
    *,
    cutoff: Tensor | float | None = None,
    exact_k: bool = False,
    sequence_key: Tensor | None = None,
    process_group=None,
) -> Tensor:
    """Select the tokens that count and are among the top rho by entropy.

    By default every token at or above the cutoff is kept. Ties may keep more than rho: if the cutoff is an entropy of
    0, every token is kept. A NaN entropy is kept, so that it shows.

    Args:
        entropy: `[...]` floating point, in nats.
        mask: `[...]` bool, True: the token counts.
        rho: share in [0, 1].
        cutoff: smallest entropy to keep, in nats. None: the `entropy_cutoff` of these tokens.
        exact_k: keep exactly n - ceil((1 - rho) (n - 1)) of n tokens. Every version of torch rounds the product to
            fp32: rho 0.2 keeps 2 of 6.
        sequence_key: `[B]` int64 for entropies `[B, T]`, with `exact_k`. It orders equal entropies, so that the place
            of a sequence does not matter; `rlloss.tokens.exact_k.sequence_key` makes it from token ids. None: the
            first of equal entropies are kept.
        process_group: the processes whose tokens count together; with `exact_k` they exchange entropies. None: this
            process alone.

    Returns:
        Bool, shaped like `mask`.

    Raises:
        ValueError, TypeError: an argument does not fit or has no effect; the error names it.

    Source: 2506.01939, Eq. 6.
    """
    last, entropy = None, _checked(entropy, mask, rho)
    checks.flag("exact_k", exact_k)
    checks.require(exact_k or sequence_key is None, "sequence_key", "a tensor", "None without exact_k: no effect")
    check_sequence_key(sequence_key, mask)
    if cutoff is not None:
        checks.cutoff(cutoff)
        checks.require(not exact_k, "cutoff", "a tensor", "None with exact_k, which counts tokens instead")
        checks.require(process_group is None, "process_group", "a group", "None with a cutoff: it has no effect")
    elif process_group is None and sequence_key is None:
        cutoff, last = top_entropy_selection(entropy, mask, rho, exact_k=exact_k)
    elif exact_k:
        known = mask & ~entropy.isnan()
        n = known.sum()
        if process_group is not None:
            checks.process_group("process_group", process_group)
            torch.distributed.all_reduce(n, group=process_group)
        key = None if sequence_key is None else token_key(mask, sequence_key)
        k = entropy_quantile.top_k(n, rho, entropy.dtype)
        return largest(entropy, known, k, key=key, process_group=process_group) | (mask & ~known)
    else:
        cutoff = entropy_cutoff(entropy, mask, rho, process_group=process_group)
    return kept_by_entropy(entropy, mask, cutoff, last)


def kept_by_entropy(entropy: Tensor, mask: Tensor, cutoff: Tensor | float, last: Tensor | None) -> Tensor:
    """Return the tokens [B, T] that count and that (cutoff, last) of `top_entropy_selection` keep."""
    kept = (entropy >= cutoff) | entropy.isnan()
    if last is not None:
        index = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
        kept = kept & ~((entropy == cutoff) & (index > last))
    return mask & kept


def off_policy_mask(advantage: Tensor, logp: Tensor, behavior_logp: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """Select sequences (or tokens, for an advantage per token) whose surrogate acts (2512.02556 Eq. 9).

    These have advantage >= 0, or a mean of behavior_logp - logp over the sequence of at most `threshold`. advantage is
    [B, 1] or [B, T], the others are [B, T]; the result is bool, shaped like advantage. A NaN log-probability (a token
    that the sampler could not score) counts as a difference of 0.
    """
    checks.tokens(logp, advantage, mask, narrow="[B, 1]")
    checks.floating("behavior_logp", behavior_logp)
    checks.same_shape("behavior_logp", behavior_logp, logp.shape, "like logp")
    checks.same_device("behavior_logp", behavior_logp, logp, "logp")
    checks.within("threshold", threshold, -math.inf, math.inf)
    drift = torch.where(mask, behavior_logp - logp.detach(), 0.0).nan_to_num(nan=0.0)
    mean_drift = drift.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return (advantage >= 0) | (mean_drift <= threshold)
