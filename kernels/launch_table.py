"""This table holds the launch parameters of the kernels by (kernel, GPU generation, dtype, V).

They are looked up, never tuned at run time. The numbers per kernel are::

    statistics      entries of a block, warps, for all kernels that reduce rows (so logp has the same bits in all)
    gradient        entries of a block, warps, for all kernels that write gradients of logits
    split           rows per multiprocessor below which the forward gives each chunk of a row its own program
    single_launch   percent of the L2 cache that rows in flight may take for forward and gradient in one launch
    tile            rows, entries of a tile of logits from hidden states

An entry holds for vocabularies up to its V; the one with the largest V also holds beyond. Generations have the names
that compilers use. "" stands for generations without an entry of their own or of their family.
`benchmarks/tune.py --write` measures on the present GPU and writes its results here. `tuned` then says where and when,
and is empty for entries that were not measured.

Entries that were not measured follow from the compiler's report (`benchmarks/compiler/report.py`). They have no spills,
at most 64 registers, and the most resident warps under one condition: one block of each resident program must together
hold the bytes that the memory bandwidth times 700 ns of latency requires per multiprocessor (A100 13 KiB, H100 18, H200
25, B200 37, RTX 5090 7). 2,048 entries over 8 warps hold 24 to 64 KiB. For two-byte rows on sm_100, 8 warps hold only
24 KiB, and 4 warps with twice the entries per thread hold 36. Warps of gfx942 have 64 threads, so 4 warps give each
thread one 16-byte load of two-byte entries.
"""

import functools
from typing import NamedTuple

import torch

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Generations without an entry take those of their family: warps are as wide, and loads as wide.
FAMILIES = {"sm_10": "sm_100", "sm_11": "sm_100", "gfx9": "gfx942"}
LARGEST = 262208  # entries of the largest vocabulary that was examined


class Choice(NamedTuple):
    value: tuple[int, ...]
    tuned: str = ""


TABLE: dict[tuple[str, str, str, int], Choice] = {
    ("gradient", "", "bf16", LARGEST): Choice((2048, 8)),
    ("gradient", "", "fp16", LARGEST): Choice((2048, 8)),
    ("gradient", "", "fp32", LARGEST): Choice((2048, 8)),
    ("gradient", "gfx942", "bf16", LARGEST): Choice((2048, 4)),
    ("gradient", "gfx942", "fp16", LARGEST): Choice((2048, 4)),
    ("gradient", "sm_90", "bf16", 151936): Choice((2048, 8), "NVIDIA H200, triton 3.6.0, 2026-11-26"),
    ("single_launch", "", "bf16", LARGEST): Choice((100,)),
    ("single_launch", "", "fp16", LARGEST): Choice((100,)),
    ("single_launch", "", "fp32", LARGEST): Choice((100,)),
    ("split", "", "bf16", LARGEST): Choice((2,)),
    ("split", "", "fp16", LARGEST): Choice((2,)),
    ("split", "", "fp32", LARGEST): Choice((2,)),
    ("split", "sm_90", "bf16", 151936): Choice((4,), "NVIDIA H200, triton 3.6.0, 2026-11-26"),
    ("statistics", "", "bf16", LARGEST): Choice((2048, 8)),
    ("statistics", "", "fp16", LARGEST): Choice((2048, 8)),
    ("statistics", "", "fp32", LARGEST): Choice((2048, 8)),
    ("statistics", "gfx942", "bf16", LARGEST): Choice((2048, 4)),
    ("statistics", "gfx942", "fp16", LARGEST): Choice((2048, 4)),
    ("statistics", "sm_100", "bf16", LARGEST): Choice((2048, 4)),
    ("statistics", "sm_100", "fp16", LARGEST): Choice((2048, 4)),
    ("statistics", "sm_90", "bf16", 151936): Choice((2048, 4), "NVIDIA H200, triton 3.6.0, 2026-11-26"),
    ("tile", "", "fp32", LARGEST): Choice((4096, 67108864)),
    ("tile", "sm_90", "fp32", 151936): Choice((4096, 134217728), "NVIDIA H200, triton 3.6.0, 2026-11-27"),
}


@functools.cache
def look_up(kernel: str, generation: str, dtype: str, V: int) -> tuple[int, ...]:
    """Return the numbers for a vocabulary of V entries. dtype is "bf16", "fp16" or "fp32"."""
    family = next((of for start, of in FAMILIES.items() if generation.startswith(start)), "")
    for name in (generation, family, ""):
        sizes = sorted(key[3] for key in TABLE if key[:3] == (kernel, name, dtype))
        if sizes:
            size = next((size for size in sizes if V <= size), sizes[-1])
            return TABLE[kernel, name, dtype, size].value
    raise KeyError(f"{kernel}, {dtype}: found no entry, expected one for every generation")


@functools.cache
def _generation(kind: str, index: int | None) -> str:
    if kind != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    if torch.version.hip is not None:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def generation(device: torch.device) -> str:
    """Return the compilers' name of a device, such as "sm_90" or "gfx942"; "" if it is no GPU."""
    return _generation(device.type, device.index)


def choice(kernel: str, device: torch.device, dtype: torch.dtype, V: int) -> tuple[int, ...]:
    """Return the numbers of the table for this device."""
    return look_up(kernel, generation(device), DTYPE_NAMES[dtype], V)
