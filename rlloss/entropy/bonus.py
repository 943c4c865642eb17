"""The adaptive entropy bonus of Skywork-OR1 (2505.22312): a coefficient that follows the measured entropy."""

import math
from collections.abc import Mapping

from rlloss import checks


def bonus_now(coef: float, last_entropy: float, target: float) -> float:
    """The coefficient in use: `coef` if the entropy measured last is at or below the target, else 0.

    Both entropies in nats; a NaN counts as above the target.
    """
    return coef if last_entropy <= target else 0.0


def adapted(coef: float, entropy: float, target: float, delta: float, minimum: float, maximum: float) -> float:
    """The next coefficient: a step of `delta` up at or below the target, a step down above it, kept within its bounds.

    Going up only the maximum is looked at, and going down only the minimum. A NaN entropy counts as above the target.
    """
    return min(coef + delta, maximum) if entropy <= target else max(coef - delta, minimum)


class AdaptiveEntropyCoef:
    """The weight of an entropy bonus that is there only while the entropy is at or below its target.

        control = AdaptiveEntropyCoef(target=0.3)
        for batch in batches:
            loss = policy_loss - control.coef * entropy
            ...  # the optimizer's step
            control.update(mean_entropy)

    Until the first measurement the bonus is 0. Where it is off, the coefficient behind it goes on stepping down, so it
    starts again from where it got to. TRL's trainer does the same, from options of the same meaning.

    Args:
        coef: the coefficient to start from, within its bounds.
        target: mean entropy of a token, nats, above 0.
        delta: step of the coefficient per update, above 0.
        minimum, maximum: bounds of the coefficient.

    Raises:
        ValueError: a number is out of range.

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
        """In use for this step: 0 while the entropy measured last is above the target."""
        return bonus_now(self._coef, self._last_entropy, self.target)

    def update(self, mean_entropy: float) -> None:
        """Take in the mean entropy (nats) of the step's tokens, over all its micro-batches and ranks."""
        checks.scalar("mean_entropy", mean_entropy)
        self._last_entropy = float(mean_entropy)
        bounds = (self.minimum, self.maximum)
        self._coef = adapted(self._coef, self._last_entropy, self.target, self.delta, *bounds)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs. (The infinity before the first update is not JSON; torch.save takes it.)"""
        return {"coef": self._coef, "last_entropy": self._last_entropy}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a `state_dict`; target, step and bounds stay those of this object."""
        checks.of_type("state", state, Mapping, "a mapping with coef and last_entropy")
        missing = {"coef", "last_entropy"} ^ set(state)
        checks.require(not missing, "state", sorted(state), "coef and last_entropy")
        for name, value in state.items():
            checks.number(f"state[{name!r}]", value)
        self._coef, self._last_entropy = float(state["coef"]), float(state["last_entropy"])
