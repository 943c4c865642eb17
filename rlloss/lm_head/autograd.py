"""Make `linear_token_stats` differentiable, as an autograd function that may hold logits and as a torch operator."""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlloss.backends import backend, choose_backend
from rlloss.lm_head import vocab_loop
from rlloss.lm_head.head import Head, Settings
from rlloss.lm_head.matmul import count_unit
from rlloss.lm_head.row_subset import Capacity, Hold, Picked, Survey, fitting
from rlloss.lm_head.vocab_loop import Coefs, Kept, Stats, Wanted
from rlloss.logits.transform import Transform

# Entered wherever the weight is read, so that an engine that shards the weight can gather it.
Gather = Callable[[], contextlib.AbstractContextManager]


class Rows(NamedTuple):
    """Inputs of the rows besides hidden states: target [...], temperature (like target, or a number), softcap and
    logit_scale. capacity is the fixed number of rows, or None."""

    target: Tensor
    temperature: Tensor | float
    softcap: float | None
    logit_scale: float
    capacity: Capacity | None = None

    def transform(self, rows: Picked | None) -> Transform:
        t = self.temperature
        if isinstance(t, Tensor):
            t = flat(t, rows, fill=1.0).contiguous()
        return Transform(t, self.softcap, self.logit_scale)


def flat(x: Tensor, rows: Picked | None, fill: float = 0.0) -> Tensor:
    """Return x [...] as [N], or only the given rows of it."""
    x = x.reshape(-1)
    return x if rows is None else rows.take(x, fill)


def spread(values: Tensor, rows: Picked | None, shape: torch.Size) -> Tensor:
    """Put values [..., n] of some rows into their places and zeros elsewhere."""
    return (values if rows is None else rows.put(values)).view((*values.shape[:-1], *shape))


def plain(device: torch.device) -> contextlib.AbstractContextManager:
    """Switch autocast off: this module chooses the dtypes."""
    return torch.autocast(device.type, enabled=False)


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of the products' operands: autocast's (not for fp64 and "meta"), else the wider of the two."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return dtype


def operands(hidden: Tensor, head: Head, rows: Picked | None) -> Tensor:
    """Return rows of hidden [..., D] as an operand of the products, [n, D]."""
    x = hidden.reshape(-1, hidden.shape[-1])
    return head.operand(x if rows is None else rows.take(x)).contiguous()


def counted_rows(target: Tensor, mask: Tensor | None, capacity: Capacity | None) -> Picked | None:
    """Return the rows that count; None: all. One host sync on a GPU, none with a capacity."""
    if mask is not None and capacity is not None:
        return fitting(mask.reshape(-1), min(capacity.rows, target.numel()), "rows that count")
    return Survey(target.numel(), mask, None, 1).rows()


def _live_rows(coefs: Coefs, n: int, counted: Picked | None, capacity: Capacity | None) -> tuple[Picked, Coefs]:
    """Return the rows with a gradient and their coefficients, which are NaN if the capacity is exceeded. One host sync
    on a GPU, none with a capacity."""
    flags = coefs.live()
    if capacity is None:
        live = Picked(flags.nonzero().squeeze(-1), n)
        return live, coefs if len(live) == n else _taken(coefs, live)
    live = fitting(flags, min(capacity.live, n), "rows with a gradient")
    assert live.beyond is not None
    exceeded = live.beyond.any()
    if counted is not None and counted.beyond is not None:
        exceeded = exceeded | counted.beyond.any()
    return live, Coefs(*(None if g is None else g.masked_fill_(exceeded, torch.nan) for g in _taken(coefs, live)))


def _taken(coefs: Coefs, rows: Picked) -> Coefs:
    return Coefs(*(None if g is None else rows.take(g) for g in coefs))


def _stats_of(stats: Stats, live: Picked) -> Stats:
    """Return the statistics of the live rows. In unused slots the row maximum is +inf, so every probability is 0."""
    m, *others = stats.saved
    saved = torch.stack((live.take(m, fill=torch.inf), *(live.take(x) for x in others)))
    return Stats(stats.logp, live.take(stats.entropy), stats.lse, saved, stats.extra)


def gradients(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    counted: Picked | None,
    stats: Stats,
    coefs: Coefs,
    kept: Kept | None,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden [..., D], weight and bias from stats and coefs [n] of the rows that count. One
    host sync, none with a capacity."""
    n = len(stats.logp)
    live, coefs = _live_rows(coefs, n, counted, rows.capacity)
    if len(live) == 0:
        zeros = (torch.zeros_like(x) if x is not None and need else None
                 for x, need in zip((hidden, head.weight, head.bias), needed, strict=True))  # fmt: skip
        return tuple(zeros)  # type: ignore
    places: Picked | None = live if counted is None else counted.of(live)
    if rows.capacity is not None or len(live) < n:
        stats = _stats_of(stats, live)
        if kept is not None:
            vocab_loop.keep_only(kept, live, len(head.weight))
    if kept is not None:
        stats = stats._replace(logits=kept.blocks)
    if rows.capacity is None and len(live) == rows.target.numel():
        places = None
    target = flat(rows.target, places).contiguous()
    found = vocab_loop.backward(
        operands(hidden, head, places), head, target, rows.transform(places), stats, coefs, needed
    )
    of_hidden = None if found.hidden is None else spread_hidden(hidden, found.hidden, places)
    return of_hidden, found.weight, found.bias


def spread_hidden(hidden: Tensor, gradient: Tensor, places: Picked | None) -> Tensor:
    """Return the gradient of hidden [..., D] from the gradient of some rows."""
    if places is None:
        return gradient.to(hidden.dtype).view(hidden.shape)
    N, D = places.total, hidden.shape[-1]
    nowhere = 0 if places.beyond is None else 1
    out = torch.zeros((N + nowhere, D), dtype=hidden.dtype, device=hidden.device)
    return out.index_copy_(0, places.index, gradient.to(hidden.dtype))[:N].view(hidden.shape)


def from_jacobian(hidden: Tensor, jacobian: Tensor, held: Picked | None, counted: Picked | None, g: Tensor) -> Tensor:
    """Return the gradient of hidden [..., D] from d logp / d hidden of the held rows and d loss / d logp [...]."""
    of_row = flat(g, counted).to(jacobian.dtype)
    own = (of_row if held is None else held.take(of_row)).unsqueeze(-1)
    places = counted if held is None else held if counted is None else counted.of(held)
    # A broken row without a coefficient has a gradient of 0.
    out = spread_hidden(hidden, (jacobian * own).masked_fill_(own == 0, 0.0), places)
    if held is not None:
        # A coefficient outside the held rows is NaN, or an error of the caller.
        stray = of_row.ne(0).index_fill_(0, held.index, False)
        stray = spread(stray, counted, g.shape)
        out = out.masked_fill_(stray.unsqueeze(-1), torch.nan)
    return out


def _forward(hidden, head, rows, counted, hold, wanted):
    """Return (logp, entropy, lse, extra, stats, held): the first four shaped like target, stats of the rows that count,
    and what is held."""
    target = flat(rows.target, counted).contiguous()
    count_unit(len(target), *head.weight.shape)
    stats, held = vocab_loop.forward(
        operands(hidden, head, counted), head, target, rows.transform(counted), wanted, hold
    )
    shape = rows.target.shape
    extra = spread(stats.extra, counted, shape) if wanted.extra else stats.extra
    logp, entropy, lse = (spread(x, counted, shape) for x in (stats.logp, stats.entropy, stats.lse))
    return logp, entropy, lse, extra, stats, held


def _backward(hidden, head, rows, counted, stats, grads, kept, needed):
    saved, entropy = stats
    coefs = Coefs(*(None if g is None else flat(g, counted).to(saved.dtype) for g in grads))
    stats = Stats(saved[0], saved[0] if entropy is None else entropy, saved[0], saved, saved[:0])
    return gradients(hidden, head, rows, counted, stats, coefs, kept, needed)


class How(NamedTuple):
    """Arguments of a call besides hidden, weight and bias; see `rlloss.lm_head.call.Call`."""

    rows: Rows
    counted: Picked | None
    hold: Hold | None
    wanted: Wanted
    entropy_grad: bool
    settings: Settings
    gather: Gather


class LinearTokenStats(torch.autograd.Function):
    """apply(hidden, weight, bias, how) -> (logp, entropy, lse, extra), shaped like target. Eager mode only."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, how):
        rows, counted, hold, wanted, entropy_grad, settings, gather = how
        ctx.set_materialize_grads(False)
        with plain(hidden.device), gather():
            head = Head(weight, bias, *settings)
            logp, entropy, lse, extra, stats, held = _forward(hidden, head, rows, counted, hold, wanted)
        ctx.kept, jacobian = (held, None) if isinstance(held, Kept) else (None, held)
        ctx.save_for_backward(
            hidden, weight, bias, rows.target, rows.temperature if isinstance(rows.temperature, Tensor) else None,
            stats.saved, stats.entropy if entropy_grad else None, jacobian,
        )  # fmt: skip
        ctx.rest, ctx.backend = (rows, counted, hold, settings, gather), choose_backend(hidden)
        ctx.mark_non_differentiable(extra, *(() if entropy_grad else (entropy,)))
        return logp, entropy, lse, extra

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_entropy, g_lse, _):
        grads = (g_logp, g_entropy, g_lse)
        if all(g is None for g in grads):
            return (None,) * 4
        hidden, weight, bias, _, _, saved, entropy, jacobian = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # a second backward computes the logits again
        rows, counted, hold, settings, gather = ctx.rest
        # Gathered also where the Jacobian needs no weight: other ranks may have taken another plan, and all must join.
        with plain(hidden.device), gather(), backend(ctx.backend):
            if jacobian is not None and g_entropy is None and g_lse is None:
                return from_jacobian(hidden, jacobian, hold.rows, counted, g_logp), None, None, None
            head = Head(weight, bias, *settings)
            found = _backward(hidden, head, rows, counted, (saved, entropy), grads, kept, ctx.needs_input_grad[:3])
        return *found, None


def _not_for_cuda_graphs() -> dict[str, Any]:
    """Return the options of an operator that waits for the device, which a CUDA graph cannot record. A torch that has
    no such tag gets none."""
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    taken = tag is not None and "tags" in inspect.signature(torch.library.custom_op).parameters
    return {"tags": (tag,)} if taken else {}


def _operators(name: str, *, fake: Callable) -> Callable[[Callable], Callable]:
    """Decorator: register a function, whose last argument is the capacity, as two operators, and return a function that
    calls one of them. Without a capacity it is "rlloss::name", which asks the device how many rows there are; with one
    it is "rlloss::name_static", which does not."""

    def of(run: Callable) -> Callable:
        counting = torch.library.custom_op(f"rlloss::{name}", mutates_args=(), **_not_for_cuda_graphs())(run)
        static = torch.library.custom_op(f"rlloss::{name}_static", mutates_args=())(run)
        counting.register_fake(fake)
        static.register_fake(fake)

        def call(*arguments):
            return (counting if arguments[-1] is None else static)(*arguments)

        return call

    return of


def _fake_stats(
    hidden, weight, bias, target, mask, temperatures, temperature, softcap, logit_scale, dtype, batch_invariant,
    entropy, entropy_grad, extra, capacity=None,
):  # fmt: skip
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    row = [hidden.new_empty(target.shape, dtype=dtype) for _ in range(3)]
    more = hidden.new_empty((3, *_extra_shape(target, extra)), dtype=dtype)
    return *row, hidden.new_empty((3, *target.shape), dtype=dtype), more


@_operators("linear_token_stats", fake=_fake_stats)
def linear_token_stats_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    dtype: torch.dtype,
    batch_invariant: bool,
    entropy: bool,
    entropy_grad: bool,
    extra: bool,
    capacity: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with plain(hidden.device):
        rows = _rows(target, temperatures, temperature, softcap, logit_scale, capacity)
        head, counted = Head(weight, bias, dtype, batch_invariant), counted_rows(target, mask, rows.capacity)
        wanted = Wanted(entropy, extra)
        logp, entropy_out, lse, more, stats, _ = _forward(hidden, head, rows, counted, None, wanted)
        more = more.view(3, *_extra_shape(target, extra))
        return logp, entropy_out, lse, spread(stats.saved, counted, target.shape), more


def _rows(target, temperatures, temperature, softcap, logit_scale, capacity) -> Rows:
    room = None if capacity is None else Capacity(*capacity)
    return Rows(target, temperature if temperatures is None else temperatures, softcap, logit_scale, room)


def _extra_shape(target: Tensor, extra: bool) -> tuple[int, ...]:
    return tuple(target.shape) if extra else (0,)


def _fake_gradients(
    hidden, weight, bias, target, mask, temperatures, temperature, softcap, logit_scale, dtype, saved, entropy,
    g_logp, g_entropy, g_lse, needs_hidden, needs_weight, needs_bias, capacity=None,
):  # fmt: skip
    nothing = [hidden.new_empty(0) for _ in range(3)]
    given = (hidden, weight, bias)
    needed = (needs_hidden, needs_weight, needs_bias)
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else empty
        for x, need, empty in zip(given, needed, nothing, strict=True)
    )


@_operators("linear_token_stats_backward", fake=_fake_gradients)
def _backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    dtype: torch.dtype,
    saved: Tensor,
    entropy: Tensor | None,
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    g_lse: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    capacity: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    with plain(hidden.device):
        rows = _rows(target, temperatures, temperature, softcap, logit_scale, capacity)
        grads = (g_logp, g_entropy, g_lse)
        if mask is not None:
            # Only live rows are computed. A coefficient of 0 makes masked rows not live.
            grads = (None if g is None else g.where(mask, 0.0) for g in grads)
            if rows.capacity is not None:
                exceeded = mask.sum() > rows.capacity.rows
                grads = (None if g is None else g.masked_fill(exceeded, torch.nan) for g in grads)
        found = _backward(
            hidden, Head(weight, bias, dtype), rows, None,
            (saved.reshape(3, -1), None if entropy is None else entropy.reshape(-1)), grads, None,
            (needs_hidden, needs_weight, needs_bias),
        )  # fmt: skip
    h, w, b = (hidden.new_empty(0) if g is None else g for g in found)
    return h, w, b


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, target, mask, temperatures, *settings = inputs
    _, entropy, _, saved, extra = output
    *_, entropy_grad, _, ctx.capacity = settings
    ctx.settings = settings[:4]
    ctx.backend = choose_backend(hidden)
    ctx.mark_non_differentiable(saved, extra)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target, mask, temperatures, saved, entropy if entropy_grad else None)


def _op_backward(ctx, g_logp, g_entropy, g_lse, *_):
    found: list[Tensor | None] = [None, None, None]
    grads = (g_logp, g_entropy, g_lse)
    if any(g is not None for g in grads):
        hidden, weight, bias, target, mask, temperatures, saved, entropy = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        with backend(ctx.backend):
            all_three = _backward_op(
                hidden, weight, bias, target, mask, temperatures, *ctx.settings, saved, entropy, *grads, *needed,
                ctx.capacity,
            )  # fmt: skip
        found = [g if need else None for g, need in zip(all_three, needed, strict=True)]
    return *found, *(None for _ in range(12))


for _name in ("linear_token_stats", "linear_token_stats_static"):
    torch.library.register_autograd(f"rlloss::{_name}", _op_backward, setup_context=_setup_context)
