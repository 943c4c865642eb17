"""What is compiled is what the launchers ask for, and any two settings of a kernel that go together meet in it.

As a program, without TRITON_INTERPRET=1, it prints what launchers ask for under many settings; nothing is run then.
"""

import functools
import importlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compiler import variants as compile_variants
from rlloss import GRPOLoss, LinearGRPOLoss, LossConfig, backends, linear_token_stats, policy_loss, token_stats
from rlloss.entropy import entropy_temperature, scale_logits, temperature_rule
from rlloss.logits.statistics import TokenStats
from rlloss.tokens import top_entropy_mask
from tests.support.loss_cases import TYPES_AND_LEVELS, batch, converted, make_config, settings_of

ROOT = Path(__file__).resolve().parents[2]
KERNELS, TARGETS, Variant = compile_variants.KERNELS, compile_variants.TARGETS, compile_variants.Variant
Setting = dict[str, str]

MOST = 20_000
CALLS = 150
DEVICE = "sm_90"  # as on which launchers are asked
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OUTPUTS = ("logp", "entropy", "lse", "mean_logit", "log_sum_sq_probs", "is_top1")
RULES = (
    {"rule": "two_level", "high": 1.2}, {"rule": "edt", "base": 1.0, "theta": 0.1},
    {"rule": "dynatemp", "low": 0.5, "high": 1.5},
)  # fmt: skip
# Pointers that are given something else, of any type, where the flag is off and nothing is read.
READ_WITH = {"mask_ptr": "HAS_MASK", "last_ptr": "EXACT_K"}


def pairs(setting: Setting) -> list[tuple]:
    return list(itertools.combinations(sorted(setting.items()), 2))


@functools.cache
def possible_pairs(name: str) -> set[tuple]:
    """Two levels that go together: in all settings, or where these are too many in random ones."""
    kernel, choice = KERNELS[name], random.Random(0).choice
    settings = compile_variants.combinations(name)
    if math.prod(map(len, kernel.factors.values())) > MOST:
        some = ({factor: choice(list(levels)) for factor, levels in kernel.factors.items()} for _ in range(MOST))
        settings = (setting for setting in some if compile_variants.possible(setting, kernel.impossible))
    return {pair for setting in settings for pair in pairs(setting)}


@pytest.mark.parametrize("name", KERNELS)
def test_any_two_settings_that_go_together_meet(name):
    levels = {(factor, level) for factor, of in KERNELS[name].factors.items() for level in of}
    some, all_of = ([v for v in compile_variants.variants(e) if v.kernel == name] for e in (False, True))
    assert {pair for v in some for pair in pairs(v.setting)} == possible_pairs(name)
    for target in TARGETS:
        assert {item for v in some if v.target == target for item in v.setting.items()} == levels
        own = [v for v in all_of if v.target == target]
        assert {pair for v in own for pair in pairs(v.setting)} == possible_pairs(name)
        assert all(v in own for v in some if v.target == target)


def test_each_target_has_the_plain_variant_and_everything_on():
    variants = compile_variants.variants()
    found = {(v.kernel, v.target, v.dtype, v.flags) for v in variants}
    assert len(found) == len(variants), "two variants have one name"
    everything = "PER_ROW, HAS_SOFTCAP, SQUARES, MEAN, TOP1, int32 target"
    for target in TARGETS:
        assert {(name, target, "fp32", "plain") for name in KERNELS} <= found
        for dtype in ("bf16", "fp16", "fp32"):
            assert {(name, target, dtype, "plain") for name in ("forward", "backward", "loss gradient")} <= found
        assert {("forward", target, "bf16", everything), ("fold tile", target, "fp32", everything)} <= found


def count(name: str) -> int:
    """How many settings there are."""
    kernel = KERNELS[name]
    bound = list({factor for one in kernel.impossible for factor in one})
    some = itertools.product(*(kernel.factors[factor] for factor in bound))
    fitting = sum(compile_variants.possible(dict(zip(bound, x, strict=True)), kernel.impossible) for x in some)
    return fitting * math.prod(len(levels) for factor, levels in kernel.factors.items() if factor not in bound)


def test_combinations_are_as_many_as_the_docstring_says():
    assert count("backward") == sum(1 for _ in compile_variants.combinations("backward"))
    for name in ("token pass", "loss gradient"):
        assert f" {count(name):,} of the {name}" in str(compile_variants.__doc__)


@pytest.mark.slow
def test_launchers_ask_for_what_is_known_and_for_all_of_it():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_compile_variants"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    asked = json.loads(done.stdout)
    assert asked["calls"] > 5000
    assert asked["unknown"] == []
    for name, kernel in KERNELS.items():
        levels = {(factor, level) for factor, of in kernel.factors.items() for level in of}
        assert set(map(tuple, asked["seen"][name])) == levels, name


def agree(known: dict, found: dict, parameter: str, placed: tuple[str, ...]) -> bool:
    """Of a pointer the type, and that it starts on 16 bytes where this matters: if it is one of `placed`."""
    if parameter.endswith("_ptr") and parameter not in placed:
        return known[parameter][0] == found[parameter][0]
    return known[parameter] == found[parameter]


def setting_of(name: str, found: dict[str, tuple[str, Any]]) -> Setting:
    """Of each factor the level that this specialization has; the plain one where it has none."""
    factors = KERNELS[name].factors
    setting = compile_variants.first_levels(factors)
    for factor in sorted(factors, key=lambda f: f == "V"):  # the launch shape depends on the dtype
        settled = {parameter for level in factors[factor].values() for parameter in level}
        settled = {"BLOCK_V", "CHUNK_V"} if factor == "V" else settled
        for level in factors[factor]:
            known = compile_variants.specialization(Variant(name, DEVICE, setting | {factor: level}))
            if all(agree(known, found, parameter, ()) for parameter in settled):
                setting[factor] = level
                break
    return setting


def differences(name: str, setting: Setting, found: dict[str, tuple[str, Any]], options: dict[str, Any]) -> list[str]:
    """What a launcher asks for that differs from the variant of this setting."""
    variant = Variant(name, DEVICE, setting)
    known = compile_variants.specialization(variant)
    placed = ("entropy_ptr", "mask_ptr") if name in ("histogram", "ties", "last tie") else ()
    if setting.get("layout") == "aligned":
        placed = ("logits_ptr", "grad_ptr", "tile_ptr", "out_ptr")
    wrong = [] if compile_variants.possible(setting, KERNELS[name].impossible) else [f"{name}: impossible, {setting}"]
    for parameter in found:
        read = found.get(READ_WITH.get(parameter, ""), ("constexpr", True))[1]
        if read and not agree(known, found, parameter, placed):
            wrong.append(f"{name}: {parameter} {found[parameter]}, known {known[parameter]} in {setting}")
    if options != compile_variants.launch_options(variant):
        wrong.append(f"{name}: options {options}, known {compile_variants.launch_options(variant)}")
    return wrong


def record(calls: list) -> None:
    """From here on nothing is launched, and launchers act as on a GPU.

    calls gets (kernel, specialization, options). Fresh memory holds ones.
    """
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    names = {kernel.function.fn.__name__: name for name, kernel in KERNELS.items()}
    backend = make_backend(TARGETS[DEVICE])
    bind = functools.cache(lambda kernel: create_function_from_signature(kernel.signature, kernel.params, backend))

    def run(self, *args, grid, warmup, **kwargs):
        _, found, options = bind(self)(*args, **kwargs)
        named = {p.name: tuple(of) for p, of in zip(self.params, found, strict=True)}
        calls.append((names[self.fn.__name__], named, options))

    JITFunction.run = run
    empty, empty_like = torch.empty, torch.empty_like
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(1)
    torch.empty_like = lambda *a, **k: empty_like(*a, **k).fill_(1)
    registers = importlib.import_module("rlloss.kernels.launch").registers
    gpu = types.SimpleNamespace(is_cuda=True)
    stand_ins = {
        "choose_backend": lambda x: "torch" if x.dtype == torch.float64 else "triton",
        "generation": lambda device: DEVICE,
        "registers": lambda x, num_warps, *, simple: registers(gpu, num_warps, simple=simple),
    }
    for module in [module for name, module in sys.modules.items() if name.startswith("rlloss")]:
        for name, stand_in in stand_ins.items():
            if hasattr(module, name):
                setattr(module, name, stand_in)


def laid_out(B: int, T: int, V: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Logits [B, T, V]."""
    if layout == "strided":
        return torch.zeros(B, T, 3 * V, dtype=dtype)[..., ::3]
    if layout == "strided by 16":
        return torch.zeros(B, V, 16 * T, dtype=dtype).transpose(1, 2)[:, :T]
    wide = V if layout == "contiguous" else -(-V // 8) * 8 + 8 * (layout == "aligned") + (layout == "uneven")
    return torch.zeros(B, T, wide, dtype=dtype)[..., :V]


def launch_everything() -> None:
    """Calls of the whole API, and of launchers for what it asks for on a GPU only, with settings at random."""
    g = random.Random(0)
    layouts = ("contiguous", "aligned", "uneven", "strided", "strided by 16")
    for i in range(CALLS):
        B, T, V = g.randint(2, 4), g.randint(1, 9), g.choice((7, 8, 300, 512, 1000, 1024, 1100, 2309))
        logits = laid_out(B, T, V, DTYPES[i % 3], layouts[i % 5])
        target = torch.zeros(B, T, dtype=g.choice((torch.int64, torch.int32)))
        mask = torch.ones(B, T, dtype=torch.bool)
        scaling = {
            "temperature": g.choice((1, 0.7, torch.ones(B, T))), "softcap": g.choice((None, 30.0)),
            "logit_scale": g.choice((1, 0.5)),
        }  # fmt: skip
        of_stats = {"outputs": tuple(name for name in OUTPUTS if g.random() < 0.5) or ("logp",)}
        of_stats["entropy_grad"] = "entropy" in of_stats["outputs"] and g.random() < 0.7
        leaf = logits.detach().requires_grad_()
        differentiate(token_stats(leaf, target, mask=g.choice((None, mask)), **scaling, **of_stats))
        hidden, weight = (torch.zeros(*n, 1, dtype=logits.dtype, requires_grad=True) for n in ((B, T), (V,)))
        differentiate(linear_token_stats(hidden, weight, target, mask=mask, **scaling, **of_stats))

        loss_type, level = TYPES_AND_LEVELS[i % len(TYPES_AND_LEVELS)]
        config = random_config(g, loss_type, level)
        x = batch(i, B, T, per_token=g.random() < 0.5, level=g.choice(("token", "sequence")))
        given = loss_arguments(g, x, config)
        for single_launch in (None, False):
            loss_fn = GRPOLoss(config, single_launch=single_launch)
            (2 * loss_fn(leaf, target, mask=mask, **given, **scaling).loss).backward()
        LinearGRPOLoss(config, plan="recompute")(hidden, weight, target, mask=mask, **given, **scaling).loss.backward()

        alone = random_config(g, loss_type, level, entropy_coef=0.0, top_entropy_quantile=1.0)
        policy_loss(torch.zeros(B, T), mask=mask, config=alone, **loss_arguments(g, x, alone))

        entropy = torch.zeros(B * T + 1)[g.randint(0, 1) :]
        counts = torch.ones(B * T + 2, dtype=torch.bool)[g.randint(0, 1) :][: len(entropy)]
        top_entropy_mask(entropy, counts, 0.3, exact_k=g.random() < 0.5)
        rule = temperature_rule(RULES[i % 3])
        entropy_temperature(logits, rule)
        scale_logits(logits, rule)
        scale_logits(logits, rule, mask=g.choice((None, mask)), inplace=True)
        launch_directly(g, logits, target.flatten(), mask.flatten(), entropy)


def launch_directly(g: random.Random, logits, target, mask, entropy) -> None:
    """What the API does not ask for on every CPU: split rows, gradients of two bytes, a held one without a mask."""
    flags = {name: g.random() < 0.5 for name in ("entropy", "squares", "mean", "top1")}
    rows = (
        logits,
        target,
        g.choice((None, mask)),
        g.choice((1.0, torch.ones(len(target)))),
        g.choice((None, 9.0)),
        1.0,
    )
    backends.triton.token_stats_forward(*rows, split=True, **flags)
    numbers = torch.ones(len(target))
    coefs = [g.choice((None, numbers)) for _ in range(3)]
    coefs = coefs if any(c is not None for c in coefs) else [numbers, None, None]
    held = g.choice((None, (torch.zeros(logits.shape, dtype=logits.dtype), numbers[0])))
    backends.triton.token_stats_backward(*rows, torch.ones(2, len(target)), numbers, *coefs, held=held)
    tile = torch.zeros(len(target), logits.shape[-1])
    g_rows = (coefs[0], None, numbers)
    backends.triton.gradient_tile(tile, 0, target, numbers, numbers, None, *g_rows, *rows[3:], logits.dtype)
    backends.triton.entropy_quantile(entropy, None, 0.5, rounded_up_to=0)
    backends.triton.entropy_top_k(entropy, None, 0.5)


def differentiate(stats: TokenStats) -> None:
    outputs = [x for x in stats if x is not None and x.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def random_config(g: random.Random, loss_type: str, level: str | None, **fixed: float) -> LossConfig:
    """Some of the settings that the loss type reads, together."""
    while True:
        own: dict[str, Any] = {"exact_k": g.random() < 0.3, "entropy_coef": g.choice((0.0, 0.1))}
        for some in g.sample(settings_of(loss_type), g.randint(0, 3)):
            own |= some
        try:
            return make_config(loss_type, level, **own | fixed)
        except ValueError:  # one that has no effect with the others
            continue


def loss_arguments(g: random.Random, x: dict[str, torch.Tensor], config: LossConfig) -> dict[str, Any]:
    """What the loss takes besides logits, target and mask."""
    x = converted(x, torch.float32)
    given = {"advantage": x["advantage"], "old_logp": g.choice((None, x["old_logp"]))}
    given["sampler_ratio"] = g.choice((None, x["sampler_ratio"].clamp(min=0.1)))
    given["denominator"] = g.choice((None, 5.0, torch.tensor(5.0)))
    if config.beta:
        given["ref_logp"] = x["ref_logp"]
    if config.off_policy_threshold is not None:
        given["sampler_logp"] = g.choice((None, x["sampler_logp"]))
    if config.top_entropy_quantile < 1 and not config.exact_k:
        given["cutoff"] = g.choice((None, 0.5))
    return given


def main() -> None:
    calls: list[tuple[str, dict, dict]] = []
    record(calls)
    launch_everything()
    wrong: dict[str, None] = {}
    seen: dict[str, set] = {name: set() for name in KERNELS}
    for name, found, options in {str(call): call for call in calls}.values():
        setting = setting_of(name, found)
        wrong |= dict.fromkeys(differences(name, setting, found, options))
        seen[name].update(setting.items())
    print(json.dumps({"calls": len(calls), "unknown": list(wrong), "seen": {k: sorted(v) for k, v in seen.items()}}))


if __name__ == "__main__":
    main()
