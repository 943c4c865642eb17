"""`linear_token_stats` computes log-probability, entropy and lse from hidden states, without [N, V] logits."""

from typing import Any

from torch import Tensor

from rlloss.lm_head.call import Expected, HeadInputs, head_options, prepare
from rlloss.logits.statistics import TokenStats, check_outputs


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
    """Compute `token_stats` of the logits `hidden @ weight.T + bias`, which never exist as a whole.

    The forward runs products for rows that count, the backward for rows with a nonzero incoming gradient; other rows
    cost nothing. Logits and sums are fp32 even if the model is bf16. Gradients are added up in fp32 and rounded once.
    The same rows give the same bits of logp under every plan, with and without gradient. A second derivative or a
    torch.func transform raises. A CPU with bf16 units runs bf16 products in them. torch has one such setting for the
    process, so an fp32 product that another thread runs at the same moment is rounded too.

    Args:
        hidden: `[..., D]`, bf16, fp16, fp32 or fp64 (fp64: torch backend). fp16 needs a loss scale, as from
            `torch.amp.GradScaler`: on a GPU the gradients of logits are fp16 too, and without it most underflow.
        weight: `[V, D]`, tied to the embedding or not. Without `requires_grad` no product runs for its gradient. If
            hidden and weight differ in dtype, the wider one is used; under autocast, autocast's.
        target: `[...]`, int64 or int32 with 0 <= target < V where `mask` is True.
        bias: `[V]`, or None.
        mask: `[...]` bool, True: the row counts. Masked rows are in no product; their outputs and gradients are 0.
        temperature, softcap, logit_scale, outputs, entropy_grad: as for `token_stats`.
        plan: "recompute" computes the logits of rows with a gradient again: 1 + 3r products for a share r of live rows,
            one tile of memory. "keep" holds the logits of the rows that count until the backward, which releases them:
            1 + 2r products. With a weight and bias that are not trained, these are 1 + 2r and 1 + r, and "jacobian"
            holds d logp / d hidden of the rows that count: 2 products for any r. (A gradient of the entropy or lse then
            computes the logits again.) Of the plans that fit the budget and cost at most a tenth more than the cheapest
            of them, "auto" takes the one that holds least; "jacobian" only if neither an entropy with gradient nor lse
            is requested, and "recompute" under torch.compile. Ask for "recompute" inside a checkpointed region, where
            what is held would stay. See `explain_plan`.
        memory_budget: bytes that a plan may hold beyond inputs, gradients and one tile, or a size such as "1GiB".
            None: a third of what plain logits would hold, 4 V bytes a row, but at most a sixteenth of the GPU's memory
            (2 GiB on a CPU); and 2 V D, half an fp32 gradient of the weight.
        batch_invariant: make the bits of a row's logp independent of the rows around it. Tiles are padded, so small
            batches take longer.
        vocab_group: process group over which the vocabulary is split. weight and bias hold this rank's entries, in the
            order of the ranks. All other arguments are the same on every rank; target indexes the whole vocabulary.
            Every rank gets the merged statistics and the summed gradient of hidden.
        static_capacity: (rows, live), the fixed numbers of rows that count and of rows with a gradient. Products run
            for these numbers whatever the mask is. Shapes are then fixed, nothing is read back from the device (no host
            sync), and the call can be captured in a CUDA graph. If more rows count, the extra rows and every gradient
            are NaN. If more rows get a gradient, every gradient is NaN. A CPU raises in both cases.

    Returns:
        `TokenStats`, with tensors shaped like `target`, fp32 (fp64 for fp64), in nats.

    Raises:
        ValueError, TypeError: an argument does not fit; the error names it. A target out of range raises on a CPU, and
            on a GPU with RLLOSS_CHECK=1, which synchronises. Without it the row becomes NaN on a GPU.
    """
    options = head_options(plan, memory_budget, batch_invariant, vocab_group, static_capacity)
    inputs = HeadInputs(hidden, weight, target, bias, mask, temperature, softcap, logit_scale)
    check_outputs(outputs, entropy_grad)
    expected = Expected(logp_alone="lse" not in outputs and not entropy_grad)
    return prepare(inputs, options, expected).stats(outputs, entropy_grad)
