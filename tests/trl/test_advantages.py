"""Test advantages in the TRL integration: without options as in TRL, with options as in `group_advantage`."""

import math
from typing import Any

import pytest
import torch
import trl

from rlloss import group_advantage
from rlloss.integrations.trl.advantages import conditions_by_index
from rlloss.integrations.trl.trainer import GRPOConfig, GRPOTrainer
from rlloss.rewards.overlong import SoftOverlongPenalty
from rlloss.rewards.resolution import reward_resolution
from tests.support.trl_harness import build_trainer

G = 4
PROMPTS = ["w1 w2", "w3 w4", "w5 w6"]
GDPO = {"multi_objective_aggregation": "normalize_then_sum"}


def odd(completion_ids, **_):
    return [float(ids[0] % 2) for ids in completion_ids]


def distinct(completion_ids, **_):
    return [len(set(ids)) / 8 for ids in completion_ids]


def constant(completion_ids, **_):
    return [0.3] * len(completion_ids)


def partial(completion_ids, **_):
    """A reward that is None, not applicable, for some completions."""
    return [None if ids[0] % 3 == 0 else float(ids[0] % 2) for ids in completion_ids]


REWARDS = (odd, distinct, constant)


def build(folder, rewards=REWARDS, which: Any = (GRPOTrainer, GRPOConfig), **options) -> Any:
    options = {"num_generations": G, "per_device_train_batch_size": 12, "per_device_eval_batch_size": 12} | options
    rewards = rewards if isinstance(rewards, list) else list(rewards)
    trainer = build_trainer(which[0], which[1], folder, rewards, **options)
    trainer.model.train()
    return trainer


def generate(trainer, seed=0, size=G):
    torch.manual_seed(seed)
    return trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS for _ in range(size)])


def rewards_of(output, rewards=REWARDS):
    masks = output["completion_mask"].bool()
    ids = [row[mask].tolist() for row, mask in zip(output["completion_ids"], masks, strict=True)]
    values = [[math.nan if r is None else r for r in reward(completion_ids=ids)] for reward in rewards]
    return torch.tensor(values).T


@pytest.mark.parametrize("options", [{}, {"scale_rewards": "batch"}, {"scale_rewards": False}, GDPO])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_without_options_everything_is_trls_bit_for_bit(tmp_path, options, mode):
    options = options | {"num_iterations": 2, "reward_weights": [1.0, 2.0, 0.5], "lm_head_plan": "trl"}
    found = []
    for which in ((GRPOTrainer, GRPOConfig), (trl.GRPOTrainer, trl.GRPOConfig)):
        theirs = {name: value for name, value in options.items() if name in which[1].__dataclass_fields__}
        trainer = build(tmp_path / str(len(found)), (odd, partial, constant), which, **theirs)
        trainer.model.train(mode == "train")
        found.append((generate(trainer), trainer._metrics[mode], trainer._logs))
    ours, expected = found
    zero = (ours[0]["advantages"] == 0) & (expected[0]["advantages"].abs() < 1e-2)  # TRL leaves rounding there
    expected[0]["advantages"] = expected[0]["advantages"].masked_fill(zero, 0.0)
    assert all(torch.equal(ours[0][name], expected[0][name]) for name in expected[0])
    assert set(ours[0]) - set(expected[0]) <= {"rewards", "group_accuracy"}  # which no loss reads
    assert mode == "eval" or "old_per_token_logps" in ours[0]
    more = set(ours[1]) - set(expected[1])
    assert more and all(name.startswith("reward_resolution/") for name in more)
    assert {name: ours[1][name] for name in expected[1]} == dict(expected[1])
    assert list(ours[2]["advantages"]) == list(expected[2]["advantages"])


@pytest.mark.parametrize("options", [GDPO, {}, {"scale_rewards": "batch"}])
def test_a_group_whose_rewards_are_equal_is_dead(tmp_path, options):
    """TRL leaves rounding where 0 belongs, in proportion to the rewards: the group would not be dead."""
    G = 12

    def first(prompts, **_):
        return [90.3 if p == PROMPTS[1] else 0.7 * (i % 5) for i, p in enumerate(prompts)]

    def second(prompts, **_):
        return [0.3 if p == PROMPTS[1] else 0.1 * i * i for i, p in enumerate(prompts)]

    found = []
    for which in ((GRPOTrainer, GRPOConfig), (trl.GRPOTrainer, trl.GRPOConfig)):
        sizes = {"num_generations": G, "per_device_train_batch_size": 3 * G}
        trainer = build(tmp_path / str(len(found)), [first, second], which, **sizes, **options)
        found.append(generate(trainer, size=G)["advantages"].view(3, G))
    ours, theirs = found
    assert (ours[1] == 0).all() and (theirs[1].abs() < 0.9).all()
    assert torch.equal(ours[[0, 2]], theirs[[0, 2]]) and (ours[[0, 2]] != 0).all()


CONDITIONS = {"distinct": ["odd", 1.0]}


@pytest.mark.parametrize("options, how", [
    ({}, {}),
    ({"scale_rewards": "batch"}, {"scale": "batch"}),
    ({"scale_rewards": "none"}, {"scale": "none"}),
    (GDPO, {"method": "gdpo"}),
])  # fmt: skip
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_conditions_are_those_of_group_advantage(tmp_path, options, how, mode):
    trainer = build(tmp_path, reward_conditions=CONDITIONS, reward_weights=[1.0, 2.0, 0.5], **options)
    trainer.model.train(mode == "train")
    output = generate(trainer)
    rewards = rewards_of(output)
    plain = group_advantage(rewards, num_generations=G, weights=[1.0, 2.0, 0.5], **how)
    conditioned = torch.where(rewards[:, 0] >= 1, rewards[:, 1], 0.0)
    conditioned = torch.stack([rewards[:, 0], conditioned, rewards[:, 2]], 1)
    expected = group_advantage(conditioned, num_generations=G, weights=[1.0, 2.0, 0.5], **how)
    assert torch.equal(output["advantages"], expected) and not torch.allclose(expected, plain)
    logged = list(trainer._logs["advantages"])
    assert logged == output["advantages"].tolist()[-len(logged) :]
    assert trainer._metrics[mode]["rewards/distinct/mean"][0] == pytest.approx(rewards[:, 1].mean().item())


def test_token_weights_are_those_of_group_advantage(tmp_path, monkeypatch):
    trainer = build(tmp_path, gdpo_token_weighted=True, mask_truncated_completions=True, **GDPO)
    if not hasattr(trainer, "eos_token_ids"):
        pytest.skip("TRL < 1.15 knows one token that ends a completion, which a random model hardly samples")
    monkeypatch.setattr(trainer, "eos_token_ids", list(range(1, 48, 8)))  # some completions end, some are truncated
    output = generate(trainer)
    counts = output["completion_mask"].sum(1)
    assert 0 in counts and len(set(counts.tolist())) > 2
    # Masked completions have a reward too; here it is known from the table.
    rewards = torch.stack([torch.tensor(list(trainer._logs["rewards"][r.__name__])) for r in REWARDS], 1)
    expected = group_advantage(rewards, num_generations=G, method="gdpo", token_counts=counts)
    torch.testing.assert_close(output["advantages"], expected, rtol=1e-6, atol=1e-6)
    # The mean over tokens is 0 then, and that over completions is not.
    assert (output["advantages"] * counts).sum().abs() < 1e-4 < output["advantages"].mean().abs()


def test_token_weights_do_not_hide_groups_from_dynamic_sampling(tmp_path):
    def alive(prompts, **_):
        return [float(i % 2) if p not in PROMPTS[1:] else 0.0 for i, p in enumerate(prompts)]

    options = GDPO | {"gdpo_token_weighted": True, "dynamic_sampling_rounds": 2}
    trainer = build(tmp_path, [alive], **options)
    output = generate(trainer)
    assert trainer._metrics["train"]["dynamic_sampling/without_signal_share"] == [pytest.approx(2 / 3)]
    assert trainer._metrics["train"]["dynamic_sampling/left_share"] == [0.0]
    rewards = torch.tensor([float(i % 2) for i in range(12)])
    counts = output["completion_mask"].sum(1)
    expected = group_advantage(rewards, num_generations=G, method="gdpo", token_counts=counts)
    torch.testing.assert_close(output["advantages"], expected, rtol=1e-6, atol=1e-6)


def test_a_group_that_a_condition_levels_is_one_without_a_signal(tmp_path):
    def never(prompts, **_):
        return [0.0] * len(prompts)

    options = {"reward_conditions": {"distinct": ["never", 1.0]}, "dynamic_sampling_rounds": 1}
    trainer = build(tmp_path, [distinct, never], **options)
    assert (generate(trainer)["advantages"] == 0).all()
    assert trainer._metrics["train"]["dynamic_sampling/without_signal_share"] == [1.0]


def test_rewards_that_a_subclass_changes_are_the_ones_that_count(tmp_path):
    class Shifted(GRPOTrainer):
        def _calculate_rewards(self, *args):
            rewards = super()._calculate_rewards(*args).clone()
            rewards[:, 0] = torch.arange(len(rewards)) % 2
            return rewards

    trainer = build(tmp_path, which=(Shifted, GRPOConfig), reward_conditions=CONDITIONS)
    output = generate(trainer)
    rewards = rewards_of(output)
    rewards[:, 0] = torch.arange(12) % 2
    rewards[0::2, 1] = 0.0
    assert torch.equal(output["advantages"], group_advantage(rewards, num_generations=G))
    assert "_calculate_rewards" not in vars(trainer)


def test_a_subclass_that_scores_in_its_own_way_is_left_alone_without_options(tmp_path):
    class Rescored(GRPOTrainer):
        def _generate_once(self, inputs):
            output = super()._generate_once(inputs)
            self._calculate_rewards(inputs, PROMPTS, PROMPTS, [[1]] * 3)  # a second time
            return output | {"advantages": torch.full((12,), 0.5)}

    trainer = build(tmp_path, which=(Rescored, GRPOConfig))
    output = generate(trainer)
    assert (output["advantages"] == 0.5).all() and trainer._rewards_to_advantages.rewards is None
    trainer = build(tmp_path, which=(Rescored, GRPOConfig), reward_conditions=CONDITIONS)
    with pytest.raises(ValueError, match="_calculate_rewards: found 2 calls of it, expected one per generation batch"):
        generate(trainer)


@pytest.mark.parametrize("weights", [None, [2.0]])
def test_soft_overlong_is_one_more_reward_function(tmp_path, weights):
    own = [distinct]
    options = {
        "soft_overlong_cache": 6,
        "reward_weights": weights,
        "reward_conditions": {"distinct": ["soft_overlong", -0.5]},
    }
    trainer = build(tmp_path, own, **options)
    assert own == [distinct] and trainer.reward_func_names == ["distinct", "soft_overlong"]
    assert trainer.reward_weights.tolist() == [*(weights or [1.0]), 1.0]
    output = generate(trainer)
    lengths = output["completion_mask"].sum(1)
    penalty = torch.tensor(SoftOverlongPenalty(8, 6)([[0] * n for n in lengths.tolist()]))
    torch.testing.assert_close(penalty, -((lengths - 2) / 6).clamp(0, 1))
    assert trainer._metrics["train"]["rewards/soft_overlong/mean"] == [pytest.approx(penalty.mean().item())]
    rewards = torch.stack([rewards_of(output, own)[:, 0], penalty], 1)
    expected = group_advantage(
        rewards, num_generations=G, weights=[*(weights or [1.0]), 1.0], conditions={0: (1, -0.5)}
    )
    assert torch.equal(output["advantages"], expected)


def test_gauges_of_the_rewards_are_logged_in_training_and_evaluation(tmp_path):
    trainer = build(tmp_path, num_generations_eval=2, max_steps=1, gauges="all")
    trainer.train()
    trainer.evaluate(trainer.train_dataset.select(range(6)))
    for prefix in ("", "eval_"):
        name = f"{prefix}reward_resolution/zero_variance/constant"
        entry = next(entry for entry in trainer.state.log_history if name in entry)
        assert entry[name] == 1.0 and entry[f"{prefix}reward_resolution/zero_variance/distinct"] < 1.0
        assert entry[f"{prefix}reward_resolution/groups"] == (3 if prefix == "" else 6)
        weights = [entry[f"{prefix}reward_resolution/effective_weight/{r.__name__}"] for r in REWARDS]
        assert sum(weights) == pytest.approx(1.0) and weights[2] == 0.0


@pytest.mark.parametrize("options, method", [
    ({}, "grpo"), ({"scale_rewards": "batch"}, "dr_grpo"), ({"scale_rewards": "none"}, "dr_grpo"), (GDPO, "gdpo"),
])  # fmt: skip
def test_gauges_are_those_of_reward_resolution(tmp_path, options, method):
    trainer = build(tmp_path, (odd, distinct, partial), reward_weights=[1.0, 3.0, 0.5], **options)
    rewards = rewards_of(generate(trainer), (odd, distinct, partial))
    names = ["odd", "distinct", "partial"]
    weights = [1.0, 3.0, 0.5]
    expected = reward_resolution(rewards, num_generations=G, weights=weights, method=method, names=names)
    found = trainer._metrics["train"]
    assert {name: found[f"reward_resolution/{name}"][0] for name in expected} == pytest.approx(expected, nan_ok=True)


def test_gauges_with_names_that_repeat_one_reward_alone_and_infinite_rewards(tmp_path):
    trainer = build(tmp_path, [odd, odd])
    generate(trainer)
    names = {name for name in trainer._metrics["train"] if name.startswith("reward_resolution/zero_variance/")}
    assert names == {"reward_resolution/zero_variance/0:odd", "reward_resolution/zero_variance/1:odd"}

    def infinite(completion_ids, **_):
        return [math.inf] * len(completion_ids)

    for rewards in ([odd], [odd, infinite]):
        trainer = build(tmp_path, rewards)
        generate(trainer)
        assert not any(name.startswith("reward_resolution/") for name in trainer._metrics["train"])


def test_conditions_by_name_are_conditions_by_index():
    names = ["length", "correct", "format"]
    assert conditions_by_index(None, ["length"]) is None
    conditions = {"length": ["correct", 1], "format": ("length", -0.5)}
    assert conditions_by_index(conditions, names) == [(0, 1, 1.0), (2, 0, -0.5)]


@pytest.mark.parametrize("conditions, names, message", [
    ({"a": ["b", 1.0]}, ["a"], "expected None with one reward function, a"),
    ({}, ["a", "b"], "found {}, expected at least one condition"),
    ({"c": ["b", 1.0]}, ["a", "b"], "found 'c', expected one of 'a', 'b'"),
    ({"a": ["c", 1.0]}, ["a", "b"], "found 'c', expected one of 'a', 'b'"),
    ({"a": ["b", 1.0]}, ["a", "b", "b"], "found b, expected the name of one reward function"),
    ({"a": ["a", 1.0]}, ["a", "b"], "expected a condition on another reward"),
    ({"a": "b"}, ["a", "b"], "expected {\"reward\": .*threshold"),
    ({"a": ["b"]}, ["a", "b"], "threshold"),
    ({"a": ["b", "high"]}, ["a", "b"], "threshold"),
    ({"a": ["b", True]}, ["a", "b"], "threshold"),
    ({"a": ["b", math.nan]}, ["a", "b"], "threshold"),
])  # fmt: skip
def test_conditions_that_do_not_fit_raise(conditions, names, message):
    with pytest.raises(ValueError, match=f"reward_conditions: .*{message}"):
        conditions_by_index(conditions, names)


def test_reward_functions_that_do_not_fit_raise_when_the_trainer_is_made(tmp_path):
    with pytest.raises(ValueError, match="found 'length', expected one of 'odd', 'distinct'"):
        build(tmp_path, reward_conditions={"length": ["odd", 1.0]})
    with pytest.raises(ValueError, match="soft_overlong_cache: found 2, expected None with a reward function that is"):
        build(tmp_path, [SoftOverlongPenalty(8, 2)], soft_overlong_cache=2)


def test_trls_own_config_works_too(tmp_path):
    trainer = build(tmp_path, which=(GRPOTrainer, trl.GRPOConfig))
    assert generate(trainer)["advantages"].shape == (12,)
