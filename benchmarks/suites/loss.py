"""Time and memory of the whole loss from logits, `rlloss.GRPOLoss`, against its peers, each first checked against fp64.

Under pytest (`make bench-pytest`) pytest-benchmark times one contender after the other; `run.py` has them take turns.
"""

import functools
import math
import time
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.contenders.hidden_case import advantages, token_scales
from benchmarks.contenders.loss import LossCase, LossPeer, loss_peers
from benchmarks.harness import errors
from benchmarks.harness.examine import examined, peak_of, under_pytest
from benchmarks.harness.shapes import lengths
from benchmarks.harness.timing import CUDA, DEVICE, beside_copies, phases, split
from benchmarks.suites.logits import Measure, make_logits
from rlloss import reference

SHAPES = [(16, 512, 151936)] if CUDA else [(8, 16, 32768)]  # (B, T, V)
RHOS = (0.2, 1.0)
BLOCK_ROWS = 64


class LossReference(NamedTuple):
    """In fp64. coefficient `[B * T]`: of each row's log-probability, 0 in dead rows."""

    loss: Tensor
    entropy: Tensor
    coefficient: Tensor


def make_case(shape: tuple[int, int, int], dtype: torch.dtype, rho: float, fill: float) -> LossCase:
    B, T, V = shape
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
    """The case with its cutoff, and what comes out of it."""
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


def check(peer: LossPeer, case: LossCase, expected: LossReference) -> dict[str, float]:
    """The errors of the loss, the mean entropy and the gradient of sampled rows.

    Raises:
        ArithmeticError: an error above what rounding to the dtype explains, or a dead row that is not 0.
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
    return of


def examine(
    peer: LossPeer,
    case: LossCase,
    expected: LossReference,
    *,
    strict: bool = True,
    longest_step: float = math.inf,
) -> dict:
    """{"status"} and, of a peer that is there and right, "errors" and "peak_bytes". See `benchmarks.suites.hidden`."""
    if reason := peer.absent(DEVICE):
        return {"status": reason}
    if peer.case(case).rho != case.rho:
        return {"status": f"keeps every token: at rho {peer.case(case).rho:g} only"}

    def find() -> dict:
        found = {"errors": check(peer, case, expected)}
        peer.prepare(case)
        return found | peak_of(lambda: peer.start(case)(), math.inf if peer.ours else longest_step)

    return examined(find, ours=peer.ours, strict=strict)


def clock(peer: LossPeer, case: LossCase) -> tuple[float, float]:
    peer.prepare(case)
    return phases(functools.partial(peer.start, case))


def compare(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    rho: float,
    fill: float,
    contenders: list[LossPeer],
    rounds: int,
    limit: float = math.inf,
    **how,
) -> dict:
    """Everyone in turns: {"counted", "live", "ideal_bytes", "copy", "zeros" (see `timing.beside_copies`), "peers":
    {name: see `examine`, "forward", "backward", "seconds"}}. limit: seconds that it may take. how: see `examine`."""
    begin = time.monotonic()
    B, T, V = shape
    case, expected = solve(make_case(shape, dtype, rho, fill))
    found = {peer.name: examine(peer, case, expected, **how) | {"seconds": []} for peer in contenders}
    clocks = {p.name: functools.partial(clock, p, case) for p in contenders if found[p.name]["status"] == "measured"}
    samples, floors = beside_copies(case.logits, clocks, rounds, limit - (time.monotonic() - begin))
    for name, values in samples.items():
        found[name] |= split(values)
    return {
        "counted": int(case.mask.sum()),
        "live": int(expected.coefficient.ne(0).sum()),
        "ideal_bytes": Measure("step", fill, rho).ideal_bytes(B * T, V, dtype.itemsize),
        **floors,
        "peers": found,
    }


@pytest.mark.parametrize("peer", loss_peers(compiled=CUDA), ids=lambda p: p.name)
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grpo_loss(benchmark, shape, rho, peer):
    dtype = torch.bfloat16 if CUDA else torch.float32
    case, expected = solve(make_case(shape, dtype, rho, 1.0))
    entry = {"shape": shape, "dtype": str(dtype)[6:], "rho": rho} | examine(peer, case, expected)
    group = f"the whole loss from logits {shape}, {str(dtype)[6:]}, rho {rho}"
    under_pytest(benchmark, group, entry, lambda: peer.start(case)(), setup=lambda: peer.prepare(case))
