"""Measure `rlloss.policy_loss` from log-probabilities `[B, T]` against the same formula in torch."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.contenders.hidden import CLIP, loss_in_torch
from benchmarks.contenders.hidden_case import advantages
from benchmarks.harness import errors
from benchmarks.harness.contest import Contest, entrant
from benchmarks.harness.peer import Peer
from benchmarks.harness.shapes import Cell
from benchmarks.harness.timing import DEVICE
from rlloss import LossConfig, policy_loss

HEAD_START_CYCLES = 10_000_000  # some milliseconds: a GPU runs this faster than the host can launch it


@dataclass(frozen=True)
class TokenCase:
    """logp, old_logp and entropy fp32 and mask bool `[B, T]`, advantage `[B]`. Every column counts."""

    logp: Tensor
    old_logp: Tensor
    entropy: Tensor
    mask: Tensor
    advantage: Tensor
    rho: float


def make_case(shape: tuple[int, int], rho: float) -> TokenCase:
    """Make a case. The log-ratios have a standard deviation of 0.2, so that some tokens are clipped."""
    g = torch.Generator().manual_seed(0)
    old_logp = -4 * torch.rand(shape, generator=g)
    logp = old_logp + 0.2 * torch.randn(shape, generator=g)
    entropy, mask = 4 * torch.rand(shape, generator=g), torch.ones(shape, dtype=torch.bool)
    logp, old_logp, entropy, mask, advantage = (
        x.to(DEVICE) for x in (logp, old_logp, entropy, mask, advantages(shape[0], g))
    )
    return TokenCase(logp, old_logp, entropy, mask, advantage, rho)


def _rlloss(logp: Tensor, case: TokenCase) -> Tensor:
    config = LossConfig(epsilon_low=CLIP[0], epsilon_high=CLIP[1], top_entropy_quantile=case.rho)
    given = {"old_logp": case.old_logp, "entropy": case.entropy}
    return policy_loss(logp, case.advantage, case.mask, config=config, **given).loss


def _formula(logp: Tensor, case: TokenCase) -> Tensor:
    return loss_in_torch(logp, case.entropy, case.mask, case.advantage, case.rho, case.old_logp)[0]


def _start(function: Callable[[Tensor, TokenCase], Tensor], case: TokenCase) -> Callable[[], tuple[Tensor, Tensor]]:
    logp = case.logp.detach().requires_grad_()
    loss = function(logp, case)

    def backward() -> tuple[Tensor, Tensor]:
        loss.backward()
        assert logp.grad is not None
        return loss.detach(), logp.grad

    return backward


def peers() -> list[Peer]:
    return [
        Peer("rlloss", "`policy_loss`, with its metrics", functools.partial(_start, _rlloss)),
        Peer("torch eager", "TRL's formula, without metrics", functools.partial(_start, _formula)),
    ]


def check(peer: Peer, case: TokenCase) -> dict[str, dict[str, float]]:
    """Return {"errors"} of loss and gradient against the formula in fp64.

    Raises:
        ArithmeticError: an error is above 1e-5.
    """
    wide = replace(case, logp=case.logp.double(), old_logp=case.old_logp.double())
    (loss, grad), (found, d) = _start(_formula, wide)(), peer.step(case)
    of = {"loss": errors.worst(found, loss), "gradient": errors.relative(d, grad)}
    errors.require(peer.name, of, dict.fromkeys(of, 1e-5))
    return {"errors": of}


def contest(cell: Cell, compiled: bool) -> Contest:
    case = make_case(cell.columns, cell.rho)
    return Contest(
        [entrant(peer, case, functools.partial(check, peer, case), head_start=HEAD_START_CYCLES) for peer in peers()]
    )


def notes(compiled: bool) -> dict[str, str]:
    return {peer.name: peer.note for peer in peers()}
