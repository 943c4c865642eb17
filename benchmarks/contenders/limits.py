"""Count the matrix products of a step from hidden states, and run them alone: a lower limit of the time of a step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contenders.hidden_case import Case
from rlloss.lm_head import vocab_loop
from rlloss.lm_head.matmul import operands_in


class Flop(TorchDispatchMode):
    """Counts the FLOP of every product of two matrices inside this context."""

    flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def bare_products(case: Case, *, again: bool, tiled: bool) -> Callable[[], Callable[[], Tensor]]:
    """Return a step that runs only the matrix products: 1 + 3r units, or 1 + 2r without `again`.

    The step runs the products of the forward and returns the backward, which runs its products and returns the weight's
    gradient. Before the clock starts, the operands are made compact, in the dtype in which rlloss multiplies. The
    weight's gradient is written to fresh memory, as in every backward.

    Args:
        case: the inputs.
        again: whether the backward computes the logits again.
        tiled: one block of the vocabulary at a time, as in rlloss. False: one product for the whole vocabulary.
    """
    counted = case.mask.flatten().nonzero().squeeze(-1)
    hidden = case.hidden.flatten(0, 1)[counted]
    W, n, L = case.weight, len(counted), case.live
    V, D = W.shape
    wide = torch.float32
    if not hidden.is_cuda:
        hidden, W = hidden.to(wide), W.to(wide)
    options: dict[str, Any] = {"out_dtype": wide} if hidden.dtype != wide else {}
    live = hidden[:L]
    rows, width = vocab_loop.tile_shape(n, V, hidden.device, False) if tiled else (n, V)
    logits = torch.zeros((min(rows, n), width), dtype=wide, device=hidden.device)
    gradient = logits[:L] if logits.dtype == hidden.dtype else torch.randn_like(logits, dtype=hidden.dtype)[:L]
    d_hidden = torch.empty((L, D), dtype=wide, device=hidden.device)
    like = torch.zeros((), dtype=wide, device=hidden.device).expand(V, D)

    def forward() -> Callable[[], Tensor]:
        with operands_in(case.weight.dtype, hidden):
            for start in range(0, V, width):
                w = W[start : start + width]
                for x in hidden.split(rows):
                    torch.mm(x, w.T, out=logits[: len(x), : len(w)], **options)
        return backward

    def backward() -> Tensor:
        d_weight = vocab_loop.fresh_gradient(like, like.dtype)
        with operands_in(case.weight.dtype, hidden):
            for start in range(0, V, width):
                w = W[start : start + width]
                for i, x in enumerate(live.split(rows)):
                    g, d = gradient[: len(x), : len(w)], d_hidden[i * rows : i * rows + len(x)]
                    if again:
                        torch.mm(x, w.T, out=logits[: len(x), : len(w)], **options)
                    if start:
                        torch.addmm(d, g, w, out=d, **options)
                    else:
                        torch.mm(g, w, out=d, **options)
                    total = d_weight[start : start + len(w)]
                    if i:
                        torch.addmm(total, g.T, x, out=total, **options)
                    else:
                        torch.mm(g.T, x, out=total, **options)
        return d_weight

    return forward
