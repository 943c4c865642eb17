"""Define the arms that `rlloss demo` compares, and store their results. Test whether the remedy of an arm acted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlloss.loss_types import LOSSES


@dataclass(frozen=True)
class ArmSpec:
    """An arm: its name, the GRPOConfig options in which it differs from the others, and a description."""

    name: str
    options: dict[str, Any]
    about: str = ""


ARMS = (
    ArmSpec(
        "plain GRPO",
        dict(
            epsilon_low=0.2, epsilon_high=0.2, top_entropy_quantile=1.0,
            multi_objective_aggregation="sum_then_normalize",
        ),
    ),
    ArmSpec(
        "remedies",
        dict(
            epsilon_low=0.2, epsilon_high=0.28, top_entropy_quantile=0.2,
            multi_objective_aggregation="normalize_then_sum",
        ),
    ),
)  # fmt: skip

_PLAIN = ARMS[0].options
_COVARIANCE = {"ratio": 0.02, "scope": "generation"}
"""2 %, because the demo picks among a few thousand tokens. The paper's 2e-4 would be one token here."""

PERCENTILE_80 = "80th percentile"
"""Placeholder for a temperature's cutoff: the 80th percentile of the entropies of the warm-started model."""

REMEDIES = {
    "Tokens and clips": [
        ArmSpec("clip-higher", _PLAIN | {"epsilon_high": 0.28}, "DAPO, 2503.14476"),
        ArmSpec("top-entropy, all", _PLAIN | {"top_entropy_quantile": 0.2}, "2506.01939, divided by all tokens (TRL)"),
        ArmSpec(
            "top-entropy, kept", _PLAIN | {"top_entropy_quantile": 0.2, "entropy_denominator": "kept"},
            "2506.01939 Eq. 6, divided by the kept tokens",
        ),
        ArmSpec("dynamic temperature", _PLAIN | {
            "dynamic_temperature": {"rule": "two_level", "high": 1.3, "low": 1.0, "cutoff": PERCENTILE_80},
        }, "2506.01939 Eq. 5, the loss at the same temperatures"),
    ],
    "Covariance and entropy": [
        ArmSpec("Clip-Cov", _PLAIN | {"loss_type": "clip_cov", "covariance": _COVARIANCE}, "2505.22617"),
        ArmSpec("KL-Cov", {
            "loss_type": "kl_cov", "covariance": _COVARIANCE, "multi_objective_aggregation": "sum_then_normalize",
        }, "2505.22617"),
        ArmSpec("entropy bonus", _PLAIN | {"entropy_coef": 0.03}, "a constant weight of 0.03"),
        ArmSpec("adaptive bonus", _PLAIN | {
            "use_adaptive_entropy": True, "entropy_target": 0.25, "entropy_coef_delta": 0.002, "entropy_coef_max": 0.1,
        }, "Skywork-OR1, 2505.22312, towards 0.25 nats"),
    ],
    "Rewards": [
        ArmSpec("GDPO", _PLAIN | {"multi_objective_aggregation": "normalize_then_sum"}, "2601.05242"),
        ArmSpec("sum 2:1", _PLAIN | {"reward_weights": [2.0, 1.0]}, "the answer counts twice"),
        ArmSpec("GDPO 2:1", _PLAIN | {
            "multi_objective_aggregation": "normalize_then_sum", "reward_weights": [2.0, 1.0],
        }, "2601.05242 Eq. 7"),
        ArmSpec("remedies", ARMS[1].options, "clip-higher, top-entropy and GDPO at once"),
    ],
}  # fmt: skip
"""Section of the report -> its arms. Each differs from plain GRPO in one thing, except the last arm."""


@dataclass
class ArmResult:
    """Results of one arm: a dict of metrics per step, held-out scores (mean, standard error) and seconds."""

    name: str
    options: dict[str, Any]
    history: list[dict[str, float | None]]
    held_out: dict[str, tuple[float, float]]
    seconds: float
    inactive: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Findings of the CollapseMonitor: sentences ("Step 22: the entropy collapses. ..."), or in a comparison over seeds
    "step 22: entropy_collapse"."""

    @property
    def folder(self) -> str:
        """The name of this arm's run folder."""
        return re.sub(r"\W+", "_", self.name.lower()).strip("_")


def _picked(options: dict[str, Any]) -> str | None:
    """How the loss treats the tokens that it picks by covariance. None: it picks none."""
    row = LOSSES.get(options.get("loss_type", ""))
    return None if row is None else row.picked


# Part of an arm -> the metric that shows its effect, a test of that metric, and a test whether the options ask for it.
_EVIDENCE = {
    "entropy mask": ("entropy/kept_share", lambda v: v < 1.0, lambda o: o.get("top_entropy_quantile", 1.0) < 1.0),
    "covariance": ("cov/selected_share", lambda v: v > 0.0, lambda o: _picked(o) is not None),
    "entropy bonus": (
        "entropy_coef", lambda v: v > 0.0, lambda o: bool(o.get("entropy_coef") or o.get("use_adaptive_entropy")),
    ),
    "temperature": ("sampling/temperature/std", lambda v: v > 0.0, lambda o: "dynamic_temperature" in o),
}  # fmt: skip


def what_never_acted(history: Sequence[dict[str, float | None]], options: dict[str, Any]) -> list[str]:
    """Return the parts of an arm that had no effect in any step. Comparing such an arm would be meaningless.

    "clip": no token was ever clipped. "ratio": the loss does not clip, and every ratio was always 1. The other parts
    are listed only if the options ask for them. "entropy mask": every token was kept in every step. "covariance": no
    token was picked. "entropy bonus": its weight was 0. "temperature": it was the same for all tokens.
    """

    def ever(metric: str, acts: Callable[[float], bool]) -> bool:
        return any(acts(v) for row in history if (v := row.get(metric)) is not None)

    found = []
    if _picked(options) == "penalised":
        found += [] if ever("rlloss/on_policy_share", lambda v: v < 1.0) else ["ratio"]
    elif not ever("clip_ratio/region_mean", lambda v: v > 0.0):
        found.append("clip")
    for name, (metric, acts, asked_for) in _EVIDENCE.items():
        if asked_for(options) and not ever(metric, acts):
            found.append(name)
    return found


def start_and_end(history: Sequence[dict[str, float | None]], metric: str) -> tuple[float, float]:
    """Return the means over the first and the last tenth of the values (at least one value). NaN if there are none.

    The tenths are of values, not of steps: rewards have one value per generation, for `UPDATES_PER_GENERATION` steps.
    """
    values = [v for row in history if (v := row.get(metric)) is not None]
    if not values:
        return math.nan, math.nan
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def verdict(arms: Sequence[ArmResult]) -> list[str]:
    """Compare the first arm and the others, one sentence each. Metrics that were not measured are left out."""
    plain, *others = arms
    said = []
    for arm in others:
        ours, theirs = (start_and_end(a.history, "entropy")[1] for a in (arm, plain))
        if math.isfinite(ours) and math.isfinite(theirs):
            said.append(f"Entropy ends at {ours:.3f} nats with {arm.name} and at {theirs:.3f} with {plain.name}.")
        ours, theirs = (mean(a.history, "rlloss/live_share") for a in (arm, plain))
        if ours is not None and theirs is not None:
            said.append(f"{ours:.0%} of the tokens carry a gradient with {arm.name}, {theirs:.0%} with {plain.name}.")
        run, all_of_it = mean(arm.history, "rlloss/products"), mean(arm.history, "rlloss/products_plain")
        if run and all_of_it:
            said.append(
                f"The lm_head runs {run:.1f} products there instead of the {all_of_it:.1f} of plain logits; it is so "
                "small in this model that the seconds do not show it."
            )
        for score in plain.held_out:
            (a, error_a), (b, error_b) = arm.held_out[score], plain.held_out[score]
            noise = 2.0 * math.hypot(error_a, error_b)
            name = score.replace("_", " ")
            if abs(a - b) <= noise:
                said.append(f"No difference in {name} beyond noise: {a:.3f} and {b:.3f} (one seed).")
            else:
                more = "more" if a > b else "less"
                said.append(f"{name.capitalize()} is {more} often with {arm.name}: {a:.3f}, not {b:.3f} (one seed).")
        if arm.inactive:
            said.append(f"Parts of {arm.name} never acted: {', '.join(arm.inactive)}.")
    return said


def mean(history: Sequence[dict[str, float | None]], metric: str) -> float | None:
    """Mean of a metric over the steps that have it. None: no step has it."""
    values = [v for row in history if (v := row.get(metric)) is not None]
    return sum(values) / len(values) if values else None
