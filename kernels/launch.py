"""Choose blocks, warps, registers and the device of a kernel launch, from the launch table."""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from rlloss.kernels import launch_table
from rlloss.kernels.launch_table import choice

CHUNK_BLOCKS = 8
_HERE = contextlib.nullcontext()
WIDE = {"logits_ptr", "grad_ptr", "tile_ptr", "out_ptr"}  # read or written 16 bytes at a time


def jit(*, do_not_specialize: Sequence[str]) -> Callable[[Callable[..., Any]], triton.JITFunction]:
    """Decorate a kernel like `triton.jit`, and let it have one variant wherever its pointers besides WIDE begin.

    Triton would compile a variant for each set of pointers that begin on 16 bytes. A slice of a batch begins anywhere,
    so new variants would be compiled in the middle of a run, on every rank. These pointers gain nothing from it: their
    entries are read one by one, or from the start of a sequence of any length.
    """

    def of(kernel: Callable[..., Any]) -> triton.JITFunction:
        pointers = [x for x in inspect.signature(kernel).parameters if x.endswith("_ptr") and x not in WIDE]
        return triton.jit(do_not_specialize=do_not_specialize, do_not_specialize_on_alignment=pointers)(kernel)

    return of


def launch_shape(kernel: str, x: torch.Tensor, V: int, block_v: int | None = None) -> tuple[int, int, int, int]:
    """Return (BLOCK_V, CHUNK_V, chunks, num_warps) of "statistics" or "gradient" for rows like those of x.

    The result depends on device, dtype and V alone, so the bits of a row do too.
    """
    return shape_of(choice(kernel, x.device, x.dtype, V), V, block_v)


def shape_of(chosen: tuple[int, ...], V: int, block_v: int | None = None) -> tuple[int, int, int, int]:
    """Return `launch_shape` from an entry of the table. The smaller block of a small vocabulary has fewer warps."""
    most, warps = chosen
    block_v = block_v or min(most, max(256, triton.next_power_of_2(V)))
    chunk_v = block_v * CHUNK_BLOCKS
    return block_v, chunk_v, triton.cdiv(V, chunk_v), max(1, min(warps, block_v * warps // most))


def registers(x: torch.Tensor, num_warps: int, *, simple: bool, most: int | None = None) -> dict[str, int]:
    """Return launch options for rows like those of x. simple: rows are aligned, and only a loss's needs are computed.

    If not simple, ptxas by default takes too few registers and spills. The limit given here lets three programs of 8
    warps fit a multiprocessor, or four of 4 warps, whose threads may have twice the entries. If simple, the limit is
    `most`, for a kernel in which ptxas takes more than it needs.
    """
    nvidia = launch_table.generation(x.device).startswith("sm_")
    limit = most if simple else 80 if num_warps >= 8 else 128
    return {"maxnreg": limit} if nvidia and limit else {}


def on_16_bytes(x: torch.Tensor) -> torch.Tensor:
    """Return x, or a copy if x does not start on 16 bytes, for kernels that read it in 16-byte loads."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return a context that makes the device of x current. Triton launches on the current device."""
    device = x.device
    if device.type == "cpu" or device.type == "cuda" and device.index == torch.cuda.current_device():
        return _HERE
    return getattr(torch, device.type).device(device) if device.type in ("cuda", "xpu") else _HERE
