"""Measure how many groups of rewards the advantages tell apart; GDPO tells apart more than GRPO's sum (2601.05242)."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss import checks
from rlloss.rewards.advantages import Condition, apply_conditions, checked_rewards, checked_weights, group_advantage

# Advantages closer than this share of the largest count as equal. Rewards in fp32 have errors of 1e-7 of their size. If
# a group's std is a hundredth of that size, the error becomes 1e-5, and no optimizer tells such advantages apart.
_SAME_ADVANTAGE = 1e-5
_ROUNDING = 4 * torch.finfo(torch.float32).eps


@torch.no_grad()
def group_accuracy(rewards: Tensor, *, num_generations: int) -> Tensor:
    """Compute the accuracy of each completion's group, which `diagnose` takes as `group`.

    Args:
        rewards: `[N]` or `[N, K]`, floating, groups consecutive. Only the first reward is read.
        num_generations: completions per group.

    Returns:
        `[N]` fp64, the mean of the first reward over the completions of the group that have it. All NaN (unknown) if a
        value of that reward lies outside [0, 1], because it is then no accuracy.

    Raises:
        TypeError, ValueError: an argument does not fit; the error names it.
    """
    first = checked_rewards(rewards, num_generations)[:, 0]
    mean = first.detach().double().unflatten(0, (-1, num_generations)).nanmean(-1, keepdim=True)
    is_accuracy = ~((first < 0) | (first > 1)).any()
    return torch.where(is_accuracy, mean, torch.nan).expand(-1, num_generations).flatten()


@torch.no_grad()
def reward_resolution(
    rewards: Tensor,
    *,
    num_generations: int,
    weights: Sequence[float] | Tensor | None = None,
    method: str = "gdpo",
    names: Sequence[str] | None = None,
    conditions: Mapping[int, tuple[int, float]] | Sequence[Condition] | None = None,
) -> dict[str, float]:
    """Measure which rewards still carry a signal, and how many different groups the advantages still tell apart.

    Args:
        rewards: `[N]` or `[N, K]`, floating, as for `group_advantage`: a NaN is missing, groups are consecutive. Across
            ranks, pass the gathered batch. It is copied to the CPU once and processed there, in fp64.
        num_generations: completions per group.
        weights: `[K]`, default all 1.
        method: method of the advantages, "grpo", "dr_grpo", "rloo" or "gdpo", here without eps.
        names: names of the K rewards; default "0", "1", ...
        conditions: as for `group_advantage`. They are applied before anything is measured.

    Returns:
        name -> number. The values belong to this batch: average them, do not add them up.

        ==============================  ===============================================================================
        ``groups``                      number of groups
        ``distinct_rewards``            number of different groups of reward vectors, ignoring the order of completions;
                                        no advantage can tell apart more
        ``distinct_advantages``         number of different groups of advantages, ignoring the order (for ``gdpo``
                                        before the division by the batch's std, which scales all alike)
        ``distinct_advantages_grpo``    the same for GRPO on the same rewards and weights
        ``zero_advantage_groups``       share of the groups in which every advantage is 0
        ``zero_variance/<name>``        share of the groups in which this reward tells no completions apart: it is
                                        missing, or the same for all that have it
        ``effective_weight/<name>``     this reward's share of the advantage's variance, sum x a / sum a^2 over
                                        completions. a is the advantage, x the contribution of this reward to it (summed
                                        over rewards, x gives a). The weights sum to 1. A reward with a weight below 0
                                        is outvoted. NaN if all a are 0
        ``correlation/<name>/<name>``   Pearson correlation of two rewards, each normalised in its group, over the
                                        completions that have both. At 1 the second adds nothing. NaN if either is
                                        constant there
        ==============================  ===============================================================================

        Sums of rewards are equal if they differ by at most four fp32 roundings of the largest reward of their group.
        Advantages are equal if they differ by at most 1e-5 of the largest contribution of a reward.

    Raises:
        TypeError, ValueError: as `group_advantage`, or `names` does not name each reward once.

    Source: 2601.05242, section 3 (groups told apart). The gauges are defined by this library.
    """
    group_advantage(  # checks the arguments
        rewards, num_generations=num_generations, weights=weights, method=method, conditions=conditions
    )
    rewards_NK = (rewards if rewards.ndim == 2 else rewards[:, None]).detach().double().cpu()
    rewards_NK = apply_conditions(rewards_NK, conditions)
    K, G = rewards_NK.shape[1], num_generations
    weights_K = checked_weights(weights, rewards_NK)
    expected = f"{K} different names"
    names = [str(k) for k in range(K)] if names is None else names
    checks.of_type("names", names, Sequence, expected)
    checks.require(
        len(names) == K == len(set(names)) and all(isinstance(name, str) for name in names), "names", names, expected
    )

    rewards_KN = rewards_NK.unbind(1)
    normalised_NK = torch.stack([_advantage(_snap(r, G), G, "grpo") for r in rewards_KN], dim=1)
    parts = {m: _parts(rewards_NK, weights_K, G, m) for m in {"grpo", method} - {"gdpo"}}
    parts["gdpo"] = normalised_NK * weights_K
    tolerances = {m: _SAME_ADVANTAGE * x_NK.abs().amax().item() for m, x_NK in parts.items()}
    advantages = {m: x_NK.sum(1) for m, x_NK in parts.items()}

    advantage_N = advantages[method]
    zero_B = _in_groups(advantage_N.abs() <= tolerances[method], G).all(1)
    flat_BK = _in_groups(normalised_NK == 0, G).all(1)
    classes_NK = torch.stack([_classes(r, _ROUNDING * r.abs().nan_to_num(nan=0.0).amax()) for r in rewards_KN], dim=1)
    result = {
        "groups": float(zero_B.numel()),
        "distinct_rewards": float(_count(_in_groups(classes_NK, G))),
        "distinct_advantages": float(_distinct(advantage_N, G, tolerances[method])),
        "distinct_advantages_grpo": float(_distinct(advantages["grpo"], G, tolerances["grpo"])),
        "zero_advantage_groups": zero_B.double().mean().item(),
    }
    own_K = (parts[method] * advantage_N[:, None]).sum(0)
    share_K = torch.where(zero_B.all(), math.nan, own_K / advantage_N.square().sum())
    for kind, values_K in {"zero_variance": flat_BK.double().mean(0), "effective_weight": share_K}.items():
        result |= {f"{kind}/{name}": value for name, value in zip(names, values_K.tolist(), strict=True)}
    for i, j in itertools.combinations(range(K), 2):
        both_N = ~(rewards_KN[i].isnan() | rewards_KN[j].isnan())
        result[f"correlation/{names[i]}/{names[j]}"] = _correlation(normalised_NK[both_N, i], normalised_NK[both_N, j])
    return result


class Resolution(NamedTuple):
    """Number of different groups of `group_size` completions (rewards), and of their advantages for each method."""

    group_size: int
    rewards: int
    grpo: int
    dr_grpo: int
    gdpo: int


def resolution_table(
    num_rewards: int = 2, group_sizes: Sequence[int] = (2, 3, 4, 5, 6, 8, 10)
) -> list[Resolution]:  # fmt: skip
    """Count how many groups of binary rewards the advantages tell apart, by enumerating all groups.

    Completions of a group have no order: a group is a multiset of vectors in {0, 1}^num_rewards, and its advantages
    are a sorted list. All weights are 1 and eps is 0. Advantages that are equal on paper then agree here to 1e-15, and
    different ones differ by far more than the tolerance. "dr_grpo" is GRPO without the std. GDPO's division by the
    batch's std scales all groups alike, so it changes no count. The number of groups grows as G^(2^num_rewards - 1).

    Args:
        num_rewards: number of binary rewards, >= 1.
        group_sizes: sizes G of the groups, each >= 1.

    Returns:
        One `Resolution` per group size.

    Raises:
        TypeError, ValueError: an argument has another type, or num_rewards or a group size is below 1.

    Source: 2601.05242.
    """
    checks.whole("num_rewards", num_rewards, 1)
    checks.of_type("group_sizes", group_sizes, Sequence, "sizes of groups")
    for G in group_sizes:
        checks.whole("group_sizes", G, 1)
    vectors = torch.tensor(list(itertools.product((0.0, 1.0), repeat=num_rewards)), dtype=torch.float64)
    rows = []
    for G in group_sizes:
        groups = torch.tensor(list(itertools.combinations_with_replacement(range(len(vectors)), G)))
        rewards = vectors[groups].flatten(0, 1)
        counts = {}
        for method in ("grpo", "dr_grpo", "gdpo"):
            advantage = _advantage(rewards, G, method)
            counts[method] = _distinct(advantage, G, 1e-9 * advantage.abs().amax().item())
        rows.append(Resolution(G, len(groups), **counts))
    return rows


def _in_groups(values_N: Tensor, G: int) -> Tensor:
    return values_N.unflatten(0, (-1, G))


def _advantage(rewards: Tensor, G: int, method: str) -> Tensor:
    if method in ("grpo", "gdpo"):
        return group_advantage(rewards, num_generations=G, method=method, eps=0.0)
    return group_advantage(rewards, num_generations=G, method=method)


def _parts(rewards_NK: Tensor, weights_K: Tensor, G: int, method: str) -> Tensor:
    """Return the contribution [N, K] of each reward to the advantage, for a method that sums the rewards first."""
    present_NK = ~rewards_NK.isnan()
    scorable_N1 = present_NK.any(1, keepdim=True)
    weighted_NK = torch.where(present_NK, rewards_NK * weights_K, 0.0)
    weighted_NK = torch.where(scorable_N1, weighted_NK, math.nan)
    total_N = _snap(weighted_NK.sum(1), G, size_N=weighted_NK.abs().amax(1))
    # The methods differ by a factor per group, which is the ratio of the lengths of their advantage vectors.
    length_B, centred_B = (_in_groups(_advantage(total_N, G, m), G).norm(dim=1) for m in (method, "dr_grpo"))
    factor_N = torch.where(centred_B == 0, 0.0, length_B / centred_B).repeat_interleave(G)
    return torch.stack([_advantage(part, G, "dr_grpo") * factor_N for part in weighted_NK.unbind(1)], dim=1)


def _snap(values_N: Tensor, G: int, size_N: Tensor | None = None) -> Tensor:
    """Make values of a group equal if they differ by no more than roundings (of `size_N`, default their own size).

    Without eps, a std of 1e-17 would turn the difference into +-1.
    """
    size_BG = _in_groups((values_N if size_N is None else size_N).abs().nan_to_num(nan=0.0), G)
    value, order = _in_groups(values_N, G).sort(dim=1)  # NaN last
    step = value.diff(dim=1, prepend=value[:, :1])
    first = torch.where(step > _ROUNDING * size_BG.amax(1, keepdim=True), torch.arange(G), 0).cummax(dim=1).values
    snapped = torch.where(value.isnan(), math.nan, value.gather(1, first))
    return torch.empty_like(value).scatter_(1, order, snapped).flatten()


def _classes(values: Tensor, tolerance: float | Tensor) -> Tensor:
    """Number the values; values that are equal or linked by steps of at most `tolerance` get the same number."""
    value, order = values.sort()  # NaN last
    new = (value.diff(prepend=value[:1]) > tolerance) | (value.isnan() & ~value.roll(1).isnan())
    return torch.empty_like(order).scatter_(0, order, new.cumsum(0))


def _distinct(advantage_N: Tensor, G: int, tolerance: float) -> int:
    return _count(_in_groups(_classes(advantage_N, tolerance)[:, None], G))


def _count(classes_BGK: Tensor) -> int:
    """Count the different multisets of G vectors."""
    vector_NK, G = classes_BGK.flatten(0, 1), classes_BGK.shape[1]
    vector_BG = _in_groups(torch.unique(vector_NK, dim=0, return_inverse=True)[1], G)
    return torch.unique(vector_BG.sort(dim=1).values, dim=0).shape[0]


def _correlation(x: Tensor, y: Tensor) -> float:
    if x.numel() == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    constant = min(x.abs().amax(), y.abs().amax()) < 1e-9  # the values are around 1
    return math.nan if constant else ((x * y).sum() / (x.norm() * y.norm())).item()
