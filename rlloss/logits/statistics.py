"""`token_stats` computes log-probability, entropy and log-sum-exp of each token from logits, with autograd."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlloss import backends, checks
from rlloss.backends import backend, choose_backend
from rlloss.logits.transform import Transform
from rlloss.operators import operator

OUTPUTS = ("logp", "entropy", "lse", "mean_logit", "log_sum_sq_probs", "is_top1")
EXTRA = OUTPUTS[3:]  # all three are computed if one of them is requested
# Attributes in which autograd's functions keep their own output. They are not read: that could recompute a checkpoint.
_SAVED_OUTPUT = {"_saved_result", "_saved_result0", "_saved_output", "_saved_out"}
LOCAL_ROWS = ".to_local() where that is whole rows, the same ones of each argument, or .full_tensor()"


class TokenStats(NamedTuple):
    """Statistics of the softmax of each token, shaped like `target`. Fields that were not requested are None.

    logp, entropy and lse are fp32 (fp64 for fp64 logits), in nats, and 0 where masked. mean_logit, log_sum_sq_probs
    and is_top1 (bool) carry no gradient.
    """

    logp: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    mean_logit: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    is_top1: Tensor | None = None


def _stats_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class LogitsInputs(NamedTuple):
    """Tensors and numbers from which `token_stats` computes; they are described there."""

    logits: Tensor
    target: Tensor
    mask: Tensor | None
    transform: Transform

    def contiguous(self) -> "LogitsInputs":
        """Return inputs as kernels take them: all contiguous but the logits."""
        logits, target, mask, transform = self
        if isinstance(transform.temperature, Tensor):
            temperature = transform.temperature.to(_stats_dtype(logits)).contiguous()
            transform = transform._replace(temperature=temperature)
        return LogitsInputs(logits, target.contiguous(), None if mask is None else mask.contiguous(), transform)


def _inputs(logits, target, mask, temperatures, temperature, softcap, logit_scale) -> LogitsInputs:
    """Make the bundle from the arguments of an operator."""
    transform = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    return LogitsInputs(logits, target, mask, transform)


def _run_backward(inputs: LogitsInputs, saved: Tensor, entropy: Tensor, grads, inplace: bool = False) -> Tensor:
    grads = tuple([None if g is None else g.to(saved.dtype).contiguous() for g in grads])
    return backends.of(inputs.logits).token_stats_backward(
        *inputs.contiguous(), (saved, entropy), grads, inplace=inplace
    )


def _forward(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    entropy_grad: bool,
    extra: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _inputs(logits, target, mask, temperatures, temperature, softcap, logit_scale).contiguous()
    return backends.of(logits).token_stats_forward(*inputs, entropy=entropy, extra=extra)


def _fake(logits, target, mask, temperatures, temperature, softcap, logit_scale, entropy, entropy_grad, extra):
    dtype = _stats_dtype(logits)
    row = [logits.new_empty(target.shape, dtype=dtype) for _ in range(3)]
    more = logits.new_empty((3, *(target.shape if extra else (0,))), dtype=dtype)
    return *row, logits.new_empty((3, *target.shape), dtype=dtype), more


def _fake_gradient(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@operator("token_stats_backward", fake=_fake_gradient)
def _gradient(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    saved: Tensor,
    entropy: Tensor,
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    g_lse: Tensor | None,
) -> Tensor:
    inputs = _inputs(logits, target, mask, temperatures, temperature, softcap, logit_scale)
    return _run_backward(inputs, saved, entropy, (g_logp, g_entropy, g_lse))


def _setup_context(ctx, inputs, output):
    logits, target, mask, temperatures, *settings = inputs
    _, entropy, _, saved, extra = output
    ctx.settings, ctx.backend = settings[:3], choose_backend(logits)
    entropy_grad = settings[4]
    ctx.mark_non_differentiable(saved, extra)
    ctx.set_materialize_grads(False)
    # An entropy without gradient is not saved, because the user may overwrite it.
    ctx.save_for_backward(logits, target, mask, temperatures, saved, entropy if entropy_grad else None)


def _saved(ctx) -> Any:
    logits, target, mask, temperatures, saved, entropy = ctx.saved_tensors
    # Without a gradient of the entropy it is not read, and any tensor stands for it.
    return logits, target, mask, temperatures, *ctx.settings, saved, saved if entropy is None else entropy


def _backward(ctx, g_logp, g_entropy, g_lse, *_):
    grad = None
    if not (g_logp is g_entropy is g_lse is None):
        with backend(ctx.backend):
            grad = _gradient(*_saved(ctx), g_logp, g_entropy, g_lse)
    return grad, *(None,) * 9


_token_stats = operator("token_stats", fake=_fake, setup_context=_setup_context, backward=_backward)(_forward)


class _InplaceTokenStats(torch.autograd.Function):
    """The same forward, with a backward that overwrites the logits with their gradient. Eager mode only."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_entropy, g_lse, *_):
        grad = None
        if not (g_logp is g_entropy is g_lse is None):
            with backend(ctx.backend):
                *of_inputs, saved, entropy = _saved(ctx)
                logits = _run_backward(_inputs(*of_inputs), saved, entropy, (g_logp, g_entropy, g_lse), inplace=True)
            torch.autograd.graph.increment_version(logits)
            grad = logits.detach()  # the gradient must not have the autograd history of the logits
        return grad, *(None,) * 9


def token_stats(
    logits: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("logp", "entropy", "lse"),
    entropy_grad: bool = False,
    inplace_grad: bool = False,
) -> TokenStats:
    """Compute log-probability, entropy and log-sum-exp of each row of logits, which is read once.

    The distribution is softmax(softcap * tanh(logits * logit_scale / softcap) / temperature), computed in fp32. The
    backward reads only rows with a nonzero incoming gradient; the gradient of the others is 0. A second derivative or
    a torch.func transform raises.

    Args:
        logits: `[..., V]`, bf16, fp16, fp32 or fp64 (fp64: torch backend), any strides.
        target: `[...]`, int64 or int32 with 0 <= target < V where `mask` is True.
        mask: `[...]` bool, True: the row counts. Masked rows are not read; their outputs and gradients are 0. None:
            all rows count.
        temperature: above 0; a number, or a float tensor like `target` for one per token. It gets no gradient.
        softcap: cap of Gemma 2's tanh, applied after `logit_scale` and before `temperature`. None: no tanh.
        logit_scale: above 0, multiplies the logits first.
        outputs: which of "logp", "entropy", "lse", "mean_logit", "log_sum_sq_probs", "is_top1" to return.
        entropy_grad: whether the entropy carries a gradient.
        inplace_grad: write the gradient over the logits, which saves the memory of one [N, V]. Eager mode only. The
            operation that made the logits must not need its output again (a linear layer does not).

    Returns:
        `TokenStats`, with tensors shaped like `target`, fp32 (fp64 for fp64 logits), in nats. mean_logit is the mean of
        the logits after scale, softcap and temperature. log_sum_sq_probs is log sum_v p_v^2. is_top1 tells whether the
        target is the argmax (the first one of equal logits).

    Raises:
        ValueError, TypeError: an argument does not fit; the error names it. A target out of range raises on a CPU, and
            on a GPU with RLLOSS_CHECK=1, which synchronises. Without it the row becomes NaN on a GPU.
    """
    return stats_of(
        LogitsInputs(logits, target, mask, Transform(temperature, softcap, logit_scale)), outputs, entropy_grad,
        inplace_grad,
    )  # fmt: skip


def stats_of(
    inputs: LogitsInputs, outputs: tuple[str, ...], entropy_grad: bool = False, inplace_grad: bool = False
) -> TokenStats:
    """Compute `token_stats` from its first arguments as one bundle."""
    check_call(inputs)
    logits, target, mask, (temperature, softcap, logit_scale) = inputs
    check_outputs(outputs, entropy_grad)
    checks.flag("inplace_grad", inplace_grad)
    if inplace_grad:
        owner = logits._base if logits._base is not None else logits
        checks.require(
            logits.requires_grad and not owner.is_leaf,
            "inplace_grad", "logits that are a leaf, a view of one, or need no gradient", "logits the model computed",
        )  # fmt: skip
        checks.require(logits.is_contiguous(), "inplace_grad", f"strides {logits.stride()}", "contiguous logits")
        for maker in (logits.grad_fn, owner.grad_fn):
            checks.require(
                not _SAVED_OUTPUT & set(dir(maker)), "inplace_grad", f"the output of {type(maker).__name__}",
                "logits whose values autograd does not need again: that function computes its gradient from them",
            )  # fmt: skip
    per_token = isinstance(temperature, Tensor)
    inplace = inplace_grad and (torch.compiler.is_compiling() or checks.has_values(logits))
    run: Any = _InplaceTokenStats.apply if inplace else _token_stats
    logp, entropy, lse, _, extra = run(
        logits,
        target,
        mask,
        temperature.detach() if per_token else None,
        1.0 if per_token else float(temperature),
        None if softcap is None else float(softcap),
        float(logit_scale),
        "entropy" in outputs,
        entropy_grad,
        any(name in outputs for name in EXTRA),
    )
    return as_asked(outputs, entropy_grad, logp, entropy, lse, extra)


def as_asked(outputs, entropy_grad, logp, entropy, lse, extra) -> TokenStats:
    """Return the requested outputs, and None for the others."""
    return TokenStats(
        logp=logp if "logp" in outputs else None,
        entropy=(entropy if entropy_grad else entropy.detach()) if "entropy" in outputs else None,
        lse=lse if "lse" in outputs else None,
        mean_logit=extra[0] if "mean_logit" in outputs else None,
        log_sum_sq_probs=extra[1] if "log_sum_sq_probs" in outputs else None,
        is_top1=extra[2] > 0 if "is_top1" in outputs else None,
    )


def check_outputs(outputs, entropy_grad) -> None:
    """Raise if an argument does not fit; the error names it."""
    some = f"some of {', '.join(OUTPUTS)}"
    checks.of_type("outputs", outputs, (tuple, list, set, frozenset), some)
    unknown = [o for o in outputs if o not in OUTPUTS]
    checks.require(not unknown and len(outputs) > 0, "outputs", outputs, some)
    checks.flag("entropy_grad", entropy_grad)
    checks.require(
        not entropy_grad or "entropy" in outputs, "entropy_grad", True, f"'entropy' among the outputs {outputs}"
    )


def check_call(inputs: LogitsInputs) -> None:
    """Raise if a shape or type does not fit, or a value that may be read (`checks.values_checked`)."""
    logits, target, mask, transform = inputs
    checks.local("logits", logits, LOCAL_ROWS)
    checks.of_dtype("logits", logits, checks.COMPUTED, "bf16, fp16, fp32 or fp64")
    checks.require(logits.dim() >= 1 and logits.shape[-1] >= 1, "logits", tuple(logits.shape), "[..., V] with V >= 1")
    check_rows(logits, "logits without the vocabulary", target, mask, transform, logits.shape[-1])


def check_rows(x: Tensor, name: str, target: Tensor, mask: Tensor | None, transform: Transform, V: int) -> None:
    """Check the arguments besides x, which is logits [..., V] or hidden states [..., D]."""
    temperature, softcap, logit_scale = transform
    for argument, given in (("target", target), ("mask", mask), ("temperature", temperature)):
        checks.local(argument, given, LOCAL_ROWS)
    rows = x.shape[:-1]
    checks.token_ids("target", target)
    of = name.partition(" ")[0]
    checks.same_shape("target", target, rows, name)
    checks.same_device("target", target, x, of)
    if mask is not None:
        checks.boolean("mask", mask)
        checks.same_shape("mask", mask, rows, "like target")
        checks.same_device("mask", mask, x, of)
    if isinstance(temperature, Tensor):
        checks.floating("temperature", temperature)
        checks.same_shape("temperature", temperature, rows, "like target")
        checks.same_device("temperature", temperature, x, of)
        checks.require(
            not temperature.requires_grad, "temperature", "a tensor that requires a gradient", "one that does not"
        )
    else:
        checks.positive("temperature", temperature)
    if softcap is not None:
        checks.positive("softcap", softcap)
    checks.positive("logit_scale", logit_scale)
    if checks.values_checked(x):
        checks.target_in_range(target, mask, V)
        if isinstance(temperature, Tensor):
            bad = ~((temperature > 0) & (temperature < torch.inf))
            bad = bad if mask is None else bad & mask
            checks.require(
                not bool(bad.any()), "temperature", "an entry that is 0, negative, infinite or NaN",
                "all finite and above 0",
            )  # fmt: skip
