"""The TRL plugin against TRL itself: one trainer object, TRL's `_compute_loss` and ours on the same inputs."""

import dataclasses
import importlib.util
import inspect
import itertools
import math
import os
import random
import socket
import sys
import warnings

import pytest
import torch

trl = pytest.importorskip("trl")
pytest.importorskip("trl.trainer.utils")

from trl_harness import build_trainer, loss_gradients_metrics, random_inputs  # noqa: E402

from rlloss.config import LOSS_TYPES  # noqa: E402
from rlloss.integrations.trl_grpo import MULTIMODAL, GRPOConfig, GRPOTrainer  # noqa: E402

OURS_ALONE = {"live_share", "entropy/kept_share", "entropy/cutoff"}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    # beta is set so that TRL builds what a KL needs; the sweep varies it.
    return build_trainer(GRPOTrainer, GRPOConfig, tmp_path_factory.mktemp("out"), beta=0.04)


def draw_setting(seed: int) -> dict:
    r = random.Random(seed)
    return {
        "loss_type": LOSS_TYPES[seed % len(LOSS_TYPES)],
        "level": r.choice(["token", "sequence"]),
        "delta": r.choice([None, None, 1.5, 4.0, 1.1]),
        "beta": r.choice([0.0, 0.04]),
        "bias_correction": r.choice([True, False]),
        "rho": r.choice([1.0, 1.0, 0.5, 0.2, 0.0]),
        "epsilon": r.choice([(0.2, 0.2), (0.2, 0.28), (0.1, 0.4)]),
        "tool_mask": r.choice([True, False]),
        "per_token_advantage": r.choice([True, False]),
        "accumulation": r.choice([1, 2, 4]),
        "steps_per_generation": r.choice([1, 2, 8]),
        "off_policy": r.choice([None, None, 0.05]),
        "sampler": r.choice([None, None, "token", "sequence"]),
        "on_policy": r.random() < 0.2,
        "correction": r.random() < 0.8,
        "train": r.random() < 0.8,
        "spread": r.choice([0.05, 0.3, 1.0]),
    }


def apply_setting(trainer, setting: dict, seed: int) -> dict:
    trainer.loss_type = setting["loss_type"]
    trainer.importance_sampling_level = setting["level"]
    trainer.args.delta = setting["delta"]
    trainer.beta = setting["beta"]
    trainer.args.use_bias_correction_kl = setting["bias_correction"]
    trainer.top_entropy_quantile = setting["rho"]
    trainer.epsilon_low, trainer.epsilon_high = setting["epsilon"]
    trainer.current_gradient_accumulation_steps = setting["accumulation"]
    trainer.args.steps_per_generation = setting["steps_per_generation"]
    trainer.off_policy_mask_threshold = setting["off_policy"]
    trainer.use_vllm = setting["sampler"] is not None
    trainer.vllm_importance_sampling_correction = setting["correction"]
    trainer.model.train(setting["train"])
    inputs = random_inputs(
        trainer,
        seed=seed,
        per_token_advantage=setting["per_token_advantage"],
        tool_mask=setting["tool_mask"],
        spread=setting["spread"],
    )
    if setting["on_policy"]:
        del inputs["old_per_token_logps"]
    if setting["sampler"] is not None:
        g = torch.Generator().manual_seed(seed)
        shape = inputs["completion_ids"].shape if setting["sampler"] == "token" else (len(inputs["advantages"]), 1)
        ratio = torch.rand(shape, generator=g) * 2
        inputs["importance_sampling_ratio"] = torch.where(ratio < 0.4, 0.0, ratio)
        inputs["sampling_per_token_logps"] = inputs["ref_per_token_logps"] + 0.1
    return inputs


@pytest.mark.parametrize("seed", range(120))
def test_loss_gradients_and_metrics_equal_trl(trainer, seed):
    setting = draw_setting(seed)
    inputs = apply_setting(trainer, setting, seed)
    expected = loss_gradients_metrics(trainer, trl.GRPOTrainer._compute_loss, inputs)
    found = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7, msg=lambda m: f"{setting}: loss: {m}")
    scale = expected[1].norm().item()
    assert (found[1] - expected[1]).norm().item() <= 1e-5 * scale + 1e-8, setting
    assert set(found[2]) - OURS_ALONE == set(expected[2]), setting
    for name, value in expected[2].items():
        assert math.isclose(found[2][name], value, rel_tol=1e-5, abs_tol=1e-6) or (
            math.isnan(value) and math.isnan(found[2][name])
        ), (setting, name, value, found[2][name])


def test_sweep_reaches_every_value_of_every_option():
    drawn = [draw_setting(seed) for seed in range(120)]
    for name, values in {
        "loss_type": set(LOSS_TYPES), "level": {"token", "sequence"}, "delta": {None, 1.1, 1.5, 4.0},
        "rho": {1.0, 0.5, 0.2, 0.0}, "per_token_advantage": {True, False}, "sampler": {None, "token", "sequence"},
        "accumulation": {1, 2, 4},
    }.items():  # fmt: skip
        assert {setting[name] for setting in drawn} == values
    pairs = {(s["loss_type"], s["level"]) for s in drawn}
    assert pairs == set(itertools.product(LOSS_TYPES, ("token", "sequence")))


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo", "luspo"])
def test_a_loss_that_is_not_built_is_trls_own(trainer, loss_type):
    setting = draw_setting(0) | {"loss_type": loss_type, "level": "sequence" if loss_type == "luspo" else "token"}
    inputs = apply_setting(trainer, setting, 0)
    expected = loss_gradients_metrics(trainer, trl.GRPOTrainer._compute_loss, inputs)
    found = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and found[2] == expected[2]
    trainer.args.entropy_denominator = "kept"
    with pytest.raises(
        ValueError, match=f"entropy_denominator: found 'kept', expected 'all' with loss_type='{loss_type}'"
    ):
        trainer._make_loss_config()
    trainer.args.entropy_denominator = "all"


def test_the_kept_denominator_is_that_of_the_paper(trainer):
    plain = {"loss_type": "dapo", "level": "token", "beta": 0.0, "delta": None, "sampler": None, "off_policy": None}
    setting = draw_setting(1) | plain | {"rho": 0.3, "steps_per_generation": 4, "train": True}
    inputs = apply_setting(trainer, setting, 1)
    everything, gradient, metrics = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    trainer.args.entropy_denominator = "kept"
    kept, kept_gradient, _ = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    trainer.args.entropy_denominator = "all"
    assert 0 < metrics["entropy/kept_share"] < 0.5
    torch.testing.assert_close(kept * metrics["entropy/kept_share"], everything)
    torch.testing.assert_close(kept_gradient * metrics["entropy/kept_share"], gradient)


@pytest.mark.skipif(not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason="TRL < 1.15 has no fused lm_head here")
def test_the_loss_never_materialises_logits(trainer, monkeypatch):
    inputs = apply_setting(trainer, draw_setting(2), 2)

    def refuse(*_):
        raise AssertionError("the lm_head was called")

    monkeypatch.setattr(trainer.model.lm_head, "forward", refuse)
    loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)


def test_training_runs_and_logs_trls_metrics_and_ours(tmp_path):
    options = {"num_iterations": 2, "max_steps": 4, "learning_rate": 1e-3, "epsilon_low": 0.1, "epsilon_high": 0.28}
    options |= {"top_entropy_quantile": 0.2, "multi_objective_aggregation": "normalize_then_sum"}
    rewards = [
        lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids],
        lambda completion_ids, **_: [float(ids[0] % 2) for ids in completion_ids],
    ]
    trainer = build_trainer(GRPOTrainer, GRPOConfig, tmp_path, rewards, **options)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert trainer.epsilon_low == 0.1
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    history = [entry for entry in trainer.state.log_history if "entropy" in entry]
    assert len(history) == 4
    assert "reward" in history[0] and "rewards/<lambda>/mean" in history[0]
    for name in ("clip_ratio/region_mean", "clip_ratio/low_min", *OURS_ALONE):
        assert all(math.isfinite(entry[name]) for entry in history), name
    assert all(0 < entry["entropy/kept_share"] <= 1 and 0 <= entry["live_share"] <= 1 for entry in history)


def test_epsilon_and_epsilon_low_are_one_bound(tmp_path):
    common = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    assert GRPOConfig(**common, epsilon_low=0.1).epsilon == 0.1
    assert GRPOConfig(**common).epsilon == trl.GRPOConfig(**common).epsilon
    with pytest.raises(ValueError, match="epsilon_low: found 0.1 and epsilon=0.3, expected one of the two"):
        GRPOConfig(**common, epsilon_low=0.1, epsilon=0.3)


def test_every_other_default_is_trls():
    theirs = {f.name: f for f in dataclasses.fields(trl.GRPOConfig)}
    ours = {f.name: f for f in dataclasses.fields(GRPOConfig)}
    assert set(ours) - set(theirs) == {"epsilon_low", "entropy_denominator"}
    assert all(ours[name].default == field.default for name, field in theirs.items())


def test_conflicting_settings_raise_when_the_trainer_is_made(tmp_path):
    with pytest.raises(ValueError, match="entropy_denominator: found 'kept'.*no effect with top_entropy_quantile=1.0"):
        build_trainer(GRPOTrainer, GRPOConfig, tmp_path, entropy_denominator="kept")
    with pytest.raises(ValueError, match="top_entropy_quantile: found 2.0"):
        build_trainer(GRPOTrainer, GRPOConfig, tmp_path, top_entropy_quantile=2.0)


def test_an_unknown_loss_type_is_named_with_the_list(tmp_path):
    with pytest.raises(ValueError, match="loss_type: found 'gmpo', expected one of 'grpo', 'bnpo', .*'vespo'"):
        build_trainer(GRPOTrainer, GRPOConfig, tmp_path, loss_type="gmpo")


def test_an_overridden_selection_of_trl_is_obeyed(tmp_path):
    class Nothing(GRPOTrainer):
        def get_high_entropy_mask(self, entropies, mask, threshold):
            return torch.zeros_like(mask, dtype=torch.bool)

    trainer = build_trainer(Nothing, GRPOConfig, tmp_path, top_entropy_quantile=0.5)
    loss, gradient, _ = loss_gradients_metrics(trainer, Nothing._compute_loss, random_inputs(trainer, seed=0))
    assert loss == 0 and (gradient == 0).all()


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


def test_trls_own_config_works_too(tmp_path):
    trainer = build_trainer(GRPOTrainer, trl.GRPOConfig, tmp_path)
    assert trainer._make_loss_config().loss_type == trl.GRPOConfig.loss_type


def load_plugin_again(monkeypatch):
    spec = importlib.util.find_spec("rlloss.integrations.trl_grpo")
    assert spec is not None and spec.loader is not None
    monkeypatch.setitem(sys.modules, "again", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)


def test_trl_outside_the_tested_range_warns_once_and_an_incompatible_one_raises(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_plugin_again(monkeypatch)
    monkeypatch.setattr(trl, "__version__", "2.3.0")
    with pytest.warns(UserWarning, match=r"rlloss is tested with TRL >= 1\.14\.0, < 1\.17\.0; found 2\.3\.0") as record:
        load_plugin_again(monkeypatch)
    assert len(record) == 1
    monkeypatch.setattr(trl, "GRPOTrainer", type("GRPOTrainer", (), {"_compute_loss": None}))
    with pytest.raises(ImportError, match="TRL 2.3.0 does not fit.*has no _get_per_token_logps_and_entropies"):
        load_plugin_again(monkeypatch)


def _compare_on_a_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    torch.set_num_threads(1)
    trainer = build_trainer(GRPOTrainer, GRPOConfig, f"{folder}/{rank}", beta=0.04)
    assert trainer.accelerator.num_processes == 2
    for seed in range(12):
        setting = draw_setting(seed)
        inputs = apply_setting(trainer, setting, seed * 2 + rank)
        expected = loss_gradients_metrics(trainer, trl.GRPOTrainer._compute_loss, inputs)
        found = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7)
        assert (found[1] - expected[1]).norm() <= 1e-5 * expected[1].norm() + 1e-8
        for name, value in expected[2].items():
            assert math.isclose(found[2][name], value, rel_tol=1e-5, abs_tol=1e-6), (setting, name)


def test_two_ranks_equal_trl(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_compare_on_a_rank, (port, str(tmp_path)), nprocs=2)


def test_everything_multimodal_that_trl_knows_is_handed_on():
    own = {"self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"}
    own |= {"compute_entropy", "compute_aux_loss", "args", "kwargs"}
    known = inspect.signature(trl.GRPOTrainer._get_per_token_logps_and_entropies).parameters
    assert set(known) - own <= set(MULTIMODAL)
