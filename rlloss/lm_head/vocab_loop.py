"""Compute statistics of logits and gradients from hidden states, one block of the vocabulary at a time.

Libraries (cuBLAS, MKL, oneDNN) run the products in the dtype of the inputs, with sums and logits in fp32. No CPU
product takes bf16 and returns fp32, so a CPU widens one block of the weight at a time (see `matmul.multiply`). Only
logits that are to be kept take memory that grows with N * V. The loss enters as one coefficient per row.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss import backends
from rlloss.lm_head.head import Head
from rlloss.lm_head.jacobian import JacobianSum
from rlloss.lm_head.matmul import multiply
from rlloss.lm_head.row_subset import Hold, Picked
from rlloss.logits.transform import Transform
from rlloss.torch_kernels.rows import LOG2_E, add_target, row_scale

STATE = 7  # m, s, w, q of all but the target, sum of u, largest u before the target, u of the target
CPU_ROWS, CPU_WIDTH = 1024, 2048
INVARIANT_ROWS = {"cpu": 128}
GPU_INVARIANT_ROWS = 512


class Wanted(NamedTuple):
    entropy: bool = True
    extra: bool = False


class Stats(NamedTuple):
    """Statistics of [N] rows. saved [3, N] is (m, log2 s, logp); extra [3, N] is (mean logit, log sum p^2, is_top1), or
    [3, 0]. logits holds raw logits that `forward` kept, by blocks of the vocabulary, or None."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    saved: Tensor
    extra: Tensor
    logits: list[Tensor | None] | None = None


class Coefs(NamedTuple):
    """d loss / d (logp, entropy, lse) of [N] rows; None means 0."""

    logp: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None

    def of(self, rows: slice | Tensor) -> "Coefs":
        return Coefs(*(None if g is None else g[rows].contiguous() for g in self))

    def live(self) -> Tensor:
        """Return the rows with a gradient. NaN is not 0, so a broken coefficient is live and shows itself."""
        return torch.stack([g for g in self if g is not None]).ne(0).any(0)


class Gradients(NamedTuple):
    """Gradients of hidden [L, D] in the dtype of the sums, of weight and bias in theirs; None if not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Sums(NamedTuple):
    """Gradients of weight and bias in the dtype of the sums, to which `backward` adds. If empty, it writes them."""

    weight: Tensor | None
    bias: Tensor | None
    empty: bool

    @staticmethod
    def fresh(head: Head, needed: tuple[bool, bool, bool]) -> "Sums":
        bias = head.weight.new_empty(len(head.weight), dtype=head.sum_dtype) if needed[2] else None
        return Sums(fresh_gradient(head.weight, head.sum_dtype) if needed[1] else None, bias, True)


class Kept(NamedTuple):
    """Raw logits of some rows (None: all), as one tensor [len(rows), width] per block of the vocabulary."""

    blocks: list[Tensor | None]
    rows: Picked | None


def chunk_rows(device: torch.device, V: int, batch_invariant: bool) -> int:
    """Return the largest number of rows of a tile."""
    if batch_invariant:
        return INVARIANT_ROWS.get(device.type, GPU_INVARIANT_ROWS)
    return CPU_ROWS if device.type == "cpu" else backends.choice("tile", device, torch.float32, V)[0]


def tile_shape(rows: int, V: int, device: torch.device, batch_invariant: bool) -> tuple[int, int]:
    """Return (rows, vocabulary entries) of a tile. All plans use the same, as the bits of a logit may depend on it."""
    most = chunk_rows(device, V, batch_invariant)
    rows = most if batch_invariant else max(1, min(rows, most))
    if device.type == "cpu":
        return rows, min(CPU_WIDTH, V)
    _, entries = backends.choice("tile", device, torch.float32, V)
    return rows, min(max(1024, entries // rows // 256 * 256), V)


def blocks(V: int, width: int) -> Iterator[tuple[int, int]]:
    for start in range(0, V, width):
        yield start, min(start + width, V)


def _folder(x: Tensor):
    return backends.of(x)


def fresh_gradient(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return contiguous memory for the gradient of the weight."""
    # A CPU product reads the fresh pages that it writes: two page faults per page, or one if they are filled before.
    make = torch.zeros if weight.is_cpu and dtype.itemsize >= 4 else torch.empty
    return make(weight.shape, dtype=dtype, device=weight.device)


def _chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _logits(head: Head, hidden: Tensor, w: Tensor, start: int, out: Tensor, kind: str) -> Tensor:
    """Write the raw logits of entries start .. start + C - 1 to out [R, C]."""
    multiply(out, hidden, w.t(), kind, dtype=head.compute_dtype)
    if head.bias is not None:
        out.add_(head.bias[start : start + out.shape[1]].to(out.dtype))
    return out


def forward(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    transform: Transform,
    wanted: Wanted,
    hold: Hold | None = None,
    tile_of: tuple[int, int] | None = None,
) -> tuple[Stats, Kept | Tensor | None]:
    """Return statistics, and what to `hold` of its rows, from hidden [N, D] (an operand) and target [N].

    target and a per-row temperature are contiguous. Held logits are `Kept`, a held Jacobian is d logp / d hidden of
    those rows. tile_of is the shape of the tile if these rows are part of more rows; None: `tile_shape` of these rows.
    """
    n, V = len(hidden), len(head.weight)
    rows, width = tile_shape(n, V, hidden.device, head.batch_invariant) if tile_of is None else tile_of
    dtype = head.sum_dtype
    state, folder = torch.zeros((STATE, n), dtype=dtype, device=hidden.device), _folder(hidden)
    state[0].fill_(-math.inf)
    state[5].fill_(-math.inf)
    kept: list[Tensor | None] = []
    buffer = None
    keep = hold if hold is not None and hold.what == "logits" else None
    jacobian = None if hold is None or keep is not None else JacobianSum(hold, hidden, head, target, transform)
    for start, stop in blocks(V, width) if n else ():
        w = head.operand(head.weight[start:stop])
        whole = some = None
        if keep is not None:
            held = torch.empty((keep.count(n), stop - start), dtype=dtype, device=hidden.device)
            whole, some = (held, None) if keep.rows is None else (None, held)
        for chunk, r in enumerate(_chunks(n, rows)):
            R = r.stop - r.start
            if whole is not None and not head.batch_invariant:
                tile = whole[r]
            else:
                if buffer is None:
                    buffer = torch.empty(rows * width, dtype=dtype, device=hidden.device)
                tile = buffer[: (rows if head.batch_invariant else R) * (stop - start)].view(-1, stop - start)
            operand = hidden[r]
            if head.batch_invariant and R < rows:
                operand = torch.cat([operand, operand.new_zeros(rows - R, operand.shape[1])])
            tile = _logits(head, operand, w, start, tile, "logits")[:R]
            if whole is not None and head.batch_invariant:
                whole[r] = tile
            if some is not None:
                assert keep is not None
                own, inside = keep.of_chunk(chunk, r)
                assert inside is not None
                torch.index_select(tile, 0, inside, out=some[own])
            before = None if jacobian is None else state[0, r].clone()
            folder.fold_tile(
                tile,
                head.offset + start,
                target[r],
                state[:, r],
                transform.of(r),
                **wanted._asdict(),
                overwrite=whole is None and jacobian is None,
            )
            if jacobian is not None:
                assert before is not None
                jacobian.add(chunk, r, tile, w, start, (before, state[0, r]))
        kept.append(whole if some is None else some)
    of_rank = state[0]
    if head.shard is not None:
        scale = row_scale(*transform)
        state = head.shard.merge(state, scale * LOG2_E)
    stats = _finish(state, head.V, target, transform, wanted)
    if jacobian is not None:
        m, log_s, _ = stats.saved
        return stats, jacobian.finished(of_rank, m, log_s, stats.logp, state[6])
    return stats, None if keep is None else Kept(kept, keep.rows)


def _finish(state: Tensor, V: int, target: Tensor, transform: Transform, wanted: Wanted) -> Stats:
    m, s, w, q, total, before, u_target = state
    scale = row_scale(*transform)
    inside = (target >= 0) & (target < V)
    m, log_s, s, w, q = add_target(m, s, w, q, torch.where(inside, u_target, -math.inf), scale)
    logp = torch.where(inside, (u_target - m) * scale - log_s * math.log(2), math.nan)
    entropy = (log_s - w / s) * math.log(2) if wanted.entropy else torch.zeros_like(logp)
    lse = m * scale + log_s * math.log(2)
    extra = state.new_zeros((3, len(target) if wanted.extra else 0))
    if wanted.extra:
        extra[0] = total * scale / V
        extra[1] = (torch.log2(q) - 2 * log_s) * math.log(2)
        # argmax is the first maximum, so no equal entry may precede the target. In a NaN row no entry is the argmax.
        extra[2] = (inside & (u_target >= m) & (before < u_target) & (s == s)).to(s.dtype)
    return Stats(logp, entropy, lse, torch.stack((m, log_s, logp)), extra)


def keep_only(kept: Kept, live: Picked, V: int) -> None:
    """Reduce the kept logits to the live rows, block by block, before anything else is allocated. The blocks become as
    wide as tiles of so few rows are."""
    if not kept.blocks:
        return
    if kept.rows is not None:
        if not len(kept.rows):
            return
        # A live row that was not kept has a coefficient of NaN, so its gradient is NaN whatever the logits are.
        places = torch.searchsorted(kept.rows.index, live.index).clamp_(max=len(kept.rows) - 1)
        live = Picked(places, len(kept.rows))
    first = kept.blocks[0]
    assert first is not None
    together = max(1, tile_shape(len(live), V, first.device, False)[1] // first.shape[1])
    for i in range(0, len(kept.blocks), together):
        taken: list[Tensor] = []
        for j in range(i, min(i + together, len(kept.blocks))):
            block, kept.blocks[j] = kept.blocks[j], None
            assert block is not None
            taken.append(live.take(block))
        kept.blocks[i] = taken[0] if len(taken) == 1 else torch.cat(taken, 1)
    kept.blocks[:] = [block for block in kept.blocks if block is not None]


def poisoned(coefs: Coefs, target: Tensor, V: int) -> Coefs:
    """Set the coefficient of a target outside the vocabulary to NaN, as the forward did with its logp."""
    if coefs.logp is None:
        return coefs
    return coefs._replace(logp=coefs.logp.where((target >= 0) & (target < V), math.nan))


def backward(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    transform: Transform,
    stats: Stats,
    coefs: Coefs,
    needed: tuple[bool, bool, bool],
    into: Sums | None = None,
) -> Gradients:
    """Return the `needed` gradients of (hidden, weight, bias) from rows that are all live.

    hidden [L, D] is an operand; stats and coefs belong to its rows. Kept logits are overwritten and released on the
    way; otherwise the logits are computed again. The gradients of weight and bias are added to `into`, if given.
    """
    kept, coefs = stats.logits, poisoned(coefs, target, head.V)
    n, V, D = *hidden.shape[:1], *head.weight.shape
    rows, width = tile_shape(n, V, hidden.device, False)
    if kept is not None:
        assert kept[0] is not None
        width = kept[0].shape[1]
    dtype, device, folder = head.sum_dtype, hidden.device, _folder(hidden)
    operand_dtype = hidden.dtype
    g_hidden = torch.empty((n, D), dtype=dtype, device=device) if needed[0] else None
    if into is not None:
        g_weight, g_bias = into.weight, into.bias
    else:
        g_weight = fresh_gradient(head.weight, head.weight.dtype) if needed[1] else None
        g_bias = torch.empty((V,), dtype=dtype, device=device) if needed[2] else None
    buffer = None
    for i, (start, stop) in enumerate(blocks(V, width)):
        C = stop - start
        w = head.operand(head.weight[start:stop]) if kept is None or needed[0] else None
        total, direct = None, True
        if g_weight is not None:
            # A single product can write its block; several are added up in the dtype of the sums.
            direct = g_weight.dtype == dtype or (n <= rows and into is None)
            total = g_weight[start:stop] if direct else torch.empty((C, D), dtype=dtype, device=device)
        for r in _chunks(n, rows):
            R = r.stop - r.start
            if kept is not None:
                block = kept[i]
                assert block is not None
                tile = block[r]
            else:
                if buffer is None:
                    buffer = torch.empty(min(rows, n) * width, dtype=dtype, device=device)
                assert w is not None
                tile = _logits(head, hidden[r], w, start, buffer[: R * C].view(R, C), "recompute")
            entropy = None if coefs.entropy is None else stats.entropy[r]
            gradient = folder.gradient_tile(
                tile, head.offset + start, target[r], transform.of(r), (*stats.saved[:, r], entropy), coefs.of(r),
                operand_dtype,
            )  # fmt: skip
            add = r.start > 0 or (into is not None and not into.empty)
            if g_hidden is not None:
                assert w is not None
                multiply(g_hidden[r], gradient, w, "hidden_grad", add=start > 0, dtype=head.compute_dtype)
            if total is not None:
                multiply(total, gradient.t(), hidden[r], "weight_grad", add=add, dtype=head.compute_dtype)
            if g_bias is not None:
                of_block = gradient.sum(0, dtype=dtype)
                g_bias[start:stop] = g_bias[start:stop] + of_block if add else of_block
        if total is not None and g_weight is not None and not direct:
            g_weight[start:stop] = total
        if kept is not None:
            kept[i] = None
    if head.shard is not None and g_hidden is not None:
        head.shard.sum(g_hidden)
    if g_bias is not None and into is None:
        assert head.bias is not None
        g_bias = g_bias.to(head.bias.dtype)
    return Gradients(g_hidden, g_weight, g_bias)
