"""Adapt the coefficient of an entropy bonus to the measured entropy, as Skywork-OR1 does (2505.22312)."""

import math
from collections.abc import Mapping

from rlloss import checks


def bonus_now(coef: float, last_entropy: float, target: float) -> float:
    """Return `coef` if the entropy measured last is at or below the target, else 0.

    Both entropies are in nats. A NaN counts as above the target.
    """
    return coef if last_entropy <= target else 0.0


def adapted(coef: float, entropy: float, target: float, delta: float, minimum: float, maximum: float) -> float:
    """Return the next coefficient: a step of `delta` up at or below the target, a step down above it, within bounds.

    A step up checks only the maximum, a step down only the minimum. A NaN entropy counts as above the target.
    """
    return min(coef + delta, maximum) if entropy <= target else max(coef - delta, minimum)


class AdaptiveEntropyCoef:
    """Weight of an entropy bonus that is active only while the entropy is at or below its target::

        control = AdaptiveEntropyCoef(target=0.3)
        for batch in batches:
            loss = policy_loss - control.coef * entropy
            ...  # the optimizer's step
            control.update(mean_entropy)

    The bonus is 0 until the first measurement. While it is off, the stored coefficient continues to step down, and the
    bonus resumes from there. TRL's trainer does the same, with options of the same meaning.

    Args:
        coef: first coefficient, within the bounds.
        target: mean entropy per token in nats, above 0.
        delta: step of the coefficient per update, above 0.
        minimum, maximum: bounds of the coefficient.

    Raises:
        ValueError, TypeError: an argument is out of range, or no number.

    Source: 2505.22312, adaptive entropy control.
    """

    def __init__(
        self,
        coef: float = 0.0,
        target: float = 0.2,
        delta: float = 0.005,
        minimum: float = 0.0,
        maximum: float = 1.0,
    ):
        checks.positive("target", target)
        checks.positive("delta", delta)
        for name, value in (("coef", coef), ("minimum", minimum), ("maximum", maximum)):
            checks.number(name, value)
        checks.require(-math.inf < minimum <= maximum < math.inf, "minimum", minimum, f"at most maximum = {maximum}")
        checks.require(minimum <= coef <= maximum, "coef", coef, f"{minimum} to {maximum}")
        self.target, self.delta, self.minimum, self.maximum = target, delta, minimum, maximum
        self._coef, self._last_entropy = float(coef), math.inf

    @property
    def coef(self) -> float:
        """Coefficient for this step. It is 0 while the entropy measured last is above the target."""
        return bonus_now(self._coef, self._last_entropy, self.target)

    def update(self, mean_entropy: float) -> None:
        """Record the mean entropy (nats) of the step's tokens, over all its micro-batches and ranks."""
        checks.scalar("mean_entropy", mean_entropy)
        self._last_entropy = float(mean_entropy)
        bounds = (self.minimum, self.maximum)
        self._coef = adapted(self._coef, self._last_entropy, self.target, self.delta, *bounds)

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint. Before the first update it holds an infinity, which JSON lacks; torch.save
        accepts it."""
        return {"coef": self._coef, "last_entropy": self._last_entropy}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a `state_dict`. Target, step and bounds of this object do not change."""
        checks.of_type("state", state, Mapping, "a mapping with coef and last_entropy")
        missing = {"coef", "last_entropy"} ^ set(state)
        checks.require(not missing, "state", sorted(state), "coef and last_entropy")
        for name, value in state.items():
            checks.number(f"state[{name!r}]", value)
        self._coef, self._last_entropy = float(state["coef"]), float(state["last_entropy"])
