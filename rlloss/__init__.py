"""Losses for RL post-training of language models: the textbook loss, paid only for the tokens with a gradient."""

from rlloss.advantages import group_advantage as group_advantage
from rlloss.config import CovarianceConfig as CovarianceConfig
from rlloss.config import LossConfig as LossConfig
from rlloss.config import SapoConfig as SapoConfig
from rlloss.config import VespoConfig as VespoConfig
from rlloss.covariance import covariance_selection as covariance_selection
from rlloss.covariance import token_covariance as token_covariance
from rlloss.diagnostics import EntropyFit as EntropyFit
from rlloss.diagnostics import diagnose as diagnose
from rlloss.diagnostics import gauges as gauges
from rlloss.entropy_control import AdaptiveEntropyCoef as AdaptiveEntropyCoef
from rlloss.explain import explain_plan as explain_plan
from rlloss.linear import linear_token_stats as linear_token_stats
from rlloss.losses import PolicyLoss as PolicyLoss
from rlloss.losses import means as means
from rlloss.losses import policy_loss as policy_loss
from rlloss.masks import completion_mask as completion_mask
from rlloss.masks import entropy_cutoff as entropy_cutoff
from rlloss.masks import not_truncated as not_truncated
from rlloss.masks import top_entropy_mask as top_entropy_mask
from rlloss.modules import GRPOLoss as GRPOLoss
from rlloss.modules import LinearGRPOLoss as LinearGRPOLoss
from rlloss.ops import TokenStats as TokenStats
from rlloss.ops import token_stats as token_stats
from rlloss.overlong import SoftOverlongPenalty as SoftOverlongPenalty
from rlloss.overlong import soft_overlong_penalty as soft_overlong_penalty
from rlloss.products import count_products as count_products
from rlloss.ratios import sampler_ratio as sampler_ratio
from rlloss.reward_resolution import group_accuracy as group_accuracy
from rlloss.reward_resolution import resolution_table as resolution_table
from rlloss.reward_resolution import reward_resolution as reward_resolution
from rlloss.sampling import DynamicTemperature as DynamicTemperature
from rlloss.sampling import EDTemperature as EDTemperature
from rlloss.sampling import TwoLevelTemperature as TwoLevelTemperature
from rlloss.sampling import entropy_temperature as entropy_temperature
from rlloss.sampling import scale_logits as scale_logits
from rlloss.sampling import temperature_rule as temperature_rule
from rlloss.token_states import TokenState as TokenState
from rlloss.token_states import token_states as token_states

__version__ = "0.1.0"
