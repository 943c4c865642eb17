"""Test how much work a step of the loss gives the host: on a small model the GPU waits for it.

Counted under the interpreter, whose own work is left out, for one forward and backward of 4 completions.
"""

import subprocess
import sys

import pytest
import torch

from rlloss import GRPOLoss, LinearGRPOLoss, backends
from tests.support.host_reads import host_reads
from tests.support.loss_cases import BACKENDS, DEVICE, FUSED

interpreted = pytest.mark.skipif(DEVICE != "cpu" or FUSED not in BACKENDS, reason="counts in Triton's interpreter")
B, T, V, D = 4, 6, 30, 8
# Step -> (module, its settings, at most as many operators of torch, launches of kernels, calls in rlloss). The calls
# have 5 % of room, as versions of Python report some calls of built-in functions differently.
STEPS = {
    "logits": (GRPOLoss, {"single_launch": False}, 25, 3, 420),
    "logits, entropy quantile": (GRPOLoss, {"top_entropy_quantile": 0.2}, 30, 11, 525),
    "logits, single launch": (GRPOLoss, {"single_launch": True}, 24, 3, 405),
    "hidden": (LinearGRPOLoss, {}, 154, 3, 710),
    "hidden, entropy quantile": (LinearGRPOLoss, {"top_entropy_quantile": 0.2}, 164, 11, 790),
}


@interpreted
@pytest.mark.parametrize("step", STEPS)
def test_a_step_takes_no_more(monkeypatch, step):
    monkeypatch.undo()  # the fixture that fills fresh memory with NaN adds operators
    module, settings, *most = STEPS[step]
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(B, T, D, generator=g), torch.randn(V, D, generator=g)
    target, advantage = torch.randint(0, V, (B, T), generator=g), torch.tensor([1.0, -1.0, 0.5, -0.5])
    mask = torch.arange(T) < torch.tensor([6, 5, 3, 2])[:, None]
    first = (hidden, weight) if module is LinearGRPOLoss else (hidden @ weight.T,)
    for x in first:
        x.requires_grad_()
    loss_fn, old_logp = module("dapo", **settings), torch.full((B, T), -3.0)

    def run():
        loss_fn(*first, target, advantage, mask=mask, old_logp=old_logp).loss.backward()

    with backends.backend(FUSED):
        run()  # what only a first call does is not counted
        with host_reads(monkeypatch) as counter:
            before = sys.getprofile()
            sys.setprofile(counter.profile)
            run()
            sys.setprofile(before)
    found = (counter.operators, counter.launches, counter.calls)
    assert all(n <= limit for n, limit in zip(found, most, strict=True)), f"{step}: found {found}, at most {most}"


FIRST_STEPS = """
import sys, torch
from rlloss import GRPOLoss, LinearGRPOLoss, entropy_cutoff, group_advantage, token_stats
from rlloss.entropy import diagnose, gauges
x, w, target = torch.randn(2, 3, 5, requires_grad=True), torch.randn(5, 5, requires_grad=True), torch.ones(2, 3).long()
mask, before = target > 0, set(sys.modules)
for settings in ({}, {"top_entropy_quantile": 0.2}, {"loss_type": "kl_cov"}, {"loss_type": "sapo"}):
    for loss_fn, first in ((GRPOLoss, (x,)), (LinearGRPOLoss, (x, w))):
        advantage = group_advantage(torch.tensor([0.0, 1.0]), num_generations=2)
        loss_fn(**settings)(*first, target, advantage, mask=mask, old_logp=torch.zeros(2, 3)).loss.backward()
stats = token_stats(x, target)
gauges(diagnose(stats.logp, advantage, mask, entropy=stats.entropy, old_logp=stats.logp))
print(*(name for name in set(sys.modules) - before if name.partition(".")[0] not in ("torch", "triton")))
"""


def test_a_step_imports_nothing():
    """Torch and Triton import parts of their own, as when a kernel is compiled."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST_STEPS], check=True, capture_output=True, text=True
    )
    assert ran.stdout.split() == []
