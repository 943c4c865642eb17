"""This module is `rlloss.kernels.token_stats_forward` in plain torch. It computes fp64 logits in fp64."""

import math

import torch
from torch import Tensor

from rlloss.torch_kernels.rows import add_target, exponents, flat, reader, row_scale, softcapped, tiles


def token_stats_forward(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    transform: tuple[Tensor | float, float | None, float],
    *,
    entropy: bool = True,
    extra: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `rlloss.kernels.token_stats_forward.token_stats_forward`."""
    temperature, softcap, logit_scale = transform
    shape, N, V = target.shape, target.numel(), logits.shape[-1]
    target, mask = flat(target), flat(mask)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    read = reader(logits, dtype)
    scale = row_scale(flat(temperature), softcap, logit_scale)
    inside = (target >= 0) & (target < V)
    place = torch.where(inside, target, 0).long()
    u_target, m, s, w, q, total = (logits.new_zeros(N, dtype=dtype) for _ in range(6))
    first = torch.zeros_like(place)
    for rows in tiles(N if mask is None else mask.nonzero().squeeze(-1), V):
        u = softcapped(read(rows), softcap, logit_scale)
        u_target[rows] = u.gather(-1, place[rows].unsqueeze(-1)).squeeze(-1)
        m[rows] = m_tile = u.amax(-1)
        t = exponents(u, m_tile, scale, rows)
        e = torch.exp2(t).scatter_(-1, place[rows].unsqueeze(-1), 0.0)  # all but the target's; see `add_target`
        s[rows] = e.sum(-1)
        if extra:
            q[rows] = (e * e).sum(-1)
            total[rows] = u.mean(-1)
            first[rows] = u.argmax(-1)
        if entropy:
            # p log p is 0 at p = 0, where the code has 0 * -inf. A NaN of the row itself still shows through s.
            w[rows] = t.mul_(e).nansum(-1)

    def where_counted(x: Tensor) -> Tensor:
        return x if mask is None else torch.where(mask, x, 0.0)

    m, log_s, s, w, q = add_target(m, s, w, q, u_target, scale)
    logp = where_counted(torch.where(inside, (u_target - m) * scale - log_s * math.log(2), math.nan))
    entropy_out = where_counted((log_s - w / s) * math.log(2)) if entropy else torch.zeros_like(logp)
    lse = where_counted(m * scale + log_s * math.log(2))
    more = logits.new_zeros((3, N if extra else 0), dtype=dtype)
    if extra:
        more[0] = where_counted(total * scale)
        more[1] = where_counted((torch.log2(q) - 2 * log_s) * math.log(2))
        more[2] = where_counted((inside & (first == place) & (u_target >= m)).to(dtype))
    logp, entropy_out, lse = logp.view(shape), entropy_out.view(shape), lse.view(shape)
    saved = torch.stack((m, log_s, logp.view(-1))).view(3, *shape)
    return logp, entropy_out, lse, saved, more.view(3, *(shape if extra else (0,)))
