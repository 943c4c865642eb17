"""Who is timed from hidden states to the gradient of the loss: rlloss's plans and everyone else.

All do the same work on a `Case`: log-probabilities and entropies, the "dapo" loss of an on-policy batch with the tokens
of highest entropy alone, the gradients of hidden and weight. What a peer does not do stands in its note.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlloss import LinearGRPOLoss, LossConfig, count_products, explain_plan, lm_head, reference
from rlloss.products import operands_in

CLIP = (0.2, 0.28)
ENTROPY_ROWS = 128  # of the naive peer's entropies at a time


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

    rho: share of the tokens that count that the loss keeps. cutoff: an entropy that separates them from the others.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    mask: Tensor
    advantage: Tensor
    rho: float
    cutoff: float | None = None

    @property
    def counted(self) -> int:
        return int(self.mask.sum())

    @property
    def live(self) -> int:
        """Tokens with a gradient, as a quantile keeps them."""
        return _kept_count(self.counted, self.rho) if bool(self.advantage.ne(0).all()) else -1

    @property
    def unit(self) -> int:
        """FLOP of the logits of every row that counts."""
        return 2 * self.counted * self.weight.numel()


def _kept_count(n: int, rho: float) -> int:
    return int(rho * (n - 1)) + 1


def make_case(shape: Shape, dtype: torch.dtype, rho: float, device: torch.device, fill: float = 0.55) -> Case:
    """Random lengths that fill the share `fill` of the columns. No advantage is 0.

    The rows that rho keeps have logits of standard deviation 2 and the others of 4, so that their entropies lie apart,
    and rounding to bf16 does not change which are kept: everyone has the same rows to work on.
    """
    B, T, D, V = shape
    g = torch.Generator().manual_seed(0)
    share = torch.rand(B, generator=g) + 0.2
    lengths = (share / share.sum() * fill * B * T).round().clamp(1, T).long()
    mask = torch.arange(T) < lengths.unsqueeze(-1)
    n = int(mask.sum())
    scale = torch.full((B * T,), 4.0)
    if rho < 1.0:
        kept = mask.flatten().nonzero().squeeze(-1)[torch.randperm(n, generator=g)[: _kept_count(n, rho)]]
        scale[kept] = 2.0
    hidden = torch.randn((B * T, D), generator=g) * (scale / D**0.5).unsqueeze(-1)
    weight = torch.empty((V, D), dtype=dtype, device=device)
    drawn = torch.Generator(device).manual_seed(1)
    for rows in weight.split(8192):
        rows.copy_(torch.randn(rows.shape, generator=drawn, device=device))
    advantage = torch.randn(B, generator=g)
    advantage = advantage + 0.1 * advantage.sign()
    target = torch.randint(0, V, (B, T), generator=g)
    return Case(
        hidden.view(B, T, D).to(device, dtype), weight, target.to(device), mask.to(device), advantage.to(device), rho
    )


class Result(NamedTuple):
    """entropy: the mean over the tokens that count, or None."""

    loss: Tensor
    entropy: Tensor | None
    hidden: Tensor
    weight: Tensor


class Reference(NamedTuple):
    """In fp64; entropies [B, T] are 0 where nothing counts. cutoff: halfway between tokens kept and not."""

    result: Result
    live: Tensor
    cutoff: float | None


@torch.no_grad()
def solve(case: Case) -> Reference:
    """fp64, 256 rows at a time."""
    h, W = case.hidden.flatten(0, 1).double(), case.weight.double()
    target, counted = case.target.flatten(), case.mask.flatten().nonzero().squeeze(-1)
    logp, entropy = torch.zeros_like(h[:, 0]), torch.zeros_like(h[:, 0])
    for rows in counted.split(256):
        logp[rows], entropy[rows], _ = reference.token_stats(h[rows] @ W.T, target[rows])
    live, cutoff = case.mask.flatten(), None
    if case.rho < 1.0:
        quantile = torch.quantile(entropy[counted], 1 - case.rho)
        live = live & (entropy >= quantile)
        below = entropy[counted][~live[counted]]
        cutoff = float((entropy[live].min() + below.max()) / 2)
    coefficient = (
        torch.where(live, -case.advantage.double().repeat_interleave(case.hidden.shape[1]), 0.0) / case.counted
    )
    d_hidden, d_weight = torch.zeros_like(h), torch.zeros_like(W)
    for rows in live.nonzero().squeeze(-1).split(256):
        d = -torch.softmax(h[rows] @ W.T, -1)
        d[torch.arange(len(rows), device=d.device), target[rows]] += 1
        d *= coefficient[rows].unsqueeze(-1)
        d_hidden[rows] = d @ W
        d_weight += d.T @ h[rows]
    result = Result(coefficient.sum(), entropy.sum() / case.counted, d_hidden.view(case.hidden.shape), d_weight)
    return Reference(result, live, cutoff)


Function = Callable[[Tensor, Tensor, Case], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Peer:
    """function: (hidden, weight, case) -> (loss, mean entropy or None).

    ignores_rho: it keeps every token whatever rho is, and is checked and timed so. config: of rlloss's plans.
    """

    name: str
    note: str
    function: Function
    module: str = "torch"
    ignores_rho: bool = False
    plan: str | None = None

    def absent(self) -> str | None:
        return None if importlib.util.find_spec(self.module) else f"{self.module} is not installed"

    def case(self, case: Case) -> Case:
        return replace(case, rho=1.0) if self.ignores_rho else case

    def step(self, case: Case) -> Result:
        """Fresh leaves and fresh gradients."""
        hidden, weight = (x.detach().requires_grad_() for x in (case.hidden, case.weight))
        loss, entropy = self.function(hidden, weight, case)
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        return Result(loss.detach(), entropy, hidden.grad, weight.grad)


def _options(plan: str, case: Case) -> tuple[LossConfig, float | None]:
    cutoff = case.cutoff if plan == "gradient_in_forward" and case.rho < 1.0 else None
    return LossConfig(epsilon_low=CLIP[0], epsilon_high=CLIP[1], top_entropy_quantile=case.rho), cutoff


def _rlloss(plan: str, hidden: Tensor, weight: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    config, cutoff = _options(plan, case)
    loss = LinearGRPOLoss(config, plan=plan)
    found = loss(hidden, weight, case.target, case.advantage, mask=case.mask, cutoff=cutoff)
    return found.loss, found.metrics["entropy"] / found.metrics["tokens"]


def explained(plan: str, case: Case) -> str:
    config, cutoff = _options(plan, case)
    hidden, weight = (x.detach().requires_grad_() for x in (case.hidden, case.weight))
    return str(
        explain_plan(
            hidden, weight, mask=case.mask, advantage=case.advantage, config=config, cutoff=cutoff, plan=plan
        )
    )  # fmt: skip


def loss_in_torch(logp: Tensor, entropy: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """The same loss a token at a time: logp with gradient and entropy without, `[B, T]` -> (loss, mean entropy)."""
    mask, tokens = case.mask, case.mask.sum()
    advantage = case.advantage.unsqueeze(-1)
    ratio = torch.exp(logp - logp.detach())
    clipped = torch.clamp(ratio, 1 - CLIP[0], 1 + CLIP[1])
    per_token = -torch.minimum(ratio * advantage, clipped * advantage)
    if case.rho < 1.0:
        cutoff = torch.quantile(entropy[mask].float(), 1 - case.rho)
        per_token = per_token * (entropy >= cutoff)
    return (per_token * mask).sum() / tokens, (entropy * mask).sum() / tokens


def _naive(hidden: Tensor, weight: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(hidden @ weight.T, -1, dtype=torch.float32)
    logp = log_p.gather(-1, case.target.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        rows = log_p.flatten(0, 1).split(ENTROPY_ROWS)
        entropy = torch.cat([-(x.exp() * x).sum(-1) for x in rows]).view(logp.shape)
    return loss_in_torch(logp, entropy, case)


def _trl(hidden: Tensor, weight: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    # As its trainer's fused head calls it: on a GPU with the rows that count, elsewhere with all of them.
    kernels = importlib.import_module("trl.kernels.chunked_logprob")
    chunk = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    compact, mask = kernels._use_triton(hidden.device), case.mask
    rows = hidden[mask] if compact else hidden.reshape(-1, hidden.shape[-1])
    target = case.target[mask] if compact else case.target.reshape(-1)
    outputs = ("log_probs", "entropy")
    found = kernels.ChunkedLogProbFunction.apply(rows, weight, None, target, 1.0, chunk, None, 1.0, outputs)
    if compact:
        logp, entropy = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found[:2])
    else:
        logp, entropy = (x.view(mask.shape).masked_fill(~mask, 0) for x in found[:2])
    return loss_in_torch(logp, entropy.detach(), case)


def _liger(hidden: Tensor, weight: Tensor, case: Case) -> tuple[Tensor, None]:
    losses = importlib.import_module("liger_kernel.chunked_loss.grpo_loss")
    loss = losses.LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, compiled=hidden.is_cuda, epsilon_low=CLIP[0], epsilon_high=CLIP[1]
    )
    return loss(hidden, weight, case.target, case.mask.to(torch.int64), case.advantage)[0], None


def peers() -> list[Peer]:
    """rlloss's plans first, then the others."""
    notes = {
        "auto": "`LinearGRPOLoss`",
        "recompute": "logits again for the rows with a gradient",
        "keep": "logits of the rows that count kept",
        "gradient_in_forward": "gradients made in the forward; below rho 1 with a cutoff that is given",
    }
    found = [
        Peer("rlloss" if plan == "auto" else f"rlloss {plan}", note, functools.partial(_rlloss, plan), plan=plan)
        for plan, note in notes.items()
    ]
    trl = "`ChunkedLogProbFunction` as TRL's GRPOTrainer calls it, and TRL's loss in torch; without a GPU on all rows"
    naive = f"logits of all rows, `log_softmax` in fp32, entropies of {ENTROPY_ROWS} rows at a time without gradient"
    liger = "`LigerFusedLinearGRPOLoss`: no entropies and no selection by them, so that every row is live"
    return found + [
        Peer("TRL", trl, _trl, module="trl"),
        Peer("naive", naive, _naive),
        Peer("Liger", liger, _liger, module="liger_kernel", ignores_rho=True),
    ]


class _Flop(TorchDispatchMode):
    """FLOP of every matrix product of two matrices, wherever it is called."""

    flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def products(peer: Peer, case: Case) -> float:
    """Matrix products that a step runs, in logits of all rows that count."""
    if peer.plan is not None:
        with count_products() as counted:
            peer.step(case)
        return counted.units
    with _Flop() as counted:
        peer.step(case)
    return counted.flop / case.unit


def bare_products(case: Case, *, again: bool, tiled: bool, fresh: bool = False) -> Callable[[], object]:
    """The products of a step and nothing else: 1 + 3r units, or 1 + 2r where the logits are not made `again`.

    tiled: a block of the vocabulary at a time, as rlloss does; otherwise each of them as one product. The operands
    are compact and in the dtype that rlloss multiplies in, before the clock starts; so are the results' places, but
    for the weight's gradient where it is to be `fresh`, as that of every backward is.
    """
    counted = case.mask.flatten().nonzero().squeeze(-1)
    hidden = case.hidden.flatten(0, 1)[counted]
    W, n, L = case.weight, len(counted), case.live
    V, D = W.shape
    wide = torch.float32
    if not hidden.is_cuda:
        hidden, W = hidden.to(wide), W.to(wide)
    options: dict[str, Any] = {"out_dtype": wide} if hidden.dtype != wide else {}
    live = hidden[:L]
    rows, width = lm_head.tile_shape(n, V, hidden.device, False) if tiled else (n, V)
    logits = torch.zeros((min(rows, n), width), dtype=wide, device=hidden.device)
    gradient = logits[:L] if logits.dtype == hidden.dtype else torch.randn_like(logits, dtype=hidden.dtype)[:L]
    d_hidden = torch.empty((L, D), dtype=wide, device=hidden.device)
    place = torch.empty((V, D), dtype=wide, device=hidden.device)

    def run() -> None:
        with operands_in(case.weight.dtype, hidden):
            run_products(lm_head.fresh_gradient(place) if fresh else place)

    def run_products(d_weight: Tensor) -> None:
        for start in range(0, V, width):
            w = W[start : start + width]
            for x in hidden.split(rows):
                torch.mm(x, w.T, out=logits[: len(x), : len(w)], **options)
        for start in range(0, V, width):
            w = W[start : start + width]
            for i, x in enumerate(live.split(rows)):
                g, d = gradient[: len(x), : len(w)], d_hidden[i * rows : i * rows + len(x)]
                if again:
                    torch.mm(x, w.T, out=logits[: len(x), : len(w)], **options)
                if start:
                    torch.addmm(d, g, w, out=d, **options)
                else:
                    torch.mm(g, w, out=d, **options)
                total = d_weight[start : start + len(w)]
                if i:
                    torch.addmm(total, g.T, x, out=total, **options)
                else:
                    torch.mm(g.T, x, out=total, **options)

    return run
