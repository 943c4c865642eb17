"""Test that Liger's and verl's functions give the same value and gradient if they define the same loss.

Neither is a dependency. `make test-peers` installs them; without them these tests are skipped. If the definition of a
peer differs, the test says how and checks the exact relation.
"""

import importlib
import importlib.util
import itertools
import sys
import types
from pathlib import Path

import pytest
import torch

from rlloss import GRPOLoss, means, policy_loss
from rlloss.backends import backend
from rlloss.config import SapoConfig, VespoConfig
from rlloss.losses import CovarianceConfig, surrogates
from rlloss.tokens import token_covariance
from tests.support.loss_cases import LENGTH, batch, make_config, value_and_gradients


@pytest.fixture(autouse=True)
def general_path():
    with backend("torch"):
        yield


LIGER_CASES = [
    (loss_type, level, settings)
    for loss_type, level in [
        *itertools.product(("grpo", "bnpo", "dr_grpo", "dapo"), ("token", "sequence")),
        ("luspo", "sequence"), ("cispo", "token"), ("sapo", "token"), ("vespo", None),
    ]
    for settings in [
        {},
        *([{"delta": 1.5}, {"delta": 1.1}] if loss_type not in ("cispo", "sapo", "vespo") else []),
        *([{"beta": 0.1}, {"beta": 0.1, "kl_bias_correction": True}] if loss_type != "luspo" else []),
        *([{"sapo": SapoConfig(0.5, 3.0)}] if loss_type == "sapo" else []),
        *([{"vespo": VespoConfig(1.5, 0.7, 1.0, 2.5)}] if loss_type == "vespo" else []),
    ]
]  # fmt: skip


@pytest.fixture(scope="module")
def liger():
    return pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss


def hidden_batch(seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    B, T, D, V = 3, 5, 8, 23
    lengths = torch.tensor([5, 2, 3])
    hidden, weight = torch.randn(B, T, D, generator=g), torch.randn(V, D, generator=g)
    target = torch.randint(0, V, (B, T), generator=g)
    logp = (hidden @ weight.T / 0.8).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
    return {
        "hidden": hidden,
        "weight": weight,
        "target": target,
        "mask": torch.arange(T) < lengths[:, None],
        "advantage": torch.randn(B, generator=g),
        "old_logp": logp + 0.4 * torch.randn(B, T, generator=g),
        "ref_logp": logp + 0.4 * torch.randn(B, T, generator=g),
    }


def of_liger(module, x: dict, config, sampler_ratio):
    """(loss, gradients of hidden and weight, metrics) by Liger, which takes hidden states."""
    leaves = [x[name].clone().requires_grad_() for name in ("hidden", "weight")]
    loss, metrics = module(
        beta=config.beta, compiled=False, use_ref_model=config.beta != 0, epsilon_low=config.epsilon_low,
        epsilon_high=config.epsilon_high, loss_type=config.loss_type, max_completion_length=LENGTH,
        importance_sampling_level=config.ratio_level, sapo_temperature_pos=config.sapo.temperature_pos,
        sapo_temperature_neg=config.sapo.temperature_neg, temperature=0.8, delta=config.delta,
        use_bias_correction_kl=config.kl_bias_correction, vespo_k_pos=config.vespo.k_pos,
        vespo_lambda_pos=config.vespo.lambda_pos, vespo_k_neg=config.vespo.k_neg,
        vespo_lambda_neg=config.vespo.lambda_neg,
    )(
        *leaves, x["target"], x["mask"].float(), x["advantage"], old_per_token_logps=x["old_logp"],
        ref_per_token_logps=x["ref_logp"] if config.beta else None, vllm_is_ratio=sampler_ratio,
    )  # fmt: skip
    return loss.detach(), *torch.autograd.grad(loss, leaves), metrics


def of_ours(x: dict, config, sampler_ratio):
    leaves = [x[name].clone().requires_grad_() for name in ("hidden", "weight")]
    logits = leaves[0] @ leaves[1].T
    loss, metrics = GRPOLoss(config)(
        logits, x["target"], x["advantage"], mask=x["mask"], old_logp=x["old_logp"],
        ref_logp=x["ref_logp"] if config.beta else None, sampler_ratio=sampler_ratio, temperature=0.8,
    )  # fmt: skip
    return loss.detach(), *torch.autograd.grad(loss, leaves), metrics


def assert_close(found, expected):
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("loss_type, level, settings", LIGER_CASES, ids=str)
def test_liger(liger, loss_type, level, settings):
    """Liger computes its clip share before delta, so the shares are compared without delta."""
    config = make_config(loss_type, level, **settings)
    for seed, sampled in ((0, None), (1, "sequence"), (2, "token")):
        x = hidden_batch(seed)
        noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
        sampler_ratio = {None: None, "sequence": (0.3 * noise[:, :1]).exp(), "token": (0.3 * noise).exp()}[sampled]
        if sampled == "token":
            if loss_type == "luspo":
                continue  # see below
            sampler_ratio = torch.where(x["mask"], sampler_ratio, 1.0)  # vespo's reads the masked columns
        found, expected = of_ours(x, config, sampler_ratio), of_liger(liger, x, config, sampler_ratio)
        assert_close(found[:3], expected[:3])
        average = means(found[3])
        if config.beta:
            torch.testing.assert_close(average["kl"], expected[3][0], rtol=1e-5, atol=1e-6)
        if level == "token" and config.delta is None and loss_type != "sapo":
            torch.testing.assert_close(average["clip_region"], expected[3][-1])


def test_ligers_luspo_per_token_counts_masked_columns(liger):
    """Liger sums len_i * l_it over all T columns, including masked ones, and divides by B * T. With one ratio per
    sequence this equals rlloss's. Without padding both levels agree."""
    config = make_config("luspo", "token")
    x = hidden_batch(3)
    expected = of_liger(liger, x, config, None)[0]
    B, T = x["mask"].shape
    full = {**x, "mask": torch.ones(B, T, dtype=torch.bool)}
    alone = [{k: v if k == "weight" else v[i : i + 1] for k, v in full.items()} for i in range(B)]
    sums = torch.stack([of_ours(row, config, None)[0] for row in alone])  # of l_it over all columns
    torch.testing.assert_close((x["mask"].sum(-1) * sums).sum() / (B * T), expected, rtol=1e-5, atol=1e-6)
    assert not torch.isclose(of_ours(x, config, None)[0], expected, rtol=1e-3)
    assert_close(of_ours(full, config, None)[:3], of_liger(liger, full, config, None)[:3])


def test_ligers_vespo_hides_a_broken_weight(liger):
    """Liger turns a NaN weight into 0. In rlloss its sequence becomes NaN."""
    config = make_config("vespo")
    x = hidden_batch(4)
    x["old_logp"][1, 0] = float("nan")
    found, expected = of_ours(x, config, None), of_liger(liger, x, config, None)
    assert expected[0].isfinite() and (expected[1][1] == 0).all()
    assert found[0].isnan() and found[1][1][x["mask"][1]].isnan().any()
    torch.testing.assert_close(found[1][[0, 2]], expected[1][[0, 2]], rtol=2e-5, atol=2e-6)


class ActorConfig:
    """The fields of verl's class of this name that the functions read."""

    def __init__(
        self,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_c=3.0,
        tau_pos=1.0,
        tau_neg=1.05,
        policy_loss=None,
        **agg,
    ):
        self.clip_ratio, self.clip_ratio_low, self.clip_ratio_high = 0.2, clip_ratio_low, clip_ratio_high
        self.clip_ratio_c, self.tau_pos, self.tau_neg = clip_ratio_c, tau_pos, tau_neg
        self.policy_loss = types.SimpleNamespace(**(policy_loss or {}))
        self.global_batch_info = agg

    def get(self, name, default=None):
        return getattr(self, name, default)


def module(name: str, path: Path | None = None, **content) -> types.ModuleType:
    made = types.ModuleType(name)
    if path is not None:
        made.__path__ = [str(path)]
    vars(made).update(content)
    return made


@pytest.fixture(scope="module")
def verl():
    """Only verl.trainer.ppo.core_algos: the __init__ of its packages would import Ray and more."""
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("verl is not installed: make test-peers does that")
    root = Path(spec.submodule_search_locations[0])
    stubs = [
        module("omegaconf", DictConfig=dict),
        module("tensordict", TensorDict=dict),
        module("verl", root),
        module("verl.utils", root / "utils", as_torch_index=None, group_mean_std=None),
        module("verl.trainer", root / "trainer"),
        module("verl.trainer.ppo", root / "trainer" / "ppo"),
        module("verl.trainer.config", AlgoConfig=type("AlgoConfig", (), {})),
        module("verl.workers", root / "workers"),
        module("verl.workers.config", ActorConfig=ActorConfig),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for stub in stubs:
            patch.setitem(sys.modules, stub.__name__, stub)
        core_algos = importlib.import_module("verl.trainer.ppo.core_algos")
    for name in [name for name in sys.modules if name.startswith("verl.")]:
        del sys.modules[name]
    return core_algos


def sequences(x: dict) -> int:
    """The denominator that makes both equal: verl divides by the sequences with a token, rlloss by all."""
    return int(x["mask"].any(-1).sum())


def by_verl(function, x: dict, mode: str, sampled=False, **settings):
    def compute(x):
        B, T = x["mask"].shape
        advantage = x["advantage"].view(B, -1).expand(B, T)
        weights = x["sampler_ratio"] if sampled else None
        return function(
            x["old_logp"], x["logp"], advantage, x["mask"].to(x["logp"].dtype), mode, ActorConfig(**settings), weights
        )[0]

    return value_and_gradients(compute, x, torch.float64)[:2]


def by_us(x: dict, config, sampled=False, **more):
    names = ["logp", "advantage", "mask", "old_logp", *(["sampler_ratio"] if sampled else [])]
    compute = lambda x: policy_loss(**{k: x[k] for k in names}, config=config, **more).loss  # noqa: E731
    return value_and_gradients(compute, x, torch.float64)[:2]


def assert_equal(found, expected):
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-7, atol=1e-9)  # verl adds 1e-8 to lengths


AGGREGATIONS = {
    "dapo": ("token-mean", {}, lambda x: None),
    "bnpo": ("token-mean", {}, lambda x: None),
    "grpo": ("seq-mean-token-mean", {}, sequences),
    "luspo": ("seq-mean-token-sum", {}, sequences),
    "dr_grpo": ("seq-mean-token-sum-norm", {"loss_scale_factor": LENGTH}, lambda x: sequences(x) * LENGTH),
}


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_verls_ppo_loss(verl, loss_type, sampled, per_token):
    """verl's dual clip bounds the ratio by c if A < 0. delta does the same if c is at least 1 + epsilon_high."""
    mode, scale, count = AGGREGATIONS[loss_type]
    for seed, c in itertools.product(range(4), (1.3, 3.0)):
        x = batch(seed, per_token=per_token, spread=0.7)
        expected = by_verl(verl.compute_policy_loss_vanilla, x, mode, sampled, clip_ratio_c=c, **scale)
        denominator = count(x)
        config = make_config(loss_type, epsilon_high=0.28, delta=c)
        assert_equal(by_us(x, config, sampled, denominator=denominator), expected)


def test_verls_dual_clip_below_the_upper_bound(verl):
    """With c < 1 + epsilon_high verl's ratio stops at c if A < 0, and at 1 + epsilon_high if A > 0. rlloss's, as in
    2505.07291, stops at 1 + epsilon_high and at delta."""
    differs = False
    for seed in range(4):
        x = batch(seed, per_token=True, spread=0.7)
        expected = by_verl(verl.compute_policy_loss_vanilla, x, "token-mean", clip_ratio_c=1.1)
        n = int(x["mask"].sum())
        parts = [
            by_us({**x, "mask": x["mask"] & (x["advantage"] > 0)}, make_config("dapo"), denominator=n),
            by_us(
                {**x, "mask": x["mask"] & (x["advantage"] < 0)},
                make_config("dapo", epsilon_high=0.1, delta=1.1), denominator=n,
            ),
        ]  # fmt: skip
        assert_equal([sum(values) for values in zip(*parts, strict=True)], expected)
        direct = by_us(x, make_config("dapo", delta=1.1))
        differs |= not torch.allclose(direct[0], expected[0], rtol=1e-3)
    assert differs


def test_verls_clamp_of_the_log_ratio_is_max_log_ratio(verl):
    x = batch(1, per_token=True)
    x["mask"][:] = True
    x["advantage"] = -x["advantage"].abs() - 0.1
    x["old_logp"][1, 2], x["old_logp"][2, 3] = x["logp"][1, 2] - 25.0, x["logp"][2, 3] + 25.0
    for low in (0.2, 1.5):
        expected = by_verl(
            verl.compute_policy_loss_vanilla, x, "token-mean", clip_ratio_c=1e30, clip_ratio_low=low
        )  # fmt: skip
        found = by_us(x, make_config("dapo", epsilon_low=low, max_log_ratio=20.0))
        assert_equal(found, expected)
        assert found[1][1, 2] == 0 and found[0] > 1e6


@pytest.mark.parametrize("mode, loss_type", [("seq-mean-token-mean", "gspo"), ("token-mean", "dapo")])
def test_verls_gspo(verl, mode, loss_type):
    """In verl each token has only the gradient of its own log-probability times the sequence's ratio. The sum is the
    same if a sequence has one advantage and one weight."""
    for seed, sampled in itertools.product(range(4), (False, True)):
        x = batch(seed, spread=0.7, level="sequence")
        config = make_config(loss_type, "sequence", epsilon_low=0.2, epsilon_high=0.28)
        denominator = sequences(x) if loss_type == "gspo" else None
        expected = by_verl(verl.compute_policy_loss_gspo, x, mode, sampled)
        assert_equal(by_us(x, config, sampled, denominator=denominator), expected)


def test_verls_sapo(verl):
    for seed, sampled, per_token in itertools.product(range(3), (False, True), (False, True)):
        x = batch(seed, spread=0.7, per_token=per_token)
        config = make_config("sapo", "token", sapo=SapoConfig(0.5, 3.0), max_log_ratio=20.0)
        expected = by_verl(verl.compute_policy_loss_sapo, x, "seq-mean-token-mean", sampled, tau_pos=0.5, tau_neg=3.0)
        assert_equal(by_us(x, config, sampled, denominator=sequences(x)), expected)


def test_verls_cispo(verl):
    """verl's weight also has a lower bound, 1 - clip_ratio_low, which the paper does not have. clip_ratio_low >= 1
    disables it. Otherwise a token below the bound is scaled by bound / ratio."""
    for seed, sampled, per_token in itertools.product(range(3), (False, True), (False, True)):
        x = batch(seed, spread=0.7, per_token=per_token)
        config = make_config("cispo", "token", epsilon_high=1.28, max_log_ratio=20.0)
        found = by_us(x, config, sampled)
        expected = by_verl(verl.compute_policy_loss_cispo, x, "token-mean", sampled, clip_ratio_low=1.0)
        assert_equal(found, expected)
        bounded = by_verl(verl.compute_policy_loss_cispo, x, "token-mean", sampled, clip_ratio_low=0.2)
        ratio = (x["logp"] - x["old_logp"]).exp()
        assert_equal([found[1] * (0.8 / ratio).clamp(min=1.0)], [bounded[1]])


@pytest.mark.parametrize("ratio", [0.01, 0.2, 1.0])
def test_verls_clip_cov(verl, monkeypatch, ratio):
    """verl draws candidates by torch.randperm. Here the permutation begins with the largest covariances."""
    c = CovarianceConfig(ratio=ratio, low=0.05, high=2.0, selection="top")
    settings = {"clip_cov_ratio": ratio, "clip_cov_lb": c.low, "clip_cov_ub": c.high}
    picked = 0
    for seed, sampled, per_token in itertools.product(range(6), (False, True), (False, True)):
        x = batch(seed, spread=0.3, per_token=per_token)
        x["sampler_ratio"].clamp_(
            min=0.1
        )  # to verl a token that the sampler's weight removes is a candidate all the same
        advantage = x["advantage"].view(len(x["mask"]), -1).expand(x["mask"].shape)
        covariance = token_covariance(x["logp"], x["advantage"], x["mask"])
        clipped = surrogates.clipped(x["logp"] - x["old_logp"], advantage, make_config("dapo"))
        of_candidates = covariance[x["mask"] & ~clipped & (covariance > c.low) & (covariance < c.high)]
        monkeypatch.setattr(torch, "randperm", lambda n, x=of_candidates: x.argsort(descending=True))
        config = make_config("clip_cov", covariance=c)
        expected = by_verl(verl.compute_policy_loss_clip_cov, x, "token-mean", sampled, policy_loss=settings)
        assert_equal(by_us(x, config, sampled), expected)
        picked += len(of_candidates) > 1
    assert picked >= 4


@pytest.mark.parametrize("ratio, coef", [(0.01, 1.0), (0.2, 0.1), (1.0, 0.5)])
def test_verls_kl_cov(verl, ratio, coef):
    for seed, sampled, per_token in itertools.product(range(6), (False, True), (False, True)):
        x = batch(seed, spread=0.3, per_token=per_token)
        x["sampler_ratio"].clamp_(min=0.1)
        config = make_config("kl_cov", covariance=CovarianceConfig(ratio=ratio, kl_coef=coef))
        settings = {"kl_cov_ratio": ratio, "ppo_kl_coef": coef}
        expected = by_verl(verl.compute_policy_loss_kl_cov, x, "token-mean", sampled, policy_loss=settings)
        assert_equal(by_us(x, config, sampled), expected)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_verls_kl(verl, estimator):
    """verl's k3 is at most 10, without gradient beyond."""
    x = batch(2)
    x["mask"][:] = True
    x["advantage"][:] = 0.0

    def ours(x):
        config = make_config("luspo", beta=1.0, kl_estimator=estimator)
        return policy_loss(
            x["logp"], x["advantage"], x["mask"], config=config, ref_logp=x["ref_logp"], denominator=1.0
        ).loss  # fmt: skip

    def theirs(x):
        return verl.kl_penalty(x["logp"], x["ref_logp"], estimator).sum()

    assert_equal(value_and_gradients(ours, x, torch.float64)[:2], value_and_gradients(theirs, x, torch.float64)[:2])
    x["ref_logp"][1, 1] = x["logp"][1, 1] + 4.0  # k3 = e^4 - 5
    found, expected = value_and_gradients(ours, x, torch.float64), value_and_gradients(theirs, x, torch.float64)
    if estimator == "k3":
        excess = torch.tensor(4.0, dtype=torch.float64).exp() - 5 - 10
        torch.testing.assert_close(found[0] - excess, expected[0])
        assert expected[1][1, 1] == 0 and found[1][1, 1] != 0
    else:
        assert_equal(found[:2], expected[:2])
