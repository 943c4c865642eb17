"""Compute d logp / d hidden of each row along the forward, so that the backward of a frozen head runs no product.

With c_v the derivative of the transformed logit u_v with respect to the raw one, W the weight and t the target::

    d logp / d hidden = c_t (1 - p_t) W_t - sum over v != t of c_v p_v W_v

It does not depend on the loss. The backward multiplies each row by its coefficient.
"""

import torch
from torch import Tensor

from rlloss import backends
from rlloss.lm_head.head import Head
from rlloss.lm_head.matmul import multiply
from rlloss.lm_head.row_subset import Hold
from rlloss.logits.transform import Transform
from rlloss.torch_kernels.rows import LOG2_E, row_scale

_PART = 4096  # rows to which the target's row of the weight is added at a time


class JacobianSum:
    """The sum over v != t of c_v p_v W_v of the rows in `hold`, added up along the blocks of the vocabulary.

    The terms are relative to the running maximum of these entries, so the sum is scaled whenever it grows. The target's
    own term is left out: as p_t goes to 1 it would cancel against W_t.
    """

    def __init__(self, hold: Hold, hidden: Tensor, head: Head, target: Tensor, transform: Transform):
        n, D = hidden.shape
        self._hold, self._head, self._target, self._transform = hold, head, target, transform
        self._operand_dtype = hidden.dtype
        self._sum = torch.empty((hold.count(n), D), dtype=head.sum_dtype, device=hidden.device)

    def add(self, chunk: int, r: slice, tile: Tensor, w: Tensor, start: int, m: tuple[Tensor, Tensor]) -> None:
        """Add the terms of a tile.

        Args:
            chunk, r: number of the chunk of rows, and its rows.
            tile: `[R, C]` raw logits, which are overwritten. w: `[C, D]`, their block of the weight, an operand.
            start: first vocabulary entry of the block on this rank.
            m: the running maximum `[R]` of all but the target, before and after this block.
        """
        own, inside = self._hold.of_chunk(chunk, r)
        before, now = m
        target, transform = self._target[r], self._transform.of(r)
        if inside is not None:
            tile, before, now, target = (x.index_select(0, inside) for x in (tile, before, now, target))
            transform = transform.of(inside)
        # A finite number where every entry so far is -inf.
        now = now.clamp(min=torch.finfo(now.dtype).min)
        nothing = torch.zeros_like(now)
        # With a coefficient of -1 and a logp of 0, the gradient is c_v exp(u_v - m), and 0 for the target.
        terms = backends.of(tile).gradient_tile(
            tile, self._head.offset + start, target, transform, (now, nothing, nothing, None),
            (nothing - 1, None, None), self._operand_dtype,
        )  # fmt: skip
        total = self._sum[own]
        if start > 0:
            total.mul_(torch.exp2((before - now) * row_scale(*transform) * LOG2_E).unsqueeze(-1))
        multiply(total, terms, w, "hidden_grad", add=start > 0, dtype=self._head.compute_dtype)

    def finished(self, of_rank: Tensor, m: Tensor, log_s: Tensor, logp: Tensor, u_target: Tensor) -> Tensor:
        """Return d logp / d hidden `[rows, D]` of the held rows, from statistics `[N]` of all rows.

        of_rank is the maximum over this rank's entries but the target, m and log2 s are those of the whole row.
        """
        head, target, (_, softcap, logit_scale) = self._head, self._target, self._transform
        scale = row_scale(*self._transform)
        c_target = torch.full_like(m, 1.0) * scale
        if softcap is not None:
            c_target = c_target * logit_scale * (1 - (u_target / softcap).square())
        factor = -torch.exp2((of_rank - m) * scale * LOG2_E - log_s)
        own = c_target * -torch.expm1(logp)
        place = target.long() - head.offset
        here = (place >= 0) & (place < len(head.weight))
        if self._hold.rows is not None:
            factor, own, place, here = (self._hold.rows.take(x) for x in (factor, own, place, here))
        if head.shard is not None:
            own = own.where(here | own.isnan(), 0.0)
        place = place.where(here, 0)
        for start in range(0, len(own), _PART):
            r = slice(start, start + _PART)
            w = head.weight.index_select(0, place[r]).to(head.compute_dtype).to(self._sum.dtype)
            self._sum[r].mul_(factor[r].unsqueeze(-1)).addcmul_(own[r].unsqueeze(-1), w)
        if head.shard is not None:
            head.shard.sum(self._sum)
        return self._sum
