"""Test dynamic sampling in real trainers of TRL whose rewards are constant for many prompts.

test_dynamic_sampling_parts.py tests its parts by hand."""

import os
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset

from rlloss import group_advantage
from rlloss.integrations.trl.trainer import GRPOConfig, GRPOTrainer
from tests.support.ranks import on_ranks
from tests.support.trl_harness import build_trainer, loss_gradients_metrics, model_inputs, tiny_model

G = 2
PROMPTS = [" ".join(f"w{i + k}" for k in range(1 + i % 3)) for i in range(24)]
ALIVE = set(PROMPTS[8:])  # their groups have a signal, the others of the dataset have none
DEAD = PROMPTS[:8]


def half(prompts, **_):
    """A continuous reward that is constant within a group unless its prompt is alive."""
    return [0.1 + 0.37 * (prompt in ALIVE) * (i % G) + 0.1 * len(prompt) for i, prompt in enumerate(prompts)]


def ending_model():
    """A model of whose tokens a quarter ends a completion, so that lengths differ."""
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(1, 48, 4))
    return model


def build(folder, reward_funcs=half, prompts=PROMPTS, **options) -> Any:
    options = {"dynamic_sampling_rounds": 9, "num_iterations": 2, "per_device_train_batch_size": 8} | options
    trainer: Any = build_trainer(GRPOTrainer, GRPOConfig, folder, reward_funcs, model=ending_model, **options)
    trainer.train_dataset = Dataset.from_dict({"prompt": list(prompts)})
    trainer.model.train()
    return trainer


def generate(trainer, prompts, seed=0):
    """(generation batch, [(inputs, batch) of every draw])"""
    draws, once = [], trainer._generate_once

    def recorded(inputs):
        output = once(inputs)
        draws.append((inputs, {name: x.clone() for name, x in output.items()}))
        return output

    trainer._generate_once = recorded
    torch.manual_seed(seed)
    try:
        output = trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(G)])
    finally:
        del trainer._generate_once
    return output, draws


def prompts_of(trainer, output):
    ids = [row[mask.bool()] for row, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)]
    return trainer.processing_class.batch_decode(ids)


def rows_of(output):
    """The entries of each completion in the batch, without padding, as a comparable value."""
    rows = []
    for i in range(len(output["completion_ids"])):
        of = {"prompt": output["prompt_mask"][i].bool(), "completion": output["completion_mask"][i].bool()}
        row = {}
        for name, x in output.items():
            if x.dim() == 2 and x.shape[1] > 1:
                row[name] = x[i][of["prompt" if name.startswith("prompt_") else "completion"]].tolist()
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return build(tmp_path_factory.mktemp("out"))


def test_every_group_has_a_signal_afterwards_and_the_batch_is_well_formed(trainer):
    trainer._metrics["train"].clear()
    first = [DEAD[0], PROMPTS[12], DEAD[1], DEAD[2]]
    output, draws = generate(trainer, first)
    assert len(draws) > 1
    assert (output["advantages"] != 0).all()
    prompts = prompts_of(trainer, output)
    assert prompts[::G] == prompts[1::G]  # a group has one prompt
    assert prompts[G] == first[1] and set(prompts) <= ALIVE and len(set(prompts)) == 4
    B, P = output["prompt_ids"].shape
    T = output["completion_ids"].shape[1]
    assert B == 8 and output["advantages"].shape == (B,)
    for name in ("completion_mask", "old_per_token_logps"):
        assert output[name].shape == (B, T)
    assert (output["prompt_mask"].diff(dim=1) >= 0).all() and (output["completion_mask"].diff(dim=1) <= 0).all()
    assert (output["prompt_ids"][output["prompt_mask"] == 0] == 0).all() and output["prompt_mask"].shape == (B, P)
    assert (output["completion_ids"][output["completion_mask"] == 0] == 0).all()
    assert output["num_items_in_batch"] == output["completion_mask"].sum()
    lengths = output["completion_mask"].sum(1)
    assert lengths.min() < lengths.max() == T
    expected = group_advantage(torch.tensor(half(prompts)), num_generations=G)
    torch.testing.assert_close(output["advantages"], expected, rtol=0, atol=0)
    rewards = trainer._rewards_to_advantages.rewards  # as merged
    assert rewards.tolist() == torch.tensor(half(prompts))[:, None].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"dynamic_temperature": {"rule": "two_level", "high": 1.2, "low": 1.0, "cutoff": 2.0}},
        {"loss_type": "clip_cov", "covariance": {"scope": "generation"}, "pad_to_multiple_of": 4},
        {"top_entropy_quantile": 0.5, "entropy_scope": "generation"},
    ],
)
def test_every_entry_of_a_completion_is_the_one_it_was_drawn_with(tmp_path, options):
    if "dynamic_temperature" in options and not hasattr(trl.trainer.utils, "add_fused_lm_head"):
        pytest.skip("TRL < 1.15 has no fused lm_head here")
    trainer = build(tmp_path, **options)
    output, draws = generate(trainer, [DEAD[0], PROMPTS[12], DEAD[1], DEAD[2]])
    expected = {"prompt_ids", "completion_ids", "old_per_token_logps"}
    expected |= {"ref_per_token_logps"} if "beta" in options else set()
    expected |= {"temperatures"} if "dynamic_temperature" in options else set()
    expected |= {"rollout_entropy"} if "entropy_scope" in options else set()
    expected |= {"rollout_logp"} if "covariance" in options else set()
    drawn = [row for _, batch in draws for row in rows_of(batch)]
    found = rows_of(output)
    assert expected <= set(found[0])
    assert found[G : 2 * G] == drawn[G : 2 * G]  # the group with a signal stayed where it was
    assert all(row in drawn for row in found) and all(row not in drawn[:8] for row in found[:G] + found[2 * G :])
    assert all(output[name].shape[1] % options.get("pad_to_multiple_of", 1) == 0 for name in expected)


def test_old_logp_loss_and_gradient_are_those_of_the_same_batch_made_by_hand(trainer):
    output, _ = generate(trainer, [DEAD[0], PROMPTS[12], DEAD[1], DEAD[2]])
    trainer.current_gradient_accumulation_steps = 1
    prompts, completions = (
        [ids[mask.bool()].tolist() for ids, mask in zip(output[f"{of}_ids"], output[f"{of}_mask"], strict=True)]
        for of in ("prompt", "completion")
    )
    P, T = max(map(len, prompts)) + 2, max(map(len, completions)) + 3  # padding has no part in it
    by_hand = {
        "prompt_ids": torch.tensor([[0] * (P - len(ids)) + ids for ids in prompts]),
        "prompt_mask": torch.tensor([[0] * (P - len(ids)) + [1] * len(ids) for ids in prompts]),
        "completion_ids": torch.tensor([ids + [0] * (T - len(ids)) for ids in completions]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids in completions]),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
    rewards = torch.tensor(half(trainer.processing_class.batch_decode(prompts)))
    by_hand["advantages"] = group_advantage(rewards, num_generations=G)
    with torch.no_grad():
        logp = trainer._get_per_token_logps_and_entropies(trainer.model, *model_inputs(by_hand).values(), T)[0]
    by_hand["old_per_token_logps"] = logp
    mask = output["completion_mask"].bool()
    torch.testing.assert_close(
        output["old_per_token_logps"][mask], logp[by_hand["completion_mask"].bool()], rtol=0, atol=1e-5
    )
    found = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, output)
    expected = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, by_hand)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert (found[1] - expected[1]).norm() <= 1e-5 * expected[1].norm() and expected[1].norm() > 0.1
    for metrics in (found[2], expected[2]):
        metrics.pop("rlloss/on_policy_share", None)  # of ratios that are exactly 1, which rounding decides here
    assert found[2] == pytest.approx(expected[2], rel=1e-4, abs=1e-5)


def test_without_dead_groups_nothing_is_drawn_and_the_batch_is_that_without_the_option(trainer, monkeypatch):
    alive = PROMPTS[8:12]
    output, draws = generate(trainer, alive)
    trainer._metrics["train"].clear()
    monkeypatch.setattr(trainer.args, "dynamic_sampling_rounds", 0)
    plain, _ = generate(trainer, alive)
    assert len(draws) == 1 and set(output) == set(plain)
    torch.testing.assert_close(output["advantages"], plain["advantages"])
    output["advantages"] = plain["advantages"]
    torch.testing.assert_close(output, plain, rtol=0, atol=0, equal_nan=True)
    assert "dynamic_sampling/rounds" not in trainer._metrics["train"]


def test_a_group_with_rewards_that_hardly_differ_has_a_signal(trainer, monkeypatch):
    tiny = torch.tensor(1.0).nextafter(torch.tensor(2.0)).item()

    def hardly(prompts, **_):
        return [tiny if prompt == DEAD[0] and i % G else 1.0 for i, prompt in enumerate(prompts)]

    monkeypatch.setattr(trainer, "reward_funcs", [hardly])
    monkeypatch.setattr(trainer, "scale_rewards", "none")
    monkeypatch.setattr(trainer.args, "dynamic_sampling_rounds", 1)
    trainer._metrics["train"].clear()
    output, _ = generate(trainer, DEAD[:4])
    assert trainer._metrics["train"]["dynamic_sampling/without_signal_share"] == [0.75]
    assert output["advantages"].tolist()[:3] == [-(tiny - 1) / 2, (tiny - 1) / 2, 0.0]


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_limit_is_kept_and_what_is_left_stays_as_it_was(trainer, monkeypatch, rounds):
    monkeypatch.setattr(trainer.args, "dynamic_sampling_rounds", rounds)
    monkeypatch.setattr(trainer, "reward_funcs", [lambda prompts, **_: [0.7] * len(prompts)])
    trainer._metrics["train"].clear()
    output, draws = generate(trainer, DEAD[:4])
    assert len(draws) == 1 + rounds and (output["advantages"] == 0).all()
    assert rows_of(output) == rows_of(draws[0][1])
    log = trainer._metrics["train"]
    assert [log[f"dynamic_sampling/{name}"] for name in ("rounds", "replaced_share", "left_share")] == [
        [rounds],
        [0],
        [1],
    ]


def test_it_stops_where_the_dataset_has_no_more_prompts(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "reward_funcs", [lambda prompts, **_: [0.7] * len(prompts)])
    _, draws = generate(trainer, DEAD[:4])
    assert [len(inputs) for inputs, _ in draws] == [4 * G] * (len(PROMPTS) // 4)
    drawn = [row["prompt"] for inputs, _ in draws for row in inputs[::G]]
    assert sorted(drawn) == sorted(PROMPTS)


def test_metrics_and_the_table_are_those_of_the_first_draw(trainer, monkeypatch):
    logged = {}
    for rounds in (9, 0):
        monkeypatch.setattr(trainer.args, "dynamic_sampling_rounds", rounds)
        monkeypatch.setattr(trainer.state, "num_input_tokens_seen", 0)
        trainer._metrics["train"].clear()
        for _ in range(2):  # a table that is full already
            generate(trainer, [DEAD[0], PROMPTS[12], DEAD[1], DEAD[2]])
        assert trainer._metrics["train"]["num_tokens"] == [trainer.state.num_input_tokens_seen]
        logs = {name: list(x) for name, x in trainer._logs.items() if name not in ("rewards", "extra")}
        logged[rounds] = dict(trainer._metrics["train"]), logs | {"rewards": list(trainer._logs["rewards"]["half"])}
    ours = {name: logged[9][0].pop(name) for name in set(logged[9][0]) - set(logged[0][0])}
    assert logged[9][0].pop("num_tokens") > logged[0][0].pop("num_tokens")  # tokens seen are seen
    assert logged[9] == logged[0] and len(logged[0][1]["prompt"]) == 8
    assert {name: values[0] for name, values in ours.items()} == {
        "dynamic_sampling/rounds": ours["dynamic_sampling/rounds"][0], "dynamic_sampling/without_signal_share": 0.75,
        "dynamic_sampling/replaced_share": 0.75, "dynamic_sampling/left_share": 0.0,
    }  # fmt: skip
    assert ours["dynamic_sampling/rounds"][0] >= 1


def test_it_is_reproducible_and_depends_on_seed_and_step(trainer, monkeypatch):
    def drawn(seed=0, step=0, within=0):
        monkeypatch.setattr(trainer.args, "seed", seed)
        monkeypatch.setattr(trainer.args, "gradient_accumulation_steps", 4)
        monkeypatch.setattr(trainer.state, "global_step", step)
        monkeypatch.setattr(trainer, "_step", 4 * step + within)
        output, draws = generate(trainer, DEAD[:4])
        return [row["prompt"] for inputs, _ in draws for row in inputs], rows_of(output)

    assert drawn() == drawn()
    others = [drawn(seed=1), drawn(step=1), drawn(within=2)]
    assert all(other[0] != drawn()[0] for other in others)


def test_evaluation_draws_once(trainer):
    trainer.model.eval()
    try:
        output, draws = generate(trainer, DEAD[:4])
    finally:
        trainer.model.train()
    assert len(draws) == 1 and (output["advantages"] == 0).all()


def test_columns_reach_the_rewards_of_fresh_prompts_each_row_its_own(tmp_path):
    seen = []

    def answers(prompts, answer, **_):
        for prompt, a in zip(prompts, answer, strict=True):
            seen.append((prompt, list(a)))
            a.append("written by a reward function")
        return half(prompts)

    trainer = build(tmp_path, answers)
    trainer.train_dataset = trainer.train_dataset.add_column("answer", [[p] for p in PROMPTS])
    trainer._generate_and_score_completions([{"prompt": p, "answer": [p]} for p in DEAD[:4] for _ in range(G)])
    assert len(seen) > 8 and all(answer == [prompt] for prompt, answer in seen)


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 2, "num_iterations": 1}, {"zero_advantage": "drop"}]
)
def test_training_runs(tmp_path, options):
    trainer = build(tmp_path, max_steps=3, learning_rate=1e-2, **options)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    history = [entry for entry in trainer.state.log_history if "dynamic_sampling/rounds" in entry]
    assert history and all(entry["dynamic_sampling/left_share"] == 0 for entry in history)
    assert any(entry["dynamic_sampling/replaced_share"] > 0 for entry in history)
    name = "rlloss/zero_advantage_share"
    shares = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert shares and not any(shares)


def test_images_raise(trainer, monkeypatch):
    once = trainer._generate_once
    monkeypatch.setattr(trainer, "_generate_once", lambda inputs: once(inputs) | {"pixel_values": torch.ones(8, 3)})
    with pytest.raises(ValueError, match=r"dynamic_sampling_rounds: found 9, expected 0 with images \(pixel_values\)"):
        trainer._generate_and_score_completions([{"prompt": p} for p in DEAD[:4] for _ in range(G)])


def test_what_cannot_act_raises(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="dynamic_sampling_rounds: found -1, expected at least 0"):
        build(tmp_path, dynamic_sampling_rounds=-1)
    with pytest.raises(ValueError, match="found 9, expected 0 with 16 prompts in train_dataset, of which .* takes 16"):
        build(tmp_path, per_device_train_batch_size=32)
    trainer = build(tmp_path)
    check = trainer._rewards_to_advantages.dynamic_sampling.check
    check()
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="expected 0 with 8 completions per process"):
        patch.setattr(trainer.args, "num_generations", 3)  # as with three processes of 8
        trainer.args._check_advantages()
    for name in ("tools", "environment_factories", "rollout_func"):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"expected 0 with {name}"):
            patch.setattr(trainer, name, [print])
            check()
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match="expected 0 with IterableDataset as train_dataset"):
        check()


def _generate_on_a_rank(rank: int, port: int, folder: str) -> None:
    os.environ["RLLOSS_BACKEND"] = "torch"
    trainer = build(f"{folder}/{rank}", scale_rewards="batch")
    assert trainer.accelerator.num_processes == 2
    prompts = [[DEAD[0], PROMPTS[12], PROMPTS[13], PROMPTS[14]], DEAD[1:5]][rank]
    output, draws = generate(trainer, prompts, seed=rank)
    found = {
        "draws": [[row["prompt"] for row in inputs[::G]] for inputs, _ in draws],
        "prompts": prompts_of(trainer, output),
        "tokens": int(output["completion_mask"].sum()),
        "num_items": int(output["num_items_in_batch"]),
        "advantages": output["advantages"],
        "metrics": {n: v for n, v in trainer._metrics["train"].items() if n.startswith("dynamic_sampling/")},
    }
    torch.save(found, f"{folder}/{rank}.pt")


def test_two_ranks_draw_alike(tmp_path):
    on_ranks(_generate_on_a_rank, 2, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    sizes = [[len(prompts) for prompts in rank["draws"]] for rank in ranks]
    assert sizes[0] == sizes[1] and sizes[0][:2] == [4, 4]  # as many as the second rank needs
    drawn = [prompt for rank in ranks for draw in rank["draws"] for prompt in draw]
    assert len(set(drawn)) == len(drawn)
    for rank in ranks:
        assert rank["prompts"][::G] == rank["prompts"][1::G] and set(rank["prompts"]) <= ALIVE
        assert rank["num_items"] == ranks[0]["tokens"] + ranks[1]["tokens"]
        assert rank["metrics"] == ranks[0]["metrics"]
    assert ranks[0]["prompts"][G:] == [p for p in PROMPTS[12:15] for _ in range(G)]
    assert ranks[0]["metrics"]["dynamic_sampling/without_signal_share"] == [5 / 8]
    assert ranks[0]["metrics"]["dynamic_sampling/replaced_share"] == [5 / 8]
    rewards = torch.tensor(half(ranks[0]["prompts"] + ranks[1]["prompts"]))
    expected = group_advantage(rewards, num_generations=G, scale="batch")
    torch.testing.assert_close(torch.cat([rank["advantages"] for rank in ranks]), expected, rtol=0, atol=0)
