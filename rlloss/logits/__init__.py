"""From logits to what they say of each token, and to their gradient."""
