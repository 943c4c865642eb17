"""This package selects tokens (that count, are kept by entropy or picked by covariance) and tells their states."""

from typing import TYPE_CHECKING

from rlloss.lazy import attach

if TYPE_CHECKING:
    from rlloss.losses.token_states import TokenState as TokenState
    from rlloss.losses.token_states import token_states as token_states
    from rlloss.tokens.covariance import covariance_selection as covariance_selection
    from rlloss.tokens.covariance import token_covariance as token_covariance
    from rlloss.tokens.masks import completion_mask as completion_mask
    from rlloss.tokens.masks import entropy_cutoff as entropy_cutoff
    from rlloss.tokens.masks import not_truncated as not_truncated
    from rlloss.tokens.masks import top_entropy_mask as top_entropy_mask

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "TokenState": "rlloss.losses.token_states",
        "completion_mask": "rlloss.tokens.masks",
        "covariance_selection": "rlloss.tokens.covariance",
        "entropy_cutoff": "rlloss.tokens.masks",
        "not_truncated": "rlloss.tokens.masks",
        "token_covariance": "rlloss.tokens.covariance",
        "token_states": "rlloss.losses.token_states",
        "top_entropy_mask": "rlloss.tokens.masks",
    },
)  # pyright: ignore[reportUnsupportedDunderAll]
