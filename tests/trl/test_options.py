"""Test that every option of rlloss works in GRPOConfig, on the command line and in YAML, and raises without effect."""

import dataclasses
import json
import logging
import math

import pytest
import torch
import trl
import trl.trainer.grpo_trainer
import yaml

from rlloss.integrations.transformers.collapse_monitor import CollapseMonitor
from rlloss.integrations.trl.metrics import OURS, ours
from rlloss.integrations.trl.train import parse
from rlloss.integrations.trl.trainer import GRPOConfig, GRPOTrainer
from rlloss.report.run_report import write_run_report
from tests.support.trl_harness import WithTrlsLoss, build_trainer

TWO_LEVEL = {"rule": "two_level", "high": 1.4, "low": 0.8, "cutoff": 3.0}
BY_ENTROPY = {"top_entropy_quantile": 0.2}
BONUS = {"entropy_coef": 0.01, "use_adaptive_entropy": False}
# Option -> (a value, further options that it needs).
OPTIONS = {
    "epsilon_low": (0.1, {}),
    "entropy_denominator": ("kept", BY_ENTROPY),
    "max_log_ratio": (10.0, {}),
    "exact_k": (True, BY_ENTROPY),
    "entropy_scope": ("generation", BY_ENTROPY),
    "entropy_bonus_tokens": ("all", BY_ENTROPY | BONUS),
    "covariance": ({"ratio": 0.1, "scope": "generation"}, {"loss_type": "kl_cov"}),
    "dynamic_temperature": (TWO_LEVEL, {}),
    "dynamic_sampling_rounds": (2, {}),
    "reward_conditions": ({"long": ["short", 1.0]}, {}),
    "gdpo_token_weighted": (True, {"multi_objective_aggregation": "normalize_then_sum"}),
    "soft_overlong_cache": (4, {}),
    "gauges": ("all", {}),
    "zero_advantage": ("drop", {}),
    "lm_head_plan": ("keep", {}),
    "lm_head_memory_budget": (1000, {}),
    "collapse_monitor": (False, {}),
    "token_log_steps": (1, {}),
}


def short(completion_ids, **_):
    return [float(len(ids) < 8) for ids in completion_ids]


def long(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def test_the_table_above_knows_every_option_and_all_else_is_trls():
    ours, theirs = ({f.name: f.default for f in dataclasses.fields(of)} for of in (GRPOConfig, trl.GRPOConfig))
    assert set(OPTIONS) == set(ours) - set(theirs)
    assert all(ours[name] == default for name, default in theirs.items())


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_comes_from_the_command_line_and_from_yaml(tmp_path, name):
    value, more = OPTIONS[name]
    base = {"model": "m", "dataset": "d", "output_dir": str(tmp_path), "use_cpu": True}
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump({**base, **more, name: value}))
    assert getattr(parse(["--config", str(file)])[1], name) == value
    argv = [x for key, v in base.items() if key != "use_cpu" for x in (f"--{key}", str(v))] + ["--use_cpu"]
    for key, v in {**more, name: value}.items():
        argv += [f"--{key}", json.dumps(v) if isinstance(v, dict) else str(v)]
    assert getattr(parse(argv)[1], name) == value


@pytest.mark.parametrize("name", OPTIONS)
def test_a_trainer_takes_every_option_and_trains(tmp_path, name):
    value, more = OPTIONS[name]
    trainer = build_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, [short, long], max_steps=1, num_iterations=2, **more, **{name: value}
    )
    assert trainer._why_trls_own() is None
    trainer.train()
    assert "rlloss/live_share" in trainer.state.log_history[0]


NO_EFFECT = [
    ({"covariance": {"ratio": 0.1}}, "covariance: found .*expected None with loss_type='dapo'"),
    ({"loss_type": "kl_cov", "covariance": {"low": 0.5}}, "covariance.low: found 0.5.*no effect with.*kl_cov"),
    ({"loss_type": "clip_cov", "covariance": {"kl_coef": 0.5}}, "covariance.kl_coef: found 0.5.*no effect"),
    ({"loss_type": "clip_cov", "covariance": {"rate": 0.5}}, "covariance: found 'rate', expected one of 'ratio'"),
    ({"loss_type": "kl_cov", "covariance": {"ratio": 2.0}}, r"covariance.ratio: found 2.0, expected a number in \(0"),
    ({"loss_type": "kl_cov", "delta": 4.0}, "delta: found 4.0, expected none: leave it out"),
    ({"loss_type": "kl_cov", "epsilon_low": 0.1}, "epsilon_low: found 0.1, expected none: leave it out"),
    ({"loss_type": "kl_cov", "epsilon_high": 0.28}, "epsilon_high: found 0.28, expected none: leave it out"),
    ({"loss_type": "clip_cov", "importance_sampling_level": "sequence"}, "ratio_level: found sequence, expected none"),
    ({"exact_k": True}, "exact_k: found True.*no effect with top_entropy_quantile=1.0"),
    ({"entropy_scope": "window"}, "entropy_scope: found 'window', expected 'microbatch' with top_entropy_quantile=1"),
    ({"entropy_scope": "batch", "top_entropy_quantile": 0.2}, "entropy_scope: found 'batch', expected one of"),
    ({"entropy_scope": "window", "top_entropy_quantile": 0.2, "gradient_accumulation_steps": 2,
      "steps_per_generation": 3}, "entropy_scope: found 'window'.*would reach into a generation"),
    ({"entropy_bonus_tokens": "all"}, "entropy_bonus_tokens: found 'all', expected 'kept' without an entropy bonus"),
    ({"entropy_bonus_tokens": "all", "entropy_coef": 0.1}, "entropy_bonus_tokens.*no effect with top_entropy_quanti"),
    ({"dynamic_temperature": {"rule": "hot"}}, "rule: found 'hot', expected one of 'two_level'"),
    ({"dynamic_temperature": TWO_LEVEL, "temperature": 0.8}, "temperature: found 0.8, expected 1.0 with dynamic"),
    ({"dynamic_temperature": TWO_LEVEL, "lm_head_plan": "trl"}, "dynamic_temperature: found .*lm_head_plan='trl'"),
    ({"dynamic_temperature": {**TWO_LEVEL, "low": 0.0}}, "dynamic_temperature: found .*temperatures above 0"),
    ({"zero_advantage": "drop", "loss_type": "clip_cov"}, "zero_advantage: found 'drop'.*loss_type='clip_cov', whose"),
    ({"zero_advantage": "drop", "top_entropy_quantile": 0.2}, "zero_advantage: found 'drop'.*quantile=0.2, whose"),
    ({"token_log_steps": -1}, "token_log_steps: found -1, expected at least 0"),
    ({"entropy_denominator": "kept"}, "entropy_denominator: found 'kept'.*no effect with top_entropy_quantile=1.0"),
    ({"entropy_denominator": "kept", "loss_type": "luspo", "top_entropy_quantile": 0.5}, "'luspo', which divides by B"),
    ({"loss_type": "gmpo"}, "loss_type: found 'gmpo', expected one of 'grpo', 'bnpo', .*'vespo'.*'clip_cov'"),
    ({"importance_sampling_level": "word"}, "importance_sampling_level: found 'word'"),
    ({"gdpo_token_weighted": True}, "gdpo_token_weighted: found True, expected False with multi_"),
    ({"soft_overlong_cache": 9}, "soft_overlong_cache: found 9, expected 0 to max_completion_length = 8"),
    ({"soft_overlong_cache": -1}, "soft_overlong_cache: found -1"),
]  # fmt: skip


def test_an_option_without_effect_raises_before_a_model_is_loaded(tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(trl.trainer.grpo_trainer, "create_model_from_path", load)
    for options, message in NO_EFFECT:
        with pytest.raises(ValueError, match=message):
            build_trainer(GRPOTrainer, GRPOConfig, tmp_path, **options)
    with pytest.raises(AssertionError, match="the model was loaded"):
        build_trainer(GRPOTrainer, GRPOConfig, tmp_path)


@pytest.mark.parametrize("options", [
    {"exact_k": True, "top_entropy_quantile": 0.2}, {"entropy_scope": "generation", "top_entropy_quantile": 0.2},
    {"entropy_bonus_tokens": "all", "top_entropy_quantile": 0.2, "entropy_coef": 0.1}, {"token_log_steps": 1},
    {"dynamic_temperature": TWO_LEVEL, "top_entropy_quantile": 0.2},
], ids=str)  # fmt: skip
def test_with_trls_own_loss_they_raise(tmp_path, options):
    settings = {"top_entropy_quantile": 0.5} | options
    with pytest.raises(ValueError, match="get_high_entropy_mask overridden, where the loss is TRL's own"):
        build_trainer(WithTrlsLoss, GRPOConfig, tmp_path, **settings)


def test_covariance_losses_drop_dead_completions_where_the_pick_is_made_before(tmp_path):
    covariance = {"ratio": 0.1, "low": 0.1, "scope": "generation"}
    trainer = build_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, [short, long], zero_advantage="drop", loss_type="clip_cov", num_iterations=2,
        covariance=covariance, top_entropy_quantile=0.5, entropy_scope="generation", max_steps=2,
    )  # fmt: skip
    trainer.train()
    assert len(trainer.state.log_history) == 3


def test_a_run_writes_what_the_report_reads(tmp_path):
    trainer = build_trainer(
        GRPOTrainer, GRPOConfig, tmp_path / "run", [short, long], token_log_steps=2, max_steps=4, num_iterations=2,
        loss_type="clip_cov", covariance={"ratio": 0.2, "low": 0.01, "high": 9.0}, top_entropy_quantile=0.5,
        learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    lines = (tmp_path / "run/tokens/process-00000.jsonl").read_text().splitlines()
    completions = [json.loads(line) for line in lines]
    assert [c["step"] for c in completions] == [0] * 4 + [2] * 4
    assert all(set(c["rewards"]) == {"short", "long"} for c in completions)
    for c in completions:
        assert len(c["tokens"]) == len(c["entropy"]) == len(c["state"]) and c["prompt"].startswith("w")
        assert c["rewards"]["long"] == len([s for s in c["state"] if s != "m"])
    logs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [log["step"] for log in logs[:4]] == [1, 2, 3, 4] and logs[0]["entropy/p80"] > 0
    live = sum(s in "lp" for c in completions[4:] for s in c["state"])
    tokens = sum(s != "m" for c in completions[4:] for s in c["state"])
    assert live / tokens == pytest.approx(logs[2]["rlloss/live_share"])
    page = write_run_report(tmp_path / "run")
    assert page.read_text().count("<html") == 1


def test_the_monitor_is_there_unless_it_is_not_wanted_or_given(tmp_path, caplog, capsys):
    def monitors(trainer):
        return [c for c in trainer.callback_handler.callbacks if isinstance(c, CollapseMonitor)]

    constant = [lambda completions, **_: [1.0] * len(completions)]
    trainer = build_trainer(GRPOTrainer, GRPOConfig, tmp_path / "with", constant, max_steps=4)
    assert len(monitors(trainer)) == 1
    with caplog.at_level(logging.WARNING, "rlloss.integrations.transformers.collapse_monitor"):
        trainer.train()
    assert {finding.kind for finding in monitors(trainer)[0].findings} == {"dead_groups", "reward/<lambda>"}
    assert "nearly all groups are dead" in caplog.text and "no clip can act" not in caplog.text
    assert capsys.readouterr().out.count("no clip can act; num_iterations=2 changes that.") == 1
    without = build_trainer(GRPOTrainer, GRPOConfig, tmp_path / "without", collapse_monitor=False)
    assert not monitors(without)


def test_gauges_by_the_accuracy_of_the_group(tmp_path):
    """The accuracy of a group comes from the first reward, if that is an accuracy."""
    right = [lambda completion_ids, **_: [float(ids[0] % 2) for ids in completion_ids], long]
    right[0].__name__ = "right"
    trainer = build_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, right, per_device_train_batch_size=16, num_generations=4, max_steps=2,
        num_iterations=2, gauges="all",
    )  # fmt: skip
    trainer.train()
    bins = ("hardest", "hard", "easy", "easiest")
    log = trainer.state.log_history[0]
    found = {name: log[f"cov/logp_advantage/{name}"] for name in bins if f"cov/logp_advantage/{name}" in log}
    assert found
    accuracy = torch.cat([inputs["group_accuracy"] for inputs in trainer._buffered_inputs])
    expected = {bins[min(int(a * 4), 3)] for a in accuracy.tolist()}
    assert set(found) == expected


def test_gauges_basic_and_all(tmp_path):
    """Gauges "basic" are a part of "all", TRL's own metrics stay, and all logs have the same order of keys."""
    # The second log begins within a generation, so that its metrics come in another order.
    options = {"max_steps": 4, "num_iterations": 3, "logging_steps": 2, "top_entropy_quantile": 0.5}
    logs = {}
    for name, trainer_class, config_class, more in (
        ("trl", trl.GRPOTrainer, trl.GRPOConfig, {}),
        ("basic", GRPOTrainer, GRPOConfig, {}),
        ("all", GRPOTrainer, GRPOConfig, {"gauges": "all"}),
    ):
        trainer = build_trainer(trainer_class, config_class, tmp_path / name, [short, long], **options, **more)
        trainer.train()
        logs[name] = [log for log in trainer.state.log_history if "entropy" in log]
    theirs, basic, everything = ({key for log in logs[name] for key in log} for name in logs)
    assert theirs < basic < everything
    assert basic - theirs == {
        "rlloss/live_share", "rlloss/zero_advantage_share", "rlloss/on_policy_share", "rlloss/products",
        "rlloss/products_plain", "rlloss/logits_mib_avoided", "entropy/p50", "entropy/p80", "entropy/p95",
        "entropy/cutoff", "entropy/kept_share", "cov/logp_advantage", "reward_resolution/zero_variance/short",
        "reward_resolution/zero_variance/long",
    }  # fmt: skip
    assert {ours(key) for key in everything - theirs} <= OURS.keys()
    assert {"rlloss/approx_kl", "cov/entropy_change_slope", "reward_resolution/groups"} <= everything
    for name in ("basic", "all"):
        place = {}  # of every pair of keys that some log has, one order
        for log in logs[name]:
            keys = [key for key in log if key not in ("epoch", "step")]
            for i, first in enumerate(keys):
                for second in keys[i + 1 :]:
                    assert place.setdefault(frozenset((first, second)), first) == first
            last_of_theirs = max(i for i, key in enumerate(keys) if key in theirs)
            assert all(ours(key) is None for key in keys[: last_of_theirs + 1])
            assert not any(log[key] is None or math.isnan(log[key]) for key in keys if key not in theirs)


def test_a_number_that_is_not_there_is_not_logged(tmp_path, monkeypatch):
    """A constant reward has no correlation."""
    rewards = [short, lambda completions, **_: [1.0] * len(completions)]
    trainer = build_trainer(GRPOTrainer, GRPOConfig, tmp_path, rewards, gauges="all", max_steps=1)
    empty, bring = set(), trainer._log_order.bring

    def watched(metrics, gauges):
        empty.update(name for name, values in metrics.items() if all(map(math.isnan, values)))
        bring(metrics, gauges)

    monkeypatch.setattr(trainer._log_order, "bring", watched)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert any("correlation" in name for name in empty) and "reward_resolution/groups" in logged
    assert not {name for name in empty if ours(name)} & set(logged)
