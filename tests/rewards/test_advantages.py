"""Test advantages against hand-worked numbers, a loop in exact arithmetic, and TRL's trainer.

``python tests/rewards/test_advantages.py`` prints the Markdown tables of docs/rewards.md.
"""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlloss.rewards.advantages import METHODS, group_advantage

NAN = float("nan")
EPS = 1e-4
Z = 0.5 / (math.sqrt(1 / 3) + EPS)  # two of four succeed: mean 1/2, variance 1/3
FOUR_ANSWERS = [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]  # (correct, well-formed)
TWO_OF_FOUR_CORRECT = [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
PAPER_PAIRS = [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]  # totals (0,1), (0,2), (1,2)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(got, want, tol=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=tol, atol=tol)


def oracle(rows, G, method, weights, scale="group", eps=EPS, counts=None):
    """Process one reward at a time. ``statistics`` averages in exact fractions. ``counts`` repeats each row's value."""

    def std(values):
        return statistics.stdev(values) if len(values) > 1 else 0.0

    N, K = len(rows), len(rows[0])
    scorable = [not all(math.isnan(v) for v in row) for row in rows]
    total = [sum(weights[k] * row[k] for k in range(K) if not math.isnan(row[k])) for row in rows]
    advantage = [0.0] * N
    for i in range(N):
        if not scorable[i]:
            continue
        group = [j for j in range(i - i % G, i - i % G + G) if scorable[j]]
        totals = [total[j] for j in group]
        others = [total[j] for j in group if j != i]
        if method == "rloo":
            advantage[i] = total[i] - statistics.mean(others) if others else 0.0
        elif method == "dr_grpo" or (method == "grpo" and scale == "none"):
            advantage[i] = total[i] - statistics.mean(totals)
        elif method == "grpo":
            spread = std(totals if scale == "group" else [total[j] for j in range(N) if scorable[j]])
            advantage[i] = (total[i] - statistics.mean(totals)) / (spread + eps)
        else:
            for k in range(K):
                if not math.isnan(rows[i][k]):
                    column = [rows[j][k] for j in group if not math.isnan(rows[j][k])]
                    advantage[i] += weights[k] * (rows[i][k] - statistics.mean(column)) / (std(column) + eps)
    if method == "gdpo":
        batch = [advantage[i] for i in range(N) if scorable[i] for _ in range(1 if counts is None else counts[i])]
        mean, spread = (statistics.mean(batch) if batch else 0.0), std(batch)
        advantage = [(a - mean) / (spread + eps) if scorable[i] else 0.0 for i, a in enumerate(advantage)]
    return advantage


@pytest.mark.parametrize(
    "method, weights, x, std",
    [
        # Totals 2, 1, 1, 0 and, weighted, 3, 2, 1, 0; less their means.
        ("grpo", [1.0, 1.0], [1, 0, 0, -1], math.sqrt(2 / 3)),
        ("grpo", [2.0, 1.0], [1.5, 0.5, -0.5, -1.5], math.sqrt(5 / 3)),
        # Two of four succeed in each reward, so both normalise to +-Z: GDPO cannot distinguish the two rewards.
        ("gdpo", [1.0, 1.0], [2 * Z, 0, 0, -2 * Z], Z * math.sqrt(8 / 3)),
        ("gdpo", [2.0, 1.0], [3 * Z, Z, -Z, -3 * Z], Z * math.sqrt(20 / 3)),
    ],
)
def test_four_answers_in_one_group(method, weights, x, std):
    got = group_advantage(f64(FOUR_ANSWERS), num_generations=4, method=method, weights=weights)
    assert_equal(got, [a / (std + EPS) for a in x])
    assert (got[1] == got[2]) == (weights == [1.0, 1.0])


def test_gdpo_tells_rewards_of_different_rates_apart_within_a_group():
    # Totals 2, 1, 1, 1. Correct: 2 of 4, +-sqrt(3) / 2; well-formed: 3 of 4, +1/2 or -3/2.
    grpo = group_advantage(f64(TWO_OF_FOUR_CORRECT), num_generations=4)
    assert grpo[1] == grpo[2] == grpo[3]
    x = [math.sqrt(3) / 2 + 0.5, math.sqrt(3) / 2 - 1.5, 0.5 - math.sqrt(3) / 2, 0.5 - math.sqrt(3) / 2]
    gdpo = group_advantage(f64(TWO_OF_FOUR_CORRECT), num_generations=4, method="gdpo", eps=0.0)
    assert_equal(gdpo, [a / statistics.stdev(x) for a in x])


def test_gdpo_paper_example_across_groups():
    # GRPO: +-0.7071 in all three groups. GDPO: x = +-z, +-2z, +-z, so the batch std is z sqrt(12 / 5).
    paper = f64(PAPER_PAIRS)
    assert_equal(group_advantage(paper, num_generations=2, eps=0.0), [-math.sqrt(0.5), math.sqrt(0.5)] * 3)
    signs = (-1, 1, -2, 2, -1, 1)
    without_eps = group_advantage(paper, num_generations=2, method="gdpo", eps=0.0)
    assert_equal(without_eps, [a * math.sqrt(5 / 12) for a in signs])
    z = 0.5 / (math.sqrt(0.5) + EPS)
    want = [a * z / (z * math.sqrt(12 / 5) + EPS) for a in signs]
    assert_equal(group_advantage(paper, num_generations=2, method="gdpo"), want)
    assert_equal(group_advantage(paper, num_generations=2, method="dr_grpo"), [-0.5, 0.5, -1, 1, -0.5, 0.5])


def test_missing_rewards_by_hand():
    rows = f64([[1, 2], [NAN, 5], [NAN, NAN], [4, NAN], [NAN, NAN], [NAN, NAN], [NAN, 7], [NAN, NAN]])
    # Group 1: totals 3, 5, -, 4: mean 4, std 1. Group 2 has one scorable row.
    assert_equal(group_advantage(rows, num_generations=4), [-1 / (1 + EPS), 1 / (1 + EPS), 0, 0, 0, 0, 0, 0])
    assert_equal(group_advantage(rows, num_generations=4, method="dr_grpo"), [-1, 1, 0, 0, 0, 0, 0, 0])
    assert_equal(group_advantage(rows, num_generations=4, method="rloo"), [-1.5, 1.5, 0, 0, 0, 0, 0, 0])
    # Batch of 3, 5, 4, 7: mean 4.75, sum of squares 8.75.
    batch = group_advantage(rows, num_generations=4, scale="batch")
    assert_equal(batch, [a / (math.sqrt(8.75 / 3) + EPS) for a in (-1, 1, 0, 0, 0, 0, 0, 0)])
    # GDPO: first reward 1, 4 and second 2, 5: each -+1.5 / (std sqrt(4.5)). x = -2s, s, -, s over 4 scorable rows.
    gdpo = group_advantage(rows, num_generations=4, method="gdpo", eps=0.0)
    assert_equal(gdpo, [a / math.sqrt(2) for a in (-2, 1, 0, 1, 0, 0, 0, 0)])


def test_gdpo_a_reward_seen_once_in_a_group_contributes_nothing():
    once = f64([[0, NAN], [1, NAN], [0, 9], [2, NAN]])
    without = f64([[0, NAN], [1, NAN], [0, NAN], [2, NAN]])
    got = group_advantage(once, num_generations=4, method="gdpo")
    assert_equal(got, group_advantage(without, num_generations=4, method="gdpo"))
    assert (got != 0).all()


def test_token_counts_by_hand():
    # eps 0: x = -s, s with s = sqrt(1 / 2); 1 and 3 tokens: m = s / 2, variance (1 * 9/4 + 3 * 1/4) s^2 / 3 = s^2.
    tokens = torch.tensor([1, 3])
    got = group_advantage(f64([0.0, 1.0]), num_generations=2, method="gdpo", eps=0.0, token_counts=tokens)
    assert_equal(got, [-1.5, 0.5])


def test_conditions_use_raw_rewards_do_not_chain_and_keep_missing():
    rows = f64([[1, 0.5, 3], [1, 0.4, 3], [1, NAN, 3], [NAN, 0.4, 3]])
    # Reward 0 needs reward 1 >= 0.5 (the limit counts); a missing reward 1 does not fulfil it; a missing one stays.
    as_triples = group_advantage(rows, num_generations=4, method="dr_grpo", conditions=[(0, 1, 0.5)])
    totals = [4.5, 3.4, 3.0, 3.4]
    assert_equal(as_triples, [t - sum(totals) / 4 for t in totals])
    as_mapping = group_advantage(rows, num_generations=4, method="dr_grpo", conditions={0: (1, 0.5)})
    assert torch.equal(as_triples, as_mapping)
    # 1 is emptied by 0, yet 2 still sees the raw 1: totals 0 + 5 and 1 + 2 + 5.
    rows = f64([[0, 2, 5], [1, 2, 5]])
    chained = group_advantage(rows, num_generations=2, method="dr_grpo", conditions=[(1, 0, 1.0), (2, 1, 1.0)])
    assert_equal(chained, [-1.5, 1.5])
    # Two conditions on one reward must both hold, in either order: totals 1, 9, 1.
    rows = f64([[1, 0, 7], [1, 1, 7], [0, 1, 7]])
    both = group_advantage(rows, num_generations=3, method="rloo", conditions=[(2, 0, 1.0), (2, 1, 1.0)])
    assert_equal(both, [-4, 8, -4])


def test_conditions_act_before_gdpo_normalises():
    rows = f64([[1, 1], [1, 0], [0, 1], [1, 0], [NAN, 0], [1, NAN]])
    done = f64([[1, 1], [0, 0], [0, 1], [0, 0], [NAN, 0], [0, NAN]])
    got = group_advantage(rows, num_generations=6, method="gdpo", conditions=[(0, 1, 1.0)])
    assert_equal(got, group_advantage(done, num_generations=6, method="gdpo"))


@st.composite
def reward_tables(draw):
    K, G, groups = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    value = st.sampled_from([NAN, NAN, 0.0, 1.0, 0.1, -2.0, 3.3, 1 / 3])
    rows = [[draw(value) for _ in range(K)] for _ in range(G * groups)]
    return rows, G, [draw(st.sampled_from([1.0, 2.0, 0.3, -0.5])) for _ in range(K)]


VARIANTS = [("grpo", "group"), ("grpo", "batch"), ("grpo", "none"), ("dr_grpo", "none"), ("rloo", "group")]


@pytest.mark.parametrize("method, scale", [*VARIANTS, ("gdpo", "group")])
@settings(deadline=None, max_examples=150, derandomize=True)
@given(table=reward_tables())
def test_oracle(method, scale, table):
    rows, G, weights = table
    got = group_advantage(f64(rows), num_generations=G, method=method, weights=weights, scale=scale)
    # Weighted sums that are equal on paper may differ by 1e-16. Dividing by eps = 1e-4 gives 1e-12, twice 1e-8.
    assert_equal(got, oracle(rows, G, method, weights, scale), tol=1e-7)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(table=reward_tables(), data=st.data())
def test_token_counts_oracle(table, data):
    rows, G, weights = table
    counts = [data.draw(st.integers(0, 4)) for _ in rows]
    tokens = torch.tensor(counts)
    got = group_advantage(f64(rows), num_generations=G, method="gdpo", weights=weights, token_counts=tokens)
    read = [i for i, count in enumerate(counts) if count > 0]  # the advantage of a row without tokens is never read
    want = oracle(rows, G, "gdpo", weights, counts=counts)
    assert_equal(got[read], [want[i] for i in read], tol=1e-7)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """TRL's own scoring code in a real trainer of a tiny model."""
    trl = pytest.importorskip("trl")
    from tests.support.trl_harness import build_trainer

    trainer = build_trainer(trl.GRPOTrainer, trl.GRPOConfig, tmp_path_factory.mktemp("trl"))
    trainer.model.train()  # in evaluation TRL counts by num_generations_eval
    return trainer


@pytest.mark.parametrize("missing", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("method, scale", [*VARIANTS[:3], ("gdpo", "group")])
def test_equals_trl(trainer, method, scale, binary, missing):
    from tests.support.trl_harness import scored

    aggregation = {"grpo": "sum_then_normalize", "gdpo": "normalize_then_sum"}[method]
    generator = torch.Generator().manual_seed(0)
    unscorable = 0
    for G in (1, 2, 3, 8):
        for K, weights in ((1, [1.0]), (2, [2.0, 1.0]), (3, [1.0, -0.5, 0.25])):
            rewards = torch.randn(6 * G, K, generator=generator)
            rewards = (rewards > 0).float() if binary else rewards
            rewards[torch.rand(6 * G, K, generator=generator) < missing] = NAN
            unscorable += int(rewards.isnan().all(dim=1).sum())
            ours = group_advantage(rewards, num_generations=G, method=method, weights=weights, scale=scale)
            theirs = scored(trainer, rewards, G, aggregation, weights, scale)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            truth = f64(oracle(rewards.tolist(), G, method, weights, scale))
            assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-6
    assert (unscorable > 0) == (missing > 0)


@pytest.mark.parametrize("method, scale", [*VARIANTS, ("gdpo", "group")])
@pytest.mark.parametrize("G", [1, 3, 7, 10])
def test_groups_without_signal_are_exactly_zero(method, scale, G):
    constant = torch.tensor([0.1, 1 / 3, -0.7, 1e6 + 0.1, 1e-3, 0.9])[:, None, None].expand(6, G, 2)
    live = torch.randn(2, G, 2, generator=torch.Generator().manual_seed(1))
    rewards = torch.cat([constant, live]).flatten(0, 1)
    got = group_advantage(rewards, num_generations=G, method=method, scale=scale).view(8, G)
    assert (got[:6] == 0).all()
    assert (got[6:] != 0).all() or G == 1


@pytest.mark.parametrize("method", METHODS)
def test_equal_rows_tie_whatever_the_strides(method):
    # torch.sum over K of such a transposed tensor rounds equal rows differently.
    generator = torch.Generator().manual_seed(0)
    for K in (5, 9, 17, 40):
        rows = torch.randn(3, 1, K, generator=generator).expand(3, 13, K).reshape(39, K).t().contiguous().t()
        weights = torch.randn(K, generator=generator)
        assert (group_advantage(rows, num_generations=13, method=method, weights=weights) == 0).all()


@pytest.mark.parametrize("method, scale", VARIANTS)
def test_a_constant_added_to_a_group_changes_nothing(method, scale):
    # The std of the batch depends on differences between groups, so all groups get the same shift.
    shift = f64([5.0, 5.0, 5.0] if scale == "batch" else [5.0, -3.0, 100.0]).repeat_interleave(4)
    rewards = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rewards[5] = NAN
    plain = group_advantage(rewards, num_generations=4, method=method, scale=scale)
    shifted = group_advantage(rewards + shift, num_generations=4, method=method, scale=scale)
    assert_equal(shifted, plain, tol=1e-10)
    assert plain.abs().max() > 0.1


@pytest.mark.parametrize("method, scale", [*VARIANTS, ("gdpo", "group")])
def test_permuting_groups_and_members_permutes_advantages(method, scale):
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(5, 4, 2, dtype=torch.float64, generator=generator)
    rewards[torch.rand(5, 4, 2, generator=generator) < 0.3] = NAN
    groups, members = torch.randperm(5, generator=generator), torch.randperm(4, generator=generator)
    permuted = rewards[groups][:, members].flatten(0, 1)
    plain = group_advantage(rewards.flatten(0, 1), num_generations=4, method=method, scale=scale).view(5, 4)
    got = group_advantage(permuted, num_generations=4, method=method, scale=scale)
    assert_equal(got, plain[groups][:, members].flatten())


@pytest.mark.parametrize("method", METHODS)
def test_nan_only_silences_its_own_row(method):
    rewards = f64([0.0, 1.0, 3.0, NAN, 2.0, 2.5])
    got = group_advantage(rewards, num_generations=3, method=method)
    assert got.isfinite().all()
    assert got[3] == 0 and (got[4:] != 0).all()
    all_missing = group_advantage(f64([[NAN, NAN]] * 4), num_generations=2, method=method)
    assert torch.equal(all_missing, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_one_generation_and_one_row_are_zero(method):
    assert torch.equal(group_advantage(torch.tensor([1.0, 5.0]), num_generations=1, method=method), torch.zeros(2))
    assert torch.equal(group_advantage(torch.tensor([[1.0, 5.0]]), num_generations=1, method=method), torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_dtype_and_detachment(method, dtype):
    # 400 rewards of about 200 overflow a float16 sum, and a bfloat16 mean loses the ones.
    rewards = (torch.tensor(FOUR_ANSWERS * 100, dtype=dtype) + 200).requires_grad_()
    before = rewards.detach().clone()
    got = group_advantage(rewards, num_generations=400, method=method, weights=[2, 1])
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not got.requires_grad
    assert torch.equal(rewards.detach(), before)
    want = group_advantage(before.double(), num_generations=400, method=method, weights=[2, 1])
    assert_equal(got.double(), want, tol=1e-6)


def test_one_dimensional_rewards_are_one_reward():
    rewards = f64([0.0, 1.0, 1.0, 3.0])
    for method in METHODS:
        flat = group_advantage(rewards, num_generations=2, method=method, weights=[3.0])
        column = group_advantage(rewards[:, None], num_generations=2, method=method, weights=f64([3.0]))
        assert torch.equal(flat, column)


@pytest.mark.parametrize("method, scale", [*VARIANTS, ("gdpo", "group")])
def test_nothing_is_read_back_from_the_device(method, scale):
    # A meta tensor has no data: any .item(), bool() or tolist() of it raises.
    rewards = torch.empty(8, 2, device="meta")
    tokens = torch.empty(8, device="meta", dtype=torch.int64) if method == "gdpo" else None
    settings = {"method": method, "scale": scale, "token_counts": tokens, "conditions": {0: (1, 0.5)}}
    got = group_advantage(rewards, num_generations=4, weights=[1.0, 2.0], **settings)
    assert (got.device.type, got.shape, got.dtype) == ("meta", (8,), torch.float32)


def markdown_tables():
    """The examples above as Markdown, computed in float64 with the default eps."""
    columns = {f"{m.upper()}{t}": (m, w) for m in ("grpo", "gdpo") for t, w in (("", None), (" 2:1", [2, 1]))}
    examples = [
        ("One group of four", FOUR_ANSWERS, 4),
        ("One group of four, rewards of different rates", TWO_OF_FOUR_CORRECT, 4),
        ("Three groups of two", PAPER_PAIRS, 2),
    ]
    lines = []
    for title, rows, G in examples:
        computed = [
            group_advantage(f64(rows), num_generations=G, method=m, weights=w).tolist() for m, w in columns.values()
        ]
        lines += [f"**{title}**", "", "| group | (correct, well-formed) | " + " | ".join(columns) + " |"]
        lines += ["|---|---|" + "---:|" * len(columns)]
        for i, (correct, formed) in enumerate(rows):
            cells = " | ".join(f"{values[i]:+.3f}" if values[i] else "0" for values in computed)
            lines.append(f"| {i // G + 1} | ({correct:.0f}, {formed:.0f}) | {cells} |")
        lines.append("")
    return "\n".join(lines)
