"""This module is `rlloss.kernels.logits_tile` in plain torch, for machines without Triton.

Inputs and outputs are the same. Every step is one pass over a tile that lies in the cache.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rlloss.torch_kernels.rows import FLOOR, LOG2_E, of_target, row_scale

PART_ENTRIES = 1 << 17  # entries of a part, per thread


def _shift(m: Tensor) -> Tensor:
    """Return m, or a finite number where m is -inf because the row has no entry above -inf."""
    return m.clamp(min=torch.finfo(m.dtype).min)


def _scale_(t: Tensor, scale: Tensor | float, rows: slice) -> None:
    """Multiply t by scale in place, unless scale is 1."""
    if isinstance(scale, Tensor):
        t.mul_(scale[rows].unsqueeze(-1))
    elif scale != 1.0:
        t.mul_(scale)


def _parts(tile: Tensor) -> Iterator[slice]:
    """Yield a few rows of a tile at a time, so that intermediate results stay in the cores' own caches."""
    rows, C = tile.shape
    step = max(1, PART_ENTRIES * torch.get_num_threads() // C) if tile.is_cpu else rows
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def fold_tile(
    tile: Tensor,
    start: int,
    target: Tensor,
    state: Tensor,
    transform: tuple[Tensor | float, float | None, float],
    *,
    entropy: bool,
    extra: bool,
    overwrite: bool,
) -> None:
    """See `rlloss.kernels.logits_tile.fold_tile`. `overwrite` allows the function to overwrite the tile."""
    _, softcap, logit_scale = transform
    u = tile
    if softcap is not None:
        u = tile.mul_(logit_scale / softcap) if overwrite else tile * (logit_scale / softcap)
        u = u.tanh_().mul_(softcap)
        overwrite = True
    m, s, w, q, total, before, u_target = state
    C = tile.shape[1]
    local = target - start
    place = local.clamp(0, C - 1)
    own = u.gather(-1, place.unsqueeze(-1).long()).squeeze(-1)
    u_target.copy_(torch.where(place == local, own, u_target))
    if extra:
        total += u.sum(-1)
        columns = torch.arange(C, device=tile.device)
        earlier = torch.where(columns < local.unsqueeze(-1), u, -math.inf).amax(-1)
        before.copy_(torch.maximum(before, earlier))
    # m, s, w and q leave the target out: -inf takes its place, for as long as the tile is read.
    place = place.unsqueeze(-1).long()
    u.scatter_(-1, place, torch.where(local.unsqueeze(-1) == place, -math.inf, own.unsqueeze(-1)))

    scale = row_scale(*transform)
    m_new = torch.maximum(m, u.amax(-1))
    shift = _shift(m_new)
    d_old = (m - shift).mul_(scale * LOG2_E).clamp_(min=FLOOR[tile.dtype])
    rescale = torch.exp2(d_old)
    sum_e, sum_et, sum_ee = u.new_empty((3, len(u)))
    column = shift.unsqueeze(-1)
    for r in _parts(u):
        t = u[r].sub_(column[r]) if overwrite else u[r] - column[r]
        _scale_(t, scale, r)
        e = torch.exp(t)
        torch.sum(e, -1, out=sum_e[r])
        if entropy:
            # p log p is 0 at p = 0, where the code has 0 * -inf. A NaN of the row itself still shows through s.
            torch.nansum(t.mul_(e), -1, out=sum_et[r])
        if extra:
            torch.sum(e.mul_(e), -1, out=sum_ee[r])
    if entropy:
        w.addcmul_(s, d_old).mul_(rescale).add_(sum_et, alpha=LOG2_E)
    s.mul_(rescale).add_(sum_e)
    if extra:
        q.mul_(rescale * rescale).add_(sum_ee)
    m.copy_(m_new)
    if not overwrite:
        u.scatter_(-1, place, own.unsqueeze(-1))


def gradient_tile(
    tile: Tensor,
    start: int,
    target: Tensor,
    transform: tuple[Tensor | float, float | None, float],
    stats: tuple[Tensor, Tensor, Tensor, Tensor | None],
    coefs: tuple[Tensor | None, Tensor | None, Tensor | None],
    dtype: torch.dtype,
) -> Tensor:
    """See `rlloss.kernels.logits_tile.gradient_tile`."""
    (_, softcap, logit_scale), (m, log_s, logp, entropy), (g_logp, g_entropy, g_lse) = transform, stats, coefs
    scale = row_scale(*transform)
    bend = None
    u = tile
    if softcap is not None:
        bend = torch.tanh(tile * (logit_scale / softcap))
        u = tile.copy_(bend).mul_(softcap)
    # With e = exp t, p = e / s and log p = t - log s, the gradient is e (slope t + level), except at the target's
    # entry. slope and level are constant along the row.
    t = u.sub_(_shift(m).unsqueeze(-1))
    _scale_(t, scale, slice(None))
    level = torch.zeros_like(m) if g_lse is None else g_lse
    if g_logp is not None:
        level = level - g_logp
    to_e = torch.exp2(-log_s) * scale
    if g_entropy is None:
        out = t.exp_().mul_((level * to_e).unsqueeze(-1))
    else:
        assert entropy is not None
        level = level - g_entropy * (entropy - log_s * math.log(2))
        slope = -g_entropy * to_e
        e = torch.exp(t.clamp_(min=FLOOR[tile.dtype]))
        out = t.mul_(slope.unsqueeze(-1)).add_((level * to_e).unsqueeze(-1)).mul_(e)
    if g_logp is not None:
        local = target - start
        inside = (local >= 0) & (local < tile.shape[1])
        place = torch.where(inside, local, 0).unsqueeze(-1).long()
        own = (of_target(coefs, logp, entropy) * scale).unsqueeze(-1)
        out.scatter_(-1, place, torch.where(inside.unsqueeze(-1), own, out.gather(-1, place)))
    if bend is not None:
        out.mul_((1 - bend * bend).mul_(logit_scale))
    return out.to(dtype)
