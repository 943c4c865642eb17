"""rlloss computes losses for RL post-training of language models.

Loss and gradient are those of the textbook formulas. The backward runs only for tokens whose gradient is not zero.

From logits or hidden states to a loss:
    GRPOLoss, LinearGRPOLoss    the loss as a module: from logits, or from hidden states and the lm_head
    LossConfig                  selects the loss and its settings
    policy_loss                 the loss from log-probabilities
    means                       the metrics of a loss, divided by their counts

Log-probabilities and entropies alone:
    token_stats                 from logits
    linear_token_stats          from hidden states and the lm_head

Around the loss:
    group_advantage             rewards -> advantages: GRPO, Dr. GRPO, RLOO, GDPO
    sampler_ratio               the correction for an inference engine whose log-probabilities differ
    entropy_cutoff              the smallest entropy of a kept token
    diagnose                    sums from which the gauges of entropy collapse are made

Cost of a call:
    explain_plan                the plan of LinearGRPOLoss, its matrix products and bytes, and the reason for it
    count_products              counts the matrix products that ran

More, by subject:
    rlloss.losses               the settings of each loss, the loss and its metrics, importance ratios
    rlloss.rewards              advantages, reward resolution, the overlong penalty
    rlloss.tokens               tokens that count, are kept, are picked; the state of each token
    rlloss.entropy              gauges, the adaptive bonus, temperatures that follow the entropy
    rlloss.lm_head              plans and statistics from hidden states
    rlloss.integrations.trl     GRPOConfig, GRPOTrainer and patch_trl: the one import that a TRL user changes

A name is imported when it is first used.
"""

from typing import TYPE_CHECKING

from rlloss.lazy import attach

if TYPE_CHECKING:
    from rlloss.config import LossConfig as LossConfig
    from rlloss.entropy.diagnostics import diagnose as diagnose
    from rlloss.lm_head.explain import explain_plan as explain_plan
    from rlloss.lm_head.matmul import count_products as count_products
    from rlloss.lm_head.statistics import linear_token_stats as linear_token_stats
    from rlloss.logits.statistics import token_stats as token_stats
    from rlloss.losses.loss import policy_loss as policy_loss
    from rlloss.losses.metrics import means as means
    from rlloss.losses.ratios import sampler_ratio as sampler_ratio
    from rlloss.modules import GRPOLoss as GRPOLoss
    from rlloss.modules import LinearGRPOLoss as LinearGRPOLoss
    from rlloss.rewards.advantages import group_advantage as group_advantage
    from rlloss.tokens.masks import entropy_cutoff as entropy_cutoff

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "GRPOLoss": "rlloss.modules",
        "LinearGRPOLoss": "rlloss.modules",
        "LossConfig": "rlloss.config",
        "count_products": "rlloss.lm_head.matmul",
        "diagnose": "rlloss.entropy.diagnostics",
        "entropy_cutoff": "rlloss.tokens.masks",
        "explain_plan": "rlloss.lm_head.explain",
        "group_advantage": "rlloss.rewards.advantages",
        "linear_token_stats": "rlloss.lm_head.statistics",
        "means": "rlloss.losses.metrics",
        "policy_loss": "rlloss.losses.loss",
        "sampler_ratio": "rlloss.losses.ratios",
        "token_stats": "rlloss.logits.statistics",
    },
    ("entropy", "lm_head", "losses", "rewards", "tokens"),
)
__all__ = ["__version__", *__all__]
