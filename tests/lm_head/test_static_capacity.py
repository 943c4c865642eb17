"""Test fixed capacities: they give the same loss and gradient, and nothing is read from the device."""

import pytest
import torch

from rlloss import (
    LinearGRPOLoss,
    LossConfig,
    backends,
    checks,
    count_products,
    explain_plan,
    linear_token_stats,
    reference,
)
from rlloss.lm_head import vocab_loop
from rlloss.logits.statistics import OUTPUTS
from tests.support.host_reads import host_reads
from tests.support.rounding import assert_sums_close

B, T, D, V = 3, 7, 8, 50
BACKENDS = ["torch", *(["interpreter"] if backends.triton and not torch.cuda.is_available() else [])]


def batch(dtype=torch.float32, seed=0, poison=True):
    """Two thirds of the tokens count. The other rows of hidden hold NaN and inf, and must not be read."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=g).to(dtype)
    mask = torch.rand(B, T, generator=g) < 0.67
    if poison:
        hidden[~mask] = torch.tensor([torch.nan, torch.inf]).repeat(D // 2).to(dtype)
    return {
        "hidden": hidden, "weight": torch.randn(V, D, generator=g).to(dtype),
        "bias": torch.randn(V, generator=g).to(dtype), "target": torch.randint(0, V, (B, T), generator=g),
        "mask": mask, "advantage": torch.tensor([1.0, -0.5, 0.0]),
        "temperature": torch.rand(B, T, generator=g) + 0.5,
    }  # fmt: skip


def step(x, config, capacity, plan="auto", **more):
    """(loss, gradients of hidden, weight and bias, metrics)."""
    leaves = [x[n].detach().clone().requires_grad_() for n in ("hidden", "weight", "bias")]
    loss_fn = LinearGRPOLoss(config, plan=plan, static_capacity=capacity)
    loss, metrics = loss_fn(
        *leaves[:2], x["target"], x["advantage"], bias=leaves[2], mask=x["mask"], temperature=x["temperature"], **more
    )
    return loss.detach(), torch.autograd.grad(loss, leaves), metrics


CONFIGS = {
    "dapo": LossConfig(),
    "top-entropy": LossConfig(top_entropy_quantile=0.4),
    "bonus": LossConfig(entropy_coef=0.1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", ["recompute", "keep"])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_same_loss_and_gradient(config, plan, backend):
    x = batch()
    counted = int(x["mask"].sum())
    with backends.backend(backend):
        expected = step(x, CONFIGS[config], None, plan)
        live = int(expected[2]["live"])
        assert 0 < live <= counted < B * T
        for capacity in ((counted, live), (counted + 3, live + 2), (B * T + 5, B * T + 5)):
            found = step(x, CONFIGS[config], capacity, plan)
            assert_sums_close(found[0], expected[0], B * T, size=1)
            assert_sums_close(found[1], expected[1], V)
            assert (found[1][0][~x["mask"]] == 0).all()
            assert {k: v.item() for k, v in found[2].items()} == pytest.approx(
                {k: v.item() for k, v in expected[2].items()}, rel=1e-5, abs=1e-5, nan_ok=True
            )


def test_against_the_formula_in_fp64():
    x = batch(torch.float64, poison=False)
    stats = linear_token_stats(
        x["hidden"], x["weight"], x["target"], bias=x["bias"], mask=x["mask"], static_capacity=(20, 20)
    )
    logp, entropy, lse = reference.token_stats(x["hidden"] @ x["weight"].T + x["bias"], x["target"])
    for found, expected in ((stats.logp, logp), (stats.entropy, entropy), (stats.lse, lse)):
        torch.testing.assert_close(found, torch.where(x["mask"], expected, 0.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", ["recompute", "keep"])
@pytest.mark.parametrize("bias", [300.0, -torch.inf])
def test_a_row_that_is_none_gives_nothing_whatever_the_bias(bias, plan, backend):
    """The logits of an empty slot are the bias alone, whose exponential may overflow."""
    x = batch()
    x["bias"][3] = bias
    x["bias"][5] = -bias if bias > 0 else 0.0
    x["target"].clamp_(min=6)
    with backends.backend(backend):
        expected, found = (step(x, CONFIGS["dapo"], c, plan) for c in (None, (B * T, B * T)))
    assert all(g.isfinite().all() for g in found[1])
    assert_sums_close(found[1], expected[1], V)


@pytest.mark.parametrize("plan", ["recompute", "keep"])
def test_what_finds_no_room_raises_where_looking_is_free(plan):
    x = batch()
    counted = int(x["mask"].sum())
    with pytest.raises(ValueError, match=f"static_capacity: found room for {counted - 1} rows that count, .*{counted}"):
        step(x, LossConfig(), (counted - 1, 1), plan)
    live = int(step(x, LossConfig(), None)[2]["live"])
    with pytest.raises(ValueError, match=f"static_capacity: found room for {live - 1} rows with a gradient.*{live}"):
        step(x, LossConfig(), (counted, live - 1), plan)


@pytest.mark.parametrize("plan", ["recompute", "keep"])
def test_what_finds_no_room_is_nan_where_looking_would_stall(plan, monkeypatch):
    monkeypatch.setattr(checks, "values_checked", lambda x: False)
    x = batch()
    counted = int(x["mask"].sum())
    stats = linear_token_stats(
        x["hidden"], x["weight"], x["target"], mask=x["mask"], static_capacity=(counted - 2, 1), outputs=OUTPUTS
    )
    places = x["mask"].flatten().nonzero().squeeze(-1)
    for values in stats[:5]:
        values = values.flatten()
        assert values[places[-2:]].isnan().all() and values[places[:-2]].isfinite().all()
        assert (values[~x["mask"].flatten()] == 0).all()
    # The rows that do not fit belong to the last sequence. Its advantage is 0, so the loss does not see them.
    assert step(x, LossConfig(), (counted - 2, counted - 2), plan)[1][1].isnan().all()
    loss, gradients, metrics = step(x, LossConfig(), (counted, 2), plan)
    assert metrics["live"] > 2 and gradients[1].isnan().all() and gradients[2].isnan().all()
    assert gradients[0].isnan().any()
    x["advantage"] = torch.tensor([0.0, 0.0, 1.0])
    old = torch.full((B, T), -4.0)  # on-policy every ratio, and with it the loss, is 1 whatever logp is
    loss, gradients, _ = step(x, LossConfig(), (counted - 2, counted - 2), plan, old_logp=old)
    assert loss.isnan() and gradients[1].isnan().all() and gradients[2].isnan().all()


@pytest.mark.parametrize("settings, room", [
    ({}, (B * T,)), ({}, (2, 3)), ({}, (2, 0)), ({}, (2.0, 1.0)), ({"mask": None}, (B * T - 1, 1)),
    ({"plan": "gradient_in_forward"}, (B * T, B * T)),
], ids=str)  # fmt: skip
def test_what_does_not_fit_raises(settings, room):
    x = batch()
    given = {"mask": x["mask"], "plan": "auto", **settings}
    name = "plan" if given["plan"] == "gradient_in_forward" else "static_capacity"
    with pytest.raises(ValueError, match=f"^{name}: found"):
        if name == "plan":
            step(x, LossConfig(), room, "gradient_in_forward")
        linear_token_stats(x["hidden"], x["weight"], x["target"], mask=given["mask"], static_capacity=room)


@pytest.mark.parametrize("plan", ["recompute", "keep"])
def test_products_are_run_for_the_room(plan):
    x = batch()
    capacity = (18, 10)
    with count_products() as products:
        step(x, LossConfig(top_entropy_quantile=0.2), capacity, plan)
    r = 10 / 18
    assert products.unit == 2 * 18 * V * D
    assert products.units == pytest.approx(1 + (3 if plan == "recompute" else 2) * r)
    leaves = [x[n].requires_grad_() for n in ("hidden", "weight")]
    report = explain_plan(*leaves, mask=x["mask"], plan=plan, static_capacity=capacity)
    assert report.products == pytest.approx(products.units) and report.rows == 18


def reads_of(monkeypatch, forward):
    """(host reads of the forward, of the backward)."""
    with host_reads(monkeypatch) as first:
        loss = forward()
    with host_reads(monkeypatch) as second:
        loss.backward()
    return first.found, second.found


def linear_forward(x, config, plan, capacity, **more):
    leaves = [x[n].detach().clone().requires_grad_() for n in ("hidden", "weight", "bias")]
    loss_fn = LinearGRPOLoss(config, plan=plan, static_capacity=capacity)
    return lambda: loss_fn(*leaves[:2], x["target"], x["advantage"], bias=leaves[2], mask=x["mask"], **more).loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("plan", ["auto", "recompute", "keep"])
def test_nothing_is_asked_of_the_device(monkeypatch, plan, config, backend):
    with backends.backend(backend):
        run = linear_forward(batch(), CONFIGS[config], plan, (B * T, B * T))
        assert reads_of(monkeypatch, run) == ([], [])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("plan", ["recompute", "keep"])
def test_without_it_once_in_the_forward_and_once_in_the_backward(monkeypatch, plan, config, backend):
    x = batch()
    with backends.backend(backend):
        forward, backward = reads_of(monkeypatch, linear_forward(x, CONFIGS[config], plan, None))
    assert (forward, backward) == (["tolist"], ["nonzero"])


def test_gradients_made_in_the_forward_are_asked_for_once_a_chunk_of_rows(monkeypatch):
    monkeypatch.setattr(vocab_loop, "CPU_ROWS", 5)
    x = batch()
    chunks = -(-int(x["mask"].sum()) // 5)
    with backends.backend("torch"):
        forward, backward = reads_of(monkeypatch, linear_forward(x, LossConfig(), "gradient_in_forward", None))
    assert (forward, backward) == (["tolist", *["nonzero"] * chunks], []) and chunks == 3


def test_inside_torch_compile():
    x = batch()

    loss_fn = LinearGRPOLoss(LossConfig(), static_capacity=(B * T, B * T))

    def run(hidden, weight, bias):
        return loss_fn(hidden, weight, x["target"], x["advantage"], bias=bias, mask=x["mask"]).loss

    torch.compiler.reset()
    found = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [x[n].detach().clone().requires_grad_() for n in ("hidden", "weight", "bias")]
        loss = function(*leaves)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(found[1], found[0])
