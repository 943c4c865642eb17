"""Test the adaptive entropy coefficient by hand, and step by step against TRL's trainer and rlloss's integration."""

import math
import random

import pytest
import torch
import trl

from rlloss.entropy.bonus import AdaptiveEntropyCoef, adapted, bonus_now
from rlloss.integrations.trl.trainer import GRPOTrainer
from tests.support.trl_harness import build_trainer


def test_by_hand():
    control = AdaptiveEntropyCoef(coef=0.01, target=0.2, delta=0.005, minimum=0.0, maximum=0.02)
    assert control.coef == 0.0  # nothing measured yet
    seen = []
    for entropy in (0.1, 0.2, 0.15, 0.3, 0.25, 0.1):
        control.update(entropy)
        seen.append(control.coef)
    # The coefficient: 0.015, 0.02, 0.02 (its maximum), 0.015, 0.01, 0.015. While the entropy is above the target, 0.
    assert seen == pytest.approx([0.015, 0.02, 0.02, 0.0, 0.0, 0.015])


def test_the_bounds_and_nan():
    assert adapted(0.0, 0.5, 0.2, 0.005, 0.0, 1.0) == 0.0
    assert adapted(0.999, 0.2, 0.2, 0.005, 0.0, 1.0) == 1.0
    assert adapted(0.5, math.nan, 0.2, 0.1, 0.0, 1.0) == pytest.approx(0.4)
    # A start outside the bounds moves inside step by step, as in TRL.
    assert adapted(-0.5, 0.1, 0.2, 0.1, 0.0, 1.0) == pytest.approx(-0.4)
    assert adapted(-0.5, 0.3, 0.2, 0.1, 0.0, 1.0) == 0.0
    assert bonus_now(0.3, 0.2, 0.2) == 0.3
    assert bonus_now(0.3, 0.21, 0.2) == bonus_now(0.3, math.nan, 0.2) == bonus_now(0.3, math.inf, 0.2) == 0.0


def entropies(seed: int) -> list[float]:
    r = random.Random(seed)
    return [r.choice([0.05, 0.2, 0.2000001, 0.5, math.nan, math.inf]) for _ in range(60)]


SETTINGS = [{}, {"coef": 0.3, "delta": 0.07, "maximum": 0.4}, {"coef": 0.02, "minimum": 0.01, "delta": 0.004}]


@pytest.mark.parametrize("given", SETTINGS, ids=str)
@pytest.mark.parametrize("trainer_class", [trl.GRPOTrainer, GRPOTrainer], ids=["trl", "rlloss"])
def test_equals_the_trainers(trainer_class, given, tmp_path):
    """One completion token per micro-batch. Its entropy is the entropy of the step, and the bonus shows in the loss."""
    control = AdaptiveEntropyCoef(**given)
    trainer = build_trainer(
        trainer_class, trl.GRPOConfig, tmp_path, use_adaptive_entropy=True, entropy_coef=control._coef,
        entropy_target=control.target, entropy_coef_delta=control.delta, entropy_coef_min=control.minimum,
        entropy_coef_max=control.maximum,
    )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    ids = torch.tensor([[2]])
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids > 0, "completion_ids": ids, "completion_mask": (ids > 0).long(),
        "advantages": torch.zeros(1), "num_items_in_batch": torch.tensor(1.0),
        "old_per_token_logps": torch.full((1, 1), -1.0),
    }  # fmt: skip
    applied = 0
    for entropy in entropies(len(given)):
        if not math.isfinite(entropy):
            continue
        stats = (torch.full((1, 1), -1.0, requires_grad=True), torch.full((1, 1), entropy, requires_grad=True), None)
        trainer._get_per_token_logps_and_entropies = lambda *_, stats=stats, **__: stats
        loss = trainer._compute_loss(trainer.model, inputs).item()
        assert loss == pytest.approx(-control.coef * entropy, rel=1e-6, abs=1e-12)
        applied += control.coef != 0
        control.update(torch.tensor(entropy).item())
        assert trainer.entropy_coef == control.state_dict()["coef"]
    assert applied > 5


def test_a_checkpoint_goes_on_where_it_was():
    whole, first = AdaptiveEntropyCoef(coef=0.1), AdaptiveEntropyCoef(coef=0.1)
    series = entropies(7)
    for entropy in series[:30]:
        whole.update(entropy)
        first.update(entropy)
    second = AdaptiveEntropyCoef()
    second.load_state_dict(first.state_dict())
    for entropy in series[30:]:
        assert second.coef == whole.coef
        whole.update(entropy)
        second.update(entropy)
    assert second.state_dict()["coef"] == whole.state_dict()["coef"] > 0
    with pytest.raises(ValueError, match=r"state: found \['coef'\], expected coef and last_entropy"):
        second.load_state_dict({"coef": 0.1})
