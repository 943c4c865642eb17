"""This package computes token statistics from hidden states and the lm_head without holding the logits."""

from typing import TYPE_CHECKING

from rlloss.lazy import attach

if TYPE_CHECKING:
    from rlloss.lm_head.explain import explain_plan as explain_plan
    from rlloss.lm_head.matmul import count_products as count_products
    from rlloss.lm_head.plans import PLANS as PLANS
    from rlloss.lm_head.plans import PlanReport as PlanReport
    from rlloss.lm_head.statistics import linear_token_stats as linear_token_stats
    from rlloss.logits.statistics import TokenStats as TokenStats

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "PLANS": "rlloss.lm_head.plans",
        "PlanReport": "rlloss.lm_head.plans",
        "TokenStats": "rlloss.logits.statistics",
        "count_products": "rlloss.lm_head.matmul",
        "explain_plan": "rlloss.lm_head.explain",
        "linear_token_stats": "rlloss.lm_head.statistics",
    },
)  # pyright: ignore[reportUnsupportedDunderAll]
