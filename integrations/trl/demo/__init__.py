"""Implement `rlloss demo`, which trains a small model with plain GRPO and with remedies."""
