"""What the assembly of a compiled kernel says: registers, spills, and what its innermost loops load, store and compute.

NVIDIA's machine code is read by the tools in the triton wheel, AMD's assembly is text. nvdisasm takes most of its time
to start, so that the code sections of many kernels are put one after the other and disassembled at once.
"""

import bisect
import collections
import functools
import itertools
import os
import re
import struct
import subprocess
import tempfile
from typing import Any, NamedTuple

import triton

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


class Instruction(NamedTuple):
    """opcode, whether it is predicated, and where it may go next: addresses, or line numbers."""

    opcode: str
    predicated: bool
    next: tuple[int, ...]


Code = dict[int, Instruction]


class Loop(NamedTuple):
    """Of an innermost loop: bits of an access -> how many a thread makes, and exponentials of a thread."""

    loads: dict[int, int]
    stores: dict[int, int]
    exponentials: int


class Assembly(NamedTuple):
    """spills: instructions or registers. local: bytes of a thread's memory. loops: those that touch global memory.

    tail: the loads outside of all loops that depend on a predicate. nan_max: instructions that are a maximum and let
    NaN through; None where they are none of their own (AMD).
    """

    registers: int
    spills: int
    local: int
    loops: list[Loop]
    tail: dict[int, int]
    nan_max: int | None


def innermost_loops(code: Code) -> list[list[Instruction]]:
    """The loops that contain no other loop."""
    before = collections.defaultdict(list)
    for at, instruction in code.items():
        for to in instruction.next:
            before[to].append(at)

    def reach(start: int, edges: Any, seen: set[int]) -> set[int]:
        todo = [start]
        while todo:
            at = todo.pop()
            if at not in seen:
                seen.add(at)
                todo += edges(at)
        return seen

    bodies = set()
    for at, instruction in code.items():
        for head in (to for to in instruction.next if to <= at):
            # What comes back to the head, and what the head leads to: a jump back from a detour is no loop of its own.
            body = reach(at, before.__getitem__, {head}) & reach(head, lambda n: code[n].next, set())
            if at in body:
                bodies.add(frozenset(body))
    inner = [body for body in bodies if not any(other < body for other in bodies)]
    return [[code[at] for at in sorted(body)] for body in sorted(inner, key=min)]


def _accesses(instructions: list[Instruction], bits: Any) -> tuple[dict[int, int], dict[int, int]]:
    found = {"load": collections.Counter(), "store": collections.Counter()}
    for instruction in instructions:
        if access := bits(instruction.opcode):
            found[access[0]][access[1]] += 1
    return dict(found["load"]), dict(found["store"])


def _loops(code: Code, bits: Any, exponential: str) -> tuple[list[Loop], dict[int, int]]:
    """(loops with global memory, predicated loads elsewhere)."""
    bodies = innermost_loops(code)
    found = [Loop(*_accesses(body, bits), sum(i.opcode.startswith(exponential) for i in body)) for body in bodies]
    inside = {id(i) for body in bodies for i in body}
    tail, _ = _accesses([i for i in code.values() if i.predicated and id(i) not in inside], bits)
    return [loop for loop in found if loop.loads or loop.stores], tail


def _code_section(cubin: bytes) -> bytes:
    """The machine code of an ELF file with one kernel."""
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    name_at = sections[names][4]
    found = [s for s in sections if cubin.startswith(b".text.", name_at + s[0])]
    if len(found) != 1:
        raise ValueError(f"cubin: found {len(found)} code sections, expected 1")
    return cubin[found[0][4] : found[0][4] + found[0][5]]


# address, predicate, opcode, operands; behind these some tools have notes on the scheduling, far to the right.
_SASS = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(?:@(\S+)\s+)?([A-Z][\w.]*)\s*([^;]*?)(?:\s*;|\s{2,})")


def parse_sass(text: str) -> Code:
    """The listing of nvdisasm or cuobjdump."""
    lines = [(int(m[1], 16), m[2], m[3], m[4]) for m in map(_SASS.match, text.splitlines()) if m]
    following = {a[0]: (b[0],) for a, b in zip(lines, lines[1:], strict=False)}
    joins = {operands for _, _, opcode, operands in lines if opcode.startswith("BSSY")}
    code = {}
    for at, predicate, opcode, operands in lines:
        name, after = opcode.partition(".")[0], following.get(at, ())
        target = re.search(r"\b0x([0-9a-f]+)$", operands)
        if name in ("BRA", "CALL"):
            if target is None:
                raise ValueError(f"{opcode} {operands}: found no address, expected one")
            # Calls are jumps that are too far for a branch as well: both ways are followed.
            always = name == "BRA" and predicate is None and operands == target[0]
            after = (int(target[1], 16), *(() if always else after))
        elif name in ("EXIT", "RET", "KILL"):
            after = after if predicate else ()
        elif name == "BSYNC" and not any(f"{operands}, 0x{n:x}" in joins for n in after):
            raise ValueError(f"{opcode} {operands} at {at:#x}: found a jump, expected the next instruction")
        elif name in ("BRX", "JMP", "JMX"):
            raise ValueError(f"{opcode} {operands}: found a jump that is not followed here")
        code[at] = Instruction(opcode, predicate is not None, after)
    return code


@functools.cache
def sass_access(opcode: str) -> tuple[str, int] | None:
    """("load" or "store", bits) of an access to global memory."""
    name, *modifiers = opcode.split(".")
    if name not in ("LDG", "LD", "LDGSTS", "STG", "ST"):
        return None
    widths = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return "store" if name.startswith("ST") else "load", next((widths[m] for m in modifiers if m in widths), 32)


def disassemble(cubins: list[bytes], arch: int) -> list[Code]:
    """The code of kernels of one architecture, disassembled at once: the addresses go on from one to the next."""
    sections = [_code_section(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as f:
        f.write(b"".join(sections))
        f.flush()
        code = parse_sass(run_tool("nvdisasm", "--binary", f"SM{arch}{'a' if arch >= 90 else ''}", f.name))
    ends = [0, *itertools.accumulate(map(len, sections))]
    found: list[Code] = [{} for _ in sections]
    for at, instruction in code.items():
        i = bisect.bisect_right(ends, at) - 1
        inside = tuple(to for to in instruction.next if ends[i] <= to < ends[i + 1])  # behind the last nothing follows
        found[i][at] = instruction._replace(next=inside)
    return found


def run_tool(tool: str, *arguments: str) -> str:
    return subprocess.run([os.path.join(TOOLS, tool), *arguments], capture_output=True, text=True, check=True).stdout


def read_nvidia(compiled: list[Any], arch: int) -> list[Assembly]:
    """What `triton.compile` returned for kernels of one architecture."""
    return [
        _read_nvidia(kernel, code)
        for kernel, code in zip(compiled, disassemble([k.asm["cubin"] for k in compiled], arch), strict=True)
    ]


def _read_nvidia(kernel: Any, code: Code) -> Assembly:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = run_tool("cuobjdump", "-res-usage", f.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if not found:
        raise ValueError(f"cuobjdump -res-usage: found {usage!r}, expected REG, STACK and LOCAL")
    registers, stack, local = map(int, found.groups())
    spills = sum(i.opcode.partition(".")[0] in ("LDL", "STL") for i in code.values())
    loops, tail = _loops(code, sass_access, "MUFU.EX2")
    return Assembly(registers, spills, stack + local, loops, tail, kernel.asm["ptx"].count("max.NaN"))


_AMD_WIDTHS = {
    "dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "sshort": 16, "short": 16, "ubyte": 8,
    "sbyte": 8, "byte": 8,
}  # fmt: skip


@functools.cache
def amdgcn_access(opcode: str) -> tuple[str, int] | None:
    """("load" or "store", bits) of an access to global memory."""
    found = re.match(r"(?:global|buffer|flat)_(load|store)_(?!lds)([a-z]+\d?)", opcode)
    return (found[1], _AMD_WIDTHS[found[2]]) if found else None


def parse_amdgcn(text: str) -> Code:
    """The assembly of one kernel; line numbers stand for addresses."""
    lines = text.partition("\n.Lfunc_end")[0].splitlines()
    labels = {line.partition(":")[0]: at for at, line in enumerate(lines) if re.match(r"\.LBB\w+:", line)}
    code: Code = {}
    for at, line in enumerate(lines):
        opcode, _, operands = line.partition(";")[0].strip().partition(" ")
        after: tuple[int, ...] = (at + 1,)
        if opcode.startswith(("s_branch", "s_cbranch")):
            after = (labels[operands.strip()], *(() if opcode == "s_branch" else after))
        elif opcode in ("s_setpc_b64", "s_swappc_b64"):
            raise ValueError(f"{line.strip()}: found a jump that is not followed here")
        elif opcode == "s_endpgm":
            after = ()
        code[at] = Instruction(opcode, False, after)
    return code


def read_amd(kernel: Any) -> Assembly:
    """What `triton.compile` returned."""
    text = kernel.asm["amdgcn"]

    def stated(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)$", text, re.MULTILINE)
        if not found:
            raise ValueError(f"amdgcn: found no .{name}")
        return int(found[1])

    loops, tail = _loops(parse_amdgcn(text), amdgcn_access, "v_exp_f32")
    spills = stated("vgpr_spill_count") + stated("sgpr_spill_count")
    return Assembly(stated("vgpr_count"), spills, stated("private_segment_fixed_size"), loops, tail, None)
