"""Losses for RL post-training of language models: the textbook loss, paid only for the tokens with a gradient.

From logits or hidden states to a loss:
    GRPOLoss, LinearGRPOLoss    the loss as a module: from logits, or from hidden states and the lm_head
    LossConfig                  which loss, and its settings
    policy_loss                 from log-probabilities
    means                       the metrics of a loss, divided by their counts

Log-probabilities and entropies alone:
    token_stats                 from logits
    linear_token_stats          from hidden states and the lm_head

Around the loss:
    group_advantage             rewards -> advantages: GRPO, Dr. GRPO, RLOO, GDPO
    sampler_ratio               the correction for an inference engine whose log-probabilities differ
    entropy_cutoff              the entropy from which on a token is kept
    diagnose                    gauges of entropy collapse

What a call costs:
    explain_plan                which plan LinearGRPOLoss takes, its matrix products and bytes, and why
    count_products              counts the matrix products that are run

More, by subject:
    rlloss.losses               the settings of each loss, token states, importance ratios
    rlloss.rewards              advantages, what they keep of several rewards, the overlong penalty
    rlloss.tokens               which tokens count, are kept and are picked
    rlloss.entropy              gauges, the adaptive bonus, temperatures that follow the entropy
    rlloss.lm_head              plans and statistics from hidden states
    rlloss.integrations.trl     GRPOConfig, GRPOTrainer and patch_trl: the one import that a TRL user changes

Names are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlloss.advantages import group_advantage as group_advantage
    from rlloss.config import LossConfig as LossConfig
    from rlloss.diagnostics import diagnose as diagnose
    from rlloss.explain import explain_plan as explain_plan
    from rlloss.linear import linear_token_stats as linear_token_stats
    from rlloss.losses import means as means
    from rlloss.losses import policy_loss as policy_loss
    from rlloss.masks import entropy_cutoff as entropy_cutoff
    from rlloss.modules import GRPOLoss as GRPOLoss
    from rlloss.modules import LinearGRPOLoss as LinearGRPOLoss
    from rlloss.ops import token_stats as token_stats
    from rlloss.products import count_products as count_products
    from rlloss.ratios import sampler_ratio as sampler_ratio

__version__ = "0.1.0"

_MODULES = {
    "GRPOLoss": "modules",
    "LinearGRPOLoss": "modules",
    "LossConfig": "config",
    "count_products": "products",
    "diagnose": "diagnostics",
    "entropy_cutoff": "masks",
    "explain_plan": "explain",
    "group_advantage": "advantages",
    "linear_token_stats": "linear",
    "means": "losses",
    "policy_loss": "losses",
    "sampler_ratio": "ratios",
    "token_stats": "ops",
}
_SUBJECTS = ("entropy", "lm_head", "losses", "rewards", "tokens")
__all__ = ["__version__", *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = getattr(importlib.import_module(f"rlloss.{_MODULES[name]}"), name)
        globals()[name] = found
        return found
    if name in _SUBJECTS:
        return importlib.import_module(f"rlloss.{name}")
    raise AttributeError(f"module 'rlloss' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBJECTS})
