"""Test the reward resolution gauges: by hand, by enumeration in 60 digits, against TRL's gauge and verl's GDPO.

``python tests/rewards/test_resolution.py`` prints the table of distinct advantages as Markdown.
"""

import itertools
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from rlloss.rewards.advantages import METHODS, group_advantage
from rlloss.rewards.resolution import group_accuracy, resolution_table, reward_resolution
from tests.losses import test_peers

NAN = math.nan
PAPER_PAIRS = [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]  # totals (0,1), (0,2), (1,2)
verl = test_peers.verl  # its fixture


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_gauges(found, **expected):
    names = {"weight": "effective_weight", "flat": "zero_variance", "correlation": "correlation"}
    for name, value in expected.items():
        kind, _, rest = name.partition("_")
        key = f"{names[kind]}/{rest.replace('_', '/')}" if kind in names else name
        assert found[key] == pytest.approx(value, rel=1e-12, abs=1e-12, nan_ok=True), key


def test_the_papers_example():
    found = reward_resolution(f64(PAPER_PAIRS), num_generations=2)
    assert_gauges(
        found, groups=3, distinct_rewards=3, distinct_advantages=2, distinct_advantages_grpo=1,
        zero_advantage_groups=0, flat_0=1 / 3, flat_1=1 / 3, weight_0=0.5, weight_1=0.5, correlation_0_1=0.5,
    )  # fmt: skip
    assert len(found) == 10


@pytest.mark.parametrize(
    "method, distinct, first",
    [
        # Of the first reward in groups 1 and 2: x a = 2 * 2, 2 * 3 of sums a^2 = 4 + 9 + 1, in units of 2 z^2.
        ("gdpo", 3, 10 / 14),
        # Totals 0 2, 0 3, 2 3: one advantage, to which it gives 1, 2/3 and 0.
        ("grpo", 1, 5 / 9),
        # a = 1, 3/2, 1/2; x = 1, 1, 0.
        ("dr_grpo", 3, 2.5 / 3.5),
        ("rloo", 3, 2.5 / 3.5),
    ],
)
def test_weights_two_to_one(method, distinct, first):
    found = reward_resolution(
        f64(PAPER_PAIRS), num_generations=2, weights=[2.0, 1.0], method=method, names=["correct", "formed"]
    )
    assert_gauges(
        found, distinct_advantages=distinct, distinct_advantages_grpo=1, weight_correct=first, weight_formed=1 - first,
        correlation_correct_formed=0.5,
    )  # fmt: skip


def test_rewards_that_carry_nothing():
    # The second is constant in both groups, the third missing in the first and present once in the second.
    rows = f64([[0, 5, NAN], [1, 5, NAN], [1, 3, 7], [1, 3, NAN]])
    found = reward_resolution(rows, num_generations=2)
    assert_gauges(
        found, groups=2, distinct_rewards=2, distinct_advantages=2, zero_advantage_groups=0.5, flat_0=0.5, flat_1=1,
        flat_2=1, weight_0=1, weight_1=0, weight_2=0, correlation_0_1=NAN, correlation_0_2=NAN,
    )  # fmt: skip
    # A NaN counts as 0 in GRPO's sum: 4, 4 there, but 11, 4 with the seven.
    found = reward_resolution(rows, num_generations=2, method="grpo")
    assert_gauges(found, zero_advantage_groups=0, weight_0=0.5, weight_1=0, weight_2=0.5)


def test_opposed_rewards_leave_nothing():
    rows = f64([[0, 1], [1, 0], [0.3, 0.7], [0.9, 0.1]])
    for method in METHODS:
        found = reward_resolution(rows, num_generations=2, method=method)
        assert_gauges(
            found, distinct_advantages=1, zero_advantage_groups=1, flat_0=0, flat_1=0, weight_0=NAN, weight_1=NAN,
            correlation_0_1=-1,
        )  # fmt: skip
    # Outvoted: x = (-1, 1) and 3 (1, -1) sum to a = 2 (1, -1), and x a / a^2 = -1/2 and 3/2.
    found = reward_resolution(rows[:2], num_generations=2, method="dr_grpo", weights=[1.0, 3.0])
    assert_gauges(found, weight_0=-0.5, weight_1=1.5)


def test_order_and_rounding_make_no_difference():
    # 0.1 + 0.2 and 0.3 + 0 are one sum, in fp32 as in fp64; the std of such a group is no signal.
    for dtype in (torch.float32, torch.float64):
        rows = torch.tensor([[0.1, 0.2], [0.3, 0.0], [0.3, 0.0], [0.1, 0.2]], dtype=dtype)
        found = reward_resolution(rows, num_generations=2, method="grpo")
        assert_gauges(found, distinct_rewards=1, distinct_advantages=1, zero_advantage_groups=1, flat_0=0)
    # Means of a batch of judges: equal on paper, off by one rounding.
    third = torch.tensor([1 / 3, 1 / 3 + 3e-8, 1 / 3, 1.0])[:, None]
    assert third[0] != third[1]
    assert_gauges(reward_resolution(third, num_generations=2), flat_0=0.5, distinct_advantages=2)
    # A difference of a thousandth of the reward counts as a difference.
    small = f64([1000.0, 1001.0])
    assert_gauges(reward_resolution(small, num_generations=2), flat_0=0, zero_advantage_groups=0, weight_0=1)


def test_sums_are_the_advantages_of_group_advantage():
    """Dead groups and weights against `group_advantage`, from rewards of few values with many missing."""
    g = torch.Generator().manual_seed(0)
    dead_groups = 0
    for G, method in itertools.product((2, 3, 5), METHODS):
        rewards = torch.randint(0, 3, (40 * G, 3), generator=g).double() / 2
        rewards[torch.rand(rewards.shape, generator=g) < 0.3] = NAN
        weights = [1.0, 0.5, 2.0]
        found = reward_resolution(rewards, num_generations=G, method=method, weights=weights)
        eps = {"eps": 0.0} if method in ("grpo", "gdpo") else {}
        advantage = group_advantage(rewards, num_generations=G, method=method, weights=weights, **eps)
        dead = (advantage.view(40, G).abs() < 1e-9).all(1)
        assert found["zero_advantage_groups"] == dead.double().mean().item()
        dead_groups += int(dead.sum())
        rounded = {
            tuple(sorted(row)) for row in (advantage.view(40, G) / advantage.abs().max()).mul(1e6).round().tolist()
        }
        assert found["distinct_advantages"] == len(rounded)
        assert sum(found[f"effective_weight/{k}"] for k in range(3)) == pytest.approx(1)
    assert dead_groups > 0


def test_trls_gauge_is_ours_for_sums_and_blind_to_groups_otherwise(tmp_path):
    trl = pytest.importorskip("trl")
    from tests.support.trl_harness import build_trainer, scored

    trainer = build_trainer(trl.GRPOTrainer, trl.GRPOConfig, tmp_path)
    trainer.model.train()

    def trl_gauge(rewards, G, aggregation):
        scored(trainer, rewards, G, aggregation)
        return trainer._metrics["train"]["frac_reward_zero_std"][-1]

    g = torch.Generator().manual_seed(0)
    for G in (2, 4):
        rewards = torch.randint(0, 2, (16 * G, 2), generator=g).float()
        ours = reward_resolution(rewards, num_generations=G, method="grpo")["zero_advantage_groups"]
        assert trl_gauge(rewards, G, "sum_then_normalize") == pytest.approx(ours)
        ours = reward_resolution(rewards, num_generations=G, method="gdpo")["zero_advantage_groups"]
        assert ours > 0 and trl_gauge(rewards, G, "normalize_then_sum") == 0


@pytest.mark.parametrize("weights", [None, [2.0, 1.0]])
def test_gdpo_a_constant_reward_changes_nothing(weights):
    # The other's +-z, whatever its weight: the std of the batch divides the weight out.
    rows = f64([[0, 0.1], [1, 0.1], [1, 0.7], [0, 0.7]])
    found = group_advantage(rows, num_generations=2, method="gdpo", weights=weights, eps=0.0)
    torch.testing.assert_close(found, f64([-1, 1, 1, -1]) * math.sqrt(3 / 4), rtol=1e-14, atol=0)


def test_gdpo_a_reward_of_one_sample_beside_a_whole_one():
    # x of the second reward is 0 where it is seen once; in the other group both normalise to +-z: x = -z z -2z 2z.
    rows = f64([[0, NAN], [1, 9], [0, 3], [1, 4]])
    found = group_advantage(rows, num_generations=2, method="gdpo", eps=0.0)
    torch.testing.assert_close(found, f64([-1, 1, -2, 2]) / math.sqrt(10 / 3), rtol=1e-14, atol=0)


def test_gdpo_a_priority_by_condition_where_weights_do_not_give_one():
    # (correct, well-formed): by 1:1 the malformed correct answer (x = z - 3 z', z' = sqrt(1 / 3) z) is below the
    # well-formed wrong ones (-z + z'); by a condition on correctness its format counts 0 as theirs does.
    rows = f64([[1, 1], [1, 0], [0, 1], [0, 1]])
    z = math.sqrt(3) / 2
    x = f64([z + 0.5, z - 1.5, 0.5 - z, 0.5 - z])
    plain = group_advantage(rows, num_generations=4, method="gdpo", eps=0.0)
    torch.testing.assert_close(plain, x / x.std(), rtol=1e-14, atol=0)
    assert plain[1] < plain[2]
    # Format becomes 1 0 0 0: +3/2, -1/2.
    x = f64([z + 1.5, z - 0.5, -z - 0.5, -z - 0.5])
    conditioned = group_advantage(rows, num_generations=4, method="gdpo", eps=0.0, conditions={1: (0, 1.0)})
    torch.testing.assert_close(conditioned, x / x.std(), rtol=1e-14, atol=0)
    assert conditioned[1] > conditioned[2]


def test_gdpo_batch_norm_by_samples_and_by_tokens():
    # Groups (0, 1) and a dead one; x = -s, s, 0, 0 with s = sqrt(1 / 2).
    rows, tokens = f64([0.0, 1.0, 2.0, 2.0]), torch.tensor([1, 3, 2, 2])
    by_samples = group_advantage(rows, num_generations=2, method="gdpo", eps=0.0)
    torch.testing.assert_close(by_samples, f64([-1, 1, 0, 0]) * math.sqrt(3 / 2), rtol=1e-14, atol=0)
    # By tokens: m = 2 s / 8, variance ((5/4)^2 + 3 (3/4)^2 + 4 (1/4)^2) s^2 / 7 = (3.5 / 7) s^2: the dead group moves.
    by_tokens = group_advantage(rows, num_generations=2, method="gdpo", eps=0.0, token_counts=tokens)
    torch.testing.assert_close(by_tokens, f64([-5, 3, -1, -1]) / 4 * math.sqrt(2), rtol=1e-14, atol=0)


def test_verls_gdpo_is_ours_by_tokens(verl):
    g = torch.Generator().manual_seed(0)
    for G, weights in ((2, None), (4, [2.0, 1.0])):
        N, T = 6 * G, 9
        rewards = torch.stack([torch.randint(0, 2, (N,), generator=g).float(), torch.rand(N, generator=g)], dim=1)
        lengths = torch.randint(1, T + 1, (N,), generator=g)
        mask = (torch.arange(T) < lengths[:, None]).float()
        theirs = verl.compute_gdpo_outcome_advantage(
            torch.zeros(N, T), mask, np.arange(N) // G, config={"gdpo_reward_keys": ["a", "b"],
            "gdpo_reward_weights": weights}, non_tensor_batch={"a": rewards[:, 0].numpy(), "b": rewards[:, 1].numpy()},
            batch={"prompts": torch.zeros(N, 1), "attention_mask": torch.cat([torch.ones(N, 1), mask], 1).long()},
        )[0]  # fmt: skip
        ours = group_advantage(
            rewards, num_generations=G, method="gdpo", weights=weights, eps=1e-6, token_counts=lengths
        )  # fmt: skip
        torch.testing.assert_close(ours[:, None] * mask, theirs, rtol=1e-5, atol=1e-5)


def in_sixty_digits(num_rewards: int, G: int) -> tuple[int, ...]:
    """Numbers of distinct (groups, GRPO advantages, GRPO without the std, GDPO), compared to 40 digits."""
    seen = [set(), set(), set()]
    vectors = list(itertools.product((0, 1), repeat=num_rewards))
    groups = list(itertools.combinations_with_replacement(vectors, G))
    with localcontext() as context:
        context.prec = 60

        def deviations(values):
            mean = Decimal(sum(values)) / G
            return [v - mean for v in values]

        def normalised(values):
            centred = deviations(values)
            std = (sum((d * d for d in centred), Decimal(0)) / (G - 1)).sqrt()
            return [d / std if len(set(values)) > 1 else Decimal(0) for d in centred]

        for group in groups:
            totals = [sum(vector) for vector in group]
            columns = [normalised([vector[k] for vector in group]) for k in range(num_rewards)]
            advantages = (normalised(totals), deviations(totals), [sum(x) for x in zip(*columns, strict=True)])
            for distinct, advantage in zip(seen, advantages, strict=True):
                # Adding 0 turns a -0 into 0.
                distinct.add(tuple(sorted(round(a, 40) + 0 for a in advantage)))
    return len(groups), *map(len, seen)


@pytest.mark.parametrize("num_rewards, sizes", [(1, (2, 4, 7)), (2, (2, 3, 4, 5, 6, 8, 10)), (3, (2, 3, 4)), (4, (3,))])
def test_the_table_in_sixty_digits(num_rewards, sizes):
    for row in resolution_table(num_rewards, sizes):
        exact = in_sixty_digits(num_rewards, row.group_size)
        assert (row.rewards, row.grpo, row.dr_grpo, row.gdpo) == exact


def test_the_table():
    rows = resolution_table()
    assert [row.group_size for row in rows] == [2, 3, 4, 5, 6, 8, 10]
    assert [row.rewards for row in rows] == [math.comb(row.group_size + 3, 3) for row in rows]
    assert [row.grpo for row in rows] == [2, 4, 7, 11, 16, 29, 46]
    assert [row.dr_grpo for row in rows] == [3, 6, 10, 15, 21, 36, 55]
    assert [row.gdpo for row in rows] == [3, 6, 14, 26, 38, 81, 145]
    assert resolution_table(4, (4,))[0][1:] == (3876, 23, 35, 127)
    # All groups of one size in one batch: the gauge counts the same as the table.
    vectors = f64(list(itertools.product((0.0, 1.0), repeat=2)))
    every = vectors[torch.tensor(list(itertools.combinations_with_replacement(range(4), 6)))].flatten(0, 1)
    found = reward_resolution(every.float(), num_generations=6)
    assert_gauges(found, groups=84, distinct_rewards=84, distinct_advantages=38, distinct_advantages_grpo=16)
    assert reward_resolution(every, num_generations=6, method="dr_grpo")["distinct_advantages"] == 21


def test_one_generation_and_one_reward():
    found = reward_resolution(torch.tensor([1.0, 5.0]), num_generations=1)
    assert_gauges(found, groups=2, distinct_rewards=2, distinct_advantages=1, zero_advantage_groups=1, flat_0=1)
    missing = reward_resolution(torch.full((4, 2), NAN), num_generations=2)
    assert_gauges(missing, distinct_rewards=1, distinct_advantages=1, zero_advantage_groups=1, flat_0=1, weight_1=NAN)


def test_conditions_come_first():
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    changed = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    found = reward_resolution(rewards, num_generations=2, conditions={1: (0, 1.0)})
    assert found == pytest.approx(reward_resolution(changed, num_generations=2), nan_ok=True)
    assert found["zero_variance/1"] == 0.5 and reward_resolution(rewards, num_generations=2)["zero_variance/1"] == 1.0


def test_the_accuracy_of_a_group_is_the_mean_of_the_first_reward():
    rewards = torch.tensor([[1.0, 9.0], [0.0, 9.0], [NAN, 9.0], [1.0, 9.0]])
    assert group_accuracy(rewards, num_generations=2).tolist() == [0.5, 0.5, 1.0, 1.0]
    assert group_accuracy(rewards[:, 0], num_generations=4).tolist() == pytest.approx([2 / 3] * 4)
    assert group_accuracy(rewards[:, 1], num_generations=2).isnan().all()
    assert group_accuracy(torch.full((2,), NAN), num_generations=2).isnan().all()
