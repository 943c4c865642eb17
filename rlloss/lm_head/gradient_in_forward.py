"""Compute the loss and its gradient in one pass over the rows, without computing logits twice or holding them.

This is possible if a row's coefficient depends on that row alone. For each chunk of rows the forward computes all
logits, asks the loss for the coefficients, and adds the gradients of the live rows to those of hidden and weight. These
are held until the backward, which multiplies them by the incoming gradient. A second backward (`retain_graph`) computes
its own gradients.
"""

from typing import Any

import torch
from torch import Tensor

from rlloss import checks
from rlloss.backends import backend, choose_backend
from rlloss.config import LossConfig
from rlloss.lm_head import vocab_loop
from rlloss.lm_head.autograd import compute_dtype, flat, gradients, operands, plain, spread, spread_hidden
from rlloss.lm_head.call import Call, Expected, HeadInputs, HeadOptions, check_head, prepare
from rlloss.lm_head.head import Head
from rlloss.lm_head.matmul import count_unit
from rlloss.lm_head.row_subset import Hold, Picked
from rlloss.lm_head.vocab_loop import Coefs, Kept, Stats, Sums, Wanted
from rlloss.loss_types import LOSSES
from rlloss.losses.aggregate import row_local
from rlloss.losses.inputs import AwaitingLogp
from rlloss.losses.loss import gradient_of, loss_of
from rlloss.losses.metrics import PolicyLoss

_PART = 4096  # rows of the weight's gradient that the backward multiplies at a time


def why_not_in_forward(
    hidden: Tensor,
    weight: Tensor,
    config: LossConfig,
    cutoff: Tensor | float | None,
    denominator: Tensor | float | None,
) -> str | None:
    """Return the reason that forbids a gradient in the forward; None: it is possible."""
    if torch.compiler.is_compiling():
        return "torch.compile takes no gradient that is made in the forward"
    if not row_local(config, cutoff, denominator):
        return "with these settings a token's coefficient depends on other tokens"
    if hidden.device.type != "cpu" and compute_dtype(hidden, weight) == torch.float16:
        return "fp16 gradients of logits underflow before the loss is scaled"
    return None


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, counted, settings, given, entropy_grad):
        needed, head = ctx.needs_input_grad[:3], Head(weight, bias, *settings)
        with plain(hidden.device):
            made = _Made(hidden, head, rows, counted, given, entropy_grad, needed)
            logp, entropy = (spread(x, counted, rows.target.shape) for x in (made.logp, made.entropy))
            loss, metrics = loss_of(given(logp=logp, entropy=entropy))
        ctx.held = made.held
        ctx.rest, ctx.backend = (rows, counted, settings, entropy_grad), choose_backend(hidden)
        ctx.save_for_backward(
            hidden, weight, bias, rows.target, rows.temperature if isinstance(rows.temperature, Tensor) else None,
            made.saved, made.entropy, made.coefs,
        )  # fmt: skip
        ctx.mark_non_differentiable(*metrics.values())
        return loss, tuple(metrics), *metrics.values()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_loss, *_):
        hidden, weight, bias, _, _, saved, entropy, coefs = ctx.saved_tensors
        held, ctx.held = ctx.held, None
        rows, counted, settings, entropy_grad = ctx.rest
        factor = g_loss.to(saved.dtype)
        with plain(hidden.device), backend(ctx.backend):
            if held is not None:
                found = held.scaled(factor, hidden, weight, bias, counted)
            else:
                scaled = torch.where(coefs == 0.0, 0.0, coefs * factor)
                found = gradients(
                    hidden, Head(weight, bias, *settings), rows, counted,
                    Stats(saved[0], entropy, saved[0], saved, saved),
                    Coefs(scaled[0], scaled[1] if entropy_grad else None, None), None, ctx.needs_input_grad[:3],
                )  # fmt: skip
        return *found, *(None,) * 5


class _Held:
    """Gradients for an incoming gradient of 1, of some rows of hidden (fp32 at least), of weight and of bias."""

    def __init__(self):
        self.hidden: list[Tensor] = []
        self.places: list[Tensor] = []
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.any_live = False

    def scaled(self, factor, hidden, weight, bias, counted):
        """Return the gradients for the backward. They are scaled in place."""
        of_hidden = None
        if self.hidden:
            N = hidden.shape[:-1].numel()
            places = Picked(torch.cat(self.places), N if counted is None else len(counted))
            if counted is not None:
                places = counted.of(places)
            gradient = torch.cat(self.hidden) if len(self.hidden) > 1 else self.hidden[0]
            of_hidden = spread_hidden(hidden, gradient.mul_(factor), None if len(places) == N else places)
        return of_hidden, *(self._scaled(g, x, factor) for g, x in ((self.weight, weight), (self.bias, bias)))

    def _scaled(self, g: Tensor | None, like: Tensor, factor: Tensor) -> Tensor | None:
        """Return factor * g in the dtype of `like`."""
        if g is None:
            return None
        out = g if g.dtype == like.dtype else torch.empty_like(g, dtype=like.dtype)
        if not self.any_live:
            # The gradient is 0 even if the factor is inf or NaN.
            return out.zero_()
        for part, into in zip(g.split(_PART), out.split(_PART), strict=True):
            # Multiplied in fp32 or fp64: in bf16 the factor itself would be rounded.
            torch.mul(part.to(factor.dtype), factor, out=into)
        return out


class _Made:
    """Statistics, coefficients and held gradients of the rows that count, computed chunk by chunk."""

    def __init__(self, hidden, head, rows, counted, given, entropy_grad, needed):
        target = flat(rows.target, counted).contiguous()
        n, (V, D) = len(target), head.weight.shape
        count_unit(n, V, D)
        h, transform, sums = operands(hidden, head, counted), rows.transform(counted), head.sum_dtype
        tile = vocab_loop.tile_shape(n, V, hidden.device, head.batch_invariant)
        step = tile[0]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=sums, device=hidden.device)

        self.logp, self.entropy, self.saved, self.coefs = zeros(n), zeros(n), zeros(3, n), zeros(2, n)
        # A single chunk writes its product straight into the weight's gradient. Several are added up in fp32. So is an
        # fp16 gradient, which would underflow before it is scaled.
        adds_up = n > step or any(x is not None and x.dtype == torch.float16 for x in (head.weight, head.bias))
        into = None
        self.held = _Held()
        for start in range(0, n, step):
            r = slice(start, min(start + step, n))
            stats, kept = vocab_loop.forward(h[r], head, target[r], transform.of(r), Wanted(), Hold("logits"), tile)
            assert isinstance(kept, Kept)
            self.logp[r], self.entropy[r], self.saved[:, r] = stats.logp, stats.entropy, stats.saved
            self._ask(given, r, counted, rows.target.shape)
            coefs = Coefs(self.coefs[0, r], self.coefs[1, r] if entropy_grad else None, None)
            live = coefs.live().nonzero().squeeze(-1)
            if len(live) == 0:
                continue
            if adds_up:
                into = Sums.fresh(head, needed) if into is None else into._replace(empty=False)
            if len(live) < r.stop - r.start:
                vocab_loop.keep_only(kept, Picked(live, r.stop - r.start), V)
            own = target[r][live].contiguous()
            found = vocab_loop.backward(
                h[r][live], head, own, transform.of(r).of(live),
                Stats(stats.logp, stats.entropy[live], stats.lse, stats.saved[:, live], stats.extra, kept.blocks),
                coefs.of(live), needed, into,
            )  # fmt: skip
            self.held.any_live = True
            if found.hidden is not None:
                self.held.hidden.append(found.hidden)
                self.held.places.append(live + start)
            self.held.weight, self.held.bias = found.weight, found.bias
        self._nothing_live(hidden, head, needed)

    def _ask(self, given: AwaitingLogp, r: slice, counted: Picked | None, shape: torch.Size) -> None:
        """Compute the coefficients of rows r. The other rows are irrelevant: no coefficient depends on another row."""
        logp, entropy = (spread(x, counted, shape) for x in (self.logp, self.entropy))
        for coefs, g in zip(self.coefs, gradient_of(given(logp=logp, entropy=entropy)), strict=True):
            if g is not None:
                coefs[r] = flat(g, counted)[r]

    def _nothing_live(self, hidden, head, needed):
        """Fill in zeros for gradients to which no row contributed."""
        if needed[0] and not self.held.hidden:
            self.held.hidden = [hidden.new_zeros((0, hidden.shape[-1]), dtype=head.sum_dtype)]
            self.held.places = [torch.zeros(0, dtype=torch.int64, device=hidden.device)]
        if needed[1] and self.held.weight is None:
            self.held.weight = torch.zeros_like(head.weight)
        if needed[2] and self.held.bias is None:
            self.held.bias = torch.zeros_like(head.bias)


def prepare_loss(
    inputs: HeadInputs,
    options: HeadOptions,
    advantage: Tensor,
    config: LossConfig,
    cutoff: Tensor | float | None,
    denominator: Tensor | float | None,
) -> Call:
    """Run `call.prepare` with the knowledge of the loss about the gradient."""
    hidden, weight = inputs.hidden, inputs.weight
    mask: Any = inputs.mask
    check_head(hidden, weight, inputs.bias)
    checks.require(hidden.dim() == 3, "hidden", f"shape {tuple(hidden.shape)}", "[B, T, D]")
    checks.boolean("mask", mask)
    checks.same_shape("mask", mask, hidden.shape[:-1], "like hidden without its last dimension")
    checks.advantage(advantage, mask.shape)
    checks.same_device("advantage", advantage, mask, "mask")
    expected = Expected(
        candidates(advantage, mask, config), live_share(config),
        why_not_in_forward(hidden, weight, config, cutoff, denominator), logp_alone=config.entropy_coef == 0.0,
    )  # fmt: skip
    return prepare(inputs, options, expected)


def live_share(config: LossConfig) -> float:
    """Return the expected share of the candidates that gets a gradient: all with a KL or a bonus for all tokens."""
    bonus_for_all = config.entropy_coef != 0.0 and config.entropy_bonus_tokens == "all"
    return 1.0 if config.beta != 0.0 or bonus_for_all else config.top_entropy_quantile


def candidates(advantage: Tensor, mask: Tensor, config: LossConfig) -> Tensor | None:
    """Return the tokens [B, T] that may get a gradient; None: all. If the loss is a multiple of the advantage, these
    are the tokens with an advantage."""
    loss_type = LOSSES[config.loss_type]
    if not loss_type.silent_without_advantage or config.beta != 0.0 or config.entropy_coef != 0.0:
        return None
    has_advantage = advantage.detach() != 0  # True for NaN
    if has_advantage.dim() == 1:
        has_advantage = has_advantage.unsqueeze(-1)
    elif (loss_type.level or config.ratio_level) != "token":
        has_advantage = has_advantage.any(-1, keepdim=True)  # the shared ratio carries the gradient to all its tokens
    return has_advantage.expand(mask.shape)


def gradient_in_forward(call: Call, config: LossConfig, given: AwaitingLogp) -> PolicyLoss:
    """Compute what `linear_token_stats` followed by `policy_loss` would."""

    loss, names, *values = _GradientInForward.apply(
        call.hidden, call.weight, call.bias, call.rows, call.counted, call.settings, given, config.entropy_coef != 0.0
    )  # type: ignore[misc]
    return PolicyLoss(loss, dict(zip(names, values, strict=True)))
