"""Losses for RL post-training of language models: the textbook loss and gradient, paid only for tokens that carry it."""

from rlloss.ops import TokenStats as TokenStats
from rlloss.ops import token_stats as token_stats

__version__ = "0.1.0"
