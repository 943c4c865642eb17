"""This package turns rewards into advantages, measures their resolution, and penalises overlong completions."""

from typing import TYPE_CHECKING

from rlloss.lazy import attach

if TYPE_CHECKING:
    from rlloss.rewards.advantages import group_advantage as group_advantage
    from rlloss.rewards.overlong import SoftOverlongPenalty as SoftOverlongPenalty
    from rlloss.rewards.overlong import soft_overlong_penalty as soft_overlong_penalty
    from rlloss.rewards.resolution import group_accuracy as group_accuracy
    from rlloss.rewards.resolution import resolution_table as resolution_table
    from rlloss.rewards.resolution import reward_resolution as reward_resolution

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "SoftOverlongPenalty": "rlloss.rewards.overlong",
        "group_accuracy": "rlloss.rewards.resolution",
        "group_advantage": "rlloss.rewards.advantages",
        "resolution_table": "rlloss.rewards.resolution",
        "reward_resolution": "rlloss.rewards.resolution",
        "soft_overlong_penalty": "rlloss.rewards.overlong",
    },
)  # pyright: ignore[reportUnsupportedDunderAll]
