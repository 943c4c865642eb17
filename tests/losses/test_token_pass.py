"""Test the fused token pass against the general path of policy_loss. test_losses.py tests that path."""

import math
import random

import pytest
import torch

from rlloss import LossConfig, backends, policy_loss
from rlloss.config import KL_ESTIMATORS
from rlloss.loss_types import LOSSES
from rlloss.losses import fused
from tests.support.devices import DEVICE, FUSED
from tests.support.loss_cases import READ_BY

pytestmark = pytest.mark.skipif(not backends.triton, reason="needs Triton")

TYPES = [name for name, loss_type in LOSSES.items() if loss_type.kernel]
SETTINGS = 160


def draw(seed: int) -> tuple[LossConfig, dict]:
    """A random setting and a batch with ties, NaN where the mask is False, empty and dead sequences."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    B, T = r.choice([(1, 1), (3, 1), (1, 6), (3, 6), (5, 9)])
    loss_type = TYPES[seed % len(TYPES)]
    rho, beta = r.choice([1.0, 0.4, 0.0]), r.choice([0.0, 0.1])
    settings = {
        "ratio_level": r.choice(["token", "sequence"]),
        "epsilon_low": r.choice([0.0, 0.2, 1.5]),
        "epsilon_high": r.choice([1.0, 1.3, math.inf] if loss_type == "cispo" else [0.0, 0.28, math.inf]),
        "delta": r.choice([None, 0.9, 1.1, 4.0]),
        "max_log_ratio": r.choice([None, 0.3, 30.0]),
    }
    settings = {name: value for name, value in settings.items() if name in READ_BY[loss_type]}
    settings |= {
        "top_entropy_quantile": rho,
        "exact_k": rho < 1 and r.random() < 0.4,
        "beta": beta,
        "kl_estimator": r.choice(KL_ESTIMATORS) if beta else "k3",
        "kl_bias_correction": beta != 0 and r.random() < 0.6,
        "off_policy_threshold": r.choice([None, 0.1]),
        "entropy_coef": r.choice([0.0, 0.0, 0.2]),
        "max_completion_length": 9 if loss_type == "dr_grpo" else None,
    }
    if rho < 1 and beta == 0 and loss_type not in ("dr_grpo", "luspo"):
        settings["entropy_denominator"] = r.choice(["all", "kept"])
    config = LossConfig(loss_type, **settings)

    mask = torch.rand(B, T, generator=g) < r.choice([0.8, 0.8, 1.0])
    if r.random() < 0.3:
        mask[r.randrange(B)] = False
    logp = -2 * torch.rand(B, T, generator=g)
    advantage = torch.randn((B, T) if r.random() < 0.4 else (B,), generator=g)
    advantage[torch.rand(advantage.shape, generator=g) < 0.2] = 0.0
    x = {
        "logp": logp,
        "old_logp": logp + r.choice([0.1, 0.5, 2.0]) * torch.randn(B, T, generator=g) if r.random() < 0.85 else None,
        "ref_logp": torch.where(torch.rand(B, T, generator=g) < 0.4, logp, logp + 0.3) if beta else None,
        "sampler_logp": logp + 0.3 * torch.randn(B, T, generator=g)
        if config.off_policy_threshold and r.random() < 0.5
        else None,
        "entropy": torch.randint(0, 4, (B, T), generator=g) / 2.0
        if r.random() < 0.5
        else torch.rand(B, T, generator=g),
    }
    if r.random() < 0.5:
        ratio = torch.rand(B, r.choice([1, T]), generator=g) * 2
        x["sampler_ratio"] = torch.where(torch.rand(ratio.shape, generator=g) < 0.3, 0.0, ratio)
    for name, value in x.items():
        if value is not None and value.shape == mask.shape:
            x[name] = torch.where(mask, value, math.nan)
    if rho < 1 and not config.exact_k and r.random() < 0.4:
        x["cutoff"] = r.choice([0.5, torch.tensor(0.4)])
    x["denominator"] = r.choice([None, 7.5, torch.tensor(11)])
    x = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in x.items()}
    return config, {**x, "advantage": advantage.to(DEVICE), "mask": mask.to(DEVICE)}


def run(backend: str, config: LossConfig, x: dict):
    """(loss, gradients of logp and entropy, metrics)."""
    x = dict(x)
    leaves = [x.pop(name).detach().clone().requires_grad_() for name in ("logp", "entropy")]
    with backends.backend(backend):
        loss, metrics = policy_loss(leaves[0], **x, config=config, entropy=leaves[1])
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    zero = torch.zeros_like(leaves[1])
    return loss.detach(), gradients[0], zero if gradients[1] is None else gradients[1], metrics


ROUNDING = 32 * torch.finfo(torch.float32).eps  # for sums of about 30 tokens of size 1, in all or per block


def assert_same(found, expected, setting=None) -> None:
    for name, f, e in zip(("loss", "logp.grad", "entropy.grad"), found[:3], expected[:3], strict=True):
        torch.testing.assert_close(f, e, rtol=ROUNDING, atol=ROUNDING, msg=lambda m, n=name: f"{setting}: {n}: {m}")
        assert torch.equal(f == 0, e == 0), (setting, name)
    assert set(found[3]) == set(expected[3]), setting
    for name, value in expected[3].items():
        close = torch.allclose(found[3][name], value, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)
        assert close, (setting, name, value, found[3][name])


@pytest.mark.filterwarnings("error::RuntimeWarning")  # 0 * inf, even where nothing comes of it
@pytest.mark.parametrize("first", range(0, SETTINGS, 20))
def test_fused_equals_general(first):
    for seed in range(first, first + 20):
        config, x = draw(seed)
        assert_same(run(FUSED, config, x), run("torch", config, x), (seed, config))


def test_the_drawn_settings_reach_every_value():
    drawn = [draw(seed) for seed in range(SETTINGS)]
    assert {c.loss_type for c, _ in drawn} == set(TYPES)
    for name, at_least in {
        "delta": 4, "max_log_ratio": 3, "top_entropy_quantile": 3, "exact_k": 2, "kl_estimator": 3, "beta": 2,
        "kl_bias_correction": 2, "off_policy_threshold": 2, "entropy_coef": 2, "entropy_denominator": 2,
    }.items():  # fmt: skip
        assert len({getattr(c, name) for c, _ in drawn}) == at_least, name
    for name in ("old_logp", "sampler_logp", "cutoff", "sampler_ratio", "denominator"):
        assert {x.get(name) is None for _, x in drawn} == {True, False}, name
    levels = {(c.loss_type, c.ratio_level) for c, _ in drawn if c.loss_type != "gspo"}
    assert len(levels) == 2 * (len(TYPES) - 2) + 1  # clip_cov has one, gspo another name for its own


def batch(B: int, T: int, seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    logp = -2 * torch.rand(B, T, generator=g)
    x = {
        "logp": logp, "old_logp": logp + 0.4 * torch.randn(B, T, generator=g), "entropy": torch.rand(B, T, generator=g),
        "advantage": torch.randn(B, generator=g), "mask": torch.rand(B, T, generator=g) < 0.8,
    }  # fmt: skip
    return {name: value.to(DEVICE) for name, value in x.items()}


@pytest.mark.parametrize("B, T", [(2, 2500), (66, 3)])  # several blocks of tokens, several blocks of sequences
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_more_than_one_block(B, T, level):
    config = LossConfig("grpo", ratio_level=level, top_entropy_quantile=0.3)
    x = batch(B, T)
    found, expected = run(FUSED, config, x), run("torch", config, x)
    assert_same(found, expected)
    assert found[3]["tokens"] == x["mask"].sum()


@pytest.mark.parametrize("nothing", ["mask", "advantage", "sampler_ratio", "entropy"])
@pytest.mark.parametrize("loss_type", TYPES)
def test_all_dead(loss_type, nothing):
    x = batch(3, 5)
    if nothing == "mask":
        x["mask"][:] = False
    elif nothing == "advantage":
        x["advantage"][:] = 0.0
    elif nothing == "sampler_ratio":
        x["sampler_ratio"] = torch.zeros(3, 1, device=DEVICE)
    else:
        x["cutoff"] = 9.0
    own = {"cispo": {"epsilon_high": 2.0}, "dr_grpo": {"max_completion_length": 9}}.get(loss_type, {})
    config = LossConfig(loss_type, top_entropy_quantile=0.5 if nothing == "entropy" else 1.0, **own)
    found = run(FUSED, config, x)
    assert_same(found, run("torch", config, x))
    assert found[0] == 0 and (found[1] == 0).all() and found[3]["live"] == 0


def test_ties_at_the_cutoff():
    x = batch(2, 6)
    x["mask"][:] = True
    x["entropy"] = torch.tensor([[0.0, 1, 1, 0, 0, 2], [1, 1, 0, 0, 0, 0]], device=DEVICE)
    kept = {}
    for exact_k in (False, True):
        config = LossConfig(top_entropy_quantile=0.2, exact_k=exact_k)
        found = run(FUSED, config, x)
        assert_same(found, run("torch", config, x))
        kept[exact_k] = found[3]["kept"].item()
    assert kept == {False: 5, True: 3}  # floor(0.2 * 11) + 1, and all that equal the third


@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("log_ratio", [20.0, -20.0, 88.0, -88.0, 100.0, -100.0, math.inf, -math.inf, math.nan])
def test_extreme_ratios_are_those_of_the_general_path(loss_type, log_ratio):
    own = {"cispo": {"epsilon_high": 2.0}, "dr_grpo": {"max_completion_length": 9}}.get(loss_type, {})
    for advantage in (1.0, -1.0, 0.0):
        x = batch(3, 4)
        x["mask"][:] = True
        x["old_logp"] = x["logp"] + 0.1
        x["old_logp"][1] = x["logp"][1] - log_ratio
        x["advantage"] = torch.tensor([1.0, advantage, -1.0], device=DEVICE)
        found, expected = run(FUSED, LossConfig(loss_type, **own), x), run("torch", LossConfig(loss_type, **own), x)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6, equal_nan=True)
        assert torch.equal(found[1] == 0, expected[1] == 0)
        assert found[1][[0, 2]].isfinite().all()
        picked = int(found[3]["selected"]) if loss_type == "clip_cov" else 0
        assert (found[1][[0, 2]] == 0).sum() <= picked <= 1
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("loss_type, level", [("dapo", "token"), ("grpo", "sequence")])
def test_the_same_bits_every_time(loss_type, level):
    config = LossConfig(loss_type, ratio_level=level, top_entropy_quantile=0.5)
    x = batch(5, 40)
    first, second = run(FUSED, config, x), run(FUSED, config, x)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    assert all(torch.equal(first[3][name], value) for name, value in second[3].items())


@pytest.mark.parametrize("on", [FUSED, "torch"])
def test_a_second_derivative_is_refused(on):
    x = batch(2, 3)
    x["mask"][:] = True
    logp = x.pop("logp").requires_grad_()
    with backends.backend(on):
        loss = policy_loss(logp, **x).loss
    (gradient,) = torch.autograd.grad(loss, logp, create_graph=True)
    with pytest.raises(RuntimeError, match="loss_backward"):
        torch.autograd.grad(gradient.sum(), logp)


@pytest.mark.parametrize("on", [FUSED, "torch"])
@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_broken_incoming_gradient_reaches_no_token_without_a_coefficient(factor, on):
    x = batch(3, 5)
    x["advantage"][1] = 0.0
    logp = x.pop("logp").requires_grad_()
    with backends.backend(on):
        loss, metrics = policy_loss(logp, **x)
    (gradient,) = torch.autograd.grad(loss, logp, torch.tensor(factor, device=DEVICE))
    assert (gradient != 0).sum() == metrics["live"] and not gradient[gradient != 0].isfinite().any()
    assert (gradient[1] == 0).all() and (gradient[~x["mask"]] == 0).all()


@pytest.mark.parametrize("on", [FUSED, "torch"])
@pytest.mark.parametrize(
    "config", [None, LossConfig(top_entropy_quantile=0.5, entropy_coef=0.1)], ids=["default", "kept"]
)
def test_one_graph_under_compile(config, on):
    x = batch(3, 5)
    logp, x["entropy"] = x.pop("logp").requires_grad_(), x["entropy"].requires_grad_()

    def loss(logp):
        return policy_loss(2 * logp, **x, config=config).loss

    torch.compiler.reset()
    with backends.backend(on):
        eager = torch.autograd.grad(loss(logp), logp)[0]
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(logp), logp)[0], eager)
        with torch.no_grad():
            torch.testing.assert_close(compiled(logp), loss(logp))


def test_the_registered_operators_are_sound():
    x = batch(2, 3)
    settings = fused.kernel_settings(LossConfig("grpo", entropy_coef=0.1))
    arguments = (x["logp"], x["advantage"][:, None], x["mask"], x["old_logp"], None, None, None, x["entropy"])
    arguments += (None, None, None, list(settings))
    torch.library.opcheck(torch.ops.rlloss.token_pass.default, arguments)
