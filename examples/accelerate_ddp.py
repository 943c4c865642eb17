"""A loss on several processes under Accelerate, with a loop of your own.

`CausalLMWithLoss` holds the model and the loss, so that the lm_head runs inside the wrapped forward and DDP averages
every gradient. Because it averages, the `denominator` is the count of all processes divided by their number. Run it on
CPUs (the first line; `accelerate launch --cpu` starts one process) or on GPUs:

    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 examples/accelerate_ddp.py [OUTPUT_DIR]
    accelerate launch --num_processes 2 examples/accelerate_ddp.py [OUTPUT_DIR]

For a real model put yours in place of `task.make_model`, and your prompts and your reward in place of those below.
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from rlloss import LinearGRPOLoss, group_advantage, means
from rlloss.integrations.transformers.lm_head import CausalLMWithLoss
from rlloss.integrations.trl.demo import task  # a model of 0.1 M parameters and prompts: 27+15=
from rlloss.tokens import completion_mask

PROMPTS, GENERATIONS = 2, 8


def reward(completions):
    """The share of a completion's characters that are digits: one number per completion."""
    return [sum(letter.isdigit() for letter in text) / max(1, len(text)) for text in completions]


def main(output_dir="runs/accelerate_ddp"):
    accelerator = Accelerator()
    model, tokenizer = task.make_model(hidden_size=64, layers=2), task.make_tokenizer()
    wrapped = CausalLMWithLoss(model, LinearGRPOLoss("dapo", epsilon_low=0.2, epsilon_high=0.28))
    wrapped, optimizer = accelerator.prepare(wrapped, torch.optim.AdamW(model.parameters(), lr=1e-3))
    set_seed(0, device_specific=True)  # processes sample different completions
    problems, _ = task.make_problems()
    problems = problems[accelerator.process_index :: accelerator.num_processes]  # and have different prompts

    for step in range(4):
        texts = [p.prompt for p in problems[step * PROMPTS :][:PROMPTS] for _ in range(GENERATIONS)]
        inputs = tokenizer(texts, return_tensors="pt", padding=True).to(accelerator.device)
        ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=12)  # the model inside the wrapper
        mask = completion_mask(ids[:, inputs["input_ids"].shape[1] :], tokenizer.eos_token_id)
        attention = torch.cat([inputs["attention_mask"], mask.long()], dim=1)
        rewards = torch.tensor(reward(tokenizer.batch_decode(ids[:, -mask.shape[1] :], skip_special_tokens=True)))
        advantage = group_advantage(rewards.to(ids.device), num_generations=GENERATIONS)  # groups are whole

        with torch.no_grad():
            old_logp = wrapped(ids, attention, mask=mask).logp
        tokens = accelerator.reduce(mask.sum(), "sum")  # of all processes
        for _ in range(2):
            loss, metrics = wrapped(
                ids, attention, mask=mask, advantage=advantage, old_logp=old_logp,
                denominator=tokens / accelerator.num_processes,
            )  # fmt: skip
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        # The losses add up like the gradients: their mean over processes is the loss of the whole batch.
        whole = accelerator.reduce(loss.detach(), "mean").item()
        shown = means(accelerator.reduce(metrics, "sum"))
        accelerator.print(f"step {step}: loss {whole:+.4f}, entropy {shown['entropy']:.3f}, {tokens} tokens")

    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    everyones = accelerator.gather(parameters[None])  # [processes, parameters]
    difference = (everyones - everyones[0]).abs().max().item()
    accelerator.print(f"{len(everyones)} processes; their parameters differ by at most {difference}.")
    if accelerator.is_main_process:
        model.save_pretrained(output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
