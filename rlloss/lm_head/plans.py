"""Choose how to compute the loss from hidden states: compute the cost of each plan and take the best that fits.

A share r of the n rows that count is live; c is the share that may be, as known before the forward. g is 1 if the
weight gets a gradient, else 0. The unit is one matrix product for the logits of all n rows. Products and memory::

    recompute             1 + r (2 + g)    no memory beyond a tile
    keep                  1 + r (1 + g)    the logits of the rows that may get a gradient
    gradient_in_forward   1 + r (1 + g)    the logits of a chunk of rows, and the weight's gradient in the sums' dtype
    jacobian              1 + c            d logp / d hidden of the rows that may get a gradient; only if g is 0

The cost of a plan is its products and `OVERHEAD`. The choice falls on the plan that holds least among those that cost
at most a tenth more than the cheapest: a few percent of the time are not worth gigabytes.

Under every plan the forward reads each entry of a tile of logits once ("jacobian" twice). The backward reads those of
live rows once and writes their gradient once. `tests/lm_head/test_counts.py` counts both.
"""

import functools
from typing import Any, NamedTuple

import torch

from rlloss import checks
from rlloss.lm_head import vocab_loop

PLANS = ("recompute", "keep", "gradient_in_forward", "jacobian")
HELD = {"keep": "logits", "jacobian": "jacobian"}  # what a plan holds of rows; see `row_subset.Hold`
HOLD_LOGITS = ("keep", "gradient_in_forward")
# What a plan takes beside its products, in units: it writes and reads what it holds, or sums the weight's gradient over
# chunks in fp32. From an H200 with V 151,936, D 896 and 4,096 (benchmarks/results/nvidia-h200/runs.md): `keep` about
# 0.1, `gradient_in_forward` 0.2 to 0.6 more than `keep`, `jacobian` 0 to 0.3 more.
OVERHEAD = {"recompute": 0.0, "keep": 0.1, "gradient_in_forward": 0.3, "jacobian": 0.2}
WORTHWHILE = 1.1
SHARE_OF_MEMORY = 16
ASSUMED_GPU = 80 * 2**30  # bytes of the GPU that stands for the device "meta"
OTHER_DEVICE = 2 * 2**30


class HeadOptions(NamedTuple):
    """Options of `linear_token_stats`, described there. memory_budget is in bytes."""

    plan: str = "auto"
    memory_budget: int | None = None
    batch_invariant: bool = False
    vocab_group: Any = None
    static_capacity: tuple[int, int] | None = None


class PlanReport(NamedTuple):
    """Plan and cost of a call. Its str() is one sentence.

    - plan: "recompute", "keep", "gradient_in_forward", or "forward" if nothing needs a gradient.
    - rows: number of rows that count. candidates: number of them that may get a gradient, as known before the forward.
    - live_share: share r of `rows` that is expected to get a gradient.
    - products: expected matrix products, in units of the logits of all rows that count. flop: the same in FLOP.
    - extra_bytes: memory of the plan beyond the inputs, their gradients and one tile; memory_budget limits it.
    - tile_bytes: memory of one tile.
    - alternatives: {plan: (products, extra_bytes, reason that forbids it or None)}. why: reason for the choice.
    """

    plan: str
    rows: int
    candidates: int
    live_share: float
    products: float
    flop: int
    extra_bytes: int
    tile_bytes: int
    memory_budget: int
    alternatives: dict[str, tuple[float, int, str | None]]
    why: str

    def __str__(self) -> str:
        return (
            f"{self.plan}: {self.products:.2f} matrix products of {self.rows} rows ({self.flop:.3g} FLOP) expected "
            f"with {self.live_share:.0%} of the rows live, {size_text(self.extra_bytes)} above inputs, gradients and a "
            f"tile of {size_text(self.tile_bytes)}; {self.why}."
        )


class Work(NamedTuple):
    """Inputs of the cost. columns counts all rows, with those that do not count. needed tells whether hidden and weight
    get a gradient."""

    columns: int
    rows: int
    candidates: int
    V: int
    D: int
    live_share: float
    needed: tuple[bool, bool]
    weight_bytes: int  # per entry
    sum_bytes: int
    device: torch.device
    options: HeadOptions


@functools.cache
def _memory(kind: str, index: int | None) -> int:
    """Return the bytes that a plan may take of a device by default."""
    if kind == "meta":
        return ASSUMED_GPU // SHARE_OF_MEMORY
    if kind not in ("cuda", "xpu"):
        return OTHER_DEVICE
    return getattr(torch, kind).get_device_properties(index).total_memory // SHARE_OF_MEMORY


def default_budget(work: Work) -> int:
    """Return the bytes that a plan may hold by default: a third of what plain logits hold, at most a sixteenth of the
    GPU's memory (2 GiB elsewhere), and half an fp32 gradient of the weight.

    Plain logits hold 12 bytes for each of columns * V entries. The result is the same in every step of a run in which
    the batch has one shape. Ranks that share a vocabulary count on 2 GiB, since they must take the same plan.
    """
    device = work.device if work.options.vocab_group is None else torch.device("cpu")
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return 2 * work.V * work.D + min(4 * work.columns * work.V, _memory(device.type, index))


def make_plan(work: Work, forbidden: dict[str, str | None], *, needs_gradient: bool) -> PlanReport:
    """Return the requested plan, or with "auto" the best whose bytes fit the budget (see above).

    forbidden is {plan: reason that forbids it here, or None}. Raises ValueError if the requested plan is not possible.
    """
    plan, given = work.options.plan, work.options.memory_budget
    budget = default_budget(work) if given is None else given
    tile_rows, width = vocab_loop.tile_shape(work.rows, work.V, work.device, work.options.batch_invariant)
    r, gradients = work.live_share, sum(work.needed)
    chunks = -(-work.rows // tile_rows)
    chunk_logits = min(work.rows, tile_rows) * work.V * work.sum_bytes
    wider = (work.sum_bytes - work.weight_bytes) * work.V * work.D if chunks > 1 and work.needed[1] else 0
    costs = {
        "recompute": (1 + r * (1 + gradients), 0),
        "keep": (1 + r * gradients, work.candidates * work.V * work.sum_bytes),
        "gradient_in_forward": (1 + r * gradients, chunk_logits + max(0, wider)),
        "jacobian": (1 + work.candidates / max(work.rows, 1), work.candidates * work.D * work.sum_bytes),
    }
    alternatives = {}
    for name, (products, extra) in costs.items():
        why_not = forbidden.get(name)
        # The default budget does not limit a plan that was requested explicitly.
        limited = given is not None or plan == "auto"
        if why_not is None and extra > budget and limited:
            why_not = f"it needs {size_text(extra)}, and the memory budget is {size_text(budget)}"
        alternatives[name] = (products, extra, why_not)

    unit = 2 * work.rows * work.V * work.D
    tile_bytes = tile_rows * width * work.sum_bytes
    if plan != "auto":
        why_not = alternatives[plan][2]
        checks.require(why_not is None, "plan", repr(plan), f"another one: {why_not}")
    if not needs_gradient:
        return PlanReport(
            "forward", work.rows, 0, 0.0, 1.0, unit, 0, tile_bytes, budget, alternatives, "nothing needs a gradient"
        )
    if plan == "auto":
        cost = {name: costs[name][0] + OVERHEAD[name] for name in costs if alternatives[name][2] is None}
        near = [name for name in cost if cost[name] <= WORTHWHILE * min(cost.values())]
        plan = min(near, key=lambda name: (costs[name][1], cost[name]))
        # "jacobian" is no alternative where the weight is trained.
        better = [name for name in costs if costs[name][0] < costs[plan][0]]
        reasons = []
        for name in better:
            _, extra, why_not = alternatives[name]
            if why_not is None:
                reasons.append(f"{name} would hold {size_text(extra)} and gain little")
            elif not (name == "jacobian" and work.needed[1]):
                reasons.append(f"{name} is not possible: {why_not}")
        why = "; ".join(reasons) if reasons else "no plan has fewer products"
    else:
        why = "it was asked for"
    products, extra, _ = alternatives[plan]
    return PlanReport(
        plan, work.rows, work.candidates, r, products, round(products * unit), extra, tile_bytes, budget, alternatives,
        why,
    )  # fmt: skip


def size_text(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"
