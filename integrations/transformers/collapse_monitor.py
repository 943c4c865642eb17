"""Watch the logs of a transformers Trainer with a callback. It warns about a collapse and says what to try.

Usage::

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
MIN_LOGS = 20  # a line fitted to fewer logs is not reliable

# Remedies against a falling entropy: the text of each, and a test whether the trainer's settings already use it.
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
    """One warning. step: the trainer's step at the log that decided it. kind: see the table of `CollapseMonitor`.
    message: the numbers and what to try."""

    step: int
    kind: str
    message: str


class CollapseMonitor(TrainerCallback):
    """Warns once about each problem that the logs show. It warns again only if the problem went away and came back.

    `findings` lists all warnings of the run, as `Finding`.

    ====================  ==============================================================================================
    kind                  condition
    ====================  ==============================================================================================
    `entropy_collapse`    A line fitted to the last `window` values of `entropy/mean` (or `entropy`) ends below
                          `collapse_share` of the start, or falls and would get there within as many logs again
    `entropy_explosion`   The line ends above both `explosion_factor` times the start and `explosion_entropy`, or rises
                          and would get there within as many logs again
    `low_entropy`         `entropy/p80` is below `low_p80`: 80 % of the tokens are nearly certain
    `on_policy`           `rlloss/on_policy_share` is high: the ratios are 1, and no clip can act. If the settings force
                          this, it is not a finding: one line says so before the first step
    `kl_cov_on_policy`    The same with loss_type="kl_cov", whose penalty is then 0
    `reward/<name>`       `reward_resolution/zero_variance/<name>` is high, or without this metric
                          `rewards/<name>/std` is 0: the reward does not distinguish completions
    `dead_groups`         `rlloss/zero_advantage_share` is high; without it `reward_resolution/zero_advantage_groups`;
                          without both `frac_reward_zero_std`, which is not read with
                          multi_objective_aggregation="normalize_then_sum", where it does not describe groups
    ====================  ==============================================================================================

    If a metric is missing, None or not finite, the state of its kind does not change. The main process writes the
    warnings to the logger `rlloss.integrations.transformers.collapse_monitor`. A resumed run first reads the
    entropies in the trainer's log history.

    Args:
        window: largest number of logs that the line is fitted to, at least 20. The fit starts at 20 logs.
        start_logs: number of first logs whose mean entropy is the start, 1 to 20.
        collapse_share: share of the entropy at the start, in (0, 1).
        explosion_factor: multiple of the entropy at the start, above 1.
        explosion_entropy: nats. A lower entropy never counts as too high.
        significance: the line is extrapolated only if its slope differs from 0 by this many standard errors.
        low_p80: nats.
        on_policy_share: share of tokens with ratio 1 from which the run counts as on-policy, in (0, 1].
        zero_variance_share: share of groups without variance from which a reward has no signal, in (0, 1].
        dead_share: share of completions, or groups, with zero advantage from which to warn, in (0, 1].
        patience: number of consecutive logs that must agree before a finding starts or ends.

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
        self._streak: Counter[str] = Counter()  # consecutive logs that contradict the present state of a kind

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
        """Start or end a finding once `patience` logs agree. message: the problem; None: there is none."""
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
        """Store the log's entropy. Return whether it has one."""
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
        # A finding needs a significant slope, and ends halfway back to the start: noise at the limit repeats nothing.
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
        kind, effect = "on_policy", "no clip can act, so epsilon_low and epsilon_high change nothing"
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
    """How the loss treats the tokens that it picks by covariance. None: it picks none."""
    row = LOSSES.get(getattr(args, "loss_type", None) or "")
    return None if row is None else row.picked


def _updates_once(args) -> bool | None:
    """Whether TRL's settings make logp == old_logp in every update. None: `args` does not have these settings."""
    names = ("num_iterations", "steps_per_generation", "gradient_accumulation_steps")
    iterations, steps, accumulation = (getattr(args, name, None) for name in names)
    if not (iterations and steps and accumulation):
        return None
    return accumulation % (steps * iterations) == 0


def _remedies(args) -> str:
    """The remedies that are not in use. All of them if `args` does not have TRL's settings."""
    left = []
    for text, in_use in REMEDIES:
        try:
            if in_use(args):
                continue
        except (AttributeError, TypeError):
            pass
        left.append(text)
    return f"Try {', '.join(left[:-1])}{' or ' if len(left) > 1 else ''}{left[-1]}."
