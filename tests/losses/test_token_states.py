"""Test the state of a token against its definition: live if the loss has a gradient, otherwise the reason for none."""

import math

import pytest
import torch

from rlloss import LossConfig, policy_loss
from rlloss.backends import backend
from rlloss.config import CovarianceConfig
from rlloss.losses.token_states import LETTERS, TokenState, token_states
from tests.support.loss_cases import (
    BACKENDS,
    FUSED,
    LOSS_TYPES,
    TYPES_AND_LEVELS,
    arguments,
    batch,
    converted,
    make_config,
    settings_of,
    textbook,
    textbook_pick,
    value_and_gradients,
)

M, D, E, OFF, S, C, P, L = TokenState
CASES = [
    pytest.param(loss_type, level, settings, id=f"{loss_type}-{level}-{i}")
    for loss_type, level in TYPES_AND_LEVELS
    for i, settings in enumerate(settings_of(loss_type))
]


def config_of(loss_type, level, settings):
    return make_config(loss_type, None if "ratio_level" in settings else level, **settings)


def states_of(x, config, sampled=False, **given):
    return token_states(**arguments(x, config, sampled), config=config, **given)


def is_live(states):
    return (states == L) | (states == P)


@pytest.mark.parametrize("sampled", [False, True], ids=["", "sampled"])
@pytest.mark.parametrize("loss_type, level, settings", CASES)
def test_live_is_where_the_textbooks_loss_has_a_gradient(loss_type, level, settings, sampled):
    config = config_of(loss_type, level, settings)
    for seed in range(3):
        x = batch(seed, per_token=seed == 1, spread=0.8, level=level or "product")
        if loss_type == "vespo" and sampled:
            x["sampler_ratio"] = x["sampler_ratio"].clamp(min=0.1)
        _, g_logp, g_entropy = value_and_gradients(lambda y: textbook(y, config, sampled), x, torch.float64)
        states = states_of(x, config, sampled)
        assert states.dtype == torch.int8 and states.shape == x["mask"].shape
        assert torch.equal(is_live(states), (g_logp != 0) | (g_entropy != 0))
        assert torch.equal(states == M, ~x["mask"])


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_as_many_are_live_as_the_loss_counts(loss_type, on):
    config = make_config(loss_type, top_entropy_quantile=0.5, beta=0.0)
    for seed in range(3):
        x = converted(batch(seed, spread=0.8), torch.float32, on)
        with backend(on):
            metrics = policy_loss(**arguments(x, config), config=config).metrics
            states = states_of(x, config)
        assert is_live(states).sum() == metrics["live"] and (states != M).sum() == metrics["tokens"]


def hand_worked(loss_type="dapo", **settings):
    """Two sequences of four tokens, with A = +1 and A = 0. The ratios of the first are 1, 1.5, 0.5, 1. rho = 0.5 keeps
    entropies of at least 0.5."""
    x = {
        "logp": torch.zeros(2, 4),
        "old_logp": -torch.tensor([[1.0, 1.5, 0.5, 1.0], [1.0, 1.5, 0.5, 1.0]]).log(),
        "advantage": torch.tensor([1.0, 0.0]),
        "mask": torch.tensor([[True, True, True, True], [True, True, True, False]]),
        "entropy": torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.2, 0.6, 0.3, 0.0]]),
    }
    return x, make_config(loss_type, **{"top_entropy_quantile": 0.5, **settings})


def test_every_token_by_hand():
    x, config = hand_worked()
    assert token_states(**x, config=config).tolist() == [[L, C, L, E], [D, D, D, M]]
    # a negative advantage clips below 0.8 instead
    x["advantage"] = torch.tensor([-1.0, 2.0])
    assert token_states(**x, config=config).tolist() == [[L, L, C, E], [E, C, E, M]]


def test_a_kl_makes_every_token_live_that_it_moves():
    x, config = hand_worked(beta=0.1)
    ref_logp = torch.full((2, 4), -0.5)
    ref_logp[:, 0] = 0.0  # the policies agree: the KL is flat
    assert token_states(**x, ref_logp=ref_logp, config=config).tolist() == [[L, L, L, L], [D, L, L, M]]


def test_the_entropy_bonus_makes_the_kept_tokens_live():
    x, config = hand_worked(entropy_coef=0.1)
    assert token_states(**x, config=config).tolist() == [[L, L, L, E], [D, L, D, M]]


def test_the_ratio_of_a_sequence_makes_its_dropped_tokens_live():
    x, config = hand_worked("gspo", epsilon_high=9.0)
    assert token_states(**x, config=config).tolist() == [[L, L, L, L], [D, D, D, M]]


def test_the_off_policy_mask_and_a_sampler_ratio_of_zero():
    x, config = hand_worked(off_policy_threshold=0.05, top_entropy_quantile=1.0)
    x["advantage"] = torch.tensor([-1.0, 1.0])
    sampler_logp = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])  # mean drift 0.25 and 0.33
    sampler_ratio = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]])
    states = token_states(**x, config=config, sampler_logp=sampler_logp, sampler_ratio=sampler_ratio)
    assert states.tolist() == [[OFF] * 4, [L, C, OFF, M]]


@pytest.mark.parametrize(
    "settings, expected", [({}, [[S, C, L, L], [D, D, D, M]]), ({"beta": 0.1}, [[L] * 4, [L, L, L, M]])]
)
def test_clip_cov_leaves_out_what_is_given(settings, expected):
    covariance = CovarianceConfig(scope="generation")
    x, config = hand_worked("clip_cov", top_entropy_quantile=1.0, covariance=covariance, **settings)
    selected = torch.zeros(2, 4, dtype=torch.bool)
    selected[0, 0] = True
    more = {"ref_logp": torch.full((2, 4), -0.5)} if settings else {}
    assert token_states(**x, config=config, selected=selected, **more).tolist() == expected


def test_kl_cov_penalises_what_is_given_where_the_penalty_has_a_slope():
    covariance = CovarianceConfig(scope="generation")
    x, config = hand_worked("kl_cov", top_entropy_quantile=1.0, covariance=covariance)
    selected = torch.zeros(2, 4, dtype=torch.bool)
    selected[:, :2] = True  # the first has ratio 1
    assert token_states(**x, config=config, selected=selected).tolist() == [[L, P, L, L], [D, P, D, M]]


@pytest.mark.parametrize("loss_type, state", [("clip_cov", S), ("kl_cov", P)])
def test_what_a_micro_batch_picks_itself_is_found(loss_type, state):
    config, found = make_config(loss_type), 0
    for seed in range(6):
        x = batch(seed, B=6, T=11)
        states = states_of(x, config)
        picked = textbook_pick(x, config, x["mask"], x["advantage"][:, None])
        assert torch.equal(states == state, picked)
        found += int(picked.sum())
    assert found > 10


def test_given_kept_tokens_and_a_cutoff_are_taken():
    x, config = hand_worked()
    kept = torch.tensor([[False, True, True, True], [True] * 4])
    assert token_states(**x, kept=kept, config=config).tolist() == [[E, C, L, L], [D, D, D, M]]
    assert token_states(**x, cutoff=0.75, config=config).tolist() == [[L, C, E, E], [D, D, D, M]]


def test_exact_k_breaks_ties():
    x, config = hand_worked(exact_k=True)
    x["advantage"] = torch.ones(2)
    x["entropy"] = torch.zeros(2, 4)
    x["old_logp"] = torch.zeros(2, 4)
    assert token_states(**x, config=config).tolist() == [[L, L, L, L], [E, E, E, M]]  # floor(0.5 * 6) + 1


@pytest.mark.parametrize("loss_type", ["dapo", "kl_cov"])
def test_a_nan_is_live_and_a_masked_one_is_not_seen(loss_type):
    x, config = (
        hand_worked(loss_type, top_entropy_quantile=1.0, epsilon_high=9.0)
        if loss_type == "dapo"
        else hand_worked(loss_type, top_entropy_quantile=1.0)
    )
    x["logp"][0, 2] = x["logp"][1, 3] = math.nan
    assert token_states(**x, config=config)[0, 2] == L
    assert token_states(**x, config=config)[1, 3] == M


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_small_gradient_does_not_underflow(dtype):
    mask = torch.ones(1, 2, dtype=torch.bool)
    states = token_states(torch.zeros(1, 2, dtype=dtype), torch.tensor([1.0]), mask, denominator=1e9)
    assert states.tolist() == [[L, L]]


def test_the_callers_graph_and_gradients_are_left_alone():
    x, config = hand_worked()
    logp = x.pop("logp").requires_grad_()
    entropy = x.pop("entropy").requires_grad_()
    with torch.no_grad():
        states = token_states(2 * logp, entropy=entropy, config=config, **x)
    assert not states.requires_grad and logp.grad is None and entropy.grad is None
    assert states.tolist() == [[L, C, L, E], [D, D, D, M]]


def test_an_empty_batch_and_an_empty_mask():
    empty = torch.zeros(0, 3)
    assert token_states(empty, torch.zeros(0), empty.bool()).shape == (0, 3)
    assert token_states(torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3).bool()).tolist() == [[M] * 3] * 2


def test_each_state_has_its_letter():
    assert [state.letter for state in TokenState] == list(LETTERS) and len(set(LETTERS)) == len(TokenState)
    assert [state for state in TokenState if state.is_live] == [P, L]


@pytest.mark.parametrize("given, message", [
    ({"entropy": torch.zeros(1, 2)}, r"entropy: found shape \(1, 2\)"),
    ({"config": LossConfig(top_entropy_quantile=0.2)}, "entropy: found None"),
    ({"selected": torch.ones(1, 3, dtype=torch.bool)}, "selected: found"),
])  # fmt: skip
def test_bad_arguments_are_named_as_by_the_loss(given, message):
    with pytest.raises(ValueError, match=message):
        token_states(torch.zeros(1, 3), torch.ones(1), torch.ones(1, 3, dtype=torch.bool), **given)


@pytest.mark.skipif(FUSED not in BACKENDS, reason="needs Triton")
def test_the_fused_kernel_gives_the_same_states():
    x, config = hand_worked()
    with backend(FUSED):
        assert token_states(**converted(x, torch.float32, FUSED), config=config).tolist() == [
            [L, C, L, E],
            [D, D, D, M],
        ]
