"""linear_token_stats: from hidden states to log-probability, entropy and lse, without [N, V] logits."""

from typing import Any

from torch import Tensor

from rlloss.lm_head.call import HeadInputs, head_options, prepare
from rlloss.logits.statistics import TokenStats


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("logp", "entropy", "lse"),
    entropy_grad: bool = False,
    plan: str = "auto",
    memory_budget: int | str | None = None,
    batch_invariant: bool = False,
    vocab_group: Any = None,
    static_capacity: tuple[int, int] | None = None,
) -> TokenStats:
    """`token_stats` of the logits `hidden @ weight.T + bias`, which are never there as a whole.

    Products are run for rows that count, in the forward, and for rows with a nonzero incoming gradient, in the
    backward; the others cost nothing. Logits and sums are fp32 also where the model is bf16; the gradients are added up
    in fp32 and rounded once. The same rows give the same bits of logp whatever the plan, with and without gradient.
    There is no second derivative, and no torch.func transform. On a CPU with bf16 units bf16 products run in them,
    which torch sets for the process: an fp32 product that another thread runs in that moment is rounded as well.

    Args:
        hidden: `[..., D]`, bf16, fp16, fp32 or fp64 (fp64: torch backend). fp16 needs a loss scale, as
            `torch.amp.GradScaler` gives it: on a GPU the gradients of logits are fp16 too, and without one most of them
            underflow.
        weight: `[V, D]`, tied to the embedding or not; without `requires_grad` no product is run for its gradient. Of
            two dtypes the wider one is taken; under autocast, autocast's.
        target: `[...]`, int64 or int32 with 0 <= target < V where `mask` is True.
        bias: `[V]`, or None.
        mask: `[...]` bool, True = counts. Masked rows take part in no product, give 0 and have a zero gradient.
        temperature, softcap, logit_scale, outputs, entropy_grad: as for `token_stats`.
        plan: "recompute": logits are computed again for the rows with a gradient; 1 + 3r products for a share r of live
            rows, one tile of memory. "keep": the logits of the rows that count are held until the backward, which
            releases them; 1 + 2r products. "auto": the latter where it fits the budget. Under torch.compile
            "recompute". Inside a checkpointed region ask for "recompute": what is kept would stay. Look at
            `explain_plan`.
        memory_budget: bytes that a plan may hold above one tile, also as a size such as "1GiB". None: 2 V D, half an
            fp32 gradient of the weight; D / 2 rows fit.
        batch_invariant: the bits of a row's logp do not depend on the rows around it; padding to full tiles makes
            small batches dearer.
        vocab_group: process group over which the vocabulary is split: weight, and bias, are this rank's entries, in the
            order of the ranks; everything else is the same on every rank, target counts over the whole vocabulary.
            Statistics are merged and the gradient of hidden is added up over the group: every rank gets the whole.
        static_capacity: (rows, live), room for so many rows that count and so many with a gradient. Products are run
            for these numbers, whatever is in the mask; shapes are then fixed, nothing is read back from the device (no
            host sync) and the call fits a CUDA graph. Where more count than there is room for, those are NaN, and
            every gradient; where more get a gradient, every gradient is NaN. On a CPU either raises.

    Returns:
        `TokenStats`, its tensors shaped like `target`, fp32 (fp64 for fp64), in nats.

    Raises:
        ValueError, TypeError: an argument does not fit; it is named. A target out of range raises on CPU (on a GPU
            with RLLOSS_CHECK=1, which synchronises) and makes its own row NaN on a GPU.
    """
    options = head_options(plan, memory_budget, batch_invariant, vocab_group, static_capacity)
    inputs = HeadInputs(hidden, weight, target, bias, mask, temperature, softcap, logit_scale)
    return prepare(inputs, options).stats(outputs, entropy_grad)
