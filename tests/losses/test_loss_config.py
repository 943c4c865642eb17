"""Test that wrong settings and arguments raise, and that the error shows the wrong value."""

import math

import pytest
import torch

from rlloss import LossConfig, policy_loss
from rlloss.config import CovarianceConfig, SapoConfig, VespoConfig
from tests.support.loss_cases import LOSS_TYPES, READ_BY

NO_EFFECT = "it has no effect with"
# For each setting that only some losses read, a value other than the default.
OTHER = {
    "ratio_level": "sequence",
    "epsilon_low": 0.1,
    "epsilon_high": 1.5,
    "delta": 4.0,
    "max_log_ratio": 5.0,
    "max_completion_length": 9,
    "sapo": SapoConfig(2.0, 2.0),
    "vespo": VespoConfig(1.0, 1.0, 1.0, 1.0),
    "covariance": CovarianceConfig(ratio=0.1),
}
CLIPPED = {"grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo"}
READERS = {
    "ratio_level": CLIPPED | {"cispo", "sapo"},  # gspo may say "sequence", which it is
    "epsilon_low": CLIPPED | {"clip_cov"},
    "epsilon_high": CLIPPED | {"cispo", "clip_cov"},
    "delta": CLIPPED | {"clip_cov"},
    "max_log_ratio": CLIPPED | {"cispo", "sapo", "clip_cov", "kl_cov"},
    "max_completion_length": {"dr_grpo"},
    "sapo": {"sapo"},
    "vespo": {"vespo"},
    "covariance": {"clip_cov", "kl_cov"},
}


def needed(loss_type: str) -> dict:
    return {"cispo": {"epsilon_high": 2.0}, "dr_grpo": {"max_completion_length": 9}}.get(loss_type, {})


def test_the_table_below_knows_every_such_setting():
    assert set(OTHER) == set(READERS) == set().union(*READ_BY.values())


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_setting_that_the_loss_does_not_read_raises(loss_type, name):
    settings = {**needed(loss_type), name: OTHER[name]}
    if loss_type in READERS[name]:
        assert getattr(LossConfig(loss_type, **settings), name) == OTHER[name]
        return
    with pytest.raises(ValueError, match=f"{name}: found .*{NO_EFFECT} loss_type='{loss_type}'"):
        LossConfig(loss_type, **settings)


@pytest.mark.parametrize("settings, message", [
    ({"loss_type": "gmpo"}, "loss_type: found 'gmpo', expected one of 'grpo', 'bnpo', 'dr_grpo', 'dapo'"),
    ({"ratio_level": "batch"}, "ratio_level: found 'batch', expected one of 'token', 'sequence'"),
    ({"loss_type": "cispo"}, "epsilon_high: found 0.28, expected a number >= 1 with 'cispo'"),
    ({"loss_type": "cispo", "epsilon_high": 0.99}, "epsilon_high: found 0.99"),
    ({"loss_type": "cispo", "epsilon_high": math.nan}, "epsilon_high: found nan"),
    ({"loss_type": "sapo", "epsilon_low": 0.1}, "epsilon_low: found 0.1, expected 0.2: it has no effect"),
    ({"loss_type": "vespo", "ratio_level": "sequence", "beta": 0.1}, f"ratio_level: found 'sequence'.*{NO_EFFECT}"),
    ({"loss_type": "vespo", "max_log_ratio": 5.0}, f"max_log_ratio: found 5.0.*{NO_EFFECT}"),
    ({"epsilon_low": -0.1}, "epsilon_low: found -0.1, expected a number >= 0"),
    ({"epsilon_high": -0.1}, "epsilon_high: found -0.1"),
    ({"epsilon_low": math.nan}, "epsilon_low: found nan"),
    ({"top_entropy_quantile": 20}, r"top_entropy_quantile: found 20, expected a number in \[0, 1\]"),
    ({"top_entropy_quantile": math.nan}, "top_entropy_quantile: found nan"),
    ({"delta": 0.0}, "delta: found 0.0"),
    ({"max_log_ratio": -1.0}, "max_log_ratio: found -1.0"),
    ({"off_policy_threshold": -1.0}, "off_policy_threshold: found -1.0"),
    ({"off_policy_threshold": 0.0}, "off_policy_threshold: found 0.0"),
    ({"off_policy_threshold": math.nan}, "off_policy_threshold: found nan"),
    ({"beta": math.inf}, "beta: found inf"),
    ({"entropy_coef": math.nan}, "entropy_coef: found nan"),
    ({"loss_type": "dr_grpo"}, "max_completion_length: found None"),
    ({"loss_type": "dr_grpo", "max_completion_length": 0}, "max_completion_length: found 0"),
    ({"loss_type": "dr_grpo", "max_completion_length": 9.5}, "max_completion_length: found 9.5"),
    ({"max_completion_length": 5}, "max_completion_length: found 5, expected None: it has no effect with loss_type"),
    ({"entropy_denominator": "kept"}, "entropy_denominator: found 'kept'.*no effect with top_entropy_quantile=1.0"),
    ({"entropy_denominator": "some"}, "entropy_denominator: found 'some'"),
    ({"exact_k": True}, "exact_k: found True.*no effect"),
    ({"kl_estimator": "k4", "beta": 0.1}, "kl_estimator: found 'k4', expected one of 'k1', 'k2', 'k3'"),
    ({"kl_estimator": "k2"}, "kl_estimator: found 'k2'.*no effect with beta=0.0"),
    ({"kl_bias_correction": True}, "kl_bias_correction.*no effect with beta=0.0"),
    ({"entropy_denominator": "kept", "top_entropy_quantile": 0.2, "beta": 0.1}, "beta: found 0.1.*Eq. 6 has no KL"),
    ({"entropy_denominator": "kept", "top_entropy_quantile": 0.2, "loss_type": "dr_grpo", "max_completion_length": 9},
     r"entropy_denominator: found kept.*divides by B \* max_completion_length"),
    ({"entropy_denominator": "kept", "top_entropy_quantile": 0.2, "loss_type": "luspo"},
     "entropy_denominator: found kept.*'luspo', which divides by B"),
    ({"entropy_bonus_tokens": "some"}, "entropy_bonus_tokens: found 'some', expected one of 'kept', 'all'"),
    ({"entropy_bonus_tokens": "all", "entropy_coef": 0.1}, "entropy_bonus_tokens: found 'all'.*no effect with top_ent"),
    ({"entropy_bonus_tokens": "all", "top_entropy_quantile": 0.2}, "entropy_bonus_tokens.*no effect with entropy_coef"),
])  # fmt: skip
def test_conflicting_settings_are_named(settings, message):

    with pytest.raises((ValueError, TypeError), match=message):
        LossConfig(**settings)


@pytest.mark.parametrize("settings", [
    {"loss_type": "gspo", "ratio_level": "sequence"},
    {"loss_type": "gspo", "delta": 3.0, "max_log_ratio": 5.0, "epsilon_low": 0.01},
    {"loss_type": "cispo", "epsilon_high": 1.0},
    {"loss_type": "cispo", "epsilon_high": math.inf, "ratio_level": "sequence"},
    {"loss_type": "vespo", "ratio_level": "sequence", "beta": 0.1, "kl_bias_correction": True},
    {"epsilon_low": 1.5, "epsilon_high": math.inf},
    {"top_entropy_quantile": 0.2, "entropy_denominator": "kept", "exact_k": True},
    {"beta": -0.1, "entropy_coef": -0.1},
])  # fmt: skip
def test_what_is_accepted(settings):
    config = LossConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings
    assert hash(config) == hash(LossConfig(**settings))


@pytest.mark.parametrize("kind", [SapoConfig, VespoConfig])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_gates_are_positive(kind, value):
    section = kind.__name__.removesuffix("Config").lower()
    for name in vars(kind()):
        with pytest.raises(ValueError, match=f"{section}.{name}: found {value}, expected a finite number above 0"):
            kind(**{name: value})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ratio": 0.0}, r"covariance.ratio: found 0.0, expected a number in \(0, 1\]"),
        ({"ratio": 1.1}, "covariance.ratio: found 1.1"),
        ({"ratio": math.nan}, "covariance.ratio: found nan"),
        ({"low": 6.0}, "covariance.low: found 6.0, expected at most covariance.high=5.0"),
        ({"kl_coef": 0.0}, "covariance.kl_coef: found 0.0, expected a finite number above 0"),
        ({"penalty": "k1"}, "covariance.penalty: found 'k1', expected one of 'abs', 'k3'"),
        ({"scope": "global"}, "covariance.scope: found 'global', expected one of 'microbatch', 'generation'"),
        ({"selection": "best"}, "covariance.selection: found 'best', expected one of 'random', 'top'"),
    ],
)
def test_settings_of_the_covariance_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        CovarianceConfig(**settings)


@pytest.mark.parametrize("name, value", [("seed", 0.5), ("seed", True), ("at_least_one", 1)])
def test_types_of_the_covariance_are_checked(name, value):
    with pytest.raises(TypeError, match=f"covariance.{name}: found {value!r}, expected"):
        CovarianceConfig(**{name: value})


@pytest.mark.parametrize("loss_type, settings", [
    ("kl_cov", {"low": 0.5}), ("kl_cov", {"high": 9.0}), ("kl_cov", {"selection": "top"}), ("kl_cov", {"seed": 1}),
    ("clip_cov", {"kl_coef": 0.1}), ("clip_cov", {"penalty": "k3"}), ("clip_cov", {"seed": 1, "selection": "top"}),
])  # fmt: skip
def test_settings_of_the_other_covariance_loss_raise(loss_type, settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=f"covariance.{name}: found .*it has no effect with"):
        LossConfig(loss_type, covariance=CovarianceConfig(**settings))


@pytest.mark.parametrize("name, value", [
    ("epsilon_low", "0.2"), ("epsilon_high", None), ("beta", None), ("delta", "4"), ("max_log_ratio", "5"),
    ("top_entropy_quantile", "20%"), ("entropy_coef", None), ("off_policy_threshold", "0.1"),
])  # fmt: skip
def test_settings_of_the_wrong_type_are_named(name, value):
    with pytest.raises(TypeError) as error:
        LossConfig(**{name: value})
    assert str(error.value).startswith(f"{name}: found {value!r}, expected a number")


@pytest.mark.parametrize("loss_type, name, kind", [
    ("sapo", "sapo", "SapoConfig"), ("vespo", "vespo", "VespoConfig"), ("kl_cov", "covariance", "CovarianceConfig"),
])  # fmt: skip
def test_the_sections_are_not_dicts(loss_type, name, kind):
    with pytest.raises(TypeError, match=f"{name}: found dict, expected a {kind}"):
        LossConfig(loss_type, **{name: {}})


@pytest.mark.parametrize("change, error, message", [
    ({"logp": torch.zeros(3)}, ValueError, r"logp: found shape \(3,\), expected \[B, T\]"),
    ({"logp": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logp: found dtype torch.int64"),
    ({"advantage": torch.zeros(3)}, ValueError, r"advantage: found shape \(3,\), expected \[B\] = \(2,\) or"),
    ({"advantage": torch.zeros(2, dtype=torch.int64)}, TypeError, "advantage: found dtype torch.int64"),
    ({"mask": torch.ones(2, 3)}, TypeError, "mask: found dtype torch.float32, expected torch.bool"),
    ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask: found shape \(2, 4\), expected \(2, 3\)"),
    ({"old_logp": torch.zeros(2, 1)}, ValueError, r"old_logp: found shape \(2, 1\)"),
    ({"entropy": torch.zeros(2)}, ValueError, r"entropy: found shape \(2,\)"),
    ({"ref_logp": torch.zeros(2, 3)}, ValueError, "ref_logp: found a tensor, expected None with beta=0.0"),
    ({"config": LossConfig(beta=0.1)}, ValueError, "ref_logp: found None, expected a tensor with beta=0.1"),
    ({"config": LossConfig(top_entropy_quantile=0.2)}, ValueError, "entropy: found None"),
    ({"config": LossConfig(entropy_coef=0.2)}, ValueError, "entropy: found None.*entropy_coef=0.2"),
    ({"config": LossConfig(entropy_coef=0.2), "entropy": torch.zeros(2, 3),
      "logp": torch.zeros(2, 3).requires_grad_()}, ValueError, "entropy: found a tensor without gradient"),
    ({"cutoff": 0.5}, ValueError, "cutoff: found 0.5, expected None"),
    ({"cutoff": 0.5, "entropy": torch.zeros(2, 3), "config": LossConfig(top_entropy_quantile=0.2, exact_k=True)},
     ValueError, "cutoff: found 0.5, expected None with top_entropy_quantile=1.0 or exact_k"),
    ({"cutoff": torch.ones(2, 3)}, ValueError, r"cutoff: found shape \(2, 3\), expected one number"),
    ({"sampler_ratio": torch.ones(2)}, ValueError, r"sampler_ratio: found shape \(2,\)"),
    ({"sampler_ratio": torch.ones(2, 1, dtype=torch.int64)}, TypeError, "sampler_ratio: found dtype torch.int64"),
    ({"sampler_logp": torch.zeros(2, 3)}, ValueError,
     "sampler_logp: found a tensor, expected None with off_policy_threshold=None"),
    ({"sampler_logp": torch.zeros(3, 2), "config": LossConfig(off_policy_threshold=0.1)}, ValueError,
     r"sampler_logp: found shape \(3, 2\)"),
    ({"denominator": 0.0}, ValueError, "denominator: found 0.0"),
    ({"denominator": -3}, ValueError, "denominator: found -3"),
    ({"denominator": torch.ones(2)}, ValueError, r"denominator: found shape \(2,\), expected one number"),
    *(({"denominator": torch.tensor(found)}, ValueError, "denominator: found .*, expected a finite number")
      for found in (0, -1.0, math.nan, math.inf)),
    *(({"cutoff": found, "entropy": torch.zeros(2, 3), "config": LossConfig(top_entropy_quantile=0.2)}, ValueError,
       "cutoff: found .*nan.*, expected a number") for found in (math.nan, torch.tensor(math.nan))),
    ({"kept": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "kept: found a tensor, expected None with top_entropy"),
    ({"kept": torch.ones(2, 3, dtype=torch.bool), "cutoff": 0.5, "entropy": torch.zeros(2, 3),
      "config": LossConfig(top_entropy_quantile=0.2)}, ValueError, "kept: found a tensor, expected None with.*cutoff"),
    ({"kept": torch.ones(2, 3), "config": LossConfig(top_entropy_quantile=0.2)}, TypeError, "kept: found dtype"),
    ({"selected": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "selected: found a tensor, expected None"),
    ({"config": LossConfig("clip_cov", covariance=CovarianceConfig(scope="generation"))}, ValueError,
     "selected: found None, expected a .* tensor with covariance.scope='generation'"),
    ({"selected": torch.ones(2, 1, dtype=torch.bool),
      "config": LossConfig("clip_cov", covariance=CovarianceConfig(scope="generation"))}, ValueError,
     r"selected: found shape \(2, 1\)"),
    ({"config": "dapo"}, TypeError, "config: found 'dapo', expected a LossConfig"),
])  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    good = {"logp": torch.zeros(2, 3), "advantage": torch.zeros(2), "mask": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(error, match=message):
        policy_loss(**{**good, **change})


def test_an_entropy_without_gradient_is_fine_where_no_gradient_is_asked_for():
    with torch.no_grad():
        loss = policy_loss(
            torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2, dtype=torch.bool), entropy=torch.ones(1, 2),
            config=LossConfig(entropy_coef=0.5),
        ).loss  # fmt: skip
    assert loss == -1.5
