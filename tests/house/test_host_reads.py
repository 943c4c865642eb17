"""Test that the logits path with the kernels never reads from the device: no synchronisation, so a CUDA graph can hold
it.

Reads are counted under the interpreter. On a real GPU: tests/kernels/test_gpu.py.
"""

import pytest
import torch

from rlloss import GRPOLoss, backends, entropy_cutoff, group_advantage, sampler_ratio
from tests.support.host_reads import host_reads
from tests.support.loss_cases import BACKENDS, DEVICE, FUSED, TYPES_AND_LEVELS, make_config

pytestmark = pytest.mark.skipif(DEVICE != "cpu" or FUSED not in BACKENDS, reason="counts in Triton's interpreter")
B, T, V = 4, 6, 30


def batch():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, V, generator=g, requires_grad=True)
    target = torch.randint(0, V, (B, T), generator=g)
    logp = logits.detach().log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
    given = {
        "mask": torch.rand(B, T, generator=g) < 0.7,
        "old_logp": logp + 0.3 * torch.randn(B, T, generator=g),
        "temperature": torch.rand(B, T, generator=g) + 0.5,
    }
    return logits, target, torch.randn(B, generator=g), given


def reads(monkeypatch, config, switches=None, **more):
    logits, target, advantage, given = batch()
    loss_fn = GRPOLoss(config, **(switches or {}))
    with backends.backend(FUSED), host_reads(monkeypatch) as counter:
        # The output of an operation, as from a model, so that a gradient may overwrite it.
        loss_fn(logits * 1.0, target, advantage, **given, **more).loss.backward()
    assert logits.grad.isfinite().all()
    return counter.found


@pytest.mark.parametrize("loss_type, level", TYPES_AND_LEVELS)
def test_every_loss_type(monkeypatch, loss_type, level):
    assert reads(monkeypatch, make_config(loss_type, level)) == []


EVERYTHING = {
    "quantile": ({"top_entropy_quantile": 0.3}, {}),
    "quantile, of the kept": ({"top_entropy_quantile": 0.3, "entropy_denominator": "kept"}, {}),
    "exactly k": ({"top_entropy_quantile": 0.3, "exact_k": True}, {}),
    "a cutoff that is a number": ({"top_entropy_quantile": 0.3}, {"cutoff": 3.0}),
    "a cutoff on the device": ({"top_entropy_quantile": 0.3}, {"cutoff": torch.tensor(3.0)}),
    "a denominator": ({}, {"denominator": 7.0}),
    "KL": ({"beta": 0.1, "kl_bias_correction": True}, {"ref_logp": torch.full((B, T), -3.0)}),
    "bonus": ({"entropy_coef": 0.1}, {}),
    "off-policy": ({"off_policy_threshold": 0.1}, {"sampler_logp": torch.full((B, T), -3.0)}),
    "sampler": ({}, {"sampler_ratio": torch.full((B, 1), 0.9)}),
    "bounds": ({"delta": 2.0, "max_log_ratio": 5.0}, {}),
}


@pytest.mark.parametrize("case", EVERYTHING)
def test_every_setting(monkeypatch, case):
    settings, given = EVERYTHING[case]
    for switches in ({"single_launch": False}, None):
        assert reads(monkeypatch, make_config(**settings), switches, **given) == []


@pytest.mark.parametrize("switches", [{"inplace_grad": True}, {"single_launch": True}], ids=str)
@pytest.mark.parametrize("cutoff", [None, 3.0])
def test_the_single_launch_and_the_gradient_in_place(monkeypatch, switches, cutoff):
    settings = {} if cutoff is None else {"top_entropy_quantile": 0.3}
    assert reads(monkeypatch, make_config(**settings), switches, cutoff=cutoff) == []


def test_what_comes_before_the_loss(monkeypatch):
    g = torch.Generator().manual_seed(0)
    logp, mask = -torch.rand(B, T, generator=g), torch.rand(B, T, generator=g) < 0.7
    with backends.backend(FUSED), host_reads(monkeypatch) as counter:
        sampler_ratio(logp, logp - 0.1, mask)
        entropy_cutoff(-logp, mask, 0.2)
        group_advantage(torch.randn(B, generator=g), num_generations=2)
    assert counter.found == []


def test_what_would_wait_is_seen(monkeypatch):
    x = torch.tensor([0.0, 1.0])
    with host_reads(monkeypatch) as counter:
        x.sum().item()
        x.tolist()
        bool(x.any())
        x[x > 0]
        x.nonzero()
        torch.tensor(1.0)
        x[torch.tensor([0])]
    assert counter.found == [
        "_local_scalar_dense", "tolist", "_local_scalar_dense", "index", "nonzero", "lift_fresh", "lift_fresh",
    ]  # fmt: skip
