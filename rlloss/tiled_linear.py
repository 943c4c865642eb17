"""Tiles of logits in plain torch: what `rlloss.kernels.linear_token_stats` does, where Triton does not run.

Same inputs, same outputs and same meaning. Every step is one pass over a tile that lies in the cache.
"""

import math

import torch
from torch import Tensor

from rlloss.tiled import FLOOR, LOG2_E, row_scale


def _per_row(x: Tensor | float) -> Tensor | float:
    return x.unsqueeze(-1) if isinstance(x, Tensor) else x


def _shift(m: Tensor) -> Tensor:
    return torch.where(m == -math.inf, 0.0, m)


def fold_tile(
    tile: Tensor,
    start: int,
    target: Tensor,
    state: Tensor,
    temperature: Tensor | float,
    softcap: float | None,
    logit_scale: float,
    *,
    entropy: bool,
    squares: bool,
    mean: bool,
    top1: bool,
    overwrite: bool,
) -> None:
    """See `rlloss.kernels.linear_token_stats.fold_tile`. `overwrite`: the tile's values are not needed any more."""
    u = tile
    if softcap is not None:
        u = tile.mul_(logit_scale / softcap) if overwrite else tile * (logit_scale / softcap)
        u = u.tanh_().mul_(softcap)
        overwrite = True
    m, s, w, q, total, before, u_target = state
    C = tile.shape[1]
    local = target - start
    inside = (local >= 0) & (local < C)
    own = u.gather(-1, torch.where(inside, local, 0).unsqueeze(-1).long()).squeeze(-1)
    u_target.copy_(torch.where(inside, own, u_target))
    if mean:
        total += u.sum(-1)
    if top1:
        columns = torch.arange(C, device=tile.device)
        earlier = torch.where(columns < local.unsqueeze(-1), u, -math.inf).amax(-1)
        before.copy_(torch.maximum(before, earlier))

    k = row_scale(temperature, softcap, logit_scale) * LOG2_E
    m_new = torch.maximum(m, u.amax(-1))
    shift = _shift(m_new)
    d_old = ((m - shift) * k).clamp(min=FLOOR[tile.dtype])
    rescale = torch.exp2(d_old)
    t = u.sub_(shift.unsqueeze(-1)) if overwrite else u - shift.unsqueeze(-1)
    t.mul_(_per_row(k))
    e = torch.exp2(t)
    if entropy:
        weighted = torch.linalg.vecdot(e, t)
        # An entry of -inf reads 0 * -inf here and has to read 0.
        if not tile.is_cpu or bool(weighted.isnan().any()):
            weighted = torch.linalg.vecdot(e, t.clamp_(min=FLOOR[tile.dtype]))
        w.copy_((w + s * d_old) * rescale + weighted)
    s.mul_(rescale).add_(e.sum(-1))
    if squares:
        q.mul_(rescale * rescale).add_(torch.linalg.vecdot(e, e))
    m.copy_(m_new)


def gradient_tile(
    tile: Tensor,
    start: int,
    target: Tensor,
    m: Tensor,
    log_s: Tensor,
    entropy: Tensor | None,
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    g_lse: Tensor | None,
    temperature: Tensor | float,
    softcap: float | None,
    logit_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """See `rlloss.kernels.linear_token_stats.gradient_tile`."""
    scale = row_scale(temperature, softcap, logit_scale)
    bend = None
    u = tile
    if softcap is not None:
        bend = torch.tanh(tile * (logit_scale / softcap))
        u = tile.copy_(bend).mul_(softcap)
    # With e = 2^t, p = e / s and log p = (t - log2 s) ln 2, a row's gradient is, but for the target's own entry,
    # e (slope t + level): all that is constant along the row is in these two.
    t = u.sub_(_shift(m).unsqueeze(-1)).mul_(_per_row(scale * LOG2_E))
    level = torch.zeros_like(m) if g_lse is None else g_lse
    if g_logp is not None:
        level = level - g_logp
    to_e = torch.exp2(-log_s) * scale
    if g_entropy is None:
        out = t.exp2_().mul_((level * to_e).unsqueeze(-1))
    else:
        assert entropy is not None
        level = level - g_entropy * (entropy - log_s * math.log(2))
        slope = g_entropy * to_e * -math.log(2)
        e = torch.exp2(t.clamp_(min=FLOOR[tile.dtype]))
        out = t.mul_(slope.unsqueeze(-1)).add_((level * to_e).unsqueeze(-1)).mul_(e)
    if g_logp is not None:
        local = target - start
        inside = (local >= 0) & (local < tile.shape[1])
        own = torch.where(inside, g_logp * scale, 0.0)
        out.scatter_add_(-1, torch.where(inside, local, 0).unsqueeze(-1).long(), own.unsqueeze(-1))
    if bend is not None:
        out.mul_((1 - bend * bend).mul_(logit_scale))
    return out.to(dtype)
