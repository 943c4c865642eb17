"""Test how rows are split into calls and merged into one output, reordered rows, training runs, and two ranks."""

import math
import os

import pytest
import torch

from rlloss.backends import backend
from rlloss.integrations.trl.batch_dependence import BatchDependence
from rlloss.integrations.trl.model_call import ModelCall, Parts
from rlloss.integrations.trl.trainer import GRPOConfig, GRPOTrainer
from rlloss.integrations.trl.zero_advantage import (
    Memory,
    Rows,
    dead_completions,
    look,
    split,
)
from tests.support.ranks import on_ranks
from tests.support.trl_harness import (
    apply_setting,
    build_trainer,
    draw_setting,
    random_inputs,
    tiny_model,
)
from tests.support.zero_advantage_cases import DEAD, SPLITS, Echo, echo_inputs, kill

pytestmark = pytest.mark.usefixtures("on_torch")


def test_what_is_dead():
    tool_mask = torch.tensor([[1, 0, 1]] * 4 + [[0, 0, 1]])
    inputs = {"completion_mask": torch.tensor([[1, 1, 0]] * 5), "tool_mask": tool_mask}
    of_sequences = torch.tensor([0.0, -0.0, 1e-30, torch.nan, 1.0])
    assert dead_completions(inputs | {"advantages": of_sequences}).tolist() == [True, True, False, False, True]
    of_tokens = torch.tensor([[0.0, 1, 1], [0, torch.nan, 0], [torch.nan, 0, 0], [1, 0, 0], [1, 1, 1]])
    assert dead_completions(inputs | {"advantages": of_tokens}).tolist() == [True, True, False, False, True]
    rows = look([inputs | {"advantages": of_sequences}])
    assert rows == [Rows([True, True, False, False, True], [2] * 5)]
    nothing = {"completion_mask": torch.zeros(2, 0, dtype=torch.int64), "advantages": torch.ones(2)}
    assert look([nothing, nothing]) == [Rows([True, True], [0, 0])] * 2


@pytest.mark.parametrize("dead, agreed, parts", [
    ([True, False, True], None, Parts([1], [0, 2])), ([True, False, True], True, Parts([1], [0, 2])),
    ([True, False, True], False, Parts([0, 1, 2], [])),  # someone changed the advantages after it was agreed
    ([False] * 3, None, Parts([0, 1, 2], [])), ([False] * 3, True, Parts([0, 1, 2], [2])),
    ([True] * 3, None, Parts([2], [0, 1])), ([True] * 3, True, Parts([2], [0, 1])),
    ([True], None, Parts([0], [])), ([True], True, Parts([0], [0])),
])  # fmt: skip
def test_there_is_always_a_row_with_gradient_and_two_calls_where_processes_agreed(dead, agreed, parts):
    assert split(Rows(dead, [5, 0, 3] if len(dead) == 3 else [0]), agreed) == parts


@pytest.mark.parametrize("parts", [Parts([1], [0, 2]), Parts([0, 1, 2], [1]), Parts([2, 0], [1])])
@pytest.mark.parametrize("multiple", [1, 4])
def test_parts_are_merged_in_their_order_and_cut_columns_are_zero(parts, multiple):
    model, (inputs, batch) = Echo(), echo_inputs()
    reach = [3, 1, 2]
    merged = ModelCall(model, batch, parts=parts, reach=reach, multiple=multiple)(**inputs)
    lengths = [-(-(2 + max(reach[i] for i in rows)) // multiple) * multiple for rows in (parts.dead, parts.live)]
    lengths = [min(length, 6) for length in lengths]
    shapes = [(len(parts.dead), lengths[0]), (len(parts.live), lengths[1])]
    assert [(grad, shape) for grad, shape, _ in model.seen] == list(zip((False, True), shapes, strict=True))
    expected = inputs["input_ids"][:, 1:].float()
    for rows, length in zip((parts.dead, parts.live), lengths, strict=True):
        expected[rows, length - 1 :] = 0.0
        if rows == parts.dead:
            fresh = inputs["input_ids"][:, 1:].float()
            keep = [i for i in range(3) if i in parts.live]
            expected[keep] = fresh[keep]
    assert merged.log_probs.tolist() == expected.tolist()
    assert merged.label_mask.dtype == torch.bool and not hasattr(merged, "loss")


@pytest.mark.parametrize("parts", [None, Parts([0, 1, 2], []), Parts([1], [0, 2])])
def test_tokens_of_a_tool_are_no_labels(parts):
    model, (inputs, batch) = Echo(), echo_inputs()
    before = inputs["labels"].clone()
    outputs = ModelCall(model, batch, parts=parts)(**inputs)
    for _, _, labels in model.seen:
        assert (labels[:, 3] == -100).all() and (labels[:, [0, 1, 2, 4, 5]] != -100).all()
    assert torch.equal(inputs["labels"], before) and isinstance(outputs, dict) == (parts is None or not parts.dead)


def test_inactive_dropout_and_frozen_norms_do_not_matter():
    model = torch.nn.Sequential(torch.nn.Dropout(0.0), torch.nn.Dropout(0.5).eval(), torch.nn.BatchNorm1d(2).eval())
    assert BatchDependence(model).why() is None and not BatchDependence(model).on_length
    model[1].train()
    assert BatchDependence(model).why() == "dropout 0.5"


def test_rows_are_read_once_and_again_where_someone_changed_them(monkeypatch):
    batches = [{"completion_ids": torch.zeros(2, 3), "completion_mask": torch.ones(2, 3)} for _ in range(2)]
    for inputs in batches:
        inputs["advantages"] = torch.tensor([0.0, 1.0])
    memory, asked = Memory(), []
    memory.remember(batches, lambda dead: asked.append(dead) or [True, False])
    monkeypatch.setattr("rlloss.integrations.trl.zero_advantage.look", asked.append)
    assert memory.recall(dict(batches[0]), None) == (Rows([True, False], [3, 3]), True)
    assert memory.recall(batches[1], lambda dead: pytest.fail("agreed already")) == (Rows([True, False], [3, 3]), False)
    assert asked == [[True, True]]
    monkeypatch.undo()
    batches[0]["advantages"][0] = 2.0
    assert memory.recall(batches[0], None) == (Rows([False, False], [3, 3]), True)
    batches[1]["advantages"] = torch.zeros(2)
    assert memory.recall(batches[1], None) == (Rows([True, True], [3, 3]), False)
    other = batches[0] | {"completion_ids": torch.zeros(2, 3)}
    assert memory.recall(other, lambda dead: dead) == (Rows([False, False], [3, 3]), False)


def half_of_the_groups(prompts, completion_ids, **_):
    """A reward with a signal for every other prompt only."""
    return [
        float(ids[0]) + 1e-3 * i if int(prompt.split()[0][1:]) % 2 else 1.0
        for i, (prompt, ids) in enumerate(zip(prompts, completion_ids, strict=True))
    ]


RUNS = {
    "keep": {"zero_advantage": "keep"},
    "forward_only": {},
    "drop": {"zero_advantage": "drop"},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: (weights after three optimizer steps, logged shares of dead completions, live rows of the buffer)}"""
    finished = {}
    for name, options in RUNS.items():
        settings = {"max_steps": 3, "learning_rate": 1e-2, "gradient_accumulation_steps": 2, "num_iterations": 2}
        folder = tmp_path_factory.mktemp(name)
        trained = build_trainer(GRPOTrainer, GRPOConfig, folder, half_of_the_groups, **settings, **options)
        with backend("torch"):
            trained.train()
        share = "rlloss/zero_advantage_share"
        shares = [x[share] for x in trained.state.log_history if share in x]
        weights = torch.cat([p.detach().flatten() for p in trained.model.parameters()])
        live = [rows.dead.count(False) for rows in look(trained._buffered_inputs)]
        finished[name] = weights, shares, live
        known = [known[0] for known in trained._zero_advantage.memory._known]
        remembered = [] if name == "keep" else [inputs["completion_ids"] for inputs in trained._buffered_inputs or []]
        assert len(known) == len(remembered) and all(a is b for a, b in zip(known, remembered, strict=True)), name
    return finished


@pytest.mark.parametrize("name", [name for name in RUNS if name != "keep"])
def test_a_training_run_ends_where_one_without_the_option_ends(runs, name):
    expected, shares, live = runs["keep"]
    found, found_shares, found_live = runs[name]
    assert found_shares == pytest.approx(shares) and 0 < sum(shares) / len(shares) < 1
    assert all(math.isfinite(x) for x in shares)
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert found_live == live == [2, 4]


def _on_a_rank(rank: int, port: int, folder: str) -> None:
    """Rank 0 has no live row, rank 1 no dead row. DDP broadcasts its buffers at every call, so calls must match."""

    def rewards(prompts, **_):
        return [float(rank * i) for i in range(len(prompts))]

    weights = []
    for choice in ("keep", "forward_only"):  # the second trainer is used below
        trainer = build_trainer(
            GRPOTrainer, GRPOConfig, f"{folder}/{rank}/{choice}", rewards,
            zero_advantage=choice, max_steps=2, gradient_accumulation_steps=2, learning_rate=1e-2, ddp_timeout=60,
        )  # fmt: skip
        with backend("torch"):
            trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        name = "rlloss/zero_advantage_share"
        shares = [x[name] for x in trainer.state.log_history if name in x]
        assert shares == [0.5, 0.5]
    assert (weights[1] - weights[0]).norm() <= 1e-4 * weights[0].norm()
    assert [known[-1] for known in trainer._zero_advantage.memory._known] == [True, True]

    apply_setting(trainer, draw_setting(0) | SPLITS, 0)
    model, calls = torch.nn.parallel.DistributedDataParallel(trainer.model), []
    layer = trainer.model.model.layers[0]
    layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    inputs = kill(random_inputs(trainer, seed=rank), DEAD["none" if rank else "all"])

    def gradient(called, choice):
        trainer.args.zero_advantage = choice
        calls.clear()
        trainer.model.zero_grad()
        trainer._compute_loss(called, inputs).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters()]), list(calls)

    with backend("torch"):
        expected, _ = gradient(trainer.model, "keep")
        torch.distributed.all_reduce(expected)
        expected /= 2
        for choice, sequence in (("forward_only", [False, True]), ("drop", [True]), ("keep", [True])):
            found, made = gradient(model, choice)
            assert made == sequence, (choice, made)
            assert (found - expected).norm() <= 1e-5 * expected.norm(), choice
        # The ranks agree once for all micro-batches. Afterwards only the metrics are reduced.
        plan, reduce, counted = trainer._zero_advantage, trainer.accelerator.reduce, []
        trainer.accelerator.reduce = lambda *args, **kwargs: counted.append(1) or reduce(*args, **kwargs)
        trainer.args.zero_advantage = "forward_only"
        live = random_inputs(trainer, seed=rank)
        batches = [inputs, kill(live, [])]
        plan.look_ahead(batches)
        assert len(counted) == 1 and [known[-1] for known in plan.memory._known] == [True, False]
        for batch, sequence in zip(batches, ([False, True], [True]), strict=True):
            calls.clear()
            counted.clear()
            loss = trainer._compute_loss(model, batch)
            loss.backward()
            assert calls == sequence and len(counted) == 1
        # Images are not split. If one rank has images, no rank splits.
        seeing = inputs | ({"pixel_values": torch.zeros(4, 2)} if rank else {})
        plan.memory.remember([], None)
        assert plan.apart(model, seeing, None)[0].parts == Parts([0, 1, 2, 3], [])
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of DDP and gloo can abort the interpreter's own way out; every check has passed


def test_two_ranks_make_the_same_calls_and_gradients(tmp_path):
    for rank in (0, 1):  # once there are ranks, only the first one saves
        for choice in ("keep", "forward_only"):
            tiny_model().save_pretrained(tmp_path / str(rank) / choice / "tiny")
    on_ranks(_on_a_rank, 2, str(tmp_path))
