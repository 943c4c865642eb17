"""List the shapes that are timed: the lm_heads of real models, and the numbers of tokens.

The four models have hidden_size and vocab_size of config.json on the Hugging Face Hub: Qwen/Qwen2.5-0.5B,
Qwen/Qwen3-8B, meta-llama/Meta-Llama-3-8B and google/gemma-3-4b-pt (text_config; the vocabulary is the default of
transformers' Gemma3TextConfig). On a CPU a step from hidden states with such a head takes a second or two even for few
tokens, because it reads the weight and writes its gradient. "small" and "wide" are heads for many tokens on a CPU.
"""

from typing import NamedTuple

from benchmarks.harness.timing import DEVICE

SMALL = {"small": (896, 32768), "wide": (4096, 32768)}
REAL = {
    "Qwen2.5-0.5B": (896, 151936),
    "Qwen3-8B": (4096, 151936),
    "Llama-3-8B": (4096, 128256),
    "Gemma-3-4B": (2560, 262208),
}
MODELS = SMALL | REAL  # name: (D, V)
DEFAULT_MODELS = {"cuda": tuple(REAL), "cpu": tuple(MODELS)}
QUICK_MODELS = {"cuda": ("Qwen2.5-0.5B", "Qwen3-8B"), "cpu": ("small",)}
RHOS = (0.05, 0.2, 0.5, 1.0)  # share of the counted tokens that get a gradient
FILLS = (0.5, 1.0)  # share of the columns that count
FIRST_RHOS = (0.2, 1.0)  # measured first, and if time is short only these
SHARES = {"token pass": 1, "logits": 2, "loss": 2, "hidden": 8, "step": 8}  # of the time, by suite

# (B, T)
COLUMNS = {"cuda": (16, 512), "cpu": (8, 8)}
HIDDEN_COLUMNS = {"cuda": (16, 512), "cpu": (2, 32)}
WIDE_COLUMNS = (4, 32)
SMALL_COLUMNS = {"logits": (8, 64), "loss": (8, 64), "hidden": (8, 128)}
TOKEN_PASS_COLUMNS = (16, 1024)


class Llama(NamedTuple):
    """The model and batch of the update step: B completions of T columns after P columns of prompt. F: MLP width."""

    B: int = 16
    P: int = 16
    T: int = 128
    D: int = 512
    V: int = 32768
    layers: int = 4
    F: int = 1376
    heads: int = 8

    def __str__(self) -> str:
        return f"Llama of {self.layers} layers"


LLAMA = Llama()


class Cell(NamedTuple):
    """model: for logits all models with this V, separated by ", "; for the token pass None. kind: "step" (forward and
    backward), "forward" (without gradient, independent of rho), from hidden states also "frozen head", and for the
    update step also "beta 0.04" and "LoRA"."""

    suite: str
    model: str | None
    dtype: str
    rho: float
    fill: float
    kind: str = "step"

    @property
    def size(self) -> tuple[int | None, int | None]:
        """(D, V). D is None without hidden states."""
        if self.model is None:
            return None, None
        if self.suite == "step":
            return LLAMA.D, LLAMA.V
        D, V = MODELS[self.model.split(", ")[0]]
        return D if self.suite == "hidden" else None, V

    @property
    def columns(self) -> tuple[int, int]:
        """(B, T)."""
        if self.suite == "token pass":
            return TOKEN_PASS_COLUMNS
        if self.suite == "step":
            return LLAMA.B, LLAMA.T
        if self.model is not None and self.model.split(", ")[0] in SMALL and DEVICE.type == "cpu":
            return WIDE_COLUMNS if self.model == "wide" else SMALL_COLUMNS[self.suite]
        return (HIDDEN_COLUMNS if self.suite == "hidden" else COLUMNS)[DEVICE.type]

    @property
    def first(self) -> bool:
        return (self.fill == 1.0 or self.suite == "step" or self.model == "small") and (
            self.rho in FIRST_RHOS or self.kind == "forward"
        )

    def __str__(self) -> str:
        model = f"{self.model}, " if self.model else ""
        rho = "" if self.kind == "forward" else f", rho {self.rho:g}"
        return f"{self.suite}: {model}{self.dtype}, {self.kind}{rho}, fill {self.fill:g}"


def lengths(B: int, T: int, fill: float) -> list[int]:
    """Return the lengths of B sequences whose mean is the share `fill` of T. They rise evenly; at fill 1 all are T."""
    return [T if fill == 1.0 else min(T, round(T * fill * (2 * b + 1) / B)) for b in range(B)]
