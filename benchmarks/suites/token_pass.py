"""Time of the token pass, `rlloss.policy_loss` from log-probabilities `[B, T]`, against the same formula in torch.

On a GPU the host is ahead when the clock starts, so that what is timed is what the GPU does.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from benchmarks.contenders.hidden import CLIP, loss_in_torch
from benchmarks.contenders.hidden_case import advantages
from benchmarks.harness import errors
from benchmarks.harness.examine import under_pytest
from benchmarks.harness.timing import DEVICE, in_turns, phases, split
from rlloss import LossConfig, policy_loss

SHAPE = (16, 1024)
HEAD_START_CYCLES = 10_000_000  # some milliseconds: a GPU does this faster than the host can ask for it
RHOS = (0.2, 1.0)


@dataclass(frozen=True)
class TokenCase:
    """logp, old_logp and entropy fp32 and mask bool `[B, T]`, advantage `[B]`; every column counts."""

    logp: Tensor
    old_logp: Tensor
    entropy: Tensor
    mask: Tensor
    advantage: Tensor
    rho: float


Function = Callable[[Tensor, TokenCase], Tensor]


def make_case(shape: tuple[int, int], rho: float) -> TokenCase:
    """Log-ratios of standard deviation 0.2, so that some tokens are clipped."""
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
    return policy_loss(
        logp, case.advantage, case.mask, config=config, old_logp=case.old_logp, entropy=case.entropy
    ).loss  # fmt: skip


def _formula(logp: Tensor, case: TokenCase) -> Tensor:
    return loss_in_torch(logp, case.entropy, case.mask, case.advantage, case.rho, case.old_logp)[0]


CONTENDERS: dict[str, tuple[str, Function]] = {
    "rlloss": ("`policy_loss`, with its metrics", _rlloss),
    "torch eager": ("TRL's formula, without metrics", _formula),
}


def start(function: Function, case: TokenCase) -> Callable[[], tuple[Tensor, Tensor]]:
    logp = case.logp.detach().requires_grad_()
    loss = function(logp, case)

    def backward() -> tuple[Tensor, Tensor]:
        loss.backward()
        assert logp.grad is not None
        return loss.detach(), logp.grad

    return backward


def check(name: str, case: TokenCase) -> dict[str, float]:
    """The errors of loss and gradient against the formula in fp64.

    Raises:
        ArithmeticError: one above 1e-5.
    """
    wide = replace(case, logp=case.logp.double(), old_logp=case.old_logp.double())
    (loss, grad), (found, d) = start(_formula, wide)(), start(CONTENDERS[name][1], case)()
    of = {"loss": errors.worst(found, loss), "gradient": errors.relative(d, grad)}
    errors.require(name, of, dict.fromkeys(of, 1e-5))
    return of


def compare(shape: tuple[int, int], rho: float, rounds: int, limit: float = math.inf) -> dict:
    """{"peers": {name: {"status", "errors", "forward", "backward", "seconds"}}}, in turns."""
    case = make_case(shape, rho)
    found: dict[str, dict] = {}
    for name in CONTENDERS:
        found[name] = {"status": "measured", "errors": check(name, case)}
    clocks = {
        name: functools.partial(phases, functools.partial(start, function, case), HEAD_START_CYCLES)
        for name, (_, function) in CONTENDERS.items()
    }
    for name, values in in_turns(clocks, rounds, limit).items():
        found[name] |= split(values)
    return {"peers": found}


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("rho", RHOS)
def test_token_pass(benchmark, rho, name):
    case = make_case(SHAPE, rho)
    entry = {"status": "measured", "shape": SHAPE, "dtype": "float32", "rho": rho, "errors": check(name, case)}
    group, function = f"the token pass {SHAPE}, rho {rho}", CONTENDERS[name][1]
    under_pytest(benchmark, group, entry, lambda: start(function, case)(), rounds=100, warmup_rounds=3)
