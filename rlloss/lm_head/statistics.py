"""linear_token_stats: from hidden states to log-probability, entropy and lse, without [N, V] logits."""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlloss import checks
from rlloss.lm_head import vocab_loop
from rlloss.lm_head.autograd import Gather, LinearTokenStats, Rows, compute_dtype, counted_rows, linear_token_stats_op
from rlloss.lm_head.plans import PLANS, PlanReport, Work, make_plan
from rlloss.lm_head.row_subset import Capacity, Picked, Survey
from rlloss.lm_head.vocab_loop import Settings, Wanted
from rlloss.lm_head.vocab_parallel import shard_of
from rlloss.logits.statistics import LOCAL_ROWS, TokenStats, check_outputs, check_rows

ONLY_WITH_A_LOSS = "it is a plan of LinearGRPOLoss, which knows the loss"
# FSDP takes the mean of the ranks' gradients; full_tensor() alone drops those of the others.
WHOLE = (
    "call inside the forward of FSDP2's root module, which gathers it; or give .to_local() with vocab_group, where the "
    "ranks have the same tokens; or .full_tensor(grad_placements=[Partial('avg')] * mesh.ndim), where each has its own"
)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("logp", "entropy", "lse"),
    entropy_grad: bool = False,
    plan: str = "auto",
    memory_budget: int | str | None = None,
    batch_invariant: bool = False,
    vocab_group: Any = None,
    static_capacity: tuple[int, int] | None = None,
) -> TokenStats:
    """`token_stats` of the logits `hidden @ weight.T + bias`, which are never there as a whole.

    Products are run for rows that count, in the forward, and for rows with a nonzero incoming gradient, in the
    backward; the others cost nothing. Logits and sums are fp32 also where the model is bf16; the gradients are added up
    in fp32 and rounded once. The same rows give the same bits of logp whatever the plan, with and without gradient.
    There is no second derivative, and no torch.func transform. On a CPU with bf16 units bf16 products run in them,
    which torch sets for the process: an fp32 product that another thread runs in that moment is rounded as well.

    Args:
        hidden: `[..., D]`, bf16, fp16, fp32 or fp64 (fp64: torch backend). fp16 needs a loss scale, as
            `torch.amp.GradScaler` gives it: on a GPU the gradients of logits are fp16 too, and without one most of them
            underflow.
        weight: `[V, D]`, tied to the embedding or not; without `requires_grad` no product is run for its gradient. Of
            two dtypes the wider one is taken; under autocast, autocast's.
        target: `[...]`, int64 or int32 with 0 <= target < V where `mask` is True.
        bias: `[V]`, or None.
        mask: `[...]` bool, True = counts. Masked rows take part in no product, give 0 and have a zero gradient.
        temperature, softcap, logit_scale, outputs, entropy_grad: as for `token_stats`.
        plan: "recompute": logits are computed again for the rows with a gradient; 1 + 3r products for a share r of live
            rows, one tile of memory. "keep": the logits of the rows that count are held until the backward, which
            releases them; 1 + 2r products. "auto": the latter where it fits the budget. Under torch.compile
            "recompute". Inside a checkpointed region ask for "recompute": what is kept would stay. Look at
            `explain_plan`.
        memory_budget: bytes that a plan may hold above one tile, also as a size such as "1GiB". None: 2 V D, half an
            fp32 gradient of the weight; D / 2 rows fit.
        batch_invariant: the bits of a row's logp do not depend on the rows around it; padding to full tiles makes
            small batches dearer.
        vocab_group: process group over which the vocabulary is split: weight, and bias, are this rank's entries, in the
            order of the ranks; everything else is the same on every rank, target counts over the whole vocabulary.
            Statistics are merged and the gradient of hidden is added up over the group: every rank gets the whole.
        static_capacity: (rows, live), room for so many rows that count and so many with a gradient. Products are run
            for these numbers, whatever is in the mask; shapes are then fixed, nothing is read back from the device (no
            host sync) and the call fits a CUDA graph. Where more count than there is room for, those are NaN, and
            every gradient; where more get a gradient, every gradient is NaN. On a CPU either raises.

    Returns:
        `TokenStats`, its tensors shaped like `target`, fp32 (fp64 for fp64), in nats.

    Raises:
        ValueError, TypeError: an argument does not fit; it is named. A target out of range raises on CPU (on a GPU
            with RLLOSS_CHECK=1, which synchronises) and makes its own row NaN on a GPU.
    """
    call = prepare(
        hidden, weight, target, bias, mask, temperature, softcap, logit_scale, plan, memory_budget, batch_invariant,
        vocab_group, static_capacity,
    )  # fmt: skip
    return call.stats(outputs, entropy_grad)


class Call(NamedTuple):
    """Arguments that fit each other, the rows that count and the plan. The last three are not known while compiling,
    and of tensors without values.

    keep: what the forward keeps: the candidates among the rows counted, True for all of them, False; and how many of
    them come before each chunk of rows.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    rows: Rows
    settings: Settings
    gather: Gather
    counted: Picked | None = None
    report: PlanReport | None = None
    keep: tuple[Picked | bool, list[int] | None] = (False, None)

    def stats(self, outputs: tuple[str, ...], entropy_grad: bool) -> TokenStats:
        check_outputs(outputs, entropy_grad)
        wanted = Wanted(
            "entropy" in outputs, "log_sum_sq_probs" in outputs, "mean_logit" in outputs, "is_top1" in outputs
        )
        if self.report is None:
            target, temperature, softcap, logit_scale, capacity = self.rows
            per_token = isinstance(temperature, Tensor)
            logp, entropy, lse, _, extra = linear_token_stats_op(
                self.hidden, self.weight, self.bias, target, self.mask, temperature if per_token else None,
                1.0 if per_token else temperature, softcap, logit_scale, *self.settings[:2],
                wanted.entropy, entropy_grad, wanted.squares, wanted.mean, wanted.top1,
                None if capacity is None else list(capacity),
            )  # fmt: skip
        else:
            logp, entropy, lse, extra = LinearTokenStats.apply(
                self.hidden, self.weight, self.bias, self.rows, self.counted, self.keep, wanted, entropy_grad,
                self.settings, self.gather,
            )  # type: ignore[misc]  # fmt: skip
        return TokenStats(
            logp=logp if "logp" in outputs else None,
            entropy=(entropy if entropy_grad else entropy.detach()) if wanted.entropy else None,
            lse=lse if "lse" in outputs else None,
            mean_logit=extra[0] if wanted.mean else None,
            log_sum_sq_probs=extra[1] if wanted.squares else None,
            is_top1=extra[2] > 0 if wanted.top1 else None,
        )


def prepare(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    plan: str,
    memory_budget: int | str | None,
    batch_invariant: bool,
    vocab_group: Any = None,
    static_capacity: tuple[int, int] | None = None,
    *,
    candidates: Tensor | None = None,
    live_share: float | None = None,
    no_gradient_in_forward: str | None = ONLY_WITH_A_LOSS,
    gather: Gather = contextlib.nullcontext,
) -> Call:
    """Check the arguments of `linear_token_stats` and choose its plan, with what those know who call it for a loss.

    candidates: bool, like target: rows that may get a gradient; None: all. live_share: the share of these expected to
    get one. gather: a context in which the weight, sharded elsewhere, is whole.
    """
    memory_budget = check_options(plan, memory_budget, batch_invariant, vocab_group)
    shard, compiling = None, torch.compiler.is_compiling()
    with gather():
        check_head(hidden, weight, bias)
        has_values = compiling or checks.has_values(hidden)
        V, D = weight.shape
        if vocab_group is not None:
            checks.require(
                has_values and not compiling, "vocab_group", "a process group",
                "None inside torch.compile and for meta and fake tensors",
            )  # fmt: skip
            shard = shard_of(weight, vocab_group)
    check_rows(
        hidden, "hidden without its last dimension", target, mask, temperature, softcap, logit_scale,
        V if shard is None else shard.total,
    )  # fmt: skip
    capacity = check_capacity(static_capacity, target, mask)
    dtype = compute_dtype(hidden, weight)
    per_token = isinstance(temperature, Tensor)
    rows = Rows(
        target,
        temperature.detach().to(torch.promote_types(dtype, torch.float32)) if per_token else float(temperature),
        None if softcap is None else float(softcap),
        float(logit_scale),
        capacity,
    )
    call = Call(hidden, weight, bias, mask, rows, Settings(dtype, batch_invariant, shard), gather)
    if compiling:
        checks.require(plan in ("auto", "recompute"), "plan", repr(plan), "'auto' or 'recompute' inside torch.compile")
        return call
    if not has_values:
        mask = candidates = None
    needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    report, counted, keep = choose(
        hidden, weight, (V if shard is None else shard.largest, D), target, mask,
        candidates if needs_gradient else None, live_share, plan, memory_budget, batch_invariant, needs_gradient,
        no_gradient_in_forward, capacity=capacity,
    )  # fmt: skip
    # Without values there is nothing to compute. The operator gives the shapes, which every plan shares.
    return call._replace(counted=counted, report=report, keep=keep) if has_values else call


def choose(
    hidden: Tensor,
    weight: Tensor,
    shape: tuple[int, int],
    target: Tensor,
    mask: Tensor | None,
    candidates: Tensor | None,
    live_share: float | None,
    plan: str,
    memory_budget: int | None,
    batch_invariant: bool,
    needs_gradient: bool,
    no_gradient_in_forward: str | None,
    known_share: float | None = None,
    capacity: Capacity | None = None,
) -> tuple[PlanReport, Picked | None, tuple[Picked | bool, list[int] | None]]:
    """The plan of a call, the rows that count and what its forward keeps (see `Call`). One host sync at most.

    target: only its shape matters. live_share: of the candidates, known_share: of the rows that count.
    """
    N = target.numel()
    if capacity is None:
        survey = Survey(N, mask, candidates, vocab_loop.chunk_rows(hidden.device, shape[0], batch_invariant))
        counted, rows, count = survey.rows(), survey.n, survey.count
        share = count / max(rows, 1)
        live = share if live_share is None else live_share * share
    else:
        survey, counted = None, counted_rows(target, mask, capacity)
        rows = count = N if counted is None else len(counted)
        live = min(capacity.live, rows) / max(rows, 1)
        no_gradient_in_forward = no_gradient_in_forward or "its chunks of rows have no static_capacity of their own"
    work = Work(
        rows, count, *shape, live if known_share is None else known_share,
        (hidden.requires_grad, weight.requires_grad), weight.element_size(), 8 if hidden.dtype == torch.float64 else 4,
        hidden.device, batch_invariant,
    )  # fmt: skip
    forbidden = {"gradient_in_forward": no_gradient_in_forward}
    report = make_plan(work, plan, memory_budget, forbidden, needs_gradient=needs_gradient)
    if report.plan != "keep" or count == 0:
        return report, counted, (False, None)
    some = None if survey is None else survey.candidates(counted)
    return report, counted, (True, None) if some is None or survey is None else (some, survey.edges)


def check_options(plan: str, memory_budget: int | str | None, batch_invariant: bool, vocab_group: Any) -> int | None:
    """The memory budget in bytes. Raises, naming the argument, where one does not fit."""
    checks.one_of("plan", plan, ("auto", *PLANS))
    budget = checks.memory_budget("memory_budget", memory_budget)
    checks.flag("batch_invariant", batch_invariant)
    checks.process_group("vocab_group", vocab_group)
    return budget


def check_capacity(
    static_capacity: tuple[int, int] | None, target: Tensor | None = None, mask: Tensor | None = None
) -> Capacity | None:
    """(rows, live) as `Capacity`. Raises, naming the argument, where it does not fit."""
    if static_capacity is None:
        return None
    pair = list(static_capacity) if isinstance(static_capacity, tuple | list) else []
    checks.require(
        len(pair) == 2 and all(type(n) is int for n in pair) and 1 <= pair[1] <= pair[0],
        "static_capacity", static_capacity, "(rows, live), two whole numbers with rows >= live >= 1",
    )  # fmt: skip
    if mask is None and target is not None:
        checks.require(
            pair[0] >= target.numel(), "static_capacity", static_capacity,
            f"room for all {target.numel()} rows without a mask",
        )  # fmt: skip
    return Capacity(*pair)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise, naming the argument, where one does not fit."""
    for name, x, ways_out in (("hidden", hidden, LOCAL_ROWS), ("weight", weight, WHOLE), ("bias", bias, WHOLE)):
        checks.local(name, x, ways_out)
    for name, x in (("hidden", hidden), ("weight", weight)):
        checks.of_dtype(name, x, checks.COMPUTED, "bf16, fp16, fp32 or fp64")
    checks.require(hidden.dim() >= 1 and hidden.shape[-1] >= 1, "hidden", tuple(hidden.shape), "[..., D] with D >= 1")
    D = hidden.shape[-1]
    checks.require(
        weight.dim() == 2 and weight.shape[0] >= 1 and weight.shape[1] == D, "weight", tuple(weight.shape),
        f"[V, D] with V >= 1 and D = {D}, the last dimension of hidden",
    )  # fmt: skip
    checks.same_device("weight", weight, hidden, "hidden")
    if bias is not None:
        checks.floating("bias", bias)
        checks.same_shape("bias", bias, weight.shape[:1], "[V]")
        checks.same_device("bias", bias, hidden, "hidden")
