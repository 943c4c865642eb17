"""Test that wrong options of GRPOConfig raise in the constructor or before a model is loaded, with a helpful error."""

import copy
import dataclasses
import inspect
import pickle

import pytest
import trl

from rlloss.integrations.trl import GRPOConfig, GRPOTrainer
from rlloss.rewards import group_advantage
from tests.support.trl_harness import build_trainer


def config(tmp_path, **options):
    return GRPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", **options)


IN_CONFIG = [
    (
        {"zero_advantage": "skip"},
        "zero_advantage: found 'skip', expected one of 'auto', 'forward_only', 'drop', 'keep'",
    ),
    ({"entropy_scope": "batch"}, "entropy_scope: found 'batch', expected one of 'microbatch', 'window', 'generation'"),
    ({"entropy_denominator": "some"}, "entropy_denominator: found 'some'"),
    ({"entropy_bonus_tokens": "none"}, "entropy_bonus_tokens: found 'none'"),
    ({"multi_objective_aggregation": "gpdo"}, "multi_objective_aggregation: found 'gpdo', expected one of .*'gdpo'"),
    ({"dynamic_sampling_rounds": 1.5}, "dynamic_sampling_rounds: found 1.5, expected an int"),
    ({"token_log_steps": 0.5}, "token_log_steps: found 0.5, expected an int"),
    ({"soft_overlong_cache": 4.5}, "soft_overlong_cache: found 4.5, expected an int"),
    ({"exact_k": 1}, "exact_k: found 1, expected True or False"),
    ({"lm_head_memory_budget": "1 elephant"}, "lm_head_memory_budget: found '1 elephant', expected a whole number"),
    ({"epsilon_hi": 0.3}, "unknown option epsilon_hi, did you mean epsilon_high?"),
    ({"top_entropy_quantil": 0.3}, "unknown option top_entropy_quantil, did you mean top_entropy_quantile?"),
    ({"xyzzy": 0.3}, "^unknown option xyzzy$"),
    ({"epsilon_low": 0.1, "epsilon": 0.3}, "epsilon_low: found 0.1 and epsilon=0.3, expected one of the two"),
    ({"gauges": "most"}, "gauges: found 'most', expected one of 'basic', 'all'"),
    ({"covariance": "ratio=1", "loss_type": "kl_cov"}, "covariance: found 'ratio=1', expected a dict"),
    ({"dynamic_temperature": "ratio=1"}, "dynamic_temperature: found 'ratio=1', expected a dict"),
    ({"reward_conditions": "odd"}, "reward_conditions: found 'odd', expected a dict"),
    ({"lm_head_plan": "fast"}, "lm_head_plan: found 'fast', expected one of"),
    ({"lm_head_plan": "trl", "lm_head_memory_budget": 1000}, "lm_head_memory_budget: found 1000, expected None with"),
]


@pytest.mark.parametrize("options, message", IN_CONFIG, ids=str)
def test_the_config_raises(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message.replace("?", "[?]")):
        config(tmp_path, **options)


def test_what_is_set_before_loading_is_what_trl_sets(tmp_path):
    """The options that are checked early equal those of the finished trainer."""
    options = dict(
        loss_type="grpo", epsilon=0.1, epsilon_high=0.3, beta=0.0, top_entropy_quantile=0.5, delta=2.0,
        importance_sampling_level="sequence", off_policy_mask_threshold=0.5, entropy_coef=0.01,
        multi_objective_aggregation="normalize_then_sum",
    )  # fmt: skip
    seen = {}

    class Watched(GRPOTrainer):
        def _make_loss_config(self):
            made = super()._make_loss_config()
            seen.setdefault("early" if not hasattr(self, "accelerator") else "late", made)
            return made

    build_trainer(Watched, GRPOConfig, tmp_path, **options)
    assert seen["early"] == seen["late"] and seen["early"].epsilon_high == 0.3


def test_epsilon_and_epsilon_low_are_one_bound(tmp_path):
    assert config(tmp_path, epsilon_low=0.1).epsilon == 0.1
    assert config(tmp_path).epsilon == trl.GRPOConfig.epsilon


def test_the_constructor_stays_that_of_a_dataclass(tmp_path):
    made = config(tmp_path, lm_head_memory_budget="1.5GiB", multi_objective_aggregation="gdpo")
    assert made.lm_head_memory_budget == 3 << 29 and made.multi_objective_aggregation == "normalize_then_sum"
    assert "epsilon_high" in inspect.signature(GRPOConfig).parameters
    assert {f.name for f in dataclasses.fields(trl.GRPOConfig)} < {f.name for f in dataclasses.fields(GRPOConfig)}
    again = pickle.loads(pickle.dumps(made))
    assert again.to_dict() == made.to_dict() == copy.deepcopy(made).to_dict()

    @dataclasses.dataclass
    class Mine(GRPOConfig):
        own: int = 3

    assert Mine(str(tmp_path), bf16=False, use_cpu=True, own=4).own == 4


@pytest.mark.parametrize(
    "size, found", [("1GiB", 1 << 30), ("500 MB", 500_000_000), ("0", 0), (" 2.5 kib", 2560), (7, 7)]
)
def test_a_size_is_bytes(tmp_path, size, found):
    from rlloss import LinearGRPOLoss
    from rlloss.integrations.trl import patch_trl
    from rlloss.integrations.trl.compat import why_no_lm_head

    assert config(tmp_path, lm_head_memory_budget=size).lm_head_memory_budget == found
    assert LinearGRPOLoss(memory_budget=size).options.memory_budget == found
    if why_no_lm_head() is None:
        with patch_trl(memory_budget=size):
            pass


def test_the_plain_api_names_gdpo():
    import torch

    with pytest.raises(ValueError, match="method: found 'normalize_then_sum', expected 'gdpo', which is that of TRL"):
        group_advantage(torch.zeros(4, 2), num_generations=2, method="normalize_then_sum")
