"""Read the assembly of a compiled kernel: registers, spills, and the loads, stores and exponentials of its loops.

The tools in the triton wheel disassemble NVIDIA's machine code. AMD's assembly is text.
"""

import collections
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
# address, predicate, opcode, operands; some tools append notes on the scheduling, far to the right
SASS = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(?:@(\S+)\s+)?([A-Z][\w.]*)\s*([^;]*?)(?:\s*;|\s{2,})")
AMD_WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}


class Instruction(NamedTuple):
    """next: addresses, or line numbers, of possible successors. access: ("load" or "store", bits) in global memory."""

    opcode: str
    next: tuple[int, ...]
    access: tuple[str, int] | None


Code = dict[int, Instruction]


class Loop(NamedTuple):
    """An innermost loop. loads, stores: bits of an access -> number per thread. exponentials: number per thread."""

    loads: dict[int, int]
    stores: dict[int, int]
    exponentials: int


class Assembly(NamedTuple):
    """spills: instructions or registers. local: bytes of local memory per thread. loops: those that use global memory.

    nan_max: number of maximum instructions that propagate NaN. None: the target has no such instruction (AMD).
    """

    registers: int
    spills: int
    local: int
    loops: list[Loop]
    nan_max: int | None


def innermost_loops(code: Code) -> list[set[int]]:
    """Return the loops that contain no other loop, as sets of the addresses of their instructions."""
    before = collections.defaultdict(list)
    for at, instruction in code.items():
        for to in instruction.next:
            before[to].append(at)

    def reach(start: int, edges: Callable[[int], Sequence[int]], seen: set[int]) -> set[int]:
        todo = [start]
        while todo:
            at = todo.pop()
            if at not in seen:
                seen.add(at)
                todo += edges(at)
        return seen

    entry, bodies = min(code), set()
    for at, instruction in code.items():
        for head in (to for to in instruction.next if to <= at):
            # All ways to a loop pass its head: a jump back from a detour, or to shared code, is not a separate loop.
            if head == entry or at not in reach(entry, lambda n: code[n].next, {head}):
                bodies.add(frozenset(reach(at, before.__getitem__, {head})))
    return [set(body) for body in bodies if not any(other < body for other in bodies)]


def loops(code: Code, exponential: str) -> list[Loop]:
    found = []
    for addresses in sorted(innermost_loops(code), key=min):
        body = [code[at] for at in addresses]
        accesses = collections.Counter(i.access for i in body if i.access)
        loads, stores = ({bits: n for (kind, bits), n in accesses.items() if kind == k} for k in ("load", "store"))
        found.append(Loop(loads, stores, sum(i.opcode.startswith(exponential) for i in body)))
    return [loop for loop in found if loop.loads or loop.stores]


def sass_access(opcode: str) -> tuple[str, int] | None:
    name, *modifiers = opcode.split(".")
    if name not in ("LDG", "LD", "LDGSTS", "STG", "ST"):
        return None
    widths = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return "store" if name.startswith("ST") else "load", next((widths[m] for m in modifiers if m in widths), 32)


def parse_sass(text: str) -> Code:
    """Parse the listing of cuobjdump."""
    lines = [(int(m[1], 16), m[2], m[3], m[4]) for m in map(SASS.match, text.splitlines()) if m]
    following = {a[0]: (b[0],) for a, b in zip(lines, lines[1:], strict=False)}
    code = {}
    for at, predicate, opcode, operands in lines:
        name, after = opcode.partition(".")[0], following.get(at, ())
        if name in ("BRA", "CALL"):  # a call is a jump too far for a branch; both ways are followed
            target = re.search(r"\b0x([0-9a-f]+)$", operands)
            if target is None:
                raise ValueError(f"{opcode} {operands}: found no address, expected one")
            always = name == "BRA" and predicate is None and operands == target[0]
            after = (int(target[1], 16), *(() if always else after))
        elif name in ("EXIT", "RET", "KILL") and predicate is None:
            after = ()
        elif name in ("BRX", "JMP", "JMX"):
            raise ValueError(f"{opcode} {operands}: found a jump that is not followed here")
        code[at] = Instruction(opcode, after, sass_access(opcode))
    return code


def amdgcn_access(opcode: str) -> tuple[str, int] | None:
    found = re.match(r"(?:global|buffer|flat)_(load|store)_(?!lds)[us]?(dword(?:x\d)?|short|byte)", opcode)
    return (found[1], AMD_WIDTHS[found[2]]) if found else None


def parse_amdgcn(text: str) -> Code:
    """Parse the assembly of one kernel."""
    lines = text.partition("\n.Lfunc_end")[0].splitlines()
    labels = {line.partition(":")[0]: at for at, line in enumerate(lines) if line.startswith(".LBB")}
    code = {}
    for at, line in enumerate(lines):
        opcode, _, operands = line.partition(";")[0].strip().partition(" ")
        after = (at + 1,) if at + 1 < len(lines) and opcode != "s_endpgm" else ()
        if opcode.startswith(("s_branch", "s_cbranch")):
            after = (labels[operands.strip()], *(() if opcode == "s_branch" else after))
        code[at] = Instruction(opcode, after, amdgcn_access(opcode))
    return code


def read(kernel: Any, nvidia: bool) -> Assembly:
    """Read the kernel that `triton.compile` returned."""
    return _read_nvidia(kernel) if nvidia else _read_amd(kernel.asm["amdgcn"])


def _read_nvidia(kernel: Any) -> Assembly:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        command = [os.path.join(TOOLS, "cuobjdump"), "-sass", "-res-usage", f.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if not found:
        raise ValueError(f"cuobjdump -res-usage: found {text[-200:]!r}, expected REG, STACK and LOCAL")
    registers, stack, local = map(int, found.groups())
    code = parse_sass(text)
    spills = sum(i.opcode.partition(".")[0] in ("LDL", "STL") for i in code.values())
    nan_max = kernel.asm["ptx"].count("max.NaN")
    return Assembly(registers, spills, stack + local, loops(code, "MUFU.EX2"), nan_max)


def _read_amd(text: str) -> Assembly:
    def stated(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)$", text, re.MULTILINE)
        if not found:
            raise ValueError(f"amdgcn: found no .{name}")
        return int(found[1])

    # Scalar registers spill to lanes of vector registers, not to memory.
    spills, local = stated("vgpr_spill_count"), stated("private_segment_fixed_size")
    return Assembly(stated("vgpr_count"), spills, local, loops(parse_amdgcn(text), "v_exp_f32"), None)
