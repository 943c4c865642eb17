"""How a launch divides its work: blocks, warps and registers from the launch table, and the device."""

import contextlib

import torch
import triton

from rlloss.kernels import launch_table
from rlloss.kernels.launch_table import choice

CHUNK_BLOCKS = 8


def launch_shape(kernel: str, x: torch.Tensor, V: int, block_v: int | None = None) -> tuple[int, int, int, int]:
    """(BLOCK_V, CHUNK_V, chunks, num_warps) of "statistics" or "gradient" over rows like those of x.

    A function of device, dtype and V alone, so that the bits of a row are.
    """
    return shape_of(choice(kernel, x.device, x.dtype, V), V, block_v)


def shape_of(chosen: tuple[int, ...], V: int, block_v: int | None = None) -> tuple[int, int, int, int]:
    """`launch_shape` from an entry of the table; a smaller block, of a small vocabulary, has fewer warps."""
    most, warps = chosen
    block_v = block_v or min(most, max(256, triton.next_power_of_2(V)))
    chunk_v = block_v * CHUNK_BLOCKS
    return block_v, chunk_v, triton.cdiv(V, chunk_v), max(1, min(warps, block_v * warps // most))


def registers(x: torch.Tensor, num_warps: int, *, simple: bool) -> dict[str, int]:
    """Launch options for rows like those of x. simple: aligned rows, and no more computed than a loss asks for.

    Otherwise ptxas, left to itself, takes fewer registers than it needs and spills. It is told how many it may take:
    three programs of 8 warps still fit a multiprocessor, or four of 4, whose threads may have twice the entries.
    """
    nvidia = launch_table.generation(x.device).startswith("sm_")
    return {"maxnreg": 80 if num_warps >= 8 else 128} if nvidia and not simple else {}


def on_16_bytes(x: torch.Tensor) -> torch.Tensor:
    """x, or where it begins elsewhere a copy: for kernels that read tile after tile of it by 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    if x.device.type in ("cuda", "xpu"):
        return getattr(torch, x.device.type).device(x.device)
    return contextlib.nullcontext()
