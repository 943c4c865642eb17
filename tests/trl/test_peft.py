"""Test LoRA in the TRL integration: same loss and gradients as TRL, no product for the gradient of a frozen head."""

import functools

import peft
import pytest
import torch

import rlloss
from rlloss.integrations.trl.trainer import GRPOConfig, GRPOTrainer
from tests.support.trl_harness import Rivals, build_trainer, end_step, random_inputs


def lora_trainer(folder, trained=None, **options):
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=trained, task_type="CAUSAL_LM")
    trainer = build_trainer(functools.partial(GRPOTrainer, peft_config=lora), GRPOConfig, folder, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:  # an adapter begins with no effect
                p.normal_(std=0.3)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.mark.parametrize("trained", [None, ["lm_head"]])
@pytest.mark.parametrize("options", [{}, {"beta": 0.04}, {"top_entropy_quantile": 0.5}, {"loss_type": "grpo"}], ids=str)
def test_loss_gradients_and_metrics_are_trls(tmp_path, trained, options):
    trainer = lora_trainer(tmp_path, trained, **options)
    end_step(trainer, True)
    with rlloss.count_products() as products:
        Rivals(trainer, GRPOTrainer._compute_loss).compare(random_inputs(trainer, seed=0), options)
    assert products.units_of("logits") > 0 and products.units_of("hidden_grad") > 0
    assert (products.units_of("weight_grad") > 0) == (trained is not None)


def test_the_adapter_is_trained_and_nothing_else(tmp_path):
    trainer = lora_trainer(tmp_path, max_steps=2, learning_rate=1e-2)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
