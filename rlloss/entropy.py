"""Entropy: gauges of its collapse, the adaptive bonus, and sampling temperatures that follow it."""

from rlloss.diagnostics import EntropyFit as EntropyFit
from rlloss.diagnostics import diagnose as diagnose
from rlloss.diagnostics import gauges as gauges
from rlloss.entropy_control import AdaptiveEntropyCoef as AdaptiveEntropyCoef
from rlloss.sampling import DynamicTemperature as DynamicTemperature
from rlloss.sampling import EDTemperature as EDTemperature
from rlloss.sampling import TwoLevelTemperature as TwoLevelTemperature
from rlloss.sampling import entropy_temperature as entropy_temperature
from rlloss.sampling import scale_logits as scale_logits
from rlloss.sampling import temperature_rule as temperature_rule
