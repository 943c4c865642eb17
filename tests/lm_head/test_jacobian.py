"""Test the plan "jacobian": a frozen head's gradient of hidden from one product in the forward."""

import math

import pytest
import torch

from rlloss import LinearGRPOLoss, LossConfig, backends, count_products, explain_plan, linear_token_stats
from rlloss.lm_head import vocab_loop
from rlloss.lm_head.call import Expected, HeadInputs, HeadOptions, prepare
from rlloss.lm_head.head import Head
from tests.lm_head.test_lm_head_statistics import SETTINGS, textbook, with_temperature
from tests.support.heads import problem
from tests.support.loss_cases import BACKENDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several chunks of rows and blocks of the vocabulary. The last ones are not full."""
    monkeypatch.setattr(vocab_loop, "CPU_ROWS", 8)
    monkeypatch.setattr(vocab_loop, "CPU_WIDTH", 16)


@pytest.fixture
def narrow_operands(monkeypatch):
    """Operands of products in the model's dtype, as on a GPU."""
    monkeypatch.setattr(Head, "operand", lambda head, x: x.to(head.compute_dtype))


def pulled_back(logp, hidden: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(logp, hidden, coefficients)[0]


def gradient(x: dict, coefficients, plan: str, dtype=None, **settings):
    """The gradient of hidden; plan "textbook" computes it from torch's own logits."""
    hidden = x["hidden"].detach().to(dtype or x["hidden"].dtype, copy=True).requires_grad_()
    given = {**x, "hidden": hidden}
    if plan == "textbook":
        logp = textbook(given, dtype, **settings)[0]
    else:
        with count_products() as products:
            logp = linear_token_stats(
                hidden, x["weight"], x["target"], bias=x.get("bias"), plan=plan, **settings
            ).logp  # fmt: skip
            found = pulled_back(logp, hidden, coefficients)
        assert plan != "jacobian" or products.units == 2 and products.units_of("hidden_grad") == 1
        return found
    return torch.autograd.grad(torch.where(coefficients == 0, 0.0, coefficients * logp).sum(), hidden)[0]


def assert_as_good_as_torch(x: dict, coefficients=None, **settings) -> None:
    """The gradient has at most twice the error of torch's own logits in the same dtype."""
    if coefficients is None:
        coefficients = torch.randn(x["target"].shape, generator=torch.Generator().manual_seed(1)).to(x["target"].device)
    exact = gradient(x, coefficients.double(), "textbook", torch.float64, **settings)
    plain = gradient(x, coefficients, "textbook", **settings)
    found = gradient(x, coefficients, "jacobian", **settings)
    assert found.dtype == plain.dtype and found.shape == plain.shape and found.isfinite().all()
    allowed = 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max().clamp(min=1e-2)
    assert (found - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["uniform", "peaked", "-inf"])
@pytest.mark.parametrize("V", [1, 7, 1000, 2049])
def test_as_good_as_torch(narrow_operands, V, kind, dtype):
    if V == 2049:
        vocab_loop.CPU_WIDTH = 512  # restored by small_tiles
    with backends.backend("torch"):
        assert_as_good_as_torch(problem(kind if V > 4 else "uniform", {7: 37}.get(V, 5), V, dtype=dtype))


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind, dtype, bias", [
    ("uniform", torch.float32, True), ("peaked", torch.bfloat16, False), ("-inf", torch.float32, True),
])  # fmt: skip
def test_temperature_softcap_scale_and_bias(monkeypatch, settings, kind, dtype, bias, on):
    if kind == "-inf" and "softcap" in settings:
        kind = "uniform"  # softcap turns -inf into a number
    if on != "torch":
        monkeypatch.setattr(vocab_loop, "CPU_WIDTH", 50)
    x = problem(kind, 20, 70, dtype=dtype, bias=bias, shape=(4, 5), on=on)
    with backends.backend(on):
        assert_as_good_as_torch(x, **with_temperature(settings, x))


def test_gradcheck_in_fp64():
    x = problem(N=4, V=21, D=3, dtype=torch.float64, bias=True)
    mask = torch.tensor([True, True, False, True])
    for settings in ({"temperature": 0.7}, {"softcap": 2.0, "logit_scale": 1.5, "mask": mask}):

        def of(h, s=settings):
            # lse and the entropy have gradients too: all three then come from logits that are computed again.
            stats = linear_token_stats(
                h, x["weight"], x["target"], bias=x["bias"], entropy_grad=True, plan="jacobian", **s
            )  # fmt: skip
            return stats[:3]

        hidden = x["hidden"].requires_grad_()
        assert torch.autograd.gradcheck(of, hidden)
        assert torch.autograd.gradcheck(lambda h, of=of: of(h)[0], hidden)


def test_by_hand():
    # Logits (log 1, log 2, log 5): p = (1/8, 1/4, 5/8).
    weight = torch.tensor([[1.0], [2.0], [5.0]]).log()
    hidden = torch.ones(1, 1, requires_grad=True)
    logp = linear_token_stats(hidden, weight, torch.tensor([2]), plan="jacobian").logp
    (found,) = torch.autograd.grad(2 * logp.sum(), hidden)
    assert found.item() == pytest.approx(2 * (3 / 8 * math.log(5) - math.log(2) / 4), rel=1e-6)


@pytest.mark.parametrize("margin", [1, 4, 7])
def test_a_confident_token_keeps_its_digits(narrow_operands, margin):
    """The target's term is not in the sum: rounded to bf16 there, it would leave an error of 2^-9 p of W_t, which for
    p near 1 is many times the gradient."""
    V, D = 40, 16
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=g).bfloat16().float()
    hidden = torch.zeros(1, D)
    weight[3] = 0.0
    weight[3, 0], hidden[0, 0] = 1.0, float(margin)
    weight[torch.arange(V) != 3, 0] = -1.0
    x = {"hidden": hidden.bfloat16(), "weight": weight.bfloat16(), "target": torch.tensor([3])}
    one = torch.ones(1)
    exact = gradient(x, one.double(), "textbook", torch.float64)
    found = gradient(x, one, "jacobian")
    # Rounded: the terms, the result; and 1 - p, from logp in fp32.
    assert (found - exact).norm() <= 2**-7 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
def test_candidates_alone_are_held_and_the_bits_of_the_outputs_stay(dtype, share):
    x = problem(N=45, V=50, dtype=dtype, bias=True)
    mask = torch.rand(45, generator=torch.Generator().manual_seed(0)) < 0.8
    candidates = None if share is None else torch.arange(45) % 50 < 50 * share
    hidden = x["hidden"].requires_grad_()
    inputs = HeadInputs(hidden, x["weight"], x["target"], x["bias"], mask)
    live = mask if candidates is None else mask & candidates
    coefficients = torch.where(live, torch.linspace(-1, 1, 45), 0.0)
    found = {}
    for plan in ("recompute", "jacobian"):
        call = prepare(inputs, HeadOptions(plan), Expected(candidates))
        with count_products() as products:
            stats = call.stats(("logp", "entropy", "lse"), False)
            found[plan] = [stats.logp, stats.entropy, stats.lse, pulled_back(stats.logp, hidden, coefficients)]
        if plan == "jacobian":
            assert products.units == pytest.approx(1 + int(live.sum()) / int(mask.sum()))
            assert products.units == pytest.approx(call.report.products)
    for a, b in zip(found["recompute"][:3], found["jacobian"][:3], strict=True):
        assert torch.equal(a, b)
    exact = gradient(x, coefficients.double(), "textbook", torch.float64)
    errors = {plan: (of[3] - exact).abs().max() for plan, of in found.items()}
    assert errors["jacobian"] <= 2 * errors["recompute"] + 1e-6 * exact.abs().max()
    assert (found["jacobian"][3][~live] == 0).all()


@pytest.mark.parametrize("held", [None, "some"])
def test_a_broken_row_without_a_coefficient_is_zero_and_a_nan_coefficient_shows(held):
    x = problem(N=20, V=50)
    x["hidden"][11, 3] = math.inf
    hidden = x["hidden"].requires_grad_()
    candidates = None if held is None else torch.arange(20) % 2 == 1
    call = prepare(HeadInputs(hidden, x["weight"], x["target"]), HeadOptions("jacobian"), Expected(candidates))
    logp = call.stats(("logp",), False).logp
    coefficients = torch.ones(20) if candidates is None else candidates.float()
    coefficients[11], coefficients[4] = 0.0, math.nan
    found = pulled_back(logp, hidden, coefficients)
    assert found[4].isnan().all() and (found[11] == 0).all()
    assert found[torch.arange(20) != 4].isfinite().all()


def test_a_second_backward_and_an_entropy_gradient():
    x = problem(N=9, V=50)
    hidden = x["hidden"].requires_grad_()
    results = {}
    for plan in ("recompute", "jacobian"):
        stats = linear_token_stats(hidden, x["weight"], x["target"], plan=plan, entropy_grad=True)
        first, second = (torch.autograd.grad(stats.logp.sum(), hidden, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        with count_products() as products:
            results[plan] = torch.autograd.grad(stats.logp.sum() + stats.entropy.sum(), hidden)[0]
        assert products.flop["recompute"] > 0
    assert torch.equal(results["recompute"], results["jacobian"])


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_the_loss_takes_it_for_a_frozen_head_where_logits_do_not_fit(loss_type):
    N, V, D = 48, 500, 8
    x = problem(N=N, V=V, D=D, dtype=torch.float64, shape=(4, 12))
    hidden, weight = x["hidden"].requires_grad_(), x["weight"]
    advantage, mask = torch.tensor([1.0, -1.0, 2.0, 0.5]), torch.ones(4, 12, dtype=torch.bool)
    budget = 8 * N * D
    results = {}
    for plan in ("recompute", "auto"):
        loss_fn = LinearGRPOLoss(loss_type, plan=plan, memory_budget=budget)
        with count_products() as products:
            loss = loss_fn(hidden, weight, x["target"], advantage, mask=mask).loss
            results[plan] = torch.autograd.grad(loss, hidden)[0]
        assert products.units == (2 if plan == "auto" else 3)
    torch.testing.assert_close(results["auto"], results["recompute"], rtol=1e-9, atol=1e-12)

    def plan_of(weight=weight, budget=budget, **settings):
        config = LossConfig(loss_type, **settings)
        return explain_plan(hidden, weight, config=config, advantage=advantage, mask=mask, memory_budget=budget)

    report = plan_of()
    assert report.plan == "jacobian" and report.products == 2 and report.extra_bytes == budget
    assert plan_of(budget=budget - 1).plan == "recompute"
    assert plan_of(entropy_coef=0.1).plan == "recompute"
    assert plan_of(top_entropy_quantile=0.25).plan == "recompute"  # 1 + 2 r is less than 2
    trained = plan_of(weight.clone().requires_grad_())
    assert trained.plan == "recompute" and trained.alternatives["jacobian"][2] == "the weight gets a gradient"
    with pytest.raises(ValueError, match="plan: found 'jacobian', expected another one: the weight gets a gradient"):
        linear_token_stats(hidden, weight.clone().requires_grad_(), x["target"], plan="jacobian")
    with pytest.raises(ValueError, match="the bias gets a gradient"):
        linear_token_stats(
            hidden, weight, x["target"], bias=torch.zeros(V, dtype=torch.float64, requires_grad=True), plan="jacobian"
        )  # fmt: skip
