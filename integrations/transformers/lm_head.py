"""Run rlloss's loss on a causal LM of transformers in your own training loop::

    from transformers import AutoModelForCausalLM
    from rlloss import LinearGRPOLoss
    from rlloss.integrations.transformers.lm_head import completion_inputs

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
    # ids [B, prompt + T] and attention_mask like it, mask [B, T] (True: a token that counts), advantage [B]
    inputs = completion_inputs(model, ids, attention_mask, completion_length=mask.shape[1])
    loss, metrics = LinearGRPOLoss()(**inputs, advantage=advantage, mask=mask)
    loss.backward()

`inputs` holds the hidden states and the targets of the completion, and the parameters that lead from there to the
logits: weight, bias, softcap, logit_scale. The full logits are never stored. The same inputs give log-probabilities
without a loss::

    with torch.no_grad():
        inputs = completion_inputs(model, ids, attention_mask, completion_length=mask.shape[1])
        old_logp = linear_token_stats(**inputs, mask=mask).logp

DDP and FSDP work by hooks on the forward of the module that they wrap. The lm_head has to run inside that forward: wrap
`CausalLMWithLoss(model, loss)`, not the model. Load-balancing losses of mixtures of experts are not included.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rlloss import checks
from rlloss.lm_head.statistics import linear_token_stats
from rlloss.logits.statistics import TokenStats
from rlloss.losses.metrics import PolicyLoss
from rlloss.modules import LinearGRPOLoss

# Config entries that describe the steps after the product with the head. The first one that is set counts.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
MULTIPLIES = ("hyperclovax",)  # these multiply by logits_scaling; all others divide by it
INSIDE = "; wrap CausalLMWithLoss(model, loss) instead, whose forward runs the lm_head too"


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside DDP, torch.compile and PEFT.

    Raises:
        ValueError: the model is wrapped in DDP while gradients are enabled (they would not be averaged over the
            ranks) or in FullyShardedDataParallel, or it is a PEFT model with learned prompts.
    """
    while True:
        if isinstance(model, DistributedDataParallel):
            checks.require(
                not torch.is_grad_enabled(), "model", "DistributedDataParallel with gradients enabled",
                f"the module inside it: its hooks see only what runs in its own forward{INSIDE}",
            )  # fmt: skip
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif type(model).__name__ == "FullyShardedDataParallel":
            raise ValueError(f"model: found FullyShardedDataParallel, expected the module inside it{INSIDE}")
        elif hasattr(model, "active_peft_config"):
            checks.require(
                not model.active_peft_config.is_prompt_learning, "model", "a PEFT model with learned prompts",
                "adapters inside the model, since the backbone is called without the prompts",
            )  # fmt: skip
            model = model.get_base_model()
        else:
            return model


def backbone_of(model: nn.Module) -> nn.Module:
    """Return the model without its lm_head: a module from input_ids to `.last_hidden_state` `[B, L, D]`."""
    whole = unwrapped(model)
    backbone = getattr(whole, "base_model", whole)
    if backbone is whole or getattr(getattr(whole, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"model: found {type(whole).__name__}, expected a decoder-only causal LM of transformers")
    return backbone


def lm_head_of(model: nn.Module) -> dict[str, Any]:
    """Return the lm_head's part of the arguments of `linear_token_stats` and `LinearGRPOLoss`.

    The logits are ``softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``. `check_lm_head` tests whether
    the model computes nothing else.

    Returns:
        A dict: weight `[V, D]` (the parameter itself, also where it is tied to the embedding), bias `[V]` or None, and
        from the model's config softcap (float or None) and logit_scale (float).

    Raises:
        ValueError: there is no head, or it is not a whole, plain `nn.Linear`: quantised, sharded, with a LoRA adapter
            (its part of the logits would be missing), or with tokens that are trained separately (PEFT's
            `trainable_token_indices`, also on a tied embedding). A head in PEFT's `modules_to_save` works.
    """
    whole = unwrapped(model)
    head = _plain(whole.get_output_embeddings())
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):
        raise ValueError(
            "model: found an lm_head that is sharded (DTensor), expected it whole: leave it to the fully_shard of the "
            f"root module, without one of its own{INSIDE}"
        )
    if hasattr(weight, "ds_id"):
        raise ValueError("model: found an lm_head that DeepSpeed ZeRO-3 shards, expected it whole: ZeRO-2, or FSDP")
    config = whole.config.get_text_config()
    return {"weight": weight, "bias": bias, "softcap": _first(config, SOFTCAPS)[1], "logit_scale": _scale(config)}


def _plain(head: Any) -> nn.Linear:
    """The head as an nn.Linear: itself, PEFT's trained copy of it, or the layer under an adapter that is not active."""
    if hasattr(head, "modules_to_save"):
        active = [] if head.disable_adapters else head.active_adapters
        head = head.modules_to_save[active[0]] if active else head.original_module
    elif hasattr(head, "base_layer"):
        checks.require(
            head.disable_adapters or head.merged, "model", f"an adapter on the lm_head ({type(head).__name__})",
            'a plain head: leave "lm_head" (with ensure_weight_tying the embedding it is tied to) out of '
            "target_modules, or merge the adapter",
        )  # fmt: skip
        head = head.base_layer
    elif hasattr(head, "token_adapter"):
        checks.require(
            head.disable_adapters, "model",
            "an lm_head some of whose tokens PEFT trains by themselves (trainable_token_indices; on tied embeddings "
            "the head has them too)",
            'a plain head: train it whole (modules_to_save, for tied embeddings ["embed_tokens"] with '
            "ensure_weight_tying=True), or merge_and_unload() the adapter",
        )  # fmt: skip
        head = head.original_module
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        found = "no output embedding" if head is None else f"the output embedding {type(head).__name__}"
        raise ValueError(f"model: found {found}, expected a plain nn.Linear")
    return head


def _first(config: Any, names: tuple[str, ...]) -> tuple[str | None, float | None]:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"model.config.{name}: found {value!r}, expected a number or None")
            return name, float(value)
    return None, None


def _scale(config: Any) -> float:
    name, value = _first(config, SCALES)
    if value is None:
        return 1.0
    return 1.0 / value if name == "logits_scaling" and config.model_type not in MULTIPLIES else value


def completion_inputs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    completion_length: int,
    **backbone_inputs: Any,
) -> dict[str, Any]:
    """Run the backbone and return the inputs of `linear_token_stats` and `LinearGRPOLoss` for the last T tokens.

    Args:
        model: a causal LM of transformers, with or without PEFT adapters.
        input_ids: `[B, L]` int64, prompt and completion.
        attention_mask: `[B, L]`, passed on to the model, or None.
        completion_length: T, with 1 <= T < L. The last T tokens are scored.
        **backbone_inputs: further arguments of the backbone, such as position_ids.

    Returns:
        A dict with tensors on the device of the head: hidden `[B, T, D]`, the states that predict the tokens; target
        `[B, T]` int64, the tokens; and weight, bias, softcap and logit_scale as in `lm_head_of`.

    Raises:
        ValueError: completion_length does not fit, or an error of `lm_head_of` or `unwrapped`.
    """
    T, L = completion_length, input_ids.shape[1]
    checks.require(1 <= T < L, "completion_length", T, f"1 to {L - 1}, since the first of {L} tokens is given")
    head = lm_head_of(model)
    states = backbone_of(model)(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **backbone_inputs
    ).last_hidden_state
    device = head["weight"].device
    return {"hidden": states[:, -T - 1 : -1].to(device), "target": input_ids[:, -T:].to(device), **head}


class CausalLMWithLoss(nn.Module):
    """A causal LM and its loss as one module. Wrap it with DDP, FSDP, Accelerate or torch.compile::

        wrapped = DistributedDataParallel(CausalLMWithLoss(model, LinearGRPOLoss()))
        with torch.no_grad():
            old_logp = wrapped(ids, attention_mask, mask=mask).logp
        loss, metrics = wrapped(ids, attention_mask, mask=mask, advantage=advantage, old_logp=old_logp)
        loss.backward()

    The forward runs the backbone and the lm_head, so hooks fire: gradients are averaged and shards are gathered. With
    FSDP2 call `fully_shard` on the layers and on this module, but not on the lm_head. The average over ranks is the
    global loss if you pass `denominator`, the global divisor divided by the number of ranks. Use `.model` to generate
    and to save.

    Args:
        model: the causal LM.
        loss: a module that takes `completion_inputs`, such as `LinearGRPOLoss`. None: `LinearGRPOLoss()`.
    """

    def __init__(self, model: nn.Module, loss: nn.Module | None = None):
        super().__init__()
        self.model = model
        self.loss = LinearGRPOLoss() if loss is None else loss

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        mask: Tensor,
        advantage: Tensor | None = None,
        backbone_inputs: dict[str, Any] | None = None,
        **options: Any,
    ) -> PolicyLoss | TokenStats:
        """Compute the loss of the last T tokens, or without `advantage` their statistics.

        Args:
            input_ids: `[B, L]` int64, prompt and completion.
            attention_mask: `[B, L]`, or None.
            mask: `[B, T]` bool, True where a token of the completion counts.
            advantage: `[B]` or `[B, T]`, or None.
            backbone_inputs: further arguments of the backbone.
            **options: further arguments of the loss (old_logp, temperature, ...) or of `linear_token_stats`.

        Returns:
            The loss's result, or `TokenStats` if `advantage` is None.
        """
        inputs = completion_inputs(
            self.model, input_ids, attention_mask, completion_length=mask.shape[1], **(backbone_inputs or {})
        )
        if advantage is None:
            return linear_token_stats(**inputs, mask=mask, **{"outputs": ("logp", "entropy"), **options})
        return self.loss(**inputs, advantage=advantage, mask=mask, **options)


@torch.no_grad()
def check_lm_head(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """Check that `completion_inputs` leads to the model's own log-probabilities on a batch.

    Call it once before you train a new architecture: some models change their logits in ways that no config entry
    describes. Switch dropout off. Differences within the rounding of the model's dtype pass.

    Args:
        model: a causal LM of transformers.
        input_ids: `[B, L]` int64.
        attention_mask: `[B, L]`, or None.

    Raises:
        ValueError: the log-probabilities differ.
    """
    T = input_ids.shape[1] - 1
    ours = linear_token_stats(**completion_inputs(model, input_ids, attention_mask, completion_length=T)).logp
    assert ours is not None
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    rounding = max(torch.finfo(logits.dtype).eps, 2**-11)  # at least the rounding of a TF32 product
    logits = logits.float()
    theirs = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None].to(logits.device)).squeeze(-1)
    seen = torch.ones_like(theirs) if attention_mask is None else attention_mask[:, 1:].to(theirs)
    difference = (((theirs - ours.to(theirs)).abs() * seen).sum() / seen.sum().clamp(min=1)).item()
    allowed = 4 * rounding * logits.abs().max().item()
    checks.require(
        difference <= allowed, "model",
        f"log-probabilities that differ from its lm_head's by {difference:.2g} on average",
        f"at most {allowed:.2g}: {type(model).__name__} changes its logits in a way that lm_head_of does not know",
    )  # fmt: skip
