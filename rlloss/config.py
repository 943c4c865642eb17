"""The settings of a loss."""

import math
from dataclasses import dataclass, fields

from rlloss import checks

_CLIP = {"ratio_level", "epsilon_low", "epsilon_high", "delta", "max_log_ratio"}
# Of the settings that only some losses read: which each of them does.
READ_BY = {
    "grpo": _CLIP,
    "bnpo": _CLIP,
    "dr_grpo": _CLIP | {"max_completion_length"},
    "dapo": _CLIP,
    "cispo": {"ratio_level", "epsilon_high", "max_log_ratio"},
    "sapo": {"ratio_level", "max_log_ratio", "sapo"},
    "gspo": _CLIP - {"ratio_level"},
    "luspo": _CLIP,
    "vespo": {"vespo"},
}
LOSS_TYPES = tuple(READ_BY)
RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
ENTROPY_DENOMINATORS = ("all", "kept")
# Losses that are divided by something else than a count of tokens.
NO_TOKEN_COUNT = {"dr_grpo": "B * max_completion_length", "luspo": "B"}


@dataclass(frozen=True)
class SapoConfig:
    """Steepness of the soft gate of "sapo" (2511.20347 Eq. 5); above 0."""

    temperature_pos: float = 1.0
    """Where the advantage is positive."""

    temperature_neg: float = 1.05
    """Where it is not: steeper, so that the gradient fades faster."""

    def __post_init__(self) -> None:
        for field in fields(self):
            checks.positive(f"sapo.{field.name}", getattr(self, field.name))


@dataclass(frozen=True)
class VespoConfig:
    """Gamma weight e^lambda w^k e^(-lambda w) of a sequence whose importance weight is w (2602.10693); all above 0."""

    k_pos: float = 2.0
    """Exponent where the advantage is not negative: how fast small weights fade."""

    lambda_pos: float = 3.0
    """Decay where the advantage is not negative: how fast large weights fade."""

    k_neg: float = 3.0
    """Exponent where the advantage is negative."""

    lambda_neg: float = 2.0
    """Decay where the advantage is negative."""

    def __post_init__(self) -> None:
        for field in fields(self):
            checks.positive(f"vespo.{field.name}", getattr(self, field.name))


@dataclass(frozen=True)
class LossConfig:
    """What `policy_loss`, `GRPOLoss` and the integrations compute. A setting without effect raises when it is made."""

    loss_type: str = "dapo"
    """The surrogate, and how token losses become one number.

    Clipped ratio times advantage (`epsilon_low`, `epsilon_high`, `delta`): "grpo" mean over each sequence, then over
    sequences (2402.03300); "bnpo" mean over this call's tokens; "dr_grpo" sum over B * max_completion_length
    (2503.20783); "dapo" mean over all tokens, of all micro-batches when `denominator` is given (2503.14476); "gspo"
    is "grpo" with one ratio per sequence, whatever `ratio_level` (2507.18071); "luspo" sum over each sequence, then
    mean over sequences, in the paper with ratio_level="sequence" (2602.05261).

    "cispo": the capped ratio is a weight without gradient on the log-probability (2506.13585), mean over tokens as
    "dapo". "sapo": a soft gate instead of the clip (2511.20347), mean as "grpo". "vespo": one Gamma weight per
    sequence without gradient on the log-probability (2602.10693), mean over tokens as "dapo"."""

    ratio_level: str = "token"
    """"token": one importance ratio per token. "sequence": the geometric mean over a sequence (GSPO, 2507.18071)."""

    epsilon_low: float = 0.2
    """Ratios below 1 - epsilon_low are clipped where the advantage is negative. At least 0; from 1 on, none are."""

    epsilon_high: float = 0.28
    """Ratios above 1 + epsilon_high are clipped where the advantage is positive; 0.28 is DAPO's clip-higher. At least
    0; inf clips none. For "cispo" it is the cap of the ratio itself: to be given, at least 1."""

    delta: float | None = None
    """Two-sided clipping (2505.07291): ratios are at most delta also where the advantage is negative. Meant to be
    above 1 + epsilon_high."""

    max_log_ratio: float | None = None
    """Bound of |log ratio| before the exponential; outside it the ratio is a constant and carries no gradient."""

    top_entropy_quantile: float = 1.0
    """rho (2506.01939): the surrogate keeps the tokens whose entropy is at or above the (1 - rho) quantile. 1.0 keeps
    all, 0.0 only the highest-entropy token. KL acts on every token all the same."""

    entropy_denominator: str = "all"
    """What the surrogate is divided by with rho < 1: "all" tokens (as TRL), or the "kept" ones (2506.01939 Eq. 6)."""

    exact_k: bool = False
    """Keep exactly floor(rho (n - 1)) + 1 of n tokens, the first of equal ones, instead of every tie at the cutoff."""

    beta: float = 0.0
    """Weight of the KL to the reference policy."""

    kl_estimator: str = "k3"
    """"k1", "k2" or "k3" (http://joschu.net/blog/kl-approx.html), in nats per token."""

    kl_bias_correction: bool = False
    """Multiply the KL by the importance ratio, gradient included (2512.02556)."""

    off_policy_threshold: float | None = None
    """Sequences with a negative advantage whose mean sampler_logp - logp (old_logp - logp without a sampler_logp)
    exceeds this carry no surrogate (2512.02556 Eq. 9)."""

    entropy_coef: float = 0.0
    """Weight of the mean entropy of the kept tokens, subtracted from the loss; the entropy must carry a gradient."""

    max_completion_length: int | None = None
    """The constant length of "dr_grpo"; for the others it has no effect and raises."""

    sapo: SapoConfig = SapoConfig()
    """The gate of "sapo"; for the others it has no effect and raises."""

    vespo: VespoConfig = VespoConfig()
    """The weight of "vespo"; for the others it has no effect and raises."""

    def __post_init__(self) -> None:
        checks.one_of("loss_type", self.loss_type, LOSS_TYPES)
        checks.one_of("ratio_level", self.ratio_level, RATIO_LEVELS)
        checks.one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        checks.one_of("entropy_denominator", self.entropy_denominator, ENTROPY_DENOMINATORS)
        optional = ("delta", "max_log_ratio", "off_policy_threshold")
        for name in ("epsilon_low", "epsilon_high", "top_entropy_quantile", "beta", "entropy_coef", *optional):
            value = getattr(self, name)
            if not isinstance(value, int | float) and not (value is None and name in optional):
                raise TypeError(f"{name}: found {value!r}, expected a number{' or None' if name in optional else ''}")
        for name, kind in (("sapo", SapoConfig), ("vespo", VespoConfig)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name}: found {getattr(self, name)!r}, expected a {kind.__name__}")
        checks.require(self.epsilon_low >= 0.0, "epsilon_low", self.epsilon_low, "a number >= 0")
        checks.require(self.epsilon_high >= 0.0, "epsilon_high", self.epsilon_high, "a number >= 0")
        checks.require(
            self.loss_type != "cispo" or self.epsilon_high >= 1.0, "epsilon_high", self.epsilon_high,
            "a number >= 1 with 'cispo', for which it is the cap of the ratio itself",
        )  # fmt: skip
        checks.require(
            0.0 <= self.top_entropy_quantile <= 1.0, "top_entropy_quantile", self.top_entropy_quantile, "in [0, 1]"
        )
        checks.require(math.isfinite(self.beta), "beta", self.beta, "a finite number")
        checks.require(math.isfinite(self.entropy_coef), "entropy_coef", self.entropy_coef, "a finite number")
        for name in optional:
            if getattr(self, name) is not None:
                checks.positive(name, getattr(self, name))
        self._reject_settings_without_effect()

    def _reject_settings_without_effect(self) -> None:
        if "max_completion_length" in READ_BY[self.loss_type]:
            checks.require(
                isinstance(self.max_completion_length, int) and self.max_completion_length > 0,
                "max_completion_length", self.max_completion_length,
                f"a positive number of tokens with {self.loss_type!r}",
            )  # fmt: skip
        for field in fields(self):
            if field.name in READ_BY_SOME and field.name not in READ_BY[self.loss_type] | self._also_read():
                self._without_effect(field.name, field.default, f"loss_type={self.loss_type!r}")
        if self.top_entropy_quantile == 1.0:
            self._without_effect("entropy_denominator", "all", "top_entropy_quantile=1.0")
            self._without_effect("exact_k", False, "top_entropy_quantile=1.0")
        if self.beta == 0.0:
            self._without_effect("kl_estimator", "k3", "beta=0.0")
            self._without_effect("kl_bias_correction", False, "beta=0.0")
        if self.entropy_denominator == "kept":
            divisor = NO_TOKEN_COUNT.get(self.loss_type)
            checks.require(
                divisor is None, "entropy_denominator", "kept",
                f"'all' with {self.loss_type!r}, which divides by {divisor}",
            )  # fmt: skip
            checks.require(
                self.beta == 0.0, "beta", self.beta,
                "0.0 with entropy_denominator='kept': 2506.01939 Eq. 6 has no KL, which acts on all tokens",
            )  # fmt: skip

    def _also_read(self) -> set[str]:
        """What is read besides: the ratio of the KL's bias correction; and "gspo" may say what it is."""
        corrected = self.beta != 0.0 and self.kl_bias_correction and self.loss_type == "vespo"
        return {"ratio_level"} if corrected or (self.loss_type, self.ratio_level) == ("gspo", "sequence") else set()

    def _without_effect(self, name: str, default: object, because: str) -> None:
        found = getattr(self, name)
        checks.require(found == default, name, repr(found), f"{default!r}: it has no effect with {because}")


READ_BY_SOME = set().union(*READ_BY.values())
