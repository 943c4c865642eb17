"""Compile the kernels for GPUs that need not be present, and read registers, spills and instructions off the result.

    python benchmarks/compile_report.py [--json] [TARGET, KERNEL or FLAGS ...]

Not under TRITON_INTERPRET=1: kernels imported under it cannot be compiled. What a GPU would do with them is not
measured here.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlloss.kernels import (
    clip_surrogate,
    entropy_quantile,
    entropy_temperature,
    linear_token_stats,
    loss_gradient,
    token_stats,
    token_stats_backward,
)

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
# What a flag is unless a variant says otherwise. The names mean the same in every kernel.
FLAGS = dict.fromkeys((
    "PER_ROW", "HAS_SOFTCAP", "SQUARES", "MEAN", "TOP1", "SPLIT", "ENTROPY_GRAD", "LSE_GRAD", "HELD", "FIRST", "LAST",
    "INTERPOLATE", "CISPO", "SEQUENCE", "MEAN_OF_SEQUENCE", "HAS_DENOMINATOR", "KEPT_COUNTS", "PER_TOKEN_ADVANTAGE",
    "HAS_SAMPLER_RATIO", "PER_TOKEN_RATIO", "KL_BIAS_CORRECTION", "OFF_POLICY", "HAS_BEHAVIOR", "SELECT", "EXACT_K",
    "BONUS",
), False) | dict.fromkeys((
    "HAS_MASK", "ENTROPY", "ALIGNED", "LOGP_GRAD", "TOKENS", "HAS_OLD", "HAS_ENTROPY", "WRITE",
), True) | {
    "KL": 0, "BLOCK_V": 2048, "CHUNK_V": 16384, "BLOCK": entropy_quantile.BLOCK, "BINS": entropy_quantile.BINS,
    "BLOCK_T": clip_surrogate.BLOCK_T, "BLOCK_B": 64, "FIELDS": clip_surrogate.FIELDS, "RULE": "two_level",
}  # fmt: skip
OF_LOGITS = dict.fromkeys(
    ("PER_ROW", "HAS_SOFTCAP", "SQUARES", "MEAN", "TOP1", "ENTROPY_GRAD", "LSE_GRAD"), True
)  # fmt: skip
OF_LOSS = dict.fromkeys((
    "PER_TOKEN_ADVANTAGE", "HAS_SAMPLER_RATIO", "PER_TOKEN_RATIO", "KL_BIAS_CORRECTION", "SELECT", "BONUS",
), True) | {"KL": 3}  # fmt: skip
OF_BATCH = dict.fromkeys((
    "MEAN_OF_SEQUENCE", "HAS_DENOMINATOR", "KEPT_COUNTS", "OFF_POLICY", "HAS_BEHAVIOR", "EXACT_K",
), True) | {"TOKENS": False}  # fmt: skip
DTYPES = {
    "logits_ptr": None, "grad_ptr": None, "out_ptr": None, "target_ptr": "*i64", "mask_ptr": "*i1", "kept_ptr": "*i8",
    "ticket_ptr": "*i32", "state_ptr": "*i64", "next_state_ptr": "*i64", "histogram_ptr": "*i64", "ties_ptr": "*i32",
    "last_ptr": "*i64",
}  # fmt: skip


def of_logits(everything: dict, *more: tuple[str, str, dict]) -> list[tuple[str, str, dict]]:
    """Variants (dtype of the logits, name, flags) of a kernel that reads a vocabulary."""
    plain = [(dtype, "plain", {}) for dtype in ("bf16", "fp16", "fp32")]
    return [*plain, ("bf16", "all", everything), ("fp32", "all", everything), *more]


PLAIN = [("fp32", "plain", {})]
EXACT = {"enable_fp_fusion": False}
_quantile, _narrow = entropy_quantile, (entropy_quantile.entropy_narrow_kernel, entropy_quantile.NARROW_WARPS)
# name -> (kernel, warps, variants, launch options)
KERNELS = {
    "forward": (token_stats.token_stats_forward_kernel, 8, of_logits(OF_LOGITS), {}),
    "merge": (
        token_stats.token_stats_merge_kernel,
        1,
        [("bf16", "plain", {}), ("fp32", "plain", {}), ("bf16", "all", OF_LOGITS)],
        {},
    ),
    "backward": (
        token_stats_backward.token_stats_backward_kernel,
        8,
        of_logits(OF_LOGITS, *((dtype, "held", {"HELD": True}) for dtype in ("bf16", "fp16", "fp32"))),
        {},
    ),
    "loss gradient": (
        loss_gradient.loss_gradient_kernel,
        8,
        of_logits(OF_LOGITS | OF_LOSS, ("fp16", "all", OF_LOGITS | OF_LOSS), ("bf16", "cispo", {"CISPO": True})),
        {},
    ),
    "fold tile": (
        linear_token_stats.fold_tile_kernel,
        8,
        [("fp32", "plain", {}), ("fp32", "all", OF_LOGITS)],
        {},
    ),
    # dtype: of the gradient; the tile is fp32.
    "gradient tile": (linear_token_stats.gradient_tile_kernel, 8, of_logits(OF_LOGITS), {}),
    "entropy temperature": (
        entropy_temperature.entropy_temperature_kernel,
        8,
        [
            *((dtype, "plain", {}) for dtype in ("bf16", "fp16", "fp32")),
            *((dtype, rule, {"RULE": rule}) for rule in ("edt", "dynatemp") for dtype in ("bf16", "fp32")),
        ],
        {},
    ),
    "token pass": (
        clip_surrogate.clip_surrogate_kernel,
        clip_surrogate.NUM_WARPS,
        [
            *PLAIN,
            ("fp32", "all, by token", OF_LOSS | OF_BATCH),
            ("fp32", "all, by sequence", OF_LOSS | OF_BATCH | {"SEQUENCE": True}),
            ("fp32", "cispo", {"CISPO": True}),
        ],
        {},
    ),
    "histogram": (_quantile.entropy_histogram_kernel, _quantile.HISTOGRAM_WARPS, PLAIN, {}),
    "narrow": (
        *_narrow,
        [
            *PLAIN,
            ("fp32", "first", {"FIRST": True}),
            ("fp32", "to quantile", {"LAST": True, "INTERPOLATE": True}),
            ("fp32", "to top k", {"LAST": True}),
        ],
        EXACT,
    ),
    "ties": (_quantile.entropy_ties_kernel, _quantile.TIES_WARPS, PLAIN, {}),
    "last tie": (_quantile.entropy_last_tie_kernel, _quantile.TIES_WARPS, PLAIN, {}),
}


def compile_kernel(kernel, dtype: str, flags: dict, target: GPUTarget, num_warps: int, stride_v: int = 1, **options):
    """`kernel` compiled as a launcher would ask for it; all tensors start on 16 bytes."""
    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(kernel.params):
        if p.name.endswith("_ptr"):
            signature[p.name] = DTYPES.get(p.name, "*fp32") or f"*{dtype}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif p.is_constexpr:
            signature[p.name], constants[(i,)] = "constexpr", flags[p.name]
        elif p.name in ("stride_v", "out_v") and stride_v == 1:
            signature[p.name], constants[(i,)] = "constexpr", 1
        else:
            signature[p.name] = p.annotation_type or "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": num_warps} | options)


def read_sass(compiled) -> dict:
    """Registers, local memory and the instructions that matter, from the tools that the triton wheel carries."""
    cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        sass, usage = (
            subprocess.run([cuobjdump, option, f.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, shared, local = map(int, found.groups())
    count = collections.Counter(re.findall(r"\b(MUFU\.EX2|LDG\.E\.128|STG\.E\.128|LDL|STL)\b", sass))
    count["max.NaN"] = compiled.asm["ptx"].count("max.NaN")
    return {"registers": registers, "stack": stack, "shared": shared, "local": local, **count}


def rows(targets, names, wanted):
    for target in targets:
        for name in names:
            kernel, warps, variants, options = KERNELS[name]
            for dtype, flags, changed in (v for v in variants if v[1] in wanted):
                compiled = compile_kernel(kernel, dtype, FLAGS | changed, TARGETS[target], warps, **options)
                row = {"kernel": name, "function": kernel.fn.__name__, "target": target, "dtype": dtype, "flags": flags}
                yield row | (read_sass(compiled) if "cubin" in compiled.asm else {})


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1: found set, expected unset; interpreted kernels cannot be compiled")
    asked = [a for a in sys.argv[1:] if a != "--json"]
    all_flags = {flags for _, _, variants, _ in KERNELS.values() for _, flags, _ in variants}
    known = (list(TARGETS), list(KERNELS), sorted(all_flags))
    if unknown := set(asked).difference(*known):
        sys.exit(f"found {', '.join(sorted(unknown))}, expected some of {known}")
    # Of each kind those that are asked for; all of a kind none of which is.
    table = list(rows(*([a for a in kind if a in asked] or kind for kind in known)))
    if "--json" in sys.argv:
        print(json.dumps(table))
        return
    columns = ["kernel", "target", "dtype", "flags", "registers", "local", "LDG.E.128", "STG.E.128", "MUFU.EX2"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in table:
        print(f"| {' | '.join(str(row.get(c, 0 if 'registers' in row else 'compiled')) for c in columns)} |")


if __name__ == "__main__":
    main()
