"""Measure `rlloss.GRPOLoss` against its peers: the whole loss from logits, and its gradient."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders.hidden_case import advantages, token_scales
from benchmarks.contenders.loss import LossCase, peers
from benchmarks.harness import errors
from benchmarks.harness.contest import Contest, copies, entrant
from benchmarks.harness.peer import Peer
from benchmarks.harness.shapes import Cell, lengths
from benchmarks.harness.timing import DEVICE
from benchmarks.suites.logits import make_logits
from rlloss import reference

BLOCK_ROWS = 64


class LossReference(NamedTuple):
    """The result in fp64. coefficient: gradient `[B * T]` of each row's log-probability, 0 in dead rows."""

    loss: Tensor
    entropy: Tensor
    coefficient: Tensor


def make_case(columns: tuple[int, int], V: int, dtype: torch.dtype, rho: float, fill: float) -> LossCase:
    B, T = columns
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(T) < torch.tensor(lengths(B, T, fill)).unsqueeze(-1)
    scale = token_scales(mask, rho, g).to(DEVICE, dtype)
    advantage, target = advantages(B, g), torch.randint(0, V, (B, T), generator=g)
    logits = make_logits(B * T, V, dtype)[0, :-1]  # of standard deviation 4
    if rho < 1.0:
        logits = logits * (scale / 4).unsqueeze(-1)
    return LossCase(logits.view(B, T, V), target.to(DEVICE), mask.to(DEVICE), advantage.to(DEVICE), rho)


@torch.no_grad()
def solve(case: LossCase) -> tuple[LossCase, LossReference]:
    """Return the case with its cutoff, and its reference result."""
    logits, target = case.logits.flatten(0, 1), case.target.flatten()
    counted = case.mask.flatten().nonzero().squeeze(-1)
    blocks = counted.split(BLOCK_ROWS)
    entropy = torch.cat([reference.token_stats(logits[rows].double(), target[rows])[1] for rows in blocks])
    kept, cutoff = torch.ones_like(counted, dtype=torch.bool), None
    if case.rho < 1.0:
        kept = entropy >= torch.quantile(entropy, 1 - case.rho)
        cutoff = float((entropy[kept].min() + entropy[~kept].max()) / 2)
    advantage = case.advantage.double().repeat_interleave(case.mask.shape[1])[counted]
    coefficient = torch.where(kept, -advantage, 0.0) / len(counted)
    of_all = torch.zeros_like(target, dtype=torch.double).index_copy_(0, counted, coefficient)
    return replace(case, cutoff=cutoff), LossReference(coefficient.sum(), entropy.mean(), of_all)


def check(peer: Peer, case: LossCase, expected: LossReference) -> dict[str, dict[str, float]]:
    """Return {"errors"} of the loss, the mean entropy and the gradient of sampled rows.

    Raises:
        ArithmeticError: an error exceeds rounding to the dtype, or a dead row is not 0.
    """
    found = peer.step(case)
    gradient, live = found.gradient.flatten(0, 1), expected.coefficient != 0
    if (gradient.ne(0).any(-1) & ~live).any():  # NaN is not 0 either
        raise ArithmeticError(f"{peer.name}: the gradient of a dead row is not 0")
    rows = errors.spread(live.nonzero().squeeze(-1))
    x, target, coefficient = case.logits.flatten(0, 1)[rows], case.target.flatten()[rows], expected.coefficient[rows]
    of_rows = -torch.softmax(x.double(), -1)
    of_rows[torch.arange(len(rows), device=x.device), target] += 1
    of_rows *= coefficient.unsqueeze(-1)
    scale = case.advantage.abs().mean().double()
    of = {"loss": ((found.loss.double() - expected.loss).abs() / scale).nan_to_num(nan=torch.inf).item()}
    of |= errors.of_rows(gradient[rows], of_rows, target, coefficient)
    if found.entropy is not None:
        of["entropy"] = errors.relative(found.entropy, expected.entropy)
    allowed = dict.fromkeys(of, errors.allowed(case.logits.shape[-1], case.logits.dtype))
    errors.require(peer.name, of, allowed | {"loss": 1e-5})
    return {"errors": of}


def contest(cell: Cell, compiled: bool) -> Contest:
    V = cell.size[1]
    assert V is not None
    case, expected = solve(make_case(cell.columns, V, getattr(torch, cell.dtype), cell.rho, cell.fill))
    entrants = [
        entrant(peer, case, functools.partial(check, peer, case, expected)) for peer in peers(compiled=compiled)
    ]
    counted, live = int(case.mask.sum()), int(expected.coefficient.count_nonzero())
    # Counted rows read, live rows read again, and the whole gradient written.
    moved = (counted + live + case.mask.numel()) * case.logits[0, 0].nbytes
    facts: dict[str, Any] = {"counted": counted, "live": live, "ideal_bytes": moved}
    return Contest(entrants, copies(case.logits), facts)


def notes(compiled: bool) -> dict[str, str]:
    return {peer.name: peer.note for peer in peers(compiled=compiled)}
