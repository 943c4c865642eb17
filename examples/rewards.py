"""Reward functions for train.yaml, which names them as rewards:is_right and rewards:brief.

`completions` and the columns of the dataset are lists with one entry per completion, and so is what is returned: a
number, or None where there is no score. With prompts that are conversations a completion is a list of messages.
"""

import re


def is_right(completions, answer, **columns):
    """1.0 where the last number of the completion is the `answer` of its prompt."""
    found = [re.findall(r"-?\d+", text) for text in completions]
    return [float(bool(numbers) and int(numbers[-1]) == wanted) for numbers, wanted in zip(found, answer, strict=True)]


def brief(completions, completion_ids, **columns):
    """Higher for fewer tokens: 1 for none, near 0 for many."""
    return [1 / (1 + len(ids)) for ids in completion_ids]
