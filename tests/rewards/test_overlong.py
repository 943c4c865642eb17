"""Test the soft overlong penalty against Eq. 13 by hand and against TRL's reward function."""

import pickle

import pytest
import torch
import trl
from trl.rewards import get_soft_overlong_punishment

from rlloss.rewards.overlong import SoftOverlongPenalty, soft_overlong_penalty


def test_by_hand():
    lengths = torch.tensor([0, 79, 80, 81, 90, 99, 100, 101, 10**9])
    found = soft_overlong_penalty(lengths, max_length=100, cache=20)
    expected = torch.tensor([0.0, 0.0, 0.0, -0.05, -0.5, -0.95, -1.0, -1.0, -1.0])
    assert torch.equal(found, expected)
    assert not found.signbit()[:3].any()  # 0 and not -0


def test_without_a_cache_it_jumps():
    lengths = torch.tensor([[9, 10], [11, 12]])
    found = soft_overlong_penalty(lengths, max_length=10, cache=0)
    assert torch.equal(found, torch.tensor([[0.0, 0.0], [-1.0, -1.0]]))


@pytest.mark.parametrize("max_length, cache", [(100, 20), (100, 0), (100, 100), (20480, 4096), (7, 3), (1, 1)])
def test_equals_trl(max_length, cache):
    lengths = sorted({0, 1, *(max_length + d for d in range(-30, 31)), *(max_length - cache + d for d in (-1, 0, 1))})
    completion_ids = [[5] * max(length, 0) for length in lengths]
    theirs = get_soft_overlong_punishment(max_length, cache)(completion_ids)
    assert SoftOverlongPenalty(max_length, cache)(completion_ids) == theirs
    assert -1.0 in theirs and 0.0 in theirs
    counts = torch.tensor([len(ids) for ids in completion_ids])
    found = soft_overlong_penalty(counts, max_length=max_length, cache=cache)
    torch.testing.assert_close(found, torch.tensor(theirs), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_device(dtype):
    lengths = torch.tensor([90, 10]).to(dtype)
    found = soft_overlong_penalty(lengths, max_length=100, cache=20)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.tolist() == [-0.5, 0.0]
    assert soft_overlong_penalty(lengths.to("meta"), max_length=100, cache=20).device.type == "meta"


def test_as_a_reward_function_of_a_trainer(tmp_path):
    from tests.support.trl_harness import build_trainer

    reward = pickle.loads(pickle.dumps(SoftOverlongPenalty(8, 4)))
    assert repr(reward) == "SoftOverlongPenalty(max_length=8, cache=4)"
    assert reward([]) == []
    rewards = [lambda completions, **_: [0.0] * len(completions), reward]
    trainer = build_trainer(trl.GRPOTrainer, trl.GRPOConfig, tmp_path, reward_funcs=rewards)
    assert trainer.reward_func_names[1] == "soft_overlong"
    ids = [[2] * n for n in (3, 4, 6, 8)]
    prompts = ["w2"] * 4
    scored = trainer._calculate_rewards([{"prompt": p} for p in prompts], prompts, ["w2"] * 4, ids)
    assert scored[:, 1].tolist() == [0.0, 0.0, -0.5, -1.0]
