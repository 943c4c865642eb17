"""The covariance of log-probability and advantage, token by token, and the tokens that "clip_cov" and "kl_cov" pick.

A token that is likely and better than average (or unlikely and worse) sharpens the policy when it is trained on: to
first order the entropy falls by the learning rate times Cov(logp, A) (2505.22617). A few tokens hold most of it.
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
    """(logp - mean logp) (A - mean A) of each token (2505.22617 Eq. 10), 0 where it does not count.

    logp `[B, T]`, advantage `[B]` or `[B, T]`, mask `[B, T]` bool; returns fp64 `[B, T]` without gradient. The means
    are those of the tokens that count in all processes of the group; a token that is not finite is in neither, and its
    own covariance is NaN.
    """
    _checked(logp, advantage, mask, process_group)
    return _covariance(logp, advantage, mask, process_group)


def _checked(logp: Tensor, advantage: Tensor, mask: Tensor, process_group) -> None:
    checks.tokens(logp, advantage, mask)
    checks.process_group("process_group", process_group)


def _covariance(logp: Tensor, advantage: Tensor, mask: Tensor, process_group) -> Tensor:
    """`token_covariance` after its checks; advantage `[B]`, `[B, 1]` or `[B, T]`."""
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
    """The tokens that "clip_cov" leaves out or "kl_cov" penalises: what `policy_loss` takes as `selected`.

    Of N tokens, floor(ratio N) are picked, at least one with `config.at_least_one`: for "clip_cov" at random (or the
    largest) among those with low <= covariance <= high, for "kl_cov" those with the largest covariance.

    Args:
        logp: `[B, T]` log-probability of each token, in nats: of the whole generation batch from a pass without
            gradient, for `scope="generation"`.
        advantage: `[B]` or `[B, T]`.
        mask: `[B, T]` bool, True = counts.
        loss_type: "clip_cov" or "kl_cov".
        config: `CovarianceConfig()` if None; its scope does not matter here.
        candidates: `[B, T]` bool, the tokens that may be picked (means and N are of the mask); None: all.
        draw: the number of the draw, for the random selection: another one picks others. None: made from the lengths
            and advantages of the batch.
        sequence_key: `[B]` int64, an identity of each sequence, such as `rlloss.tokens.exact_k.sequence_key` of its
            token ids. The pick, of equal covariances too, then depends neither on the order of the sequences nor on how
            they are spread over processes. None: the place of a sequence is its identity. Padding never matters.
        process_group: the processes whose tokens count together. None: this one alone.

    Returns:
        `[B, T]` bool. A token whose numbers are not finite is not picked.

    Raises:
        ValueError, TypeError: an argument does not fit; it is named.

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
    """Tokens that may be picked: `candidates` among those of the mask, `[B, T]` bool; advantage `[B]`, `[B, 1]` or
    `[B, T]`."""

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
    """`covariance_selection` after its checks."""
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
    """A number per token that counts, a hash of seed, draw and what the token is known by: no generator, whose seed
    the host would have to know."""
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
    """A number made of the batch's lengths and advantages. Unlike logp, they have the same bits on every machine and
    for every split of the batch."""
    advantage = advantage if advantage.dim() == 2 else advantage.unsqueeze(-1)
    bits = (advantage.detach().float() + 0.0).expand(mask.shape).contiguous().view(torch.int32)  # -0 is 0
    return exact_k.sequence_key((bits, mask)).sum()
