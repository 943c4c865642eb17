"""Train with TRL on rlloss's losses. You change one import::

    from rlloss.integrations.trl import GRPOConfig, GRPOTrainer

Inside the context `patch_trl`, TRL's own trainers use rlloss's lm_head.
"""

from typing import TYPE_CHECKING

from rlloss.lazy import attach

if TYPE_CHECKING:
    from rlloss.integrations.trl.config import GRPOConfig as GRPOConfig
    from rlloss.integrations.trl.lm_head import patch_trl as patch_trl
    from rlloss.integrations.trl.trainer import GRPOTrainer as GRPOTrainer

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "GRPOConfig": "rlloss.integrations.trl.config",
        "GRPOTrainer": "rlloss.integrations.trl.trainer",
        "patch_trl": "rlloss.integrations.trl.lm_head",
    },
)  # pyright: ignore[reportUnsupportedDunderAll]
