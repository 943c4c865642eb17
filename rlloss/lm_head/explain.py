"""`explain_plan` tells a user which plan a call from hidden states would take and what it would cost."""

from torch import Tensor

from rlloss import checks
from rlloss.config import LossConfig
from rlloss.lm_head.call import (
    ONLY_WITH_A_LOSS,
    Expected,
    HeadInputs,
    check_capacity,
    check_head,
    choose,
    head_options,
)
from rlloss.lm_head.gradient_in_forward import candidates, why_not_in_forward
from rlloss.lm_head.gradient_in_forward import live_share as expected_share
from rlloss.lm_head.plans import PlanReport
from rlloss.losses.inputs import check_scalars


def explain_plan(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    advantage: Tensor | None = None,
    config: LossConfig | None = None,
    cutoff: Tensor | float | None = None,
    denominator: Tensor | float | None = None,
    live_share: float | None = None,
    plan: str = "auto",
    memory_budget: int | str | None = None,
    batch_invariant: bool = False,
    static_capacity: tuple[int, int] | None = None,
) -> PlanReport:
    """Return the plan that a call would take, with its products and bytes; `print` it for one sentence.

    Args:
        hidden, weight, bias, mask: as for `linear_token_stats`. Only shapes, dtypes, the device and `requires_grad`
            matter, so hidden and weight may be FakeTensors or on the "meta" device, for which GPU tiles are assumed. A
            mask without values counts as full.
        advantage, cutoff, denominator: as for `LinearGRPOLoss`; only together with `config`.
        config: settings of the loss that `LinearGRPOLoss` computes. None: the call is `linear_token_stats`.
        live_share: share of the rows that count which gets a gradient, if you know it. None: the share
            config.top_entropy_quantile of the rows with an advantage; all rows with a KL, an entropy bonus for all
            tokens, or without a config.
        plan, memory_budget, batch_invariant, static_capacity: as for the call.

    Returns:
        `PlanReport`. If no tensor needs a gradient, its plan is "forward".

    Raises:
        ValueError, TypeError: an argument does not fit, or the requested plan is not possible; the error says why.
    """
    options = head_options(plan, memory_budget, batch_invariant, None, static_capacity)
    check_head(hidden, weight, bias)
    if mask is not None:
        checks.boolean("mask", mask)
        checks.same_shape("mask", mask, hidden.shape[:-1], "like hidden without its last dimension")
    if live_share is not None:
        checks.within("live_share", live_share, 0, 1)
    check_scalars(cutoff, denominator)
    if advantage is not None:
        checks.require(hidden.dim() == 3, "hidden", f"shape {tuple(hidden.shape)}", "[B, T, D] with an advantage")
        checks.advantage(advantage, hidden.shape[:2])
    readable = mask is not None and checks.has_values(mask)
    some = None
    why_not: str | None = ONLY_WITH_A_LOSS
    if config is not None:
        checks.of_type("config", config, LossConfig, "a LossConfig or None")
        why_not = why_not_in_forward(hidden, weight, config, cutoff, denominator)
        if advantage is not None and mask is not None and checks.has_values(advantage):
            some = candidates(advantage, mask, config)
    inputs = HeadInputs(hidden, weight, hidden[..., 0], bias, mask if readable else None)
    expected = Expected(
        some if inputs.needs_gradient else None, None if config is None else expected_share(config), why_not,
        live_share, config is not None and config.entropy_coef == 0.0,
    )  # fmt: skip
    capacity = check_capacity(static_capacity, inputs.target, mask)
    return choose(inputs, (weight.shape[0], weight.shape[1]), options, expected, capacity)[0]
