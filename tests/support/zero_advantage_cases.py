"""Make micro-batches in which some completions have advantage 0, and a stand-in for a model."""

import torch

from rlloss.integrations.trl.zero_advantage import dead_completions

SPLITS = {"beta": 0.0, "entropy": None, "aux_coef": None, "train": True, "rho": 1.0}
DEAD = {"none": [], "half": [0, 2], "all but one": [0, 1, 3], "all": [0, 1, 2, 3]}


def kill(inputs: dict, dead: list[int]) -> dict:
    """Set the advantage of these rows to 0 and of the others to nonzero values. All rows get tokens."""
    live = [i for i in range(4) if i not in dead]
    inputs["completion_mask"][:, 0] = 1
    if "tool_mask" in inputs:
        inputs["tool_mask"][:, 0] = 1
    inputs["advantages"] = torch.where(inputs["advantages"] == 0.0, 0.5, inputs["advantages"])
    inputs["advantages"][dead] = 0.0
    assert dead_completions(inputs).nonzero().flatten().tolist() == [i for i in range(4) if i not in live]
    return inputs


class Echo:
    """A stand-in for a model. Its log-probabilities are the ids, which shows how calls are merged."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, attention_mask, labels, fused_lm_head):
        self.seen.append((torch.is_grad_enabled(), tuple(input_ids.shape), labels.clone()))
        assert fused_lm_head and attention_mask.shape == input_ids.shape == labels.shape
        return {"log_probs": input_ids[:, 1:].float(), "label_mask": labels[:, 1:] != -100, "loss": torch.zeros(())}


def echo_inputs():
    ids = torch.arange(1, 19).reshape(3, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), "fused_lm_head": True}
    return inputs, {"completion_ids": ids[:, 2:], "tool_mask": torch.tensor([[1, 0, 1, 1]] * 3)}
