"""Launch parameters by (kernel, GPU generation, dtype, V). They are looked up, never tuned at run time.

kernel, and what its numbers are:

    statistics      entries of a block, warps: whoever reduces rows (the same for all, and with it the bits of a row)
    gradient        entries of a block, warps: whoever writes gradients of logits
    split           rows a multiprocessor below which the forward gives each chunk of a row a program of its own
    single_launch   percent of the L2 cache that rows in flight may take for forward and gradient in one launch
    tile            rows, entries of a tile of logits from hidden states

An entry holds for vocabularies up to its V, the one with the largest V also beyond. Generations are named as compilers
name them; "" stands for those that have none of their own. `benchmarks/tune.py --write` measures on the GPU at hand and
puts what it finds here; `tuned` then says where and when, and is empty where nothing was measured.

What was not measured is argued from the compiler's report (`benchmarks/compiler/report.py`): no spills, at most 64
registers, and of these shapes the one with most resident warps, as long as one block of each resident program holds
the bytes that the memory's bandwidth times 700 ns of latency asks of a multiprocessor (A100 13 KiB, H100 18, H200 25,
B200 37, RTX 5090 7): 2,048 entries over 8 warps hold 24 to 64 KiB but for two-byte rows on sm_100, where 8 warps hold
24 and 4 warps, at twice the entries a thread, 36. On gfx942, whose warps have 64 threads, 4 of them leave each thread
one 16-byte load of two-byte entries.
"""

import functools
from typing import NamedTuple

import torch

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LARGEST = 262208  # entries, of the vocabularies that were looked at


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
}


@functools.cache
def look_up(kernel: str, generation: str, dtype: str, V: int) -> tuple[int, ...]:
    """The numbers for a vocabulary of V entries. dtype: "bf16", "fp16" or "fp32"."""
    for name in (generation, ""):
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
    """As compilers name it: "sm_90", "gfx942"; "" where it is none of a GPU."""
    return _generation(device.type, device.index)


def choice(kernel: str, device: torch.device, dtype: torch.dtype, V: int) -> tuple[int, ...]:
    """What the table says for this device."""
    return look_up(kernel, generation(device), DTYPE_NAMES[dtype], V)
