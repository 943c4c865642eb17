"""Rewards: advantages of groups, what they keep of several rewards, and the penalty on overlong completions."""

from rlloss.advantages import group_advantage as group_advantage
from rlloss.overlong import SoftOverlongPenalty as SoftOverlongPenalty
from rlloss.overlong import soft_overlong_penalty as soft_overlong_penalty
from rlloss.reward_resolution import group_accuracy as group_accuracy
from rlloss.reward_resolution import resolution_table as resolution_table
from rlloss.reward_resolution import reward_resolution as reward_resolution
