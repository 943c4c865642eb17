"""Test that dead completions run without gradient or not at all, with the same loss, gradient and metrics as TRL's."""

import functools
import logging

import pytest
import torch

from rlloss.backends import backend
from rlloss.integrations.trl.trainer import GRPOConfig, GRPOTrainer
from rlloss.integrations.trl.zero_advantage import SecondCall
from tests.support.trl_harness import (
    GAUGES_ALONE,
    TRL_LOSS_TYPES,
    TRLS_LOSS,
    Rivals,
    apply_setting,
    assert_same_step,
    build_trainer,
    draw_setting,
    end_step,
    loss_gradients_metrics,
    random_inputs,
)
from tests.support.zero_advantage_cases import DEAD, SPLITS, Echo, kill

pytestmark = pytest.mark.usefixtures("on_torch")
# The four micro-batches of a loss type: dead rows, and settings that read across a sequence.
CASES = [
    ("half", {"per_token_advantage": False, "tool_mask": False, "on_policy": False}),
    ("all but one", {"rho": 0.5, "per_token_advantage": True, "tool_mask": True, "sampler": "sequence"}),
    ("all", {"rho": 0.2, "per_token_advantage": False, "tool_mask": True, "on_policy": True}),
    ("none", {"rho": 1.0, "level": "sequence", "tool_mask": False, "off_policy": 0.2}),
]


@pytest.fixture
def calls(trainer):
    """(whether gradients are enabled, hidden states) of every call of the first decoder layer."""
    seen = []
    layer = trainer.model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append((torch.is_grad_enabled(), args[0].detach())))
    yield seen
    hook.remove()


@pytest.fixture
def option(trainer, monkeypatch):
    return lambda name, value: monkeypatch.setattr(trainer.args, name, value)


def rows_of(trainer, inputs: dict, hidden: torch.Tensor) -> list[int]:
    """The rows of the micro-batch in a call of the first layer."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)[:, : hidden.shape[1]]
    embedded = trainer.model.model.embed_tokens(ids)
    return [next(i for i in range(4) if torch.equal(embedded[i], x)) for x in hidden]


def width(inputs: dict, rows: list[int]) -> int:
    return inputs["prompt_ids"].shape[1] + int(inputs["completion_mask"][rows].sum(-1).max())


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
    assert_same_step(found, expected)
    assert set(found[2]) - set(expected[2]) - GAUGES_ALONE == {"rlloss/live_share", "rlloss/zero_advantage_share"}
    assert found[2]["rlloss/zero_advantage_share"] == pytest.approx(len(DEAD[which]) / 4)
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
    assert_same_step(found, expected)
    assert {name: found[2][name] for name in expected[2]} == pytest.approx(expected[2], rel=1e-5, abs=1e-6)
    assert [(grad, len(hidden)) for grad, hidden in calls[1:]] == [(False, 2), (True, 2)]


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


class OwnCall(GRPOTrainer):
    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        assert model is self.model
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)


# Reason in the log: attribute of the trainer and its value.
REASONS = {
    "dropout 0.1": lambda t: (t.model.model.layers[0], "act", torch.nn.Dropout(0.1)),
    "attention_dropout=0.2": lambda t: (t.model.model.layers[1].self_attn, "attention_dropout", 0.2),
    "attn_pdrop=0.3 in the model's config": lambda t: (t.model.config, "attn_pdrop", 0.3),
    "router_jitter_noise=0.01 in the model's config": lambda t: (t.model.config, "router_jitter_noise", 0.01),
    "expert_capacity=64 in the model's config": lambda t: (t.model.config, "expert_capacity", 64),
    "BatchNorm1d": lambda t: (t.model, "norm", torch.nn.BatchNorm1d(3)),
    "neftune_noise_alpha=5.0": lambda t: (t.args, "neftune_noise_alpha", 5.0),
    "_token_stats overridden": lambda t: (t, "_token_stats", functools.partial(GRPOTrainer._token_stats, t)),
    "_get_per_token_logps_and_entropies overridden": lambda t: (t, "__class__", OwnCall),
    "an entropy bonus": lambda t: (t, "_entropy_bonus_enabled", True),
    "beta=0.04": lambda t: (t, "beta", 0.04),
}
CUT = ("an entropy bonus", "beta=0.04")  # the columns are cut all the same


@pytest.mark.parametrize("choice", ["forward_only", "drop"])
@pytest.mark.parametrize("why", REASONS)
def test_one_call_where_rows_cannot_be_told_apart_and_it_is_said_once(
    trainer, calls, caplog, monkeypatch, option, choice, why
):
    inputs = kill(apply_setting(trainer, draw_setting(0) | SPLITS | {"tool_mask": False}, 0), [0, 1])
    calls.clear()
    inputs["completion_mask"][:, 4:] = 0
    option("zero_advantage", choice)
    monkeypatch.setattr(trainer._zero_advantage, "said", set())
    # The modules are listed once; in a training run they do not change.
    monkeypatch.setattr(trainer._zero_advantage, "dependence", None)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, logger="rlloss"):
        patch.setattr(*REASONS[why](trainer), raising=False)
        for _ in range(3):
            trainer._compute_loss(trainer.model, inputs)
    said = [record.getMessage() for record in caplog.records if "one call" in record.getMessage()]
    assert said == [f"zero_advantage='{choice}': one call per micro-batch with {why}"]
    length = 7 if why in CUT else 10
    assert [(grad, tuple(hidden.shape[:2])) for grad, hidden in calls] == [(True, (4, length))] * 3


def test_images_and_auxiliary_losses_are_one_call(trainer, monkeypatch):
    inputs = kill(apply_setting(trainer, draw_setting(0) | SPLITS, 0), [0, 1])
    inputs["completion_mask"][:, 4:] = 0
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    model = Echo()
    for more, aux in (({"pixel_values": torch.zeros(4, 2)}, False), ({}, True)):
        monkeypatch.setattr(trainer, "aux_loss_enabled", aux)
        called, same = trainer._zero_advantage.apart(model, inputs | more, trainer._why_trls_call())
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


def graphs(folder, choice: str) -> int:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rewards = [lambda completion_ids, **_: [float(ids[0] % 2) for ids in completion_ids]]
    trainer = build_trainer(
        GRPOTrainer, GRPOConfig, folder, rewards, zero_advantage=choice, torch_compile=True,
        torch_compile_backend="eager", per_device_train_batch_size=8, max_steps=4, learning_rate=1e-3,
    )  # fmt: skip
    with backend("torch"):
        trainer.train()
    trainer.accelerator.state.dynamo_plugin.backend = "NO"  # the state is that of all trainers of the process
    name = "rlloss/zero_advantage_share"
    shares = [log[name] for log in trainer.state.log_history if name in log]
    assert len(set(shares)) > 1  # so that the number of rows with a gradient varies
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_under_torch_compile_there_are_no_more_graphs_than_with_keep(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # transformers sets it; put back at the end
    with caplog.at_level(logging.INFO):
        found = {choice: graphs(tmp_path, choice) for choice in ("keep", "forward_only", "drop")}
    assert 0 < found["forward_only"] == found["drop"] == found["keep"]
    for choice in ("forward_only", "drop"):
        assert caplog.text.count(f"zero_advantage='{choice}': one call per micro-batch with torch.compile") == 1


def test_a_model_that_was_compiled_by_its_owner_is_called_once_and_whole(trainer, monkeypatch):
    inputs = kill(apply_setting(trainer, draw_setting(0) | SPLITS, 0), DEAD["half"])
    plan, layers = trainer._zero_advantage, trainer.model.model.layers
    for compiled in (False, True):
        if compiled:
            monkeypatch.setitem(layers._modules, "0", torch.compile(layers[0], backend="eager"))
        plan.dependence = None
        assert (plan.apart(trainer.model, inputs, None)[0].parts is None) == compiled
    plan.dependence = None


def test_auto_makes_a_second_call_on_a_gpu_only_where_it_pays(trainer, option, monkeypatch):
    plan, inputs = trainer._zero_advantage, kill(random_inputs(trainer, seed=0), DEAD["half"])
    apply_setting(trainer, draw_setting(0) | SPLITS, 0)
    option("zero_advantage", "auto")

    def live():
        return plan.apart(trainer.model, inputs, None)[0].parts.live

    on_a_cpu = live()
    assert len(on_a_cpu) == 2
    monkeypatch.setattr(type(trainer.accelerator), "device", torch.device("cuda"))
    assert live() == [0, 1, 2, 3] and plan.says(None, None).endswith("where that saves more than a second call costs")
    option("zero_advantage", "forward_only")
    assert live() == on_a_cpu


def test_what_a_second_call_costs(trainer):
    model, call = trainer.model, SecondCall(trainer.model, half=False)
    layers = [p for name, p in model.named_parameters() if "embed_tokens" not in name and "lm_head" not in name]
    modules = sum(1 for m in model.modules() if not list(m.children()))
    enough = modules * 2e-4 * 34e12 / (4 * sum(p.numel() for p in layers))
    assert not call.pays(int(enough * 0.99)) and call.pays(int(enough * 1.01))
    try:
        model.requires_grad_(False)
        frozen = SecondCall(model, half=False)
    finally:
        model.requires_grad_(True)
    assert not frozen.pays(int(enough * 1.99)) and frozen.pays(int(enough * 2.01))
