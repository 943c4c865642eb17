"""Test log-ratios that overflow or are NaN at an excluded token: it adds exactly 0 and changes no other bit."""

import math

import pytest
import torch

from rlloss import LossConfig, policy_loss
from rlloss.backends import backend, triton
from rlloss.loss_types import LOSSES
from tests.support.loss_cases import LOSS_TYPES, SILENCES

LOG_RATIOS = [20.0, -20.0, 88.0, -88.0, 100.0, -100.0, math.inf, -math.inf, math.nan]
BAD = (0, 1)
OWN = {"cispo": {"epsilon_high": 1.3}, "dr_grpo": {"max_completion_length": 5}}
ONE_LEVEL = {"gspo": ("sequence",), "vespo": ("token",), "clip_cov": ("token",), "kl_cov": ("token",)}
CASES = [(loss_type, level) for loss_type in LOSS_TYPES for level in ONE_LEVEL.get(loss_type, ("token", "sequence"))]
FUSED = "triton" if torch.cuda.is_available() else "interpreter"
IN_THE_KERNEL = [("dapo", "token"), ("grpo", "sequence"), ("cispo", "token"), ("cispo", "sequence")]
needs_triton = pytest.mark.skipif(not triton, reason="needs Triton")


def run(loss_type, level, log_ratio, sign, on="torch", *, settings=None, **given):
    """(loss, gradient, live) of three full sequences. Ratios are near 1, except at one token of the first sequence."""
    config = LossConfig(loss_type, ratio_level=level, **OWN.get(loss_type, {}), **(settings or {}))
    g = torch.Generator().manual_seed(0)
    logp = -2 * torch.rand(3, 4, generator=g)
    old_logp = logp + 0.05 * torch.randn(3, 4, generator=g)
    old_logp[BAD] = logp[BAD] - log_ratio
    x = {"advantage": torch.tensor([1.5 * sign, 1.0, -0.75]), "mask": torch.ones(3, 4, dtype=torch.bool), **given}
    x = {name: value.to("cuda") if on == "triton" else value for name, value in {**x, "old_logp": old_logp}.items()}
    logp = logp.to(x["mask"].device).requires_grad_()
    with backend(on):
        loss, metrics = policy_loss(logp, config=config, **x)
        (gradient,) = torch.autograd.grad(loss, logp)
    assert metrics["live"] == (gradient != 0).sum()
    return loss.detach().cpu(), gradient.cpu()


def without(value: float, *, fill=1.0, dtype=torch.float32) -> torch.Tensor:
    result = torch.full((3, 4), fill, dtype=dtype)
    result[BAD] = value
    return result


def masked(loss_type, level, sign, log_ratio, on):
    given = {"mask": without(False, fill=True, dtype=torch.bool), "on": on}
    found, healthy = run(loss_type, level, log_ratio, sign, **given), run(loss_type, level, 0.0, sign, **given)
    assert torch.equal(found[0], healthy[0]) and torch.equal(found[1], healthy[1])
    assert found[0].isfinite() and found[1].isfinite().all() and found[1][BAD] == 0


def not_kept(loss_type, level, sign, log_ratio, on):
    """Exclude one token by its entropy or by a sampler's ratio of 0. A ratio of the whole sequence still has it."""
    ways = [{"entropy": without(0.0), "settings": {"top_entropy_quantile": 0.5}}]
    ways += [] if loss_type == "vespo" else [{"sampler_ratio": without(0.0)}]
    for way in ways:
        found, healthy = (run(loss_type, level, r, sign, on, **way) for r in (log_ratio, 0.0))
        if level == "token" and loss_type != "vespo":
            assert torch.equal(found[0], healthy[0]) and torch.equal(found[1], healthy[1])
            assert found[0].isfinite() and found[1].isfinite().all() and found[1][BAD] == 0
        assert found[1][1:].isfinite().all() and torch.equal(found[1][1:], healthy[1][1:])


def sequence_dropped(loss_type, level, sign, log_ratio, on):
    """Exclude a sequence by a sampler's ratio of 0, or as off-policy if its advantage is negative."""
    drift = {"settings": {"off_policy_threshold": 0.3}}
    drift["sampler_logp"] = torch.tensor([9.0, -9.0, -9.0])[:, None].expand(3, 4)
    ways = [] if loss_type == "vespo" else [{"sampler_ratio": torch.tensor([[0.0], [1.0], [1.0]])}]
    ways += [drift] if sign < 0 else []
    for way in ways:
        found, healthy = (run(loss_type, level, r, sign, on, **way) for r in (log_ratio, 0.0))
        assert torch.equal(found[0], healthy[0]) and torch.equal(found[1], healthy[1])
        assert found[0].isfinite() and (found[1][0] == 0).all() and (found[1][1:] != 0).all()


WAYS = [masked, not_kept, sequence_dropped]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("log_ratio", LOG_RATIOS)
@pytest.mark.parametrize("loss_type, level", CASES)
def test_a_bad_token_that_is_taken_out(loss_type, level, log_ratio, way):
    for sign in (1.0, -1.0) if math.isfinite(log_ratio) else (1.0, -1.0, 0.0):
        way(loss_type, level, sign, log_ratio, "torch")


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, where the ratio overflows
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss_type, level", IN_THE_KERNEL)
def test_a_bad_token_that_is_taken_out_in_the_kernel(loss_type, level, way):
    way(loss_type, level, -1.0, {masked: math.nan, not_kept: math.inf, sequence_dropped: math.nan}[way], FUSED)


@pytest.mark.parametrize("log_ratio", [20.0, 88.0, 100.0, math.inf])
@pytest.mark.parametrize("loss_type, level", [case for case in CASES if LOSSES[case[0]].surrogate in SILENCES])
def test_a_kl_goes_on_where_the_surrogate_is_clipped(loss_type, level, log_ratio):
    """A clipped token's gradient is that of its KL alone, to the bit."""
    way = {"settings": {"beta": 0.1}, "ref_logp": torch.full((3, 4), -0.7)}
    _, gradient = run(loss_type, level, log_ratio, 1.0, **way)
    _, only_kl = run(loss_type, level, log_ratio, 0.0, **way)
    assert torch.equal(gradient[BAD], only_kl[BAD]) and gradient[BAD] != 0 and gradient.isfinite().all()


@pytest.mark.parametrize("log_ratio", [math.nan, math.inf])
@pytest.mark.parametrize("loss_type, level", CASES)
def test_a_bad_ratio_of_a_sequence_leaves_its_masked_columns_alone(loss_type, level, log_ratio):
    mask = torch.tensor([[True, True, False, False]] * 3)
    settings = {"epsilon_high": math.inf} if loss_type == "cispo" else {}
    config = LossConfig(loss_type, ratio_level=level, **{**OWN.get(loss_type, {}), **settings})
    logp = torch.full((3, 4), -1.0, requires_grad=True)
    old_logp = without(-1.0 - log_ratio, fill=-1.0)
    with backend("torch"):
        loss = policy_loss(logp, torch.tensor([1.0, 1.0, -1.0]), mask, config=config, old_logp=old_logp).loss
    (gradient,) = torch.autograd.grad(loss, logp)
    assert (gradient[~mask] == 0).all() and (gradient[1:][mask[1:]] != 0).all()
