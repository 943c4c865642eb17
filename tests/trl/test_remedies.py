"""Test the remedies against entropy collapse in a trainer of TRL: picked and kept tokens, temperatures by entropy."""

import contextlib
import dataclasses
import math
from typing import Any

import pytest
import torch
import trl.trainer.utils

from rlloss import entropy_cutoff, reference
from rlloss.entropy.temperature import EDTemperature, TwoLevelTemperature
from rlloss.integrations.trl.generation_batch import content_key
from rlloss.integrations.trl.trainer import GRPOConfig, GRPOTrainer
from rlloss.integrations.trl.zero_advantage import counted_tokens
from rlloss.losses import CovarianceConfig
from rlloss.tokens import covariance_selection
from rlloss.tokens.masks import top_entropy_mask
from tests.support.trl_harness import (
    ROUNDING,
    TRLS_LOSS,
    apply_setting,
    assert_same_step,
    build_trainer,
    draw_setting,
    loss_gradients_metrics,
    model_inputs,
)

PLAIN = {"rho": 1.0, "beta": 0.0, "off_policy": None, "sampler": None, "entropy": None, "aux_coef": None,
         "level": "token", "delta": None, "on_policy": False, "train": True, "bias_correction": False}  # fmt: skip
TWO_LEVEL = {"rule": "two_level", "high": 1.4, "low": 0.8, "cutoff": 3.0}


def distinct(completion_ids, **_):
    return [float(len(set(ids))) for ids in completion_ids]


def token_numbers(trainer, inputs):
    """(logp, entropy) of the micro-batch, from TRL's own call of the model."""
    T = inputs["completion_ids"].shape[1]
    call = trl.GRPOTrainer._get_per_token_logps_and_entropies
    with torch.no_grad():
        return call(trainer, trainer.model, *model_inputs(inputs).values(), T, compute_entropy=True)[:2]


def micro_batch(trainer, seed: int, **changes):
    setting = draw_setting(seed) | PLAIN | {"loss_type": "dapo"} | changes
    return apply_setting(trainer, setting, seed)


@pytest.mark.parametrize("seed", range(4))
def test_clip_cov_that_picks_nothing_is_trls_dapo(trainer, monkeypatch, seed):
    inputs = micro_batch(trainer, seed)
    expected = loss_gradients_metrics(trainer, TRLS_LOSS, inputs)
    trainer.loss_type = "clip_cov"
    monkeypatch.setattr(trainer.args, "covariance", {"low": 1e9, "high": 1e9})
    found = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    assert_same_step(found, expected)
    assert found[2]["cov/selected_share"] == 0.0
    for name in set(expected[2]):
        assert found[2][name] == pytest.approx(expected[2][name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("penalty", ["abs", "k3"])
@pytest.mark.parametrize("seed", range(4))
def test_the_loss_of_a_micro_batch_is_that_of_the_formula(trainer, monkeypatch, seed, penalty):
    inputs = micro_batch(trainer, seed)
    logp, _ = token_numbers(trainer, inputs)
    mask = counted_tokens(inputs)
    advantage = inputs["advantages"].view(len(mask), -1)
    ratio = (logp - inputs["old_per_token_logps"]).exp()
    covariance = reference.covariance(logp, advantage, mask)
    denominator = inputs["num_items_in_batch"] / trainer.args.steps_per_generation
    k = max(math.floor(0.2 * int(mask.sum())), 1)

    def largest(allowed):
        score = torch.where(allowed, covariance, -torch.inf).flatten()
        picked = torch.zeros_like(score, dtype=torch.bool)
        picked[score.topk(k).indices] = True
        return picked.view(mask.shape) & allowed

    monkeypatch.setattr(trainer.args, "covariance", {"ratio": 0.2, "kl_coef": 0.5, "penalty": penalty})
    trainer.loss_type = "kl_cov"
    trainer.epsilon_low = trainer.epsilon_high = 0.2
    loss, _, metrics = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    picked = largest(mask)
    expected = torch.where(mask, reference.kl_cov(ratio, advantage, picked, 0.5, penalty), 0.0).sum() / denominator
    torch.testing.assert_close(loss * trainer.current_gradient_accumulation_steps, expected, rtol=1e-5, atol=1e-6)
    assert metrics["cov/selected_share"] == pytest.approx(int(picked.sum()) / int(mask.sum()))

    monkeypatch.setattr(trainer.args, "covariance", {"ratio": 0.2, "low": 0.01, "high": 5.0, "selection": "top"})
    trainer.loss_type = "clip_cov"
    trainer.epsilon_low, trainer.epsilon_high = low, high = 0.1, 0.28
    loss, _, metrics = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    surrogate = reference.clip_surrogate(ratio, advantage, low, high)
    clipped = surrogate != -ratio * advantage
    picked = largest(mask & ~clipped & (covariance >= 0.01) & (covariance <= 5.0))
    expected = torch.where(mask & ~picked, surrogate, 0.0).sum() / denominator
    torch.testing.assert_close(loss * trainer.current_gradient_accumulation_steps, expected, rtol=1e-5, atol=1e-6)
    assert metrics["cov/selected_share"] == pytest.approx(int(picked.sum()) / int(mask.sum()))


def test_kl_cov_moves_completions_without_an_advantage(trainer, monkeypatch):
    """Therefore none of them may run without gradient."""
    inputs = micro_batch(trainer, 1, on_policy=False, per_token_advantage=False, tool_mask=False)
    inputs["advantages"] = torch.tensor([0.0, -2.0, 0.0, -1.0])  # the mean is below 0: a likely token of those covaries
    trainer.loss_type = "kl_cov"
    trainer.epsilon_low = trainer.epsilon_high = 0.2
    monkeypatch.setattr(trainer.args, "covariance", {"ratio": 0.5})
    found = {}
    for choice in ("keep", "forward_only"):
        monkeypatch.setattr(trainer.args, "zero_advantage", choice)
        found[choice] = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    assert_same_step(found["forward_only"], found["keep"])
    tokens = inputs["completion_mask"].bool()
    assert found["keep"][2]["rlloss/live_share"] * int(tokens.sum()) > int(tokens[[1, 3]].sum()) + 0.5


def test_a_bonus_on_all_tokens(trainer, monkeypatch):
    inputs = micro_batch(trainer, 1, entropy="static", entropy_coef=0.3, rho=0.5)
    _, entropy = token_numbers(trainer, inputs)
    mask = counted_tokens(inputs)
    kept = top_entropy_mask(entropy, mask, 0.5)
    of_kept = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    monkeypatch.setattr(trainer.args, "entropy_bonus_tokens", "all")
    of_all = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    difference = (of_all[0] - of_kept[0]) * trainer.current_gradient_accumulation_steps
    torch.testing.assert_close(difference, 0.3 * (entropy[kept].mean() - entropy[mask].mean()), rtol=1e-4, atol=1e-6)
    assert of_all[2]["policy_loss"] == pytest.approx(of_kept[2]["policy_loss"], rel=1e-5)


COVARIANCE = {"ratio": 0.1, "scope": "generation"}
GLOBAL = {
    "clip_cov": {"loss_type": "clip_cov", "covariance": COVARIANCE | {"low": 0.1, "high": 9.0}},
    # Not "abs": on policy its slope is the sign of rounding noise.
    "kl_cov": {"loss_type": "kl_cov", "covariance": COVARIANCE | {"penalty": "k3"}},
    "cutoff of the window": {"top_entropy_quantile": 0.3, "entropy_scope": "window"},
    "k of the window": {"top_entropy_quantile": 0.3, "entropy_scope": "window", "exact_k": True},
    "cutoff of the generation": {"top_entropy_quantile": 0.3, "entropy_scope": "generation"},
    "k of the generation": {"top_entropy_quantile": 0.3, "entropy_scope": "generation", "exact_k": True},
    "divided by the kept of the window": {
        "top_entropy_quantile": 0.3, "entropy_scope": "window", "entropy_denominator": "kept",
    },
    "divided by the kept of the generation": {
        "top_entropy_quantile": 0.3, "entropy_scope": "generation", "exact_k": True, "entropy_denominator": "kept",
    },
    "all at once": {
        "loss_type": "clip_cov", "covariance": COVARIANCE | {"low": 0.1, "high": 9.0}, "top_entropy_quantile": 0.3,
        "entropy_scope": "generation", "dynamic_temperature": TWO_LEVEL,
    },
}  # fmt: skip


def trained(folder, size: int, **options):
    """The parameters after two optimizer steps on one generation of 8, in micro-batches of `size`."""
    options = {"max_completion_length": 8, "num_generations": 4, "learning_rate": 1e-2, "max_steps": 2} | options
    trainer = build_trainer(
        GRPOTrainer, GRPOConfig, folder, distinct, per_device_train_batch_size=size, num_iterations=2,
        gradient_accumulation_steps=8 // size, gauges="all", **options,
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "entropy" in entry]
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), logs


@pytest.mark.parametrize("which", GLOBAL)
def test_a_global_selection_does_not_depend_on_the_size_of_micro_batches(tmp_path, which):
    whole, logs = trained(tmp_path / "8", 8, **GLOBAL[which])
    split, their_logs = trained(tmp_path / "2", 2, **GLOBAL[which])
    # Adam's first steps are signs: an element whose gradient is rounding noise may move in the other direction.
    assert (split - whole).abs().gt(1e-4).float().mean() < 1e-3
    for ours, theirs in zip(logs, their_logs, strict=True):
        for name in ("cov/logp_advantage", "entropy/p80", "rlloss/abs_log_ratio"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-5), name
    if "covariance" in GLOBAL[which]:
        assert all(entry["cov/selected_share"] > 0 for entry in logs)
    if "entropy/cutoff" in logs[0]:  # of the window: by the policy of each step
        anew = GLOBAL[which]["entropy_scope"] == "window"
        assert (logs[0]["entropy/cutoff"] != logs[1]["entropy/cutoff"]) == anew
    if "top_entropy_quantile" in GLOBAL[which]:
        assert all(0.1 < entry["entropy/kept_share"] < 0.5 for entry in logs)


def test_what_is_kept_and_picked_is_that_of_the_whole_generation(tmp_path):
    trainer = build_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, distinct, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        num_generations=4, num_iterations=2, loss_type="clip_cov", top_entropy_quantile=0.3, exact_k=True,
        entropy_scope="generation", covariance={"ratio": 0.1, "low": 0.1, "high": 9.0, "scope": "generation"},
    )  # fmt: skip
    prompts = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer._prepare_inputs(prompts)
    batches = trainer._buffered_inputs
    whole = {name: torch.cat([inputs[name] for inputs in batches]) for name in (
        "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "kept_tokens",
        "selected_tokens", "rollout_entropy", "rollout_logp", "old_per_token_logps",
    )}  # fmt: skip
    mask = whole["completion_mask"].bool()
    logp, entropy = token_numbers(trainer, whole)
    torch.testing.assert_close(whole["rollout_entropy"][mask], entropy[mask])
    torch.testing.assert_close(whole["rollout_logp"][mask], logp[mask])
    assert torch.equal(whole["rollout_logp"], whole["old_per_token_logps"])
    assert torch.equal(whole["kept_tokens"], top_entropy_mask(whole["rollout_entropy"], mask, 0.3, exact_k=True))
    assert int(whole["kept_tokens"].sum()) == math.floor(0.3 * (int(mask.sum()) - 1)) + 1
    config = CovarianceConfig(ratio=0.1, low=0.1, high=9.0)
    picked = covariance_selection(
        whole["rollout_logp"], whole["advantages"], mask, config=config, draw=0, sequence_key=content_key(whole)
    )
    assert torch.equal(whole["selected_tokens"], picked) and picked.any()


def test_without_a_pass_of_trls_the_generation_gets_one_of_its_own(tmp_path):
    """TRL makes no pass without gradient if updates are on-policy."""
    trainer = build_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, distinct, top_entropy_quantile=0.3, entropy_scope="generation",
        num_generations=4,
    )  # fmt: skip
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert "old_per_token_logps" not in inputs
    _, entropy = token_numbers(trainer, inputs)
    mask = inputs["completion_mask"].bool()
    torch.testing.assert_close(inputs["rollout_entropy"][mask], entropy[mask])
    assert inputs["entropy_cutoff"] == entropy_cutoff(inputs["rollout_entropy"], mask, 0.3)


def model_logits(trainer, inputs):
    """Logits [B, T, V] of the completions."""
    logits = trainer.model(**model_inputs(inputs)).logits
    return logits[:, -inputs["completion_ids"].shape[1] - 1 : -1]


@pytest.mark.parametrize("rule", [TWO_LEVEL, {"rule": "edt", "base": 1.3, "theta": 6.0},
                                  {"rule": "dynatemp", "low": 0.6, "high": 1.6}])  # fmt: skip
def test_the_loss_is_at_the_temperatures_that_sampled(tmp_path, monkeypatch, rule):
    """Then the ratio refers to the distribution that was sampled, and on-policy it is 1."""
    trainer = build_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, distinct, dynamic_temperature=rule, num_iterations=2, num_generations=4,
        beta=0.05, top_entropy_quantile=0.4,
    )  # fmt: skip
    sampled = []
    sample = torch.multinomial

    def multinomial(probabilities, *args, **kwargs):
        chosen = sample(probabilities, *args, **kwargs)
        sampled.append(probabilities.gather(-1, chosen).log().squeeze(-1))
        return chosen

    monkeypatch.setattr(torch, "multinomial", multinomial)
    output = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    monkeypatch.setattr(torch, "multinomial", sample)
    mask = output["completion_mask"].bool()
    sampler_logp = torch.stack(sampled, 1)[:, : mask.shape[1]]
    torch.testing.assert_close(output["old_per_token_logps"][mask], sampler_logp[mask], rtol=1e-4, atol=2e-5)

    scaled = model_logits(trainer, output) / output["temperatures"][..., None]
    logp = scaled.log_softmax(-1).gather(-1, output["completion_ids"][..., None]).squeeze(-1)
    torch.testing.assert_close(output["ref_per_token_logps"][mask], logp[mask], rtol=1e-4, atol=2e-5)
    assert output["temperatures"][mask].std() > 0.04

    *_, metrics = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, output)
    entropy = torch.distributions.Categorical(logits=scaled).entropy()
    assert metrics["entropy"] == pytest.approx(entropy[mask].mean().item(), rel=1e-4)
    assert metrics["rlloss/abs_log_ratio"] < ROUNDING and metrics["kl"] == pytest.approx(0.0, abs=ROUNDING)
    exact = {name: value for name, value in output.items() if name != "old_per_token_logps"}
    *_, metrics = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, exact)
    assert metrics["rlloss/on_policy_share"] == 1.0
    # Passes by other callers use temperature 1.
    logp, _ = token_numbers(trainer, output)
    plain = model_logits(trainer, output).log_softmax(-1)
    plain = plain.gather(-1, output["completion_ids"][..., None]).squeeze(-1)
    torch.testing.assert_close(logp[mask], plain[mask], rtol=1e-4, atol=2e-5)
    ours = trainer._get_per_token_logps_and_entropies(trainer.model, *model_inputs(output).values(), mask.shape[1])[0]
    torch.testing.assert_close(ours[mask], plain[mask], rtol=1e-4, atol=2e-5)


def test_the_gradient_is_that_of_the_scaled_logits(tmp_path):
    trainer = build_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, distinct, dynamic_temperature=TWO_LEVEL, num_iterations=2, num_generations=4
    )
    inputs = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    inputs["advantages"] = torch.tensor([1.0, -0.5, 0.0, 0.7])  # one completion apart, without gradient
    g = torch.Generator().manual_seed(0)
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"] + 0.1 * torch.randn(
        inputs["old_per_token_logps"].shape, generator=g
    )
    loss, gradient, _ = loss_gradients_metrics(trainer, GRPOTrainer._compute_loss, inputs)
    trainer.model.zero_grad()
    logp = (model_logits(trainer, inputs) / inputs["temperatures"][..., None]).log_softmax(-1)
    logp = logp.gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
    ratio = (logp - inputs["old_per_token_logps"]).exp()
    surrogate = reference.clip_surrogate(ratio, inputs["advantages"][:, None], 0.2, 0.2)
    mask = inputs["completion_mask"].bool()
    expected = torch.where(mask, surrogate, 0.0).sum() / (
        inputs["num_items_in_batch"] / trainer.args.steps_per_generation
    )
    expected.backward()
    theirs = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-5)


def test_where_an_engine_samples_the_temperatures_follow_from_the_models_entropies(tmp_path, monkeypatch):
    trainer = build_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, distinct, dynamic_temperature={"rule": "edt", "base": 1.3, "theta": 6.0},
        num_iterations=2, num_generations=4,
    )  # fmt: skip
    monkeypatch.setattr(trainer._rollout, "sampling", contextlib.nullcontext)
    monkeypatch.setattr(type(trainer._rollout), "_by_engine", property(lambda self: True))
    output = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    logits = model_logits(trainer, output)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    mask = output["completion_mask"].bool()
    expected = EDTemperature(base=1.3, theta=6.0).temperature(entropy)
    torch.testing.assert_close(output["temperatures"][mask], expected[mask], rtol=1e-4, atol=1e-5)
    logp = (logits / expected[..., None]).log_softmax(-1).gather(-1, output["completion_ids"][..., None]).squeeze(-1)
    torch.testing.assert_close(output["old_per_token_logps"][mask], logp[mask], rtol=1e-4, atol=1e-4)


def test_a_generate_of_the_models_own_is_called_and_stays(tmp_path):
    trainer = build_trainer(GRPOTrainer, GRPOConfig, tmp_path, distinct, dynamic_temperature=TWO_LEVEL)
    model: Any = trainer.model
    calls, generate = [], model.generate

    def own(*args, **kwargs):
        calls.append(kwargs)
        return generate(*args, **kwargs)

    model.generate = own
    trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    assert len(calls) == 1 and calls[0]["logits_processor"] and model.generate is own
    del model.generate
    trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    assert "generate" not in vars(model)


def test_vllm_is_told_the_rule(tmp_path):
    config = GRPOConfig(
        output_dir=str(tmp_path), bf16=False, use_vllm=True, dynamic_temperature=TWO_LEVEL,
        generation_kwargs={"seed": 1, "extra_args": {"other": 2}},
    )  # fmt: skip
    assert config.generation_kwargs == {"seed": 1, "extra_args": {"other": 2, "entropy_temperature": TWO_LEVEL}}


def test_the_rules_have_a_lowest_temperature():
    assert TwoLevelTemperature(high=0.0).lowest == 0.0 and TwoLevelTemperature(high=1.2, low=0.7).lowest == 0.7
    for rule in (EDTemperature(base=1.0, theta=1.0, minimum=0.2), EDTemperature(base=1.0, theta=1.0, minimum=0.0)):
        assert rule.temperature(torch.tensor([1e-6, 0.1, 5.0])).min() == rule.lowest
        assert dataclasses.replace(rule, base=2.0).lowest == rule.lowest
