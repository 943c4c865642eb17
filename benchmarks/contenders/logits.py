"""Define the contenders that turn logits into log-probabilities, entropies and the gradient of the logits.

All have the same two functions of a `Case`. `forward` returns (logp, entropy) without autograd. `start` runs the
forward with gradient and returns the backward, which maps a gradient of logp to the gradient of the logits. Entropy has
no gradient. If a peer computes less or more, its note says so.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.peer import Peer
from rlloss.logits.statistics import token_stats

Forward = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    padded: logits `[1, N + 1, V]`. The last row belongs to no token; Liger's layout needs it. target: `[N]` int64.
    mask: `[N]` bool or None. grad: `[N]` fp32, the gradient of logp, 0 in dead and masked rows.
    """

    padded: Tensor
    target: Tensor
    mask: Tensor | None
    grad: Tensor

    @property
    def logits(self) -> Tensor:
        """Logits `[N, V]`, contiguous."""
        return self.padded[0, :-1]


def _peer(name: str, note: str, function: Forward, **where) -> Peer:
    """Make a peer from a differentiable function (logits, target, mask) -> (logp, entropy)."""

    @torch.no_grad()
    def forward(case: Case) -> tuple[Tensor, Tensor | None]:
        return function(case.logits, case.target, case.mask)

    def start(case: Case) -> Callable[[], Tensor]:
        leaf = case.logits.detach().requires_grad_()
        logp, _ = function(leaf, case.target, case.mask)
        return functools.partial(_backward, logp, case.grad, leaf)

    return Peer(name, note, start, forward, **where)


def _backward(output: Tensor, grad: Tensor, leaf: Tensor) -> Tensor:
    output.backward(grad.to(output.dtype))
    assert leaf.grad is not None
    return leaf.grad


def _rlloss(logits: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    stats = token_stats(logits, target, mask=mask, outputs=("logp", "entropy"))
    assert stats.logp is not None
    return stats.logp, stats.entropy


def eager(logits: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute log_softmax in fp32, a gather, and the entropy of the same log-probabilities."""
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    logp = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    if mask is not None:
        logp, entropy = torch.where(mask, logp, 0.0), torch.where(mask, entropy, 0.0)
    return logp, entropy


@functools.cache
def compiled_eager() -> Forward:
    """Return `eager` under torch.compile, the same object for all callers. It is recompiled for each dtype, shape, mask
    and mode. Above torch's recompile limit it would silently run eagerly."""
    torch._dynamo.config.recompile_limit = 256  # type: ignore[attr-defined]
    torch._dynamo.config.accumulated_recompile_limit = 1024  # type: ignore[attr-defined]
    return torch.compile(eager, dynamic=False)


def trl_torch(logits: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    utils = importlib.import_module("trl.trainer.utils")
    return utils.selective_log_softmax_and_entropy(logits, target, entropy_requires_grad=False, row_mask=mask)


def trl_kernel(logits: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return importlib.import_module("trl.kernels").selective_log_softmax_and_entropy(logits, target, row_mask=mask)


def _liger_mask(case: Case) -> Tensor | None:
    return None if case.mask is None else case.mask.int().unsqueeze(0)


def _liger_forward(case: Case) -> tuple[Tensor, None]:
    ops = importlib.import_module("liger_kernel.ops.grpo_loss")
    # Liger reads [1, N + 1, V] and leaves out the last position.
    logp = ops.fused_selective_log_softmax(case.padded, case.target.unsqueeze(0), 1.0, _liger_mask(case))
    return logp.squeeze(0), None


def _liger_start(case: Case) -> Callable[[], Tensor]:
    ops = importlib.import_module("liger_kernel.transformers.grpo_loss")
    leaf = case.padded.detach().requires_grad_()
    # Without old log-probabilities the ratio is 1, and at advantage -1 each token's loss has gradient 1 in logp.
    advantage = torch.full((1,), -1.0, device=leaf.device)
    loss, *_ = ops.triton_grpo_loss(
        leaf, None, None, case.target.unsqueeze(0), advantage, _liger_mask(case), temperature=1.0, beta=0.0,
        inplace=False, loss_type="grpo", reduce=False,
    )  # fmt: skip
    return lambda: _backward(loss, case.grad.unsqueeze(0), leaf)[0, :-1]


def peers(*, compiled: bool) -> list[Peer]:
    """Return the contenders, rlloss first. compiled: whether torch.compile takes part (compilation is slow)."""
    found = [
        _peer("rlloss", "`token_stats`: logp and entropy", _rlloss),
        _peer("torch eager", "`log_softmax` in fp32, gather, entropy", eager),
    ]
    if compiled:
        found.append(_peer("torch.compile", "`torch.compile(dynamic=False)` of torch eager", compiled_eager()))
    torch_note = (
        "`trl.trainer.utils.selective_log_softmax_and_entropy`, TRL without a GPU; its results have the logits' dtype"
    )
    kernel_note = "`trl.kernels.selective_log_softmax_and_entropy`"
    liger_note = (
        "forward without gradient: `fused_selective_log_softmax`, no entropy; otherwise `triton_grpo_loss` at ratio 1, "
        "not in place, which computes the GRPO loss besides"
    )
    return found + [
        _peer("TRL torch", torch_note, trl_torch, module="trl", on="cpu"),
        _peer("TRL kernel", kernel_note, trl_kernel, module="trl", on="gpu"),
        Peer("Liger kernels", liger_note, _liger_start, _liger_forward, module="liger_kernel", on="gpu"),
    ]
