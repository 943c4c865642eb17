"""LoRA with TRL: the lm_head is frozen, and the product for its gradient is left out.

With r the share of the tokens with a gradient, a head that is trained costs 1 + 2r or 1 + 3r matrix products a token,
a frozen one 1 + r or 1 + 2r. The script trains an adapter. Then it prints the plan for a micro-batch of a larger model,
with the head trained and with the head frozen. It needs PEFT (`pip install peft`). Run it with

    python examples/lora.py [OUTPUT_DIR]

For a real model put its folder or Hub id in place of `task.make_model`, leave `processing_class` out, and choose
`target_modules`. An adapter on "lm_head" itself is refused.
"""

import sys

import torch

from rlloss import LossConfig, explain_plan
from rlloss.integrations.trl import GRPOConfig, GRPOTrainer
from rlloss.integrations.trl.demo import task  # a model of 0.1 M parameters and prompts: 27+15=


def digits(completions, **columns):
    """The share of a completion's characters that are digits."""
    return [sum(letter.isdigit() for letter in text) / max(1, len(text)) for text in completions]


def print_plans(rho, B=16, T=1024, V=32_000, D=2048):
    """The plan of both heads for B completions of T tokens; on the device "meta" nothing is computed."""
    hidden = torch.empty(B, T, D, dtype=torch.bfloat16, device="meta", requires_grad=True)
    for name, is_trained in (("trained", True), ("frozen", False)):
        weight = torch.empty(V, D, dtype=torch.bfloat16, device="meta", requires_grad=is_trained)
        print(f"{name} head: {explain_plan(hidden, weight, config=LossConfig(top_entropy_quantile=rho))}")


def main(output_dir="runs/lora"):
    try:
        from peft import LoraConfig
    except ImportError:
        sys.exit("lora.py needs PEFT: pip install peft")
    config = GRPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,  # TRL's default needs a GPU
        save_strategy="no",
        disable_tqdm=True,
        max_steps=4,
        learning_rate=1e-2,  # for fresh weights; the default is 1e-6
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=12,
        top_entropy_quantile=0.2,
        logging_steps=4,
    )
    problems, _ = task.make_problems()
    trainer = GRPOTrainer(
        model=task.make_model(hidden_size=64, layers=2),
        processing_class=task.make_tokenizer(),
        reward_funcs=[digits],
        args=config,
        train_dataset=task.make_dataset(problems),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(output_dir)  # the adapter alone
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in trainer.model.parameters())
    print(f"{trained:,} of {whole:,} parameters were trained.")
    print_plans(rho=config.top_entropy_quantile)


if __name__ == "__main__":
    main(*sys.argv[1:])
