"""Test the CollapseMonitor on falling, rising and noisy entropies, on-policy updates and rewards without a signal."""

import logging
import math
import random
from types import SimpleNamespace

import pytest
import trl
from transformers import TrainerState

from rlloss.integrations.transformers.collapse_monitor import CollapseMonitor, Finding
from tests.support.trl_harness import build_trainer

TRL_ARGS = SimpleNamespace(
    epsilon=0.2, epsilon_high=None, top_entropy_quantile=1.0, loss_type="dapo", use_adaptive_entropy=False,
    entropy_coef=0.0, num_iterations=4, steps_per_generation=2, gradient_accumulation_steps=2,
    multi_objective_aggregation="sum_then_normalize",
)  # fmt: skip


def watch(series, args=TRL_ARGS, monitor=None, *, main_process=True) -> CollapseMonitor:
    """A monitor that has read these logs, one per step from step 1."""
    monitor = monitor or CollapseMonitor()
    for step, logs in enumerate(series, start=1):
        monitor.on_log(args, TrainerState(global_step=step, is_world_process_zero=main_process), None, logs=logs)
    return monitor


def entropies(values, name="entropy"):
    return [{name: value} for value in values]


def kinds(monitor) -> list[tuple[int, str]]:
    return [(finding.step, finding.kind) for finding in monitor.findings]


def noise(seed: int, n: int, correlation=0.0):
    """Standard normal numbers, each correlated with the one before."""
    r, x = random.Random(seed), 0.0
    for _ in range(n):
        x = correlation * x + math.sqrt(1 - correlation**2) * r.gauss(0, 1)
        yield x


@pytest.mark.parametrize("spread, correlation", [(0.05, 0.0), (0.2, 0.0), (0.3, 0.0), (0.1, 0.8), (0.15, 0.5)])
def test_no_alarm_on_noise(spread, correlation):
    for seed in range(20):
        values = [0.5 * max(1 + spread * x, 0.0) for x in noise(seed, 500, correlation)]
        assert watch(entropies(values)).findings == []


@pytest.mark.parametrize("scale, late", [(30, 0), (100, 0), (300, 30)])
def test_alarm_on_a_fall(scale, late):
    """The alarm comes before the limit, or if the noise hides a slow fall, at most half a window after it."""
    for seed in range(10):
        values = [0.8 * math.exp(-i / scale) * (1 + 0.1 * x) for i, x in enumerate(noise(seed, 6 * scale))]
        monitor = watch(entropies(values))
        assert [kind for _, kind in kinds(monitor)] == ["entropy_collapse"]
        assert monitor.findings[0].step < scale * math.log(1 / 0.3) + late  # where it stands at 30 % of 0.8


def test_the_numbers_of_a_falling_line():
    values = [1.0 - 0.01 * i for i in range(60)]
    found = watch(entropies(values, "entropy/mean")).findings[0]
    # The start is the mean of the first ten, 0.955, and the limit 0.2865. The line through n logs reaches 1.01 - 0.02 n
    # after n more logs: 0.29 at 36, 0.27 at 37. The third log in a row is 39.
    assert found.step == 39 and found.kind == "entropy_collapse"
    assert "At the start the mean was 0.955 nats" in found.message
    assert "the last 39 logs stands at 0.62 and leads to 0.23 in 39 more; the limit is 0.287, 30% of" in found.message
    for remedy in ("epsilon_high=0.28", "top_entropy_quantile=0.2", "'clip_cov' or 'kl_cov'", "entropy bonus", "temp"):
        assert remedy in found.message


def test_remedies_in_use_are_not_proposed():
    used = {"epsilon_high": 0.28, "loss_type": "kl_cov", "entropy_coef": 0.01}
    args = SimpleNamespace(**{**vars(TRL_ARGS), **used})
    message = watch(entropies([1.0 - 0.01 * i for i in range(60)]), args).findings[0].message
    assert "epsilon_high" not in message and "clip_cov" not in message and "bonus" not in message
    assert message.endswith(
        "Try gradients on the tokens of high entropy alone (top_entropy_quantile=0.2) or a sampling temperature that "
        "rises with the entropy."
    )


def test_an_explosion():
    monitor = watch(entropies([0.4 + 0.01 * i for i in range(150)]))
    assert [kind for _, kind in kinds(monitor)] == ["entropy_explosion"]
    assert monitor.findings[0].step < 80  # before it stands at 1.3, three times the start
    # Three times nothing is nothing.
    assert watch(entropies([0.02 + 0.001 * i for i in range(150)])).findings == []


def test_once_per_finding_and_again_after_it_came_back(caplog):
    dead, well = {"rlloss/zero_advantage_share": 0.97}, {"rlloss/zero_advantage_share": 0.4}
    series = [dead] * 2 + [well] + [dead] * 10 + [well] * 2 + [dead] * 5 + [well] * 3 + [dead] * 4
    with caplog.at_level(logging.WARNING):
        monitor = watch(series)
    # Two dead logs in a row are not three, and two others do not end the finding.
    assert kinds(monitor) == [(6, "dead_groups"), (26, "dead_groups")]
    assert isinstance(monitor.findings[0], Finding)
    assert [record.message.partition(":")[0] for record in caplog.records] == ["Step 6", "Step 26"]
    assert "zero_advantage_share is 97.0%" in caplog.text and "dynamic sampling" in caplog.text
    assert {record.name for record in caplog.records} == {"rlloss.integrations.transformers.collapse_monitor"}
    caplog.clear()
    other_rank = watch(series, main_process=False)
    assert len(other_rank.findings) == 2 and not caplog.records


def test_a_fall_that_recovers_and_falls_again():
    down, up = [1.0 - 0.01 * i for i in range(80)], [1.0] * 120
    monitor = watch(entropies(down + up + down + up))
    assert [kind for _, kind in kinds(monitor)] == ["entropy_collapse"] * 2


@pytest.mark.parametrize("share, found", [(1.0, True), (0.9995, True), (0.25, False)])
def test_on_policy_by_the_gauge(share, found):
    monitor = watch([{"rlloss/on_policy_share": share, "clip_ratio/low_mean": 0.0}] * 3)
    assert kinds(monitor) == ([(3, "on_policy")] if found else [])
    if found:
        message = monitor.findings[0].message
        assert "100.0% of the tokens have the importance ratio 1: no clip can act" in message
        assert "num_iterations > 1, or steps_per_generation > gradient_accumulation_steps" in message


@pytest.mark.parametrize("iterations, steps, accumulation, settings", [
    (1, 2, 2, "num_iterations=1, steps_per_generation == gradient_accumulation_steps == 2"),
    (1, 1, 4, "num_iterations=1, steps_per_generation=1, gradient_accumulation_steps=4"),
    (2, 2, 4, "num_iterations=2, steps_per_generation=2, gradient_accumulation_steps=4"),
    (2, 2, 2, None), (1, 4, 2, None),
])  # fmt: skip
def test_on_policy_by_the_settings_is_one_line_of_information(
    capsys, caplog, iterations, steps, accumulation, settings
):
    given = {"num_iterations": iterations, "steps_per_generation": steps, "gradient_accumulation_steps": accumulation}
    args, monitor = SimpleNamespace(**{**vars(TRL_ARGS), **given}), CollapseMonitor()
    monitor.on_train_begin(args, TrainerState(), None)
    said = capsys.readouterr().out.splitlines()
    watch([{"rlloss/on_policy_share": 1.0, "clip_ratio/low_mean": 0.0}] * 5, args, monitor)
    if settings is None:
        assert said == [] and kinds(monitor) == [(3, "on_policy")]  # a learning rate of 0, for instance
        return
    assert monitor.findings == [] and caplog.text == "" and len(said) == 1
    assert f"for one update ({settings}), so no clip can act; num_iterations=" in said[0]
    advised = int(said[0].split("num_iterations=")[-1].split()[0])
    args.num_iterations = advised  # which has to be true
    CollapseMonitor().on_train_begin(args, TrainerState(), None)
    assert capsys.readouterr().out == "" and advised > iterations


def test_kl_cov_on_policy():
    args = SimpleNamespace(**{**vars(TRL_ARGS), "loss_type": "kl_cov"})
    monitor = watch([{"rlloss/on_policy_share": 1.0}] * 3, args)
    assert kinds(monitor) == [(3, "kl_cov_on_policy")]
    args.num_iterations = 1
    assert kinds(watch([{"rlloss/on_policy_share": 1.0}] * 3, args)) == [(3, "kl_cov_on_policy")]
    assert "the penalty of KL-Cov is 0" in monitor.findings[0].message


def test_rewards_without_a_signal():
    logs = {
        "reward_resolution/zero_variance/format": 0.98, "rewards/format/mean": 1.0, "rewards/format/std": 0.1,
        "reward_resolution/zero_variance/correct": 0.5, "rewards/correct/std": 0.0,
        "rewards/judge/v2/mean": 0.25, "rewards/judge/v2/std": 0.0, "rewards/length/std": 0.2,
    }  # fmt: skip
    monitor = watch([logs] * 4)
    # The gauge of the groups has priority over the std of the batch: 'correct' varies in half of its groups.
    assert kinds(monitor) == [(3, "reward/format"), (3, "reward/judge/v2")]
    assert "'format' carries no signal: in 98.0% of the groups" in monitor.findings[0].message
    assert "its mean is 1." in monitor.findings[0].message and "its mean is 0.25." in monitor.findings[1].message


def test_dead_groups_by_trls_gauge_only_where_it_looks_at_groups():
    series = [{"frac_reward_zero_std": 1.0}] * 3
    assert kinds(watch(series)) == [(3, "dead_groups")]
    args = SimpleNamespace(**{**vars(TRL_ARGS), "multi_objective_aggregation": "normalize_then_sum"})
    assert watch(series, args).findings == []
    ours = [{"frac_reward_zero_std": 0.0, "reward_resolution/zero_advantage_groups": 0.95}] * 3
    assert kinds(watch(ours, args)) == [(3, "dead_groups")]


def test_low_entropy():
    monitor = watch([{"entropy/p80": value} for value in (0.7, 0.04, 0.04, 0.03)])
    assert kinds(monitor) == [(4, "low_entropy")]
    assert "at most 0.03 nats (limit 0.05)" in monitor.findings[0].message


def test_missing_metrics_are_no_news():
    series = [{}, {"loss": 0.1, "learning_rate": 1e-6}, {"entropy": None, "entropy/p80": math.nan},
              {"rlloss/on_policy_share": None, "rewards/a/std": math.nan,
               "rlloss/zero_advantage_share": "?"}] * 20  # fmt: skip
    assert watch(series).findings == []
    assert watch(series, SimpleNamespace()).findings == []
    # The agreeing logs need not be adjacent: evaluation logs may lie between.
    dead = {"rlloss/zero_advantage_share": 1.0}
    assert kinds(watch([dead, {"eval_loss": 1.0}, dead, {}, dead])) == [(5, "dead_groups")]


def test_thresholds_are_arguments():
    assert watch([{"entropy/p80": 0.3}], monitor=CollapseMonitor(low_p80=0.5, patience=1)).findings
    assert watch([{"rlloss/zero_advantage_share": 0.5}], monitor=CollapseMonitor(dead_share=0.5, patience=1)).findings
    falling = entropies([1.0 - 0.01 * i for i in range(60)])
    assert kinds(watch(falling, monitor=CollapseMonitor(collapse_share=0.6)))[0][0] < 39
    assert watch(falling[:45], monitor=CollapseMonitor(collapse_share=0.01)).findings == []


def test_in_a_trainer_and_after_a_resume(tmp_path, capsys):
    monitor = CollapseMonitor()
    options = {"max_steps": 3, "steps_per_generation": 1, "gradient_accumulation_steps": 1}
    constant = lambda completions, **_: [1.0] * len(completions)  # noqa: E731
    constant.__name__ = "always"
    trainer = build_trainer(trl.GRPOTrainer, trl.GRPOConfig, tmp_path, reward_funcs=[constant], **options)
    trainer.add_callback(monitor)
    trainer.train()
    assert {kind for _, kind in kinds(monitor)} == {"reward/always", "dead_groups"}
    assert capsys.readouterr().out.count("so no clip can act") == 1
    assert {step for step, _ in kinds(monitor)} == {3}

    history = [{"entropy": 1.0, "step": step} for step in range(1, 31)]
    state = TrainerState(global_step=30, log_history=history)
    monitor.on_train_begin(TRL_ARGS, state, None)
    series = entropies([0.2] * 50)
    assert "entropy_collapse" in {kind for _, kind in kinds(watch(series, monitor=monitor))}
    assert watch(series).findings == []  # without the history 0.2 is the start


@pytest.mark.parametrize("argument, message", [
    ({"window": 10}, "window: found 10, expected at least 20"),
    ({"start_logs": 0}, "start_logs: found 0, expected 1 to 20"),
    ({"collapse_share": 1.0}, r"collapse_share: found 1.0, expected a number in \(0, 1\)"),
    ({"explosion_factor": 1.0}, "explosion_factor: found 1.0, expected a number above 1"),
    ({"dead_share": 0.0}, r"dead_share: found 0.0, expected a number in \(0, 1\]"),
    ({"zero_variance_share": 1.5}, "zero_variance_share: found 1.5"),
    ({"on_policy_share": math.nan}, "on_policy_share: found nan"),
    ({"patience": 0}, "patience: found 0, expected at least 1"),
])  # fmt: skip
def test_bad_thresholds_are_named(argument, message):
    with pytest.raises(ValueError, match=message):
        CollapseMonitor(**argument)
