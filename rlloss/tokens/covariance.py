"""Compute each token's covariance of log-probability and advantage, and pick tokens for "clip_cov" and "kl_cov".

Training on a token that is likely and better than average (or unlikely and worse) sharpens the policy: to first order
the entropy falls by the learning rate times Cov(logp, A) (2505.22617). A few tokens make up most of the covariance.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlloss import checks
from rlloss.config import CovarianceConfig
from rlloss.loss_types import LOSSES
from rlloss.tokens import exact_k
from rlloss.tokens.exact_k import check_sequence_key, gathered, largest, mixed, token_key


def token_covariance(logp: Tensor, advantage: Tensor, mask: Tensor, *, process_group=None) -> Tensor:
    """Compute (logp - mean logp) (A - mean A) of each token (2505.22617 Eq. 10).

    Args:
        logp: `[B, T]` log-probability of each token, in nats.
        advantage: `[B]` or `[B, T]`.
        mask: `[B, T]` bool, True: the token counts.
        process_group: the processes over whose tokens the means are taken. None: this one alone.

    Returns:
        `[B, T]` fp64 without gradient, 0 for tokens that do not count. A token whose numbers are not finite is left out
        of both means, and its covariance is NaN.

    Raises:
        ValueError, TypeError: an argument does not fit; the error names it.
    """
    _checked(logp, advantage, mask, process_group)
    return _covariance(logp, advantage, mask, process_group)


def _checked(logp: Tensor, advantage: Tensor, mask: Tensor, process_group) -> None:
    checks.tokens(logp, advantage, mask)
    checks.process_group("process_group", process_group)


def _covariance(logp: Tensor, advantage: Tensor, mask: Tensor, process_group) -> Tensor:
    """Compute `token_covariance` after its checks. advantage is `[B]`, `[B, 1]` or `[B, T]`."""
    logp = logp.detach().double()
    advantage = (advantage if advantage.dim() == 2 else advantage.unsqueeze(-1)).detach().double().expand(mask.shape)
    counted = mask & logp.isfinite() & advantage.isfinite()
    sums = torch.stack([torch.where(counted, x, 0.0).sum() for x in (torch.ones_like(logp), logp, advantage)])
    if process_group is not None:
        torch.distributed.all_reduce(sums, group=process_group)
    mean_logp, mean_advantage = sums[1:] / sums[0].clamp(min=1.0)
    covariance = (logp - mean_logp) * (advantage - mean_advantage)
    return torch.where(mask, torch.where(counted, covariance, torch.nan), 0.0)


def covariance_selection(
    logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "clip_cov",
    config: CovarianceConfig | None = None,
    candidates: Tensor | None = None,
    draw: Tensor | int | None = None,
    sequence_key: Tensor | None = None,
    process_group=None,
) -> Tensor:
    """Pick the tokens that "clip_cov" leaves out or "kl_cov" penalises. Pass the result to `policy_loss` as `selected`.

    Of N tokens that count, floor(ratio N) are picked, at least one with `config.at_least_one`. "kl_cov" picks those
    with the largest covariance. "clip_cov" picks at random (or the largest) among those with low <= covariance <= high.

    Args:
        logp: `[B, T]` log-probability of each token, in nats. For `scope="generation"` it belongs to the whole
            generation batch and comes from a pass without gradient.
        advantage: `[B]` or `[B, T]`.
        mask: `[B, T]` bool, True: the token counts.
        loss_type: "clip_cov" or "kl_cov".
        config: settings. None: `CovarianceConfig()`. Its scope has no effect here.
        candidates: `[B, T]` bool, the tokens that may be picked. Means and N are still taken over the mask. None: all.
        draw: number of the draw of the random selection; each number picks other tokens. None: computed from the
            lengths and advantages of the batch.
        sequence_key: `[B]` int64, an identity of each sequence, such as `rlloss.tokens.exact_k.sequence_key` of its
            token ids. The pick, also among equal covariances, then depends neither on the order of the sequences nor on
            how they are spread over processes. None: the place of a sequence is its identity. Padding never matters.
        process_group: the processes whose tokens count together. None: this one alone.

    Returns:
        `[B, T]` bool. A token whose numbers are not finite is not picked.

    Raises:
        ValueError, TypeError: an argument does not fit; the error names it.

    Source: 2505.22617 Eq. 10 to 14.
    """
    config = CovarianceConfig() if config is None else config
    checks.of_type("config", config, CovarianceConfig, "a CovarianceConfig")
    checks.one_of("loss_type", loss_type, tuple(name for name, row in LOSSES.items() if row.picks))
    _checked(logp, advantage, mask, process_group)
    if candidates is not None:
        checks.boolean("candidates", candidates)
        checks.same_shape("candidates", candidates, logp.shape, "like logp")
        checks.same_device("candidates", candidates, logp, "logp")
    if isinstance(draw, Tensor):
        checks.scalar("draw", draw)
        checks.require(not draw.is_floating_point(), "draw", f"dtype {draw.dtype}", "an int, or a tensor of one")
    elif draw is not None:
        checks.whole("draw", draw)
    check_sequence_key(sequence_key, mask)
    tokens = Candidates(logp, advantage, mask, mask if candidates is None else mask & candidates)
    return select(tokens, loss_type, config, draw, sequence_key, process_group)


class Candidates(NamedTuple):
    """Inputs of `select`. candidates `[B, T]` bool marks the tokens of the mask that may be picked; advantage is `[B]`,
    `[B, 1]` or `[B, T]`."""

    logp: Tensor
    advantage: Tensor
    mask: Tensor
    candidates: Tensor


def select(
    tokens: Candidates,
    loss_type: str,
    config: CovarianceConfig,
    draw: Tensor | int | None = None,
    sequence_key: Tensor | None = None,
    process_group=None,
) -> Tensor:
    """Compute `covariance_selection` after its checks."""
    logp, advantage, mask, candidates = tokens
    covariance = _covariance(logp, advantage, mask, process_group)
    candidates = candidates & ~covariance.isnan()
    score, key = covariance, None if sequence_key is None else token_key(mask, sequence_key)
    if LOSSES[loss_type].picks == "between":
        candidates = candidates & (covariance >= config.low) & (covariance <= config.high)
        if config.selection == "random":
            score = _random(advantage, mask, config.seed, draw, key, process_group)
    N = mask.sum()
    if process_group is not None:
        torch.distributed.all_reduce(N, group=process_group)
    k = (N.double() * config.ratio).floor()
    k = k.clamp(min=1.0) if config.at_least_one else k
    return largest(score, candidates, k, key=key, process_group=process_group)


def _random(
    advantage: Tensor, mask: Tensor, seed: int, draw: Tensor | int | None, key: Tensor | None, process_group
) -> Tensor:
    """Return a hash of seed, draw and the key of each token. A generator would need its seed on the host."""
    if draw is None:
        draw = _draw_of(advantage, mask)
        if process_group is not None:
            torch.distributed.all_reduce(draw, group=process_group)
    if key is None:
        key = mask.reshape(-1).cumsum(0).view(mask.shape)
        if process_group is not None:
            start, _ = gathered(torch.ones(int(mask.sum()), device=mask.device), process_group)
            key = key + start
    if not isinstance(draw, Tensor):
        draw = torch.full((), draw, dtype=torch.int64, device=mask.device)
    draw = draw.to(mask.device, torch.int64)
    return mixed(key + mixed(draw + mixed(torch.full_like(draw, seed)))).double()


def _draw_of(advantage: Tensor, mask: Tensor) -> Tensor:
    """Compute the number of the draw from the batch's lengths and advantages. Unlike logp, these have the same bits on
    every machine and for every split of the batch."""
    advantage = advantage if advantage.dim() == 2 else advantage.unsqueeze(-1)
    bits = (advantage.detach().float() + 0.0).expand(mask.shape).contiguous().view(torch.int32)  # + 0.0 turns -0 into 0
    return exact_k.sequence_key((bits, mask)).sum()
