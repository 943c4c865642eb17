"""The settings of a loss."""

from dataclasses import dataclass

from rlloss import checks

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
ENTROPY_DENOMINATORS = ("all", "kept")


@dataclass(frozen=True)
class LossConfig:
    """What `policy_loss`, `GRPOLoss` and the integrations compute. A setting without effect raises when it is made."""

    loss_type: str = "dapo"
    """How token losses become one number: "grpo" mean over each sequence, then over sequences (2402.03300); "bnpo"
    mean over this call's tokens; "dr_grpo" sum over B * max_completion_length (2503.20783); "dapo" mean over all
    tokens, of all micro-batches when `denominator` is given (2503.14476)."""

    ratio_level: str = "token"
    """"token": one importance ratio per token. "sequence": the geometric mean over a sequence (GSPO, 2507.18071)."""

    epsilon_low: float = 0.2
    """Ratios below 1 - epsilon_low are clipped where the advantage is negative. At least 0; from 1 on, none are."""

    epsilon_high: float = 0.28
    """Ratios above 1 + epsilon_high are clipped where the advantage is positive; 0.28 is DAPO's clip-higher. At least
    0; inf clips none."""

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
    """Sequences with a negative advantage whose mean old_logp - logp exceeds this carry no surrogate (2512.02556
    Eq. 9)."""

    entropy_coef: float = 0.0
    """Weight of the mean entropy of the kept tokens, subtracted from the loss; the entropy must carry a gradient."""

    max_completion_length: int | None = None
    """The constant length of "dr_grpo"; for the others it has no effect and raises."""

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
        checks.require(self.epsilon_low >= 0.0, "epsilon_low", self.epsilon_low, "a number >= 0")
        checks.require(self.epsilon_high >= 0.0, "epsilon_high", self.epsilon_high, "a number >= 0")
        checks.require(
            0.0 <= self.top_entropy_quantile <= 1.0, "top_entropy_quantile", self.top_entropy_quantile, "in [0, 1]"
        )
        checks.require(abs(self.beta) < float("inf"), "beta", self.beta, "a finite number")
        checks.require(abs(self.entropy_coef) < float("inf"), "entropy_coef", self.entropy_coef, "a finite number")
        for name in optional:
            if getattr(self, name) is not None:
                checks.positive(name, getattr(self, name))
        self._reject_settings_without_effect()

    def _reject_settings_without_effect(self) -> None:
        if self.loss_type == "dr_grpo":
            checks.require(
                isinstance(self.max_completion_length, int) and self.max_completion_length > 0,
                "max_completion_length", self.max_completion_length, "a positive number of tokens with 'dr_grpo'",
            )  # fmt: skip
        else:
            self._without_effect("max_completion_length", None, f"loss_type={self.loss_type!r}")
        if self.top_entropy_quantile == 1.0:
            self._without_effect("entropy_denominator", "all", "top_entropy_quantile=1.0")
            self._without_effect("exact_k", False, "top_entropy_quantile=1.0")
        if self.beta == 0.0:
            self._without_effect("kl_estimator", "k3", "beta=0.0")
            self._without_effect("kl_bias_correction", False, "beta=0.0")
        if self.entropy_denominator == "kept":
            checks.require(
                self.loss_type != "dr_grpo", "entropy_denominator", "kept", "'all' with 'dr_grpo', which has no count"
            )
            checks.require(
                self.beta == 0.0, "beta", self.beta,
                "0.0 with entropy_denominator='kept': 2506.01939 Eq. 6 has no KL, which acts on all tokens",
            )  # fmt: skip

    def _without_effect(self, name: str, default: object, because: str) -> None:
        found = getattr(self, name)
        checks.require(found == default, name, repr(found), f"{default!r}: it has no effect with {because}")
