"""List the most used options of `rlloss train`, and build its one-screen help and its YAML template from the list."""

from __future__ import annotations

USAGE = "rlloss train --config FILE.yaml | --model M --dataset D --reward module:function [options]"

OPTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "what to train on": {
        "model": ("", "folder or Hub id of a causal language model with its tokenizer"),
        "dataset": ("", ".jsonl, .json, .csv, .parquet, folder or Hub id; it has a column 'prompt'"),
        "reward": ("", "module:function, one or more; modules are looked up here too"),
        "dataset_split": ("train", "split of the dataset"),
        "dataset_config": ("main", "configuration of a Hub dataset that has several"),
    },
    "against collapse": {
        "epsilon_low": ("0.2", "ratios below 1 - this are clipped"),
        "epsilon_high": ("0.28", "ratios above 1 + this are clipped: clip-higher, DAPO"),
        "max_log_ratio": ("20.0", "bound of |log ratio|, also in the KL"),
        "top_entropy_quantile": ("0.2", "gradients on this share of the tokens, those of highest entropy"),
        "entropy_denominator": ("kept", "divide by the 'kept' tokens (the paper) or 'all' (TRL)"),
        "exact_k": ("true", "keep exactly that share, without ties"),
        "entropy_scope": ("generation", "compare the tokens of a 'microbatch', a 'window' or a 'generation'"),
        "entropy_bonus_tokens": ("kept", "whose mean entropy entropy_coef rewards: 'kept' or 'all'"),
        "covariance": ("{ratio: 2.0e-4}", "which tokens loss_type clip_cov or kl_cov picks"),
        "dynamic_temperature": ("{rule: two_level, high: 1.2}", "sampling temperature that follows the entropy"),
        "dynamic_sampling_rounds": ("2", "replace groups that all got one reward, this often at most"),
        "multi_objective_aggregation": ("gdpo", "normalise each reward before they are summed"),
        "reward_conditions": ("{short: [right, 1.0]}", "a reward counts where another reaches a value"),
        "gdpo_token_weighted": ("false", "GDPO's batch norm weighs completions by their tokens (verl)"),
        "soft_overlong_cache": ("64", "penalty on the last tokens before max_completion_length, DAPO"),
        "collapse_monitor": ("true", "warn in words when the entropy or a reward collapses"),
        "gauges": ("all", "log 'basic' gauges or 'all'"),
        "token_log_steps": ("20", "write the completions of every 20th step, for `rlloss report`"),
    },
    "memory and speed": {
        "zero_advantage": ("drop", "completions without a signal: 'auto', 'forward_only', 'drop' or 'keep'"),
        "lm_head_plan": ("auto", "'auto', 'keep', 'recompute', 'jacobian' or 'trl'"),
        "lm_head_memory_budget": ("1GiB", "bytes that a plan may hold"),
    },
    "GRPO": {
        "output_dir": ("out", "where checkpoints, logs and the model go"),
        "loss_type": ("dapo", "dapo, grpo, dr_grpo, gspo, cispo, sapo, clip_cov, kl_cov and more"),
        "learning_rate": ("1.0e-6", "of the optimizer"),
        "max_steps": ("100", "optimizer steps"),
        "num_generations": ("8", "completions of a prompt"),
        "max_completion_length": ("256", "tokens"),
        "per_device_train_batch_size": ("8", "completions of a micro-batch"),
        "gradient_accumulation_steps": ("1", "micro-batches of an optimizer step"),
        "num_iterations": ("1", "updates of a generation; with 1 no clip can act"),
        "beta": ("0.0", "of the KL to the reference model"),
        "temperature": ("1.0", "of sampling"),
        "use_vllm": ("false", "generate with vLLM"),
        "logging_steps": ("10", "between two lines of the log"),
    },
}
"""Group -> option -> (an example value, its meaning)."""


def one_screen() -> str:
    """The text of `rlloss train --help`."""
    lines = [f"usage: {USAGE}"]
    for group, options in OPTIONS.items():
        lines += [f"{group}:", *(f"  --{name:<28} {text}" for name, (_, text) in options.items())]
    lines += [
        "Several processes: torchrun --nproc_per_node 2 -m rlloss.cli train ...",
        "A template to fill in: rlloss train --init [FILE.yaml]. All options, which are the fields of",
        "GRPOConfig and ModelConfig: rlloss train --help all",
    ]
    return "\n".join(lines)


def template() -> str:
    """The text of `rlloss train --init`. Options with an example value are commented out."""
    lines = [
        "# rlloss train --config THIS_FILE. Fill in the first three lines; take the # away from what you want to set.",
        "# A key is the name of an option (rlloss train --help all); options on the command line win.",
    ]
    for group, options in OPTIONS.items():
        lines += ["", f"# {group[0].upper()}{group[1:]}"]
        for name, (example, text) in options.items():
            line = f"{name}: {example}".rstrip() if example else f"{name}:"
            lines.append(f"{'' if not example else '# '}{line}  # {text}")
    return "\n".join(lines) + "\n"
