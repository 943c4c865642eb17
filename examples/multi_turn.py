"""Completions of several turns: tokens that a tool wrote do not count.

The completion is everything after the prompt: tokens of the model, the tool's answer, tokens of the model again. `mask`
is True where the model wrote the token. The script shows that the tool's tokens get no gradient, and that the loss
does not depend on their log-probabilities; later tokens still attend to them. Run it with

    python examples/multi_turn.py [OUTPUT_DIR]

For a real model put its `generate`, or your inference engine, and your tool in place of those in `episode`.
"""

import json
import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from rlloss import LinearGRPOLoss, group_advantage, linear_token_stats
from rlloss.integrations.transformers.lm_head import completion_inputs
from rlloss.integrations.trl.demo import task  # a model of 0.1 M parameters and prompts: 27+15=

GENERATIONS, TURNS = 4, 2


def episode(model, tokenizer, problem):
    """(prompt, completion, written): token ids, and for each token of the completion whether the model wrote it."""
    prompt, completion, written = tokenizer(problem.prompt)["input_ids"], [], []
    for turn in range(TURNS):
        ids = torch.tensor([prompt + completion])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=5)
        new = whole[0, ids.shape[1] :].tolist()
        completion, written = completion + new, written + [True] * len(new)
        if turn < TURNS - 1:
            answer = tokenizer(f"<{problem.answer}>")["input_ids"]  # the tool is a calculator
            completion, written = completion + answer, written + [False] * len(answer)
    return prompt, completion, written


def padded(rows, side="right"):
    """`[B, longest]`; padding is 0 or False."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side)


def main(output_dir="runs/multi_turn"):
    torch.manual_seed(0)
    model, tokenizer = task.make_model(hidden_size=64, layers=2), task.make_tokenizer()
    problems, _ = task.make_problems()
    episodes = [episode(model, tokenizer, problem) for problem in problems[:2] for _ in range(GENERATIONS)]
    prompts, completions, written = zip(*episodes, strict=True)
    ids = torch.cat([padded(prompts, "left"), padded(completions)], dim=1)  # all completions begin in one column
    seen = padded([[True] * len(row) for row in completions])
    attention = torch.cat([padded([[True] * len(row) for row in prompts], "left"), seen], dim=1).long()
    mask = padded(written)  # [B, T]
    tool = seen & ~mask

    rewards = torch.tensor([float(len(set(row))) for row in completions])  # yours; here: how many different tokens
    advantage = group_advantage(rewards, num_generations=GENERATIONS)
    inputs = completion_inputs(model, ids, attention, completion_length=mask.shape[1])
    old_logp = linear_token_stats(**inputs, mask=seen).logp.detach()
    loss_fn = LinearGRPOLoss("dapo", epsilon_high=0.28)
    print(f"{mask.sum()} tokens of the model, {tool.sum()} of the tool.")
    for name, counts in (("the model's tokens", mask), ("all tokens", seen)):
        given = {"advantage": advantage, "old_logp": old_logp, "mask": counts}
        loss, _ = loss_fn(**inputs, **given)
        (gradient,) = torch.autograd.grad(loss, inputs["hidden"], retain_graph=True)
        # Others in place of the tool's tokens: log-probabilities change, hidden states do not
        others = torch.where(tool, inputs["target"].roll(1, 0), inputs["target"])
        changed, _ = loss_fn(**{**inputs, "target": others}, **given)
        print(f"If {name} count: gradient at the tool's tokens {gradient[tool].norm():.4f}, ", end="")
        print(f"loss {loss:.4f}, and {changed:.4f} with other tokens of the tool.")

    lines = [{"tokens": tokenizer.convert_ids_to_tokens(row), "written": own} for _, row, own in episodes]
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    Path(output_dir, "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
