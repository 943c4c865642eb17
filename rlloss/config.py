"""These dataclasses hold the settings of a loss and check them."""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from rlloss import checks
from rlloss.loss_types import LOSSES, LossType, read_by_some

RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
ENTROPY_DENOMINATORS = ("all", "kept")
BONUS_TOKENS = ("kept", "all")
COVARIANCE_SCOPES = ("microbatch", "generation")
COVARIANCE_SELECTIONS = ("random", "top")
COVARIANCE_PENALTIES = ("abs", "k3")


@dataclass(frozen=True)
class SapoConfig:
    """Steepness of the soft gate of "sapo" (2511.20347 Eq. 5). A value that is not above 0 raises ValueError."""

    temperature_pos: float = 1.0
    """Steepness where the advantage is positive."""

    temperature_neg: float = 1.05
    """Steepness elsewhere. The default is larger than `temperature_pos`, so the gradient fades faster."""

    def __post_init__(self) -> None:
        for field in fields(self):
            checks.positive(f"sapo.{field.name}", getattr(self, field.name))


@dataclass(frozen=True)
class VespoConfig:
    """Gamma weight e^lambda w^k e^(-lambda w) of "vespo" (2602.10693), where w is the importance weight of a sequence.
    A value that is not above 0 raises ValueError."""

    k_pos: float = 2.0
    """Exponent k where the advantage is not negative. A larger one suppresses small weights more."""

    lambda_pos: float = 3.0
    """Decay lambda where the advantage is not negative. A larger one suppresses large weights more."""

    k_neg: float = 3.0
    """Exponent k where the advantage is negative."""

    lambda_neg: float = 2.0
    """Decay lambda where the advantage is negative."""

    def __post_init__(self) -> None:
        for field in fields(self):
            checks.positive(f"vespo.{field.name}", getattr(self, field.name))


@dataclass(frozen=True)
class CovarianceConfig:
    """How "clip_cov" and "kl_cov" pick tokens by covariance (logp - mean logp) (A - mean A) (2505.22617 Eq. 10).
    A value out of its range raises ValueError."""

    ratio: float = 2e-4
    """Share of the tokens in the scope that is picked, in (0, 1]. The paper uses 2e-3 for KL-Cov on a 7B model."""

    low: float = 1.0
    """Smallest covariance of the tokens among which "clip_cov" picks (2505.22617 Eq. 11)."""

    high: float = 5.0
    """Largest covariance of the tokens among which "clip_cov" picks."""

    kl_coef: float = 1.0
    """Weight of the penalty of "kl_cov", above 0. The paper uses 1, verl's YAML 0.1."""

    penalty: str = "abs"
    """Penalty of "kl_cov", "abs" or "k3".

    "abs" is abs(log ratio), as in verl and in the authors' code. "k3" is ratio - 1 - log ratio, which estimates the
    paper's KL(pi_old, pi) (Eq. 14) from the sampled token."""

    scope: str = "microbatch"
    """Tokens over which means and share are taken, "microbatch" or "generation".

    "microbatch" uses the tokens of this call, as verl does: eight calls pick at least eight tokens where one call picks
    one. With "generation" you pick the tokens once, from the log-probabilities of the whole batch
    (`rlloss.tokens.covariance_selection`), and pass them as `selected`. The result then does not depend on how the
    batch is split."""

    selection: str = "random"
    """Pick among the tokens between `low` and `high` at "random", as the paper does, or the "top" ones by covariance.
    "kl_cov" always takes the largest."""

    seed: int = 0
    """Seed of the random selection. The same seed and batch give the same selection."""

    at_least_one: bool = True
    """Pick one token even if `ratio` times their number is below 1 (verl). False gives the paper's floor(ratio N)."""

    def __post_init__(self) -> None:
        for name in ("ratio", "low", "high"):
            checks.number(f"covariance.{name}", getattr(self, name))
        checks.require(0.0 < self.ratio <= 1.0, "covariance.ratio", self.ratio, "a number in (0, 1]")
        checks.require(self.low <= self.high, "covariance.low", self.low, f"at most covariance.high={self.high}")
        checks.positive("covariance.kl_coef", self.kl_coef)
        checks.one_of("covariance.penalty", self.penalty, COVARIANCE_PENALTIES)
        checks.one_of("covariance.scope", self.scope, COVARIANCE_SCOPES)
        checks.one_of("covariance.selection", self.selection, COVARIANCE_SELECTIONS)
        checks.whole("covariance.seed", self.seed)
        checks.flag("covariance.at_least_one", self.at_least_one)


@dataclass(frozen=True)
class LossConfig:
    """Settings of the loss that `policy_loss`, `GRPOLoss`, `LinearGRPOLoss` and the integrations compute.

    Raises:
        ValueError, TypeError: a value does not fit, or a setting has no effect together with the others; the error
            names it.
    """

    loss_type: str = "dapo"
    """The surrogate, and how token losses become one number.

    These clip the ratio and multiply it by the advantage (`epsilon_low`, `epsilon_high`, `delta`):

    - "grpo": mean over each sequence, then over sequences (2402.03300).
    - "bnpo": mean over this call's tokens.
    - "dr_grpo": sum over all tokens, divided by B * max_completion_length (2503.20783).
    - "dapo": mean over all tokens (2503.14476); pass `denominator` to take it over all micro-batches.
    - "gspo": as "grpo", with one ratio per sequence whatever `ratio_level` is (2507.18071).
    - "luspo": sum over each sequence, then mean over sequences (2602.05261, which uses ratio_level="sequence").

    These weight the tokens in another way:

    - "cispo": the capped ratio is a weight without gradient on the log-probability (2506.13585); mean as "dapo".
    - "sapo": a soft gate replaces the clip (2511.20347); mean as "grpo".
    - "vespo": one Gamma weight per sequence, without gradient, on the log-probability (2602.10693); mean as "dapo".

    These counter entropy collapse (2505.22617); mean as "dapo":

    - "clip_cov": "dapo" without the tokens that `covariance` picks.
    - "kl_cov": ratio times advantage without a clip, plus a penalty on the ratio of the tokens that it picks."""

    ratio_level: str = "token"
    """Take one importance ratio per "token", or per "sequence" the geometric mean (GSPO, 2507.18071)."""

    epsilon_low: float = 0.2
    """Clip ratios below 1 - epsilon_low where the advantage is negative. At least 0; 1 or more clips none."""

    epsilon_high: float = 0.28
    """Clip ratios above 1 + epsilon_high where the advantage is positive. At least 0; inf clips none. 0.28 is DAPO's
    clip-higher. For "cispo" it is the cap of the ratio itself, at least 1, and you have to set it."""

    delta: float | None = None
    """Cap the ratio at delta where the advantage is negative too (two-sided clipping, 2505.07291). It should be above
    1 + epsilon_high."""

    max_log_ratio: float | None = None
    """Bound of abs(log ratio) before the exponential, and of abs(ref_logp - logp) before the KL. Values outside it
    become constants without gradient. With None the formulas have no bound and may overflow. "vespo" applies it to
    the KL only."""

    top_entropy_quantile: float = 1.0
    """Share rho (2506.01939). The surrogate keeps the tokens whose entropy is at or above the (1 - rho) quantile.
    1.0 keeps all, 0.0 only the highest-entropy token. The KL acts on every token in any case."""

    entropy_denominator: str = "all"
    """Divisor of the surrogate with rho < 1, "all" tokens (as TRL) or the "kept" ones (2506.01939 Eq. 6)."""

    exact_k: bool = False
    """Keep exactly n - ceil((1 - rho) (n - 1)) of n tokens, the first of equal ones, not every tie at the cutoff."""

    beta: float = 0.0
    """Weight of the KL to the reference policy."""

    kl_estimator: str = "k3"
    """Estimator of the KL in nats per token, "k1", "k2" or "k3"
    (http://joschu.net/blog/kl-approx.html)."""

    kl_bias_correction: bool = False
    """Multiply the KL by the importance ratio, gradient included (2512.02556)."""

    off_policy_threshold: float | None = None
    """Drop the surrogate of a sequence with a negative advantage if its mean sampler_logp - logp exceeds this value
    (2512.02556 Eq. 9). Without a sampler_logp, old_logp - logp is used."""

    entropy_coef: float = 0.0
    """Weight of the mean entropy, which is subtracted from the loss as a bonus. The entropy must carry a gradient."""

    entropy_bonus_tokens: str = "kept"
    """Tokens whose mean entropy is the bonus, the "kept" ones (as TRL) or "all"."""

    max_completion_length: int | None = None
    """Constant length of "dr_grpo". With another loss it has no effect and raises."""

    sapo: SapoConfig = SapoConfig()
    """Gate of "sapo". With another loss it has no effect and raises."""

    vespo: VespoConfig = VespoConfig()
    """Weight of "vespo". With another loss it has no effect and raises."""

    covariance: CovarianceConfig = CovarianceConfig()
    """How "clip_cov" and "kl_cov" pick tokens. With another loss it has no effect and raises."""

    _least_cap: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        checks.one_of("loss_type", self.loss_type, tuple(LOSSES))
        checks.one_of("ratio_level", self.ratio_level, RATIO_LEVELS)
        checks.one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        checks.one_of("entropy_denominator", self.entropy_denominator, ENTROPY_DENOMINATORS)
        optional = ("delta", "max_log_ratio", "off_policy_threshold")
        for name in ("epsilon_low", "epsilon_high", "top_entropy_quantile", "beta", "entropy_coef", *optional):
            value = getattr(self, name)
            if value is not None or name not in optional:
                checks.number(name, value, "a number or None" if name in optional else "a number")
        for name in ("exact_k", "kl_bias_correction"):
            checks.flag(name, getattr(self, name))
        if self.max_completion_length is not None:
            checks.whole("max_completion_length", self.max_completion_length, 1)
        checks.one_of("entropy_bonus_tokens", self.entropy_bonus_tokens, BONUS_TOKENS)
        for name, kind in (("sapo", SapoConfig), ("vespo", VespoConfig), ("covariance", CovarianceConfig)):
            checks.of_type(name, getattr(self, name), kind, f"a {kind.__name__}")
        checks.require(self.epsilon_low >= 0.0, "epsilon_low", self.epsilon_low, "a number >= 0")
        checks.require(self.epsilon_high >= 0.0, "epsilon_high", self.epsilon_high, "a number >= 0")
        checks.require(
            not self._row.caps_ratio or self.epsilon_high >= self._least_cap, "epsilon_high", self.epsilon_high,
            f"a number >= 1 with {self.loss_type!r}, for which it is the cap of the ratio itself",
        )  # fmt: skip
        checks.within("top_entropy_quantile", self.top_entropy_quantile, 0, 1)
        checks.require(math.isfinite(self.beta), "beta", self.beta, "a finite number")
        checks.require(math.isfinite(self.entropy_coef), "entropy_coef", self.entropy_coef, "a finite number")
        for name in optional:
            if getattr(self, name) is not None:
                checks.positive(name, getattr(self, name))
        self._reject_settings_without_effect()

    @property
    def _row(self) -> LossType:
        return LOSSES[self.loss_type]

    def _reject_settings_without_effect(self) -> None:
        reads = self._row.reads
        also = self._also_read()
        if "max_completion_length" in reads:
            checks.require(
                self.max_completion_length is not None, "max_completion_length", None,
                f"a positive number of tokens with {self.loss_type!r}",
            )  # fmt: skip
        for field in fields(self):
            given = getattr(self, field.name) != field.default
            if given and field.name not in reads and field.name not in also and read_by_some(field.name):
                self._without_effect(field.name, field.default, f"loss_type={self.loss_type!r}")
        if self.top_entropy_quantile == 1.0:
            self._without_effect("entropy_denominator", "all", "top_entropy_quantile=1.0")
            self._without_effect("exact_k", False, "top_entropy_quantile=1.0")
            self._without_effect("entropy_bonus_tokens", "kept", "top_entropy_quantile=1.0, which keeps all")
        if self.entropy_coef == 0.0:
            self._without_effect("entropy_bonus_tokens", "kept", "entropy_coef=0.0")
        if self.beta == 0.0:
            self._without_effect("kl_estimator", "k3", "beta=0.0")
            self._without_effect("kl_bias_correction", False, "beta=0.0")
        if "covariance" in reads:
            for field in fields(CovarianceConfig):
                found, name = getattr(self.covariance, field.name), f"covariance.{field.name}"
                checks.require(
                    found == field.default or name in reads or not read_by_some(name), name, found,
                    f"{field.default!r}: it has no effect with loss_type={self.loss_type!r}",
                )  # fmt: skip
            checks.require(
                self.covariance.selection == "random" or self.covariance.seed == 0, "covariance.seed",
                self.covariance.seed, "0: it has no effect with covariance.selection='top'",
            )  # fmt: skip
        if self.entropy_denominator == "kept":
            counts_tokens = self._row.divided_by == "tokens" or self._row.mean_of_sequence
            divisor = "B" if self._row.divided_by == "sequences" else "B * max_completion_length"
            checks.require(
                counts_tokens, "entropy_denominator", "kept",
                f"'all' with {self.loss_type!r}, which divides by {divisor}",
            )  # fmt: skip
            checks.require(
                self.beta == 0.0, "beta", self.beta,
                "0.0 with entropy_denominator='kept': 2506.01939 Eq. 6 has no KL, which acts on all tokens",
            )  # fmt: skip

    def _also_read(self) -> set[str]:
        """Return settings that are read beyond `LossType.reads`: the KL's bound and the ratio of its bias correction.

        A `ratio_level` that repeats the fixed level of the loss is allowed.
        """
        read = {"max_log_ratio"} if self.beta != 0.0 else set()
        corrected = self.beta != 0.0 and self.kl_bias_correction and self._row.level == "product"
        if corrected or self._row.level == self.ratio_level:
            read |= {"ratio_level"}
        return read

    def _without_effect(self, name: str, default: object, because: str) -> None:
        found = getattr(self, name)
        checks.require(found == default, name, repr(found), f"{default!r}: it has no effect with {because}")
