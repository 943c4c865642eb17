"""A transformers callback that reads the trainer's logs and says in words what is collapsing, and what to try.

from rlloss.integrations.transformers.collapse_monitor import CollapseMonitor

trainer.add_callback(CollapseMonitor())
"""

import logging
import math
import statistics
from collections import Counter
from typing import NamedTuple

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        'rlloss.integrations.transformers.collapse_monitor needs transformers: pip install "rlloss[trl]"'
    ) from error  # fmt: skip

from rlloss import checks
from rlloss.entropy.diagnostics import Trend, trend
from rlloss.integrations.transformers.notice import say
from rlloss.loss_types import LOSSES

ENTROPY = ("entropy/mean", "entropy")  # nats, by preference
ZERO_VARIANCE = "reward_resolution/zero_variance/"
DEAD_SHARES = ("rlloss/zero_advantage_share", "reward_resolution/zero_advantage_groups")
ON_POLICY_SHARE = "rlloss/on_policy_share"
MIN_LOGS = 20  # a line through fewer logs says too little

# Against a falling entropy: what to say, and whether the trainer's settings already have it.
REMEDIES = (
    ("clip-higher (epsilon_high=0.28)", lambda a: (a.epsilon_high or a.epsilon) > a.epsilon),
    ("gradients on the tokens of high entropy alone (top_entropy_quantile=0.2)", lambda a: a.top_entropy_quantile < 1),
    ("Clip-Cov or KL-Cov (loss_type='clip_cov' or 'kl_cov')", lambda a: _picked(a) is not None),
    (
        "an entropy bonus (use_adaptive_entropy=True, entropy_target near the entropy at the start)",
        lambda a: a.use_adaptive_entropy or a.entropy_coef > 0,
    ),
    ("a sampling temperature that rises with the entropy", lambda a: False),
)

logger = logging.getLogger(__name__)


class Finding(NamedTuple):
    """step: the trainer's, of the log that settled it. kind: as in `CollapseMonitor`. message: with numbers and what to
    try."""

    step: int
    kind: str
    message: str


class CollapseMonitor(TrainerCallback):
    """Warns, once, about what the logs show; again only after it went away and came back. `findings` keeps all.

    ====================  ==============================================================================================
    kind                  read from
    ====================  ==============================================================================================
    `entropy_collapse`    `entropy/mean`, or `entropy`: a line through the last `window` logs stands below
                          `collapse_share` of the start, or falls and gets there within as many logs as it was fitted to
    `entropy_explosion`   the same upwards, above `explosion_factor` times the start and above `explosion_entropy`
    `low_entropy`         `entropy/p80` below `low_p80`: four tokens of five leave no choice
    `on_policy`           `rlloss/on_policy_share`: every ratio is 1, and no clip can act. Where the trainer's settings
                          make it so, that is no finding: one line says it before the first step
    `kl_cov_on_policy`    the same with loss_type="kl_cov", whose penalty is then 0
    `reward/<name>`       `reward_resolution/zero_variance/<name>`; without it `rewards/<name>/std` of 0: the reward
                          tells no completions apart
    `dead_groups`         `rlloss/zero_advantage_share`, `reward_resolution/zero_advantage_groups`, or
                          `frac_reward_zero_std` (which with multi_objective_aggregation="normalize_then_sum" says
                          nothing about groups)
    ====================  ==============================================================================================

    A metric that is missing, None or not finite leaves its point open: nothing is said, and nothing is taken back.
    Warnings come from the main process through the logger `rlloss.integrations.transformers.collapse_monitor`. A
    resumed run starts from the entropies in the trainer's log history.

    Args:
        window: logs that the entropy's line is fitted to at most; from 20 on it is fitted to what there is.
        start_logs: the start is the mean entropy of so many first logs.
        collapse_share: of the entropy at the start, in (0, 1).
        explosion_factor: times the entropy at the start, above 1.
        explosion_entropy: nats; below it no entropy counts as too high.
        significance: standard errors by which a slope has to differ from 0 before the line is followed ahead.
        low_p80: nats.
        on_policy_share: share of the tokens with ratio 1 from which on the run counts as on-policy.
        zero_variance_share: share of the groups in which a reward does not vary, from which on it carries no signal.
        dead_share: share of the completions, or groups, without an advantage from which on nearly all are dead.
        patience: consecutive logs that must agree before a finding is made, and before it is taken back.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        window: int = 50,
        start_logs: int = 10,
        collapse_share: float = 0.3,
        explosion_factor: float = 3.0,
        explosion_entropy: float = 1.0,
        significance: float = 5.0,
        low_p80: float = 0.05,
        on_policy_share: float = 0.999,
        zero_variance_share: float = 0.95,
        dead_share: float = 0.9,
        patience: int = 3,
    ):
        checks.require(window >= MIN_LOGS, "window", window, f"at least {MIN_LOGS}")
        checks.require(1 <= start_logs <= MIN_LOGS, "start_logs", start_logs, f"1 to {MIN_LOGS}")
        checks.require(0 < collapse_share < 1, "collapse_share", collapse_share, "a number in (0, 1)")
        checks.require(explosion_factor > 1, "explosion_factor", explosion_factor, "a number above 1")
        for name, value in {"on_policy_share": on_policy_share, "zero_variance_share": zero_variance_share,
                            "dead_share": dead_share}.items():  # fmt: skip
            checks.require(0 < value <= 1, name, value, "a number in (0, 1]")
        checks.require(patience >= 1, "patience", patience, "at least 1")
        self.window, self.start_logs, self.patience = window, start_logs, patience
        self.collapse_share, self.significance = collapse_share, significance
        self.explosion_factor, self.explosion_entropy = explosion_factor, explosion_entropy
        self.low_p80, self.on_policy_share = low_p80, on_policy_share
        self.zero_variance_share, self.dead_share = zero_variance_share, dead_share
        self.findings: list[Finding] = []
        self._forget()

    def _forget(self) -> None:
        self._first: list[float] = []
        self._recent: list[float] = []
        self._active: set[str] = set()
        self._streak: Counter[str] = Counter()  # logs in a row that speak against what is settled

    def on_train_begin(self, args, state, control, **kwargs):
        self._forget()
        for logs in state.log_history:
            self._remember(_numbers(logs))
        if _updates_once(args) and _picked(args) != "penalised":
            steps, accumulation = args.steps_per_generation, args.gradient_accumulation_steps
            settings = f"steps_per_generation == gradient_accumulation_steps == {steps}"
            if steps != accumulation:
                settings = f"steps_per_generation={steps}, gradient_accumulation_steps={accumulation}"
            more = 2 * max(args.num_iterations, accumulation // steps)
            say(
                args,
                f"rlloss: every importance ratio is 1, because a generation is used for one update (num_iterations="
                f"{args.num_iterations}, {settings}), so no clip can act; num_iterations={more} changes that.",
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        metrics = _numbers(logs or {})
        points = self._on_policy(metrics, args) | self._rewards(metrics) | self._groups(metrics, args)
        if "entropy/p80" in metrics:
            points |= self._low_entropy(metrics["entropy/p80"], args)
        if self._remember(metrics):
            points |= self._entropy(args)
        for kind, message in points.items():
            self._settle(kind, message, state)

    def _settle(self, kind: str, message: str | None, state) -> None:
        """message: what is wrong; None: nothing."""
        if (message is not None) == (kind in self._active):
            self._streak[kind] = 0
            return
        self._streak[kind] += 1
        if self._streak[kind] < self.patience:
            return
        self._streak[kind] = 0
        if message is None:
            self._active.remove(kind)
            return
        self._active.add(kind)
        self.findings.append(Finding(state.global_step, kind, message))
        if state.is_world_process_zero:
            logger.warning("Step %d: %s", state.global_step, message)

    def _remember(self, metrics: dict[str, float]) -> bool:
        """Whether the log has an entropy."""
        entropy = next((metrics[name] for name in ENTROPY if name in metrics), None)
        if entropy is None:
            return False
        if len(self._first) < self.start_logs:
            self._first.append(entropy)
        self._recent = [*self._recent, entropy][-self.window :]
        return True

    def _entropy(self, args) -> dict[str, str | None]:
        n = len(self._recent)
        if n < MIN_LOGS:
            return {}
        line, start = trend(self._recent), statistics.fmean(self._first)
        low = self.collapse_share * start
        high = max(self.explosion_factor * start, self.explosion_entropy)
        falls, rises = line.after(n) <= low, line.after(n) >= high
        # Made on a slope that is sure; taken back halfway to the start, so that noise at the limit does not repeat it.
        if "entropy_collapse" in self._active:
            collapses = falls or line.last <= (low + start) / 2
        else:
            collapses = line.last <= low or (falls and line.falls(self.significance))
        if "entropy_explosion" in self._active:
            explodes = rises or line.last >= (high + start) / 2
        else:
            explodes = line.last >= high or (rises and line.rises(self.significance))
        collapse = explosion = None
        if collapses:
            collapse = (
                f"the entropy collapses. {_course(line, n, start, low)}, {self.collapse_share:.0%} of the start. "
                f"{_remedies(args)}"
            )
        if explodes:
            explosion = (
                f"the entropy explodes. {_course(line, n, start, high)}. Try a smaller epsilon_high, a smaller entropy "
                "bonus, a lower learning rate or sampling temperature, or a KL penalty (beta)."
            )
        return {"entropy_collapse": collapse, "entropy_explosion": explosion}

    def _low_entropy(self, p80: float, args) -> dict[str, str | None]:
        message = f"80 % of the tokens have an entropy of at most {p80:.3g} nats (limit {self.low_p80:g}). "
        return {"low_entropy": message + _remedies(args) if p80 < self.low_p80 else None}

    def _on_policy(self, metrics: dict[str, float], args) -> dict[str, str | None]:
        if ON_POLICY_SHARE not in metrics or (_updates_once(args) and _picked(args) != "penalised"):
            return {}
        found = metrics[ON_POLICY_SHARE] >= self.on_policy_share
        why = f"{metrics[ON_POLICY_SHARE]:.1%} of the tokens have the importance ratio 1"
        kind, effect = "on_policy", "no clip can act, so epsilon_low, epsilon_high and Clip-Cov change nothing"
        if _picked(args) == "penalised":
            kind, effect = (
                "kl_cov_on_policy",
                "|logp - old_logp| is 0, so the penalty of KL-Cov is 0 and changes nothing",
            )
        remedy = (
            "For more updates per generation set num_iterations > 1, or steps_per_generation > "
            "gradient_accumulation_steps."
        )
        return {kind: f"the updates are on-policy. {why}: {effect}. {remedy}" if found else None}

    def _rewards(self, metrics: dict[str, float]) -> dict[str, str | None]:
        points = {}
        for metric, value in metrics.items():
            if metric.startswith(ZERO_VARIANCE):
                name = metric.removeprefix(ZERO_VARIANCE)
                found, why = (
                    value >= self.zero_variance_share,
                    f"in {value:.1%} of the groups all completions got the same",
                )
            elif metric.startswith("rewards/") and metric.endswith("/std"):
                name = metric.removeprefix("rewards/").removesuffix("/std")
                if ZERO_VARIANCE + name in metrics:
                    continue
                found, why = value == 0, "all completions got the same (its std is 0)"
            else:
                continue
            mean = metrics.get(f"rewards/{name}/mean")
            level = "" if mean is None else f"; its mean is {mean:.3g}"
            message = (
                f"the reward {name!r} carries no signal: {why}{level}. If it is always earned, drop it or ask more; "
                "if never, give partial credit or easier prompts; or move its weight to the others (reward_weights)."
            )
            points[f"reward/{name}"] = message if found else None
        return points

    def _groups(self, metrics: dict[str, float], args) -> dict[str, str | None]:
        of_sum = getattr(args, "multi_objective_aggregation", None) != "normalize_then_sum"
        names = (*DEAD_SHARES, "frac_reward_zero_std") if of_sum else DEAD_SHARES
        name = next((name for name in names if name in metrics), None)
        if name is None:
            return {}
        message = (
            f"nearly all groups are dead: {name} is {metrics[name]:.1%} (limit {self.dead_share:.0%}), and a group "
            "whose completions all got one reward teaches nothing. Try dynamic sampling (leave these prompts out and "
            "draw others), prompts that are solved sometimes, more generations per prompt, or a finer reward."
        )
        return {"dead_groups": message if metrics[name] >= self.dead_share else None}


def _numbers(logs: dict) -> dict[str, float]:
    """The metrics of a log that are finite numbers. (TRL logs None where a metric has no value.)"""
    return {
        name: value
        for name, value in logs.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _course(line: Trend, n: int, start: float, limit: float) -> str:
    return (
        f"At the start the mean was {start:.3g} nats; the trend of the last {n} logs stands at {line.last:.3g} and "
        f"leads to {max(line.after(n), 0.0):.3g} in {n} more; the limit is {limit:.3g}"
    )


def _picked(args) -> str | None:
    """What becomes of the tokens that its loss picks by covariance; None: it picks none."""
    row = LOSSES.get(getattr(args, "loss_type", None) or "")
    return None if row is None else row.picked


def _updates_once(args) -> bool | None:
    """Whether TRL's settings leave logp == old_logp in every update; None where they are not TRL's."""
    names = ("num_iterations", "steps_per_generation", "gradient_accumulation_steps")
    iterations, steps, accumulation = (getattr(args, name, None) for name in names)
    if not (iterations and steps and accumulation):
        return None
    return accumulation % (steps * iterations) == 0


def _remedies(args) -> str:
    """What is not in use yet; without TRL's settings, all."""
    left = []
    for text, in_use in REMEDIES:
        try:
            if in_use(args):
                continue
        except (AttributeError, TypeError):
            pass
        left.append(text)
    return f"Try {', '.join(left[:-1])}{' or ' if len(left) > 1 else ''}{left[-1]}."
