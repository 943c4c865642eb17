"""Test the tokens that "clip_cov" and "kl_cov" pick: by hand, at random, in shards, and for any split of a batch."""

import dataclasses
import math
import warnings

import pytest
import torch
from torch import distributed

from rlloss import GRPOLoss, LinearGRPOLoss, LossConfig, means, policy_loss, reference
from rlloss.losses import CovarianceConfig, acting_tokens
from rlloss.tokens import covariance_selection, token_covariance
from rlloss.tokens.exact_k import sequence_key
from tests.support.loss_cases import batch, make_config
from tests.support.ranks import on_ranks

# mean logp -1.5, mean A 0.5: covariances (+1.5, +0.5, -0.5, -1.5) (A - 0.5).
LOGP = torch.tensor([[0.0, -1.0], [-2.0, -3.0]])
ADVANTAGE = torch.tensor([2.5, -1.5])
COVARIANCE = torch.tensor([[3.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
ALL = torch.ones(2, 2, dtype=torch.bool)


def large_batch(seed=0, B=16, T=50):
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(B, T, generator=g) * 3
    mask = torch.arange(T) < torch.randint(5, T + 1, (B, 1), generator=g)
    return logp, torch.randn(B, generator=g), mask, logp + 0.3 * torch.randn(B, T, generator=g)


def test_hand_worked_covariances():
    assert torch.equal(token_covariance(LOGP, ADVANTAGE, ALL), COVARIANCE)
    assert torch.equal(reference.covariance(LOGP, ADVANTAGE[:, None], ALL), COVARIANCE.float())
    # Without the last token: mean logp -1, mean A 7/6.
    mask = torch.tensor([[True, True], [True, False]])
    expected = torch.tensor([[4 / 3, 0.0], [8 / 3, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(token_covariance(LOGP, ADVANTAGE, mask), expected)


@pytest.mark.parametrize("settings, expected", [
    ({"ratio": 0.5, "selection": "top"}, [[True, False], [False, True]]),
    ({"ratio": 0.25, "selection": "top"}, [[True, False], [False, False]]),  # of equal ones the first
    ({"ratio": 1.0, "high": 2.0, "selection": "top"}, [[False, True], [True, False]]),  # from 1 to 2
    ({"ratio": 1.0, "low": 1.5, "selection": "top"}, [[True, False], [False, True]]),
    ({"ratio": 1.0, "low": 1.0, "high": 3.0, "selection": "top"}, [[True, True], [True, True]]),  # both bounds count
    ({"ratio": 0.2, "selection": "top"}, [[True, False], [False, False]]),  # floor(0.8) = 0, but at least one
    ({"ratio": 0.2, "selection": "top", "at_least_one": False}, [[False, False], [False, False]]),
    ({"ratio": 1.0, "low": 3.5}, [[False, False], [False, False]]),  # no candidate
])  # fmt: skip
def test_hand_worked_picks_of_clip_cov(settings, expected):
    found = covariance_selection(LOGP, ADVANTAGE, ALL, config=CovarianceConfig(**settings))
    assert found.tolist() == expected


def test_hand_worked_picks_of_kl_cov():
    config = CovarianceConfig(ratio=0.5)
    advantage = torch.tensor([2.5, -1.0])  # mean 0.75: covariances 2.625, 0.875, 0.875, 2.625
    for given in (advantage, advantage[:, None].expand(2, 2)):
        found = covariance_selection(LOGP, given, ALL, loss_type="kl_cov", config=config)
        assert found.tolist() == [[True, False], [False, True]]
    candidates = torch.tensor([[False, True], [True, True]])
    found = covariance_selection(LOGP, advantage, ALL, loss_type="kl_cov", config=config, candidates=candidates)
    assert found.tolist() == [[False, True], [False, True]]


def test_hand_worked_losses():
    """All ratios are e^0.1. KL-Cov penalises two tokens by 0.5 |0.1|, Clip-Cov leaves them out."""
    old_logp, ratio = LOGP - 0.1, math.exp(0.1)
    logp = LOGP.clone().requires_grad_()
    surrogate = -ratio * (2.5 + 2.5 - 1.5 - 1.5)
    kl = LossConfig("kl_cov", covariance=CovarianceConfig(ratio=0.5, kl_coef=0.5))
    loss, metrics = policy_loss(logp, ADVANTAGE, ALL, config=kl, old_logp=old_logp)
    assert loss.item() == pytest.approx((surrogate + 2 * 0.5 * 0.1) / 4, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logp)
    own = torch.tensor([[-2.5, -2.5], [1.5, 1.5]]) * ratio
    torch.testing.assert_close(gradient, (own + torch.tensor([[0.5, 0.0], [0.0, 0.5]])) / 4)
    assert metrics["selected"] == 2 and means(metrics)["selected_share"] == 0.5 and metrics["live"] == 4

    k3 = dataclasses.replace(kl, covariance=dataclasses.replace(kl.covariance, penalty="k3"))
    loss = policy_loss(logp, ADVANTAGE, ALL, config=k3, old_logp=old_logp).loss
    assert loss.item() == pytest.approx((surrogate + 2 * 0.5 * (ratio - 1 - 0.1)) / 4, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(gradient, (own + torch.tensor([[0.5, 0.0], [0.0, 0.5]]) * (ratio - 1)) / 4)

    clip = LossConfig("clip_cov", covariance=CovarianceConfig(ratio=0.5, selection="top"))
    loss, metrics = policy_loss(logp, ADVANTAGE, ALL, config=clip, old_logp=old_logp)
    assert loss.item() == pytest.approx(-ratio * (2.5 - 1.5) / 4, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -2.5], [1.5, 0.0]]) * ratio / 4)
    assert metrics["selected"] == 2 and metrics["live"] == 2


def test_a_token_without_advantage_can_be_penalised():
    """Its covariance is not 0, because the mean advantage is not: the penalty alone gives it a gradient."""
    advantage = torch.tensor([0.0, -3.0])
    logp = LOGP.clone().requires_grad_()
    config = LossConfig("kl_cov", covariance=CovarianceConfig(ratio=0.25))
    loss, metrics = policy_loss(logp, advantage, ALL, config=config, old_logp=LOGP + 0.2)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert metrics["selected"] == 1 and metrics["live"] == 3
    assert gradient[0].tolist() == [-0.25, 0.0] and (gradient[1] != 0).all()


def test_clipped_tokens_are_no_candidates():
    """Their gradient is 0 already: A > 0 with ratio e^0.5 > 1.28, and A < 0 with ratio e^-0.5 < 0.8."""
    config = LossConfig("clip_cov", covariance=CovarianceConfig(ratio=1.0, selection="top"))
    old_logp = LOGP - torch.tensor([[0.5, 0.0], [0.0, -0.5]])
    metrics = policy_loss(LOGP, ADVANTAGE, ALL, config=config, old_logp=old_logp).metrics
    assert metrics["selected"] == 2 and metrics["clip_region"] == 2 and metrics["live"] == 0


def test_a_random_pick_is_uniform_and_a_function_of_seed_and_draw():
    logp, advantage, mask, _ = large_batch()
    config = CovarianceConfig(ratio=0.02, low=0.2, high=1.5)
    k = math.floor(0.02 * int(mask.sum()))
    covariance = token_covariance(logp, advantage, mask)
    candidates = mask & (covariance >= 0.2) & (covariance <= 1.5)
    picks = torch.zeros(mask.shape)
    for draw in range(2000):
        pick = covariance_selection(logp, advantage, mask, config=config, draw=draw)
        assert int(pick.sum()) == k and not (pick & ~candidates).any()
        picks += pick
    expected = 2000 * k / int(candidates.sum())
    deviation = (picks[candidates] - expected) / math.sqrt(expected)
    # A few hundred Poisson counts: chi^2 per degree of freedom is near 1, and none is beyond 5 sigma.
    assert int(candidates.sum()) > 100
    assert 0.7 < deviation.square().mean() < 1.3 and deviation.abs().max() < 5

    first, again = (covariance_selection(logp, advantage, mask, config=config, draw=7) for _ in range(2))
    other = covariance_selection(logp, advantage, mask, config=dataclasses.replace(config, seed=1), draw=7)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_a_draw_every_batch_has_its_own():
    """The draw does not depend on the last bits of logp, which differ between machines."""
    logp, advantage, mask, _ = large_batch()
    config = CovarianceConfig(ratio=0.02, low=-9.0, high=9.0)
    one = covariance_selection(logp, advantage, mask, config=config)
    nudged = torch.where(mask, logp * (1 + 1e-6), logp)
    assert torch.equal(one, covariance_selection(nudged, advantage, mask, config=config))
    shorter, other = mask & (torch.arange(50) < 20), advantage + torch.arange(16) / 100
    assert not torch.equal(one, covariance_selection(logp, advantage, shorter, config=config))
    assert not torch.equal(one, covariance_selection(logp, other, mask, config=config))


@pytest.mark.parametrize("loss_type, selection", [("clip_cov", "random"), ("clip_cov", "top"), ("kl_cov", "random")])
def test_the_order_of_the_sequences_does_not_matter_to_their_keys(loss_type, selection):
    logp, advantage, mask, _ = large_batch()
    logp, advantage = logp.round(), advantage.round()  # ties
    g = torch.Generator().manual_seed(0)
    ids, order = torch.randint(0, 30, mask.shape, generator=g), torch.randperm(16, generator=g)
    config = CovarianceConfig(ratio=0.02, low=0.1, high=9.0, selection=selection) if loss_type == "clip_cov" else None

    def pick(order, key):
        rows = (x[order] for x in (logp, advantage, mask))
        given = {} if key is None else {"sequence_key": key[order]}
        return covariance_selection(*rows, loss_type=loss_type, config=config, **given)

    key = sequence_key((ids, mask))
    assert torch.equal(pick(order, key), pick(slice(None), key)[order]) and pick(order, key).any()
    assert selection == "top" or not torch.equal(pick(order, None), pick(slice(None), None)[order])
    assert torch.equal(key, sequence_key((torch.nn.functional.pad(ids, (3, 2)), torch.nn.functional.pad(mask, (3, 2)))))
    with pytest.raises(ValueError, match=r"sequence_key: found shape \(3,\), expected \(16,\)"):
        pick(slice(None), key[:3])
    with pytest.raises(TypeError, match=r"sequence_key: found dtype torch.float32, expected torch.int64"):
        pick(slice(None), key.float())


def test_padding_does_not_matter():
    logp, advantage, mask, _ = large_batch()
    wide = torch.full((16, 60), math.nan)
    wide[:, :50] = logp
    for loss_type, draw in (("clip_cov", 3), ("clip_cov", None), ("kl_cov", None)):
        config = CovarianceConfig(ratio=0.05, low=0.1)
        narrow = covariance_selection(logp, advantage, mask, loss_type=loss_type, config=config, draw=draw)
        padded = torch.nn.functional.pad(mask, (0, 10))
        found = covariance_selection(wide, advantage, padded, loss_type=loss_type, config=config, draw=draw)
        assert torch.equal(found[:, :50], narrow) and not found[:, 50:].any() and narrow.any()


@pytest.mark.parametrize("loss_type", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_token_that_is_not_finite_is_not_picked_and_moves_no_mean(loss_type, broken):
    logp, advantage, mask, _ = large_batch()
    without = mask.clone()
    without[3, 2] = False
    expected = token_covariance(logp, advantage, without)
    logp[3, 2] = broken
    found = token_covariance(logp, advantage, mask)
    assert found[3, 2].isnan()
    found[3, 2] = 0.0
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    config = CovarianceConfig(ratio=1.0, low=-9.0, high=9.0) if loss_type == "clip_cov" else CovarianceConfig(ratio=1.0)
    assert torch.equal(covariance_selection(logp, advantage, mask, loss_type=loss_type, config=config), without)


@pytest.mark.parametrize("loss_type", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("parts", [1, 2, 4, 8, 16])
def test_picked_once_the_gradient_does_not_depend_on_the_split(loss_type, parts):
    logp, advantage, mask, old_logp = large_batch()
    covariance = CovarianceConfig(ratio=0.02, scope="generation")
    if loss_type == "clip_cov":
        covariance = dataclasses.replace(covariance, low=0.1)
    selected = covariance_selection(old_logp, advantage, mask, loss_type=loss_type, config=covariance)
    assert int(selected.sum()) == math.floor(0.02 * int(mask.sum()))

    def gradient(config, parts, selected):
        leaf = logp.double().requires_grad_()
        for rows in torch.arange(len(logp)).chunk(parts):
            given = {} if selected is None else {"selected": selected[rows]}
            policy_loss(
                leaf[rows], advantage[rows], mask[rows], config=config, old_logp=old_logp[rows],
                denominator=mask.sum(), **given,
            ).loss.backward()  # fmt: skip
        return leaf.grad

    config = LossConfig(loss_type, covariance=covariance)
    whole, split = gradient(config, 1, selected), gradient(config, parts, selected)
    assert torch.equal(split, whole) and (whole[selected] == 0).any() == (loss_type == "clip_cov")
    # If each call picks for itself, it depends on the split.
    alone = LossConfig(loss_type, covariance=dataclasses.replace(covariance, scope="microbatch"))
    assert parts == 1 or not torch.equal(gradient(alone, parts, None), gradient(alone, 1, None))


def test_what_is_picked_outside_the_mask_does_not_count():
    config = LossConfig("clip_cov", covariance=CovarianceConfig(scope="generation"))
    mask = torch.tensor([[True, True], [True, False]])
    metrics = policy_loss(LOGP, ADVANTAGE, mask, config=config, old_logp=LOGP, selected=ALL).metrics
    assert metrics["selected"] == 3 and metrics["live"] == 0


def test_the_modules_take_what_was_picked_and_kept():
    g = torch.Generator().manual_seed(0)
    B, T, D, V = 4, 6, 8, 30
    hidden, weight = torch.randn(B, T, D, generator=g), torch.randn(V, D, generator=g)
    target, advantage = torch.randint(0, V, (B, T), generator=g), torch.randn(B, generator=g)
    mask = torch.rand(B, T, generator=g) < 0.8
    logp = (hidden @ weight.T).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
    old_logp = logp + 0.1 * torch.randn(B, T, generator=g)
    selected = covariance_selection(logp, advantage, mask, config=CovarianceConfig(ratio=0.2, low=0.1, selection="top"))
    kept = mask & (torch.rand(B, T, generator=g) < 0.5)
    assert (selected & kept).any()
    covariance = CovarianceConfig(scope="generation", ratio=0.2, low=0.1, selection="top")
    config = LossConfig("clip_cov", covariance=covariance, top_entropy_quantile=0.5)
    given = {"mask": mask, "old_logp": old_logp, "selected": selected, "kept": kept}
    expected = policy_loss(logp, advantage, config=config, **given).loss
    acts = kept & ~selected
    plain = policy_loss(logp, advantage, acts, config=LossConfig(), old_logp=old_logp, denominator=mask.sum()).loss
    torch.testing.assert_close(expected, plain)
    torch.testing.assert_close(GRPOLoss(config)(hidden @ weight.T, target, advantage, **given).loss, expected)
    torch.testing.assert_close(LinearGRPOLoss(config)(hidden, weight, target, advantage, **given).loss, expected)
    with pytest.raises(ValueError, match="single_launch: found True.*tokens kept by another call"):
        GRPOLoss(config, single_launch=True)((hidden @ weight.T).requires_grad_(), target, advantage, **given)


def test_kl_cov_says_once_that_on_policy_it_does_nothing(monkeypatch):
    acting_tokens._say_on_policy.cache_clear()
    x = batch(1)
    config = make_config("kl_cov")
    with pytest.warns(UserWarning, match="kl_cov without old_logp: on-policy every ratio is 1"):
        found = policy_loss(x["logp"].requires_grad_(), x["advantage"], x["mask"], config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy_loss(x["logp"], x["advantage"], x["mask"], config=config)
        policy_loss(x["logp"], x["advantage"], x["mask"], config=config, old_logp=x["old_logp"])
    plain = policy_loss(x["logp"], x["advantage"], x["mask"]).loss
    for of in (torch.autograd.grad(loss, x["logp"], retain_graph=True)[0] for loss in (found.loss, plain)):
        torch.testing.assert_close(of, torch.autograd.grad(plain, x["logp"], retain_graph=True)[0])


PARTS = (5, 0, 11)  # sequences of each process


def picked(loss_type, draw, keyed: bool, rows, **group):
    """The pick for advantages that are tied within a sequence."""
    logp, advantage, mask, _ = (x[rows] for x in large_batch())
    key = {"sequence_key": sequence_key((rows[:, None].expand(mask.shape), mask))} if keyed else {}
    return covariance_selection(
        logp.round(), advantage, mask, loss_type=loss_type, config=CovarianceConfig(ratio=0.03, low=0.1), draw=draw,
        **key, **group,
    )  # fmt: skip


def _on_a_rank(rank: int, port: int, expected: dict) -> None:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(PARTS))
    for (loss_type, draw, keyed), whole in expected.items():
        rows = torch.arange(sum(PARTS[:rank]), sum(PARTS[: rank + 1]))
        if keyed:  # any sequences in any order
            rows = torch.randperm(16, generator=torch.Generator().manual_seed(1))[rows]
        found = picked(loss_type, draw, keyed, rows, process_group=distributed.group.WORLD)
        assert torch.equal(found, whole[rows]), (rank, loss_type, draw)


def test_processes_pick_together_what_one_would_pick():
    cases = [("clip_cov", 5), ("clip_cov", None), ("kl_cov", None)]
    expected = {
        (*case, keyed): picked(*case, keyed=keyed, rows=torch.arange(16)) for case in cases for keyed in (False, True)
    }  # fmt: skip
    assert all(pick.any() for pick in expected.values())
    on_ranks(_on_a_rank, len(PARTS), expected)
