"""Compile the kernels for GPUs that need not be present, and hold what the compiler made of them against what they are
meant to be: no spills, 16-byte accesses to the vocabulary, one exponential an entry, room for enough threads.

    python -m benchmarks.compiler.report [--json | --check] [--everywhere] [TARGET, KERNEL or FLAGS ...]

--check: list what falls short and exit 1, unless it is known of this version of Triton (`known`).
--everywhere: any two settings meet on each target, and not only on some.

Not under TRITON_INTERPRET=1: kernels imported under it cannot be compiled. What a GPU would do with them is not
measured here. For another Triton: `pip install --no-deps --target FOLDER triton==VERSION`, and PYTHONPATH=FOLDER.
"""

import argparse
import fractions
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import triton

from benchmarks.compiler import assembly
from benchmarks.compiler import variants as compile_variants
from benchmarks.compiler.assembly import Assembly, Loop
from benchmarks.compiler.variants import KERNELS, TARGETS, Variant

BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
# Threads of a multiprocessor at most, and 32-bit registers: of a quarter of it (NVIDIA) or a lane of a SIMD (AMD).
THREADS = {"sm_80": 2048, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536, "gfx942": 2048}
QUARTER = {"sm_80": 16384, "sm_90": 16384, "sm_100": 16384, "sm_120": 16384, "gfx942": 512 * 64}


def threads(target: str, registers: int, warps: int) -> int:
    """Threads of whole programs whose registers fit a multiprocessor, which hands them out by 8 a thread."""
    lanes = TARGETS[target].warp_size
    a_quarter = QUARTER[target] // (lanes * -(-registers // 8) * 8)
    return min(4 * a_quarter * lanes, THREADS[target]) // (warps * lanes) * warps * lanes


def register_bound(variant: Variant) -> int:
    """64: 1024 threads a multiprocessor, with 16 KiB of 16-byte loads in flight, which is what 3 TB/s shared by 132 of
    them need to hide 700 ns. For aligned rows and what a loss asks for.

    128: 512 threads. For what arithmetic or narrow loads hold up: a softcap, statistics that no loss reads, rows that
    are not aligned (of which NVIDIA's compiler is told how many it may take); for a vocabulary of one or two warps; and
    for kernels that do not read the vocabulary, where the 16 warps of `entropy_histogram_kernel` could have no more.
    """
    return 64 if variant.simple and variant.parameters()["num_warps"] > 2 else 128


def least_bits(variant: Variant) -> int:
    """Of an access to aligned rows: 16 bytes, or all that a block has for a thread."""
    parameters = variant.parameters()
    threads_of = parameters["num_warps"] * TARGETS[variant.target].warp_size
    return min(128, parameters["BLOCK_V"] // threads_of * min(entry_bits(variant), BITS[variant.dtype]))


def passes(variant: Variant) -> frozenset[str]:
    """What the loops over the vocabulary do: "read" statistics, "rewrite" entries, "fill" those of a dead row."""
    parameters = variant.parameters()
    absent = {"fill"} if parameters.get("HELD") else {"rewrite"} if not parameters.get("WRITE", True) else set()
    return KERNELS[variant.kernel].passes - absent


def kind(loop: Loop) -> str:
    return "fill" if not loop.loads else "rewrite" if loop.stores else "read"


def entry_bits(variant: Variant) -> int:
    """Of the entries that are read: logits, or those of an fp32 tile."""
    return BITS[variant.dtype] if "logits_ptr" in KERNELS[variant.kernel].function.arg_names else 32


def entries(variant: Variant, loop: Loop) -> int:
    """How many a thread reads in an iteration."""
    return sum(bits * count for bits, count in loop.loads.items()) // entry_bits(variant)


def exponentials(variant: Variant, loop: Loop) -> int:
    """One an entry, and with a softcap one for its tanh. In running statistics one more for each of their lanes, of
    which there is one for as many entries of a tile as 16 bytes hold (`rlloss.kernels.online.fold`)."""
    if variant.kernel == "entropy temperature" and kind(loop) == "rewrite":
        return 0
    count = entries(variant, loop)
    lanes = -(-count * entry_bits(variant) // 128) if kind(loop) == "read" else 0
    return count * (1 + bool(variant.setting.get("HAS_SOFTCAP"))) + lanes


def violations(variant: Variant, found: Assembly) -> list[str]:
    """What falls short."""
    wrong = []
    if found.spills or found.local:
        wrong.append(f"spills: {found.spills}, {found.local} bytes of local memory")
    if found.registers > register_bound(variant):
        wrong.append(f"registers: {found.registers}, at most {register_bound(variant)}")
    if not KERNELS[variant.kernel].passes:
        return wrong
    if {kind(loop) for loop in found.loops} != passes(variant):
        wrong.append(f"loops: {sorted(map(kind, found.loops))}, expected {sorted(passes(variant))}")
    for loop in found.loops:
        least = least_bits(variant)
        if variant.setting["layout"] == "aligned" and min([*loop.loads, *loop.stores]) < least:
            wrong.append(f"narrow: loads {loop.loads}, stores {loop.stores} in bits, expected {least} or more")
        if loop.exponentials != exponentials(variant, loop):
            of = f"of {entries(variant, loop)} entries, expected {exponentials(variant, loop)}"
            wrong.append(f"exponentials: {loop.exponentials} {of}")
    if found.nan_max == 0:  # the floor of the exponents; the interpreter's maximum always lets NaN through
        wrong.append("NaN: no maximum that lets it through")
    return wrong


def rows(variants: Iterable[Variant]) -> Iterator[dict[str, Any]]:
    """A row of the report for each variant, compiled anew and not from a cache."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for target, of in itertools.groupby(sorted(variants, key=lambda v: v.target), key=lambda v: v.target):
            made: list[tuple[Variant, Any]] = []
            for variant in of:
                try:
                    made.append((variant, compile_variants.compile_variant(variant)))
                except Exception as error:  # whatever the compiler raises is a finding
                    yield row(variant) | {"violations": [f"compiler: {type(error).__name__}: {error}".splitlines()[0]]}
            if TARGETS[target].backend == "cuda":
                read = assembly.read_nvidia([kernel for _, kernel in made], int(TARGETS[target].arch))
            else:
                read = [assembly.read_amd(kernel) for _, kernel in made]
            for (variant, _), found in zip(made, read, strict=True):
                room = threads(target, found.registers, variant.parameters()["num_warps"])
                loops = [
                    loop._asdict() | {"kind": kind(loop), "entries": entries(variant, loop)} for loop in found.loops
                ]
                yield row(variant) | found._asdict() | {
                    "loops": loops, "threads": room, "violations": violations(variant, found),
                }  # fmt: skip


def row(variant: Variant) -> dict[str, Any]:
    name = ", ".join((variant.kernel, variant.target, variant.dtype, variant.flags))
    return {
        "name": name, "kernel": variant.kernel, "function": KERNELS[variant.kernel].function.fn.__name__,
        "target": variant.target, "dtype": variant.dtype, "flags": variant.flags,
        "aligned": variant.setting.get("layout") == "aligned", "softcap": bool(variant.setting.get("HAS_SOFTCAP")),
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """A line for each kernel, target and dtype."""
    columns = (
        "kernel", "target", "dtype", "variants", "registers", "threads", "spilling", "bytes an access, aligned rows",
        "exponentials an entry", "falling short",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for group in sorted({(r["kernel"], r["target"], r["dtype"]) for r in found}, key=order):
        of = [r for r in found if (r["kernel"], r["target"], r["dtype"]) == group]
        read = [r for r in of if "registers" in r]
        cells = [*group, len(of)]
        for name in ("registers", "threads"):
            values = sorted({r[name] for r in read})
            cells.append(" to ".join(map(str, dict.fromkeys(values[:1] + values[-1:]))))
        cells += [sum(r["spills"] > 0 or r["local"] > 0 for r in read), accesses(read), per_entry(read)]
        cells.append(sum(bool(r["violations"]) for r in of))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def order(group: tuple[str, str, str]) -> tuple[int, ...]:
    return tuple(list(of).index(name) for of, name in zip((KERNELS, TARGETS, BITS), group, strict=True))


def accesses(found: list[dict[str, Any]]) -> str:
    """In the loops over aligned rows."""
    aligned = [loop for r in found if r["aligned"] for loop in r["loops"]]
    widths = {of: sorted({bits // 8 for loop in aligned for bits in loop[of]}) for of in ("loads", "stores")}
    return "; ".join(f"{of} {', '.join(map(str, sizes))}" for of, sizes in widths.items() if sizes)


def per_entry(found: list[dict[str, Any]]) -> str:
    """In the loops over the vocabulary, without a softcap."""
    shares: dict[str, set[fractions.Fraction]] = {}
    loops = (loop for r in found if KERNELS[r["kernel"]].passes and not r["softcap"] for loop in r["loops"])
    for loop in (loop for loop in loops if loop["entries"]):
        shares.setdefault(loop["kind"], set()).add(fractions.Fraction(loop["exponentials"], loop["entries"]))
    return "; ".join(f"{of} {', '.join(map(str, sorted(values)))}" for of, values in sorted(shares.items()))


def shortfalls(found: list[dict[str, Any]]) -> list[str]:
    return [f"{r['name']}: {'; '.join(r['violations'])}" for r in found if r["violations"]]


def known(r: dict[str, Any]) -> bool:
    """Rows whose entries are not next to each other, under Triton before 3.7: the compiler gives neighbours, of which
    it knows nothing, to neighbouring threads, which then share a running result, whatever shape they are loaded in."""
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return version < (3, 7) and "strided" in r["flags"]


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1: found set, expected unset; interpreted kernels cannot be compiled")
    parser = argparse.ArgumentParser()
    for option in ("--json", "--check", "--everywhere"):
        parser.add_argument(option, action="store_true")
    parser.add_argument("asked", nargs="*", metavar="TARGET, KERNEL or FLAGS")
    arguments = parser.parse_args()
    asked = set(arguments.asked)
    chosen = compile_variants.variants(everywhere=arguments.everywhere)
    kinds = [dict.fromkeys(getattr(v, name) for v in chosen) for name in ("target", "kernel", "flags")]
    if unknown := asked.difference(*kinds):
        sys.exit(f"found {', '.join(sorted(unknown))}, expected some of {', '.join([*kinds[0], *kinds[1]])}, or flags")
    # Of each kind those that are asked for; all of a kind none of which is.
    targets, names, flags = ([x for x in kind if x in asked] or kind for kind in kinds)
    found = list(rows([v for v in chosen if v.target in targets and v.kernel in names and v.flags in flags]))
    if arguments.json:
        print(json.dumps(found))
    elif not arguments.check:
        print(table(found))
    short = shortfalls(found)
    print(
        f"Triton {triton.__version__}: {len(short)} of {len(found)} variants fall short",
        *short,
        sep="\n",
        file=sys.stderr,
    )
    if arguments.check and any(r["violations"] and not known(r) for r in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
