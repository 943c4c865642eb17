"""Run the lm_head of TRL's own trainers with rlloss::

    from rlloss.integrations.trl import patch_trl

    with patch_trl():
        trainer.train()

TRL's GRPO, RLOO, DPO, KTO, SFT and AsyncGRPO trainers call one function between the backbone and their loss
(`add_fused_lm_head`). It maps hidden states and the lm_head's weight to statistics of each token. The patch replaces it
by rlloss's. Outputs and gradients are the same, and the backward computes no product for tokens with zero gradient.
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
from rlloss.lm_head.call import Expected, HeadInputs, HeadOptions, choose, prepare
from rlloss.lm_head.plans import PlanReport

PLANS = ("auto", "recompute", "keep", "jacobian")
# TRL's name of an output -> rlloss's name, in the order in which TRL unpacks them.
OUTPUTS = {
    "log_probs": "logp", "entropy": "entropy", "log_sum_sq_probs": "log_sum_sq_probs", "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}  # fmt: skip


_temperatures: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("temperatures", default=None)


@contextlib.contextmanager
def token_temperatures(temperatures: Tensor) -> Iterator[None]:
    """Inside, the patched head divides the logits of each row by its own temperature [N], not by TRL's scalar."""
    token = _temperatures.set(temperatures)
    try:
        yield
    finally:
        _temperatures.reset(token)


class LmHead:
    """Replaces TRL's autograd.Function."""

    def __init__(
        self, plan: str, memory_budget: int | None, batch_invariant: bool, live_share: float = 1.0, bonus: bool = False
    ):
        """live_share is the share of the tokens that is expected to get a gradient. bonus tells whether the entropy
        gets one."""
        self.plan, self.memory_budget, self.batch_invariant = plan, memory_budget, batch_invariant
        self.live_share, self.bonus = live_share, bonus
        self.on_call: Callable[[PlanReport], None] | None = None
        """Called with the plan of every call outside torch.compile."""

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
        """Map hidden [N, D], weight [V, D], bias [V], targets [N] to one tensor [N], or None, per entry of OUTPUTS."""
        per_row, weight, bias = _temperatures.get(), _whole(weight), _whole(bias)
        inputs = HeadInputs(
            hidden, weight, targets, bias, None, temperature if per_row is None else per_row, final_logit_softcapping,
            logit_scale,
        )  # fmt: skip
        # The backward gathers again: an engine that shards the weight has released it since the forward.
        call = prepare(
            inputs, *self._how(), gather=lambda: compat.utils.maybe_gather_lm_head_ctx(weight, bias)  # type: ignore[arg-type]
        )  # fmt: skip
        if call.report is not None and self.on_call is not None:
            self.on_call(call.report)
        if not torch.is_autocast_enabled(hidden.device.type):
            # As in TRL: an fp32 head of a bf16 model runs in bf16, unless cast_lm_head_to_fp32 made hidden fp32.
            call = call._replace(settings=call.settings._replace(compute_dtype=hidden.dtype))
        wanted = tuple(ours for theirs, ours in OUTPUTS.items() if theirs in outputs or theirs == "log_probs")
        # If the entropy is only logged, it gets no gradient, and none is computed.
        stats = call.stats(wanted, entropy_grad="entropy" in outputs)
        if stats.entropy is not None and stats.entropy.requires_grad and not torch.compiler.is_compiling():
            stats.entropy.register_hook(self._saw_gradient_of_entropy)
        return tuple(getattr(stats, ours) for ours in OUTPUTS.values())

    def _how(self) -> tuple[HeadOptions, Expected]:
        return (
            HeadOptions(self.plan, self.memory_budget, self.batch_invariant),
            Expected(live_share=self.live_share, logp_alone=not self.bonus),
        )

    def explain(self, hidden: Tensor, weight: Tensor) -> PlanReport:
        """Return the plan of a call with tensors [N, D] and [V, D], of which only the shapes matter."""
        inputs = HeadInputs(hidden, weight, hidden[..., 0])
        return choose(inputs, (weight.shape[0], weight.shape[1]), *self._how(), None)[0]

    def _saw_gradient_of_entropy(self, gradient: Tensor | None) -> None:
        # TRL asks for the entropy whether its loss uses it or not. If it does, "jacobian" saves nothing from now on.
        self.bonus = self.bonus or gradient is not None


def _whole(x: Any) -> Any:
    """Gather a head that FSDP2 shards in a group of its own. Its gradient is the mean over the ranks, as for every
    other parameter under FSDP. (With TRL's `full_tensor()` it covers the tokens of this rank only.)"""
    if not isinstance(x, DTensor):
        return x
    return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)


class _NoTensor:
    """Replaces DTensor in TRL. No tensor is an instance, so a sharded head reaches `LmHead` without a gather."""


class Patch:
    """An active patch. `undo()`, or the end of a `with` block, removes it. Removing it twice has no effect."""

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
    """Install the newest active patch in TRL. Without one, restore TRL's own names."""
    if _patches:
        if not _trls:
            # TRL 1.15 has no `_use_triton` and leaves masked tokens out on every device.
            _trls.update({n: getattr(compat.utils, n) for n in compat.REPLACED if hasattr(compat.utils, n)})
        ours: dict[str, Any] = dict(zip(compat.REPLACED, (_patches[-1].head, _everywhere, _NoTensor), strict=True))
        for name in _trls:
            setattr(compat.utils, name, ours[name])
    else:
        while _trls:
            setattr(compat.utils, *_trls.popitem())


def _everywhere(device: torch.device) -> bool:
    """Replaces `_use_triton`: only tokens that count reach the lm_head. trl.trainer.utils uses it for nothing else."""
    return True


def patch_trl(
    *,
    plan: str = "auto",
    memory_budget: int | str | None = None,
    batch_invariant: bool = False,
    live_share: float = 1.0,
) -> Patch:
    """Make TRL's trainers run their lm_head with rlloss, until `.undo()` or the end of ``with patch_trl():``.

    The patch also affects models that TRL prepared before. If patches are nested, the inner one is active until it
    ends. The patch that is active in the forward also determines the backward.

    A label that is neither -100 nor in the vocabulary raises on a CPU and gives NaN on a GPU.

    Args:
        plan: "recompute", "keep", "jacobian" or "auto", as for `linear_token_stats`.
        memory_budget: bytes that a plan may hold, as a number or a size such as "1GiB"; as for `linear_token_stats`.
        batch_invariant: make the bits of a token's log-probability independent of its batch.
        live_share: share of the tokens that will get a gradient, such as TRL's `top_entropy_quantile`; "auto" plans
            with it.

    Returns:
        The `Patch`, which is also a context manager.

    Raises:
        RuntimeError: this TRL has no fused lm_head to patch. The message names its version.
        TypeError: an option has the wrong type.
        ValueError: an option has a wrong value.
    """
    checks.one_of("plan", plan, PLANS)
    budget = checks.memory_budget("memory_budget", memory_budget)
    checks.flag("batch_invariant", batch_invariant)
    checks.within("live_share", live_share, 0, 1)
    if (reason := compat.why_no_lm_head()) is not None:
        raise RuntimeError(f"patch_trl: {reason}")
    return patch_with(LmHead(plan, budget, batch_invariant, live_share))


def patch_with(head: LmHead) -> Patch:
    patch = Patch(head)
    _patches.append(patch)
    _install()
    return patch
