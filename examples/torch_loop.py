"""A GRPO loop in plain PyTorch: generate, mask, reward, advantages, old log-probabilities, loss, step.

The gradients of the micro-batches add up to that of the whole batch, because each micro-batch is divided by the count
of the whole (`denominator`) and the tokens of highest entropy are chosen from the whole (`kept`). Run it with

    python examples/torch_loop.py [OUTPUT_DIR]

For a real model put `AutoModelForCausalLM.from_pretrained(...)`, its tokenizer, your prompts and your reward in place
of those below. `rlloss report OUTPUT_DIR` draws the metrics.
"""

import json
import sys
from pathlib import Path

import torch

from rlloss import LinearGRPOLoss, group_advantage, linear_token_stats, means
from rlloss.integrations.transformers.lm_head import completion_inputs
from rlloss.integrations.trl.demo import task  # a model of 0.1 M parameters and prompts: 27+15=
from rlloss.tokens import completion_mask, top_entropy_mask

PROMPTS, GENERATIONS, UPDATES, MICRO_BATCH = 4, 8, 2, 8


def reward(completions):
    """The share of a completion's characters that are digits: one number per completion."""
    return [sum(letter.isdigit() for letter in text) / max(1, len(text)) for text in completions]


def generate(model, tokenizer, prompts):
    """Token ids and attention mask `[B, L]`, and the mask `[B, T]` of the completions: True, the token counts."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)  # on the left
    ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=12)
    prompt_length = inputs["input_ids"].shape[1]
    mask = completion_mask(ids[:, prompt_length:], tokenizer.eos_token_id)  # up to and with the first end token
    return ids, torch.cat([inputs["attention_mask"], mask.long()], dim=1), mask


def main(output_dir="runs/torch_loop"):
    torch.manual_seed(0)
    model, tokenizer = task.make_model(hidden_size=64, layers=2), task.make_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss_fn = LinearGRPOLoss("dapo", epsilon_low=0.2, epsilon_high=0.28, top_entropy_quantile=0.2)
    problems, _ = task.make_problems()
    log = []
    for step in range(1, 11):
        # The completions of a prompt stand one after the other.
        prompts = [p.prompt for p in problems[step * PROMPTS :][:PROMPTS] for _ in range(GENERATIONS)]
        ids, attention, mask = generate(model, tokenizer, prompts)
        T = mask.shape[1]
        rewards = torch.tensor(reward(tokenizer.batch_decode(ids[:, -T:], skip_special_tokens=True)))
        advantage = group_advantage(rewards, num_generations=GENERATIONS)

        with torch.no_grad():  # of the policy that sampled: before its first update
            old = linear_token_stats(**completion_inputs(model, ids, attention, completion_length=T), mask=mask)
        kept = top_entropy_mask(old.entropy, mask, 0.2)  # the top 20 % of the tokens of the whole batch
        batch = {"advantage": advantage, "mask": mask, "old_logp": old.logp, "kept": kept}
        sums = {}
        for _ in range(UPDATES):  # from the second one on ratios differ from 1, and the clip can act
            for part in torch.arange(len(ids)).split(MICRO_BATCH):
                inputs = completion_inputs(model, ids[part], attention[part], completion_length=T)
                given = {name: values[part] for name, values in batch.items()}
                loss, metrics = loss_fn(**inputs, **given, denominator=mask.sum())
                loss.backward()  # not divided by the number of micro-batches
                sums = {name: sums.get(name, 0.0) + value for name, value in metrics.items()}
            optimizer.step()
            optimizer.zero_grad()
        means_of_step = {"reward": rewards.mean(), **means(sums)}
        log.append({"step": step} | {name: round(value.item(), 4) for name, value in means_of_step.items()})

    Path(output_dir).mkdir(parents=True, exist_ok=True)
    Path(output_dir, "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    print(f"Last step: entropy {log[-1]['entropy']} nats per token, {log[-1]['live_share']:.0%} of the tokens live.")
    print(f"The mean reward went from {log[0]['reward']} to {log[-1]['reward']}.")


if __name__ == "__main__":
    main(*sys.argv[1:])
