"""Record the kernels that the launchers ask Triton to compile, without launching them, and compile them for a GPU that
need not be present."""

import functools
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from rlloss.kernels import (
    entropy_quantile,
    entropy_temperature,
    gradient_in_forward,
    launch_table,
    logits_tile,
    token_pass,
    token_stats_backward,
    token_stats_forward,
)

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BEYOND = ", beyond 2 GB"
B, T = 2, 3
N = B * T


class Launch(NamedTuple):
    """A launch as Triton sees it. arguments: parameter -> (type, what is known of it), or ("constexpr", value). None is
    a constexpr too. "D" is known to be a multiple of 16, and "S" (AMD) is a tensor of up to 2 GB."""

    target: str
    case: str
    function: Any
    arguments: dict[str, tuple[str, Any]]
    options: dict[str, Any]

    @property
    def kernel(self) -> str:
        return self.function.fn.__name__

    def constant(self, name: str) -> Any:
        """Return the value of a constexpr, or "given" for any other parameter."""
        kind, value = self.arguments.get(name, ("constexpr", None))
        return value if kind == "constexpr" else "given"

    def compiled(self) -> Any:
        of, backend = self.arguments, make_backend(TARGETS[self.target])
        constants = {(i,): value for i, (kind, value) in enumerate(of.values()) if kind == "constexpr"}
        known = {(i,): known for i, (kind, known) in enumerate(of.values()) if kind != "constexpr" and known}
        source = ASTSource(
            fn=self.function,
            signature={name: kind for name, (kind, _) in of.items()},
            constexprs=constants,
            attrs={at: backend.parse_attr(what) for at, what in known.items()},
        )
        return triton.compile(source, target=TARGETS[self.target], options=self.options)


def beyond_2gb(arguments: dict[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    """Return the arguments of the same launch on more logits than any that are made here."""
    large = {name: arguments[name] for name in ("logits_ptr", "grad_ptr", "tile_ptr", "out_ptr") if name in arguments}
    return arguments | {name: (kind, known.replace("S", "")) for name, (kind, known) in large.items()}


def logits_of(V: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Make logits [B, T, V]. layout "aligned": every row starts at a multiple of 16 bytes."""
    if layout == "strided":
        return torch.zeros(B, T, 2 * V, dtype=dtype)[..., ::2]
    wide = -(-V // 8) * 8 + (layout == "uneven")
    return torch.zeros(B, T, wide, dtype=dtype)[..., :V]


# Cases of calls over rows. Missing settings are as in "plain".
ROWS = {
    "plain": {},
    "uneven": {"layout": "uneven"},
    "strided": {"layout": "strided"},
    "softcap": {"softcap": 30.0, "temperature": torch.ones(N)},
    "small V": {"V": 300, "target": torch.zeros(N, dtype=torch.int32)},
    "everything": {"softcap": 30.0, "temperature": torch.ones(N), "everything": True},
    "everything, uneven": {"softcap": 30.0, "temperature": torch.ones(N), "everything": True, "layout": "uneven"},
}
CASES = {"bf16": tuple(ROWS), "fp16": ("plain",), "fp32": ("plain", "uneven", "everything")}


def call_rows(dtype: str, case: str) -> None:
    """Call the launchers that read rows of the vocabulary."""
    of = {"layout": "aligned", "V": 151936, "softcap": None, "temperature": 0.7, "everything": False} | ROWS[case]
    V, layout, everything = of["V"], of["layout"], of["everything"]
    logits = logits_of(V, DTYPES[dtype], layout)
    target, mask = of.get("target", torch.zeros(N, dtype=torch.int64)), torch.ones(N, dtype=torch.bool)
    scaling, numbers = (of["temperature"], of["softcap"], 1.0), torch.ones(N)
    more = numbers if everything else None
    twice = case in ("plain", "everything")
    for split in (False, True) if twice else (False,):
        token_stats_forward.token_stats_forward(logits, target, mask, scaling, extra=everything, split=split)
    for held in (None, (logits, numbers[0])) if case == "plain" else (None,):
        token_stats_backward.token_stats_backward(
            logits, target, mask, scaling, (torch.ones(3, N), numbers), (numbers, more, more), held=held
        )
    x = torch.ones(B, T)
    for cispo in (0.0, 1.0) if twice else (0.0,):
        gradient_in_forward.gradient_in_forward(
            logits, target, mask.view(B, T), scaling,
            gradient_in_forward.LossTensors(x, x, x, x, x[0, 0], torch.ones(2, B)),
            token_pass.TokenSettings(cispo, 0.8, 1.2, 1.2, 5.0, entropy_coef=float(everything)),
        )  # fmt: skip
    if layout != "strided":  # tiles are fp32 and contiguous; their gradient has the dtype of the weight
        tile = logits_of(V, torch.float32, layout).flatten(0, 1)
        logits_tile.fold_tile(tile, 0, target, torch.zeros(7, N), scaling, entropy=True, extra=everything)
        logits_tile.gradient_tile(
            tile, 0, target, scaling, (numbers, numbers, numbers, numbers), (numbers, more, more), DTYPES[dtype]
        )
    if of["softcap"] is None:
        rules = entropy_temperature.RULES if case == "plain" else entropy_temperature.RULES[:1]
        for rule, out in [(rule, logits[0]) for rule in rules] + [(rules[0], None)] * (case == "plain"):
            entropy_temperature.entropy_temperature(logits[0], mask[:T], out, rule, (1.2, 0.9, 0.5), 0.0)


def call_tokens(everything: bool) -> None:
    """Call the launchers of the token pass and of the selection by entropy."""
    x, mask, number = torch.ones(B, T), torch.ones(B, T, dtype=torch.bool), torch.ones(())
    tensors = token_pass.TokenTensors(x, x, mask, x, x)
    if everything:
        last = torch.zeros((), dtype=torch.int64)
        tensors = token_pass.TokenTensors(x, x, mask, x, x, x, x, x, number, last, number)
    for cispo in (0.0, 1.0):
        settings = token_pass.TokenSettings(cispo, 0.8, 1.2, 1.2, 5.0, entropy_coef=float(everything))
        token_pass.token_pass(tensors, settings)
    entropy, counts = torch.zeros(4096), torch.ones(4096, dtype=torch.bool) if everything else None
    entropy_quantile.entropy_quantile(entropy, counts, 0.5, rounded_up_to=0)
    entropy_quantile.entropy_top_k(entropy, counts, 0.5)


CALLS = {
    f"{dtype}, {case}": functools.partial(call_rows, dtype, case) for dtype, cases in CASES.items() for case in cases
} | {name: functools.partial(call_tokens, name == "everything") for name in ("plain", "everything")}


def launches(target: str) -> list[Launch]:
    """Return the launches of all calls on a GPU of this generation. Afterwards the process cannot launch kernels."""
    found: dict[str, Launch] = {}
    bind = functools.cache(
        lambda f: create_function_from_signature(f.signature, f.params, make_backend(TARGETS[target]))
    )
    case = ""

    def run(self, *args, grid, warmup, **kwargs):
        _, asked, options = bind(self)(*args, **kwargs)
        arguments = {p.name: tuple(of) for p, of in zip(self.params, asked, strict=True)}
        for size, of in (("", arguments), (BEYOND, beyond_2gb(arguments))):
            found.setdefault(f"{self.fn.__name__}, {of}", Launch(target, case + size, self, of, options))

    JITFunction.run = run
    launch_table.generation = lambda device: target
    for case, call in CALLS.items():  # noqa: B007
        call()
    return list(found.values())
