"""TRL's own trainers on rlloss's lm_head.

    from rlloss.integrations.trl import patch_trl

    with patch_trl():
        trainer.train()

TRL's GRPO, RLOO, DPO, KTO, SFT and AsyncGRPO trainers call one function between the backbone and their loss: hidden
states and the lm_head's weight in, statistics of each token out (`add_fused_lm_head`). Inside the patch that function
is rlloss's: the same outputs and gradients, with no product in the backward for tokens whose gradient is zero.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from rlloss import checks
from rlloss.integrations.trl import compat
from rlloss.lm_head.call import HeadInputs, HeadOptions, prepare
from rlloss.lm_head.plans import PlanReport

PLANS = ("auto", "recompute", "keep")
# TRL's name of an output -> ours, in the order in which TRL unpacks them.
OUTPUTS = {
    "log_probs": "logp", "entropy": "entropy", "log_sum_sq_probs": "log_sum_sq_probs", "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}  # fmt: skip


_temperatures: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("temperatures", default=None)


@contextlib.contextmanager
def token_temperatures(temperatures: Tensor) -> Iterator[None]:
    """Inside, the patched head divides the logits of each row by its own temperature [N], in the place of TRL's one."""
    token = _temperatures.set(temperatures)
    try:
        yield
    finally:
        _temperatures.reset(token)


class LmHead:
    """Takes the place of TRL's autograd.Function."""

    def __init__(self, plan: str, memory_budget: int | None, batch_invariant: bool):
        self.plan, self.memory_budget, self.batch_invariant = plan, memory_budget, batch_invariant
        self.on_call: Callable[[PlanReport], None] | None = None
        """Called with the plan of every call that is not compiled."""

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(OUTPUTS),
    ) -> tuple[Tensor | None, ...]:
        """hidden [N, D], weight [V, D], bias [V], targets [N] -> a tensor [N] per output of OUTPUTS, or None."""
        per_row, weight, bias = _temperatures.get(), _whole(weight), _whole(bias)
        inputs = HeadInputs(
            hidden, weight, targets, bias, None, temperature if per_row is None else per_row, final_logit_softcapping,
            logit_scale,
        )  # fmt: skip
        options = HeadOptions(self.plan, self.memory_budget, self.batch_invariant)
        # Looked up in the backward again, where an engine that shards the weight has taken it apart.
        call = prepare(inputs, options, gather=lambda: compat.utils.maybe_gather_lm_head_ctx(weight, bias))  # type: ignore[arg-type]
        if call.report is not None and self.on_call is not None:
            self.on_call(call.report)
        if not torch.is_autocast_enabled(hidden.device.type):
            # As TRL has it: an fp32 head of a bf16 model is run in bf16, unless cast_lm_head_to_fp32 made hidden fp32.
            call = call._replace(settings=call.settings._replace(compute_dtype=hidden.dtype))
        wanted = tuple(ours for theirs, ours in OUTPUTS.items() if theirs in outputs or theirs == "log_probs")
        # Where the entropy is only logged, no gradient comes in for it, and none is computed.
        stats = call.stats(wanted, entropy_grad="entropy" in outputs)
        return tuple(getattr(stats, ours) for ours in OUTPUTS.values())


def _whole(x: Any) -> Any:
    """A head that FSDP2 shards in a group of its own, gathered. Its gradient is the mean over the ranks, as that of
    every other parameter under FSDP; that of TRL's `full_tensor()` is of this rank's tokens alone."""
    if not isinstance(x, DTensor):
        return x
    return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)


class _NoTensor:
    """In the place of DTensor: nothing is one, so that a sharded head comes here as it is."""


class Patch:
    """A patch in force; `undo()` ends it, as does the end of a `with` block. Ending it twice does nothing."""

    def __init__(self, head: LmHead):
        self.head = head

    def undo(self) -> None:
        _patches[:] = [p for p in _patches if p is not self]
        _install()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_) -> None:
        self.undo()


_patches: list[Patch] = []
_trls: dict[str, Any] = {}


def _install() -> None:
    """Put the youngest patch in force into TRL, or TRL's own names back."""
    if _patches:
        if not _trls:
            # TRL 1.15 has no `_use_triton` here and leaves masked tokens out on every device.
            _trls.update({n: getattr(compat.utils, n) for n in compat.REPLACED if hasattr(compat.utils, n)})
        ours: dict[str, Any] = dict(zip(compat.REPLACED, (_patches[-1].head, _everywhere, _NoTensor), strict=True))
        for name in _trls:
            setattr(compat.utils, name, ours[name])
    else:
        while _trls:
            setattr(compat.utils, *_trls.popitem())


def _everywhere(device: torch.device) -> bool:
    """Whether only tokens that count reach the lm_head. In trl.trainer.utils nothing else asks for Triton."""
    return True


def patch_trl(*, plan: str = "auto", memory_budget: int | str | None = None, batch_invariant: bool = False) -> Patch:
    """Let TRL's trainers run their lm_head on rlloss: `patch_trl()`, until `.undo()`, or `with patch_trl():`.

    It takes effect on models that TRL prepared before it as well. A patch inside another is the one that counts until
    it ends. What is done in forward and backward is what the patch in force at the forward says.

    Labels are checked: one that is neither -100 nor in the vocabulary raises on a CPU and is NaN on a GPU.

    Args:
        plan: "recompute", "keep" or "auto", as for `linear_token_stats`.
        memory_budget: bytes for kept logits, also as a size such as "1GiB"; None: 2 V D.
        batch_invariant: the bits of a token's log-probability do not depend on its batch.

    Raises:
        RuntimeError: TRL (named with its version) has no fused lm_head to patch.
        ValueError: an option does not fit.
    """
    checks.one_of("plan", plan, PLANS)
    budget = checks.memory_budget("memory_budget", memory_budget)
    checks.flag("batch_invariant", batch_invariant)
    if (reason := compat.why_no_lm_head()) is not None:
        raise RuntimeError(f"patch_trl: {reason}")
    patch = Patch(LmHead(plan, budget, batch_invariant))
    _patches.append(patch)
    _install()
    return patch
