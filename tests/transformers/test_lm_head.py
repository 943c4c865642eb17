"""Test the loss on transformers models against the model's own logits, also with PEFT, DDP and FSDP."""

import copy
import inspect
import re
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from rlloss import LinearGRPOLoss, LossConfig, linear_token_stats, reference
from rlloss.integrations.transformers import lm_head as transformers_lm_head
from rlloss.integrations.transformers.lm_head import (
    CausalLMWithLoss,
    backbone_of,
    check_lm_head,
    completion_inputs,
    lm_head_of,
)
from rlloss.logits.statistics import TokenStats
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("on_torch")
V, T = 48, 5
COMMON = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
# Name: config entries, and the expected head.
MODELS = {
    "Qwen2": ({}, {}),
    "Llama": ({"tie_word_embeddings": True}, {}),
    "Gemma2": ({"head_dim": 8, "final_logit_softcapping": 2.0}, {"softcap": 2.0}),
    "Granite": ({"logits_scaling": 4.0}, {"logit_scale": 0.25}),
    "HyperCLOVAX": ({"logits_scaling": 4.0}, {"logit_scale": 4.0}),
    "Cohere": ({"logit_scale": 0.3}, {"logit_scale": 0.3}),
    "Phi": ({}, {}),
    "RecurrentGemma": (
        {"logits_soft_cap": 2.0, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
        {"softcap": 2.0},
    ),
}


def build(name="Qwen2", **options):
    torch.manual_seed(0)
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **MODELS[name][0], **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if (bias := model.get_output_embeddings().bias) is not None:
        nn.init.normal_(bias)
    return model


def batch(B=4, L=9, seed=0):
    """ids, attention mask with left padding, mask of the completion, advantage."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (B, L), generator=g)
    attention = (torch.arange(L) >= torch.arange(B)[:, None] % 3).long()
    mask = torch.arange(T) < torch.tensor([5, 3, 4, 2] * B)[:B, None]
    return ids, attention, mask, torch.linspace(-1, 1, B)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("name", MODELS)
def test_statistics_and_gradients_are_those_of_the_models_logits(name):
    model, (ids, attention, mask, _) = build(name), batch()
    head = lm_head_of(model)
    assert head["weight"] is model.get_output_embeddings().weight
    assert (head["bias"] is not None) == (name == "Phi")
    assert {"softcap": None, "logit_scale": 1.0, **MODELS[name][1]} == {k: head[k] for k in ("softcap", "logit_scale")}
    weights = torch.linspace(-1, 1, mask.numel()).view(mask.shape)

    logits = model(ids, attention_mask=attention).logits[:, -T - 1 : -1]
    expected = TokenStats(*reference.token_stats(logits, ids[:, -T:], temperature=0.7))
    loss = ((expected.logp + 0.3 * expected.entropy) * weights)[mask].sum()
    theirs = gradients(model, loss)
    inputs = completion_inputs(model, ids, attention, completion_length=T)
    found = linear_token_stats(**inputs, mask=mask, temperature=0.7, entropy_grad=True)
    ours = gradients(model, ((found.logp + 0.3 * found.entropy) * weights).sum())
    for a, b in ((found.logp, expected.logp), (found.entropy, expected.entropy), (found.lse, expected.lse)):
        torch.testing.assert_close(a[mask], b[mask], rtol=1e-5, atol=1e-5)
    assert_same(ours, theirs)


def test_the_example_of_the_docstring_runs(monkeypatch):
    ids, attention, mask, advantage = batch()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: build())
    names = {"ids": ids, "attention_mask": attention, "mask": mask, "advantage": advantage}
    names |= {"torch": torch, "linear_token_stats": linear_token_stats}
    blocks = re.findall(r"(?:^    .*\n|^\n)+", transformers_lm_head.__doc__, flags=re.MULTILINE)  # type: ignore
    code = [textwrap.dedent(block) for block in blocks if block.strip()]
    assert len(code) == 2
    for block in code:
        exec(block, names)
    assert names["loss"].requires_grad and names["model"].lm_head.weight.grad.abs().sum() > 0  # type: ignore
    assert names["old_logp"].shape == mask.shape  # type: ignore


def test_more_inputs_reach_the_backbone():
    model, (ids, attention, _, _) = build(), batch()
    positions = (attention.cumsum(-1) - 1).clamp(min=0) * 2
    inputs = completion_inputs(model, ids, attention, completion_length=T, position_ids=positions)
    expected = model.model(ids, attention_mask=attention, position_ids=positions).last_hidden_state[:, -T - 1 : -1]
    assert torch.equal(inputs["hidden"], expected) and torch.equal(inputs["target"], ids[:, -T:])
    with pytest.raises(ValueError, match="completion_length: found 9, expected 1 to 8"):
        completion_inputs(model, ids, completion_length=9)


def test_a_model_that_changes_its_logits_unseen_is_noticed():
    ids, attention, *_ = batch()
    model = build("Gemma2")
    for dtype in (torch.float32, torch.bfloat16):
        check_lm_head(model.to(dtype), ids, attention)
        check_lm_head(model, ids)
    model = build()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.1)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM changes its logits in a way that lm_head_of does not know"):
        check_lm_head(model, ids, attention)


class Adapter(nn.Module):
    """The attributes of a LoRA layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.disable_adapters, self.merged = base, False, False
        self.weight, self.bias = base.weight, base.bias


def test_a_head_that_is_not_plain_is_refused():
    model = build()
    plain = model.lm_head
    model.lm_head = Adapter(plain)
    with pytest.raises(ValueError, match=r'adapter on the lm_head \(Adapter\), expected a plain head: leave "lm_head"'):
        lm_head_of(model)
    model.lm_head.disable_adapters = True  # as for a reference model's log-probabilities
    assert lm_head_of(model)["weight"] is plain.weight

    class Quantised(nn.Linear):
        def forward(self, x):
            return x

    model.lm_head = Quantised(32, V)
    with pytest.raises(ValueError, match="the output embedding Quantised, expected a plain nn.Linear"):
        lm_head_of(model)
    with pytest.raises(ValueError, match="found no output embedding"):
        lm_head_of(build().model)
    with pytest.raises(ValueError, match="found Linear, expected a decoder-only causal LM of transformers"):
        backbone_of(nn.Linear(2, 2))
    model = build()
    model.config.logit_scale = "inv_sqrt_d_model"
    with pytest.raises(ValueError, match="model.config.logit_scale: found 'inv_sqrt_d_model'"):
        lm_head_of(model)
    model = build()
    model.lm_head.weight.ds_id = 7
    with pytest.raises(ValueError, match="ZeRO-3"):
        lm_head_of(model)


@pytest.mark.parametrize("targets, trained", [("q_proj", None), ("q_proj", ["lm_head"]), ("lm_head", None)])
def test_peft(targets, trained):
    peft = pytest.importorskip("peft")
    model, (ids, attention, mask, _) = build(), batch()
    plain = model.lm_head.weight
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=[targets], modules_to_save=trained, r=4))
    if targets == "lm_head":
        with pytest.raises(ValueError, match="an adapter on the lm_head"):
            lm_head_of(model)
        with model.disable_adapter():
            check_lm_head(model, ids, attention)
        return
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    check_lm_head(model, ids, attention)
    assert (lm_head_of(model)["weight"] is plain) == (trained is None)
    with model.disable_adapter():
        assert torch.equal(lm_head_of(model)["weight"], plain)
        check_lm_head(model, ids, attention)
    logits = model(ids, attention_mask=attention).logits[:, -T - 1 : -1]
    theirs = gradients(model, reference.token_stats(logits, ids[:, -T:])[0][mask].sum())
    inputs = completion_inputs(model, ids, attention, completion_length=T)
    assert_same(gradients(model, linear_token_stats(**inputs, mask=mask).logp.sum()), theirs)


@pytest.mark.parametrize(
    "tied, tokens", [(True, [2, 3]), (True, {"embed_tokens": [2, 3]}), (False, {"lm_head": [2, 3]})]
)
def test_a_head_with_tokens_that_peft_trains_by_themselves(tied, tokens):
    """The workaround in the error message works, and so does the model without its adapter."""
    peft = pytest.importorskip("peft")
    model, (ids, attention, _, _) = build(tie_word_embeddings=tied), batch()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=tokens))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    message = r"model: found an lm_head .*\(trainable_token_indices.*expected a plain head: .*merge_and_unload\(\)"
    with pytest.raises(ValueError, match=message):
        lm_head_of(model)
    with model.disable_adapter():
        check_lm_head(model, ids, attention)
    check_lm_head(model.merge_and_unload(), ids, attention)
    whole = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ) if tied else peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])  # fmt: skip
    check_lm_head(peft.get_peft_model(build(tie_word_embeddings=tied), whole), ids, attention)


def test_learned_prompts_are_refused():
    prompts = nn.Module()
    prompts.active_peft_config = SimpleNamespace(is_prompt_learning=True)
    with pytest.raises(ValueError, match="a PEFT model with learned prompts"):
        lm_head_of(prompts)


def test_the_wrapper_is_backbone_and_loss():
    model, (ids, attention, mask, advantage) = build(), batch()
    module = CausalLMWithLoss(model, LinearGRPOLoss(LossConfig(entropy_coef=0.1)))
    inputs = completion_inputs(model, ids, attention, completion_length=T)
    with torch.no_grad():
        scored = module(ids, attention, mask=mask, temperature=0.7)
        assert torch.equal(scored.logp, linear_token_stats(**inputs, mask=mask, temperature=0.7).logp)
        assert scored.entropy is not None and scored.lse is None
    options = {"old_logp": scored.logp + 0.1, "temperature": 0.7, "denominator": 17.0}
    found = module(ids, attention, mask=mask, advantage=advantage, **options)
    expected = module.loss(**inputs, mask=mask, advantage=advantage, **options)
    assert torch.equal(found.loss, expected.loss)
    assert isinstance(CausalLMWithLoss(model).loss, LinearGRPOLoss)
    assert "backbone_inputs" in inspect.signature(module.forward).parameters
    moved = module(ids, attention, mask=mask, backbone_inputs={"position_ids": torch.arange(9).expand(4, 9) * 3})
    assert not torch.equal(moved.logp, scored.logp)


def everything():
    """(model, batch, loss options), the same on every rank."""
    model, (ids, attention, mask, advantage) = build("Phi", num_hidden_layers=2), batch()
    module = CausalLMWithLoss(model, LinearGRPOLoss(LossConfig(loss_type="dapo")))
    with torch.no_grad():
        old_logp = module(ids, attention, mask=mask).logp + 0.1
    inputs = {"input_ids": ids, "attention_mask": attention, "mask": mask}
    return module, inputs | {"advantage": advantage, "old_logp": old_logp}


def of_rank(inputs, rank):
    return {name: x[2 * rank : 2 * rank + 2] for name, x in inputs.items()}


def _on_a_rank(rank, port):
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    module, inputs = everything()
    denominator = inputs["mask"].sum()
    alone = copy.deepcopy(module)
    loss = alone(**inputs, denominator=denominator).loss
    expected = gradients(alone, loss)
    mine = of_rank(inputs, rank)

    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(module))
    found = gradients(wrapped.module, wrapped(**mine, denominator=denominator / 2).loss)
    assert_same(found, expected)
    with pytest.raises(ValueError, match="found DistributedDataParallel with gradients.*wrap CausalLMWithLoss"):
        lm_head_of(wrapped)
    with torch.no_grad():
        logp = wrapped(**{name: mine[name] for name in ("input_ids", "attention_mask", "mask")}).logp
        whole = nn.parallel.DistributedDataParallel(module.model)
        inputs_now = completion_inputs(whole, mine["input_ids"], mine["attention_mask"], completion_length=T)
        assert torch.equal(linear_token_stats(**inputs_now, mask=mine["mask"]).logp, logp)

    sharded = copy.deepcopy(module)
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in sharded.model.model.layers:  # type: ignore
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    with pytest.raises(ValueError, match=r"sharded \(DTensor\).*CausalLMWithLoss"):
        lm_head_of(sharded.model)
    found = gradients(sharded, sharded(**mine, denominator=denominator / 2).loss)
    assert_same({name: g.full_tensor() for name, g in found.items()}, expected)  # type: ignore


def test_two_ranks_with_ddp_and_fsdp_are_one_process():
    on_ranks(_on_a_rank, 2)
