"""GRPO with TRL, and the remedies against entropy collapse as options of its config.

Compared with a script for TRL, one import is another and a few options are new: clip-higher, the top-entropy tokens,
and `token_log_steps`, which writes the completions for the page of `rlloss report`. Run it with

    python examples/trl_grpo.py [OUTPUT_DIR]

For a real model give `model` its folder or Hub id and leave `processing_class` out; put your dataset, which has a
column "prompt", and your reward functions in place of those below. On a GPU leave out `use_cpu` and `bf16`.
"""

import sys

from rlloss.integrations.trl import GRPOConfig, GRPOTrainer
from rlloss.integrations.trl.demo import task  # a model of 0.1 M parameters and prompts: 27+15=


def digits(completions, **columns):
    """The share of a completion's characters that are digits: one number per completion."""
    return [sum(letter.isdigit() for letter in text) / max(1, len(text)) for text in completions]


def main(output_dir="runs/trl_grpo"):
    config = GRPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,  # TRL's default needs a GPU
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        # The run
        max_steps=16,
        learning_rate=3e-3,  # for fresh weights; the default is 1e-6
        per_device_train_batch_size=32,
        num_generations=8,  # completions per prompt
        max_completion_length=12,
        num_iterations=4,  # updates per generation; with one every ratio is 1 and no clip can act
        # The remedies
        epsilon_low=0.2,
        epsilon_high=0.28,  # clip-higher
        top_entropy_quantile=0.2,  # gradients on the top 20 % of the tokens by entropy
        entropy_denominator="kept",  # divide by those tokens, as the paper; TRL divides by all
        # The log
        logging_steps=4,
        token_log_steps=4,  # write the completions of every 4th step, token by token
    )
    problems, _ = task.make_problems()
    trainer = GRPOTrainer(
        model=task.make_model(hidden_size=64, layers=2),
        processing_class=task.make_tokenizer(),
        reward_funcs=[digits],
        args=config,
        train_dataset=task.make_dataset(problems),
    )
    trainer.train()  # says at the end what was saved

    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    entropies = [line["entropy"] for line in trainer.state.log_history if "entropy" in line]
    print(f"The mean reward went from {rewards[0]:.2f} to {rewards[-1]:.2f}.")
    print(f"The mean entropy went from {entropies[0]:.2f} to {entropies[-1]:.2f} nats per token.")
    print(f"Make the page of this run with: rlloss report {output_dir}")


if __name__ == "__main__":
    main(*sys.argv[1:])
