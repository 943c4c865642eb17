"""Print a line before the first step of a run and one after the last, and log the cost of the lm_head."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError('rlloss.integrations.trl.run_summary needs transformers: pip install "rlloss[trl]"') from error

from rlloss import __version__, backends
from rlloss.integrations.transformers.notice import say
from rlloss.integrations.trl import compat
from rlloss.integrations.trl.config import options
from rlloss.lm_head.matmul import Products, count_products
from rlloss.lm_head.plans import HOLD_LOGITS, PlanReport

MIB = 2**20
PLAIN_BYTES = 4  # bytes of one fp32 logit


class Head(NamedTuple):
    """The lm_head of a run. gradients: 0 to 2, the number of gradients among those of hidden states and weight."""

    V: int
    D: int
    gradients: int
    dtype: torch.dtype
    device: torch.device

    @property
    def flop(self) -> int:
        """Floating-point operations of one product with one token's hidden state."""
        return 2 * self.V * self.D


class Cost(NamedTuple):
    """The cost of several micro-batches. flop: operations of the lm_head's products in the loss and its backward.
    plain_flop: the same for plain logits. without_backward: the completions that ran without backward, among all
    `completions`. held, plain_held: bytes of the largest block of logits, and of plain logits; a maximum, not a sum."""

    flop: float = 0.0
    plain_flop: float = 0.0
    without_backward: float = 0.0
    completions: float = 0.0
    held: float = 0.0
    plain_held: float = 0.0

    def plus(self, other: "Cost") -> "Cost":
        return Cost(
            self.flop + other.flop,
            self.plain_flop + other.plain_flop,
            self.without_backward + other.without_backward,
            self.completions + other.completions,
            max(self.held, other.held),
            max(self.plain_held, other.plain_held),
        )


class RunSummary(TrainerCallback):
    """Counts the work of the lm_head in the loss of a trainer of TRL, prints it and logs it.

    The comparison is with plain logits: fp32 logits of every column of the completions, padding included, as
    ``model(ids, logits_to_keep=...)`` computes them. They need one product in the forward, and in the backward one for
    the hidden states and one for the weight, if these get a gradient. The unit is one product of all tokens that count.
    Passes before the loss (old and reference log-probabilities) are counted on neither side. The passes that
    `entropy_scope="window"` adds are counted.

    The loss calls `loss_begins` inside `micro_batch`. `tokens` takes sums over processes. `log` is called once per log.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._stack: contextlib.ExitStack | None = None
        self._counter: Products | None = None
        self._held = 0  # bytes of the largest block of logits in this micro-batch
        self._forget()

    def _forget(self) -> None:
        self.head: Head | None = None
        self._tile_bytes = 0  # of a whole micro-batch
        self._cost = Cost()  # of the present optimizer step on this process
        self._window: Tensor | None = None  # [processes, len(Cost)] since the last log
        self._run = Cost()
        self._step_tokens = (0.0, 0.0)  # live tokens and tokens that count, of all processes
        self._window_tokens = self._live = self._tokens = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._forget()
        trainer, theirs = self.trainer, self.trainer._why_trls_own()
        self.head = _head(trainer)
        loss = "" if theirs is None else f"; the loss is TRL's own ({theirs})"
        say(
            args,
            f"rlloss {__version__}: {_backend(trainer.accelerator.device)}{loss}; lm_head {self._plan()}; "
            f"{trainer._zero_advantage.says(theirs, trainer._why_trls_call())}.",
        )

    def _plan(self) -> str:
        args, head = self.trainer.args, self.head
        plan = options(args).lm_head_plan
        theirs = "lm_head_plan='trl'" if plan == "trl" else self.trainer._why_trls_call() or compat.why_no_lm_head()
        if theirs is not None:
            return f"TRL's own ({theirs})"
        if head is None:
            return "plan not known (the model has no output embeddings)"
        B, T = args.per_device_train_batch_size, self.trainer.max_completion_length or 1
        with FakeTensorMode():  # tiles depend on the device, which a meta tensor does not have
            hidden = torch.empty(B, T, head.D, dtype=head.dtype, device=head.device)
            weight = torch.empty(head.V, head.D, dtype=head.dtype, device=head.device)
            hidden.requires_grad_()
            weight.requires_grad_(head.gradients > 1)
            lm_head = self.trainer._lm_head()
            if plan != "auto":  # it need not fit the largest possible micro-batch; actual ones may be smaller
                lm_head.memory_budget = None
            report = lm_head.explain(hidden, weight)
        self._tile_bytes = report.tile_bytes
        return (
            f"plan {report.plan} ({report.why.partition(';')[0]}) with up to {B} x {T} tokens, {head.V:,} x {head.D:,} "
            f"{str(head.dtype).removeprefix('torch.')}"
        )

    @contextlib.contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Context for the forward and backward of a micro-batch. One small gather over processes per optimizer step."""
        before = self.trainer._zero_advantage.without_backward
        with contextlib.ExitStack() as self._stack:
            yield
        self._stack = None
        if self._counter is None:  # the loss is TRL's own
            return
        if not self._held:
            self._held = self._tile_bytes  # a compiled call reports no plan; its plan is "recompute"
        without = self.trainer._zero_advantage.without_backward - before
        self._cost = self._cost.plus(
            Cost(flop=sum(self._counter.flop.values()), without_backward=without, held=self._held)
        )
        self._counter = None
        if self.trainer.accelerator.sync_gradients:
            self._end_step()

    def _end_step(self) -> None:
        # Filled on the device: a copy from the host would synchronise.
        numbers = [torch.full((), float(x), dtype=torch.float64, device=self.trainer.accelerator.device)
                   for x in self._cost]  # fmt: skip
        found = self.trainer.accelerator.gather(torch.stack(numbers).unsqueeze(0))
        if self._window is not None:
            found = torch.cat([self._window[:, :4] + found[:, :4], self._window[:, 4:].maximum(found[:, 4:])], dim=1)
        self._window, self._cost = found, Cost()
        live, counted = self._step_tokens
        self._live, self._tokens, self._window_tokens = (
            self._live + live, self._tokens + counted, self._window_tokens + counted,
        )  # fmt: skip
        self._step_tokens = (0.0, 0.0)

    def loss_begins(self, completion_ids: Tensor) -> None:
        """Start counting a micro-batch. Only the shape of completion_ids [B, T] is read."""
        if self._stack is None:
            return
        self._counter, self._held = self._stack.enter_context(count_products()), 0
        B, T = completion_ids.shape
        self._cost = self._cost.plus(Cost(completions=B))
        self.head = self.head or _head(self.trainer)
        if self.head is not None:
            plain = B * T * self.head.flop * (1 + self.head.gradients)
            self._cost = self._cost.plus(Cost(plain_flop=plain, plain_held=B * T * self.head.V * PLAIN_BYTES))

    def saw(self, report: PlanReport) -> None:
        """Take the report of one call of the lm_head."""
        if self._counter is not None:
            self._held = max(self._held, report.tile_bytes, report.extra_bytes if report.plan in HOLD_LOGITS else 0)

    def tokens(self, live: float, counted: float) -> None:
        """Take the live tokens and the tokens that count of a micro-batch, summed over all processes."""
        if self._counter is not None:
            self._step_tokens = (self._step_tokens[0] + live, self._step_tokens[1] + counted)

    def log(self, metrics: dict[str, list[float]]) -> None:
        """Add the numbers since the last log to `metrics`."""
        window, tokens = self._take_window(), self._window_tokens
        self._window_tokens = 0.0
        self._run = self._run.plus(window)
        if window.flop == 0.0 or tokens == 0.0 or self.head is None:  # the lm_head was TRL's
            return
        unit = tokens * self.head.flop
        metrics["rlloss/products"] = [window.flop / unit]
        metrics["rlloss/products_plain"] = [window.plain_flop / unit]
        metrics["rlloss/logits_mib_avoided"] = [(window.plain_held - window.held) / MIB]

    def _take_window(self) -> Cost:
        if self._window is None:
            return Cost()
        found = Cost()
        for of_process in self._window.tolist():
            found = found.plus(Cost(*of_process))
        self._window = None
        return found

    def on_train_end(self, args, state, control, **kwargs):
        run = self._run.plus(self._take_window())
        if self._tokens == 0.0:  # the loss was TRL's own
            return
        parts = [f"{100 * self._live / self._tokens:.0f} % of {self._tokens:,.0f} tokens had a gradient"]
        if run.flop > 0.0 and self.head is not None:
            unit = self._tokens * self.head.flop
            parts.append(
                f"{run.flop / unit:.3g} lm_head products a token instead of {run.plain_flop / unit:.3g} (plain logits, "
                "padding included)"
            )
        parts.append(f"{run.without_backward:,.0f} of {run.completions:,.0f} completions ran without a backward")
        if run.flop > 0.0:
            parts.append(
                f"at most {run.held / MIB:.3g} MiB of logits at a time instead of {run.plain_held / MIB:.3g} MiB"
            )
        report = f"`rlloss report {args.output_dir}`"
        written = options(args).token_log_steps > 0
        say(args, f"rlloss: {'; '.join(parts)}. Next: {report if written else f'token_log_steps=20, then {report}'}.")


def _head(trainer: Any) -> Head | None:
    """The trainer's lm_head. None: the model has no output embeddings."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None:
        return None
    shape = tuple(weight.shape)
    if len(shape) != 2 or 0 in shape:  # sharded by ZeRO-3 or FSDP
        text = model.config.get_text_config()
        shape = (text.vocab_size, text.hidden_size)
    others = any(p.requires_grad for p in model.parameters() if p is not weight)
    return Head(*shape, int(others) + int(weight.requires_grad), weight.dtype, trainer.accelerator.device)


def _backend(device: torch.device) -> str:
    name = backends.choose_backend(torch.empty(0, device=device))
    if os.environ.get("RLLOSS_BACKEND") == name:
        why = "RLLOSS_BACKEND"
    elif name == "interpreter" or (device.type == "cuda" and os.environ.get("TRITON_INTERPRET") == "1"):
        why = "TRITON_INTERPRET=1"
    elif name == "triton":
        why = f"on {device.type}"
    elif backends.triton is None:
        why = "Triton is not installed"
    else:
        why = f"the model is on the {device.type}" if torch.cuda.is_available() else "no CUDA device"
    return f"{name} backend ({why})"
