"""This package measures entropy collapse, adapts an entropy bonus, and sets sampling temperatures by entropy."""

from typing import TYPE_CHECKING

from rlloss.lazy import attach

if TYPE_CHECKING:
    from rlloss.entropy.bonus import AdaptiveEntropyCoef as AdaptiveEntropyCoef
    from rlloss.entropy.diagnostics import EntropyFit as EntropyFit
    from rlloss.entropy.diagnostics import diagnose as diagnose
    from rlloss.entropy.diagnostics import gauges as gauges
    from rlloss.entropy.temperature import DynamicTemperature as DynamicTemperature
    from rlloss.entropy.temperature import EDTemperature as EDTemperature
    from rlloss.entropy.temperature import TwoLevelTemperature as TwoLevelTemperature
    from rlloss.entropy.temperature import entropy_temperature as entropy_temperature
    from rlloss.entropy.temperature import scale_logits as scale_logits
    from rlloss.entropy.temperature import temperature_rule as temperature_rule

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AdaptiveEntropyCoef": "rlloss.entropy.bonus",
        "DynamicTemperature": "rlloss.entropy.temperature",
        "EDTemperature": "rlloss.entropy.temperature",
        "EntropyFit": "rlloss.entropy.diagnostics",
        "TwoLevelTemperature": "rlloss.entropy.temperature",
        "diagnose": "rlloss.entropy.diagnostics",
        "entropy_temperature": "rlloss.entropy.temperature",
        "gauges": "rlloss.entropy.diagnostics",
        "scale_logits": "rlloss.entropy.temperature",
        "temperature_rule": "rlloss.entropy.temperature",
    },
)  # pyright: ignore[reportUnsupportedDunderAll]
