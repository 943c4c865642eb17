"""Compute addresses of rows and their entries; every vocabulary kernel uses these functions."""

import torch
import triton
import triton.language as tl

from rlloss.kernels.online import LOG2_E


@triton.jit
def row_offset(row, rows_inner, stride_outer, stride_inner):
    """Return the offset of row `row` of a [outer, inner, V] view, in int64."""
    outer = row // rows_inner
    inner = row - outer * rows_inner
    return outer * stride_outer.to(tl.int64) + inner * stride_inner.to(tl.int64)


@triton.jit
def row_at(base_ptr, offset, ALIGNED: tl.constexpr):
    """Return the pointer to the row `offset` entries after base_ptr.

    If aligned, base_ptr and row begin on 16 bytes. The offset's own arithmetic shows that to the compiler. A hint on
    the pointer (`tl.multiple_of`) would be lost for tensors below 2 GB on AMD, where the compiler takes the pointer
    apart into base and 32-bit offset.
    """
    if ALIGNED:
        LANES: tl.constexpr = 128 // base_ptr.dtype.element_ty.primitive_bitwidth
        offset = offset // LANES * LANES
    return base_ptr + offset


@triton.jit
def tile_offsets(R: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the offsets of a tile's entries in its block, in the shape in which they are loaded; see `as_rows`.

    A thread has whole rows of a tile, so statistics over a row do not leave the thread. If aligned, a row is LANES
    adjacent entries, one 16-byte load. Otherwise a row's entries lie R apart, and neighbouring threads load
    neighbouring entries one by one. The compiler assigns entries to threads in that order for the shape [LANES, R].
    """
    if ALIGNED:
        return tl.arange(0, R)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    else:
        return tl.arange(0, LANES)[:, None] * R + tl.arange(0, R)[None, :]


@triton.jit
def as_rows(x, ALIGNED: tl.constexpr):
    """Return x, which has the shape of `tile_offsets`, as [R, LANES]. No data moves."""
    if ALIGNED:
        return x
    else:
        return tl.trans(x)


@triton.jit
def scales(row, temperature, temperature_ptr, softcap, logit_scale):
    """Return the factors of u in nats and in log2 units, (scale / temperature, k). temperature_ptr may be None."""
    if temperature_ptr is not None:
        scale = 1.0 / tl.load(temperature_ptr + row)
    else:
        scale = 1.0 / temperature
    if softcap is None:
        scale = scale * logit_scale
    return scale, scale * LOG2_E


class Rows:
    """A [..., V] tensor as rows. Row r starts at (r // inner) * stride_outer + (r % inner) * stride_inner."""

    def __init__(self, x: torch.Tensor):
        if x.dim() == 1:
            x = x.unsqueeze(0)
        elif x.dim() > 3:
            x = x.flatten(1, -2)  # copies only if more than two leading strides are needed
        self.tensor = x
        if x.dim() == 2:
            outer, (inner, self.V), (self.stride_inner, self.stride_v) = 1, x.shape, x.stride()
            self.stride_outer = inner * self.stride_inner
        else:
            (outer, inner, self.V), (self.stride_outer, self.stride_inner, self.stride_v) = x.shape, x.stride()
        self.N, self.inner = outer * inner, max(inner, 1)

    def aligned(self) -> bool:
        """Return whether every row starts on 16 bytes and is contiguous, so that 16-byte loads and stores are legal.

        Strides are checked for a single row too. Otherwise the layout, and with it the bits, could differ between a row
        alone and the same row among others.
        """
        size = self.tensor.element_size()
        apart = self.stride_outer * size % 16 == 0 and self.stride_inner * size % 16 == 0
        return self.stride_v == 1 and apart and self.tensor.data_ptr() % 16 == 0

    def mask(self, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the mask, or one that selects all rows if it is None."""
        return torch.ones(self.N, dtype=torch.bool, device=self.tensor.device) if mask is None else mask


def per_row(temperature: torch.Tensor | float) -> tuple[torch.Tensor | None, float]:
    """Return (temperature_ptr, temperature) for a kernel, a pointer to one per row, or None and a number for all."""
    return (temperature, 1.0) if isinstance(temperature, torch.Tensor) else (None, float(temperature))
