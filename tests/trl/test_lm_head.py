"""Test TRL's own trainers with rlloss's lm_head: the same training with fewer products. Test the patch itself."""

import contextlib
import itertools
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from torch import distributed
from trl.trainer import utils

import rlloss
from rlloss.backends import backend
from rlloss.integrations.trl import lm_head as trl_lm_head
from rlloss.integrations.trl.lm_head import OUTPUTS, patch_trl
from tests.support.ranks import on_ranks
from tests.support.rounding import FP32
from tests.support.trl_harness import _COMMON, ROUNDING, VOCABULARY, build_trainer, tiny_model, tiny_tokenizer

TRLS = {name: getattr(utils, name) for name in trl_lm_head.compat.REPLACED if hasattr(utils, name)}
EXTRA = [name for name in OUTPUTS if name != "log_probs"]


@pytest.fixture(autouse=True)
def trls_own_names_are_back():
    yield
    assert all(getattr(utils, name) is value for name, value in TRLS.items())
    assert not trl_lm_head._patches and not trl_lm_head._trls


def with_head(model=tiny_model, outputs=tuple(OUTPUTS), **options):
    model = model().eval()
    utils.add_fused_lm_head(model, outputs=outputs, **options)
    return model


def batch(B=3, L=9, prompt=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (B, L), generator=g)
    labels = ids.clone()
    labels[:, :prompt] = -100
    labels[0, 6:] = -100
    return ids, labels


def run(model, ids, labels, weights=None):
    """(outputs, {parameter: gradient}) of a weighted sum of all outputs that have a gradient."""
    model.zero_grad(set_to_none=True)
    outputs = model(ids, labels=labels, fused_lm_head=True)
    loss = outputs.log_probs.mul(torch.linspace(-1, 1, outputs.log_probs.numel()).view_as(outputs.log_probs)).sum()
    if weights is not None and outputs.entropy is not None:
        loss = loss + weights * outputs.entropy.square().sum()
    loss.backward()
    return outputs, {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(found, expected, rtol=ROUNDING):
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():  # that of a key's bias is 0 but for rounding
        assert (found[name] - gradient).norm() <= rtol * gradient.norm() + FP32 * whole, name


def architecture(name, **options):
    def build():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**{**_COMMON, "num_hidden_layers": 1, **options})
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        if (bias := model.get_output_embeddings().bias) is not None:
            torch.nn.init.normal_(bias)
        return model

    return build


MODELS = {
    "qwen2": tiny_model,
    "softcap": architecture("Gemma2", head_dim=8, final_logit_softcapping=2.0),
    "divided": architecture("Granite", logits_scaling=3.0),
    "multiplied, tied": architecture("Cohere", logit_scale=0.25),
    "bias": architecture("Phi"),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_output_and_gradient_is_trls(name):
    model, (ids, labels) = with_head(MODELS[name], temperature=0.7), batch()  # prepared before the patch
    expected, gradients = run(model, ids, labels, 0.3)
    with patch_trl(), backend("torch"), rlloss.count_products() as products:
        found, ours = run(model, ids, labels, 0.3)
    counted = int((labels[:, 1:] != -100).sum())
    D = model.config.hidden_size
    assert products.unit == 2 * counted * VOCABULARY * D and products.units == 3
    for output in (*OUTPUTS, "loss", "label_mask"):
        torch.testing.assert_close(found[output], expected[output], rtol=ROUNDING, atol=ROUNDING, msg=output)
    assert found.is_top1.dtype == torch.bool
    assert_same_gradients(ours, gradients)


@pytest.mark.parametrize("count", range(len(EXTRA) + 1))
def test_every_combination_of_outputs(count):
    ids, labels = batch()
    with backend("torch"):
        for outputs in itertools.combinations(EXTRA, count):
            model = with_head(outputs=outputs)  # TRL's log_probs are there unasked
            expected, gradients = run(model, ids, labels, 0.3)
            with patch_trl():
                found, ours = run(model, ids, labels, 0.3)
            for output in OUTPUTS:
                value = getattr(found, output)
                assert (value is not None) == (output in (*outputs, "log_probs")), (outputs, output)
                if value is not None:
                    torch.testing.assert_close(value, expected[output], rtol=ROUNDING, atol=ROUNDING)
                    assert value.requires_grad == (output in ("log_probs", "entropy"))
            assert_same_gradients(ours, gradients)


def test_through_the_kernels():
    model, (ids, labels) = with_head(), batch(B=2, L=6)
    expected, gradients = run(model, ids, labels, 0.3)
    with patch_trl():
        found, ours = run(model, ids, labels, 0.3)
    for output in OUTPUTS:
        torch.testing.assert_close(found[output], expected[output], rtol=ROUNDING, atol=ROUNDING)
    assert_same_gradients(ours, gradients)


def test_tokens_without_a_gradient_and_an_entropy_that_is_only_logged_cost_nothing():
    model, (ids, labels) = with_head(), batch()
    with patch_trl(plan="recompute"), backend("torch"), rlloss.count_products() as products:
        outputs = model(ids, labels=labels, fused_lm_head=True)
        live = outputs.label_mask.clone()
        live[1:] = False
        outputs.log_probs[live].sum().backward()
    counted = int(outputs.label_mask.sum())
    assert 0 < int(live.sum()) < counted
    assert products.units == pytest.approx(1 + 3 * int(live.sum()) / counted)


def test_a_frozen_head_costs_two_products():
    """As under LoRA. Logits do not fit the budget, d logp / d hidden does."""
    model, (ids, labels) = with_head(), batch()
    model.lm_head.weight.requires_grad_(False)
    expected, _ = run(model, ids, labels)
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    counted, D = int((labels[:, 1:] != -100).sum()), model.config.hidden_size
    with patch_trl(memory_budget=4 * counted * D) as patch, backend("torch"):
        with rlloss.count_products() as products:
            found, _ = run(model, ids, labels)
        assert products.units == 2 and products.units_of("hidden_grad") == 1
        torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=ROUNDING, atol=ROUNDING)
        ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_same_gradients(ours, theirs)
        with patch_trl(memory_budget=4 * counted * D, live_share=0.2), rlloss.count_products() as products:
            run(model, ids, labels)
        assert products.units == 3  # it expected 1 + 2 * 0.2
        # A loss that uses the entropy is right at once, and as cheap as it can be from the second call on.
        for units in (1 + 1 + 2, 1 + 2):
            assert patch.head.bonus == (units == 3)
            with rlloss.count_products() as products:
                _, ours = run(model, ids, labels, 0.3)
            assert products.units == units
    _, theirs = run(model, ids, labels, 0.3)
    for of in (ours, theirs):
        del of["lm_head.weight"]
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("plan, empty", [("jacobian", False), ("jacobian", True), ("recompute", False)])
def test_every_plan_gathers_the_head_in_both_passes(monkeypatch, plan, empty):
    """ZeRO-3's gather is a collective. Ranks whose plans differ, or one without a token, must all take part in it."""
    model, (ids, labels) = with_head(), batch()
    model.lm_head.weight.requires_grad_(False)
    sharded = Sharded(model.lm_head.weight)
    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", sharded.gather)
    with patch_trl(plan=plan), backend("torch"):
        model(ids, labels=torch.full_like(labels, -100) if empty else labels, fused_lm_head=True).loss.backward()
    assert sharded.entered == 2


def test_no_token_at_all_is_a_differentiable_zero():
    model, (ids, labels) = with_head(), batch()
    with patch_trl(), backend("torch"):
        outputs, gradients = run(model, ids, torch.full_like(labels, -100), 1.0)
    assert outputs.loss == 0 and all((g == 0).all() for g in gradients.values())


def test_without_gradients_nothing_is_kept():
    model, (ids, labels) = with_head(), batch()
    with patch_trl(plan="keep"), backend("torch"), torch.no_grad():
        found = model(ids, labels=labels, fused_lm_head=True)
    assert found.log_probs.grad_fn is None
    torch.testing.assert_close(found.log_probs, model(ids, labels=labels, fused_lm_head=True).log_probs.detach())


@pytest.mark.parametrize("autocast, cast", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32])
def test_a_bf16_model_is_closer_to_fp64_than_on_trl(autocast, cast, head_dtype):
    model, (ids, labels) = with_head(cast_lm_head_to_fp32=cast).bfloat16(), batch()
    model.lm_head.to(head_dtype)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)  # not representable in bf16 where it is fp32
    seen = []
    model.model.register_forward_hook(lambda *args: seen.append(args[-1].last_hidden_state))
    found = []
    for patch in (contextlib.nullcontext, patch_trl):
        with patch(), backend("torch"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs, gradients = run(model, ids, labels)
        found.append((outputs.log_probs.detach(), gradients["lm_head.weight"]))
        assert outputs.log_probs.dtype == torch.float32 and found[-1][1].dtype == head_dtype
    weight = model.lm_head.weight.detach()
    if not cast:
        weight = weight.bfloat16()  # an fp32 head takes part in bf16, as on TRL
    exact = (seen[0][:, :-1].detach().double() @ weight.double().T).log_softmax(-1)
    exact = exact.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1).masked_fill(labels[:, 1:] == -100, 0)
    theirs, ours = ((logp - exact).abs().max().item() for logp, _ in found)
    assert ours < 1e-5 and (ours < theirs / 100 or cast)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0.02, atol=0.02)


class Sharded:
    """A stand-in for ZeRO-3: parameters are empty outside the context. The context may be entered again."""

    def __init__(self, *params):
        self.params = [p for p in params if p is not None]
        self.whole = [p.data for p in self.params]
        self.depth = self.entered = 0
        self.scatter()

    def scatter(self):
        for p in self.params:
            p.data = p.data.new_empty(0)

    @contextlib.contextmanager
    def gather(self, *params):
        assert all(any(p is mine for mine in self.params) for p in params if p is not None)
        self.entered += self.depth == 0
        self.depth += 1
        for p, data in zip(self.params, self.whole, strict=True):
            p.data = data
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                self.scatter()


@pytest.mark.parametrize("plan", ["keep", "recompute"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_sharded_head_is_gathered_in_the_forward_and_in_the_backward(monkeypatch, plan, masked):
    model, (ids, labels) = with_head(MODELS["bias"]), batch()
    if masked:
        labels = torch.full_like(labels, -100)
    expected, gradients = run(model, ids, labels, 0.3)
    sharded = Sharded(model.lm_head.weight, model.lm_head.bias)
    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", sharded.gather)
    with patch_trl(plan=plan), backend("torch"):
        model.zero_grad(set_to_none=True)
        outputs = model(ids, labels=labels, fused_lm_head=True)
        assert (sharded.entered, model.lm_head.weight.numel()) == (1, 0)
        weights = torch.linspace(-1, 1, outputs.log_probs.numel()).view_as(outputs.log_probs)
        loss = (outputs.log_probs * weights).sum() + 0.3 * outputs.entropy.square().sum()
        head = [model.lm_head.weight, model.lm_head.bias]
        others = {n: p for n, p in model.named_parameters() if not n.startswith("lm_head")}
        found = []
        for p in head:  # an engine takes the gradient off the parameter before it is accumulated
            p.register_hook(lambda g: found.append(g))
        # Accumulated into the whole parameter, as in the engine's own hooks.
        *grads, _, _ = torch.autograd.grad(loss, [*others.values(), *head])
    assert sharded.entered == 2 and model.lm_head.weight.numel() == 0
    assert_same_gradients(dict(zip(others, grads, strict=True)), {n: gradients[n] for n in others})
    by_shape = {g.dim(): g for g in found}
    assert_same_gradients(
        {"weight": by_shape[2], "bias": by_shape[1]},
        {"weight": gradients["lm_head.weight"], "bias": gradients["lm_head.bias"]},
    )
    torch.testing.assert_close(outputs.log_probs, expected.log_probs, rtol=ROUNDING, atol=ROUNDING)


def _on_a_rank(rank, port, world):
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo")
    B = 4
    ids, labels = batch(B=B)
    weights = torch.linspace(-1, 1, B * 8).view(B, 8)

    def gradients(model, rows):
        outputs = model(ids[rows], labels=labels[rows], fused_lm_head=True)
        ((outputs.log_probs * weights[rows]).sum() + outputs.entropy.square().sum()).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    with patch_trl(), backend("torch"):
        expected = gradients(with_head(MODELS["bias"]), slice(None))
        expected = {name: g / world for name, g in expected.items()}  # FSDP takes the mean over the ranks
        model = with_head(MODELS["bias"])
        mesh = distributed.init_device_mesh("cpu", (world,))
        for module in (*model.model.layers, model.lm_head, model):
            fully_shard(module, mesh=mesh)
        mine = B // world
        found = gradients(model, slice(rank * mine, (rank + 1) * mine))
    assert_same_gradients({name: g.full_tensor() for name, g in found.items()}, expected)


@pytest.mark.parametrize("world", [2, 4])
def test_a_head_in_an_fsdp2_group_of_its_own_learns_from_every_rank(world):
    on_ranks(_on_a_rank, world, world)


def preferences():
    return Dataset.from_dict({
        "prompt": [f"w{i} w{i + 1}" for i in range(8)],
        "chosen": [" w2 w3" + " w5" * (i % 3) for i in range(8)],
        "rejected": [" w9 w8 w4" + " w7" * (i % 2) for i in range(8)],
    })  # fmt: skip


def labelled():
    rows = preferences()
    completions = [rows["chosen"][i] if i % 2 else rows["rejected"][i] for i in range(8)]
    labels = [i % 2 == 1 for i in range(8)]
    return Dataset.from_dict({"prompt": rows["prompt"], "completion": completions, "label": labels})


def completions():
    rows = preferences()
    return Dataset.from_dict({"prompt": rows["prompt"], "completion": rows["rejected"]})


TRAINERS = {
    "GRPO": ({"beta": 0.04, "num_iterations": 2, "cast_lm_head_to_fp32": True}, None),
    "GRPO entropy bonus": ({"entropy_coef": 0.05, "loss_type": "dapo"}, None),
    "RLOO": ({"beta": 0.04}, None),
    "DPO": ({"use_weighting": True}, preferences),
    "KTO": ({}, labelled),
    "SFT": ({}, completions),
}


def trained(which, folder, patched):
    """(log history, products, parameters) of two steps."""
    options, data = TRAINERS[which]
    kind = which.split()[0]
    trainer_class, config_class = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    options = {"max_steps": 2, "learning_rate": 1e-3, **options}
    with contextlib.ExitStack() as stack:
        products = stack.enter_context(rlloss.count_products())
        stack.enter_context(backend("torch"))
        if data is None:
            trainer = build_trainer(trainer_class, config_class, folder, **options)
        else:
            tiny_model().save_pretrained(f"{folder}/tiny")  # the reference model is loaded by the policy's name
            trainer = trainer_class(
                model=f"{folder}/tiny", train_dataset=data(), processing_class=tiny_tokenizer(),
                args=config_class(
                    output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
                    per_device_train_batch_size=4, disable_tqdm=True, save_strategy="no", logging_steps=1, seed=0,
                    max_length=16, **options,
                ),
            )  # fmt: skip
        if patched:
            stack.enter_context(patch_trl())
        torch.manual_seed(0)
        trainer.train()
    return trainer.state.log_history, products, [p.detach() for p in trainer.model.parameters()]


@pytest.mark.parametrize("which", TRAINERS)
def test_a_trainer_logs_and_learns_as_on_trls_head(tmp_path, which):
    if "entropy bonus" in which and not hasattr(trl.GRPOConfig, "entropy_coef"):
        pytest.skip("this TRL has no entropy bonus")
    expected, none, before = trained(which, tmp_path / "theirs", False)
    found, products, after = trained(which, tmp_path / "ours", True)
    assert none.unit == 0 and products.flop["weight_grad"] > 0
    D, V = 32, VOCABULARY
    rows = products.unit / (2 * D * V)
    assert rows == int(rows) and 0 < rows
    assert len(expected) == len(found) == 3
    for theirs, ours in zip(expected, found, strict=True):
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            if not any(word in name for word in ("time", "runtime", "per_second", "flos")):
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for theirs, ours in zip(before, after, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_padding_and_prompts_reach_no_product(tmp_path):
    _, products, _ = trained("SFT", tmp_path, True)
    tokens = [len(tiny_tokenizer()(text)["input_ids"]) + 1 for text in completions()["completion"]]  # and its <eos>
    assert products.unit == 2 * 32 * VOCABULARY * sum(tokens)  # two steps of four: every completion once


def test_an_async_grpo_trainer_uses_the_head_that_is_patched():
    module = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    assert module.add_fused_lm_head is utils.add_fused_lm_head


def test_a_patch_counts_until_it_ends_and_nests():
    first = patch_trl(plan="recompute")
    head: Any = utils._ChunkedLogProbFunction
    assert head.plan == "recompute"
    with patch_trl(plan="keep", memory_budget=5, batch_invariant=True) as second:
        inner: Any = utils._ChunkedLogProbFunction
        assert (inner.plan, inner.memory_budget, inner.batch_invariant) == ("keep", 5, True)
        second.undo()
        assert utils._ChunkedLogProbFunction is head
    assert utils._ChunkedLogProbFunction is head
    third = patch_trl()
    first.undo()  # not the youngest
    assert utils._ChunkedLogProbFunction is third.head
    third.undo()
    third.undo()
    first.undo()


def test_a_patch_ends_with_an_exception():
    with pytest.raises(KeyError), patch_trl():
        raise KeyError


def test_the_plan_of_the_forward_is_that_of_the_backward():
    model, (ids, labels) = with_head(), batch()
    with backend("torch"), rlloss.count_products() as products:
        for plan in ("keep", "recompute"):
            with patch_trl(plan=plan):
                outputs = model(ids, labels=labels, fused_lm_head=True)
            outputs.loss.backward()  # outside
            assert (products.flop["recompute"] > 0) == (plan == "recompute")


@pytest.mark.parametrize("options, message", [
    ({"plan": "gradient_in_forward"}, "plan: found 'gradient_in_forward', expected one of 'auto', 'recompute', 'keep'"),
    ({"memory_budget": -1}, "memory_budget: found -1"), ({"live_share": 1.5}, "live_share: found 1.5"),
])  # fmt: skip
def test_an_option_that_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        patch_trl(**options)


@pytest.mark.parametrize("name", ["add_fused_lm_head", "_ChunkedLogProbFunction"])
def test_another_trl_is_named(monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr(trl, "__version__", "1.14.0")
        patch.delattr(utils, name)
        with pytest.raises(RuntimeError, match=f"TRL 1.14.0 has no {name} in trl.trainer.utils; expected TRL >= 1.15"):
            patch_trl()
    monkeypatch.setattr(utils, "add_fused_lm_head", lambda model: None)
    with pytest.raises(RuntimeError, match="does not call _ChunkedLogProbFunction"):
        patch_trl()


def test_a_label_outside_the_vocabulary_is_named():
    model, (ids, labels) = with_head(), batch()
    labels[1, 5] = VOCABULARY
    with pytest.raises(ValueError, match=f"target: found {VOCABULARY}"), patch_trl():
        model(ids, labels=labels, fused_lm_head=True)
