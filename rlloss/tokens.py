"""Tokens: which count, which are kept by their entropy, which are picked by their covariance, and why one is dead."""

from rlloss.covariance import covariance_selection as covariance_selection
from rlloss.covariance import token_covariance as token_covariance
from rlloss.masks import completion_mask as completion_mask
from rlloss.masks import entropy_cutoff as entropy_cutoff
from rlloss.masks import not_truncated as not_truncated
from rlloss.masks import top_entropy_mask as top_entropy_mask
from rlloss.token_states import TokenState as TokenState
from rlloss.token_states import token_states as token_states
