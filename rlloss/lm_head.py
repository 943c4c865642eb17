"""The lm_head without logits: statistics of tokens from hidden states, the plans, and what they cost."""

from rlloss.explain import explain_plan as explain_plan
from rlloss.linear import linear_token_stats as linear_token_stats
from rlloss.ops import TokenStats as TokenStats
from rlloss.plans import PLANS as PLANS
from rlloss.plans import PlanReport as PlanReport
from rlloss.products import count_products as count_products
