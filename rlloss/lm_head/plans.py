"""How the loss is computed from hidden states: the plans, what each costs, and which one is taken.

Of n rows that count a share r is live. In units of the logits of all rows that count, a forward takes 1 matrix product;
for hidden and weight each the backward takes r, and r once more where the logits are computed again:

    recompute             1 + 3 r    no memory beyond a tile
    keep                  1 + 2 r    the logits of the rows that may get a gradient
    gradient_in_forward   1 + 2 r    the gradients of hidden and weight, from the forward on

Whatever the plan, each entry of a tile of logits is read once in the forward, and those of live rows once in the
backward, where their gradient is written once. `tests/lm_head/test_counts.py` counts both.
"""

from typing import NamedTuple

import torch

from rlloss import checks
from rlloss.lm_head import vocab_loop

PLANS = ("recompute", "keep", "gradient_in_forward")


class PlanReport(NamedTuple):
    """What a call does, in numbers; str() of it is one sentence.

    plan: "recompute", "keep", "gradient_in_forward", or "forward" where nothing needs a gradient. rows: those that
    count. candidates: those of them that may get a gradient, as far as is known before the forward. live_share: the
    share r of `rows` that is expected to get one. products: matrix products expected, in logits of all rows that
    count. flop: the same in FLOP. extra_bytes: what the plan needs above the inputs, their gradients and one tile;
    memory_budget is its limit. tile_bytes: one tile. alternatives: {plan: (products, extra_bytes, what forbids it or
    None)}.
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
    """What the cost depends on. needed: whether hidden and weight get a gradient."""

    rows: int
    candidates: int
    V: int
    D: int
    live_share: float
    needed: tuple[bool, bool]
    weight_bytes: int  # of an entry
    sum_bytes: int
    device: torch.device
    batch_invariant: bool


def default_budget(V: int, D: int) -> int:
    """Half an fp32 gradient of the weight: logits of D / 2 rows raise the peak of the backward by at most half."""
    return 2 * V * D


def make_plan(
    work: Work, plan: str, memory_budget: int | None, forbidden: dict[str, str | None], *, needs_gradient: bool
) -> PlanReport:
    """The plan that is asked for, or with "auto" the one with the fewest products whose bytes fit the budget.

    forbidden: {plan: why it cannot be taken here, or None}. Raises ValueError where the one asked for cannot.
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
        # A plan that is asked for without a budget needs no default one.
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
