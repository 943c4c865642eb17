"""What is timed: the lm_heads of real models, and how many tokens go through them.

The four models are hidden_size and vocab_size of config.json on the Hugging Face Hub: Qwen/Qwen2.5-0.5B, Qwen/Qwen3-8B,
meta-llama/Meta-Llama-3-8B and google/gemma-3-4b-pt (its text_config; the vocabulary is the default of transformers'
Gemma3TextConfig).
"""

MODELS = {
    "Qwen2.5-0.5B": (896, 151936),
    "Qwen3-8B": (4096, 151936),
    "Llama-3-8B": (4096, 128256),
    "Gemma-3-4B": (2560, 262208),
}  # name: (D, V)
QUICK_MODELS = {"cuda": ("Qwen2.5-0.5B", "Qwen3-8B"), "cpu": ("Qwen2.5-0.5B",)}
RHOS = (0.05, 0.2, 0.5, 1.0)  # share of the tokens that count that get a gradient
FILLS = (0.5, 1.0)  # share of the columns that count
FIRST_RHOS, FIRST_FILL = (0.2, 1.0), 1.0  # what a run that is short of time measures

# (B, T). A CPU's step from hidden states takes a second or two with a head of these sizes, however few the tokens are:
# reading the weight and writing its gradient is most of it.
COLUMNS = {
    "cuda": {"logits": (16, 512), "loss": (16, 512), "hidden": (16, 512), "token pass": (16, 1024)},
    "cpu": {"logits": (8, 8), "loss": (8, 8), "hidden": (2, 32), "token pass": (16, 1024)},
}


def lengths(B: int, T: int, fill: float) -> list[int]:
    """Of B sequences, `fill` as their mean share of T: all T at fill 1, else rising evenly from one to the next."""
    return [T if fill == 1.0 else min(T, round(T * fill * (2 * b + 1) / B)) for b in range(B)]
