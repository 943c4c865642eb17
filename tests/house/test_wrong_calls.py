"""Test that each kind of wrong value of each argument of each public function raises an error with found and expected.

`CALLS` has right calls of each public function. `KINDS` has wrong values for each argument name; a name means the same
everywhere. A new function needs a right call, a new argument a kind.
"""

import contextlib
import copy
import enum
import importlib
import inspect
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import rlloss
from rlloss import LossConfig, backends, losses
from rlloss.entropy import (
    AdaptiveEntropyCoef,
    DynamicTemperature,
    EDTemperature,
    EntropyFit,
    TwoLevelTemperature,
    diagnostics,
    entropy_temperature,
    gauges,
    scale_logits,
    temperature_rule,
)
from rlloss.logits.statistics import TokenStats
from rlloss.losses import CovarianceConfig, SapoConfig, VespoConfig
from rlloss.plan import head_costs
from rlloss.rewards import (
    SoftOverlongPenalty,
    group_accuracy,
    resolution_table,
    reward_resolution,
    soft_overlong_penalty,
)
from rlloss.tokens import (
    completion_mask,
    covariance_selection,
    masks,
    not_truncated,
    token_covariance,
    token_states,
    top_entropy_mask,
)

B, T, V, D, G = 2, 3, 5, 4, 2


def no_tensor(x):
    array = x.detach().float().numpy() if x.dtype == torch.bfloat16 else x.detach().numpy()
    return [None, "x", 0.5, x.tolist(), array, nn.Identity(), torch.nn.Linear]


def shapes(x):
    return [x[None], x[..., :-1], x[..., 0]]


def tensor(*dtypes, shape=shapes, device=True, more=lambda x: []):
    """Wrong values of a tensor argument: these dtypes; shapes, if other arguments determine its shape; devices."""
    others = lambda x: [x.to(d) for d in dtypes]  # noqa: E731
    elsewhere = lambda x: [x.detach().to("meta")] if device else []  # noqa: E731
    return lambda x: no_tensor(x) + others(x) + elsewhere(x) + (shape(x) if shape else []) + more(x)


NO_FLOAT = (torch.complex64, torch.int64, torch.bool)
floats = tensor(*NO_FLOAT)
alone = tensor(*NO_FLOAT, shape=None, device=False)  # nothing to compare it with
flags = tensor(torch.int64, torch.float32, torch.complex64, more=lambda x: [x[:, 0]])
ids = tensor(torch.float32, torch.bool, torch.complex64, more=lambda x: [x + V, x - V])

NO_NUMBER = [None, "1", "", [1.0], (1.0,), 1j, True, nn.Identity(), np.ones(2), torch.ones(3, dtype=torch.complex64)]


def number(*outside):
    return lambda x: [*NO_NUMBER, torch.ones(3), *outside]


def whole(*outside):
    return lambda x: [*NO_NUMBER, torch.ones(3), 1.5, 2.0, math.nan, *outside]


def number_or_tensor(*outside):
    def wrong(x):
        of_tensor = [torch.ones(3), torch.ones(B, T).bool(), torch.ones(B, T).requires_grad_()]
        return [*NO_NUMBER, math.nan, *outside, *of_tensor]

    return wrong


def these(*wrong):
    return lambda x: list(wrong)


flag = these("x", "True", None, 1, 0, 0.0, [True], torch.tensor(True), np.True_)
choice = these("nonsense", "", None, 3, True, ["grpo"], np.array(["grpo", "dapo"]), torch.ones(3))
budget = these("1 elephant", "", "-1GiB", "1.2.3MB", "GiB", -1, 1.5, math.inf, math.nan, [1], True, torch.ones(3))
group = these("x", 3, object(), [0, 1])
above_0 = number(0.0, -1.0, math.nan, math.inf)
not_negative = number(-1.0, math.nan)
at_least_1 = whole(0, -1)
temperature_number = number(-1.0, 0.001, math.nan, math.inf)
rewards_like = these("x", 1.0, ["a"], [1.0], torch.ones(3), torch.ones(1, dtype=torch.complex64), [math.nan], {"a": 1})

KINDS = {
    # Tensors.
    "logits": tensor(*NO_FLOAT, shape=lambda x: [x[None], x[0]]),
    "scale_logits.logits": alone,
    "entropy_temperature.logits": alone,
    "hidden": floats,
    "weight": tensor(*NO_FLOAT, shape=lambda x: [x[None], x[..., :-1], x[0]]),
    "bias": floats,
    "logp": floats,
    "advantage": tensor(*NO_FLOAT, shape=lambda x: [x[None], x[:-1], x[0]]),
    "explain_plan.advantage": tensor(*NO_FLOAT, device=False, shape=lambda x: [x[None], x[:-1], x[0]]),
    "old_logp": floats,
    "ref_logp": floats,
    "sampler_logp": floats,
    "behavior_logp": floats,
    "sampler_ratio": floats,
    "entropy": floats,
    "temperature.entropy": alone,
    "EntropyFit.update.entropy": number(),
    "group": tensor(*NO_FLOAT, more=lambda x: [x + 2.0]),
    "rewards": tensor(*NO_FLOAT, device=False, shape=lambda x: [x[None], x[:-1], x[:0]], more=lambda x: [x / 0.0]),
    "group_accuracy.rewards": tensor(*NO_FLOAT, device=False, shape=lambda x: [x[None], x[:-1], x[:0]]),
    "token_counts": tensor(torch.complex64, torch.bool, device=False, more=lambda x: [-x]),
    "lengths": tensor(torch.complex64, torch.bool, device=False, shape=None),
    "target": ids,
    "sequence_key": tensor(torch.int32, torch.float32, torch.bool, torch.complex64, shape=lambda x: [x[None], x[:-1]]),
    "completion_ids": tensor(torch.float32, torch.bool, torch.complex64, device=False, shape=None),
    "mask": flags,
    "explain_plan.mask": tensor(torch.int64, torch.float32, torch.complex64, device=False, more=lambda x: [x[:, 0]]),
    "kept": flags,
    "selected": flags,
    "candidates": flags,
    "vector": tensor(torch.complex64, torch.int64, device=False, shape=lambda x: [x[:-1], x[None]]),
    "x": lambda x: no_tensor(x),
    # Numbers.
    "temperature": number_or_tensor(0.0, -1.0, math.inf),
    "cutoff": number_or_tensor(),
    "denominator": number_or_tensor(0.0, -1.0, math.inf),
    "softcap": above_0,
    "logit_scale": above_0,
    "rho": number(-0.1, 1.1, math.nan),
    "threshold": number(math.nan),
    "live_share": number(-0.1, 1.1, math.nan),
    "clip_min": number(math.nan, 5.0),
    "clip_max": lambda x: number(math.nan, 0.0, -1.0)(x)[1:],  # None: no bound
    "eps": number(-1.0, math.nan, math.inf),
    "target_entropy": above_0,
    "cov": number(),
    "mean_entropy": number(),
    "num_generations": whole(0, -1, 3),
    "eos_token_id": whole(),
    "max_length": at_least_1,
    "cache": whole(-1, 100),
    "num_rewards": at_least_1,
    "memory_budget": budget,
    "model": these(None, 3, [], {}, {"vocab_size": 0, "hidden_size": 4}, {"vocab_size": 3}),
    "completions": whole(0, -1),
    "tokens": whole(0, -1),
    "fill": number(0.0, -0.1, 1.1, math.nan),
    "dtype": these(None, 3, "int8", torch.float32, ""),
    "frozen_head": these(None, 0, 1, "yes"),
    "device": these(None, 3, "tpu", torch.device("cpu"), ""),
    "static_capacity": these("ab", 3, (1, 2), (2,), (2.0, 1.0), (True, True), (2, 0), ("6", "6"), torch.ones(2)),
    "draw": these("x", 1.5, True, [1], torch.ones(3), torch.tensor(1.5), np.ones(2)),
    # Settings.
    "config": these({}, 3, LossConfig, "nonsense", [LossConfig()], torch.ones(3)),
    "compute_dtype": these("float32", 3, True, float, torch.int64, torch.ones(3)),
    "entropy_grad": flag,
    "inplace_grad": flag,
    "single_launch": these("x", 1, 0, [True], torch.tensor(True)),
    "batch_invariant": flag,
    "inplace": flag,
    "exact_k": flag,
    "outputs": these(("logp", "nonsense"), (), None, 3, "nonsense", [1], [["logp"]], torch.ones(3)),
    "plan": choice,
    "method": choice,
    "scale": choice,
    "mode": choice,
    "loss_type": choice,
    "name": choice,
    "process_group": group,
    "vocab_group": group,
    "weights": rewards_like,
    "conditions": these(
        "x", 3, [3], [(0,)], [(0, 0, 1.0)], [(0, 5, 1.0)], [(0, 1, "x")], [(0, 1, math.nan)], {0: 1}, {"a": (1, 1.0)},
        [(0, 1, None)], [("a", "b", 1.0)], [(0, 1, torch.ones(3))],
    ),
    "names": these("x", 3, ["a"], ["a", "a"], [1, 2], torch.ones(3)),
    "group_sizes": these("x", 3, (0,), (1.5,), ("a",), (None,), (True,)),
    "rule": these("edt", None, 3, {"rule": "edt"}, EDTemperature, torch.ones(3)),
    "settings": these(
        "edt", None, 3, [("rule", "edt")], {}, {"rule": "nonsense"}, {"rule": ["edt"]}, {"rule": "edt", "base": 1.0},
    ),
    "state": these("x", None, 3, {}, {"coef": 1.0}, {"coef": "x", "last_entropy": 1.0}, [0.0, 1.0]),
    "sums": these("x", None, 3, {}, [torch.ones(3)], {"tokens": 1.0, "nonfinite": 0.0, "moments": 3}),
    "metrics": these("x", None, 3, {}, [torch.ones(3)], {"tokens": "x", "kept": 1.0, "live": 1.0}),
    "like": these("x", None, 3, [torch.ones(3)], {"tokens": 1.0}),
    # TRL hands over lists.
    "SoftOverlongPenalty.__call__.completion_ids": these(None, 3, [3], ["a", 3], [None]),
    "DynamicTemperature.temperature.candidates": these("x", None, [1], torch.ones(7), torch.ones(2) * 1j, 1j),
    "TwoLevelTemperature.temperature.candidates": None,  # not looked at
    "EDTemperature.temperature.candidates": None,
    # Fields.
    "AdaptiveEntropyCoef.coef": number(-1.0, 2.0, math.nan),
    "AdaptiveEntropyCoef.target": above_0,
    "AdaptiveEntropyCoef.delta": above_0,
    "AdaptiveEntropyCoef.minimum": number(2.0, math.nan, -math.inf),
    "AdaptiveEntropyCoef.maximum": number(-2.0, math.nan, math.inf),
    "TwoLevelTemperature.high": temperature_number,
    "TwoLevelTemperature.low": temperature_number,
    "TwoLevelTemperature.cutoff": number(-1.0, math.nan, math.inf),
    "EDTemperature.base": above_0,
    "EDTemperature.theta": above_0,
    "EDTemperature.N": number(0.0, 1.0, math.nan),
    "EDTemperature.minimum": temperature_number,
    "DynamicTemperature.low": temperature_number,
    "DynamicTemperature.high": temperature_number,
    "DynamicTemperature.exponent": above_0,
    "temperature_pos": above_0,
    "temperature_neg": above_0,
    "k_pos": above_0,
    "k_neg": above_0,
    "lambda_pos": above_0,
    "lambda_neg": above_0,
    "CovarianceConfig.ratio": number(0.0, 1.1, math.nan),
    "CovarianceConfig.low": number(6.0, math.nan),
    "CovarianceConfig.high": number(0.0, math.nan),
    "kl_coef": above_0,
    "penalty": choice,
    "scope": choice,
    "selection": choice,
    "seed": whole(),
    "at_least_one": flag,
    "ratio_level": choice,
    "epsilon_low": not_negative,
    "epsilon_high": not_negative,
    "delta": above_0,
    "max_log_ratio": above_0,
    "top_entropy_quantile": number(-0.1, 1.1, math.nan),
    "entropy_denominator": choice,
    "beta": number(math.nan, math.inf),
    "kl_estimator": choice,
    "kl_bias_correction": flag,
    "off_policy_threshold": above_0,
    "entropy_coef": number(math.nan, math.inf),
    "entropy_bonus_tokens": choice,
    "max_completion_length": at_least_1,
    "sapo": these(None, "x", 1.0, {}, SapoConfig, VespoConfig()),
    "vespo": these(None, "x", 1.0, {}, VespoConfig, SapoConfig()),
    "covariance": these(None, "x", 1.0, {}, CovarianceConfig, SapoConfig()),
}  # fmt: skip
# Arguments that the loss does not differentiate: their gradient would be lost.
CONSTANT = {"advantage", "old_logp", "ref_logp", "sampler_ratio", "sampler_logp", "denominator", "cutoff"}

# The error names the wrong part of these arguments, or the function that they select.
NAMED_AS = {"config": "config|loss_type", "settings": "settings|rule|theta", "name": "backend"}


draw = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=draw)


logits, hidden, weight = randn(B, T, V), randn(B, T, D), randn(V, D)
target = torch.randint(0, V, (B, T), generator=draw)
mask = torch.tensor([[True, True, True], [True, True, False]])
logp, entropy = randn(B, T).sub(2.0), randn(B, T).abs()
advantage = torch.tensor([1.0, -0.5])
rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 1.0], [0.25, 0.0]])
sums = diagnostics.diagnose(logp, advantage, mask, entropy=entropy, old_logp=logp)
edt, dynatemp = EDTemperature(base=1.0, theta=0.5), DynamicTemperature(low=0.5, high=1.0)

LOSSES = [
    (
        LossConfig(beta=0.1, top_entropy_quantile=0.5),
        {"ref_logp": logp - 0.1, "sampler_ratio": torch.ones(B, T), "old_logp": logp + 0.1, "cutoff": 0.5,
         "denominator": 4.0},
    ),
    (LossConfig("gspo", off_policy_threshold=1.0), {"sampler_logp": logp + 0.2}),
    (LossConfig(top_entropy_quantile=0.5), {"kept": mask, "cutoff": None}),
    (LossConfig("clip_cov", covariance=CovarianceConfig(scope="generation")), {"selected": mask & (logp > -2.0)}),
]  # fmt: skip
HEAD = {"hidden": hidden, "weight": weight, "target": target, "mask": mask}
OF_LOGITS = {"logits": logits, "target": target}
ROWS = {"temperature": 0.9, "softcap": 5.0, "logit_scale": 1.1}
OF_TOKENS = {"logp": logp, "advantage": advantage, "mask": mask}


def of_module(module, **given):
    return [(module(config), given | optional) for config, optional in LOSSES]


def of_loss(function):
    return [(function, {**OF_TOKENS, **given, "config": config, "entropy": entropy}) for config, given in LOSSES]


def enter_backend(name):
    with backends.backend(name):
        pass


CALLS = {
    "token_stats": [
        (rlloss.token_stats, {"logits": logits, "target": target, "mask": mask, **ROWS, "outputs": ("logp", "entropy"),
                              "entropy_grad": True, "inplace_grad": False}),
    ],
    "linear_token_stats": [
        (rlloss.linear_token_stats, {**HEAD, **ROWS, "bias": randn(V), "outputs": ("logp", "entropy"), "plan": "keep",
                                     "entropy_grad": True, "memory_budget": 1 << 20, "batch_invariant": False,
                                     "static_capacity": (6, 6), "vocab_group": None}),
    ],
    "policy_loss": of_loss(rlloss.policy_loss),
    "token_states": of_loss(token_states),
    "GRPOLoss": [(rlloss.GRPOLoss, {"config": LossConfig(), "inplace_grad": False, "single_launch": False})],
    "GRPOLoss.forward": of_module(rlloss.GRPOLoss, logits=logits.clone().requires_grad_(), target=target,
                                  advantage=advantage, mask=mask, **ROWS),
    "LinearGRPOLoss": [
        (rlloss.LinearGRPOLoss, {"config": LossConfig(), "plan": "keep", "memory_budget": 1 << 20,
                                 "batch_invariant": True, "vocab_group": None, "static_capacity": (6, 6)}),
    ],
    "LinearGRPOLoss.forward": of_module(rlloss.LinearGRPOLoss, **HEAD, **ROWS, advantage=advantage, bias=randn(V)),
    "explain_plan": [
        (rlloss.explain_plan, {"hidden": hidden, "weight": weight, "bias": randn(V), "mask": mask,
                               "advantage": advantage, "config": LOSSES[0][0], "cutoff": 0.5, "denominator": 4.0,
                               "live_share": 0.5, "plan": "recompute", "memory_budget": 1 << 20,
                               "batch_invariant": False, "static_capacity": (6, 6)}),
    ],
    "group_advantage": [
        (rlloss.group_advantage, {"rewards": rewards, "num_generations": G, "method": "gdpo", "weights": [1.0, 0.3],
                                  "scale": "group", "eps": 1e-3, "token_counts": torch.tensor([3, 1, 2, 4]),
                                  "conditions": {0: (1, 0.5)}}),
    ],
    "group_accuracy": [(group_accuracy, {"rewards": rewards, "num_generations": G})],
    "reward_resolution": [
        (reward_resolution, {"rewards": rewards, "num_generations": G, "weights": [1.0, 0.3], "method": "gdpo",
                                    "names": ["a", "b"], "conditions": [(0, 1, 0.5)]}),
    ],
    "resolution_table": [(resolution_table, {"num_rewards": 1, "group_sizes": (2, 3)})],
    "sampler_ratio": [
        (rlloss.sampler_ratio, {"old_logp": logp, "sampler_logp": logp - 0.1, "mask": mask, "mode": "token_truncate",
                                "clip_min": 0.5, "clip_max": 2.0}),
    ],
    "entropy_cutoff": [(rlloss.entropy_cutoff, {"entropy": entropy, "mask": mask, "rho": 0.5, "process_group": None})],
    "top_entropy_mask": [
        (top_entropy_mask, {"entropy": entropy, "mask": mask, "rho": 0.5, "exact_k": True,
                                   "sequence_key": torch.tensor([3, 5]), "process_group": None}),
        (top_entropy_mask, {"entropy": entropy, "mask": mask, "rho": 0.5, "cutoff": 0.5}),
    ],
    "completion_mask": [(completion_mask, {"completion_ids": target, "eos_token_id": 2})],
    "not_truncated": [(not_truncated, {"completion_ids": target, "eos_token_id": 2})],
    "off_policy_mask": [
        (masks.off_policy_mask, {"advantage": advantage[:, None], "logp": logp, "behavior_logp": logp + 0.1,
                                 "mask": mask, "threshold": 0.5}),
    ],
    "token_covariance": [(token_covariance, {**OF_TOKENS, "process_group": None})],
    "covariance_selection": [
        (covariance_selection, {**OF_TOKENS, "loss_type": "clip_cov", "config": CovarianceConfig(low=-9.0),
                                       "candidates": mask, "draw": 3, "sequence_key": torch.tensor([3, 5]),
                                       "process_group": None}),
    ],
    "diagnose": [
        (rlloss.diagnose, {**OF_TOKENS, "entropy": entropy, "old_logp": logp, "group": torch.tensor([0.5, 1.0]),
                           "compute_dtype": torch.bfloat16}),
    ],
    "gauges": [(gauges, {"sums": sums})],
    "pack": [(diagnostics.pack, {"sums": sums})],
    "unpack": [(diagnostics.unpack, {"vector": diagnostics.pack(sums), "like": sums})],
    "EntropyFit.update": [(EntropyFit().update, {"entropy": 1.0, "cov": 0.1})],
    "means": [(rlloss.means, {"metrics": rlloss.policy_loss(logp, advantage, mask).metrics})],
    "soft_overlong_penalty": [
        (soft_overlong_penalty, {"lengths": torch.tensor([3, 9]), "max_length": 10, "cache": 4}),
    ],
    "SoftOverlongPenalty": [(SoftOverlongPenalty, {"max_length": 10, "cache": 4})],
    "SoftOverlongPenalty.__call__": [(SoftOverlongPenalty(10, 4), {"completion_ids": [[1, 2], [3]]})],
    "AdaptiveEntropyCoef": [
        (AdaptiveEntropyCoef, {"coef": 0.0, "target": 0.2, "delta": 0.01, "minimum": 0.0, "maximum": 1.0}),
    ],
    "AdaptiveEntropyCoef.update": [(AdaptiveEntropyCoef().update, {"mean_entropy": 0.5})],
    "AdaptiveEntropyCoef.load_state_dict": [
        (AdaptiveEntropyCoef().load_state_dict, {"state": {"coef": 0.1, "last_entropy": math.inf}}),
    ],
    "TwoLevelTemperature": [(TwoLevelTemperature, {"high": 1.2, "low": 0.9, "cutoff": 0.6})],
    "TwoLevelTemperature.temperature": [
        (TwoLevelTemperature(high=1.2).temperature, {"entropy": entropy, "candidates": None}),
    ],
    "EDTemperature": [(EDTemperature, {"base": 1.0, "theta": 0.5, "N": 0.8, "minimum": 0.1})],
    "EDTemperature.temperature": [(edt.temperature, {"entropy": entropy, "candidates": None})],
    "DynamicTemperature": [(DynamicTemperature, {"low": 0.5, "high": 1.0, "exponent": 2.0})],
    "DynamicTemperature.temperature": [(dynatemp.temperature, {"entropy": entropy, "candidates": 7})],
    "entropy_temperature": [(entropy_temperature, {"logits": logits, "rule": edt})],
    "scale_logits": [
        (scale_logits, {"logits": logits.clone(), "rule": dynatemp, "mask": mask, "inplace": True}),
    ],
    "temperature_rule": [(temperature_rule, {"settings": {"rule": "edt", "base": 1.0, "theta": 0.5}})],
    "LossConfig": [
        (LossConfig, {"loss_type": "dapo", "epsilon_low": 0.1, "epsilon_high": 0.3, "delta": 2.0, "max_log_ratio": 5.0,
                      "ratio_level": "token", "top_entropy_quantile": 0.5, "exact_k": True, "beta": 0.1,
                      "kl_estimator": "k2", "kl_bias_correction": True, "off_policy_threshold": 1.0,
                      "entropy_coef": 0.1, "entropy_bonus_tokens": "all"}),
        (LossConfig, {"top_entropy_quantile": 0.5, "entropy_denominator": "kept"}),
        (LossConfig, {"loss_type": "dr_grpo", "max_completion_length": 8}),
        (LossConfig, {"loss_type": "sapo", "sapo": SapoConfig()}),
        (LossConfig, {"loss_type": "vespo", "vespo": VespoConfig()}),
        (LossConfig, {"loss_type": "clip_cov", "covariance": CovarianceConfig()}),
    ],
    "SapoConfig": [(SapoConfig, {"temperature_pos": 1.0, "temperature_neg": 1.0})],
    "VespoConfig": [(VespoConfig, {"k_pos": 1.0, "lambda_pos": 1.0, "k_neg": 1.0, "lambda_neg": 1.0})],
    "CovarianceConfig": [
        (CovarianceConfig, {"ratio": 0.1, "low": 1.0, "high": 5.0, "kl_coef": 1.0, "penalty": "abs",
                            "scope": "microbatch", "selection": "random", "seed": 1, "at_least_one": True}),
    ],
    "head_costs": [
        (head_costs, {"model": {"vocab_size": 50, "hidden_size": 4}, "completions": 2, "tokens": 3, "rho": 0.5,
                      "fill": 0.5, "dtype": "bf16", "frozen_head": False, "memory_budget": 1 << 20, "device": "cpu"}),
    ],
    "backend": [(enter_backend, {"name": "torch"})],
    "choose_backend": [(backends.choose_backend, {"x": logits})],
}  # fmt: skip
# Public functions that are not at the top of the package.
ELSEWHERE = [head_costs, masks.off_policy_mask, diagnostics.pack, diagnostics.unpack]
ELSEWHERE += [TokenStats, backends.backend, backends.choose_backend]


def public():
    """{name as in CALLS: its signature} of all public functions that take arguments."""
    subjects = [importlib.import_module(f"rlloss.{name}") for name in ("rewards", "tokens", "entropy", "lm_head")]
    exported = [getattr(module, name) for module in (losses, rlloss) for name in module.__all__]
    exported += [x for module in subjects for x in (getattr(module, name) for name in module.__all__) if callable(x)]
    found = {x.__name__: x for x in [*exported, *ELSEWHERE] if callable(x) and x.__module__ != "builtins"}
    for name, x in list(found.items()):
        if inspect.isclass(x) and issubclass(x, (tuple, enum.Enum)):
            del found[name]  # a result
        elif inspect.isclass(x):
            own = {n: f for n, f in vars(x).items() if inspect.isfunction(f) and (n == "__call__" or n[0] != "_")}
            found |= {f"{name}.{n}": f for n, f in own.items()}
    signatures = {}
    for name, x in found.items():
        parameters = inspect.signature(x).parameters
        kept = [p for p in parameters.values() if p.name != "self" and p.kind is not p.VAR_KEYWORD]
        if kept:
            signatures[name] = {p.name: p.default for p in kept}
        if "given" in parameters:
            signatures[name] |= signatures["policy_loss"]
    return signatures


PUBLIC = public()


def kind_of(name, argument):
    method = ".".join(name.split(".")[1:])
    for key in (f"{name}.{argument}", f"{method}.{argument}", argument):
        if key in KINDS:
            return KINDS[key]
    raise KeyError(f"{argument} of {name} needs a kind")


def test_everything_public_is_in_the_table():
    assert set(CALLS) == set(PUBLIC)
    for name, parameters in PUBLIC.items():
        assert set().union(*(given for _, given in CALLS[name])) >= set(parameters), name
        for argument in parameters:
            kind_of(name, argument)


def wrong_calls(name):
    """(function, arguments, the wrong one of them)."""
    done = set()
    for function, given in CALLS[name]:
        for argument, right in given.items():
            kind = None if argument in done else kind_of(name, argument)
            done.add(argument)
            if kind is None:
                continue
            optional = PUBLIC[name].get(argument, inspect.Parameter.empty) is None
            wrong = kind(right)
            if argument in CONSTANT and name.split(".")[0] in ("policy_loss", "GRPOLoss", "LinearGRPOLoss"):
                wrong += [(right if isinstance(right, torch.Tensor) else torch.tensor(right)).clone().requires_grad_()]
            for value in wrong:
                if not (value is None and optional):
                    yield function, {**given, argument: value}, argument


def is_shown(value, text):
    """Whether an error shows the wrong value, or any part of a value that contains others."""
    if isinstance(value, torch.Tensor):
        found = ["ensor", value.dtype, tuple(value.shape), list(value.shape), value.device]
        found += [f"{n} rows" for n in value.shape[:1]]
        found += [] if value.is_meta else value.flatten().tolist()
    else:
        found = [value, repr(value), type(value).__name__, "shape []"]
    return isinstance(value, (list, tuple, dict)) or any(str(part) in text for part in found)


def fault(function, given, argument):
    """What is wrong with the error of a wrong call. None: nothing."""
    try:
        function(**given)
    except (ValueError, TypeError) as error:
        text = str(error)
        said = re.search(r": found (.+), expected .+", text, re.DOTALL)
        named = re.search(rf"\b({NAMED_AS.get(argument, argument)})\b", text)
        own = text.startswith(f"{argument}: ")  # else it is another argument that does not fit this one
        if said and named and (not own or is_shown(given[argument], said[1])):
            return None
        return f"{type(error).__name__}: {text}"
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_a_wrong_value_is_named():
    faults = []
    for name, function, given, argument in ((of, *call) for of in CALLS for call in wrong_calls(of)):
        # One launch: the loss's arguments are checked before it. Otherwise after kernels, which the interpreter runs.
        with contextlib.nullcontext() if name == "GRPOLoss.forward" else backends.backend("torch"):
            said = fault(function, given, argument)
        if said is not None:
            value = given[argument]
            shape = tuple(value.shape) if hasattr(value, "shape") else ""
            faults.append(f"{name}: {argument} = {type(value).__name__} {shape or value!r:.60}: {said:.160}")
    assert not faults, f"{len(faults)} wrong calls\n" + "\n".join(faults)


# Function, right arguments, a change that does not fit them or that no kind covers, the error.
ADVANTAGE, ROW = {"rewards": rewards, "num_generations": G}, {"logits": logits[0], "rule": edt}
TOGETHER = [
    (rlloss.token_stats, OF_LOGITS, {"logits": logits[..., :0]}, r"logits: found \(2, 3, 0\), expected .*V >= 1"),
    (rlloss.token_stats, OF_LOGITS, {"temperature": torch.zeros(B, T)}, "temperature: found an entry that is 0,"),
    (rlloss.token_stats, OF_LOGITS, {"temperature": torch.ones(B, T) / 0.0}, "temperature: found .*infinite"),
    (rlloss.token_stats, OF_LOGITS, {"outputs": ("logp",), "entropy_grad": True}, "entropy_grad: found True"),
    (rlloss.linear_token_stats, HEAD, {"outputs": ("logp",), "entropy_grad": True}, "entropy_grad: found True"),
    (rlloss.linear_token_stats, HEAD, {"hidden": hidden[..., :0], "weight": weight[:, :0]}, "hidden: found .*D >= 1"),
    (rlloss.linear_token_stats, HEAD, {"plan": "gradient_in_forward"}, "plan: found .*is a plan of LinearGRPOLoss"),
    (rlloss.linear_token_stats, HEAD, {"plan": "keep", "memory_budget": 99}, "plan: .*needs 100 B, .*budget is 99 B"),
    (rlloss.group_advantage, ADVANTAGE, {"scale": "batch", "method": "rloo"}, "scale: .*rloo is never scaled"),
    (rlloss.group_advantage, ADVANTAGE, {"scale": "batch", "method": "dr_grpo"}, "scale: .*dr_grpo is never scaled"),
    (rlloss.group_advantage, ADVANTAGE, {"scale": "batch", "method": "gdpo"}, "scale: found 'batch', expected 'group'"),
    (rlloss.group_advantage, ADVANTAGE, {"scale": "none", "method": "gdpo"}, "scale: found 'none', expected 'group'"),
    (rlloss.group_advantage, ADVANTAGE, {"eps": 1e-6, "scale": "none"}, "eps: found 1e-06, expected the default"),
    (rlloss.group_advantage, ADVANTAGE, {"eps": 1e-6, "method": "rloo"}, "eps: found 1e-06, expected the default"),
    (rlloss.group_advantage, ADVANTAGE, {"weights": [1.0, math.nan]}, "weights: found .*expected finite"),
    (rlloss.group_advantage, ADVANTAGE, {"token_counts": torch.ones(4)}, "token_counts: .*only gdpo"),
    (temperature_rule, {}, {"settings": {"rule": "two_level"}}, "two_level: high: found nothing, expected a value"),
    (temperature_rule, {}, {"settings": {"rule": "two_level", "high": 1.2, "theta": 1}}, "setting: found 'theta'"),
    (EDTemperature, {"base": 1.0, "theta": 1.0}, {"minimum": 1.5}, "minimum: found 1.5, expected at most base"),
    (DynamicTemperature, {"low": 1.5}, {"high": 1.0}, "low: found 1.5, expected at most high"),
    (dynatemp.temperature, {"entropy": entropy}, {}, "candidates: found None"),
    (scale_logits, ROW, {"logits": logits[0, :, :0]}, r"logits: found \(3, 0\)"),
    (scale_logits, ROW, {"logits": torch.tensor(1.0)}, "logits: found"),
    (scale_logits, ROW, {"mask": mask[0]}, "mask: found a mask without inplace"),
    (scale_logits, ROW, {"logits": logits[0, :1].expand(3, V), "inplace": True}, r"inplace: found strides \(0, 1\)"),
]  # fmt: skip


def test_what_does_not_fit_together_is_named():
    for function, right, wrong, message in TOGETHER:
        with pytest.raises((ValueError, TypeError), match=message):
            function(**{**right, **wrong})


def numbers_of(result):
    """The tensors of a result, however deep."""
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    if isinstance(result, dict):
        result = list(result.values())
    return [x for part in result for x in numbers_of(part)] if isinstance(result, (tuple, list)) else []


@pytest.mark.parametrize("name", CALLS)
def test_a_right_call_is_none_whatever_the_default_dtype(name):
    """Model loaders change torch's default dtype temporarily, and may leave it changed."""
    for function, given in CALLS[name]:
        for backend, *others in ((contextlib.nullcontext(), torch.bfloat16),
                                 (backends.backend("torch"), torch.float64, torch.bfloat16)):  # fmt: skip
            with backend:
                before = numbers_of(function(**copy.deepcopy(given)))
                for dtype in others:
                    torch.set_default_dtype(dtype)
                    try:
                        found = numbers_of(function(**copy.deepcopy(given)))
                    finally:
                        torch.set_default_dtype(torch.float32)
                    torch.testing.assert_close(found, before, rtol=0.0, atol=0.0, equal_nan=True)


def test_a_module_names_the_argument_that_its_caller_has():
    with pytest.raises(ValueError, match=r"^logits: found shape \(3, 5\), expected \[B, T, V\]"):
        rlloss.GRPOLoss()(logits[0], target[0], advantage[:1], mask=mask[0])
    with pytest.raises(ValueError, match=r"^hidden: found shape \(3, 4\), expected \[B, T, D\]"):
        rlloss.LinearGRPOLoss()(hidden[0], weight, target[0], advantage[:1], mask=mask[0])


@pytest.mark.parametrize("module", [rlloss.GRPOLoss, rlloss.LinearGRPOLoss])
def test_a_loss_type_and_settings_are_short_for_a_config(module):
    assert module("grpo").config == LossConfig("grpo")
    assert module(epsilon_high=0.3).config == LossConfig(epsilon_high=0.3)
    assert module("cispo", epsilon_high=3.0).config == LossConfig("cispo", epsilon_high=3.0)
    with pytest.raises(ValueError, match="^config: found a LossConfig, expected a loss_type or nothing beside beta"):
        module(LossConfig(), beta=0.1)


def test_an_entropy_bonus_needs_a_gradient_only_where_the_loss_has_one():
    config, of_rows = LossConfig(entropy_coef=0.1), {"target": target, "advantage": advantage, "mask": mask}
    found = rlloss.GRPOLoss(config)(logits, **of_rows).loss
    wanted = rlloss.GRPOLoss(config)(logits.clone().requires_grad_(), **of_rows).loss
    torch.testing.assert_close(found, wanted.detach())
    with pytest.raises(ValueError, match="^entropy: found a tensor without gradient"):
        rlloss.policy_loss(logp.clone().requires_grad_(), advantage, mask, config=config, entropy=entropy)


@pytest.mark.parametrize("value", KINDS["memory_budget"](None))
def test_the_plugin_names_its_budget(value, tmp_path):
    pytest.importorskip("trl")
    from rlloss.integrations.trl.lm_head import patch_trl
    from rlloss.integrations.trl.trainer import GRPOConfig

    with pytest.raises((ValueError, TypeError), match="^lm_head_memory_budget: found .*, expected "):
        GRPOConfig(output_dir=str(tmp_path), lm_head_memory_budget=value)
    with pytest.raises((ValueError, TypeError), match="^memory_budget: found .*, expected "):
        patch_trl(memory_budget=value)
