"""Test the table of losses: a row and a function add a new loss."""

import importlib.util
import math

import pytest
import torch

from rlloss import GRPOLoss, LinearGRPOLoss, LossConfig, means, policy_loss
from rlloss.loss_types import LOSSES, LossType, read_by_some
from rlloss.losses.surrogates import SURROGATES, Surrogate


def toy(x, config):
    """-r A, without a clip."""
    return Surrogate(-x.log_ratio.exp() * x.advantage)


@pytest.fixture(autouse=True)
def with_toy(monkeypatch):
    monkeypatch.setitem(SURROGATES, "toy", toy)
    monkeypatch.setitem(LOSSES, "toy", LossType("toy", frozenset({"ratio_level"}), in_trl=False))


def inputs():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, 4, generator=g), torch.randn(9, 4, generator=g)
    target, mask = torch.randint(0, 9, (2, 3), generator=g), torch.tensor([[True, True, False], [True, True, True]])
    old_logp = torch.randn(2, 3, generator=g) - 2
    return hidden, weight, target, torch.tensor([1.0, -2.0]), mask, old_logp


@pytest.mark.parametrize("head", [False, True])
def test_a_loss_of_ones_own_runs_in_the_modules(head):
    hidden, weight, target, advantage, mask, old_logp = inputs()
    leaf = weight.clone().requires_grad_()
    given = {"mask": mask, "old_logp": old_logp}
    if head:
        loss, metrics = LinearGRPOLoss("toy")(hidden, leaf, target, advantage, **given)
    else:
        loss, metrics = GRPOLoss("toy")(hidden @ leaf.T, target, advantage, **given)
    exact = weight.double().requires_grad_()
    logp = (hidden.double() @ exact.T).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
    expected = -(torch.where(mask, (logp - old_logp).exp() * advantage[:, None], 0.0)).sum() / mask.sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for x, y in zip(torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-6)
    assert means(metrics)["live_share"] == 1.0


def of_logp(x, config):
    return Surrogate(-torch.where(x.log_ratio > 0.0, x.log_ratio.exp(), 1.0) * x.advantage * x.logp)


def with_slopes(x, config):
    ratio = x.log_ratio.exp()
    return Surrogate(
        of_logp(x, config).loss,
        by_log_ratio=torch.where(x.log_ratio > 0.0, -ratio * x.advantage * x.logp, 0.0),
        by_logp=-torch.where(x.log_ratio > 0.0, ratio, 1.0) * x.advantage,
    )


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence", "product"])
@pytest.mark.parametrize("surrogate", [toy, of_logp, with_slopes])
def test_slopes_reach_the_tokens_whatever_the_level(monkeypatch, surrogate, level, per_token):
    """Compare with autograd through the whole formula. The ratio of a masked token is infinite, one weight is 0, and
    one log-ratio is above the bound 20 of a product."""
    monkeypatch.setitem(SURROGATES, "toy", surrogate)
    monkeypatch.setitem(LOSSES, "toy", LossType("toy", frozenset(), level=level, mean_of_sequence=True))
    g = torch.Generator().manual_seed(1)
    mask = torch.tensor([[True] * 4 + [False], [True] * 5, [True, True, False, False, False]])
    logp, old_logp = (-2 * torch.rand(3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    logp[0, 2], old_logp[0, 4] = -1.5, -torch.inf
    old_logp[0, :2] = logp[0, :2] + torch.tensor([25.0, -18.0])
    advantage = torch.randn((3, 5) if per_token else (3, 1), generator=g, dtype=torch.float64)
    weight = torch.rand(3, 5, generator=g, dtype=torch.float64)
    weight[1, 2] = 0.0
    leaf = logp.clone().requires_grad_()
    difference = torch.where(mask, leaf - old_logp, 0.0)
    log_ratio = difference
    if level == "sequence":
        log_ratio = difference.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    if level == "product":  # of its sampler's ratio too, which is then no weight
        bounded = difference.clamp(-20.0, 20.0)
        log_ratio = (bounded + torch.where(mask, weight, 1.0).log().clamp(min=math.log(1e-8))).sum(-1, keepdim=True)
        log_ratio = log_ratio.clamp(math.log(1e-8), 20.0)
    ratio = torch.where(log_ratio > 0.0, log_ratio.exp(), 1.0)
    loss = -advantage * (log_ratio.exp() if surrogate is toy else ratio * leaf)
    loss = torch.where(mask, loss.expand(3, 5) * (1.0 if level == "product" else weight), 0.0)
    (loss.sum(-1) / mask.sum(-1)).sum().div(mask.sum()).backward()
    mine = logp.clone().requires_grad_()
    policy_loss(
        mine,
        advantage if per_token else advantage[:, 0],
        mask,
        config=LossConfig("toy"),
        old_logp=old_logp,
        sampler_ratio=weight,
    ).loss.backward()
    torch.testing.assert_close(mine.grad, leaf.grad, rtol=1e-9, atol=0)
    assert (mine.grad != 0).any()


def test_a_loss_without_slopes_runs_without_gradient_too():
    _, _, _, advantage, mask, old_logp = inputs()
    metrics = {}
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            x = old_logp + 0.1
            metrics[context] = policy_loss(x, advantage, mask, config=LossConfig("toy"), old_logp=old_logp).metrics
            assert metrics[context]["live"] == mask.sum()


def test_a_loss_that_depends_on_nothing_has_no_gradient(monkeypatch):
    monkeypatch.setitem(SURROGATES, "toy", lambda x, config: Surrogate(x.advantage.expand_as(x.logp)))
    _, _, _, advantage, mask, old_logp = inputs()
    logp = (old_logp + 0.1).requires_grad_()
    loss, metrics = policy_loss(logp, advantage, mask, config=LossConfig("toy"), old_logp=old_logp)
    assert torch.autograd.grad(loss, logp)[0].count_nonzero() == metrics["live"] == 0
    torch.testing.assert_close(loss, torch.tensor((2 * 1.0 + 3 * -2.0) / 5), check_dtype=False)


def test_what_it_does_not_read_is_refused():
    with pytest.raises(ValueError, match="delta: found 1.5, expected None: it has no effect with loss_type='toy'"):
        LossConfig("toy", delta=1.5)
    with pytest.raises(ValueError, match="'toy'"):
        LossConfig("toys")


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL")
def test_it_trains_in_trl(tmp_path):
    from rlloss.integrations.trl import GRPOConfig, GRPOTrainer
    from tests.support.trl_harness import build_trainer

    trainer = build_trainer(GRPOTrainer, GRPOConfig, tmp_path, None, loss_type="toy", max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1 and trainer._make_loss_config().loss_type == "toy"


def test_rows_name_what_is_there():
    for name, row in LOSSES.items():
        assert row.surrogate in SURROGATES and row.divided_by in ("tokens", "sequences", "length"), name
        assert (row.picks is None) == (row.picked is None) == ("covariance" not in row.reads), name
        assert all(map(read_by_some, row.reads)) and row.level in (None, "token", "sequence", "product")
        counted = policy_loss(torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1).bool(), config=_config(name)).metrics
        assert set(row.logs) <= set(counted), name


def _config(name: str) -> LossConfig:
    own = {"dr_grpo": {"max_completion_length": 4}, "cispo": {"epsilon_high": 2.0}}
    return LossConfig(name, **own.get(name, {}))
