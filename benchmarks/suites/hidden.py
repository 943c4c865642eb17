"""Measure `rlloss.LinearGRPOLoss` against its peers: from hidden states to the gradients of hidden and weight."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.contenders.hidden import explained, peers, plan_of, products
from benchmarks.contenders.hidden_case import Case, Reference, Result, Shape, make_case, solve
from benchmarks.contenders.limits import bare_products
from benchmarks.harness import errors
from benchmarks.harness.contest import Contest, Entrant, entrant
from benchmarks.harness.peer import Peer
from benchmarks.harness.readings import OURS, SAME
from benchmarks.harness.shapes import Cell, lengths
from benchmarks.harness.timing import CUDA, DEVICE, phases

BARE = {"bare 1 + 3r": True, "bare 1 + 2r": False}  # name: whether the backward computes the logits again
TRIALS = 2 if CUDA else 1  # trial runs of the bare products in tiles and whole; the faster variant is timed


def compare(name: str, case: Case, found: Result, expected: Reference) -> dict[str, float]:
    """Return the errors of loss, mean entropy and gradients of a step of the contender `name`.

    The loss of an on-policy batch depends only on the kept tokens and the divisor; the gradients show more. The target
    rows of the weight's gradient are far larger than the others, and have their own error.

    Raises:
        ArithmeticError: an error exceeds rounding to the dtype, or a dead row of hidden's gradient is not 0.
    """
    result, rows, live, _ = expected
    if found.hidden.flatten(0, 1)[~live].ne(0).any():  # NaN is not 0 either
        raise ArithmeticError(f"{name}: the gradient of a dead row is not 0")
    scale = case.advantage.abs().mean().double()
    of = {
        "loss": ((found.loss.double() - result.loss).abs() / scale).nan_to_num(nan=torch.inf).item(),
        "gradient of hidden": errors.relative(found.hidden, result.hidden),
    }
    if found.weight is not None:
        if not found.weight.sum(dtype=torch.float32).isfinite():
            raise ArithmeticError(f"{name}: the gradient of the weight is not finite")
        assert result.weight is not None
        is_target, weight = torch.isin(rows, case.target.flatten()[live]), found.weight[rows]
        of["gradient of weight at targets"] = errors.relative(weight[is_target], result.weight[is_target])
        of["gradient of weight elsewhere"] = errors.relative(weight[~is_target], result.weight[~is_target])
    if found.entropy is not None:
        assert result.entropy is not None
        of["entropy"] = errors.relative(found.entropy, result.entropy)
    allowed = dict.fromkeys(of, errors.allowed(len(case.weight), case.weight.dtype))
    errors.require(name, of, allowed | {"loss": 1e-5})
    return of


def check(peer: Peer, case: Case, expected: Reference) -> dict[str, Any]:
    """Return {"errors", "units"} of a step, and for rlloss also its "plan_name"."""
    found, units = products(peer, case)
    of = {"errors": compare(peer.name, case, found, expected), "units": units}
    plan = plan_of(peer.name)
    return of if plan is None else of | {"plan_name": explained(plan, case).plan}


def bare(case: Case, name: str) -> Entrant:
    """Return the bare products in tiles or whole, depending on which was faster in a trial."""
    ways = {how: bare_products(case, again=BARE[name], tiled=how == "in tiles") for how in ("in tiles", "whole")}
    tried = {how: [sum(phases(start)) for _ in range(TRIALS)][-1] for how, start in ways.items()}
    taken = min(tried, key=lambda how: tried[how])
    units = 1 + (3 if BARE[name] else 2) * case.live / case.counted
    return Entrant(name, ways[taken], lambda: {"taken": taken, "units": units})


def contest(cell: Cell, compiled: bool) -> Contest:
    (B, T), (D, V) = cell.columns, cell.size
    assert D is not None and V is not None
    shape, given = Shape(B, T, D, V), tuple(lengths(B, T, cell.fill))
    case = make_case(shape, getattr(torch, cell.dtype), cell.rho, DEVICE, given)
    reference = solve(case)
    case = replace(case, cutoff=reference.cutoff, frozen=cell.kind == "frozen head")
    taken = f"{OURS} {explained('auto', case).plan}"

    def checked(peer: Peer) -> Callable[[], dict[str, Any]]:
        return functools.partial(check, peer, case, reference)

    entrants = [
        entrant(peer, case, checked(peer), why_not=SAME if peer.name == taken else None)
        for peer in peers(compiled=compiled, frozen=case.frozen)
    ]
    facts = {"counted": case.counted, "live": case.live, "unit_flop": case.unit}
    return Contest(entrants, [] if case.frozen else [bare(case, name) for name in BARE], facts)


def notes(compiled: bool) -> dict[str, str]:
    return {peer.name: peer.note for peer in peers(compiled=compiled, frozen=True)}
