"""A causal LM of transformers and a training loop of your own.

    from transformers import AutoModelForCausalLM
    from rlloss import LinearGRPOLoss
    from rlloss.integrations.transformers.lm_head import completion_inputs

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
    # ids [B, prompt + T] and attention_mask like it, mask [B, T] (True: a token that counts), advantage [B]
    inputs = completion_inputs(model, ids, attention_mask, completion_length=mask.shape[1])
    loss, metrics = LinearGRPOLoss()(**inputs, advantage=advantage, mask=mask)
    loss.backward()

`inputs` holds the hidden states and targets of the completion and what the model does from there to its logits: weight,
bias, softcap, logit_scale. The logits themselves are never made. The same inputs give log-probabilities without a loss:

    with torch.no_grad():
        inputs = completion_inputs(model, ids, attention_mask, completion_length=mask.shape[1])
        old_logp = linear_token_stats(**inputs, mask=mask).logp

Under DDP, FSDP and whatever else works by hooks on the forward of the module that it wraps, the lm_head has to be run
inside that forward: wrap `CausalLMWithLoss(model, loss)` and not the model. Losses of mixtures of experts that balance
the load are not part of this.
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

# Where configs say what follows the product with the head. The first that is there counts.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
MULTIPLIES = ("hyperclovax",)  # elsewhere logits_scaling is what logits are divided by
INSIDE = "; wrap CausalLMWithLoss(model, loss) instead, whose forward runs the lm_head too"


def unwrapped(model: Any) -> Any:
    """The transformers model inside DDP, torch.compile and PEFT.

    Raises ValueError for DDP while gradients are recorded: they would not be averaged over the ranks.
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
    """The model without its lm_head: input_ids -> `.last_hidden_state` [B, L, D]."""
    whole = unwrapped(model)
    backbone = getattr(whole, "base_model", whole)
    if backbone is whole or getattr(getattr(whole, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"model: found {type(whole).__name__}, expected a decoder-only causal LM of transformers")
    return backbone


def lm_head_of(model: nn.Module) -> dict[str, Any]:
    """{weight [V, D], bias [V] or None, softcap, logit_scale}: arguments of `linear_token_stats` and `LinearGRPOLoss`.

    Logits are softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap). The weight is the parameter itself,
    tied to the embedding where the model ties it. The numbers are read from the model's config; `check_lm_head` says
    whether that is all the model does.

    Raises:
        ValueError: the head is none, or not a plain `nn.Linear`: quantised, with an adapter (LoRA on "lm_head": its
            share of the logits would be left out; with PEFT's `modules_to_save` the head works), with tokens trained by
            themselves (PEFT's `trainable_token_indices`, which tied embeddings pass on to the head), or sharded.
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
    """The nn.Linear that is the head, where it is one, PEFT's copy of it that is trained, or what an adapter leaves."""
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
    """Run the backbone; what `linear_token_stats` and `LinearGRPOLoss` need to score the last tokens.

    Args:
        model: a causal LM of transformers, with PEFT adapters or without.
        input_ids: `[B, L]` int64, prompt and completion.
        attention_mask: `[B, L]`, as the model takes it, or None.
        completion_length: T, 1 <= T < L: the last T tokens are scored.
        backbone_inputs: whatever else the backbone takes, such as position_ids.

    Returns:
        {hidden `[B, T, D]`: the states that predict these tokens, target `[B, T]`: the tokens, and weight, bias,
        softcap, logit_scale of `lm_head_of`}, on the device of the head.

    Raises:
        ValueError: as `lm_head_of` and `unwrapped`, or completion_length does not fit.
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
    """A causal LM and its loss as one module, for DDP, FSDP, Accelerate and torch.compile to wrap.

        wrapped = DistributedDataParallel(CausalLMWithLoss(model, LinearGRPOLoss()))
        with torch.no_grad():
            old_logp = wrapped(ids, attention_mask, mask=mask).logp
        loss, metrics = wrapped(ids, attention_mask, mask=mask, advantage=advantage, old_logp=old_logp)
        loss.backward()

    Its forward runs the backbone and the lm_head, so that hooks fire: gradients are averaged, and shards gathered. With
    FSDP2 call `fully_shard` on the layers and on this module, but not on the lm_head. Averages of ranks are those
    of the loss of all where the `denominator` is the global one divided by the number of ranks. Generate and save with
    `.model`.
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
        """input_ids and attention_mask `[B, L]`, mask `[B, T]` (bool) of the last T tokens.

        With advantage `[B]` or `[B, T]`: what the loss returns, `options` being its own (old_logp, temperature, ...).
        Without: `TokenStats` of these tokens, `options` being those of `linear_token_stats`.
        """
        inputs = completion_inputs(
            self.model, input_ids, attention_mask, completion_length=mask.shape[1], **(backbone_inputs or {})
        )
        if advantage is None:
            return linear_token_stats(**inputs, mask=mask, **{"outputs": ("logp", "entropy"), **options})
        return self.loss(**inputs, advantage=advantage, mask=mask, **options)


@torch.no_grad()
def check_lm_head(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """Raise ValueError unless `completion_inputs` leads to the model's own log-probabilities on this batch `[B, L]`.

    Once before training a new architecture: what some models do to their logits stands in no config. Dropout is to be
    off. Differences within the rounding of the model's dtype pass.
    """
    T = input_ids.shape[1] - 1
    ours = linear_token_stats(**completion_inputs(model, input_ids, attention_mask, completion_length=T)).logp
    assert ours is not None
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    rounding = max(torch.finfo(logits.dtype).eps, 2**-11)  # that of a product in TF32 at least
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
