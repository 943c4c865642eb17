"""The vocabulary kernels in plain torch, a cache-sized tile of rows at a time: what runs where Triton does not.

Same inputs, same outputs and same meaning as `rlloss.kernels.token_stats_forward`; fp64 logits are computed in fp64.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

LOG2_E = 1.0 / math.log(2.0)
TILE_ENTRIES = 1 << 19  # entries of a tile: 2 MiB in fp32
FLOOR = {torch.float32: -200.0, torch.float64: -1100.0}  # below it 2^t is 0: then t 2^t reads 0 * FLOOR, not 0 * -inf
WIDE_ROW = 4096  # from here on, copying scattered rows one by one beats one indexed write


def _tiles(rows: int | Tensor, V: int) -> Iterator[slice | Tensor]:
    """Rows 0..rows-1, or the given ascending row numbers: slices where they are consecutive, index tensors elsewhere.

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


def _matrix(logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """The memory of logits [..., V] as a matrix, and which of its rows they are, in order (None: all of them)."""
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


def _reader(logits: Tensor, dtype: torch.dtype):
    """A function from row numbers to a row-major tile [rows, V], which may be the logits' own memory: read only."""
    matrix, places = _matrix(logits)

    def read(rows: slice | Tensor) -> Tensor:
        if places is not None:
            rows = places[rows]
            if (rows.diff() == 1).all():
                rows = slice(int(rows[0]), int(rows[-1]) + 1)
        tile = matrix[rows] if isinstance(rows, slice) else matrix.index_select(0, rows)
        # The sums of a column-major tile would run in another order and end in other bits.
        return tile.to(dtype) if tile.stride(-1) == 1 else tile.to(dtype).contiguous()

    return read


def _write(matrix: Tensor, rows: slice | Tensor, tile: Tensor) -> None:
    """matrix[rows] = tile."""
    if isinstance(rows, slice):
        matrix[rows] = tile
    elif matrix.shape[-1] < WIDE_ROW:
        matrix[rows] = tile.to(matrix.dtype)
    else:
        for row, values in zip(rows.tolist(), tile, strict=True):
            matrix[row] = values


def _softcapped(tile: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    return tile if softcap is None else torch.tanh(tile * (logit_scale / softcap)).mul_(softcap)


def row_scale(temperature: Tensor | float, softcap: float | None, logit_scale: float) -> Tensor | float:
    """What a row is multiplied by after the softcap, as [N] or a number."""
    return (1.0 if softcap is not None else logit_scale) / temperature


def _exponents(u: Tensor, m: Tensor, scale: Tensor | float, rows: slice | Tensor) -> Tensor:
    """log2 of e^(scale (u - m)), in memory of its own. m [rows], scale [N] or a number."""
    k = scale[rows].unsqueeze(-1) * LOG2_E if isinstance(scale, Tensor) else scale * LOG2_E
    shift = torch.where(m == -math.inf, 0.0, m)
    return (u - shift.unsqueeze(-1)).mul_(k)


def token_stats_forward(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    temperature: Tensor | float,
    softcap: float | None,
    logit_scale: float,
    *,
    entropy: bool = True,
    squares: bool = False,
    mean: bool = False,
    top1: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `rlloss.kernels.token_stats_forward.token_stats_forward`."""
    N, V = target.numel(), logits.shape[-1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    read = _reader(logits, dtype)
    scale = row_scale(temperature, softcap, logit_scale)
    inside = (target >= 0) & (target < V)
    place = torch.where(inside, target, 0).long()
    u_target, m, w, total = (logits.new_zeros(N, dtype=dtype) for _ in range(4))
    s, q = (logits.new_ones(N, dtype=dtype) for _ in range(2))
    first = torch.zeros_like(place)
    for rows in _tiles(N if mask is None else mask.nonzero().squeeze(-1), V):
        u = _softcapped(read(rows), softcap, logit_scale)
        u_target[rows] = u.gather(-1, place[rows].unsqueeze(-1)).squeeze(-1)
        m[rows] = m_tile = u.amax(-1)
        t = _exponents(u, m_tile, scale, rows)
        e = torch.exp2(t)
        s[rows] = e.sum(-1)
        if squares:
            q[rows] = (e * e).sum(-1)
        if entropy:
            # p log p is 0 at p = 0, where it reads 0 * -inf. A NaN of the row's own is in s.
            w[rows] = t.mul_(e).nansum(-1)
        if mean:
            total[rows] = u.mean(-1)
        if top1:
            first[rows] = u.argmax(-1)

    def where_counted(x: Tensor) -> Tensor:
        return x if mask is None else torch.where(mask, x, 0.0)

    log_s = torch.log2(s)
    logp = where_counted(torch.where(inside, (u_target - m) * scale - log_s * math.log(2), math.nan))
    entropy_out = where_counted((log_s - w / s) * math.log(2)) if entropy else torch.zeros_like(logp)
    lse = where_counted(m * scale + log_s * math.log(2))
    extra = logits.new_zeros((3, N if squares or mean or top1 else 0), dtype=dtype)
    if mean:
        extra[0] = where_counted(total * scale)
    if squares:
        extra[1] = where_counted((torch.log2(q) - 2 * log_s) * math.log(2))
    if top1:
        extra[2] = where_counted((inside & (first == place) & (u_target >= m)).to(dtype))
    return logp, entropy_out, lse, torch.stack((m, log_s)), extra


def token_stats_backward(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    temperature: Tensor | float,
    softcap: float | None,
    logit_scale: float,
    saved: Tensor,
    entropy: Tensor,
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    g_lse: Tensor | None,
    *,
    inplace: bool = False,
) -> Tensor:
    """See `rlloss.kernels.token_stats_backward.token_stats_backward`. Dead rows are neither read nor computed."""
    V = logits.shape[-1]
    dtype = saved.dtype
    given = [g for g in (g_logp, g_entropy, g_lse) if g is not None]
    live = torch.stack(given).ne(0).any(0)  # NaN != 0: a broken coefficient is live and shows itself
    if mask is not None:
        live &= mask
    live_rows = live.nonzero().squeeze(-1)
    read = _reader(logits, dtype)
    fresh = torch.zeros if len(live_rows) < len(live) else torch.empty
    grad = logits if inplace else fresh(logits.shape, dtype=logits.dtype, device=logits.device)
    matrix = grad.view(-1, V)

    # With e = 2^t, p = e / s and log p = (t - log2 s) ln 2, a row's gradient is, but for the target's own entry,
    # e (slope t + level): all that is constant along the row is in these two.
    m, log_s = saved
    scale = row_scale(temperature, softcap, logit_scale)
    inside = (target >= 0) & (target < V)
    place = torch.where(inside, target, 0).long()
    level = torch.zeros_like(m) if g_lse is None else g_lse
    if g_logp is not None:
        level = level - g_logp.where(inside, math.nan)
    if g_entropy is not None:
        level = level - g_entropy * (entropy - log_s * math.log(2))
    to_e = scale * torch.exp2(-log_s)
    level = level * to_e
    slope = None if g_entropy is None else g_entropy * to_e * -math.log(2)
    own = None if g_logp is None else g_logp * scale
    for rows in _tiles(live_rows, V):
        u = read(rows)
        bend = None
        if softcap is not None:
            bend = torch.tanh(u * (logit_scale / softcap))
            u = bend * softcap
        t = _exponents(u, m[rows], scale, rows)
        if slope is None:
            out = t.exp2_().mul_(level[rows].unsqueeze(-1))
        else:
            e = torch.exp2(t.clamp_(min=FLOOR[dtype]))
            out = t.mul_(slope[rows].unsqueeze(-1)).add_(level[rows].unsqueeze(-1)).mul_(e)
        if own is not None:
            out.scatter_add_(-1, place[rows].unsqueeze(-1), own[rows].unsqueeze(-1))
        if bend is not None:
            out.mul_((1 - bend * bend).mul_(logit_scale))
        _write(matrix, rows, out)
    if inplace:
        for rows in _tiles((~live).nonzero().squeeze(-1), V):
            matrix[rows] = 0
    return grad
