"""Test torch.compile of a loss whose settings change: dynamo makes a float symbolic once it has changed."""

import pytest
import torch

from rlloss import GRPOLoss, LinearGRPOLoss, LossConfig

B, T, D, V = 2, 5, 8, 32
SCHEDULES = {
    "clip": [(LossConfig(epsilon_low=0.1, epsilon_high=high), 1.0) for high in (0.2, 0.3, 0.5)],
    "kept": [(LossConfig(top_entropy_quantile=rho), 1.0) for rho in (0.2, 0.5, 0.8)],
    "bonus": [(LossConfig(entropy_coef=coef), 1.0) for coef in (0.1, 0.2, 0.3)],
    "KL": [(LossConfig(beta=beta), 1.0) for beta in (0.1, 0.2, 0.3)],
    "temperature": [(LossConfig(), temperature) for temperature in (0.7, 0.9, 1.1)],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("linear", [True, False])
def test_settings_that_change_stay_in_one_graph(linear, schedule):
    g = torch.Generator().manual_seed(0)
    hidden, weight, advantage = (torch.randn(*shape, generator=g) for shape in ((B, T, D), (V, D), (B,)))
    target = torch.randint(0, V, (B, T), generator=g)
    given = {"mask": torch.rand(B, T, generator=g) < 0.8, "old_logp": torch.full((B, T), -3.5)}

    def loss(hidden, weight, config, temperature):
        ref_logp = torch.full((B, T), -4.0) if config.beta != 0.0 else None
        options = {**given, "ref_logp": ref_logp, "temperature": temperature}
        if linear:
            return LinearGRPOLoss(config)(hidden, weight, target, advantage, **options).loss
        return GRPOLoss(config)(hidden @ weight.T, target, advantage, **options).loss

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for config, temperature in SCHEDULES[schedule]:
        found = []
        for function in (loss, compiled):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            value = function(leaves[0], leaves[1], config, temperature)
            found.append((value.detach(), *torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(found[1], found[0])
