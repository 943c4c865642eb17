"""Where a row lies and how its work is divided: the addressing that every vocabulary kernel shares."""

import torch
import triton
import triton.language as tl

from rlloss.kernels.online import LOG2_E


@triton.jit
def row_offset(row, rows_inner, stride_outer, stride_inner):
    """Offset of row `row` of a [outer, inner, V] view, in int64."""
    outer = row // rows_inner
    inner = row - outer * rows_inner
    return outer * stride_outer.to(tl.int64) + inner * stride_inner.to(tl.int64)


@triton.jit
def tile_offsets(R: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the entries of a tile lie in its block, in the shape in which they are loaded; see `as_rows`.

    Statistics run over the rows of a tile without leaving a thread, which has whole rows of it. Aligned: LANES entries
    next to each other, one 16-byte load. Otherwise a row's entries lie R apart, and neighbouring threads load
    neighbouring entries one by one; the compiler gives them to threads in that order in the shape [LANES, R].
    """
    if ALIGNED:
        return tl.arange(0, R)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    else:
        return tl.arange(0, LANES)[:, None] * R + tl.arange(0, R)[None, :]


@triton.jit
def as_rows(x, ALIGNED: tl.constexpr):
    """What has the shape of `tile_offsets`, as [R, LANES]. Nothing moves."""
    if ALIGNED:
        return x
    else:
        return tl.trans(x)


@triton.jit
def scales(row, temperature, temperature_ptr, softcap, logit_scale):
    """(1 / temperature, k): what u is multiplied by, in nats and in log2 units. temperature_ptr: None, or one a row."""
    if temperature_ptr is not None:
        scale = 1.0 / tl.load(temperature_ptr + row)
    else:
        scale = 1.0 / temperature
    if softcap is None:
        scale = scale * logit_scale
    return scale, scale * LOG2_E


class Rows:
    """A [..., V] tensor as rows: row r starts at (r // inner) * stride_outer + (r % inner) * stride_inner."""

    def __init__(self, x: torch.Tensor):
        if x.dim() < 3:
            x = x.unsqueeze(0) if x.dim() == 2 else x.view(1, 1, -1)
        else:
            x = x.flatten(1, -2)  # a copy only where more than two leading strides are needed
        self.tensor = x
        self.N, self.V = x.shape[0] * x.shape[1], x.shape[2]
        self.inner = max(x.shape[1], 1)
        self.stride_outer, self.stride_inner, self.stride_v = x.stride()

    def aligned(self) -> bool:
        """Whether every row starts on 16 bytes and is contiguous, so that 16-byte loads and stores are legal.

        The strides of single rows count too: the layout, and with it the bits, would otherwise differ between a row
        alone and the same row among others.
        """
        bytes_apart = [stride * self.tensor.element_size() for stride in self.tensor.stride()[:2]]
        return self.stride_v == 1 and self.tensor.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in bytes_apart)

    def mask(self, mask: torch.Tensor | None) -> torch.Tensor:
        """The rows that count; None: all."""
        return torch.ones(self.N, dtype=torch.bool, device=self.tensor.device) if mask is None else mask


def per_row(temperature: torch.Tensor | float) -> tuple[torch.Tensor | None, float]:
    """(temperature_ptr, temperature) as kernels take them: one a row, or None and a number for all."""
    return (temperature, 1.0) if isinstance(temperature, torch.Tensor) else (None, float(temperature))
