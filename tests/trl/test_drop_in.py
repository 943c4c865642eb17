"""Test that rlloss's trainer replaces TRL's: it trains the same model, and warns once if TRL misreads a setting.

The cases are those of TRL's own tests of its GRPO trainer: its loss types at their defaults, with one ratio per token
and per sequence.
"""

import functools
import logging
import math

import pytest
import torch
import trl

from rlloss.integrations.trl import trainer as trl_grpo
from rlloss.integrations.trl.trainer import GRPOConfig, GRPOTrainer
from tests.support.trl_harness import (
    PLAIN,
    TRL_LOSS_TYPES,
    apply_setting,
    build_trainer,
    draw_setting,
    loss_gradients_metrics,
    random_inputs,
    tiny_model,
)

PLUGIN = "rlloss.integrations.trl.trainer"
THEIRS, OURS = (trl.GRPOTrainer, trl.GRPOConfig), (GRPOTrainer, GRPOConfig)


def warnings_of(caplog, name=PLUGIN) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == name and r.levelno == logging.WARNING]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_a_run_with_trls_defaults_moves_every_parameter_to_where_trl_moves_it(tmp_path, caplog, loss_type, level):
    options = {"loss_type": loss_type, "importance_sampling_level": level, "gradient_accumulation_steps": 2}
    options |= {
        "num_iterations": 2,
        "max_steps": 3,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
    }
    ended = []
    for which in (THEIRS, OURS):
        trainer = build_trainer(*which, tmp_path, **options)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        after = [p.detach() for p in trainer.model.parameters()]
        assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
        assert all(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
        ended.append(torch.cat([(q - p).flatten() for p, q in zip(before, after, strict=True)]))
    # Gradients agree to 1e-5 of their norm (tests/trl/test_sweep.py), and three steps add their errors.
    assert (ended[1] - ended[0]).norm() <= 1e-4 * ended[0].norm()
    assert len(warnings_of(caplog)) == (loss_type == "cispo")


def test_the_cap_of_cispo_below_one_is_said_once(tmp_path, caplog):
    trainer = build_trainer(GRPOTrainer, GRPOConfig, tmp_path, loss_type="cispo", max_steps=2)
    trainer.train()
    assert ["epsilon_high=0.2" in message and "epsilon_high=5.0" in message for message in warnings_of(caplog)] == [
        True
    ]
    caplog.clear()
    build_trainer(GRPOTrainer, GRPOConfig, tmp_path, loss_type="cispo", epsilon_high=5.0)
    assert warnings_of(caplog) == []


# Settings that LossConfig refuses and TRL runs.
REFUSED = [
    ({"loss_type": "sapo", "sapo_temperature_neg": -1.0}, "sapo.temperature_neg: found -1.0"),
    ({"loss_type": "vespo", "vespo_k_pos": 0.0}, "vespo.k_pos: found 0.0"),
    ({"delta": 0.0}, "delta: found 0.0"),
    ({"epsilon": -0.1}, "epsilon_low: found -0.1"),
    ({"off_policy_mask_threshold": 0.0}, "off_policy_threshold: found 0.0"),
    ({"top_entropy_quantile": 20.0}, "top_entropy_quantile: found 20.0"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=str)
def test_what_rlloss_refuses_and_trl_runs_is_trls_loss_and_said_once(tmp_path, caplog, options, message):
    trainer = build_trainer(GRPOTrainer, GRPOConfig, tmp_path, **options)
    trainer.current_gradient_accumulation_steps = 1
    inputs = random_inputs(trainer, seed=0)
    expected = loss_gradients_metrics(trainer, trl.GRPOTrainer._compute_loss, inputs)
    found = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(warnings_of(caplog)) == 1 and message in warnings_of(caplog)[0]
    with pytest.raises(ValueError, match=f"zero_advantage: found 'drop'.*{message}.*where the loss is TRL's own"):
        build_trainer(GRPOTrainer, GRPOConfig, tmp_path, zero_advantage="drop", **options)


@pytest.mark.parametrize("options, message", [
    ({"loss_type": "dr_grpo", "max_completion_length": None}, "max_completion_length: found None"),
    ({"top_entropy_quantile": -0.5}, "top_entropy_quantile: found -0.5"),
    ({"loss_type": "gspo", "delta": 0.0}, "delta: found 0.0"),
    ({"importance_sampling_level": "word"}, "importance_sampling_level: found 'word'"),
], ids=str)  # fmt: skip
def test_what_trl_does_not_run_either_raises_when_the_trainer_is_made(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(GRPOTrainer, GRPOConfig, tmp_path, **options)


@pytest.mark.parametrize("scale", ["batch", False])
def test_scale_rewards_that_gdpo_does_not_read_is_said(tmp_path, caplog, scale):
    options = {"multi_objective_aggregation": "normalize_then_sum", "max_steps": 1}
    advantages = []
    for scale_rewards in ("group", scale):
        caplog.clear()
        trainer = build_trainer(GRPOTrainer, GRPOConfig, tmp_path, scale_rewards=scale_rewards, **options)
        trainer.train()
        advantages.append(torch.cat([inputs["advantages"] for inputs in trainer._buffered_inputs]))
    found = repr({False: "none"}.get(scale, scale))
    assert [f"scale_rewards: found {found}" in m for m in warnings_of(caplog, "rlloss.integrations.trl.config")] == [
        True
    ]
    assert torch.equal(*advantages)


HOOKS = {
    "get_high_entropy_mask": {"rho": 0.5},
    "get_off_policy_mask": {"off_policy": 0.05},
    "get_gamma_weights": {"loss_type": "vespo"},
}


def nothing(*args, **kwargs):
    return torch.zeros_like(kwargs["mask"] if "mask" in kwargs else args[-2])


@pytest.mark.parametrize("where", ["subclass", "instance", "trl"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_of_trl_is_obeyed_wherever_it_is_replaced(trainer, monkeypatch, hook, where):
    if where == "subclass":
        monkeypatch.setattr(trainer, "__class__", type("Nothing", (GRPOTrainer,), {hook: nothing}))
    elif where == "instance":
        monkeypatch.setattr(trainer, hook, nothing, raising=False)
    else:
        monkeypatch.setattr(trl.GRPOTrainer, hook, nothing)
    inputs = apply_setting(trainer, draw_setting(0) | PLAIN | HOOKS[hook], 0)
    loss, gradient, _ = loss_gradients_metrics(trainer, type(trainer)._compute_loss, inputs)
    assert loss == 0 and (gradient == 0).all()
    with monkeypatch.context() as patch:
        patch.setattr(trainer.args, "entropy_denominator", "kept")
        with pytest.raises(ValueError, match=f"expected 'all' with {hook} overridden, where the loss is TRL's own"):
            trainer._make_loss_config()
    apply_setting(trainer, draw_setting(0) | PLAIN, 0)  # which calls none of them
    assert trainer._make_loss_config() is not None


def test_a_subclass_with_a_loss_of_its_own_may_have_a_loss_type_of_its_own(tmp_path):
    class Own(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            if self.loss_type != "mine":
                return super()._compute_loss(model, inputs)
            return self._token_stats(model, inputs)[0].mean()

    for loss_type in ("mine", "dapo"):
        trainer = build_trainer(Own, GRPOConfig, tmp_path, loss_type=loss_type, max_steps=1)
        before = trainer.model.get_parameter("lm_head.weight").detach().clone()
        trainer.train()
        assert not torch.equal(trainer.model.get_parameter("lm_head.weight"), before)
        assert ("rlloss/live_share" in trainer.state.log_history[0]) == (loss_type == "dapo")
    with pytest.raises(ValueError, match="loss_type: found 'mine', expected one of 'grpo'"):
        build_trainer(GRPOTrainer, GRPOConfig, tmp_path, loss_type="mine")


def test_a_call_of_the_model_that_is_patched_into_trl_gets_the_whole_micro_batch(trainer, monkeypatch):
    assert trainer._why_trls_call() == trl_grpo.compat.why_no_lm_head()
    name = "_get_per_token_logps_and_entropies"
    monkeypatch.setattr(trl.GRPOTrainer, name, lambda *args, **kwargs: None)
    assert trainer._why_trls_call() == f"{name} overridden"


def scored(rewards, prompts, **_):
    return rewards(len(prompts)) if callable(rewards) else rewards


class Awaited:
    __name__ = "broken"

    def __init__(self, rewards):
        self.rewards = rewards

    async def __call__(self, **given):
        return scored(self.rewards, **given)


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("rewards, found", [
    (3.0, "3.0"), (None, "None"), ("good", "'good'"), (torch.tensor(1.0), r"tensor\(1.\)"),
    (lambda n: ["1.0"] * n, "'1.0' for a completion"), (lambda n: [[1.0, 2.0]] * n, r"\[1.0, 2.0\] for a completion"),
], ids=["number", "none", "string", "tensor", "strings", "lists"])  # fmt: skip
def test_a_reward_function_that_returns_no_list_of_numbers_is_named(tmp_path, rewards, found, wait):
    function = Awaited(rewards) if wait else functools.partial(scored, rewards)
    trainer = build_trainer(GRPOTrainer, GRPOConfig, tmp_path, [function], max_steps=1)
    name = trainer.reward_func_names[0]
    message = f"reward function '{name}': found {found}.*expected a list with a number, or None, for each of the 4"
    with pytest.raises(TypeError, match=message):
        trainer.train()
    assert trainer.reward_funcs == [function]


def test_an_infinite_reward_is_said_once_and_none_stays_allowed(tmp_path, caplog):
    def partial(prompts, **_):
        return [None if i % 2 else torch.tensor(float(i)) for i in range(len(prompts))]

    def endless(prompts, **_):
        return [math.inf, *range(1, len(prompts))]

    trainer = build_trainer(GRPOTrainer, GRPOConfig, tmp_path, [partial, endless], max_steps=2)
    trainer.train()
    assert [("'endless'" in m, "infinite" in m) for m in warnings_of(caplog)] == [(True, True)]


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_a_model_without_anything_to_train_raises_when_the_trainer_is_made(tmp_path, beta):
    peft = pytest.importorskip("peft")
    base = tiny_model()
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")

    def make(trainable):
        model = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", is_trainable=trainable)
        made = functools.partial(_with_model, model)
        return build_trainer(made, GRPOConfig, tmp_path, beta=beta)

    with pytest.raises(
        ValueError, match="model: found PeftModelForCausalLM .*is_trainable=True, or give a peft_config"
    ):
        make(False)
    make(True)


def _with_model(instance, *, model, **given):
    return GRPOTrainer(model=instance, **given)
