"""rlloss in TRL: change one import.

    from rlloss.integrations.trl import GRPOConfig, GRPOTrainer

`patch_trl` is a context in which TRL's other trainers run on rlloss's lm_head.
"""

from rlloss.integrations.trl_config import GRPOConfig as GRPOConfig
from rlloss.integrations.trl_grpo import GRPOTrainer as GRPOTrainer
from rlloss.integrations.trl_lm_head import patch_trl as patch_trl
