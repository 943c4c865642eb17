"""This package turns the log-probabilities of tokens into a loss, its metrics and one coefficient per token."""

from typing import TYPE_CHECKING

from rlloss.lazy import attach

if TYPE_CHECKING:
    from rlloss.config import CovarianceConfig as CovarianceConfig
    from rlloss.config import LossConfig as LossConfig
    from rlloss.config import SapoConfig as SapoConfig
    from rlloss.config import VespoConfig as VespoConfig
    from rlloss.losses.loss import policy_loss as policy_loss
    from rlloss.losses.metrics import PolicyLoss as PolicyLoss
    from rlloss.losses.metrics import means as means
    from rlloss.losses.ratios import sampler_ratio as sampler_ratio

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CovarianceConfig": "rlloss.config",
        "LossConfig": "rlloss.config",
        "PolicyLoss": "rlloss.losses.metrics",
        "SapoConfig": "rlloss.config",
        "VespoConfig": "rlloss.config",
        "means": "rlloss.losses.metrics",
        "policy_loss": "rlloss.losses.loss",
        "sampler_ratio": "rlloss.losses.ratios",
    },
)  # pyright: ignore[reportUnsupportedDunderAll]
