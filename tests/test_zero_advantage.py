"""Completions with zero advantage run without gradient or not at all: same loss, gradient and metrics as TRL's."""

import logging
import math
import os
import socket

import pytest
import torch

trl = pytest.importorskip("trl")
utils = pytest.importorskip("trl.trainer.utils")
if not hasattr(utils, "add_fused_lm_head"):
    pytest.skip("TRL < 1.15 has no fused lm_head here", allow_module_level=True)

from trl_harness import (  # noqa: E402
    TRL_LOSS_TYPES,
    TRLS_LOSS,
    Rivals,
    apply_setting,
    build_trainer,
    draw_setting,
    end_step,
    loss_gradients_metrics,
    random_inputs,
    tiny_model,
)

from rlloss.backends import backend  # noqa: E402
from rlloss.integrations.batch_dependence import BatchDependence  # noqa: E402
from rlloss.integrations.trl_grpo import GRPOConfig, GRPOTrainer  # noqa: E402
from rlloss.integrations.zero_advantage import (  # noqa: E402
    Memory,
    PartedModel,
    Parts,
    Rows,
    dead_completions,
    look,
    split,
    spread,
    spread_size,
)

SPLITS = {"beta": 0.0, "entropy": None, "aux_coef": None, "train": True, "rho": 1.0}
DEAD = {"none": [], "half": [0, 2], "all but one": [0, 1, 3], "all": [0, 1, 2, 3]}
# Of the four micro-batches of a loss type: the dead rows, and the settings that look across a sequence.
CASES = [
    ("half", {"per_token_advantage": False, "tool_mask": False, "on_policy": False}),
    ("all but one", {"rho": 0.5, "per_token_advantage": True, "tool_mask": True, "sampler": "sequence"}),
    ("all", {"rho": 0.2, "per_token_advantage": False, "tool_mask": True, "on_policy": True}),
    ("none", {"rho": 1.0, "level": "sequence", "tool_mask": False, "off_policy": 0.2}),
]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    # beta is set so that TRL builds what a KL needs; the settings take it away again.
    return build_trainer(GRPOTrainer, GRPOConfig, tmp_path_factory.mktemp("out"), beta=0.04)


@pytest.fixture(autouse=True)
def torch_is_faster():
    with backend("torch"):
        yield


@pytest.fixture
def calls(trainer):
    """(whether with gradient, hidden states) of every call of the first decoder layer."""
    seen = []
    layer = trainer.model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append((torch.is_grad_enabled(), args[0].detach())))
    yield seen
    hook.remove()


@pytest.fixture
def option(trainer, monkeypatch):
    return lambda name, value: monkeypatch.setattr(trainer.args, name, value)


def kill(inputs: dict, dead: list[int]) -> dict:
    """The advantage of these rows is 0 and of the others not; rows with tokens only, so that the others are live."""
    live = [i for i in range(4) if i not in dead]
    inputs["completion_mask"][:, 0] = 1
    if "tool_mask" in inputs:
        inputs["tool_mask"][:, 0] = 1
    inputs["advantages"] = torch.where(inputs["advantages"] == 0.0, 0.5, inputs["advantages"])
    inputs["advantages"][dead] = 0.0
    assert dead_completions(inputs).nonzero().flatten().tolist() == [i for i in range(4) if i not in live]
    return inputs


def rows_of(trainer, inputs: dict, hidden: torch.Tensor) -> list[int]:
    """Which rows of the micro-batch a call of the first layer had."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)[:, : hidden.shape[1]]
    embedded = trainer.model.model.embed_tokens(ids)
    return [next(i for i in range(4) if torch.equal(embedded[i], x)) for x in hidden]


def width(inputs: dict, rows: list[int]) -> int:
    return inputs["prompt_ids"].shape[1] + int(inputs["completion_mask"][rows].sum(-1).max())


def assert_the_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7)
    assert found[1].shape == expected[1].shape
    assert (found[1] - expected[1]).norm() <= 1e-5 * expected[1].norm() + 1e-8


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_forward_only_equals_trl_and_only_live_rows_have_a_gradient(trainer, calls, loss_type, case):
    which, changed = CASES[case]
    setting = draw_setting(8 * case + 3) | SPLITS | {"loss_type": loss_type} | changed
    inputs = kill(apply_setting(trainer, setting, case), DEAD[which])
    calls.clear()
    end_step(trainer, True)
    Rivals(trainer, GRPOTrainer._compute_loss).compare(inputs, (loss_type, which))
    del calls[0]  # TRL's
    dead, live = DEAD[which], [i for i in range(4) if i not in DEAD[which]]
    if not live:  # the shortest one makes the loss differentiable
        lengths = inputs["completion_mask"].sum(-1).tolist()
        live = [lengths.index(min(lengths))]
        dead = [i for i in dead if i not in live]
    expected = [(False, dead), (True, live)] if dead else [(True, live)]
    assert [(grad, rows_of(trainer, inputs, hidden)) for grad, hidden in calls] == expected
    assert [hidden.shape[1] for _, hidden in calls] == [width(inputs, rows) for _, rows in expected]


@pytest.mark.parametrize("which", ["half", "all", "none"])
@pytest.mark.parametrize("loss_type", [*TRL_LOSS_TYPES, "gspo"])
def test_drop_has_the_loss_and_gradient_of_the_whole_batch(trainer, calls, option, loss_type, which):
    setting = draw_setting(5) | SPLITS | {"loss_type": loss_type, "level": "token", "tool_mask": which == "half"}
    inputs = kill(apply_setting(trainer, setting, 5), DEAD[which])
    calls.clear()
    if loss_type == "gspo":
        trainer.loss_type, trainer.importance_sampling_level = "grpo", "sequence"
    expected = loss_gradients_metrics(trainer, TRLS_LOSS, inputs)
    calls.clear()
    trainer.loss_type, trainer.importance_sampling_level = loss_type, "token"
    option("zero_advantage", "drop")
    found = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    assert_the_same(found, expected)
    assert set(found[2]) - set(expected[2]) == {"live_share", "zero_advantage_share"}
    assert found[2]["zero_advantage_share"] == pytest.approx(len(DEAD[which]) / 4)
    live = [i for i in range(4) if i not in DEAD[which]]
    ran = [rows_of(trainer, inputs, hidden) for _, hidden in calls]
    assert ran == [live] if live else [len(rows) for rows in ran] == [1]
    if which == "none":
        assert found[2] | expected[2] == pytest.approx(found[2], rel=1e-5, abs=1e-6)


def test_gspo_equals_trls_grpo_with_one_ratio_per_sequence(trainer, calls):
    setting = draw_setting(2) | SPLITS | {"loss_type": "grpo", "level": "sequence", "rho": 0.5}
    inputs = kill(apply_setting(trainer, setting, 2), [1, 2])
    calls.clear()
    expected = loss_gradients_metrics(trainer, TRLS_LOSS, inputs)
    trainer.loss_type, trainer.importance_sampling_level = "gspo", "token"
    found = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    assert_the_same(found, expected)
    assert {name: found[2][name] for name in expected[2]} == pytest.approx(expected[2], rel=1e-5, abs=1e-6)
    assert [(grad, len(hidden)) for grad, hidden in calls[1:]] == [(False, 2), (True, 2)]


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


class Echo:
    """A stand-in for a model: log-probabilities that are the ids, so that the merge can be read off."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, attention_mask, labels, fused_lm_head):
        self.seen.append((torch.is_grad_enabled(), tuple(input_ids.shape), labels.clone()))
        assert fused_lm_head and attention_mask.shape == input_ids.shape == labels.shape
        return {"log_probs": input_ids[:, 1:].float(), "label_mask": labels[:, 1:] != -100, "loss": torch.zeros(())}


def echo_inputs():
    ids = torch.arange(1, 19).reshape(3, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), "fused_lm_head": True}
    return inputs, {"completion_ids": ids[:, 2:], "tool_mask": torch.tensor([[1, 0, 1, 1]] * 3)}


@pytest.mark.parametrize("parts", [Parts([1], [0, 2]), Parts([0, 1, 2], [1]), Parts([2, 0], [1])])
@pytest.mark.parametrize("multiple", [1, 4])
def test_parts_are_merged_in_their_order_and_cut_columns_are_zero(parts, multiple):
    model, (inputs, batch) = Echo(), echo_inputs()
    reach = [3, 1, 2]
    merged = PartedModel(model, batch, parts, reach, multiple)(**inputs)
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
    outputs = PartedModel(model, batch, parts, None)(**inputs)
    for _, _, labels in model.seen:
        assert (labels[:, 3] == -100).all() and (labels[:, [0, 1, 2, 4, 5]] != -100).all()
    assert torch.equal(inputs["labels"], before) and isinstance(outputs, dict) == (parts is None or not parts.dead)


def test_keep_is_one_call_without_the_labels_of_tools(trainer, calls, option):
    option("zero_advantage", "keep")
    setting = draw_setting(0) | SPLITS | {"tool_mask": True}
    inputs = kill(apply_setting(trainer, setting, 0), [0, 1])
    calls.clear()
    inputs["completion_mask"][:, 4:] = 0
    Rivals(trainer, GRPOTrainer._compute_loss).compare(inputs, "keep")
    assert [(grad, tuple(hidden.shape[:2])) for grad, hidden in calls] == [(True, (4, 10))] * 2


def test_without_gradient_and_in_evaluation_nothing_is_split_but_columns_are_cut(trainer, calls):
    inputs = kill(apply_setting(trainer, draw_setting(0) | SPLITS, 0), [0, 1])
    calls.clear()
    inputs["completion_mask"][:, 4:] = 0
    with torch.no_grad():
        trainer._compute_loss(trainer.model, inputs)
    trainer.model.eval()
    Rivals(trainer, GRPOTrainer._compute_loss).compare(inputs, "evaluation")
    assert [(grad, tuple(x.shape[:2])) for grad, x in calls] == [(False, (4, 7)), (True, (4, 10)), (True, (4, 7))]


def test_a_nan_advantage_shows_itself(trainer, calls):
    inputs = kill(apply_setting(trainer, draw_setting(2) | SPLITS | {"per_token_advantage": False}, 0), [0])
    calls.clear()
    inputs["advantages"][2] = torch.nan
    loss = trainer._compute_loss(trainer.model, inputs)
    assert loss.isnan() and [(grad, len(hidden)) for grad, hidden in calls] == [(False, 1), (True, 3)]


def dropout(trainer, patch):
    patch.setattr(trainer.model.model.layers[0], "act", torch.nn.Dropout(0.1), raising=False)
    return "dropout 0.1"


def attention_dropout(trainer, patch):
    patch.setattr(trainer.model.model.layers[1].self_attn, "attention_dropout", 0.2)
    return "attention_dropout=0.2"


def dropout_of_the_config(trainer, patch):
    patch.setattr(trainer.model.config, "attn_pdrop", 0.3, raising=False)
    return "attn_pdrop=0.3 in the model's config"


def router_noise(trainer, patch):
    patch.setattr(trainer.model.config, "router_jitter_noise", 0.01, raising=False)
    return "router_jitter_noise=0.01 in the model's config"


def capacity(trainer, patch):
    patch.setattr(trainer.model.config, "expert_capacity", 64, raising=False)
    return "expert_capacity=64 in the model's config"


def batch_norm(trainer, patch):
    patch.setitem(trainer.model._modules, "norm", torch.nn.BatchNorm1d(3))
    return "BatchNorm1d"


def neftune(trainer, patch):
    patch.setattr(trainer.args, "neftune_noise_alpha", 5.0)
    return "neftune_noise_alpha=5.0"


def bonus(trainer, patch):
    patch.setattr(trainer, "_entropy_bonus_enabled", True)
    return "an entropy bonus"


def kl(trainer, patch):
    patch.setattr(trainer, "beta", 0.04)
    return "beta=0.04"


def auxiliary(trainer, patch):
    patch.setattr(trainer, "aux_loss_enabled", True)
    return "an auxiliary loss"


def override(trainer, patch):
    patch.setattr(trainer, "_token_stats", lambda model, inputs: GRPOTrainer._token_stats(trainer, model, inputs))
    return "_token_stats overridden"


def hook_of_trl(trainer, patch):
    class Own(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
            assert model is self.model
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    patch.setattr(trainer, "__class__", Own)
    return "_get_per_token_logps_and_entropies overridden"


WITHOUT_A_CUT = (dropout, attention_dropout, dropout_of_the_config, router_noise, capacity, batch_norm, neftune)
WITHOUT_A_CUT += (override, hook_of_trl)


@pytest.mark.parametrize("choice", ["forward_only", "drop"])
@pytest.mark.parametrize("reason", [*WITHOUT_A_CUT, bonus, kl])
def test_one_call_where_rows_cannot_be_told_apart_and_it_is_said_once(
    trainer, calls, caplog, monkeypatch, option, choice, reason
):
    inputs = kill(apply_setting(trainer, draw_setting(0) | SPLITS | {"tool_mask": False}, 0), [0, 1])
    calls.clear()
    inputs["completion_mask"][:, 4:] = 0
    option("zero_advantage", choice)
    monkeypatch.setattr(trainer._zero_advantage, "said", set())
    # The modules are listed once; in a training run they do not change.
    monkeypatch.setattr(trainer._zero_advantage, "dependence", None)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, logger="rlloss"):
        why = reason(trainer, patch)
        for _ in range(3):
            trainer._compute_loss(trainer.model, inputs)
    said = [record.getMessage() for record in caplog.records if "one call" in record.getMessage()]
    assert said == [f"zero_advantage='{choice}': one call per micro-batch with {why}"]
    length = 10 if reason in WITHOUT_A_CUT else 7
    assert [(grad, tuple(hidden.shape[:2])) for grad, hidden in calls] == [(True, (4, length))] * 3


def test_images_and_auxiliary_losses_are_one_call(trainer, monkeypatch):
    inputs = kill(apply_setting(trainer, draw_setting(0) | SPLITS, 0), [0, 1])
    inputs["completion_mask"][:, 4:] = 0
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    model = Echo()
    for more, aux in (({"pixel_values": torch.zeros(4, 2)}, False), ({}, True)):
        monkeypatch.setattr(trainer, "aux_loss_enabled", aux)
        called, same = trainer._zero_advantage.apart(model, inputs | more)
        assert same == inputs | more
        called(input_ids=ids, attention_mask=ids, labels=ids, fused_lm_head=True)
    assert [(grad, shape) for grad, shape, _ in model.seen] == [(True, (4, 10))] * 2


def test_what_changes_between_steps_counts_at_once(trainer, calls, monkeypatch):
    inputs = kill(apply_setting(trainer, draw_setting(0) | SPLITS, 0), [0, 1])
    calls.clear()
    for value, made in ((0.0, 2), (0.1, 1), (0.0, 2)):
        monkeypatch.setattr(trainer.model.model.layers[0].self_attn, "attention_dropout", value)
        calls.clear()
        trainer._compute_loss(trainer.model, inputs)
        assert len(calls) == made


def test_inactive_dropout_and_frozen_norms_do_not_matter():
    model = torch.nn.Sequential(torch.nn.Dropout(0.0), torch.nn.Dropout(0.5).eval(), torch.nn.BatchNorm1d(2).eval())
    assert BatchDependence(model).why() is None and not BatchDependence(model).on_length
    model[1].train()
    assert BatchDependence(model).why() == "dropout 0.5"


def test_columns_are_cut_on_the_multiple_that_trl_pads_to(trainer, calls, option):
    inputs = kill(apply_setting(trainer, draw_setting(0) | SPLITS, 0), [0, 1])
    inputs["completion_mask"][[0, 1], 2:], inputs["completion_mask"][[2, 3], 4:] = 0, 0
    calls.clear()
    option("pad_to_multiple_of", 3)
    trainer._compute_loss(trainer.model, inputs)
    assert [(grad, tuple(hidden.shape[:2])) for grad, hidden in calls] == [(False, (2, 6)), (True, (2, 9))]


def test_with_rotary_frequencies_of_the_length_no_column_is_cut(trainer, calls, monkeypatch):
    inputs = kill(apply_setting(trainer, draw_setting(0) | SPLITS, 0), [0, 1])
    calls.clear()
    inputs["completion_mask"][:, 4:] = 0
    monkeypatch.setattr(trainer._zero_advantage, "dependence", None)
    monkeypatch.setattr(trainer.model.model.rotary_emb, "rope_type", {"full_attention": "longrope"})
    GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    assert [(grad, tuple(hidden.shape[:2])) for grad, hidden in calls] == [(False, (2, 10)), (True, (2, 10))]
    monkeypatch.undo()
    trainer._zero_advantage.dependence = None


def test_rows_are_read_once_and_again_where_someone_changed_them(monkeypatch):
    batches = [{"completion_ids": torch.zeros(2, 3), "completion_mask": torch.ones(2, 3)} for _ in range(2)]
    for inputs in batches:
        inputs["advantages"] = torch.tensor([0.0, 1.0])
    memory, asked = Memory(), []
    memory.remember(batches, lambda dead: asked.append(dead) or [True, False])
    monkeypatch.setattr("rlloss.integrations.zero_advantage.look", asked.append)
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


def micro_batches(trainer, count, dead, **options):
    """Micro-batches of one generation; the rows `dead` of the first half of them have no advantage."""
    batches = [random_inputs(trainer, seed=i, **options) for i in range(count)]
    for i, inputs in enumerate(batches):
        kill(inputs, dead if i < count // 2 else [])
        inputs["num_items_in_batch"] = batches[0]["num_items_in_batch"]
    return batches


def test_live_rows_are_dealt_out_evenly_and_rows_stay_together(trainer):
    apply_setting(trainer, draw_setting(0) | SPLITS, 0)
    batches = micro_batches(trainer, 4, [0, 1, 3], per_token_advantage=True, tool_mask=True)
    for i, inputs in enumerate(batches):
        inputs |= {"names": [f"{i}{j}" for j in range(4)], "nothing": None, "length": torch.tensor([7])}
    before = [dict(inputs) for inputs in batches]
    spread(batches, 4)
    assert [sum(not x for x in rows.dead) for rows in look(batches)] == [3, 3, 2, 2]
    seen = []
    for inputs in batches:
        assert inputs["nothing"] is None and inputs["length"].tolist() == [7]
        assert inputs["num_items_in_batch"].dim() == 0
        for j, name in enumerate(inputs["names"]):
            seen.append(name)
            origin = before[int(name[0])]
            for key, x in inputs.items():
                if isinstance(x, torch.Tensor) and x.dim() >= 1 and len(x) == 4:
                    torch.testing.assert_close(x[j], origin[key][int(name[1])])
    assert sorted(seen) == [f"{i}{j}" for i in range(4) for j in range(4)]
    again = [dict(inputs) for inputs in before]
    spread(again, 2)
    assert [sum(not x for x in rows.dead) for rows in look(again)] == [1, 1, 4, 4]
    assert spread_size(8, 4) == 4 and spread_size(2, 4) == 2 and spread_size(6, 4) == 2 and spread_size(3, 1) == 1


@pytest.mark.parametrize("loss_type", [name for name in (*TRL_LOSS_TYPES, "gspo") if name != "bnpo"])
def test_spreading_leaves_the_gradient_of_the_optimizer_step(trainer, loss_type):
    setting = draw_setting(5) | SPLITS | {"loss_type": loss_type, "accumulation": 4, "off_policy": 0.05}
    setting |= {"steps_per_generation": 4, "sampler": None}
    apply_setting(trainer, setting, 0)
    batches = micro_batches(trainer, 4, [0, 1, 3])

    def step():
        trainer.model.zero_grad()
        losses = []
        for inputs in batches:
            losses.append(trainer._compute_loss(trainer.model, inputs))
            losses[-1].backward()
        return sum(losses).detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    expected = step()
    spread(batches, 4)
    assert_the_same(step(), expected)


@pytest.mark.parametrize("options, message", [
    ({"zero_advantage": "skip"}, "zero_advantage: found 'skip', expected one of 'forward_only', 'drop', 'keep'"),
    ({"zero_advantage": "drop", "top_entropy_quantile": 0.5}, "zero_advantage: found 'drop'.*top_entropy_quantile=0.5"),
    ({"spread_live_rows": True, "zero_advantage": "keep"}, "spread_live_rows: found True.*zero_advantage='keep'"),
    ({"spread_live_rows": True, "loss_type": "bnpo"}, "spread_live_rows: found True, expected False with .*'bnpo'"),
    ({"spread_live_rows": True, "top_entropy_quantile": 0.5}, "spread_live_rows: .*top_entropy_quantile=0.5"),
    ({"spread_live_rows": True, "entropy_coef": 0.1}, "spread_live_rows: .*an entropy bonus"),
    ({"spread_live_rows": True, "own": True}, "spread_live_rows: .*get_off_policy_mask overridden.*TRL's own"),
    ({"zero_advantage": "drop", "own": True}, "zero_advantage: found 'drop'.*get_off_policy_mask overridden"),
    ({"own": True}, None),
    ({"zero_advantage": "drop", "spread_live_rows": True}, None),
])  # fmt: skip
def test_options_that_do_not_fit_raise(trainer, monkeypatch, options, message):
    setting = draw_setting(0) | SPLITS | {"loss_type": options.get("loss_type", "dapo"), "off_policy": None}
    apply_setting(trainer, setting | {"rho": options.get("top_entropy_quantile", 1.0)}, 0)
    monkeypatch.setattr(trainer, "_entropy_bonus_enabled", "entropy_coef" in options)
    monkeypatch.setattr(trainer, "entropy_coef", options.get("entropy_coef", 0.0))
    if "own" in options:
        made = type("Own", (GRPOTrainer,), {"get_off_policy_mask": lambda *_, **__: None})
        monkeypatch.setattr(trainer, "__class__", made)
        monkeypatch.setattr(trainer, "off_policy_mask_threshold", 0.5)
    for name in ("zero_advantage", "spread_live_rows"):
        if name in options:
            monkeypatch.setattr(trainer.args, name, options[name])
    if message is None:
        trainer._make_loss_config()
        return
    with pytest.raises(ValueError, match=message):
        trainer._make_loss_config()


def test_an_option_that_does_not_fit_raises_when_the_trainer_is_made(tmp_path):
    with pytest.raises(ValueError, match="zero_advantage: found 'drop'"):
        build_trainer(GRPOTrainer, GRPOConfig, tmp_path, zero_advantage="drop", top_entropy_quantile=0.5)


def half_of_the_groups(prompts, completion_ids, **_):
    """A reward that teaches something about every other prompt only."""
    return [
        float(ids[0]) + 1e-3 * i if int(prompt.split()[0][1:]) % 2 else 1.0
        for i, (prompt, ids) in enumerate(zip(prompts, completion_ids, strict=True))
    ]


RUNS = {
    "keep": {"zero_advantage": "keep"},
    "forward_only": {},
    "drop": {"zero_advantage": "drop"},
    "spread": {"spread_live_rows": True},
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
        shares = [x["zero_advantage_share"] for x in trained.state.log_history if "zero_advantage_share" in x]
        weights = torch.cat([p.detach().flatten() for p in trained.model.parameters()])
        live = [rows.dead.count(False) for rows in look(trained._buffered_inputs)]
        finished[name] = weights, shares, live
        known = [known[0] for known in trained._zero_advantage.memory._known]
        remembered = [] if name == "keep" else [inputs["completion_ids"] for inputs in trained._buffered_inputs]
        assert len(known) == len(remembered) and all(a is b for a, b in zip(known, remembered, strict=True)), name
    return finished


@pytest.mark.parametrize("name", [name for name in RUNS if name != "keep"])
def test_a_training_run_ends_where_one_without_the_option_ends(runs, name):
    expected, shares, live = runs["keep"]
    found, found_shares, found_live = runs[name]
    assert found_shares == pytest.approx(shares) and 0 < sum(shares) / len(shares) < 1
    assert all(math.isfinite(x) for x in shares)
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert live == [2, 4] and found_live == ([3, 3] if name == "spread" else live)


def _on_a_rank(rank: int, port: int, folder: str) -> None:
    """Rank 0 has no live row, rank 1 no dead one. DDP broadcasts its buffers at every call: calls have to match."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    torch.set_num_threads(1)

    def rewards(prompts, **_):
        return [float(rank * i) for i in range(len(prompts))]

    weights = []
    for choice in ("keep", "forward_only"):  # the second trainer stays for what follows
        trainer = build_trainer(
            GRPOTrainer, GRPOConfig, f"{folder}/{rank}/{choice}", rewards,
            zero_advantage=choice, max_steps=2, gradient_accumulation_steps=2, learning_rate=1e-2, ddp_timeout=60,
        )  # fmt: skip
        with backend("torch"):
            trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        shares = [x["zero_advantage_share"] for x in trainer.state.log_history if "zero_advantage_share" in x]
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
        # Agreed once for all micro-batches: afterwards only the metrics are reduced.
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
        # Where one rank has images, which are not split, no rank splits.
        seeing = inputs | ({"pixel_values": torch.zeros(4, 2)} if rank else {})
        plan.memory.remember([], None)
        assert plan.apart(model, seeing)[0]._parts == Parts([0, 1, 2, 3], [])
    torch.distributed.destroy_process_group()


def test_two_ranks_make_the_same_calls_and_gradients(tmp_path):
    for rank in (0, 1):  # once there are ranks, only the first one saves
        for choice in ("keep", "forward_only"):
            tiny_model().save_pretrained(tmp_path / str(rank) / choice / "tiny")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_on_a_rank, (port, str(tmp_path)), nprocs=2)
