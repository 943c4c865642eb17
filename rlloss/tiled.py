"""The vocabulary kernels in plain torch, a cache-sized tile of rows at a time: what runs where Triton does not.

Same inputs, same outputs and same meaning as `rlloss.kernels.token_stats`; fp64 logits are computed in fp64.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

LOG2_E = 1.0 / math.log(2.0)
TILE_ENTRIES = 1 << 19  # entries of a tile: 2 MiB in fp32


def _tiles(rows: int | Tensor, V: int) -> Iterator[slice | Tensor]:
    """Rows 0..rows-1 as slices, or the given row numbers as index tensors."""
    step = max(1, TILE_ENTRIES // V)
    if isinstance(rows, int):
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))
    else:
        yield from rows.split(step)


def _reader(logits: Tensor, dtype: torch.dtype):
    """A function from row numbers to a private [rows, V] tile; logits that are no matrix are gathered by tile."""
    V = logits.shape[-1]
    try:
        matrix = logits.view(-1, V)
        return lambda rows: matrix[rows].to(dtype).contiguous()
    except RuntimeError:
        index = torch.arange(logits[..., 0].numel(), device=logits.device).view(logits.shape[:-1])
        places = torch.stack([i.reshape(-1) for i in torch.meshgrid(
            *(torch.arange(n, device=logits.device) for n in index.shape), indexing="ij")])  # fmt: skip
        return lambda rows: logits[tuple(places[:, rows])].to(dtype).contiguous()


def _softcapped(tile: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    return tile if softcap is None else torch.tanh(tile * (logit_scale / softcap)).mul_(softcap)


def _scale(temperature: Tensor | float, rows: slice | Tensor, softcap: float | None, logit_scale: float):
    """What a tile is multiplied by after the softcap, as [rows, 1] or a number."""
    scale = 1.0 if softcap is not None else logit_scale
    if isinstance(temperature, Tensor):
        return (scale / temperature[rows]).unsqueeze(-1)
    return scale / temperature


def _exponents(u: Tensor, m: Tensor, k: Tensor | float) -> Tensor:
    """k (u - m), floored where 2^x is 0: p * log p then reads 0 * floor and not 0 * -inf. NaN stays NaN."""
    floor = -1100.0 if u.dtype == torch.float64 else -200.0
    shift = torch.where(m == -math.inf, 0.0, m)
    return (u - shift.unsqueeze(-1)).mul_(k).clamp_(min=floor)


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
    """See `rlloss.kernels.token_stats.token_stats_forward`."""
    N, V = target.numel(), logits.shape[-1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp, entropy_out, lse = (logits.new_zeros(N, dtype=dtype) for _ in range(3))
    saved = logits.new_zeros((2, N), dtype=dtype)
    extra = logits.new_zeros((3, N if squares or mean or top1 else 0), dtype=dtype)
    read = _reader(logits, dtype)
    for rows in _tiles(N if mask is None else mask.nonzero().squeeze(-1), V):
        u = _softcapped(read(rows), softcap, logit_scale)
        scale = _scale(temperature, rows, softcap, logit_scale)
        flat_scale = scale.squeeze(-1) if isinstance(scale, Tensor) else scale
        inside = (target[rows] >= 0) & (target[rows] < V)
        place = torch.where(inside, target[rows], 0).unsqueeze(-1)
        u_target = u.gather(-1, place).squeeze(-1)
        m = u.amax(-1)
        t = _exponents(u, m, scale * LOG2_E)
        e = torch.exp2(t)
        s = e.sum(-1)
        log_s = torch.log2(s)
        logp[rows] = torch.where(inside, (u_target - m) * flat_scale - log_s * math.log(2), math.nan)
        lse[rows] = m * flat_scale + log_s * math.log(2)
        saved[0, rows], saved[1, rows] = m, log_s
        if squares:
            extra[1, rows] = (torch.log2((e * e).sum(-1)) - 2 * log_s) * math.log(2)
        if entropy:
            entropy_out[rows] = (log_s - t.mul_(e).sum(-1) / s) * math.log(2)
        if mean:
            extra[0, rows] = u.mean(-1) * flat_scale
        if top1:
            extra[2, rows] = (inside & (u.argmax(-1) == place.squeeze(-1)) & (u_target >= m)).to(dtype)
    return logp, entropy_out, lse, saved, extra


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
    read = _reader(logits, dtype)
    grad = logits if inplace else torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    matrix = grad.view(-1, V)
    for rows in _tiles(live.nonzero().squeeze(-1), V):
        tile = read(rows)
        u = _softcapped(tile, softcap, logit_scale)
        scale = _scale(temperature, rows, softcap, logit_scale)
        m, log_s = saved[0, rows], saved[1, rows]
        inside = (target[rows] >= 0) & (target[rows] < V)
        t = (_exponents(u, m, scale * LOG2_E)).sub_(log_s.unsqueeze(-1))
        common = torch.zeros_like(m) if g_lse is None else g_lse[rows]
        if g_logp is not None:
            common = common - g_logp[rows].where(inside, math.nan)
        if g_entropy is not None:
            common = common - g_entropy[rows] * entropy[rows]
        out = torch.exp2(t)
        if g_entropy is not None:
            out.mul_(t.mul_(g_entropy[rows].unsqueeze(-1) * -math.log(2)).add_(common.unsqueeze(-1)))
        else:
            out.mul_(common.unsqueeze(-1))
        if g_logp is not None:
            out.scatter_add_(-1, torch.where(inside, target[rows], 0).unsqueeze(-1), g_logp[rows].unsqueeze(-1))
        out.mul_(scale)
        if softcap is not None:
            slope = u.div_(softcap)
            out.mul_((1 - slope * slope).mul_(logit_scale))
        matrix[rows] = out.to(grad.dtype)
    if inplace:
        for rows in _tiles((~live).nonzero().squeeze(-1), V):
            matrix[rows] = 0
    return grad
