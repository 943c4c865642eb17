"""Bundle and check the arguments of a call from hidden states, and choose its plan."""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlloss import checks
from rlloss.lm_head import vocab_loop
from rlloss.lm_head.autograd import (
    Gather,
    How,
    LinearTokenStats,
    Rows,
    compute_dtype,
    counted_rows,
    linear_token_stats_op,
)
from rlloss.lm_head.head import Settings
from rlloss.lm_head.plans import HELD, PLANS, HeadOptions, PlanReport, Work, make_plan
from rlloss.lm_head.row_subset import Capacity, Hold, Picked, Survey
from rlloss.lm_head.vocab_loop import Wanted
from rlloss.lm_head.vocab_parallel import shard_of
from rlloss.logits.statistics import EXTRA, LOCAL_ROWS, TokenStats, as_asked, check_rows
from rlloss.logits.transform import Transform

ONLY_WITH_A_LOSS = "it is a plan of LinearGRPOLoss, which knows the loss"
MORE_THAN_LOGP = "a gradient may also come from the entropy or lse, for which the logits are needed again"
# FSDP averages the gradients of the ranks. full_tensor() alone drops the gradients of the other ranks.
WHOLE = (
    "call inside the forward of FSDP2's root module, which gathers it; or give .to_local() with vocab_group, where the "
    "ranks have the same tokens; or .full_tensor(grad_placements=[Partial('avg')] * mesh.ndim), where each has its own"
)


class HeadInputs(NamedTuple):
    """Tensors and numbers from which `linear_token_stats` computes; they are described there."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def needs_gradient(self) -> bool:
        leaves = (self.hidden, self.weight, self.bias)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)


class Expected(NamedTuple):
    """Knowledge of a loss about the gradient, before the forward.

    candidates is a bool tensor like target, True for rows that may get a gradient; None: all. live_share is the share
    of the candidates that is expected to get one, known_share the share of the rows that count. no_gradient_in_forward
    is the reason that forbids the plan "gradient_in_forward", or None. logp_alone tells whether only logp gets a
    gradient.
    """

    candidates: Tensor | None = None
    live_share: float | None = None
    no_gradient_in_forward: str | None = ONLY_WITH_A_LOSS
    known_share: float | None = None
    logp_alone: bool = False


NOTHING_EXPECTED = Expected()


def head_options(
    plan: str,
    memory_budget: int | str | None,
    batch_invariant: bool,
    vocab_group: Any = None,
    static_capacity: tuple[int, int] | None = None,
) -> HeadOptions:
    """Check the options and return them. If one does not fit, the error names it."""
    checks.one_of("plan", plan, ("auto", *PLANS))
    budget = checks.memory_budget("memory_budget", memory_budget)
    checks.flag("batch_invariant", batch_invariant)
    checks.process_group("vocab_group", vocab_group)
    check_capacity(static_capacity)
    return HeadOptions(plan, budget, batch_invariant, vocab_group, static_capacity)


class Call(NamedTuple):
    """Checked arguments, the rows that count and the plan. The last three fields are unknown while compiling and for
    tensors without values.

    hold is what the forward holds of the candidates among the rows that count.
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
    hold: Hold | None = None

    def stats(self, outputs: tuple[str, ...], entropy_grad: bool) -> TokenStats:
        wanted = Wanted("entropy" in outputs, any(name in outputs for name in EXTRA))
        if self.report is None:
            target, temperature, softcap, logit_scale, capacity = self.rows
            per_token = isinstance(temperature, Tensor)
            logp, entropy, lse, _, extra = linear_token_stats_op(
                self.hidden, self.weight, self.bias, target, self.mask, temperature if per_token else None,
                1.0 if per_token else temperature, softcap, logit_scale, *self.settings[:2],
                wanted.entropy, entropy_grad, wanted.extra,
                None if capacity is None else list(capacity),
            )  # fmt: skip
        else:
            how = How(self.rows, self.counted, self.hold, wanted, entropy_grad, self.settings, self.gather)
            logp, entropy, lse, extra = LinearTokenStats.apply(self.hidden, self.weight, self.bias, how)  # type: ignore[misc]
        return as_asked(outputs, entropy_grad, logp, entropy, lse, extra)


def prepare(
    inputs: HeadInputs,
    options: HeadOptions,
    expected: Expected = NOTHING_EXPECTED,
    *,
    gather: Gather = contextlib.nullcontext,
) -> Call:
    """Check the inputs and choose the plan. gather is a context that makes a sharded weight whole."""
    hidden, weight, target, bias, mask, temperature, softcap, logit_scale = inputs
    shard, compiling = None, torch.compiler.is_compiling()
    with gather():
        check_head(hidden, weight, bias)
        has_values = compiling or checks.has_values(hidden)
        V, D = weight.shape
        if options.vocab_group is not None:
            checks.require(
                has_values and not compiling, "vocab_group", "a process group",
                "None inside torch.compile and for meta and fake tensors",
            )  # fmt: skip
            shard = shard_of(weight, options.vocab_group)
    check_rows(
        hidden, "hidden without its last dimension", target, mask, Transform(temperature, softcap, logit_scale),
        V if shard is None else shard.total,
    )  # fmt: skip
    capacity = check_capacity(options.static_capacity, target, mask)
    dtype = compute_dtype(hidden, weight)
    per_token = isinstance(temperature, Tensor)
    rows = Rows(
        target,
        temperature.detach().to(torch.promote_types(dtype, torch.float32)) if per_token else float(temperature),
        None if softcap is None else float(softcap),
        float(logit_scale),
        capacity,
    )
    call = Call(hidden, weight, bias, mask, rows, Settings(dtype, options.batch_invariant, shard), gather)
    if compiling:
        possible = options.plan in ("auto", "recompute")
        checks.require(possible, "plan", repr(options.plan), "'auto' or 'recompute' inside torch.compile")
        return call
    if not has_values or not inputs.needs_gradient:
        expected = expected._replace(candidates=None)
    known = inputs if has_values else inputs._replace(mask=None)
    report, counted, hold = choose(known, (V if shard is None else shard.largest, D), options, expected, capacity)
    # Without values only shapes are needed. They are the same for every plan, and the operator returns them.
    return call._replace(counted=counted, report=report, hold=hold) if has_values else call


def choose(
    inputs: HeadInputs,
    shape: tuple[int, int],
    options: HeadOptions,
    expected: Expected,
    capacity: Capacity | None,
) -> tuple[PlanReport, Picked | None, Hold | None]:
    """Return the plan of a call, the rows that count and what to hold (see `Call`). One host sync at most.

    shape is (V, D) of the weight, or of the largest shard. Only the shape of the target matters.
    """
    hidden, weight, target, mask = inputs.hidden, inputs.weight, inputs.target, inputs.mask
    N, forbidden = target.numel(), why_not(inputs, options, expected)
    if capacity is None:
        chunk = vocab_loop.chunk_rows(hidden.device, shape[0], options.batch_invariant)
        survey = Survey(N, mask, expected.candidates, chunk)
        counted, rows, count = survey.rows(), survey.n, survey.count
        share = count / max(rows, 1)
        live = share if expected.live_share is None else expected.live_share * share
    else:
        survey, counted = None, counted_rows(target, mask, capacity)
        rows = count = N if counted is None else len(counted)
        live = min(capacity.live, rows) / max(rows, 1)
    work = Work(
        N, rows, count, *shape, live if expected.known_share is None else expected.known_share,
        (hidden.requires_grad, weight.requires_grad), weight.element_size(), 8 if hidden.dtype == torch.float64 else 4,
        hidden.device, options,
    )  # fmt: skip
    report = make_plan(work, forbidden, needs_gradient=inputs.needs_gradient)
    what = HELD.get(report.plan)
    if what is None or count == 0:
        return report, counted, None
    some = None if survey is None else survey.candidates(counted)
    return report, counted, Hold(what) if some is None or survey is None else Hold(what, some, survey.edges)


def why_not(inputs: HeadInputs, options: HeadOptions, expected: Expected) -> dict[str, str | None]:
    """Return {plan: reason that forbids it for these inputs, or None}."""
    trained = [name for name in ("weight", "bias") if (x := getattr(inputs, name)) is not None and x.requires_grad]
    jacobian = None
    if trained:
        jacobian = f"the {trained[0]} gets a gradient"
    elif not expected.logp_alone and options.plan == "auto":
        jacobian = MORE_THAN_LOGP
    forbidden = {"gradient_in_forward": expected.no_gradient_in_forward, "jacobian": jacobian}
    if options.static_capacity is not None:
        for name in forbidden:
            forbidden[name] = forbidden[name] or "it has no static_capacity of its own"
    return forbidden


def check_capacity(
    static_capacity: tuple[int, int] | None, target: Tensor | None = None, mask: Tensor | None = None
) -> Capacity | None:
    """Return (rows, live) as `Capacity`. Raise if it does not fit."""
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
    """Raise if an argument does not fit; the error names it."""
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
