"""Compile the kernels for GPUs that need not be present, and check the result: no spills, few registers, 16-byte
accesses to the vocabulary, one exponential per entry.

    python -m benchmarks.compiler.report [--check] [TARGET, KERNEL or CASE ...]

The program prints a table. With --check it prints only the shortfalls, and exits with 1 unless all of them are known
for this version of Triton (`known`). It does not run under TRITON_INTERPRET=1, because kernels imported under it cannot
be compiled. Nothing is timed. To use another Triton: `pip install --no-deps --target FOLDER triton==VERSION`, and
PYTHONPATH=FOLDER.
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
from benchmarks.compiler.launches import BEYOND, TARGETS, Launch, launches

# Tasks of the loops over the vocabulary: "read" for statistics, "rewrite" entries, "fill" the entries of a dead row.
PASSES = {
    "token_stats_forward_kernel": {"read"},
    "token_stats_backward_kernel": {"rewrite", "fill"},
    "gradient_in_forward_kernel": {"read", "rewrite", "fill"},
    "fold_tile_kernel": {"read"},
    "gradient_tile_kernel": {"rewrite"},
    "entropy_temperature_kernel": {"read", "rewrite"},
}


class Row(NamedTuple):
    """One launch: its assembly, and its shortfalls."""

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
    """Bits of an entry behind the first of these pointers that the kernel has."""
    of = next(launch.arguments[name][0] for name in pointers if name in launch.arguments)
    return 32 if of == "*fp32" else 16


def simple(launch: Launch) -> bool:
    """Whether the rows are aligned, and the kernel computes no more than a loss needs."""
    more = launch.constant("softcap") or launch.constant("EXTRA") or launch.constant("extra_ptr")
    return bool(launch.constant("ALIGNED")) and not more


def register_bound(launch: Launch) -> int:
    """Return the largest number of registers per thread.

    64 for `simple` launches: 1024 threads per multiprocessor keep 16 KiB of 16-byte loads in flight. With 132
    multiprocessors this hides a latency of 700 ns at 3 TB/s.

    128, that is 512 threads, for launches limited by arithmetic or narrow loads (a softcap, statistics that no loss
    reads, rows that are not aligned), for a vocabulary of one or two warps, and for kernels that read no vocabulary.
    """
    return 64 if simple(launch) and launch.options["num_warps"] > 2 else 128


def exponentials(launch: Launch, loop: Loop) -> int:
    """Return the expected number of exponentials: one per entry, and with a softcap one more for its tanh. Running
    statistics add one per lane; a lane covers the entries of 16 bytes of a tile (`rlloss.kernels.online.fold`)."""
    if launch.kernel == "entropy_temperature_kernel" and kind(loop) == "rewrite":
        return 0
    width = bits(launch, "logits_ptr", "tile_ptr")
    entries = sum(size * count for size, count in loop.loads.items()) // width
    lanes = -(-entries * width // 128) if kind(loop) == "read" else 0
    return entries * (1 if launch.constant("softcap") is None else 2) + lanes


def least_bits(launch: Launch) -> int:
    """Return the least bits of an access to aligned rows: 16 bytes, or all entries of a thread if they are fewer."""
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
    if found.nan_max == 0:  # exponents have a floor; the interpreter's maximum always propagates NaN
        wrong.append("NaN: no maximum that lets it through")
    return wrong


def rows(target: str, asked: list[str]) -> list[Row]:
    """Compile the launches for a target, or the requested kernels or cases, without Triton's cache."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for launch in launches(target):
            if not asked or any(name in (launch.kernel, launch.case.removesuffix(BEYOND)) for name in asked):
                of = assembly.read(launch.compiled(), nvidia=TARGETS[target].backend == "cuda")
                found.append(Row(launch.kernel, target, launch.case, of, shortfalls(launch, of)))
    return found


def table(found: list[Row]) -> str:
    """Return a table with one line per kernel and target."""
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
    """Whether a shortfall is known: strided rows under Triton before 3.7. That compiler does not know which entries are
    neighbours, and assigns them to neighbouring threads, which then share a running result."""
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
