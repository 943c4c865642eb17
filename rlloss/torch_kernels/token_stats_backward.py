"""This module is `rlloss.kernels.token_stats_backward` in plain torch."""

import math

import torch
from torch import Tensor

from rlloss.torch_kernels.rows import FLOOR, exponents, flat, of_target, reader, row_scale, tiles, write


def token_stats_backward(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    transform: tuple[Tensor | float, float | None, float],
    stats: tuple[Tensor, Tensor],
    coefs: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    inplace: bool = False,
) -> Tensor:
    """See `rlloss.kernels.token_stats_backward.token_stats_backward`. Dead rows are neither read nor computed."""
    (temperature, softcap, logit_scale), (saved, entropy) = transform, stats
    target, entropy, mask = flat(target), flat(entropy), flat(mask)
    g_logp, g_entropy, g_lse = (flat(g) for g in coefs)
    V = logits.shape[-1]
    dtype = saved.dtype
    given = [g for g in (g_logp, g_entropy, g_lse) if g is not None]
    live = torch.stack(given).ne(0).any(0)  # NaN != 0, so a broken coefficient is live and shows itself
    if mask is not None:
        live &= mask
    live_rows = live.nonzero().squeeze(-1)
    read = reader(logits, dtype)
    fresh = torch.zeros if len(live_rows) < len(live) else torch.empty
    grad = logits if inplace else fresh(logits.shape, dtype=logits.dtype, device=logits.device)
    matrix = grad.view(-1, V)

    # With e = 2^t, p = e / s and log p = (t - log2 s) ln 2, the gradient is e (slope t + level), except at the target's
    # entry. slope and level are constant along the row.
    m, log_s, logp = saved.view(3, -1)
    scale = row_scale(flat(temperature), softcap, logit_scale)
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
    own = None if g_logp is None else of_target((g_logp, g_entropy, g_lse), logp, entropy) * scale
    for rows in tiles(live_rows, V):
        u = read(rows)
        bend = None
        if softcap is not None:
            bend = torch.tanh(u * (logit_scale / softcap))
            u = bend * softcap
        t = exponents(u, m[rows], scale, rows)
        if slope is None:
            out = t.exp2_().mul_(level[rows].unsqueeze(-1))
        else:
            e = torch.exp2(t.clamp_(min=FLOOR[dtype]))
            out = t.mul_(slope[rows].unsqueeze(-1)).add_(level[rows].unsqueeze(-1)).mul_(e)
        if own is not None:
            out.scatter_(-1, place[rows].unsqueeze(-1), own[rows].unsqueeze(-1))
        if bend is not None:
            out.mul_((1 - bend * bend).mul_(logit_scale))
        write(matrix, rows, out)
    if inplace:
        for rows in tiles((~live).nonzero().squeeze(-1), V):
            matrix[rows] = 0
    return grad
