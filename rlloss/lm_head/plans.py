"""Choose how to compute the loss from hidden states: compute the cost of each plan and take the best that fits.

A share r of the n rows that count is live. The unit is one matrix product for the logits of all n rows. The forward
takes 1. The backward takes r each for hidden and weight, and r more to compute the logits again. Products and memory::

    recompute             1 + 3 r    no memory beyond a tile
    keep                  1 + 2 r    the logits of the rows that may get a gradient
    gradient_in_forward   1 + 2 r    the gradients of hidden and weight, from the forward on

Under every plan the forward reads each entry of a tile of logits once. The backward reads those of live rows once and
writes their gradient once. `tests/lm_head/test_counts.py` counts both.
"""

from typing import NamedTuple

import torch

from rlloss import checks
from rlloss.lm_head import vocab_loop

PLANS = ("recompute", "keep", "gradient_in_forward")


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
    """Inputs of the cost. needed tells whether hidden and weight get a gradient."""

    rows: int
    candidates: int
    V: int
    D: int
    live_share: float
    needed: tuple[bool, bool]
    weight_bytes: int  # per entry
    sum_bytes: int
    device: torch.device
    batch_invariant: bool


def default_budget(V: int, D: int) -> int:
    """Return half the bytes of an fp32 gradient of the weight: the logits of D / 2 rows fit, and raise the peak of the
    backward by at most half."""
    return 2 * V * D


def make_plan(
    work: Work, plan: str, memory_budget: int | None, forbidden: dict[str, str | None], *, needs_gradient: bool
) -> PlanReport:
    """Return the requested plan, or with "auto" the one with the fewest products whose bytes fit the budget.

    forbidden is {plan: reason that forbids it here, or None}. Raises ValueError if the requested plan is not possible.
    """
    budget = default_budget(work.V, work.D) if memory_budget is None else memory_budget
    tile_rows, width = vocab_loop.tile_shape(work.rows, work.V, work.device, work.batch_invariant)
    r, gradients = work.live_share, sum(work.needed)
    chunks = -(-work.rows // tile_rows)
    chunk_logits = min(work.rows, tile_rows) * work.V * work.sum_bytes
    wider = (work.sum_bytes - work.weight_bytes) * work.V * work.D if chunks > 1 and work.needed[1] else 0
    costs = {
        "recompute": (1 + r * (1 + gradients), 0),
        "keep": (1 + r * gradients, work.candidates * work.V * work.sum_bytes),
        "gradient_in_forward": (1 + r * gradients, chunk_logits + max(0, wider)),
    }
    alternatives = {}
    for name, (products, extra) in costs.items():
        why_not = forbidden.get(name)
        # The default budget does not limit a plan that was requested explicitly.
        limited = memory_budget is not None or plan == "auto"
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
        possible = [name for name, (_, _, why_not) in alternatives.items() if why_not is None]
        plan = min(possible, key=lambda name: alternatives[name][:2])
        better = [name for name in costs if costs[name][0] < costs[plan][0]]
        reasons = [f"{name} is not possible: {alternatives[name][2]}" for name in better]
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
