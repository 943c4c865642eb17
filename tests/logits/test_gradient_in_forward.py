"""Test forward and gradient in one launch: results equal those of two launches, and unsupported calls raise."""

import math
import types

import pytest
import torch

from rlloss import GRPOLoss, LossConfig, backends, reference, token_stats
from rlloss.logits.gradient_in_forward import why_two_launches, worthwhile
from tests.support.devices import DEVICE, FUSED
from tests.support.rounding import assert_sums_close
from tests.support.saturation import CLOSE, exact, relative_error, saturated

pytestmark = pytest.mark.skipif(not backends.triton, reason="needs Triton")


@pytest.fixture(autouse=True)
def fused():
    with backends.backend(FUSED):
        yield


def batch(V=300, B=3, T=5, dtype=torch.float32, per_token=False, seed=0) -> dict:
    g = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(B, T, V, generator=g)).to(dtype)
    target = torch.randint(0, V, (B, T), generator=g)
    logp, entropy, _ = reference.token_stats(logits.double(), target)
    advantage = torch.randn((B, T) if per_token else (B,), generator=g)
    advantage.flatten()[1] = 0.0
    x = {
        "logits": logits,
        "target": target,
        "advantage": advantage,
        "mask": torch.rand(B, T, generator=g) < 0.8,
        "old_logp": (logp + 0.3 * torch.randn(B, T, generator=g)).float(),
        "ref_logp": (logp + 0.3 * torch.randn(B, T, generator=g)).float(),
    }
    return {name: value.to(DEVICE) for name, value in x.items()}


def step(config: LossConfig, x: dict, single: bool, factor: float = 1.0, **more):
    """(loss, gradient of the logits, metrics)."""
    x = dict(x)
    if config.beta == 0.0:
        x.pop("ref_logp", None)
    logits, target, advantage = x.pop("logits").clone().requires_grad_(), x.pop("target"), x.pop("advantage")
    loss, metrics = GRPOLoss(config, single_launch=single)(logits, target, advantage, **x, **more)
    (gradient,) = torch.autograd.grad(loss * factor, logits)
    return loss.detach(), gradient, metrics


def assert_same(found, expected) -> None:
    assert_sums_close(found[0], expected[0], 16, size=1)  # of 15 tokens of about 1
    assert_sums_close(found[1], expected[1], 64)
    assert torch.equal(found[1] == 0, expected[1] == 0)
    assert set(found[2]) == set(expected[2])
    for name, value in expected[2].items():
        torch.testing.assert_close(found[2][name], value, rtol=2e-6, atol=2e-6, equal_nan=True, msg=name)


@pytest.mark.parametrize("settings, more", [
    ({}, {}),
    ({"loss_type": "grpo", "delta": 1.2, "max_log_ratio": 0.4}, {"temperature": 1.05}),
    ({"loss_type": "cispo", "epsilon_high": 1.1}, {"denominator": 31.0}),
    ({"loss_type": "luspo"}, {"softcap": 5.0, "logit_scale": 0.5}),
    ({"loss_type": "dr_grpo", "max_completion_length": 9}, {"sampler_ratio": "sequence"}),
    ({"top_entropy_quantile": 0.4}, {"cutoff": 3.7, "sampler_ratio": "token"}),
    ({"top_entropy_quantile": 0.4, "entropy_denominator": "kept"}, {"cutoff": "tensor", "denominator": "tensor"}),
    ({"beta": 0.1}, {"temperature": "tensor"}),
    ({"beta": 0.1, "kl_estimator": "k1"}, {}),
    ({"beta": 0.1, "kl_estimator": "k2", "kl_bias_correction": True, "max_log_ratio": 0.2}, {}),
    ({"loss_type": "grpo", "beta": 0.1, "kl_bias_correction": True}, {"sampler_ratio": "token"}),
    ({"entropy_coef": 0.2}, {"softcap": 9.0}),
    ({"loss_type": "grpo", "entropy_coef": -0.1, "beta": 0.3}, {}),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("per_token", [False, True])
def test_the_same_loss_gradient_and_metrics_as_in_two_launches(settings, more, per_token):
    x = batch(per_token=per_token)
    shape, g = x["mask"].shape, torch.Generator().manual_seed(9)
    given = {
        ("sampler_ratio", "token"): (torch.rand(shape, generator=g) * 2 - 0.5).clamp(min=0),
        ("sampler_ratio", "sequence"): torch.tensor([[0.5], [0.0], [1.5]]),
        ("temperature", "tensor"): torch.rand(shape, generator=g) + 0.5,
        ("cutoff", "tensor"): torch.tensor(3.8),
        ("denominator", "tensor"): torch.tensor(17),
    }
    more = {name: given[name, v].to(DEVICE) if isinstance(v, str) else v for name, v in more.items()}
    config = LossConfig(**settings)
    for factor in (1.0, 0.25):
        found, expected = (step(config, x, single, factor, **more) for single in (True, False))
        assert_same(found, expected)
        dead = (found[1] == 0).all(-1)
        assert dead.any() and not dead.all() and dead[~x["mask"]].all()


@pytest.mark.parametrize("V", [2, 1000])
def test_a_target_that_leads_by_far_keeps_its_digits(V):
    logits, target = saturated(V)
    leaf = logits.to(DEVICE).unsqueeze(1).requires_grad_()
    advantage, mask = torch.linspace(0.5, 2.0, len(target), device=DEVICE), torch.ones(len(target), 1, device=DEVICE)
    loss = GRPOLoss(single_launch=True)(leaf, target.to(DEVICE).unsqueeze(1), advantage, mask=mask.bool()).loss
    for factor in (1.0, 3.0):
        (found,) = torch.autograd.grad(factor * loss, leaf, retain_graph=True)
        expected = exact(logits, target).grad * (-factor / len(target) * advantage.double().cpu()).unsqueeze(-1)
        assert relative_error(found.squeeze(1).cpu(), expected) <= CLOSE


@pytest.mark.parametrize("V, view", [(7, None), (40000, None), (300, "cut"), (129, "strided")])
def test_vocabularies_and_strides(V, view):
    x = batch(V=V, B=2, T=3)
    if view == "cut":
        x["logits"] = torch.cat([x["logits"], x["logits"][:, :1]], 1)[:, :-1]
    elif view == "strided":
        x["logits"] = x["logits"].transpose(0, 2).contiguous().transpose(0, 2)
    assert_same(step(LossConfig(), x, True), step(LossConfig(), x, False))


@pytest.mark.parametrize("factor", [1.0, 0.5, 3.0, 65536.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_at_most_twice_as_far_from_the_truth_as_torch(dtype, factor):
    x = batch(dtype=dtype)
    x["mask"][:], x["old_logp"] = True, None
    gradients = {}
    for name, of in (("exact", torch.float64), ("torch", dtype)):
        leaf = x["logits"].to(of).requires_grad_()
        logp, _, _ = reference.token_stats(leaf, x["target"])
        (-factor * (x["advantage"][:, None] * logp).mean()).backward()
        gradients[name] = leaf.grad.double()
    found = step(LossConfig(), x, True, factor)[1]
    if factor != 3.0:  # (coef * scale) * 3 and coef * (scale * 3) may differ in the last bit of fp32
        assert torch.equal(found, step(LossConfig(), x, False, factor)[1])
    found = found.double()
    error, allowed = ((g - gradients["exact"]).abs().max() for g in (found, gradients["torch"]))
    assert error <= 2 * allowed and (found != 0).any()


def test_backward_twice_with_a_kept_graph():
    x = batch()
    logits = x["logits"].clone().requires_grad_()
    loss = GRPOLoss(single_launch=True)(
        logits, x["target"], x["advantage"], mask=x["mask"], old_logp=x["old_logp"]
    ).loss  # fmt: skip
    (first,) = torch.autograd.grad(3.0 * loss, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(3.0 * second, kept)
    assert torch.equal(first, kept)  # the first gradient is the caller's and stays as it is


def test_logits_overwritten_before_the_second_backward_are_noticed():
    x = batch()
    logits = x["logits"].clone().requires_grad_() * 1.0
    loss = GRPOLoss(single_launch=True)(logits, x["target"], x["advantage"], mask=x["mask"]).loss
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_broken_row_poisons_no_other():
    x = batch()
    x["mask"][:] = True
    clean = step(LossConfig(), x, True)[1]
    x["logits"][0, 2, 5] = math.nan
    gradient = step(LossConfig(), x, True)[1]
    assert gradient[0, 2].isnan().all()
    gradient[0, 2] = clean[0, 2]
    assert torch.equal(gradient, clean)


def test_it_is_taken_where_it_can_be(monkeypatch):
    seen = []
    launch = backends.triton.gradient_in_forward
    monkeypatch.setattr(
        "rlloss.kernels.gradient_in_forward.gradient_in_forward", lambda *a, **k: seen.append(1) or launch(*a, **k)
    )
    x = batch()
    monkeypatch.setattr("rlloss.modules.worthwhile", lambda logits: True)  # on a GPU: so few rows are split instead
    arguments = {name: x[name] for name in ("mask", "old_logp")}
    logits = x["logits"].requires_grad_()
    GRPOLoss()(logits, x["target"], x["advantage"], **arguments)
    assert seen == [1]
    for config in (LossConfig("sapo"), LossConfig("gspo"), LossConfig(top_entropy_quantile=0.5)):
        GRPOLoss(config)(logits, x["target"], x["advantage"], **arguments)
    GRPOLoss(single_launch=False)(logits, x["target"], x["advantage"], **arguments)
    with torch.no_grad():
        GRPOLoss()(logits, x["target"], x["advantage"], **arguments)
    assert seen == [1]


@pytest.mark.parametrize("settings, reason", [
    ({"loss_type": "sapo"}, "loss_type='sapo'"),
    ({"loss_type": "vespo"}, "loss_type='vespo'"),
    ({"loss_type": "gspo"}, "other tokens"),
    ({"ratio_level": "sequence"}, "other tokens"),
    ({"off_policy_threshold": 0.1}, "other tokens"),
    ({"top_entropy_quantile": 0.5}, "other tokens"),
    ({"top_entropy_quantile": 0.5, "exact_k": True}, "other tokens"),
])  # fmt: skip
def test_what_is_not_row_local_is_refused_when_forced(settings, reason):
    x = batch()
    with pytest.raises(ValueError, match=f"single_launch: found True, expected None or False with .*{reason}"):
        step(LossConfig(**settings), x, True)
    step(LossConfig(**settings), x, False)


def test_row_local_with_a_cutoff_has_its_limits():
    logits = torch.zeros(1, 2, 4, device=DEVICE, requires_grad=True)
    kept = {"top_entropy_quantile": 0.5, "entropy_denominator": "kept"}
    for settings, cutoff, denominator, possible in (
        ({"top_entropy_quantile": 0.5}, 1.0, None, True),
        ({"top_entropy_quantile": 0.5, "entropy_coef": 0.1}, 1.0, None, False),
        (kept, 1.0, None, False),
        (kept, 1.0, 7.0, True),
        (kept | {"loss_type": "grpo"}, 1.0, 7.0, False),
    ):
        assert (why_two_launches(logits, LossConfig(**settings), cutoff, denominator) is None) is possible, settings
    assert "without a gradient" in why_two_launches(logits.detach(), LossConfig(), None, None)
    with backends.backend("torch"):
        assert "loss_type='dapo' and torch.float32 logits" in why_two_launches(logits, LossConfig(), None, None)


def test_in_place_and_single_launch_exclude_each_other():
    with pytest.raises(ValueError, match="single_launch: found True, expected None or False with inplace_grad=True"):
        GRPOLoss(inplace_grad=True, single_launch=True)


@pytest.mark.parametrize("backend", [FUSED, "torch"])
def test_the_module_writes_the_gradient_over_the_logits(backend):
    x = batch()
    hidden = torch.randn(3, 5, 8, device=DEVICE)
    gradients = []
    for inplace in (False, True):
        head = torch.nn.Linear(8, 300, device=DEVICE)
        torch.nn.init.constant_(head.bias, 0.0)
        torch.nn.init.normal_(head.weight, generator=torch.Generator(DEVICE).manual_seed(0))
        with backends.backend(backend):
            logits = head(hidden)
            loss = GRPOLoss(inplace_grad=inplace)(logits, x["target"], x["advantage"], mask=x["mask"]).loss
            before = logits.detach().clone()
            loss.backward()
        assert torch.equal(logits, before) is not inplace
        gradients.append(head.weight.grad)
    assert_sums_close(*gradients, terms=64)


@pytest.mark.parametrize("function", [torch.tanh, torch.exp, lambda z: z.log_softmax(-1), torch.relu, torch.sigmoid])
def test_in_place_is_refused_where_autograd_keeps_the_logits(function):
    made = function(torch.randn(3, 8, requires_grad=True))
    for logits in (made, made.view(1, 3, 8)):
        target = torch.zeros(logits.shape[:-1], dtype=torch.int64)
        with pytest.raises(ValueError, match="inplace_grad: found the output of .*Backward0, expected logits whose"):
            token_stats(logits, target, inplace_grad=True)


@pytest.mark.parametrize("loss_first", [True, False])
def test_in_place_beside_another_user_of_the_logits_is_right_or_raises(loss_first):
    """Autograd runs the later function first. If the earlier one still needs the logits, its version check raises."""
    leaf, target = torch.randn(3, 8, device=DEVICE), torch.arange(3, device=DEVICE)
    expected = leaf.clone().requires_grad_()
    (expected.log_softmax(-1)[target, target].sum() + expected.square().sum()).backward()
    leaf.requires_grad_()
    logits = leaf * 1.0

    def ours():
        return token_stats(logits, target, inplace_grad=True).logp.sum()

    if loss_first:
        (ours() + logits.square().sum()).backward()
        torch.testing.assert_close(leaf.grad, expected.grad)
    else:
        other = logits.square().sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (other + ours()).backward()


@pytest.mark.parametrize("sizes, pays", [
    ((8, 512, 16384), True),
    ((8, 512, 151936), False),  # 1056 rows in flight of 304 KB each
    ((4, 50, 16384), False),  # fewer rows than would fill the device: the forward of two launches splits them
    ((2, 200, 64000), True),
    ((2, 400, 64000), False),
])  # fmt: skip
def test_it_is_chosen_where_the_rows_in_flight_fit_the_cache(monkeypatch, sizes, pays):
    class Logits:  # bf16 logits on a GPU that is not here
        is_cuda, device, shape, dtype = True, torch.device("cuda", 7), sizes, torch.bfloat16

        def __getitem__(self, _):
            return torch.empty(sizes[:-1], device="meta")

        def element_size(self):
            return 2

    hopper = types.SimpleNamespace(
        multi_processor_count=132, max_threads_per_multi_processor=2048, L2_cache_size=50 * 2**20, warp_size=32,
        major=9, minor=0,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: hopper)
    shape = {"split": (2,), "statistics": (2048, 8), "single_launch": (100,)}
    monkeypatch.setattr(backends, "choice", lambda kernel, *_: shape[kernel])
    assert worthwhile(Logits()) is pays
    assert worthwhile(torch.zeros(1, 1, 4))
