"""This package computes token statistics from logits, and the gradient of the logits."""
