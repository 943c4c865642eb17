"""Test the parts of dynamic sampling by hand: order of prompts, replacement of groups, merging of batches."""

import copy
import itertools
import random

import pytest
import torch

from rlloss.integrations.trl.dynamic_sampling import FreshPrompts, match, merge, prompt_key, shuffled


@pytest.mark.parametrize("n", [0, 1, 2, 7, 100])
def test_shuffled_is_a_permutation_of_which_a_part_can_be_taken(n):
    order = list(shuffled(n, random.Random("a")))
    assert sorted(order) == list(range(n))
    assert list(itertools.islice(shuffled(n, random.Random("a")), 3)) == order[:3]
    assert n < 100 or order != list(shuffled(n, random.Random("b")))


def test_shuffled_is_uniform():
    counts = {order: 0 for order in itertools.permutations(range(3))}
    rng = random.Random(0)
    for _ in range(6000):
        counts[tuple(shuffled(3, rng))] += 1
    assert all(abs(count - 1000) < 120 for count in counts.values())  # 4 standard deviations: 115


def test_fresh_prompts_are_parted_among_processes_and_never_repeat():
    conversation = [{"role": "user", "content": "w1"}]
    dataset = [{"prompt": p, "answer": i} for i, p in enumerate(["a", "b", conversation, "a", "c", "d", "e", "f"])]
    seen = {prompt_key({"prompt": "b"}), prompt_key({"prompt": copy.deepcopy(conversation)})}
    drawn = []
    for count, expected in ((1, 1), (1, 1), (2, 0)):  # five prompts: two and two, one is left for two processes
        parts = []
        for process in range(2):
            prompts = FreshPrompts(dataset, seen, "0 1 2")
            for _ in range(len(drawn) // 2):
                prompts.take(1, 2, process)
            parts.append(prompts.take(count, 2, process))
        assert [len(part) for part in parts] == [expected, expected]
        drawn += [row["prompt"] for part in parts for row in part]
    assert len(set(drawn)) == len(drawn) == 4 and set(drawn) < set("acdef")
    assert FreshPrompts(dataset, seen, "0 1 3").take(5, 1, 0) != FreshPrompts(dataset, seen, "0 1 2").take(5, 1, 0)
    assert len(FreshPrompts(dataset, set(), "").take(9, 1, 0)) == 7  # "a" stands there twice


def test_matching_by_hand():
    # Process 0 has groups 0 ... 2 and the fresh ones 0, 1; process 1 has groups 3 ... 5 and the fresh ones 2, 3.
    assert match([True, False, True, False, False, True], [True, False, False, False], 2) == [(0, 1), (5, 2)]
    assert match([True, False], [True, True], 1) == []
    assert match([False, True], [False, False], 1) == [(1, 0)]


def test_merging_by_hand():
    output = {
        "prompt_ids": torch.tensor([[9, 5], [6, 7]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[1, 2, 3], [4, 9, 9]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1], [1, 1, 1]]),
        "old_per_token_logps": torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]]),
        "temperatures": torch.tensor([[1.2, 1.2, 1.0], [1.2, 1.0, 1.0]]),
        "importance_sampling_ratio": torch.tensor([[0.5], [0.6]]),
        "kept": torch.tensor([[True, True, False], [True, False, False]]),
        "advantages": torch.tensor([0.0, 1.0]),
        "names": ["a", "b"],
        "num_items_in_batch": torch.tensor(4),
    }
    more = {
        "prompt_ids": torch.tensor([[8, 8, 8]]),
        "prompt_mask": torch.tensor([[1, 1, 1]]),
        "completion_ids": torch.tensor([[5]]),
        "completion_mask": torch.tensor([[1]]),
        "tool_mask": torch.tensor([[0]]),
        "old_per_token_logps": torch.tensor([[-5.0]]),
        "temperatures": torch.tensor([[1.3]]),
        "importance_sampling_ratio": torch.tensor([[0.7]]),
        "kept": torch.tensor([[True]]),
        "advantages": torch.tensor([2.0]),
        "names": ["c"],
        "num_items_in_batch": torch.tensor(1),
    }
    before = copy.deepcopy(output)
    merged = merge(output, more, [0], [0], pad_token_id=9)
    assert {name: x if isinstance(x, list) else x.tolist() for name, x in merged.items()} == {
        "prompt_ids": [[8, 8, 8], [9, 6, 7]],
        "prompt_mask": [[1, 1, 1], [0, 1, 1]],
        "completion_ids": [[5, 9, 9], [4, 9, 9]],
        "completion_mask": [[1, 0, 0], [1, 0, 0]],
        "tool_mask": [[0, 1, 1], [1, 1, 1]],
        "old_per_token_logps": [[-5.0, 0.0, 0.0], [-4.0, 0.0, 0.0]],
        "temperatures": torch.tensor([[1.3, 1.0, 1.0], [1.2, 1.0, 1.0]]).tolist(),
        "importance_sampling_ratio": torch.tensor([[0.7], [0.6]]).tolist(),
        "kept": [[True, False, False], [True, False, False]],
        "advantages": [2.0, 1.0],
        "names": ["c", "b"],
        "num_items_in_batch": 4,
    }
    assert all(x.dtype == output[name].dtype for name, x in merged.items() if isinstance(x, torch.Tensor))
    assert all(
        torch.equal(x, before[name]) for name, x in output.items() if isinstance(x, torch.Tensor)
    )  # nothing in place
    with pytest.raises(ValueError, match=r"more: found the entries .*, expected .*'tool_mask'"):
        merge(output, {name: x for name, x in more.items() if name != "tool_mask"}, [0], [0], 9)
