"""Test sampler_ratio: four modes by hand and against the textbook, ignored tokens, and errors."""

import itertools
import math

import pytest
import torch

from rlloss import reference
from rlloss.losses.ratios import SAMPLER_MODES, sampler_ratio
from tests.support.loss_cases import batch

# Ratios 2, 1/2, 8 (product 8) and 1/4, 1 (product 1/4), the last column masked.
OLD = torch.tensor([[2.0, 0.5, 8.0], [0.25, 1.0, 64.0]]).log() - 1
SAMPLER = torch.full((2, 3), -1.0)
MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize("mode, low, high, expected", [
    ("token_truncate", None, 3.0, [[2.0, 0.5, 3.0], [0.25, 1.0, 1.0]]),
    ("token_truncate", 0.4, 3.0, [[2.0, 0.5, 3.0], [0.4, 1.0, 1.0]]),
    ("token_truncate", None, None, [[2.0, 0.5, 8.0], [0.25, 1.0, 1.0]]),
    ("token_mask", None, 3.0, [[2.0, 0.5, 0.0], [0.25, 1.0, 1.0]]),
    ("token_mask", 0.4, 3.0, [[2.0, 0.5, 0.0], [0.0, 1.0, 1.0]]),
    ("token_mask", 0.4, None, [[2.0, 0.5, 8.0], [0.0, 1.0, 1.0]]),
    ("sequence_truncate", None, 3.0, [[3.0], [0.25]]),
    ("sequence_truncate", 0.5, None, [[8.0], [0.5]]),
    ("sequence_mask", None, 3.0, [[0.0], [0.25]]),
    ("sequence_mask", 0.5, 10.0, [[8.0], [0.0]]),
])  # fmt: skip
def test_hand_worked(mode, low, high, expected):
    found = sampler_ratio(OLD, SAMPLER, MASK, mode=mode, clip_min=low, clip_max=high)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_bounds_belong_to_what_is_kept():
    old_logp = torch.tensor([[math.log(3.0), math.log(0.5), 0.0]], dtype=torch.float64)
    zero, mask = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    bounds = {"clip_min": math.exp(math.log(0.5)), "clip_max": math.exp(math.log(3.0))}
    found = sampler_ratio(old_logp, zero, mask, mode="token_mask", **bounds)
    assert (found != 0).all()


def test_the_default_masks_sequences_above_three():
    found = sampler_ratio(OLD, SAMPLER, MASK)
    torch.testing.assert_close(found, torch.tensor([[0.0], [0.25]]))


@pytest.mark.parametrize("mode", SAMPLER_MODES)
def test_against_the_textbook(mode):
    for seed, (low, high) in itertools.product(range(4), ((0.0, 3.0), (0.7, 1.4), (0.9, math.inf))):
        x = batch(seed)
        expected = reference.sampler_ratio(x["old_logp"], x["sampler_logp"], x["mask"], mode, low, high)
        for dtype, rtol in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
            old_logp, sampler_logp = x["old_logp"].to(dtype), x["sampler_logp"].to(dtype)
            found = sampler_ratio(old_logp, sampler_logp, x["mask"], mode=mode, clip_min=low, clip_max=high)
            torch.testing.assert_close(found, expected.to(dtype), rtol=rtol, atol=0)
            assert found.shape == ((4, 1) if mode.startswith("sequence") else (4, 7)) and not found.requires_grad


@pytest.mark.parametrize("mode", SAMPLER_MODES)
def test_a_nan_of_the_sampler_counts_as_equal_and_masked_columns_do_not_count(mode):
    sampler_logp = SAMPLER.clone()
    sampler_logp[0, 2] = math.nan
    equal = sampler_logp.clone()
    equal[0, 2] = OLD[0, 2]
    found = sampler_ratio(OLD, sampler_logp, MASK, mode=mode)
    assert torch.equal(found, sampler_ratio(OLD, equal, MASK, mode=mode))
    for bad in (math.nan, math.inf, -math.inf):
        sampler_logp[1, 2] = bad
        old_logp = torch.where(MASK, OLD, bad)
        assert torch.equal(sampler_ratio(old_logp, sampler_logp, MASK, mode=mode), found)


def test_a_nan_of_the_trainer_shows_itself():
    old_logp = OLD.clone()
    old_logp[0, 1] = math.nan
    assert sampler_ratio(old_logp, SAMPLER, MASK, mode="token_mask").isnan().tolist() == [
        [False, True, False],
        [False] * 3,
    ]
    assert sampler_ratio(old_logp, SAMPLER, MASK, mode="sequence_truncate").isnan().tolist() == [[True], [False]]


@pytest.mark.parametrize("log_ratio, expected", [(100.0, (3.0, 0.0)), (math.inf, (3.0, 0.0)), (-math.inf, (0.0, 0.0))])
def test_extreme_ratios_are_bounded(log_ratio, expected):
    old_logp, sampler_logp = torch.tensor([[0.0]]), torch.tensor([[-log_ratio]])
    mask = torch.ones(1, 1, dtype=torch.bool)
    for level in ("token", "sequence"):
        for bound, value in zip(("truncate", "mask"), expected, strict=True):
            assert sampler_ratio(old_logp, sampler_logp, mask, mode=f"{level}_{bound}").item() == value


def test_half_precision_is_taken_in_fp32():
    found = sampler_ratio(OLD.bfloat16().requires_grad_(), SAMPLER.bfloat16(), MASK, mode="token_truncate")
    assert found.dtype == torch.float32 and not found.requires_grad
    expected = sampler_ratio(OLD.bfloat16().float(), SAMPLER, MASK, mode="token_truncate")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("change, error, message", [
    ({"mode": "sequence"}, ValueError, "mode: found 'sequence', expected one of 'token_truncate'"),
    ({"old_logp": torch.zeros(3)}, ValueError, r"old_logp: found shape \(3,\), expected \[B, T\]"),
    ({"old_logp": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "old_logp: found dtype torch.int64"),
    ({"sampler_logp": torch.zeros(2, 1)}, ValueError, r"sampler_logp: found shape \(2, 1\), expected \(2, 3\)"),
    ({"sampler_logp": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "sampler_logp: found dtype torch.int64"),
    ({"mask": torch.ones(2, 3)}, TypeError, "mask: found dtype torch.float32"),
    ({"mask": torch.ones(3, 2, dtype=torch.bool)}, ValueError, r"mask: found shape \(3, 2\)"),
    ({"clip_max": 0.0}, ValueError, "clip_max: found 0.0, expected a number above 0"),
    ({"clip_max": math.nan}, ValueError, "clip_max: found nan"),
    ({"clip_min": 4.0}, ValueError, "clip_min: found 4.0, expected a number <= clip_max=3.0"),
    ({"clip_min": math.nan}, ValueError, "clip_min: found nan"),
])  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    good = {"old_logp": OLD, "sampler_logp": SAMPLER, "mask": MASK}
    with pytest.raises(error, match=message):
        sampler_ratio(**{**good, **change})


@pytest.mark.parametrize("mode, expected", [
    ("token_truncate", [[1.0, 1.0], [2.0, 0.0]]),
    ("token_mask", [[1.0, 0.0], [2.0, 0.0]]),
    ("sequence_truncate", [[1.0], [0.0]]),
    ("sequence_mask", [[0.0], [0.0]]),
])  # fmt: skip
def test_a_probability_of_zero_by_both_is_equal_and_masked(mode, expected):
    old_logp = torch.tensor([[-1.0, -math.inf], [-1.0, -math.inf]])
    sampler_logp = torch.tensor([[-1.0, -math.inf], [-1.0 - math.log(2.0), -3.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    given = (old_logp, sampler_logp, mask)
    found = sampler_ratio(*given, mode=mode, clip_max=3.0)
    torch.testing.assert_close(found, torch.tensor(expected))
    torch.testing.assert_close(found, reference.sampler_ratio(*given, mode, -math.inf, 3.0))
    # One token is impossible under one policy, another under the other: both give the sequence probability 0.
    apart = (torch.tensor([[-math.inf, -1.0]]), torch.tensor([[-1.0, -math.inf]]), mask[:1])
    assert sampler_ratio(*apart, mode=mode, clip_max=3.0).isfinite().all()
