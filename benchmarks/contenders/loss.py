"""Define the contenders that are timed from logits to the gradient of the whole loss: rlloss's variants and its peers.

All do the same work on a `LossCase`: log-probabilities and entropies, the "dapo" loss of an on-policy batch on the
tokens of highest entropy only, and the gradient of the logits. If a peer omits a part, its note says so.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders.hidden import CLIP, loss_in_torch
from benchmarks.contenders.logits import Forward, compiled_eager, eager, trl_kernel, trl_torch
from benchmarks.harness.peer import Peer
from rlloss import GRPOLoss, LossConfig


@dataclass(frozen=True)
class LossCase:
    """logits `[B, T, V]`, contiguous; target int64 and mask bool `[B, T]`, advantage `[B]`.

    rho: share of the counted tokens that the loss keeps. cutoff: an entropy between kept tokens and the others.
    """

    logits: Tensor
    target: Tensor
    mask: Tensor
    advantage: Tensor
    rho: float
    cutoff: float | None = None

    @functools.cached_property
    def padded(self) -> Tensor:
        """Logits `[B, T + 1, V]` in Liger's layout: the last row of each sequence belongs to no token."""
        B, T, V = self.logits.shape
        padded = self.logits.new_zeros((B, T + 1, V))
        padded[:, :-1] = self.logits
        return padded

    @functools.cached_property
    def scratch(self) -> dict[str, Tensor]:
        """Contender -> logits that it may overwrite by its gradient."""
        return {}


class LossResult(NamedTuple):
    """entropy: mean over the tokens that count, or None. gradient: `[B, T, V]`."""

    loss: Tensor
    entropy: Tensor | None
    gradient: Tensor


Function = Callable[[Tensor, LossCase], tuple[Tensor, Tensor | None]]


class _Computed(torch.autograd.Function):
    """Makes a tensor the output of an operation, so that a gradient may overwrite it. Its gradient goes to `sink`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, memory: Tensor, sink: list[Tensor]) -> Tensor:
        ctx.sink = sink
        return memory.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.sink.append(grads[0])
        return None, None, None


def _peer(name: str, note: str, function: Function, *, padded: bool = False, inplace: bool = False, **where) -> Peer:
    """Make a peer from a function of the logits. padded: it takes Liger's layout. inplace: its gradient overwrites the
    logits, which are restored off the clock."""

    def prepare(case: LossCase) -> None:
        logits = case.padded if padded else case.logits
        case.scratch.setdefault(name, torch.empty_like(logits)).copy_(logits)

    def start(case: LossCase) -> Callable[[], LossResult]:
        sink: list[Tensor] = []
        if inplace:
            anchor = torch.zeros((), device=case.logits.device, requires_grad=True)
            logits: Tensor = _Computed.apply(anchor, case.scratch[name], sink)  # type: ignore[assignment]
        else:
            logits = (case.padded if padded else case.logits).detach().requires_grad_()
        loss, entropy = function(logits, case)

        def backward() -> LossResult:
            loss.backward()
            gradient = sink[0] if inplace else logits.grad
            assert gradient is not None
            return LossResult(loss.detach(), entropy, gradient[:, :-1] if padded else gradient)

        return backward

    return Peer(name, note, start, prepare=prepare if inplace else None, **where)


def _rlloss(options: dict[str, Any], logits: Tensor, case: LossCase) -> tuple[Tensor, Tensor]:
    config = LossConfig(epsilon_low=CLIP[0], epsilon_high=CLIP[1], top_entropy_quantile=case.rho)
    cutoff = case.cutoff if options.get("single_launch") and case.rho < 1.0 else None
    found = GRPOLoss(config, **options)(logits, case.target, case.advantage, mask=case.mask, cutoff=cutoff)
    return found.loss, found.metrics["entropy"] / found.metrics["tokens"]


def _formula(stats: Callable[[], Forward], logits: Tensor, case: LossCase) -> tuple[Tensor, Tensor | None]:
    mask = case.mask
    logp, entropy = stats()(logits.flatten(0, 1), case.target.flatten(), mask.flatten())
    entropy = None if entropy is None else entropy.detach().view(mask.shape)
    return loss_in_torch(logp.view(mask.shape), entropy, mask, case.advantage, case.rho)


def _liger(inplace: bool, logits: Tensor, case: LossCase) -> tuple[Tensor, None]:
    grpo_loss = importlib.import_module("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    loss, _ = grpo_loss(
        logits, None, None, case.target, case.advantage, case.mask.int(), temperature=1.0, beta=0.0, eps_low=CLIP[0],
        eps_high=CLIP[1], inplace=inplace, loss_type="dapo", reduce=True,
    )  # fmt: skip
    return loss, None


def peers(*, compiled: bool) -> list[Peer]:
    """Return the contenders, rlloss first. compiled: whether torch.compile takes part."""

    def ours(name: str, note: str, on: str | None = None, *, inplace: bool = False, **options: bool) -> Peer:
        return _peer(name, note, functools.partial(_rlloss, options), inplace=inplace, on=on)

    def formula(name: str, note: str, stats: Callable[[], Forward], **where) -> Peer:
        return _peer(name, f"{note}, and TRL's loss in torch", functools.partial(_formula, stats), **where)

    single = "`single_launch=True`: the gradient in the forward's launch; below rho 1 with a cutoff that is given"
    found = [
        ours("rlloss", "`GRPOLoss`"),
        ours("rlloss two launches", "`single_launch=False`", "triton", single_launch=False),
        ours("rlloss single launch", single, "triton", single_launch=True),
        ours("rlloss in place", "`inplace_grad=True`", inplace=True, inplace_grad=True),
        formula("torch eager", "`log_softmax` in fp32, gather, entropy", lambda: eager),
    ]
    if compiled:
        found.append(formula("torch.compile", "`torch.compile(dynamic=False)` of torch eager", compiled_eager))
    function = "`selective_log_softmax_and_entropy` of trl"
    liger = "`triton_grpo_loss`: no entropies and no selection by them, so that every row is live"
    where: dict[str, Any] = {"module": "liger_kernel", "on": "gpu", "padded": True, "ignores_rho": True}
    return found + [
        formula("TRL torch", f"{function}.trainer.utils", lambda: trl_torch, module="trl", on="cpu"),
        formula("TRL kernel", f"{function}.kernels", lambda: trl_kernel, module="trl", on="gpu"),
        _peer("Liger", liger, functools.partial(_liger, False), **where),
        _peer("Liger in place", "the same with its default `inplace=True`", functools.partial(_liger, True),
              inplace=True, **where),
    ]  # fmt: skip
