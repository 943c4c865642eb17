"""Find, read and write rows of logits in tiles that fit the cache."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LOG2_E = 1.0 / math.log(2.0)
TILE_ENTRIES = 1 << 19  # entries of a tile: 2 MiB in fp32
FLOOR = {torch.float32: -200.0, torch.float64: -1100.0}  # 2^FLOOR is 0, and t 2^t is then 0 * FLOOR, not 0 * -inf
WIDE_ROW = 4096  # for rows at least this wide, copying scattered rows one by one beats one indexed write


def tiles(rows: int | Tensor, V: int) -> Iterator[slice | Tensor]:
    """Yield rows 0..rows-1, or the given ascending row numbers, as slices if consecutive, else as index tensors.

    A slice is read and written in place, without the copies that an index costs.
    """
    step = max(1, TILE_ENTRIES // V)
    if isinstance(rows, int):
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))
    elif len(rows):
        parts = rows.split(step)
        ends = torch.stack([part[[0, -1]] for part in parts]).tolist()
        for part, (first, last) in zip(parts, ends, strict=True):
            yield slice(first, last + 1) if last - first + 1 == len(part) else part


def as_matrix(logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the memory of logits [..., V] as a matrix, and the matrix rows of the logits in order (None: all)."""
    V = logits.shape[-1]
    try:
        return logits.view(-1, V), None
    except RuntimeError:
        *dims, (_, stride_v) = zip(logits.shape, logits.stride(), strict=True)
        dims = [(n, stride) for n, stride in dims if n > 1]
        pitch = math.gcd(*(stride for _, stride in dims)) or 1
        places = torch.zeros(1, dtype=torch.int64, device=logits.device)
        for n, stride in dims:
            places = (places.unsqueeze(-1) + torch.arange(n, device=logits.device) * (stride // pitch)).flatten()
        rows = 1 + sum((n - 1) * (stride // pitch) for n, stride in dims)
        return logits.as_strided((rows, V), (pitch, stride_v)), places


def reader(logits: Tensor, dtype: torch.dtype):
    """Return a function from row numbers to a row-major tile [rows, V]. Do not write to the tile: it may be a view of
    the logits."""
    matrix, places = as_matrix(logits)

    def read(rows: slice | Tensor) -> Tensor:
        if places is not None:
            rows = places[rows]
            if (rows.diff() == 1).all():
                rows = slice(int(rows[0]), int(rows[-1]) + 1)
        tile = matrix[rows] if isinstance(rows, slice) else matrix.index_select(0, rows)
        # Sums over a column-major tile would run in another order and give other bits.
        return tile.to(dtype) if tile.stride(-1) == 1 else tile.to(dtype).contiguous()

    return read


def write(matrix: Tensor, rows: slice | Tensor, tile: Tensor) -> None:
    """Set matrix[rows] = tile."""
    if isinstance(rows, slice):
        matrix[rows] = tile
    elif matrix.shape[-1] < WIDE_ROW:
        matrix[rows] = tile.to(matrix.dtype)
    else:
        for row, values in zip(rows.tolist(), tile, strict=True):
            matrix[row] = values


def add_target(
    m: Tensor, s: Tensor, w: Tensor, q: Tensor, u: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `rlloss.kernels.online.add_target`."""
    m_row = torch.maximum(m, u)
    shift = torch.where(m_row == -math.inf, 0.0, m_row)
    d, t = (((x - shift) * (scale * LOG2_E)).clamp(min=FLOOR[m.dtype]) for x in (m, u))
    f, e = torch.exp2(d), torch.exp2(t)
    others = s * f
    log_s = torch.log1p(others + (e - 1)) * LOG2_E
    return m_row, log_s, others + e, (w + s * d) * f + e * t, q * f * f + e * e


def of_target(
    coefs: tuple[Tensor | None, Tensor | None, Tensor | None], logp: Tensor, entropy: Tensor | None
) -> Tensor:
    """Return d loss / d u of the targets. g_logp (1 - p), with 1 - p from logp, keeps its digits as p goes to 1."""
    g_logp, g_entropy, g_lse = coefs
    level = torch.zeros_like(logp) if g_lse is None else g_lse
    if g_entropy is not None:
        assert entropy is not None
        level = level - g_entropy * (entropy + logp.clamp(min=FLOOR[logp.dtype]))
    own = torch.exp(logp) * level
    return own if g_logp is None else own - g_logp * torch.expm1(logp)


def softcapped(tile: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    return tile if softcap is None else torch.tanh(tile * (logit_scale / softcap)).mul_(softcap)


def flat(x: Any) -> Any:
    """Return a tensor of rows [...] as [N]; something else, such as one temperature for all or None, as it is."""
    return x.reshape(-1) if isinstance(x, Tensor) else x


def row_scale(temperature: Tensor | float, softcap: float | None, logit_scale: float) -> Tensor | float:
    """Return the factor of a row after the softcap, as [N] or a number."""
    return (1.0 if softcap is not None else logit_scale) / temperature


def exponents(u: Tensor, m: Tensor, scale: Tensor | float, rows: slice | Tensor) -> Tensor:
    """Return log2 of e^(scale (u - m)) as a new tensor. m is [rows], scale [N] or a number."""
    k = scale[rows].unsqueeze(-1) * LOG2_E if isinstance(scale, Tensor) else scale * LOG2_E
    shift = torch.where(m == -math.inf, 0.0, m)
    return (u - shift.unsqueeze(-1)).mul_(k)
