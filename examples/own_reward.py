"""Two reward functions of your own, combined by GDPO: each is normalised in its group before they are added.

The second reward counts only where the first one reaches 1 (`reward_conditions`) and has twice the weight
(`reward_weights`). The metrics under `reward_resolution/` show how the advantages weigh the two. Run it with

    python examples/own_reward.py [OUTPUT_DIR]

For a real model put its folder or Hub id in place of `task.make_model` and leave `processing_class` out; the columns
of your dataset, such as `answer` here, arrive in the reward functions by their names.
"""

import re
import sys

from rlloss.integrations.trl import GRPOConfig, GRPOTrainer
from rlloss.integrations.trl.demo import task  # a model of 0.1 M parameters; columns: prompt "27+15=", answer 42


def one_number(completions, **columns):
    """1.0 where the completion has exactly one number."""
    return [float(len(re.findall(r"\d+", text)) == 1) for text in completions]


def near(completions, answer, **columns):
    """1.0 where the last number is the answer, less the further it is off; None, no score, where there is no number."""
    found = [re.findall(r"\d+", text) for text in completions]
    return [
        1 / (1 + abs(int(numbers[-1]) - wanted)) if numbers else None
        for numbers, wanted in zip(found, answer, strict=True)
    ]


def main(output_dir="runs/own_reward"):
    config = GRPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,  # TRL's default needs a GPU
        save_strategy="no",
        disable_tqdm=True,
        max_steps=8,
        learning_rate=1e-3,  # for fresh weights; the default is 1e-6
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=8,
        logging_steps=4,
        multi_objective_aggregation="normalize_then_sum",  # GDPO; TRL's default adds the rewards first
        reward_weights=[1.0, 2.0],  # of one_number and near
        reward_conditions={"near": ["one_number", 1.0]},  # near is 0 where one_number is below 1
        gauges="all",  # logs reward_resolution/
    )
    problems, _ = task.make_problems()
    trainer = GRPOTrainer(
        model=task.make_model(hidden_size=64, layers=2),
        processing_class=task.make_tokenizer(),
        reward_funcs=[one_number, near],
        args=config,
        train_dataset=task.make_dataset(problems),
    )
    trainer.train()

    logged = [line for line in trainer.state.log_history if "reward" in line][-1]
    print(f"Means of the last {config.logging_steps} steps:")
    for name, value in logged.items():
        if name.startswith(("reward_resolution/", "rewards/")):
            print(f"  {name:<48}{value:8.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
