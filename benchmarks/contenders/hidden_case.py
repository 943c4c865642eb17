"""Make test cases of hidden states, an lm_head and an on-policy batch, with their reference results in fp64."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss import reference

REFERENCE_ROWS = 4096  # compared rows of the weight's gradient, in addition to those of the targets
BLOCK_V, BLOCK_ROWS = 16384, 256


class Shape(NamedTuple):
    B: int
    T: int
    D: int
    V: int

    def __str__(self) -> str:
        return f"B {self.B}, T {self.T}, D {self.D}, V {self.V}"


@dataclass(frozen=True)
class Case:
    """hidden `[B, T, D]`, weight `[V, D]`, target int64 and mask bool `[B, T]`, advantage `[B]`.

    rho: share of the counted tokens that the loss keeps. cutoff: an entropy between kept tokens and the others. frozen:
    whether the weight gets no gradient.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    mask: Tensor
    advantage: Tensor
    rho: float
    cutoff: float | None = None
    frozen: bool = False

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """New tensors for hidden and weight."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(not self.frozen)

    @property
    def counted(self) -> int:
        return int(self.mask.sum())

    @property
    def live(self) -> int:
        """Number of tokens with a gradient if a quantile keeps them."""
        return kept_count(self.counted, self.rho) if bool(self.advantage.ne(0).all()) else -1

    @property
    def unit(self) -> int:
        """FLOP of the logits of all rows that count."""
        return 2 * self.counted * self.weight.numel()


def kept_count(n: int, rho: float) -> int:
    return int(rho * (n - 1)) + 1


@functools.lru_cache(maxsize=1)
def _weight(V: int, D: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    weight = torch.empty((V, D), dtype=dtype, device=device)
    drawn = torch.Generator(device).manual_seed(1)
    for rows in weight.split(8192):
        rows.copy_(torch.randn(rows.shape, generator=drawn, device=device))
    return weight


def forget_weight() -> None:
    """Free the weight that is cached from case to case."""
    _weight.cache_clear()


def token_scales(mask: Tensor, rho: float, generator: torch.Generator) -> Tensor:
    """Return the standard deviations `[B * T]` of the logits of each row: 2 for the share rho of rows to keep, else 4.

    The entropies of the two sets are far apart. Rounding to bf16 does not change the kept rows, so all contenders work
    on the same rows.
    """
    n = int(mask.sum())
    scale = torch.full((mask.numel(),), 4.0)
    if rho < 1.0:
        kept = mask.flatten().nonzero().squeeze(-1)[torch.randperm(n, generator=generator)[: kept_count(n, rho)]]
        scale[kept] = 2.0
    return scale


def advantages(B: int, generator: torch.Generator) -> Tensor:
    """Draw advantages `[B]`, none of them 0."""
    advantage = torch.randn(B, generator=generator)
    return advantage + 0.1 * advantage.sign()


def make_case(
    shape: Shape, dtype: torch.dtype, rho: float, device: torch.device, lengths: tuple[int, ...] | None = None
) -> Case:
    """Make a case. lengths: lengths of the sequences; None: random lengths that fill 55 % of the columns."""
    B, T, D, V = shape
    g = torch.Generator().manual_seed(0)
    if lengths is None:
        share = torch.rand(B, generator=g) + 0.2
        filled = (share / share.sum() * 0.55 * B * T).round().clamp(1, T).long()
    else:
        filled = torch.tensor(lengths)
    mask = torch.arange(T) < filled.unsqueeze(-1)
    scale = token_scales(mask, rho, g)
    hidden = torch.randn((B * T, D), generator=g) * (scale / D**0.5).unsqueeze(-1)
    advantage = advantages(B, g)
    target = torch.randint(0, V, (B, T), generator=g)
    target, mask, advantage = (x.to(device) for x in (target, mask, advantage))
    return Case(hidden.view(B, T, D).to(device, dtype), _weight(V, D, dtype, device), target, mask, advantage, rho)


class Result(NamedTuple):
    """The result of a step. entropy: mean over the tokens that count, or None. weight: its gradient, or None."""

    loss: Tensor
    entropy: Tensor | None
    hidden: Tensor
    weight: Tensor | None


class Reference(NamedTuple):
    """The result in fp64. result.weight: gradient of the rows `rows` of the weight, which are those of the targets and
    others evenly spaced. live: `[B * T]`. cutoff: halfway between the entropies of kept tokens and the others."""

    result: Result
    rows: Tensor
    live: Tensor
    cutoff: float | None


@torch.no_grad()
def solve(case: Case) -> Reference:
    counted, V = case.mask.flatten().nonzero().squeeze(-1), len(case.weight)
    h, target = case.hidden.flatten(0, 1)[counted].double(), case.target.flatten()[counted]
    logits = h.new_empty((len(h), V))
    for start in range(0, V, BLOCK_V):
        torch.mm(h, case.weight[start : start + BLOCK_V].double().T, out=logits[:, start : start + BLOCK_V])
    parts = torch.arange(len(h), device=h.device).split(BLOCK_ROWS)
    entropy = torch.cat([reference.token_stats(logits[rows], target[rows])[1] for rows in parts])
    kept, cutoff = torch.ones_like(target, dtype=torch.bool), None
    if case.rho < 1.0:
        kept = entropy >= torch.quantile(entropy, 1 - case.rho)
        cutoff = float((entropy[kept].min() + entropy[~kept].max()) / 2)
    advantage = case.advantage.double().repeat_interleave(case.hidden.shape[1])[counted]
    coefficient = torch.where(kept, -advantage, 0.0) / case.counted
    for rows in parts:
        d = -torch.softmax(logits[rows], -1)
        d[torch.arange(len(rows), device=d.device), target[rows]] += 1
        logits[rows] = d * coefficient[rows].unsqueeze(-1)
    spaced = torch.linspace(0, V - 1, min(V, REFERENCE_ROWS), device=h.device).long()
    weight_rows = torch.cat([spaced, target]).unique()
    d_hidden = torch.zeros_like(h)
    for start in range(0, V, BLOCK_V):
        d_hidden += logits[:, start : start + BLOCK_V] @ case.weight[start : start + BLOCK_V].double()
    hidden = h.new_zeros(case.hidden.shape)
    hidden.flatten(0, 1)[counted] = d_hidden
    live = torch.zeros_like(case.mask).flatten().index_copy_(0, counted, kept)
    result = Result(coefficient.sum(), entropy.mean(), hidden, logits[:, weight_rows].T @ h)
    return Reference(result, weight_rows, live, cutoff)
