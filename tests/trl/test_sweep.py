"""Test the TRL integration against TRL on random settings: one trainer, TRL's `_compute_loss` and rlloss's."""

import contextlib
import itertools

import pytest
import torch
import trl

from rlloss.backends import backend
from rlloss.integrations.trl.trainer import GRPOConfig, GRPOTrainer
from tests.support.ranks import on_ranks
from tests.support.trl_harness import (
    TRL_LOSS_TYPES,
    VALUES,
    Rivals,
    apply_setting,
    build_trainers,
    compare_setting,
    draw_setting,
    end_step,
    loss_gradients_metrics,
    model_inputs,
    setting_inputs,
)

SETTINGS = 320
RANKS_SETTINGS = 16


def forbidden(*_):
    raise AssertionError("TRL's own loss was entered")


@pytest.fixture(autouse=True)
def trls_own_loss_is_forbidden(monkeypatch):
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", forbidden)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    return build_trainers(GRPOTrainer, GRPOConfig, tmp_path_factory.mktemp("out"))


def backend_of(seed: int):
    """Four settings of each loss type run in the interpreter if available, the others in torch, which is faster."""
    return contextlib.nullcontext() if seed // len(TRL_LOSS_TYPES) % 10 == 0 else backend("torch")


@pytest.mark.parametrize("seed", range(SETTINGS))
def test_loss_gradients_metrics_and_controller_equal_trl(trainers, seed):
    with backend_of(seed):
        compare_setting(trainers, GRPOTrainer._compute_loss, seed)


def test_sweep_reaches_every_value_of_every_option_with_every_loss_type():
    drawn = [draw_setting(seed) for seed in range(SETTINGS)]
    for name, values in VALUES.items():
        reached = {(setting["loss_type"], setting[name]) for setting in drawn}
        assert reached == set(itertools.product(TRL_LOSS_TYPES, values)), name
    together = ("entropy", "rho", "train")
    reached = {tuple(setting[name] for name in together) for setting in drawn}
    assert reached == set(itertools.product(*(VALUES[name] for name in together)))


# (training, last of the step, target, coefficient afterwards); bounded by 0.28 and 0.31, steps of 0.02
CONTROL = [
    (True, False, 10.0, 0.30), (False, True, 10.0, 0.30), (True, True, 10.0, 0.31),
    (True, False, 0.0, 0.31), (True, True, 0.0, 0.29), (True, True, 0.0, 0.28),
]  # fmt: skip


@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_the_entropy_controller_equals_trls_over_steps(trainers, loss_type):
    trainer = trainers[False]
    setting = draw_setting(1) | {"loss_type": loss_type, "entropy": "adaptive", "entropy_coef": 0.30, "aux_coef": None}
    setting |= {"last_entropy": float("inf"), "rho": 0.5, "accumulation": 2}
    apply_setting(trainer, setting, 0)
    trainer.args.entropy_coef_min = 0.28
    rivals = Rivals(trainer, GRPOTrainer._compute_loss)
    for i, (train, ends, target, coefficient) in enumerate(CONTROL):
        trainer.model.train(train)
        end_step(trainer, ends)
        trainer.args.entropy_target = target
        with backend("torch"):
            rivals.compare(setting_inputs(trainer, setting, i), (loss_type, i))
        assert rivals.ours["entropy_coef"] == pytest.approx(coefficient)
        assert (rivals.ours["_entropy_window_stats"] is None) == (train and ends)


def test_the_bonus_alone_is_the_mean_entropy_of_the_kept_tokens(trainers):
    trainer = trainers[False]
    setting = draw_setting(3) | {"loss_type": "dapo", "entropy": "static", "entropy_coef": 0.3, "rho": 0.5}
    setting |= {"beta": 0.0, "aux_coef": None, "accumulation": 4, "train": True, "tool_mask": False}
    inputs = apply_setting(trainer, setting, 3)
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    loss, gradient, metrics = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    trainer.model.zero_grad()
    called = (trainer.model, *model_inputs(inputs).values(), 7)
    entropy = trainer._get_per_token_logps_and_entropies(*called, compute_entropy=True)[1]
    counted = entropy[inputs["completion_mask"].bool()]
    kept = counted[counted >= counted.detach().quantile(0.5)]
    (-0.3 * kept.mean() / 4).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    torch.testing.assert_close(loss, -0.3 * kept.mean().detach() / 4)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert gradient.norm() > 0.01 and abs(metrics["policy_loss"]) < 1e-6
    assert metrics["rlloss/live_share"] == pytest.approx(metrics["entropy/kept_share"])


def test_the_auxiliary_loss_of_experts_reaches_loss_and_router(trainers):
    trainer, setting = trainers[True], draw_setting(3) | {"aux_coef": 1.0, "train": True, "accumulation": 2}
    inputs = apply_setting(trainer, setting, 3)
    with_aux = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    trainer.aux_loss_enabled = False
    without = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    assert set(with_aux[2]) - set(without[2]) == {"aux_loss"} and with_aux[2]["aux_loss"] > 0.5
    torch.testing.assert_close(with_aux[0] - without[0], torch.tensor(with_aux[2]["aux_loss"] / 2))
    assert (with_aux[1] - without[1]).norm() > 1e-3


def _compare_on_a_rank(rank: int, port: int, folder: str) -> None:
    trl.GRPOTrainer._compute_loss = forbidden  # type: ignore[method-assign]
    trainers = build_trainers(GRPOTrainer, GRPOConfig, f"{folder}/{rank}")
    assert trainers[False].accelerator.num_processes == 2
    for seed in range(RANKS_SETTINGS):
        with backend("torch"):
            compare_setting(trainers, GRPOTrainer._compute_loss, seed, inputs_seed=seed * 2 + rank)


def test_two_ranks_equal_trl(tmp_path):
    kinds = {(s["loss_type"], s["entropy"]) for s in map(draw_setting, range(RANKS_SETTINGS))}
    assert {loss_type for loss_type, _ in kinds} == set(TRL_LOSS_TYPES) and {"static", "adaptive"} < {
        k for _, k in kinds
    }
    on_ranks(_compare_on_a_rank, 2, str(tmp_path))
