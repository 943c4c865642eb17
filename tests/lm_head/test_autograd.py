"""Test linear_token_stats and LinearGRPOLoss in autograd: retained graphs, checkpoints, autocast, torch.compile."""

import math

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from rlloss import LinearGRPOLoss, LossConfig, backends, count_products, linear_token_stats
from rlloss.lm_head import vocab_loop
from tests.support.heads import NAMES, problem
from tests.support.rounding import assert_sums_close

PLANS = ("recompute", "keep", "gradient_in_forward")
B, T, V, D = 4, 5, 50, 24


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(vocab_loop, "CPU_ROWS", 8)
    monkeypatch.setattr(vocab_loop, "CPU_WIDTH", 16)
    with backends.backend("torch"):
        yield


def batch(dtype=torch.float32, bias=True, seed=0, D=D) -> dict:
    return problem(N=B * T, V=V, D=D, dtype=dtype, bias=bias, shape=(B, T), seed=seed)


ADVANTAGE = torch.tensor([1.0, -0.5, 0.0, 2.0])
MASK = torch.arange(T) < torch.tensor([5, 3, 4, 1])[:, None]


def loss_of(x: dict, plan: str, advantage=ADVANTAGE, mask=MASK, **settings):
    """A loss with any plan. "gradient_in_forward" needs LinearGRPOLoss, so all plans use it."""
    module = LinearGRPOLoss(LossConfig("grpo", **settings), plan=plan)
    return module(x["hidden"], x["weight"], x["target"], advantage, mask=mask, bias=x.get("bias")).loss


def leaves_of(x: dict, *names: str) -> list[torch.Tensor]:
    return [x[name].requires_grad_() for name in names or NAMES if name in x]


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor], **settings) -> list[torch.Tensor]:
    return [g.clone() for g in torch.autograd.grad(loss, leaves, **settings)]


def assert_equal(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", PLANS)
def test_backward_twice_with_a_kept_graph(plan, dtype):
    x = batch(dtype)
    leaves = leaves_of(x)
    loss = loss_of(x, plan, entropy_coef=0.1)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    third = torch.autograd.grad(3.0 * loss, leaves)
    assert_equal(first, kept)  # the first gradients are the caller's and stay as they are
    assert_sums_close(second, kept, V)
    assert_sums_close([g / 3 for g in third], kept, V)
    assert all((g != 0).any() for g in kept)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("needed", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
def test_what_is_frozen_has_no_gradient(plan, needed):
    x = batch()
    leaves = leaves_of(x)
    expected = dict(zip(NAMES, gradients(loss_of(x, plan), leaves), strict=True))
    x = batch()
    leaves_of(x, *needed)
    loss_of(x, plan).backward()
    for name in NAMES:
        assert (x[name].grad is not None) == (name in needed)
        if name in needed:
            assert_sums_close(x[name].grad, expected[name], V)
    x = batch()
    assert not loss_of(x, "auto").requires_grad


@pytest.mark.parametrize("plan", PLANS)
def test_a_head_tied_to_the_embedding_and_a_bias_free_one(plan):
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))
    found = {}
    for how in ("ours", "torch"):
        embedding = torch.nn.Embedding(V, D)
        torch.nn.init.normal_(embedding.weight, generator=torch.Generator().manual_seed(1))
        hidden = torch.tanh(embedding(ids))
        if how == "ours":
            loss = loss_of({"hidden": hidden, "weight": embedding.weight, "target": ids.flip(0)}, plan)
        else:
            logp = (hidden @ embedding.weight.T).log_softmax(-1).gather(-1, ids.flip(0)[..., None]).squeeze(-1)
            loss = -(torch.where(MASK, logp, 0.0) * ADVANTAGE[:, None]).sum(-1).div(MASK.sum(-1)).mean()
        loss.backward()
        found[how] = embedding.weight.grad
    assert_sums_close(found["ours"], found["torch"], V)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_gradient_checkpointing(plan, use_reentrant):
    x = batch()
    leaves = leaves_of(x)
    expected = gradients(loss_of(x, plan), leaves)

    def of(hidden, weight, bias):
        return loss_of({"hidden": hidden * 1.0, "weight": weight, "bias": bias, "target": x["target"]}, plan)

    loss = checkpoint(of, *leaves, use_reentrant=use_reentrant)
    loss.backward()
    assert_sums_close([leaf.grad for leaf in leaves], expected, V)


@pytest.mark.parametrize("factor", [65536.0, 1 / 3, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("plan", PLANS)
def test_a_scaled_loss_rounds_once_and_does_not_underflow(monkeypatch, plan, dtype, factor):
    if dtype == torch.float16:
        monkeypatch.setattr(vocab_loop, "CPU_ROWS", 64)  # one chunk: nothing has to be added up in fp32
    x = batch(dtype)
    leaves = leaves_of(x)
    # Without the factor these gradients are mostly below the smallest fp16 number.
    advantage = ADVANTAGE * (1e-6 if factor > 1 else 1.0)
    exact = [v.detach().double().requires_grad_() for v in leaves]
    pairs = (x, leaves, plan), ({**x, **dict(zip(NAMES, exact, strict=True))}, exact, "recompute")
    found, expected = (gradients(loss_of(y, p, advantage) * factor, of) for y, of, p in pairs)
    info = torch.finfo(dtype)
    # A gradient held in bf16 and then multiplied is rounded twice, one summed in fp32 once.
    for a, e in zip(found, expected, strict=True):
        assert (a.double() - e).abs().max() <= (1.1 * info.eps + 4e-6) * e.abs().max() + info.smallest_normal * info.eps
        assert factor < 1 or ((a == 0) == (e == 0)).double().mean() > 0.99


def test_a_factor_is_not_rounded_to_bf16(monkeypatch):
    monkeypatch.setattr(vocab_loop, "CPU_ROWS", 64)  # one chunk: the weight's gradient is held in bf16
    x = batch(torch.bfloat16)
    leaves = leaves_of(x)
    loss = loss_of(x, "gradient_in_forward")
    (held,) = gradients(loss, leaves[1:2], retain_graph=False)
    (third,) = gradients(loss_of(x, "gradient_in_forward") / 3, leaves[1:2])
    assert torch.equal(third, (held.float() * torch.tensor(1.0).div(3)).bfloat16())


@pytest.mark.parametrize("plan", PLANS)
def test_an_infinite_factor_leaves_what_is_dead_alone(plan):
    x = batch()
    leaves = leaves_of(x)
    found = gradients(loss_of(x, plan) * math.inf, leaves)
    assert not found[0][:2][MASK[:2]].isfinite().any()
    dead = ~MASK | (ADVANTAGE == 0)[:, None]
    assert (found[0][dead] == 0).all()
    nothing = loss_of(x, plan, torch.zeros(B)) * math.inf
    assert all((g == 0).all() for g in gradients(nothing, leaves))


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_is_an_explicit_cast(plan):
    x = batch()
    leaves = leaves_of(x)
    half = {name: x[name].bfloat16() for name in ("hidden", "weight")}
    expected_loss = loss_of({**x, **half}, plan)
    expected = gradients(expected_loss, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(x, plan)
    found = gradients(loss, leaves)
    assert torch.equal(loss, expected_loss)
    assert all(g.dtype == torch.float32 for g in found)
    # An explicit cast rounds the gradient of hidden and weight to bf16; autocast here does not.
    for a, e in zip(found[:2], expected[:2], strict=True):
        assert_sums_close(a.bfloat16(), e.bfloat16(), 1)
        assert not torch.equal(a, a.bfloat16().float())
    assert_sums_close(found[2], expected[2], V)


def test_autocast_leaves_fp64_alone_and_two_dtypes_take_the_wider_one():
    x = batch(torch.float64)
    expected = linear_token_stats(x["hidden"], x["weight"], x["target"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_token_stats(x["hidden"], x["weight"], x["target"]).logp, expected.logp)
    x = batch()
    x["weight"] = x["weight"].bfloat16()
    leaves = leaves_of(x, "hidden", "weight")
    stats = linear_token_stats(x["hidden"], x["weight"], x["target"], bias=x["bias"])
    wide = linear_token_stats(x["hidden"], x["weight"].float(), x["target"], bias=x["bias"])
    assert torch.equal(stats.logp, wide.logp)
    found = gradients(stats.logp.sum(), leaves)
    assert [g.dtype for g in found] == [torch.float32, torch.bfloat16]
    assert_equal(found, gradients(wide.logp.sum(), leaves))


@pytest.mark.parametrize("plan", PLANS)
def test_without_gradient(plan):
    x = batch()
    leaves_of(x)
    expected = loss_of(x, plan).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context(), count_products() as products:
            loss = loss_of(x, plan)
        assert torch.equal(loss, expected) and not loss.requires_grad
        assert products.units == 1.0


@pytest.mark.parametrize("changed", ["weight", "hidden"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_change_between_forward_and_backward_is_noticed(plan, changed):
    x = batch()
    leaves_of(x)
    loss = loss_of(x, plan)
    with torch.no_grad():
        x[changed].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("plan", PLANS)
def test_no_live_row_gives_zeros_and_not_none(plan):
    x = batch(torch.bfloat16)
    leaves = leaves_of(x)
    stats = linear_token_stats(x["hidden"], x["weight"], x["target"], bias=x["bias"], entropy_grad=True)
    zeros = (stats.logp * 0.0 + stats.entropy * 0.0).sum()
    for loss in (loss_of(x, plan, torch.zeros(B)), loss_of(x, plan, mask=MASK & False), zeros):
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        assert all(leaf.grad is not None and (leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.parametrize("plan", PLANS)
def test_a_second_derivative_is_refused(plan):
    x = batch()
    leaves = leaves_of(x)
    (gradient,) = torch.autograd.grad(loss_of(x, plan), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.pow(2).sum(), leaves[1])


def test_only_some_outputs_have_a_gradient():
    x = batch()
    leaves = leaves_of(x)
    for name in ("logp", "entropy", "lse"):
        stats = linear_token_stats(x["hidden"], x["weight"], x["target"], bias=x["bias"], entropy_grad=True)
        logits = x["hidden"] @ x["weight"].T + x["bias"]
        log_p = logits.log_softmax(-1)
        expected = {
            "logp": log_p.gather(-1, x["target"][..., None]), "entropy": -(log_p.exp() * log_p).sum(-1),
            "lse": logits.logsumexp(-1),
        }[name]  # fmt: skip
        found = gradients(getattr(stats, name).sum(), leaves)
        assert_sums_close(found, gradients(expected.sum(), leaves), V)


def test_an_entropy_without_gradient_may_be_overwritten_and_one_with_gradient_not():
    x = batch()
    leaves_of(x)
    stats = linear_token_stats(x["hidden"], x["weight"], x["target"])
    assert stats.logp.requires_grad and not stats.entropy.requires_grad
    stats.entropy.mul_(2.0)
    stats.logp.sum().backward()
    stats = linear_token_stats(x["hidden"], x["weight"], x["target"], entropy_grad=True)
    total = (stats.logp + stats.entropy).sum()
    with torch.no_grad():
        stats.entropy.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_hidden_expanded_and_strided():
    x = batch()
    one = x["hidden"][:1].detach()
    expanded, whole = one.requires_grad_(), one.repeat(B, 1, 1).detach().requires_grad_()
    loss_of({**x, "hidden": expanded.expand(B, -1, -1)}, "recompute").backward()
    loss_of({**x, "hidden": whole}, "recompute").backward()
    assert_sums_close(expanded.grad[0], whole.grad.sum(0), V)
    for plan in PLANS:
        wide = torch.zeros(B, T + 1, 2 * D).requires_grad_()
        with torch.no_grad():
            wide[:, :-1, ::2] = x["hidden"]
        loss = loss_of({**x, "hidden": wide[:, :-1, ::2], "weight": x["weight"].T.contiguous().T}, plan)
        contiguous = x["hidden"].detach().requires_grad_()
        (expected,) = gradients(loss_of({**x, "hidden": contiguous}, plan), [contiguous])
        assert_sums_close(gradients(loss, [wide])[0][:, :-1, ::2], expected, V)


OP = torch.ops.rlloss.linear_token_stats.default


STATIC = torch.ops.rlloss.linear_token_stats_static.default


def test_the_registered_operators_pass_opcheck():
    x = batch()
    arguments = (*leaves_of(x), x["target"], MASK, None, 0.7, None, 1.0, torch.float32, False)
    torch.library.opcheck(OP, (*arguments, True, True, True))
    torch.library.opcheck(STATIC, (*arguments, True, True, True, [B * T, B * T]))


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no such tag")
@pytest.mark.parametrize("capacity", [None, (B * T, B * T)])
def test_a_compiler_knows_which_operators_wait_for_the_device(capacity):
    """Inductor would record an operator without the tag into a CUDA graph, where waiting raises."""
    x, tags = batch(), []

    def tagged(graph, _):
        tags.extend(
            (node.target.name(), torch.Tag.cudagraph_unsafe in node.target.tags)
            for node in graph.graph.nodes
            if "rlloss::linear" in str(getattr(node.target, "name", str)())
        )
        return make_boxed_func(graph)

    loss_fn = LinearGRPOLoss(LossConfig(), static_capacity=capacity)

    def loss(hidden, weight):
        return loss_fn(hidden, weight, x["target"], ADVANTAGE, mask=MASK).loss

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=aot_autograd(fw_compiler=tagged, bw_compiler=tagged))
    leaves = leaves_of(x, "hidden", "weight")
    expected = gradients(loss(*leaves), leaves)
    assert_sums_close(gradients(compiled(*leaves), leaves), expected, V)
    suffix = "" if capacity is None else "_static"
    names = [f"rlloss::linear_token_stats{suffix}", f"rlloss::linear_token_stats_backward{suffix}"]
    assert tags == [(name, capacity is None) for name in names]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("mask", [None, MASK, MASK & False], ids=["none", "some", "all masked"])
@pytest.mark.parametrize("flags", [(True, True, False), (False,) * 3, (True, False, True)])
def test_the_registered_operator_has_the_shapes_of_its_fake(mask, flags, with_bias):
    x = batch(torch.bfloat16, bias=with_bias)
    arguments = [x["hidden"], x["weight"], x.get("bias"), x["target"], mask, None]
    found = OP(*arguments, 0.7, None, 1.0, torch.bfloat16, False, *flags)
    on_meta = [None if v is None else v.to("meta") for v in arguments]
    fake = OP(*on_meta, 0.7, None, 1.0, torch.bfloat16, False, *flags)
    assert [(v.shape, v.dtype, v.stride()) for v in found] == [(v.shape, v.dtype, v.stride()) for v in fake]
    stats = linear_token_stats(x["hidden"], x["weight"], x["target"], bias=x.get("bias"), mask=mask, temperature=0.7)
    assert torch.equal(found[0], stats.logp) and torch.equal(found[2], stats.lse)


@pytest.mark.parametrize("masked, temperature", [("none", 0.7), ("some", "per token")])
def test_a_surrounding_model_compiles_in_one_graph(masked, temperature):
    x = batch()
    layer = torch.nn.Linear(D, D)
    mask = {"none": None, "some": MASK}[masked]
    if temperature == "per token":
        temperature = torch.linspace(0.5, 2.0, B * T).view(B, T)

    def loss(hidden, weight, bias):
        stats = linear_token_stats(
            torch.tanh(layer(hidden)), weight, x["target"], bias=bias, mask=mask, temperature=temperature,
            entropy_grad=True, outputs=("logp", "entropy"),
        )  # fmt: skip
        return (stats.logp + 0.1 * stats.entropy).sum()

    leaves = [*leaves_of(x), layer.weight]
    eager, compiled = loss(*leaves[:3]), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves[:3])
    torch.testing.assert_close(compiled, eager)
    assert_sums_close(gradients(compiled, leaves), gradients(eager, leaves), V)


def test_the_loss_compiles_in_one_graph():
    x = batch()
    leaves = leaves_of(x)
    config = LossConfig(entropy_coef=0.1)
    old_logp = linear_token_stats(x["hidden"], x["weight"], x["target"]).logp.detach() - 0.1

    def loss(hidden, weight, bias):
        return LinearGRPOLoss(config)(
            hidden, weight, x["target"], ADVANTAGE, mask=MASK, bias=bias, old_logp=old_logp
        ).loss  # fmt: skip

    eager, compiled = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    assert_sums_close(gradients(compiled, leaves), gradients(eager, leaves), V)

    def kept(hidden):
        return linear_token_stats(hidden, x["weight"], x["target"], plan="keep").logp

    with pytest.raises(Exception, match="'auto' or 'recompute' inside torch.compile"):
        torch.compile(kept, fullgraph=True, backend="aot_eager")(x["hidden"])


def test_grad_scaler_with_a_scale_of_65536(monkeypatch):
    monkeypatch.setattr(vocab_loop, "CPU_ROWS", 64)
    x = batch(torch.float16)
    params = [torch.nn.Parameter(x[name].float()) for name in ("hidden", "weight")]
    for plan in PLANS:
        optimizer = torch.optim.SGD(params, lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        given = {**x, **{n: p.half() for n, p in zip(("hidden", "weight"), params, strict=True)}}
        loss = loss_of(given, plan, ADVANTAGE * 1e-6)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        exact = {**x, "hidden": params[0], "weight": params[1]}
        expected = gradients(loss_of(exact, "recompute", ADVANTAGE * 1e-6), params)
        for p, e in zip(params, expected, strict=True):
            assert (p.grad - e).abs().max() <= 2e-3 * e.abs().max()
            assert ((p.grad == 0) == (e == 0)).double().mean() > 0.99
