"""Test that two processes together select the same tokens and log the same metrics as one process."""

import pytest
import torch

from rlloss.integrations.trl.metrics import GAUGES
from rlloss.integrations.trl.trainer import GRPOConfig, GRPOTrainer
from tests.support.ranks import on_ranks
from tests.support.trl_harness import build_trainer, loss_gradients_metrics, random_inputs

B, T = 8, 7
COVARIANCE = {"ratio": 0.2, "scope": "generation"}
CASES = {
    "clip_cov": {"loss_type": "clip_cov", "covariance": COVARIANCE | {"low": 0.05, "high": 9.0}},
    "kl_cov": {"loss_type": "kl_cov", "covariance": COVARIANCE},
    "k": {"top_entropy_quantile": 0.4, "exact_k": True, "entropy_scope": "generation"},
    "cutoff": {"top_entropy_quantile": 0.4, "entropy_scope": "generation"},
    "k of the micro-batch": {"top_entropy_quantile": 0.4, "exact_k": True},
    "k of the window": {"top_entropy_quantile": 0.4, "exact_k": True, "entropy_scope": "window"},
    "divided by the kept": {
        "top_entropy_quantile": 0.4, "entropy_scope": "generation", "entropy_denominator": "kept",
    },
}  # fmt: skip


def generation(trainer) -> dict:
    """B completions as after a generation."""
    inputs = random_inputs(trainer, seed=3, B=B, T=T)
    g = torch.Generator().manual_seed(5)
    inputs["rollout_entropy"] = torch.randint(0, 4, (B, T), generator=g) / 4.0  # ties
    inputs["rollout_logp"] = inputs["old_per_token_logps"]
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    return inputs


def step(folder, name: str, rows: list[int]) -> tuple[dict, torch.Tensor, dict]:
    """(micro-batch with its selections, gradient of its loss, metrics) of these rows."""
    trainer = build_trainer(GRPOTrainer, GRPOConfig, folder, num_iterations=2, **CASES[name])
    trainer.model.train()
    trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = 1
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    whole = generation(trainer)
    inputs = {key: x[rows] if x.dim() else x for key, x in whole.items()}
    config = trainer._make_loss_config()
    trainer._rollout.select([inputs], config, 11)
    _, gradient, metrics = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    return inputs, gradient, metrics


def _on_a_rank(rank: int, port: int, folder: str, expected: dict) -> None:
    rows = [3, 0, 2, 1] if rank == 0 else [6, 7, 4, 5]  # TRL shuffles those of a process
    for name, (inputs, gradient, metrics) in expected.items():
        own, own_gradient, own_metrics = step(f"{folder}/{name}/{rank}", name, rows)
        for key in ("selected_tokens", "kept_tokens"):
            assert (key in own) == (key in inputs), (name, key)
            if key in inputs:
                assert torch.equal(own[key], inputs[key][rows]), (name, key, rank)
        if "entropy_cutoff" in inputs:
            assert own["entropy_cutoff"] == inputs["entropy_cutoff"], name
        torch.distributed.all_reduce(own_gradient)
        torch.testing.assert_close(own_gradient / 2, gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        logged = [*GAUGES, *(k for k in metrics if k.startswith(("cov/", "entropy"))), "rlloss/live_share"]
        for key in logged:
            assert own_metrics[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-6), (name, key)


@pytest.mark.parametrize("names", [
    ("clip_cov", "k", "divided by the kept"),
    pytest.param(("kl_cov", "cutoff", "k of the micro-batch", "k of the window"), marks=pytest.mark.slow),
], ids=",".join)  # fmt: skip
def test_two_processes_select_and_log_what_one_does(tmp_path, names):
    expected = {name: step(tmp_path / name / "one", name, list(range(B))) for name in names}
    for name, (inputs, gradient, _) in expected.items():
        mask = inputs["completion_mask"].bool()
        for key in {"selected_tokens", "kept_tokens"} & set(inputs):
            assert 0 < inputs[key].sum() < mask.sum(), name
        assert gradient.norm() > 0.01
    for name in names:  # once there are ranks, only the first one saves the model
        for rank in range(2):
            build_trainer(GRPOTrainer, GRPOConfig, tmp_path / name / str(rank))
    on_ranks(_on_a_rank, 2, str(tmp_path), expected)
