"""Define the contenders that are timed from hidden states to the gradient of the loss: rlloss's plans and its peers.

All do the same work on a `Case`: log-probabilities and entropies, the "dapo" loss of an on-policy batch on the tokens
of highest entropy only, and the gradients of hidden and weight. If a peer omits a part, its note says so.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contenders.hidden_case import Case, Result
from benchmarks.contenders.limits import Flop
from benchmarks.harness.peer import Peer
from rlloss import LinearGRPOLoss, LossConfig, count_products, explain_plan
from rlloss.lm_head.plans import PlanReport

CLIP = (0.2, 0.28)
ENTROPY_ROWS = 128  # rows per block in the naive peer's entropies
SM90 = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"


Function = Callable[[Tensor, Tensor, Case], tuple[Tensor, Tensor | None]]


def _peer(name: str, note: str, function: Function, **where) -> Peer:
    """Make a peer from a function (hidden, weight, case) -> (loss, mean entropy or None)."""

    def start(case: Case) -> Callable[[], Result]:
        hidden, weight = case.leaves
        loss, entropy = function(hidden, weight, case)

        def backward() -> Result:
            loss.backward()
            assert hidden.grad is not None and (weight.grad is None) == case.frozen
            return Result(loss.detach(), entropy, hidden.grad, weight.grad)

        return backward

    return Peer(name, note, start, **where)


def _options(plan: str, case: Case) -> tuple[LossConfig, float | None]:
    cutoff = case.cutoff if plan == "gradient_in_forward" and case.rho < 1.0 else None
    return LossConfig(epsilon_low=CLIP[0], epsilon_high=CLIP[1], top_entropy_quantile=case.rho), cutoff


def _rlloss(plan: str, hidden: Tensor, weight: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    config, cutoff = _options(plan, case)
    loss = LinearGRPOLoss(config, plan=plan)
    found = loss(hidden, weight, case.target, case.advantage, mask=case.mask, cutoff=cutoff)
    return found.loss, found.metrics["entropy"] / found.metrics["tokens"]


def explained(plan: str, case: Case) -> PlanReport:
    config, cutoff = _options(plan, case)
    return explain_plan(
        *case.leaves, mask=case.mask, advantage=case.advantage, config=config, cutoff=cutoff, plan=plan
    )  # fmt: skip


def loss_in_torch(
    logp: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    advantage: Tensor,
    rho: float,
    old_logp: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the loss in torch from `[B, T]`, logp with gradient and entropy without. Return (loss, mean entropy)."""
    tokens, advantage = mask.sum(), advantage.unsqueeze(-1)
    ratio = torch.exp(logp - (logp.detach() if old_logp is None else old_logp))
    clipped = torch.clamp(ratio, 1 - CLIP[0], 1 + CLIP[1])
    per_token = -torch.minimum(ratio * advantage, clipped * advantage)
    if rho < 1.0:
        assert entropy is not None
        cutoff = torch.quantile(entropy[mask].float(), 1 - rho)
        per_token = per_token * (entropy >= cutoff)
    return (per_token * mask).sum() / tokens, None if entropy is None else (entropy * mask).sum() / tokens


def _loss(logp: Tensor, entropy: Tensor | None, case: Case) -> tuple[Tensor, Tensor | None]:
    return loss_in_torch(logp, entropy, case.mask, case.advantage, case.rho)


def _naive(hidden: Tensor, weight: Tensor, case: Case) -> tuple[Tensor, Tensor | None]:
    log_p = torch.log_softmax(hidden @ weight.T, -1, dtype=torch.float32)
    logp = log_p.gather(-1, case.target.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        rows = log_p.flatten(0, 1).split(ENTROPY_ROWS)
        entropy = torch.cat([-(x.exp() * x).sum(-1) for x in rows]).view(logp.shape)
    return _loss(logp, entropy, case)


def _stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(hidden @ weight.T, -1, dtype=torch.float32)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1), entropy


@functools.cache
def _compiled_stats() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_stats, dynamic=False)


def _compiled(hidden: Tensor, weight: Tensor, case: Case) -> tuple[Tensor, Tensor | None]:
    return _loss(*_compiled_stats()(hidden, weight, case.target), case)


def _scattered(mask: Tensor, *rows: Tensor) -> list[Tensor]:
    """Scatter rows `[n]` of the tokens that count into `[B, T]`, with 0 elsewhere."""
    return [x.new_zeros(mask.shape).masked_scatter(mask, x) for x in rows]


def trl_compacts(device: torch.device) -> bool:
    """Whether TRL runs only the rows that count. It does on a GPU."""
    return importlib.import_module("trl.kernels.chunked_logprob")._use_triton(device)


def _trl(hidden: Tensor, weight: Tensor, case: Case) -> tuple[Tensor, Tensor | None]:
    # The same call as in the fused head of TRL's trainer.
    kernels = importlib.import_module("trl.kernels.chunked_logprob")
    chunk = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    compact, mask = trl_compacts(hidden.device), case.mask
    rows = hidden[mask] if compact else hidden.reshape(-1, hidden.shape[-1])
    target = case.target[mask] if compact else case.target.reshape(-1)
    outputs = ("log_probs", "entropy")
    found = kernels.ChunkedLogProbFunction.apply(rows, weight, None, target, 1.0, chunk, None, 1.0, outputs)
    if compact:
        logp, entropy = _scattered(mask, *found[:2])
    else:
        logp, entropy = (x.view(mask.shape).masked_fill(~mask, 0) for x in found[:2])
    return _loss(logp, entropy.detach(), case)


def _liger(hidden: Tensor, weight: Tensor, case: Case) -> tuple[Tensor, None]:
    losses = importlib.import_module("liger_kernel.chunked_loss.grpo_loss")
    loss = losses.LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, compiled=hidden.is_cuda, epsilon_low=CLIP[0], epsilon_high=CLIP[1]
    )
    return loss(hidden, weight, case.target, case.mask.to(torch.int64), case.advantage)[0], None


def _flsce(hidden: Tensor, weight: Tensor, case: Case) -> tuple[Tensor, Tensor | None]:
    function = importlib.import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    mask = case.mask
    # Temperature, ignored index, tiles of a cluster (not read), and whether to return the entropy.
    nll, entropy = function.apply(hidden[mask], weight, case.target[mask], 1.0, -100, 1, True)
    logp, entropy = _scattered(mask, -nll, entropy.detach().float())
    return _loss(logp, entropy, case)


def _cce(hidden: Tensor, weight: Tensor, case: Case) -> tuple[Tensor, Tensor | None]:
    cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    target = case.target.masked_fill(~case.mask, -100)
    nll = cross_entropy(hidden, weight, target, ignore_index=-100, reduction="none", impl="cce")
    return _loss(-nll.float(), None, case)


def _sm90() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def plan_of(name: str) -> str | None:
    """Return the plan if the contender is rlloss."""
    return name.removeprefix("rlloss").strip() or "auto" if name.startswith("rlloss") else None


def peers(*, compiled: bool = False, frozen: bool = False) -> list[Peer]:
    """Return the contenders, rlloss's plans first. compiled: whether torch.compile takes part. frozen: whether the head
    gets no gradient."""
    plans = {
        "rlloss": "`LinearGRPOLoss`",
        "rlloss recompute": "logits again for the rows with a gradient",
        "rlloss keep": "logits of the rows that count kept",
        "rlloss gradient_in_forward": "gradients made in the forward; below rho 1 with a cutoff that is given",
    }
    if frozen:
        plans["rlloss jacobian"] = "derivative of each log-probability made in the forward; for a frozen head"
    found = [_peer(name, note, functools.partial(_rlloss, plan_of(name) or "auto")) for name, note in plans.items()]
    trl = "`ChunkedLogProbFunction` as TRL's GRPOTrainer calls it, and TRL's loss in torch; without a GPU on all rows"
    naive = f"logits of all rows, `log_softmax` in fp32, entropies of {ENTROPY_ROWS} rows at a time without gradient"
    compiled_note = "`torch.compile(dynamic=False)` of plain logits, log-probability and entropy, and naive's loss"
    liger = "`LigerFusedLinearGRPOLoss`: no entropies and no selection by them, so that every row is live"
    flsce = (
        "`LigerFusedLinearScaledCrossEntropyFunction` of the rows that count, and TRL's loss in torch; its CuTe kernel "
        "is for sm_90 in bf16, elsewhere it runs tiles of 512 rows in torch"
    )
    cce = "`linear_cross_entropy`, its default filter of small gradients on: no entropies and no selection by them"
    # TRL's trainers need datasets, which may be missing although TRL is installed.
    found += [_peer("TRL", trl, _trl, module="trl.trainer.utils"), _peer("naive", naive, _naive)]
    if compiled:
        found.append(_peer("torch.compile", compiled_note, _compiled))
    return found + [
        _peer("Liger", liger, _liger, module="liger_kernel", ignores_rho=True),
        _peer("Liger FLSCE", flsce, _flsce, module=SM90 if _sm90() else "liger_kernel"),
        _peer("cut-cross-entropy", cce, _cce, module="cut_cross_entropy", on="gpu", ignores_rho=True),
    ]


def products(peer: Peer, case: Case) -> tuple[Result, float | None]:
    """Return the result of a step and its matrix products, in units of the logits of all rows that count. None: a
    counter would make torch.compile run eagerly."""
    if peer.name == "torch.compile":
        return peer.step(case), None
    if plan_of(peer.name) is not None:
        with count_products() as counted:
            found = peer.step(case)
        return found, counted.units
    with Flop() as counted:
        found = peer.step(case)
    return found, counted.flop / case.unit
