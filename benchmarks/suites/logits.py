"""Measure `rlloss.token_stats` against its peers: log-probabilities, entropies and the gradient of the logits."""

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders.logits import Case, peers
from benchmarks.harness import errors
from benchmarks.harness.contest import Contest, copies, entrant
from benchmarks.harness.peer import Peer
from benchmarks.harness.shapes import Cell, lengths
from benchmarks.harness.timing import DEVICE
from rlloss import reference


@functools.lru_cache(maxsize=1)
def make_logits(N: int, V: int, dtype: torch.dtype) -> Tensor:
    """Make logits `[1, N + 1, V]` with a standard deviation of 4, which gives entropies of about 4 nats."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    padded = torch.empty((1, N + 1, V), dtype=dtype, device=DEVICE)
    for rows in padded[0].split(256):
        rows.copy_(torch.randn(rows.shape, generator=generator, device=DEVICE).mul_(4))
    return padded


def make_case(columns: tuple[int, int], V: int, dtype: torch.dtype, rho: float, fill: float) -> Case:
    generator = torch.Generator().manual_seed(1)
    N = columns[0] * columns[1]
    target = torch.randint(0, V, (N,), generator=generator)
    mask = (torch.arange(columns[1]) < torch.tensor(lengths(*columns, fill)).unsqueeze(-1)).flatten()
    counted = mask.nonzero().squeeze(-1)
    live = counted[torch.randperm(len(counted), generator=generator)[: round(len(counted) * rho)]]
    grad = torch.zeros(N).index_copy_(0, live, torch.randn(len(live), generator=generator).add_(0.01))
    return Case(make_logits(N, V, dtype), target.to(DEVICE), mask.to(DEVICE), grad.to(DEVICE))


def check_forward(peer: Peer, case: Case) -> dict[str, dict[str, float]]:
    """Return {"errors"} of sampled rows against the reference in fp64.

    Raises:
        ArithmeticError: an error exceeds rounding to the result's dtype, or a masked row is not 0.
    """
    counts = torch.ones_like(case.target, dtype=torch.bool) if case.mask is None else case.mask
    rows = errors.spread(counts.nonzero().squeeze(-1))
    logp, entropy, _ = reference.token_stats(case.logits[rows].double(), case.target[rows])
    assert peer.forward is not None
    found_logp, found_entropy = peer.forward(case)
    of, allowed = {}, {}
    for name, found, expected in (("logp", found_logp, logp), ("entropy", found_entropy, entropy)):
        if found is not None:
            of[name] = errors.worst(found[rows], expected)
            scale = max(1.0, expected.abs().max().item())
            allowed[name] = scale * errors.allowed(case.logits.shape[-1], found.dtype)
            if found[~counts].ne(0).any():
                raise ArithmeticError(f"{peer.name}: {name} of a masked row is not 0")
    errors.require(peer.name, of, allowed)
    return {"errors": of}


def check_step(peer: Peer, case: Case) -> dict[str, dict[str, float]]:
    """Return {"errors"} of the gradients of sampled live rows against the reference in fp64.

    Raises:
        ArithmeticError: an error exceeds rounding to the result's dtype, or a dead row is not 0.
    """
    live = case.grad != 0
    rows = errors.spread(live.nonzero().squeeze(-1))
    x = case.logits[rows].double().requires_grad_()
    logp, _, _ = reference.token_stats(x, case.target[rows])
    logp.backward(case.grad[rows].double())
    found = peer.step(case)
    if (found.ne(0).any(-1) & ~live).any():  # NaN is not 0 either
        raise ArithmeticError(f"{peer.name}: the gradient of a dead row is not 0")
    assert x.grad is not None
    of = errors.of_rows(found[rows], x.grad, case.target[rows], case.grad[rows])
    errors.require(peer.name, of, dict.fromkeys(of, errors.allowed(found.shape[-1], found.dtype)))
    return {"errors": of}


def ideal_bytes(case: Case, kind: str) -> int:
    """Return the necessary bytes: read the counted rows; in a step read live rows again and write the gradient."""
    rows = len(case.target) if case.mask is None else int(case.mask.sum())
    if kind == "step":
        rows += int(case.grad.count_nonzero()) + len(case.target)
    return rows * case.logits[0].nbytes


def contest(cell: Cell, compiled: bool) -> Contest:
    V = cell.size[1]
    assert V is not None
    case = make_case(cell.columns, V, getattr(torch, cell.dtype), cell.rho, cell.fill)
    check = check_forward if cell.kind == "forward" else check_step
    entrants = [
        entrant(peer, case, functools.partial(check, peer, case), phased=cell.kind == "step")
        for peer in peers(compiled=compiled)
    ]
    facts: dict[str, Any] = {"ideal_bytes": ideal_bytes(case, cell.kind)}
    return Contest(entrants, copies(case.logits), facts)


def notes(compiled: bool) -> dict[str, str]:
    return {peer.name: peer.note for peer in peers(compiled=compiled)}
