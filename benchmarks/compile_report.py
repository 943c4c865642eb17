"""Compile the kernels for GPUs that need not be present, and read registers, spills and instructions off the result.

    python benchmarks/compile_report.py [--json] [TARGET or KERNEL ...]

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

from rlloss.kernels import entropy_quantile, token_stats, token_stats_backward

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
FLAGS = {
    "HAS_MASK": True, "PER_ROW": False, "HAS_SOFTCAP": False, "ENTROPY": True, "SQUARES": False, "MEAN": False,
    "TOP1": False, "SPLIT": False, "ALIGNED": True, "BLOCK_V": 2048, "CHUNK_V": 16384, "LOGP_GRAD": True,
    "ENTROPY_GRAD": False, "LSE_GRAD": False, "FIRST": False, "LAST": False, "INTERPOLATE": False,
    "HELD": False, "BLOCK": entropy_quantile.BLOCK, "BINS": entropy_quantile.BINS,
}  # fmt: skip
EVERYTHING = {
    "PER_ROW": True, "HAS_SOFTCAP": True, "SQUARES": True, "MEAN": True, "TOP1": True, "ENTROPY_GRAD": True,
    "LSE_GRAD": True,
}  # fmt: skip
KERNELS = {
    "forward": token_stats.token_stats_forward_kernel,
    "merge": token_stats.token_stats_merge_kernel,
    "backward": token_stats_backward.token_stats_backward_kernel,
}
# Kernels that read no logits: name -> (kernel, warps, flags, launch options).
_QUANTILE = entropy_quantile
_NARROW = (_QUANTILE.entropy_narrow_kernel, _QUANTILE.NARROW_WARPS)
TOKEN_KERNELS = {
    "histogram": (_QUANTILE.entropy_histogram_kernel, _QUANTILE.HISTOGRAM_WARPS, {}, {}),
    "narrow first": (*_NARROW, {"FIRST": True}, {"enable_fp_fusion": False}),
    "narrow": (*_NARROW, {}, {"enable_fp_fusion": False}),
    "narrow to quantile": (*_NARROW, {"LAST": True, "INTERPOLATE": True}, {"enable_fp_fusion": False}),
    "narrow to top k": (*_NARROW, {"LAST": True}, {"enable_fp_fusion": False}),
    "ties": (_QUANTILE.entropy_ties_kernel, _QUANTILE.TIES_WARPS, {}, {}),
    "last tie": (_QUANTILE.entropy_last_tie_kernel, _QUANTILE.TIES_WARPS, {}, {}),
}
DTYPES = {
    "logits_ptr": None, "grad_ptr": None, "target_ptr": "*i64", "mask_ptr": "*u1", "state_ptr": "*i64",
    "next_state_ptr": "*i64", "histogram_ptr": "*i64", "ties_ptr": "*i32", "last_ptr": "*i64",
}  # fmt: skip


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


def variants(names):
    """(name, dtype, flags in a word, arguments of `compile_kernel`) of the kernels that are named."""
    for name, kernel in KERNELS.items():
        warps = 1 if name == "merge" else 8
        for dtype, extra in (("bf16", {}), ("fp16", {}), ("fp32", {}), ("bf16", EVERYTHING), ("fp32", EVERYTHING)):
            if name in names:
                yield name, dtype, "all" if extra else "plain", (kernel, warps, extra, {})
    for name, arguments in TOKEN_KERNELS.items():
        if name in names:
            yield name, "fp32", "plain", arguments


def rows(targets, names):
    for target in targets:
        for name, dtype, flags, (kernel, warps, extra, options) in variants(names):
            compiled = compile_kernel(kernel, dtype, FLAGS | extra, TARGETS[target], warps, **options)
            row = {"kernel": name, "target": target, "dtype": dtype, "flags": flags}
            yield row | (read_sass(compiled) if "cubin" in compiled.asm else {})


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1: found set, expected unset; interpreted kernels cannot be compiled")
    asked = [a for a in sys.argv[1:] if a != "--json"]
    known = [*KERNELS, *TOKEN_KERNELS]
    if unknown := [a for a in asked if a not in TARGETS and a not in known]:
        sys.exit(f"found {', '.join(unknown)}, expected some of {', '.join([*TARGETS, *known])}")
    table = list(rows([a for a in asked if a in TARGETS] or TARGETS, [a for a in asked if a in known] or known))
    if "--json" in sys.argv:
        print(json.dumps(table))
        return
    columns = ["kernel", "target", "dtype", "flags", "registers", "local", "LDG.E.128", "STG.E.128", "MUFU.EX2"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in table:
        print(f"| {' | '.join(str(row.get(c, 0 if 'registers' in row else 'compiled')) for c in columns)} |")


if __name__ == "__main__":
    main()
