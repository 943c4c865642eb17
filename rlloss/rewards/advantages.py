"""`group_advantage` turns the rewards of groups of completions into advantages: GRPO, Dr. GRPO, RLOO or GDPO.

The losses skip tokens with advantage 0, so two zeros are exact here. A group whose members all got the same reward
gives 0.0 and not a rounding error. A row without any reward (all NaN) gives 0.0 and enters no mean.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlloss import checks
from rlloss.checks import one_of, values_checked

METHODS = ("grpo", "dr_grpo", "rloo", "gdpo")
TRLS_METHODS = {"sum_then_normalize": "grpo", "normalize_then_sum": "gdpo"}
SCALES = ("group", "batch", "none")
_DEFAULT_EPS = 1e-4

Condition = tuple[int, int, float]


@torch.no_grad()
def group_advantage(
    rewards: Tensor,
    *,
    num_generations: int,
    method: str = "grpo",
    weights: Sequence[float] | Tensor | None = None,
    scale: str = "group",
    eps: float = _DEFAULT_EPS,
    token_counts: Tensor | None = None,
    conditions: Mapping[int, tuple[int, float]] | Sequence[Condition] | None = None,
) -> Tensor:
    """Compute one advantage per completion from the rewards of its group (the completions of the same prompt).

    A NaN reward is missing and enters no sum, mean or standard deviation. A row whose rewards are all NaN is
    unscorable: it enters no statistic, and its advantage is 0. Let r = sum_k w_k reward_k over the present rewards.
    mean and std (unbiased; 0 for fewer than two values) are taken over the scorable rows of the group:

    ============  ==============================================================  ===============================
    method        advantage                                                       source
    ============  ==============================================================  ===============================
    ``grpo``      (r - mean) / (std + eps)                                        arXiv 2402.03300
    ``dr_grpo``   r - mean                                                        arXiv 2503.20783
    ``rloo``      r - mean over the group's *other* scorable rows (none: 0)       arXiv 2402.14740
    ``gdpo``      x / (std of x over the batch + eps), where                      arXiv 2601.05242, Eq. 4-7
                  x = sum_k w_k (reward_k - mean_k) / (std_k + eps)
    ============  ==============================================================  ===============================

    Up to rounding, ``grpo`` equals TRL's ``sum_then_normalize`` and ``gdpo`` its ``normalize_then_sum``. Eq. 6 also
    subtracts the batch mean of x. That mean is 0, because each normalised reward sums to 0 in its group. Subtracting it
    would only turn the zeros of groups without a signal into rounding errors.

    Args:
        rewards: ``[N]`` (one reward, K = 1) or ``[N, K]``, floating. Rows ``i * num_generations`` to
            ``(i + 1) * num_generations - 1`` are group ``i``. Across ranks, pass the gathered batch.
        num_generations: completions per group, >= 1. With 1 every advantage is 0.
        method: ``"grpo"``, ``"dr_grpo"``, ``"rloo"`` or ``"gdpo"``.
        weights: ``[K]``, the w_k; default all 1. ``gdpo`` weights the normalised rewards, the others the raw ones.
        scale: divisor of ``grpo``: the std of the ``"group"``, the std of r over the whole ``"batch"``, or ``"none"``.
            ``gdpo`` takes only ``"group"``. ``dr_grpo`` and ``rloo`` take ``"group"`` (the default) and ``"none"``,
            which mean the same there.
        eps: >= 0, added to each std. With 0 a zero std gives advantage 0 (GDPO's Eq. 4 has no eps).
        token_counts: ``[N]``, real, >= 0; ``gdpo`` only. Weights the batch statistics by completion length, as verl
            does: m = sum c x / sum c, variance = sum c (x - m)^2 / (sum c - 1), advantage (x - m) / (std + eps).
            Here m is not 0, so groups without a signal get an advantage too.
        conditions: ``(k, l, threshold)`` triples or a mapping ``{k: (l, threshold)}``. Reward k counts as 0 in rows
            where reward l is below the threshold (arXiv 2601.05242, Eq. 8). All conditions read the raw rewards, so
            they do not chain. Several conditions for one k must all hold. A missing reward k stays missing; a missing
            reward l does not fulfil the condition.

    Returns:
        ``[N]``, detached, on the device of ``rewards``; fp64 for fp64 rewards, else fp32.

    Raises:
        TypeError: ``rewards`` is not a floating tensor, ``token_counts`` not an integer or floating one, or
            ``num_generations`` not an int.
        ValueError: a shape, range or name is wrong, or a setting would have no effect: ``scale="batch"`` with
            ``dr_grpo`` or ``rloo``, ``scale`` other than ``"group"`` with ``gdpo``, ``token_counts`` without ``gdpo``,
            an ``eps`` other than the default where nothing is divided. Infinite rewards, weights that are not finite,
            and token counts that are negative or not finite raise on a CPU. On another device the check costs a
            synchronisation and needs ``RLLOSS_CHECK=1``; without it the affected advantages are meaningless.
    """
    _check_settings(method, scale, eps, token_counts)
    rewards_NK = checked_rewards(rewards, num_generations)
    if values_checked(rewards) and rewards.isinf().any():
        raise ValueError("rewards: found an infinite value, expected finite ones, or NaN for a missing reward")
    rewards_NK = rewards_NK.to(torch.promote_types(rewards.dtype, torch.float32))
    weights_K = checked_weights(weights, rewards_NK)
    rewards_NK = apply_conditions(rewards_NK, conditions)
    present_NK = ~rewards_NK.isnan()
    scorable_N = present_NK.any(dim=1)

    if method == "gdpo":
        present_BGK = present_NK.unflatten(0, (-1, num_generations))
        deviation_BGK = _deviation(rewards_NK.unflatten(0, (-1, num_generations)), present_BGK, dim=1)
        normalised_BGK = _divide(deviation_BGK, _std(deviation_BGK, present_BGK, dim=1), eps)
        total_N = _sum_in_order(normalised_BGK.flatten(0, 1) * weights_K)
        if token_counts is None:
            advantage_N = _divide(total_N, _std(total_N, scorable_N, dim=0), eps)
        else:
            counts_N = torch.where(scorable_N, _checked_token_counts(token_counts, total_N), 0.0)
            advantage_N = _whiten_by_tokens(total_N, counts_N, eps)
    else:
        total_N = _sum_in_order(torch.where(present_NK, rewards_NK * weights_K, 0.0))
        scorable_BG = scorable_N.unflatten(0, (-1, num_generations))
        advantage_BG = _deviation(total_N.unflatten(0, (-1, num_generations)), scorable_BG, dim=1)
        if method == "rloo":
            # r_i - (n mean - r_i) / (n - 1) = (r_i - mean) n / (n - 1)
            count_B1 = scorable_BG.sum(dim=1, keepdim=True)
            advantage_BG = advantage_BG * count_B1 / (count_B1 - 1).clamp(min=1)
        elif method == "grpo" and scale == "group":
            advantage_BG = _divide(advantage_BG, _std(advantage_BG, scorable_BG, dim=1), eps)
        elif method == "grpo" and scale == "batch":
            batch_deviation_N = _deviation(total_N, scorable_N, dim=0)
            advantage_BG = _divide(advantage_BG, _std(batch_deviation_N, scorable_N, dim=0), eps)
        advantage_N = advantage_BG.flatten()
    return torch.where(scorable_N, advantage_N, 0.0)


def _sum_in_order(values_NK: Tensor) -> Tensor:
    # torch.sum may add the K values of equal rows in different orders, which would break ties of their totals.
    return functools.reduce(torch.add, values_NK.unbind(dim=1))


def _deviation(values: Tensor, present: Tensor, dim: int) -> Tensor:
    """Return ``values`` minus the mean of the present ones along ``dim``; 0 where not present."""
    # Relative to the smallest value the mean of equal values is exact: 0.1 + 0.1 + 0.1 is not 3 * 0.1.
    smallest = torch.where(present, values, torch.inf).amin(dim, keepdim=True)
    above = torch.where(present, values - smallest, 0.0)
    mean = above.sum(dim, keepdim=True) / present.sum(dim, keepdim=True).clamp(min=1)
    return torch.where(present, above - mean, 0.0)


def _std(deviation: Tensor, present: Tensor, dim: int) -> Tensor:
    """Return the unbiased standard deviation along ``dim`` (kept) of deviations that are 0 where not present."""
    degrees = (present.sum(dim, keepdim=True) - 1).clamp(min=1)  # a single value deviates by 0, so its std is 0
    return (deviation.square().sum(dim, keepdim=True) / degrees).sqrt()


def _divide(deviation: Tensor, std: Tensor, eps: float) -> Tensor:
    divisor = std + eps
    return torch.where(divisor == 0, 0.0, deviation / divisor)


def _whiten_by_tokens(total_N: Tensor, counts_N: Tensor, eps: float) -> Tensor:
    tokens = counts_N.sum()
    deviation_N = total_N - (counts_N * total_N).sum() / tokens.clamp(min=1)
    variance = (counts_N * deviation_N.square()).sum() / (tokens - 1).clamp(min=1)
    return _divide(deviation_N, variance.sqrt(), eps)


def _check_settings(method: str, scale: str, eps: float, token_counts: Tensor | None) -> None:
    if isinstance(method, str) and method in TRLS_METHODS:
        raise ValueError(f"method: found {method!r}, expected {TRLS_METHODS[method]!r}, which is that of TRL")
    one_of("method", method, METHODS)
    one_of("scale", scale, SCALES)
    if method == "gdpo" and scale != "group":
        raise ValueError(f"scale: found {scale!r}, expected 'group': gdpo always divides by the group's std first")
    if method in ("dr_grpo", "rloo") and scale == "batch":
        raise ValueError(f"scale: found 'batch', expected 'group' (the default) or 'none': {method} is never scaled")
    checks.number("eps", eps, "a finite number >= 0")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: found {eps}, expected a finite number >= 0")
    if (method in ("dr_grpo", "rloo") or scale == "none") and eps != _DEFAULT_EPS:
        raise ValueError(f"eps: found {eps}, expected the default {_DEFAULT_EPS}: nothing is divided here")
    if token_counts is not None and method != "gdpo":
        raise ValueError(f"token_counts: found a value with method {method!r}, expected None: only gdpo uses it")


def checked_rewards(rewards: Tensor, num_generations: int) -> Tensor:
    """Check that the rewards form whole groups, and return them as [N, K]."""
    checks.floating("rewards", rewards)
    if rewards.ndim not in (1, 2) or rewards.numel() == 0:
        raise ValueError(f"rewards: found shape {list(rewards.shape)}, expected a non-empty [N] or [N, K]")
    checks.whole("num_generations", num_generations, 1)
    if rewards.shape[0] % num_generations != 0:
        raise ValueError(
            f"rewards: found {rewards.shape[0]} rows, expected a multiple of num_generations = {num_generations}"
        )
    return rewards if rewards.ndim == 2 else rewards[:, None]


def checked_weights(weights: Sequence[float] | Tensor | None, rewards_NK: Tensor) -> Tensor:
    """Return the weights [K] in the dtype and on the device of the rewards."""
    K = rewards_NK.shape[1]
    if weights is None:
        return rewards_NK.new_ones(K)
    try:
        # The dtype is given because the default dtype may be bf16.
        weights_K = weights if isinstance(weights, Tensor) else torch.as_tensor(weights, dtype=rewards_NK.dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"weights: found {weights!r}, expected a number for each reward") from error
    checks.real("weights", weights_K)
    if weights_K.shape != (K,):
        raise ValueError(f"weights: found shape {list(weights_K.shape)}, expected [{K}], one for each reward")
    if values_checked(weights_K) and not weights_K.isfinite().all():
        raise ValueError(f"weights: found {weights_K.tolist()}, expected finite numbers")
    return weights_K.to(rewards_NK)


def _checked_token_counts(token_counts: Tensor, like_N: Tensor) -> Tensor:
    checks.real("token_counts", token_counts)
    if token_counts.shape != like_N.shape:
        raise ValueError(f"token_counts: found shape {list(token_counts.shape)}, expected {list(like_N.shape)}")
    if values_checked(token_counts) and not (token_counts.isfinite() & (token_counts >= 0)).all():
        raise ValueError(f"token_counts: found {token_counts.tolist()}, expected finite counts >= 0")
    return token_counts.to(like_N)


def apply_conditions(
    rewards_NK: Tensor, conditions: Mapping[int, tuple[int, float]] | Sequence[Condition] | None
) -> Tensor:
    """Set rewards [N, K] to 0 where a condition is not fulfilled; see `group_advantage`."""
    if conditions is None:
        return rewards_NK
    K = rewards_NK.shape[1]
    checks.of_type("conditions", conditions, (Mapping, Sequence), "(k, l, threshold) triples, or a mapping of such")
    triples = conditions
    if isinstance(conditions, Mapping):
        triples = [(k, *v) if isinstance(v, Sequence) else (k, v) for k, v in conditions.items()]
    conditioned_NK = rewards_NK.clone()
    for triple in triples:
        if not isinstance(triple, Sequence) or len(triple) != 3:
            raise ValueError(f"conditions: found {triple}, expected (k, l, threshold)")
        k, l, threshold = triple  # noqa: E741
        if k not in range(K) or l not in range(K):
            raise ValueError(f"conditions: found rewards {k} and {l}, expected indices in 0 ... {K - 1}")
        if k == l:
            raise ValueError(f"conditions: found reward {k} conditioned on itself, expected two different rewards")
        checks.number("conditions", threshold, "a number as the threshold")
        if math.isnan(threshold):
            raise ValueError("conditions: found threshold NaN, expected a number")
        fulfilled_N = rewards_NK[:, l] >= threshold
        missing_N = rewards_NK[:, k].isnan()
        conditioned_NK[:, k] = torch.where(fulfilled_N | missing_N, conditioned_NK[:, k], 0.0)
    return conditioned_NK
