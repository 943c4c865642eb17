"""Test LinearGRPOLoss with every plan against GRPOLoss on explicit logits, and test the choice of the plan."""

import contextlib
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rlloss import (
    GRPOLoss,
    LinearGRPOLoss,
    LossConfig,
    backends,
    count_products,
    explain_plan,
    linear_token_stats,
    modules,
    token_stats,
)
from rlloss.lm_head import gradient_in_forward, vocab_loop
from rlloss.torch_kernels import logits_tile
from tests.support.heads import problem
from tests.support.loss_cases import BACKENDS, TYPES_AND_LEVELS, make_config, settings_of
from tests.support.rounding import assert_sums_close

PLANS = ("recompute", "keep", "gradient_in_forward")
B, T, V, D = 4, 6, 40, 8
NEVER = "with these settings a token's coefficient depends on other tokens"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(vocab_loop, "CPU_ROWS", 8)
    monkeypatch.setattr(vocab_loop, "CPU_WIDTH", 16)
    with backends.backend("torch"):
        yield


def batch(seed=0, dtype=torch.float64, per_token=False, bias=True) -> dict:
    """A batch with an empty sequence, one of advantage 0, and with `per_token` zeros among the other advantages."""
    g = torch.Generator().manual_seed(seed)
    x = problem(N=B * T, V=V, D=D, dtype=dtype, bias=bias, shape=(B, T), seed=seed)
    logits = x["hidden"].double() @ x["weight"].double().T + (x["bias"].double() if bias else 0.0)
    logp = logits.log_softmax(-1).gather(-1, x["target"][..., None]).squeeze(-1)
    lengths = torch.tensor([T, 0, T - 2, T - 1])
    advantage = torch.randn((B, T) if per_token else (B,), generator=g)
    advantage[2] = 0.0
    if per_token:
        advantage[:, ::3] = 0.0
    floats = torch.promote_types(dtype, torch.float32)

    def near():
        return (logp + 0.4 * torch.randn(B, T, generator=g)).to(floats)

    x |= {"advantage": advantage.to(floats), "mask": torch.arange(T) < lengths[:, None], "old_logp": near()}
    return x | {"ref_logp": near(), "sampler_ratio": (0.3 * torch.randn(B, T, generator=g)).exp().to(floats)}


def step(config: LossConfig, x: dict, plan: str | None, **more):
    """(loss, gradients of hidden, weight and bias, metrics) from hidden states, or with plan=None from logits."""
    given = {"mask": x["mask"], "old_logp": x["old_logp"], **more}
    given |= {"ref_logp": x["ref_logp"]} if config.beta else {}
    h, w, b = leaves = [x[name].detach().clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    if plan is None:
        loss, metrics = GRPOLoss(config)(h @ w.T + b, x["target"], x["advantage"], **given)
    else:
        loss, metrics = LinearGRPOLoss(config, plan=plan)(h, w, x["target"], x["advantage"], bias=b, **given)
    return loss.detach(), torch.autograd.grad(1.7 * loss, leaves), metrics


def assert_same(found, expected, rtol=1e-9, atol=1e-12) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=atol)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    assert torch.equal((found[1][0] == 0).all(-1), (expected[1][0] == 0).all(-1))  # the same rows are dead
    assert set(found[2]) == set(expected[2])
    for name, value in expected[2].items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-6, atol=1e-6, equal_nan=True, msg=name)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("loss_type, level", TYPES_AND_LEVELS)
def test_the_loss_gradients_and_metrics_of_grpo_loss(loss_type, level, per_token):
    chosen = random.Random(f"{loss_type} {level} {per_token}")
    settings = settings_of(loss_type)
    taken = set()
    for i, more in enumerate([{}, *chosen.sample(settings, 2), {"entropy_coef": 0.1}]):
        config = make_config(loss_type, **{**({"ratio_level": level} if level else {}), **more})
        x = batch(seed=i, per_token=per_token)
        given = {"temperature": 0.8} if i % 2 else {"softcap": 4.0, "logit_scale": 1.5}
        if chosen.random() < 0.5:
            given["sampler_ratio"] = x["sampler_ratio"] if level != "sequence" else x["sampler_ratio"][:, :1]
        if config.top_entropy_quantile < 1 and chosen.random() < 0.7:
            given["cutoff"] = 2.0
        expected = step(config, x, None, **given)
        for plan in PLANS:
            try:
                found = step(config, x, plan, **given)
            except ValueError as error:
                assert plan == "gradient_in_forward" and NEVER in str(error)
                continue
            taken.add(plan)
            assert_same(found, expected)
    row_local = loss_type not in ("gspo", "vespo", "clip_cov", "kl_cov") and level == "token"
    assert taken == set(PLANS if row_local else PLANS[:2])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("more", [
    {}, {"cutoff": 2.0}, {"cutoff": torch.tensor(2.0)}, {"denominator": 31.0}, {"denominator": torch.tensor(17)},
], ids=str)  # fmt: skip
def test_cutoff_and_denominator_of_the_whole_batch(plan, more):
    settings = {"top_entropy_quantile": 0.5} if "cutoff" in more else {}
    for denominator in ("all", "kept") if "cutoff" in more else ("all",):
        config = LossConfig(**settings, entropy_denominator=denominator)
        more = {**more, **({"denominator": 9.0} if denominator == "kept" else {})}
        expected = step(config, batch(), None, **more)
        assert 0 < expected[2]["live"] < expected[2]["tokens"]
        assert_same(step(config, batch(), plan, **more), expected)


@pytest.mark.skipif(len(BACKENDS) == 1, reason="needs Triton")
@pytest.mark.parametrize("plan", PLANS)
def test_the_kernels_too(monkeypatch, plan):
    monkeypatch.setattr(vocab_loop, "CPU_WIDTH", 30)
    x = batch(dtype=torch.float32)
    x["mask"] = x["mask"] & (torch.arange(T) < 2)
    with backends.backend(BACKENDS[-1]):
        if BACKENDS[-1] == "triton":
            x = {name: value.cuda() for name, value in x.items()}
        expected = step(LossConfig(), x, None)
        found = step(LossConfig(), x, plan)
        assert_sums_close(found[0], expected[0], B * T, size=1)
        assert_sums_close(found[1], expected[1], V)


@pytest.mark.parametrize("plan", PLANS)
def test_by_hand(plan):
    # p = (1/8, 1/4, 5/8) of target 2 and (1/2, 1/4, 1/4) of target 0; d loss / d logp = -A / 2 = (-1, 2).
    weight = torch.tensor([[1.0, 4.0], [2.0, 2.0], [5.0, 2.0]]).log().requires_grad_()
    hidden = torch.eye(2).unsqueeze(0).requires_grad_()
    mask, advantage = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[2.0, -4.0]])
    loss, metrics = LinearGRPOLoss(plan=plan)(hidden, weight, torch.tensor([[2, 0]]), advantage, mask=mask)
    loss.backward()
    assert loss.item() == 1.0 and metrics["ratio"] == 2 and metrics["live"] == 2
    of_logits = torch.tensor([[1 / 8, 1 / 4, -3 / 8], [1.0, -1 / 2, -1 / 2]])
    torch.testing.assert_close(weight.grad, of_logits.T)
    torch.testing.assert_close(hidden.grad[0], of_logits @ weight.detach())


@pytest.mark.parametrize("loss_type, level", [("gspo", None), ("grpo", "sequence"), ("vespo", None), ("grpo", "token")])
@pytest.mark.parametrize("plan", PLANS[:2])
def test_a_token_of_advantage_zero_is_live_through_the_ratio_of_its_sequence(plan, loss_type, level):
    x = batch(per_token=True)
    unclipped = {} if loss_type == "vespo" else {"epsilon_low": 9.0, "epsilon_high": 9.0}
    config = make_config(loss_type, level, **unclipped)
    assert_same(step(config, x, plan), step(config, x, None))
    zero = x["mask"] & (x["advantage"] == 0)
    shares_a_ratio = zero & (x["advantage"] != 0).any(-1, keepdim=True)
    assert shares_a_ratio.any() and (zero & ~shares_a_ratio).any()
    of_hidden = step(config, x, plan)[1][0]
    through_ratio = loss_type == "gspo" or level == "sequence"
    assert (of_hidden[shares_a_ratio] != 0).any(-1).all() == through_ratio
    assert (of_hidden[zero & ~shares_a_ratio] == 0).all()
    candidates = gradient_in_forward.candidates(x["advantage"], x["mask"], config)
    assert candidates is not None
    sequences = config.loss_type in ("gspo", "vespo") or level == "sequence"
    expected = (x["advantage"] != 0).any(-1, keepdim=True).expand(B, T) if sequences else x["advantage"] != 0
    assert torch.equal(candidates, expected)


def test_who_may_get_a_gradient():
    x = batch()
    has_advantage = (x["advantage"] != 0)[:, None].expand(B, T)
    for config, expected in (
        (LossConfig(), has_advantage), (LossConfig("gspo"), has_advantage), (LossConfig(beta=0.1), None),
        (LossConfig(entropy_coef=0.1), None), (LossConfig("kl_cov"), None), (LossConfig("clip_cov"), has_advantage),
    ):  # fmt: skip
        found = gradient_in_forward.candidates(x["advantage"], x["mask"], config)
        assert found is expected if expected is None else torch.equal(found, expected)
    broken = torch.tensor([float("nan"), 0.0, 1.0, -0.0])
    assert gradient_in_forward.candidates(broken, x["mask"], LossConfig())[:, 0].tolist() == [True, False, True, False]


def seen_logp(monkeypatch) -> list[torch.Tensor]:
    seen = []
    for module in (modules, gradient_in_forward):
        of = module.loss_of
        spy = lambda given, of=of: seen.append(given.logp.detach().clone()) or of(given)  # noqa: E731
        monkeypatch.setattr(module, "loss_of", spy)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", PLANS)
def test_on_policy_every_ratio_is_one(monkeypatch, plan, dtype):
    seen = seen_logp(monkeypatch)
    x = batch(dtype=dtype)
    names = ("hidden", "weight", "target")
    with torch.no_grad():
        old_logp = linear_token_stats(*(x[n] for n in names), bias=x["bias"], mask=x["mask"], temperature=0.7).logp
    leaves = [x[n].requires_grad_() for n in names[:2]]
    loss, metrics = LinearGRPOLoss(LossConfig("grpo"), plan=plan)(
        *leaves, x["target"], x["advantage"], bias=x["bias"], mask=x["mask"], old_logp=old_logp, temperature=0.7
    )
    assert torch.equal(seen[-1], old_logp)
    assert metrics["ratio"] == metrics["tokens"] == x["mask"].sum() and metrics["clip_region"] == 0
    assert loss.requires_grad


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_the_plans_make_their_logits_in_the_same_products(monkeypatch, batch_invariant):
    """The bits may depend on the shape of the product, which on a GPU depends on the number of rows."""

    def tile_shape(rows, V, device, batch_invariant):
        """Of `chunk_rows` rows at most."""
        rows = 4 if batch_invariant else max(1, min(rows, 7))
        return rows, min(V, 56 // rows)

    shapes, seen, multiply = [], seen_logp(monkeypatch), vocab_loop.multiply

    def spied(out, a, b, kind, **more):
        if kind == "logits":
            shapes.append((*a.shape, b.shape[1]))
        return multiply(out, a, b, kind, **more)

    monkeypatch.setattr(vocab_loop, "tile_shape", tile_shape)
    monkeypatch.setattr(vocab_loop, "chunk_rows", lambda device, V, batch_invariant: 4 if batch_invariant else 7)
    monkeypatch.setattr(vocab_loop, "multiply", spied)
    x = batch(dtype=torch.float32)
    leaves = [x[n].requires_grad_() for n in ("hidden", "weight")]
    found = []
    for plan in PLANS:
        shapes.clear()
        module = LinearGRPOLoss(plan=plan, batch_invariant=batch_invariant)
        module(*leaves, x["target"], x["advantage"], mask=x["mask"]).loss.backward()
        found.append((sorted(shapes), seen[-1]))
    assert all(shapes == found[0][0] and torch.equal(logp, found[0][1]) for shapes, logp in found[1:])


class Products(TorchDispatchMode):
    """Counts the FLOP of all matrix products of torch."""

    flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("r", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("needed", [("hidden", "weight"), ("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
def test_counted_products_and_what_explain_plan_says_of_them(plan, r, needed):
    x = problem(N=60, V=V, D=D, shape=(6, 10), bias=True)
    mask = torch.arange(10) < 5 * torch.tensor([2, 2, 2, 2, 1, 1])[:, None]
    advantage = torch.zeros(6, 10)
    places = mask.flatten().nonzero().squeeze(-1)
    advantage.view(-1)[places[torch.randperm(50)[: round(50 * r)]]] = 1.0
    leaves = {name: x[name].requires_grad_(name in needed) for name in ("hidden", "weight", "bias")}
    given = {"mask": mask, "advantage": advantage, "config": LossConfig(), "plan": plan}
    assert f"plan='{plan}'" in repr(LinearGRPOLoss(plan=plan))
    report = explain_plan(**leaves, live_share=r, **given)
    with count_products() as products, Products() as witness:
        loss, metrics = LinearGRPOLoss(plan=plan)(**leaves, target=x["target"], advantage=advantage, mask=mask)
        loss.backward()
    assert witness.flop == sum(products.flop.values()) and products.unit == 2 * 50 * V * D
    rows = {kind: flop / (2 * V * D) for kind, flop in products.flop.items()}
    live = round(50 * r)
    assert metrics["live"] == live and report.rows == 50 and report.candidates == live
    assert rows == {
        "logits": 50, "recompute": live if plan == "recompute" else 0,
        "hidden_grad": live if "hidden" in needed else 0, "weight_grad": live if "weight" in needed else 0,
    }  # fmt: skip
    assert products.units == pytest.approx(report.products) and report.flop == sum(products.flop.values())
    most = 1 + (len(set(needed) - {"bias"}) + (plan == "recompute")) * r
    assert 1 <= products.units <= most * 1.02
    assert explain_plan(**leaves, **given).products == pytest.approx(report.products)
    assert all((leaf.grad is not None) == (name in needed) for name, leaf in leaves.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"loss_type": "gspo"}, {"top_entropy_quantile": 0.2}, {"beta": 0.1}], ids=str)
@pytest.mark.parametrize("budget", [None, 0, 5119, 5120, 10**9])
def test_the_plan_that_is_explained_is_the_one_that_runs(monkeypatch, dtype, settings, budget):
    reports = []
    prepared = modules.prepare_loss

    def spied(*args):
        reports.append(prepared(*args))
        return reports[-1]

    monkeypatch.setattr(modules, "prepare_loss", spied)
    x, config = batch(dtype=dtype), LossConfig(**settings)
    for training in (True, False):
        for name in ("hidden", "weight"):
            x[name].requires_grad_(training)
        given = {"ref_logp": x["ref_logp"]} if config.beta else {}
        LinearGRPOLoss(config, memory_budget=budget)(
            x["hidden"], x["weight"], x["target"], x["advantage"], mask=x["mask"], **given
        )
        report = explain_plan(
            x["hidden"], x["weight"], mask=x["mask"], advantage=x["advantage"], config=config, memory_budget=budget
        )
        assert reports[-1].report == report
        assert (report.plan == "forward") == (not training)
        assert report.extra_bytes <= report.memory_budget
        assert report.memory_budget == (2 * V * D + 4 * B * T * V if budget is None else budget)
        assert report.plan in str(report) and report.why in str(report)
    no_mask = explain_plan(*(torch.empty(s, device="meta") for s in ((3, 5, D), (V, D))), plan="recompute")
    assert no_mask.rows == 15 and no_mask.plan == "forward"


SHAPES_ONLY = {
    "GRPOLoss": lambda x, rest: GRPOLoss()(x["hidden"] @ x["weight"].T, **rest).loss,
    "inplace_grad": lambda x, rest: (
        token_stats(x["hidden"] @ x["weight"].T, rest["target"], mask=rest["mask"], inplace_grad=True).logp
    ),
    "linear_token_stats": lambda x, rest: (
        linear_token_stats(**x, target=rest["target"], mask=rest["mask"], static_capacity=(9, 5)).logp
    ),
    **{plan: lambda x, rest, plan=plan: LinearGRPOLoss(plan=plan)(**x, **rest).loss for plan in ("auto", *PLANS)},
}


@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("name", SHAPES_ONLY)
def test_tensors_without_values_have_the_shapes(name, where):
    x = batch(dtype=torch.float32)
    x = {key: x[key].detach() for key in ("hidden", "weight", "target", "mask", "advantage")}
    x = {key: value.to("meta") for key, value in x.items()} if where == "meta" else x
    with FakeTensorMode() if where == "fake" else contextlib.nullcontext() as mode:
        x = {key: mode.from_tensor(value) for key, value in x.items()} if mode else x
        leaves = {key: x.pop(key).requires_grad_() for key in ("hidden", "weight")}
        found = SHAPES_ONLY[name](leaves, x)
        assert found.dtype == torch.float32 and found.device == x["mask"].device
        assert found.shape == (x["mask"].shape if name in ("inplace_grad", "linear_token_stats") else ())
        found.sum().backward()
        for leaf in leaves.values():
            assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype
        report = explain_plan(**leaves, mask=x["mask"], advantage=x["advantage"], config=LossConfig())
        assert report.rows == report.candidates == x["mask"].numel()  # without values the mask is full


def test_a_plan_that_does_not_exist_is_named_without_values():
    hidden, weight = (torch.empty(*shape, device="meta") for shape in ((3, D), (V, D)))
    with pytest.raises(ValueError, match="plan: found 'kep'"):
        linear_token_stats(hidden, weight, torch.empty(3, device="meta", dtype=torch.int64), plan="kep")


@pytest.mark.parametrize("plan", ["recompute", "keep"])
def test_fp16_hidden_states_need_a_loss_scale_on_a_gpu(monkeypatch, plan):
    """Products with fp16 operands round the gradient of a tile to fp16. This test rounds it explicitly."""
    exact = logits_tile.gradient_tile
    monkeypatch.setattr(logits_tile, "gradient_tile", lambda *tile: exact(*tile).half().float())
    monkeypatch.setattr(vocab_loop, "CPU_ROWS", 1024)
    g = torch.Generator().manual_seed(0)
    B, T, D, V = 4, 50, 32, 4096
    hidden = (torch.randn(B, T, D, generator=g) * D**-0.5).half()
    weight = torch.randn(V, D, generator=g).half()
    rest = torch.randint(0, V, (B, T), generator=g), torch.randn(B, generator=g)
    mask = torch.ones(B, T, dtype=torch.bool)

    def gradients(loss_type, dtype, scale, **options):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        given = (leaves[0] @ leaves[1].T,) if loss_type is GRPOLoss else leaves
        loss = loss_type(LossConfig(), **options)(*given, *rest, mask=mask, denominator=2000.0).loss
        return [x.double() / scale for x in torch.autograd.grad(loss * scale, leaves)]

    expected = gradients(GRPOLoss, torch.float32, 1.0)
    allowed = 4 * torch.finfo(torch.float16).eps  # operands and results are rounded once each
    for scale, right in ((2.0**12, True), (1.0, False)):
        found = gradients(LinearGRPOLoss, torch.float16, scale, plan=plan)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
        assert (max(errors) < allowed) == right, errors


def test_budgets_that_just_fit():
    hidden, weight = (torch.zeros(*shape, requires_grad=True) for shape in ((3, 5, D), (V, D)))
    kept = 15 * V * 4

    def chosen(budget, **more):
        return explain_plan(hidden, weight, memory_budget=budget, **more)

    assert chosen(kept).plan == "keep" and chosen(kept).extra_bytes == kept and chosen(kept).products == 3
    smaller = chosen(kept - 1)
    assert smaller.plan == "recompute" and smaller.extra_bytes == 0 and smaller.products == 4
    assert "keep is not possible: it needs 2.34 KiB, and the memory budget is 2.34 KiB" in smaller.why
    assert "gradient_in_forward" in smaller.why and smaller.flop == 4 * 2 * 15 * V * D
    assert str(chosen(kept)) == (
        "keep: 3.00 matrix products of 15 rows (2.88e+04 FLOP) expected with 100% of the rows live, 2.34 KiB above "
        "inputs, gradients and a tile of 512 B; no plan has fewer products."
    )
    # At most CPU_ROWS = 8 of the 15 rows have logits at the same time.
    row_local = chosen(8 * V * 4, config=LossConfig(), advantage=torch.ones(3, 5), mask=None)
    assert row_local.plan == "gradient_in_forward" and row_local.extra_bytes == 8 * V * 4
    assert chosen(8 * V * 4 - 1, config=LossConfig()).plan == "recompute"
    assert chosen(8 * V * 4, config=LossConfig("gspo")).plan == "recompute"
    # With several chunks of rows the gradient of a bf16 weight is summed in fp32.
    half = weight.to(torch.bfloat16)
    assert chosen(8 * V * 4 + 2 * V * D, config=LossConfig()).plan == "gradient_in_forward"
    of_half = explain_plan(hidden, half, memory_budget=8 * V * 4 + 2 * V * D - 1, config=LossConfig())
    assert of_half.plan == "recompute"
    with pytest.raises(ValueError, match="plan: found 'keep', expected another one: it needs 2.34 KiB"):
        chosen(kept - 1, plan="keep")
    assert chosen(None, plan="keep").plan == "keep"  # an explicit plan needs no default budget
    assert explain_plan(hidden, weight.detach()).products == 2
    # Of plans that cost nearly the same the one that holds less: with a fifth of the rows live not `keep`.
    few = chosen(kept, live_share=0.2)
    assert few.plan == "recompute" and few.why.startswith("keep would hold 2.34 KiB and gain little; ")


@pytest.mark.parametrize("settings, more", [
    ({"loss_type": "gspo"}, {}), ({"loss_type": "vespo"}, {}), ({"ratio_level": "sequence"}, {}),
    ({"off_policy_threshold": 0.1}, {}), ({"top_entropy_quantile": 0.5}, {}),
    ({"top_entropy_quantile": 0.5, "entropy_coef": 0.1}, {"cutoff": 1.0}),
])  # fmt: skip
def test_a_plan_that_cannot_be_taken_raises_and_says_why(settings, more):
    config = LossConfig(**settings)
    message = f"plan: found 'gradient_in_forward', expected another one: {NEVER}"
    with pytest.raises(ValueError, match=message):
        step(config, batch(), "gradient_in_forward", **more)
    x = batch()
    with pytest.raises(ValueError, match=message):
        explain_plan(x["hidden"].requires_grad_(), x["weight"], config=config, plan="gradient_in_forward", **more)
    assert_same(step(config, batch(), "auto", **more), step(config, batch(), None, **more))


@pytest.mark.parametrize("plan", PLANS)
def test_a_broken_coefficient_poisons_its_row_and_the_weight(plan):
    x = batch(dtype=torch.float32)
    clean = step(LossConfig(), x, plan)
    dead = x["mask"] & (x["advantage"] == 0)[:, None]
    x["hidden"][dead] = float("nan")
    x["hidden"][~x["mask"]] = float("nan")
    found = step(LossConfig(), x, plan)
    for a, b in zip(found[1], clean[1], strict=True):
        torch.testing.assert_close(a, b)  # of a dead or masked row nothing is used
    x["hidden"][0, 2, 1] = float("inf")
    x["mask"][0, 2] = True
    found = step(LossConfig("grpo"), x, plan)
    assert found[1][0][0, 2].isnan().all() and found[1][0][3].isfinite().all() and found[1][1].isnan().any()


def test_gradient_in_forward_does_not_drift(monkeypatch):
    monkeypatch.setattr(vocab_loop, "CPU_ROWS", 1)
    N, g = 256, torch.Generator().manual_seed(0)
    hidden = (torch.rand(1, N, 16, generator=g) + 0.5).bfloat16()
    weight = (0.1 * torch.randn(8, 16, generator=g)).bfloat16().requires_grad_()
    target, mask = torch.zeros(1, N, dtype=torch.int64), torch.ones(1, N, dtype=torch.bool)
    loss = LinearGRPOLoss(LossConfig("luspo"), plan="gradient_in_forward")(
        hidden, weight, target, torch.ones(1), mask=mask
    ).loss  # fmt: skip
    loss.backward()
    p = (hidden[0].double() @ weight.detach().double().T).softmax(-1)
    p[:, 0] -= 1
    error = weight.grad.double() / (p.T @ hidden[0].double()) - 1
    assert error.abs().max() <= 2**-8 * 1.001 and error.mean().abs() < 2**-11


def test_a_second_backward_takes_its_own_factor():
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=g, requires_grad=True) for shape in ((2, 3, 4), (9, 4)))
    target, mask = torch.randint(0, 9, (2, 3), generator=g), torch.ones(2, 3, dtype=torch.bool)
    loss = LinearGRPOLoss(plan="gradient_in_forward")(hidden, weight, target, torch.tensor([1.0, -2.0]), mask=mask).loss
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for x, y in zip(torch.autograd.grad(0.25 * loss, (hidden, weight)), first, strict=True):
        torch.testing.assert_close(x, 0.25 * y)
