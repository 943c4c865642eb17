"""What the launchers can ask Triton to compile, and a choice of it in which every two settings meet.

A kernel has factors (a flag, a dtype, the layout of its rows, a size of the vocabulary), and a factor has levels, each
of which settles some parameters. A kernel with few combinations is compiled in all of them on every target. The others
have too many, 66,528 of the token pass and 258,048 of the loss gradient on each target, and get a covering array of
strength 2 in which the target is one more factor: any two levels that can occur together do so in some variant.
Besides, each target has the plain variant in every dtype, and everything on.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
from rlloss.kernels.launch import most_registers, shape_of

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
DTYPES = ("bf16", "fp16", "fp32")
SHAPES = ("statistics", "gradient")  # of `rlloss.kernels.launch_table`
FEW = 24  # combinations, without the target
TARGET = "target of the compiler"

# What a level makes of a parameter: the value of a constexpr or of num_warps, the type of a pointer, a stride (1, "i32"
# or, if it is a multiple of 16, "i32 16").
Level = dict[str, Any]
Factors = dict[str, dict[str, Level]]
Setting = dict[str, str]


class Kernel(NamedTuple):
    """function: the jit kernel. factors: factor -> level -> parameters; the first level is that of the plain variant.

    everything: the variants with everything on, as factor -> level where that is not simply on. impossible: levels
    that no launcher asks for together. always: parameters that are the same in all variants. options: of the launch.
    passes: what the loops over the vocabulary do: "read" statistics, "rewrite" entries, "fill" those of a dead row;
    none where a kernel has no such loop. shape: which of `SHAPES` divides the vocabulary. alone: whether each flag is
    compiled without the others too: where all of them meet in one loop, pairs do not tell enough.
    """

    function: Any
    factors: Factors
    everything: tuple[Setting, ...] = ()
    impossible: tuple[Setting, ...] = ()
    always: Level = {}
    options: dict[str, Any] = {}
    passes: frozenset[str] = frozenset()
    shape: str = ""
    alone: bool = False


class Variant(NamedTuple):
    """A level of each factor of a kernel, on a target."""

    kernel: str
    target: str
    setting: Setting

    @property
    def dtype(self) -> str:
        return self.setting.get("dtype", "fp32")

    @property
    def flags(self) -> str:
        """What differs from the plain variant."""
        plain = first_levels(KERNELS[self.kernel].factors)
        differs = [(plain[f], level) for f, level in self.setting.items() if f != "dtype" and level != plain[f]]
        return ", ".join(level or f"no {usual}" for usual, level in differs) or "plain"

    @property
    def simple(self) -> bool:
        """Aligned rows, and no more computed than a loss asks for."""
        heavy = any(self.setting.get(flag) for flag in ("HAS_SOFTCAP", "SQUARES", "MEAN", "TOP1"))
        return self.setting.get("layout") == "aligned" and not heavy

    def parameters(self) -> Level:
        kernel = KERNELS[self.kernel]
        chosen = dict(kernel.always)
        for factor, level in self.setting.items():
            chosen |= kernel.factors[factor][level]
        if kernel.shape:
            V = int(self.setting["V"].removeprefix("V="))
            block, chunk, _, warps = shape_of(launch_table.look_up(kernel.shape, self.target, self.dtype, V), V)
            chosen |= {"BLOCK_V": block, "CHUNK_V": chunk, "num_warps": warps}
        return chosen


def first_levels(factors: Factors) -> Setting:
    return {factor: next(iter(levels)) for factor, levels in factors.items()}


def on(*flags: str) -> Factors:
    """Flags that are on in the plain variant."""
    return {flag: {flag: {flag: True}, "": {flag: False}} for flag in flags}


def off(*flags: str) -> Factors:
    return {flag: {"": {flag: False}, flag: {flag: True}} for flag in flags}


def needs(flag: str, *others: str) -> tuple[Setting, ...]:
    """Impossible: the flag without one of the others."""
    return tuple({flag: flag, other: ""} for other in others)


def dtypes(*pointers: str) -> Factors:
    return {"dtype": {dtype: dict.fromkeys(pointers, f"*{dtype}") for dtype in DTYPES}}


def layouts(*strides: str, inplace: bool = False) -> Factors:
    """Of rows over the vocabulary. uneven: not every row starts on 16 bytes.

    What is written is contiguous, or with `inplace` may be strided as well.
    """
    contiguous = {"ALIGNED": False} | dict.fromkeys(strides, 1)
    levels: dict[str, Level] = {"aligned": contiguous | {"ALIGNED": True}, "uneven": contiguous}
    for name, stride in (("strided", "i32"), ("strided by 16", "i32 16")) if strides else ():
        levels[name] = contiguous | {"stride_v": stride}
        if inplace:
            levels[f"{name}, in place"] = contiguous | {"stride_v": stride, "out_v": stride}
    return {"layout": levels}


def vocabularies() -> list[int]:
    """The largest, and those whose launch shape is another one on some target in some dtype."""
    found: dict[tuple, int] = {}
    sizes = {7, 300, 1000, 4000, 151936} | {key[3] for key in launch_table.TABLE}
    for V in sorted(sizes, reverse=True):
        shapes = (
            shape_of(launch_table.look_up(of, target, dtype, V), V)
            for of in SHAPES
            for target in TARGETS
            for dtype in DTYPES
        )
        found.setdefault(tuple((block, warps) for block, _, _, warps in shapes), V)
    return list(found.values())


MASK = on("HAS_MASK")
OF_ROWS = off("PER_ROW", "HAS_SOFTCAP")
OF_STATS = OF_ROWS | on("ENTROPY") | off("SQUARES", "MEAN", "TOP1")
GRADIENTS = on("LOGP_GRAD") | off("ENTROPY_GRAD", "LSE_GRAD")
NO_GRADIENT: Setting = {"LOGP_GRAD": "", "ENTROPY_GRAD": "", "LSE_GRAD": ""}
SIZES: Factors = {"V": {f"V={V}": {} for V in vocabularies()}}
TARGET_IDS: Factors = {"target": {"": {"target_ptr": "*i64"}, "int32 target": {"target_ptr": "*i32"}}}
OF_TOKENS = off("CISPO") | on("HAS_OLD") | off("PER_TOKEN_ADVANTAGE", "HAS_SAMPLER_RATIO", "PER_TOKEN_RATIO")
KL: Factors = {"KL": {f"KL={k}" if k else "": {"KL": k} for k in range(4)}} | off("KL_BIAS_CORRECTION")
OF_BOTH = (*needs("PER_TOKEN_RATIO", "HAS_SAMPLER_RATIO"), *needs("KL_BIAS_CORRECTION", "KL"))
BLOCK, BINS = {"BLOCK": entropy_quantile.BLOCK}, {"BINS": entropy_quantile.BINS}
TIES = BLOCK | {"num_warps": entropy_quantile.TIES_WARPS}

KERNELS = {
    "forward": Kernel(
        token_stats_forward.token_stats_forward_kernel,
        dtypes("logits_ptr") | MASK | OF_STATS | off("SPLIT") | TARGET_IDS | SIZES | layouts("stride_v"),
        everything=({"SPLIT": ""},),
        passes=frozenset({"read"}), shape="statistics", alone=True,
    ),
    "merge": Kernel(
        token_stats_forward.token_stats_merge_kernel,
        dtypes("logits_ptr") | MASK | OF_STATS | TARGET_IDS
        | {"stride": {"": {"stride_v": 1}, "strided": {"stride_v": "i32"}, "strided by 16": {"stride_v": "i32 16"}}},
        everything=({"stride": ""},),
        always={"num_warps": 1},
    ),
    "backward": Kernel(
        token_stats_backward.token_stats_backward_kernel,
        dtypes("logits_ptr", "grad_ptr") | MASK | OF_ROWS | GRADIENTS | off("HELD") | TARGET_IDS | SIZES
        | layouts("stride_v", "out_v"),
        everything=({"HELD": ""},),
        impossible=(NO_GRADIENT,),
        passes=frozenset({"rewrite", "fill"}), shape="gradient",
    ),
    "loss gradient": Kernel(
        gradient_in_forward.gradient_in_forward_kernel,
        dtypes("logits_ptr", "grad_ptr") | OF_ROWS | OF_TOKENS | KL | off("SELECT", "BONUS") | TARGET_IDS | SIZES
        | layouts("stride_v", "out_v"),
        everything=({"CISPO": ""},),
        impossible=OF_BOTH,
        passes=frozenset({"read", "rewrite", "fill"}), shape="statistics",
    ),
    "fold tile": Kernel(
        logits_tile.fold_tile_kernel,
        OF_STATS | TARGET_IDS | SIZES | layouts(),
        everything=({},),
        passes=frozenset({"read"}), shape="statistics", alone=True,
    ),
    # dtype: of the gradient; the tile is fp32.
    "gradient tile": Kernel(
        logits_tile.gradient_tile_kernel,
        dtypes("out_ptr") | OF_ROWS | GRADIENTS | TARGET_IDS | SIZES | layouts(),
        everything=({},),
        impossible=(NO_GRADIENT,),
        passes=frozenset({"rewrite"}), shape="gradient",
    ),
    "entropy temperature": Kernel(
        entropy_temperature.entropy_temperature_kernel,
        dtypes("logits_ptr", "out_ptr") | MASK | on("WRITE") | SIZES
        | {"rule": {rule: {"RULE": rule} for rule in entropy_temperature.RULES}}
        | layouts("stride_v", "out_v", inplace=True),
        impossible=({"WRITE": "", "layout": "strided"}, {"WRITE": "", "layout": "strided by 16"}),
        passes=frozenset({"read", "rewrite"}), shape="statistics", alone=True,
    ),
    "token pass": Kernel(
        token_pass.token_pass_kernel,
        OF_TOKENS | off("SEQUENCE", "MEAN_OF_SEQUENCE") | on("TOKENS") | off("HAS_DENOMINATOR", "KEPT_COUNTS") | KL
        | off("OFF_POLICY", "HAS_BEHAVIOR") | on("HAS_ENTROPY") | off("SELECT", "EXACT_K", "BONUS"),
        everything=tuple({"CISPO": "", "TOKENS": "", "SEQUENCE": sequence} for sequence in ("", "SEQUENCE")),
        impossible=(
            *OF_BOTH, {"TOKENS": "TOKENS", "HAS_DENOMINATOR": "HAS_DENOMINATOR"}, *needs("HAS_BEHAVIOR", "OFF_POLICY"),
            *needs("SELECT", "HAS_ENTROPY"), *needs("EXACT_K", "SELECT", "HAS_ENTROPY"),
            *needs("KEPT_COUNTS", "SELECT", "HAS_ENTROPY"), *needs("BONUS", "HAS_ENTROPY"),
        ),
        always={"FIELDS": token_pass.FIELDS, "BLOCK_T": token_pass.BLOCK_T, "BLOCK_B": 64,
                "num_warps": token_pass.NUM_WARPS},
    ),
    "histogram": Kernel(
        entropy_quantile.entropy_histogram_kernel, MASK,
        always=BLOCK | BINS | {"num_warps": entropy_quantile.HISTOGRAM_WARPS},
    ),
    "narrow": Kernel(
        entropy_quantile.entropy_narrow_kernel,
        off("FIRST", "LAST", "INTERPOLATE"),
        impossible=({"FIRST": "FIRST", "LAST": "LAST"}, *needs("INTERPOLATE", "LAST")),
        always=BINS | {"num_warps": entropy_quantile.NARROW_WARPS},
        options={"enable_fp_fusion": False},
    ),
    "ties": Kernel(entropy_quantile.entropy_ties_kernel, MASK, always=TIES),
    "last tie": Kernel(entropy_quantile.entropy_last_tie_kernel, MASK, always=TIES),
}  # fmt: skip

# The type of a pointer, where it is not fp32 and no level says what it is.
POINTERS = {
    "mask_ptr": "*u1", "kept_ptr": "*i8", "ticket_ptr": "*i32", "ties_ptr": "*i32", "state_ptr": "*i64",
    "next_state_ptr": "*i64", "histogram_ptr": "*i64", "last_ptr": "*i64",
}  # fmt: skip


def possible(setting: Setting, impossible: tuple[Setting, ...]) -> bool:
    """Whether a setting, or part of one, has none of the impossible combinations in it."""
    return not any(all(setting.get(factor) == level for factor, level in one.items()) for one in impossible)


def combinations(kernel: str) -> Iterator[Setting]:
    """Every setting that a launcher can ask for."""
    factors = KERNELS[kernel].factors
    for levels in itertools.product(*factors.values()):
        setting = dict(zip(factors, levels, strict=True))
        if possible(setting, KERNELS[kernel].impossible):
            yield setting


def simple(kernel: str) -> list[Setting]:
    """The plain variant in every dtype, and everything on in the narrowest and the widest."""
    factors = KERNELS[kernel].factors
    plain = first_levels(factors)
    # Of a factor that is off in the plain variant the last level is the one that has most on.
    full = {factor: level or list(factors[factor])[-1] for factor, level in plain.items()}
    every = [{"dtype": dtype} for dtype in factors.get("dtype", ())] or [{}]
    outer = [every[0], every[-1]] if len(every) > 1 else every
    return [plain | own for own in every] + [
        full | own | dtype for own in KERNELS[kernel].everything for dtype in outer
    ]


def alone(kernel: str) -> list[Setting]:
    """The plain variant with one flag or its layout changed, in the narrowest and the widest dtype."""
    factors = KERNELS[kernel].factors
    changed = [
        {factor: level}
        for factor, levels in factors.items()
        for level in list(levels)[1:]
        if factor not in ("dtype", "target", "V")
    ]
    outer = [{"dtype": dtype} for dtype in list(factors.get("dtype", ()))[::2]] or [{}]
    found = [first_levels(factors) | one | dtype for one in changed for dtype in outer]
    return [setting for setting in found if possible(setting, KERNELS[kernel].impossible)]


def pairs(setting: Setting) -> Iterator[frozenset[tuple[str, str]]]:
    return map(frozenset, itertools.combinations(setting.items(), 2))


def covering_array(
    factors: dict[str, list[str]], impossible: tuple[Setting, ...], given: list[Setting]
) -> list[Setting]:
    """Settings, the given ones first, in which every pair of levels occurs that is possible.

    Greedy: a setting begins with a pair that is missing still, and each further factor takes the level that brings most
    missing pairs. A pair counts as possible if it is none of the impossible ones itself.
    """
    levels = [(factor, level) for factor, of in factors.items() for level in of]
    every = (dict(pair) for pair in itertools.combinations(levels, 2) if pair[0][0] != pair[1][0])
    missing = dict.fromkeys(frozenset(pair.items()) for pair in every if possible(pair, impossible))  # in order
    settings = []

    def add(setting: Setting) -> None:
        settings.append(setting)
        for pair in pairs(setting):
            missing.pop(pair, None)

    for setting in given:
        add(setting)
    order = sorted(factors, key=lambda factor: -len(factors[factor]))
    while missing:
        setting = dict(next(iter(missing)))
        for factor in (f for f in order if f not in setting):
            fitting = [level for level in factors[factor] if possible(setting | {factor: level}, impossible)]
            brings = {
                level: sum(frozenset({(factor, level), other}) in missing for other in setting.items())
                for level in fitting
            }
            setting[factor] = max(fitting, key=brings.__getitem__)
        add({factor: setting[factor] for factor in factors})
    return settings


def variants(everywhere: bool = False) -> list[Variant]:
    """What is compiled. everywhere: any two levels meet on each target, and not only on some target."""
    found = []
    for name, kernel in KERNELS.items():
        few = list(itertools.islice(combinations(name), FEW + 1))
        if len(few) <= FEW:
            found += [Variant(name, target, setting) for target in TARGETS for setting in few]
            continue
        factors = {factor: list(levels) for factor, levels in kernel.factors.items()}
        given = [{TARGET: target} | setting for target in TARGETS for setting in simple(name)]
        single = alone(name) if kernel.alone else []
        given += [{TARGET: target} | setting for target, setting in zip(itertools.cycle(TARGETS), single, strict=False)]
        settings = covering_array({TARGET: list(TARGETS)} | factors, kernel.impossible, given)
        for target in TARGETS:
            own = [{factor: s[factor] for factor in factors} for s in settings if s[TARGET] == target]
            own = covering_array(factors, kernel.impossible, own) if everywhere else own
            found += [Variant(name, target, setting) for setting in own]
    return found


def specialization(variant: Variant) -> dict[str, tuple[str, Any]]:
    """parameter -> what Triton specialises it to: ("constexpr", value), or (type, "D" if known to be a multiple of 16).
    None stands for "" where a parameter is never looked at."""
    kernel, parameters = KERNELS[variant.kernel], variant.parameters()
    found: dict[str, tuple[str, Any]] = {}
    for p in kernel.function.params:
        value = parameters.get(p.name)
        if p.is_constexpr or value == 1:
            found[p.name] = "constexpr", parameters[p.name]
        elif p.name.endswith("_ptr"):
            found[p.name] = value or POINTERS.get(p.name, "*fp32"), "D"
        elif value:
            kind, _, multiple = value.partition(" ")
            found[p.name] = kind, "D" if multiple else ""
        else:
            found[p.name] = p.annotation_type, None
    return found


def launch_options(variant: Variant) -> dict[str, Any]:
    options = {"num_warps": variant.parameters()["num_warps"]} | KERNELS[variant.kernel].options
    # As `rlloss.kernels.launch.registers` has it, on a GPU that is there.
    roomy = variant.kernel == "token pass" or (KERNELS[variant.kernel].passes and not variant.simple)
    told = roomy and variant.target.startswith("sm_")
    return options | {"maxnreg": most_registers(options["num_warps"])} if told else options


def compile_variant(variant: Variant) -> Any:
    """The variant compiled as a launcher would ask for it."""
    asked = specialization(variant).items()
    source = ASTSource(
        fn=KERNELS[variant.kernel].function,
        signature={name: kind for name, (kind, _) in asked},
        constexprs={(i,): value for i, (_, (kind, value)) in enumerate(asked) if kind == "constexpr"},
        attrs={(i,): [["tt.divisibility", 16]] for i, (_, (kind, known)) in enumerate(asked) if known == "D"},
    )
    return triton.compile(source, target=TARGETS[variant.target], options=launch_options(variant))
