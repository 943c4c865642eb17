"""The TRL plugin against TRL itself: one trainer object, TRL's `_compute_loss` and ours on the same inputs."""

import itertools
import math
import random

import pytest
import torch

trl = pytest.importorskip("trl")

from trl_harness import build_trainer, loss_gradients_metrics, random_inputs  # noqa: E402

from rlloss.config import LOSS_TYPES  # noqa: E402
from rlloss.integrations.trl_grpo import GRPOConfig, GRPOTrainer  # noqa: E402

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
    trainer.vllm_importance_sampling_correction = True
    trainer.model.train(setting["train"])
    trainer._loss_config = trainer._make_loss_config()
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
