"""Compile the kernels for GPUs that need not be present, and hold what the compiler made of them against what they are
meant to be: no spills, few registers, 16-byte accesses to the vocabulary, one exponential an entry.

    python -m benchmarks.compiler.report [--check] [TARGET, KERNEL or CASE ...]

It prints a table; --check: only what falls short, and
exit 1 unless it is known of this version of Triton (`known`). Not under TRITON_INTERPRET=1: kernels imported under it
cannot be compiled. What a GPU would do with them is not measured here. For another Triton:
`pip install --no-deps --target FOLDER triton==VERSION`, and PYTHONPATH=FOLDER.
"""

import argparse
import concurrent.futures
import os
import sys
import tempfile
from typing import NamedTuple

import triton

from benchmarks.compiler import assembly
from benchmarks.compiler.assembly import Assembly, Loop
from benchmarks.compiler.launches import TARGETS, Launch, launches

# What the loops over the vocabulary do: "read" statistics, "rewrite" entries, "fill" those of a dead row.
PASSES = {
    "token_stats_forward_kernel": {"read"},
    "token_stats_backward_kernel": {"rewrite", "fill"},
    "gradient_in_forward_kernel": {"read", "rewrite", "fill"},
    "fold_tile_kernel": {"read"},
    "gradient_tile_kernel": {"rewrite"},
    "entropy_temperature_kernel": {"read", "rewrite"},
}


class Row(NamedTuple):
    """Of one launch: what was found, and what falls short."""

    kernel: str
    target: str
    case: str
    found: Assembly
    short: list[str]

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.target}, {self.case}"


def passes(launch: Launch) -> set[str]:
    held, only_read = launch.constant("factor_ptr") == "given", launch.constant("WRITE") is False
    return PASSES[launch.kernel] - ({"fill"} if held else set()) - ({"rewrite"} if only_read else set())


def kind(loop: Loop) -> str:
    return "fill" if not loop.loads else "rewrite" if loop.stores else "read"


def bits(launch: Launch, *pointers: str) -> int:
    """Of an entry behind the first of the pointers that the kernel has."""
    of = next(launch.arguments[name][0] for name in pointers if name in launch.arguments)
    return 32 if of == "*fp32" else 16


def simple(launch: Launch) -> bool:
    """Aligned rows, and no more computed than a loss asks for."""
    more = launch.constant("softcap") or launch.constant("EXTRA") or launch.constant("extra_ptr")
    return bool(launch.constant("ALIGNED")) and not more


def register_bound(launch: Launch) -> int:
    """64: 1024 threads a multiprocessor, with 16 KiB of 16-byte loads in flight, which is what 3 TB/s shared by 132 of
    them need to hide 700 ns. For aligned rows and what a loss asks for.

    128: 512 threads. For what arithmetic or narrow loads hold up: a softcap, statistics that no loss reads, rows that
    are not aligned; for a vocabulary of one or two warps; and for kernels that do not read the vocabulary.
    """
    return 64 if simple(launch) and launch.options["num_warps"] > 2 else 128


def exponentials(launch: Launch, loop: Loop) -> int:
    """One an entry, and with a softcap one for its tanh. In running statistics one more for each of their lanes, of
    which there is one for as many entries of a tile as 16 bytes hold (`rlloss.kernels.online.fold`)."""
    if launch.kernel == "entropy_temperature_kernel" and kind(loop) == "rewrite":
        return 0
    width = bits(launch, "logits_ptr", "tile_ptr")
    entries = sum(size * count for size, count in loop.loads.items()) // width
    lanes = -(-entries * width // 128) if kind(loop) == "read" else 0
    return entries * (1 if launch.constant("softcap") is None else 2) + lanes


def least_bits(launch: Launch) -> int:
    """Of an access to aligned rows: 16 bytes, or all that a block has for a thread."""
    threads = launch.options["num_warps"] * TARGETS[launch.target].warp_size
    entry = min(bits(launch, "logits_ptr", "tile_ptr"), bits(launch, "grad_ptr", "out_ptr", "logits_ptr", "tile_ptr"))
    return min(128, launch.constant("BLOCK_V") // threads * entry)


def shortfalls(launch: Launch, found: Assembly) -> list[str]:
    wrong = []
    if found.spills or found.local:
        wrong.append(f"spills: {found.spills}, {found.local} bytes of local memory")
    if found.registers > register_bound(launch):
        wrong.append(f"registers: {found.registers}, at most {register_bound(launch)}")
    if launch.kernel not in PASSES:
        return wrong
    if {kind(loop) for loop in found.loops} != passes(launch):
        wrong.append(f"loops: {sorted(map(kind, found.loops))}, expected {sorted(passes(launch))}")
    for loop in found.loops:
        least, count = least_bits(launch), exponentials(launch, loop)
        if launch.constant("ALIGNED") and min([*loop.loads, *loop.stores]) < least:
            wrong.append(f"narrow: loads {loop.loads}, stores {loop.stores} in bits, expected {least} or more")
        if loop.exponentials != count:
            wrong.append(f"exponentials: {loop.exponentials} in a {kind(loop)} loop, expected {count}")
    if found.nan_max == 0:  # the floor of the exponents; the interpreter's maximum always lets NaN through
        wrong.append("NaN: no maximum that lets it through")
    return wrong


def rows(target: str, asked: list[str]) -> list[Row]:
    """Of the launches for a target, or of those whose kernel or case is asked for; compiled anew, not from a cache."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for launch in launches(target):
            if not asked or any(name in (launch.kernel, launch.case) for name in asked):
                of = assembly.read(launch.compiled(), nvidia=TARGETS[target].backend == "cuda")
                found.append(Row(launch.kernel, target, launch.case, of, shortfalls(launch, of)))
    return found


def table(found: list[Row]) -> str:
    """A line for each kernel and target."""
    lines = [
        "| kernel | target | compiled | registers | bits of an access | spilling | falling short |",
        "|---" * 7 + "|",
    ]
    for kernel, target in dict.fromkeys((r.kernel, r.target) for r in found):
        of = [r for r in found if (r.kernel, r.target) == (kernel, target)]
        registers = [r.found.registers for r in of]
        widths = sorted({bits for r in of for loop in r.found.loops for bits in (*loop.loads, *loop.stores)})
        spilling, short = sum(bool(r.found.spills) for r in of), sum(bool(r.short) for r in of)
        cells = (kernel, target, len(of), f"{min(registers)} to {max(registers)}", widths, spilling, short)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def known(row: Row) -> bool:
    """Rows whose entries are not next to each other, under Triton before 3.7: the compiler gives neighbours, of which
    it knows nothing, to neighbouring threads, which then share a running result, whatever shape they are loaded in."""
    return tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and "strided" in row.case


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1: found set, expected unset; interpreted kernels cannot be compiled")
    parser = argparse.ArgumentParser(description="What the compiler makes of the kernels.")
    parser.add_argument("--check", action="store_true", help="only what falls short, and exit 1")
    parser.add_argument("asked", nargs="*", metavar="TARGET, KERNEL or CASE", help="all of what is not said")
    options = parser.parse_args()
    targets = [name for name in TARGETS if name in options.asked] or list(TARGETS)
    asked = [name for name in options.asked if name not in TARGETS]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        found = [row for of in pool.map(rows, targets, [asked] * len(targets)) for row in of]
    if not found:
        sys.exit(f"{', '.join(asked)}: found no such kernel or case")
    if not options.check:
        print(table(found))
    short = [f"{row.name}: {'; '.join(row.short)}" for row in found if row.short]
    print(f"Triton {triton.__version__}: {len(short)} of {len(found)} fall short", *short, sep="\n", file=sys.stderr)
    sys.exit(options.check and any(row.short and not known(row) for row in found))


if __name__ == "__main__":
    main()
