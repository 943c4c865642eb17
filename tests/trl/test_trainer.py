"""Test the TRL integration in use: options, training, metrics and errors. test_sweep.py tests its loss."""

import importlib.util
import inspect
import json
import re
import sys
import warnings

import pytest
import torch
import trl

from rlloss.integrations.trl import compat
from rlloss.integrations.trl import trainer as trl_grpo
from rlloss.integrations.trl.compat import why_no_lm_head as why_no_patch
from rlloss.integrations.trl.config import OPTIONS
from rlloss.integrations.trl.trainer import MULTIMODAL, GRPOConfig, GRPOTrainer
from rlloss.lm_head.matmul import count_products
from tests.support.loss_cases import READ_BY
from tests.support.trl_harness import (
    PLAIN,
    apply_setting,
    build_trainer,
    draw_setting,
    loss_gradients_metrics,
    random_inputs,
)


def test_every_setting_that_only_some_losses_read_has_its_option():
    assert set(OPTIONS) == set().union(*READ_BY.values()) - {"max_log_ratio"}  # which TRL has not


# TRL's loss types. "clip_cov" and "kl_cov" raise instead: tests/trl/test_options.py.
@pytest.mark.parametrize("loss_type", [name for name in READ_BY if name not in ("clip_cov", "kl_cov")])
def test_what_a_loss_does_not_read_is_not_passed(trainer, loss_type):
    setting = draw_setting(0) | PLAIN | {"loss_type": loss_type, "delta": 3.0, "level": "sequence"}
    setting |= {"sapo": (0.5, 2.0), "vespo": (2.0, 3.0, 1.5, 2.0), "epsilon": (0.1, 2.0), "cispo_cap": 2.0}
    apply_setting(trainer, setting, 0)
    config, read = trainer._make_loss_config(), READ_BY[loss_type]
    assert config.delta == (3.0 if "delta" in read else None)
    assert config.epsilon_low == (0.1 if "epsilon_low" in read else 0.2)
    assert config.epsilon_high == (2.0 if "epsilon_high" in read else 0.28)
    assert config.ratio_level == ("sequence" if "ratio_level" in read else "token")
    assert (config.sapo.temperature_pos, config.sapo.temperature_neg) == ((0.5, 2.0) if "sapo" in read else (1.0, 1.05))
    assert config.vespo.k_neg == (1.5 if "vespo" in read else 3.0)
    assert config.max_completion_length == (8 if "max_completion_length" in read else None)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "cispo", "vespo"])
def test_the_kept_denominator_of_the_means_over_tokens(trainer, monkeypatch, loss_type):
    setting = draw_setting(1) | PLAIN | {"loss_type": loss_type, "rho": 0.3, "steps_per_generation": 4}
    inputs = apply_setting(trainer, setting, 1)
    everything, gradient, metrics = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    monkeypatch.setattr(trainer.args, "entropy_denominator", "kept")
    kept, kept_gradient, _ = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    assert 0 < metrics["entropy/kept_share"] < 0.5
    torch.testing.assert_close(kept * metrics["entropy/kept_share"], everything)
    torch.testing.assert_close(kept_gradient * metrics["entropy/kept_share"], gradient)


@pytest.mark.skipif(not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason="TRL < 1.15 has no fused lm_head here")
def test_the_loss_never_materialises_logits(trainer, monkeypatch):
    inputs = apply_setting(trainer, draw_setting(2) | {"aux_coef": None}, 2)

    def refuse(*_):
        raise AssertionError("the lm_head was called")

    monkeypatch.setattr(trainer.model.lm_head, "forward", refuse)
    loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)


def test_the_entropy_controller_is_saved_and_loaded_by_trl(tmp_path):
    options = {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 100.0, "save_strategy": "steps"}
    trainer = build_trainer(GRPOTrainer, GRPOConfig, tmp_path, max_steps=2, save_steps=2, **options)
    if not hasattr(trainer, "_entropy_bonus_enabled"):
        pytest.skip("this TRL has no entropy controller")
    trainer.train()
    assert trainer.entropy_coef == pytest.approx(0.11)
    state = json.loads((tmp_path / "checkpoint-2" / "entropy_ctrl_state.json").read_text())
    assert state == {"entropy_coef": trainer.entropy_coef, "last_world_entropy": trainer._last_world_entropy}
    again = build_trainer(GRPOTrainer, GRPOConfig, tmp_path, max_steps=3, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.entropy_coef == pytest.approx(0.115)


def test_a_run_with_the_entropy_controller_is_trls(tmp_path):
    options = {"loss_type": "cispo", "epsilon_high": 5.0, "use_adaptive_entropy": True, "entropy_coef": 0.02}
    options |= {"entropy_target": 10.0, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_steps": 3}
    logged = []
    for which in ((trl.GRPOTrainer, trl.GRPOConfig), (GRPOTrainer, GRPOConfig)):
        trainer = build_trainer(*which, tmp_path / str(len(logged)), num_iterations=2, **options)
        trainer.train()
        logged.append([entry for entry in trainer.state.log_history if "entropy" in entry])
    names = ("loss", "grad_norm", "entropy", "policy_loss", "entropy_coef", "cispo_clip_ratio")
    assert len(logged[0]) == 3 and logged[1][-1]["entropy_coef"] == pytest.approx(0.035)
    for theirs, ours in zip(*logged, strict=True):
        for name in (*names, "reward"):
            if name in names or name in theirs:  # there is no reward where a generation is used again
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_settings_of_other_losses_do_not_matter(tmp_path):
    build_trainer(GRPOTrainer, GRPOConfig, tmp_path, loss_type="grpo", sapo_temperature_pos=-1.0, vespo_k_neg=-1.0)


def test_a_loss_type_that_only_a_newer_trl_knows_is_that_trls(trainer, monkeypatch):
    inputs = apply_setting(trainer, draw_setting(0) | PLAIN | {"loss_type": "gmpo"}, 0)
    with pytest.raises(ValueError, match="loss_type: found 'gmpo'"):
        trainer._compute_loss(trainer.model, inputs)
    monkeypatch.setattr(trl_grpo.compat, "IN_TESTED_RANGE", False)
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda *_: "theirs")
    assert trainer._compute_loss(trainer.model, inputs) == "theirs"
    monkeypatch.setattr(trainer.args, "entropy_denominator", "kept")
    with pytest.raises(ValueError, match="entropy_denominator: found 'kept', expected 'all' with loss_type='gmpo'"):
        trainer._make_loss_config()


def test_what_a_multimodal_model_needs_reaches_an_override(tmp_path):
    seen = {}

    class Spy(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            seen.update(kwargs)
            kwargs.pop("token_type_ids", None)
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    trainer = build_trainer(Spy, GRPOConfig, tmp_path)
    inputs = random_inputs(trainer, seed=0) | {"token_type_ids": torch.zeros(4, 10, dtype=torch.int64)}
    trainer._compute_loss(trainer.model, inputs)
    assert seen["token_type_ids"] is inputs["token_type_ids"] and "prompt_ids" not in seen


def load_plugin_again(monkeypatch):
    spec = importlib.util.find_spec("rlloss.integrations.trl.compat")
    assert spec is not None and spec.loader is not None
    monkeypatch.setitem(sys.modules, "again", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)


def test_trl_outside_the_tested_range_warns_once_and_an_incompatible_one_raises(monkeypatch):
    first, beyond = (re.escape(str(version)) for version in compat.TESTED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_plugin_again(monkeypatch)
    monkeypatch.setattr(trl, "__version__", "2.3.0")
    with pytest.warns(UserWarning, match=rf"tested with TRL >= {first}, < {beyond}; found 2\.3\.0") as record:
        load_plugin_again(monkeypatch)
    assert len(record) == 1
    monkeypatch.setattr(trl, "GRPOTrainer", type("GRPOTrainer", (), {"_compute_loss": None}))
    with pytest.raises(ImportError, match="TRL 2.3.0 does not fit.*has no _get_per_token_logps_and_entropies"):
        load_plugin_again(monkeypatch)


def test_everything_multimodal_that_trl_knows_is_handed_on():
    own = {"self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"}
    own |= {"compute_entropy", "compute_aux_loss", "args", "kwargs"}
    known = inspect.signature(trl.GRPOTrainer._get_per_token_logps_and_entropies).parameters
    assert set(known) - own <= set(MULTIMODAL)


@pytest.mark.parametrize("plan", ["auto", "keep", "recompute", "trl"])
def test_the_lm_head_runs_products_for_tokens_that_count_and_live_ones(trainer, monkeypatch, plan):
    if plan != "trl" and why_no_patch() is not None:
        pytest.skip(why_no_patch())
    monkeypatch.setattr(trainer.args, "lm_head_plan", plan)
    inputs = apply_setting(trainer, draw_setting(0) | PLAIN | {"loss_type": "dapo", "tool_mask": True}, 0)
    inputs["advantages"] = torch.tensor([1.0, 0.0, -1.0, 0.0])
    counted = inputs["completion_mask"] * inputs["tool_mask"]
    with count_products() as products:
        loss, _, _ = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    if plan == "trl":
        assert products.unit == 0
        return
    weight = trainer.model.get_output_embeddings().weight
    assert products.unit == products.flop["logits"] == 2 * int(counted.sum()) * weight.numel()
    live = int((counted * (inputs["advantages"] != 0).unsqueeze(1)).sum())
    assert 0 < products.flop["weight_grad"] <= 2 * live * weight.numel()
    assert (products.flop["recompute"] > 0) == (plan == "recompute")
