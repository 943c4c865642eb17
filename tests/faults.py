"""Insert deliberate faults, one at a time, in a copy of the tree, and check that the named tests fail.

    python -m tests.faults [--jobs 2] [--only NUMBER ...]

A row is a file, a text that occurs in it once, the replacement of the text, and the tests. Only tests of `make test`
run, with the prefix "all:" also the slow ones. The exit status is 1 if a fault is missed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "rlloss", "integrations", "benchmarks", "tests", "docs")
STATISTICS = "tests/logits/test_statistics.py"
LAUNCH = "tests/kernels/test_launch.py tests/logits/test_statistics.py"
LOSSES = "tests/losses/test_losses.py tests/losses/test_surrogates.py"
PASS = "tests/losses/test_token_pass.py"
HEAD = "tests/lm_head/test_lm_head_statistics.py tests/lm_head/test_autograd.py"
IN_FORWARD = "tests/logits/test_gradient_in_forward.py"
QUANTILE = "tests/tokens/test_entropy_quantile.py"

FAULTS = [
    ("kernels/online.py", "    s = s_a * f_a + s_b * f_b\n", "    s = s_a * f_a + s_b\n", LAUNCH),
    ("kernels/online.py", "w = (w_a + s_a * d_a) * f_a", "w = w_a * f_a", LAUNCH),
    ("kernels/online.py", "w = (w + s * d_old) * rescale", "w = w * rescale", "all: tests/kernels/test_launch.py"),
    ("kernels/online.py", "tl.sum((w + s * d) * f, axis=0)", "tl.sum(w * f, axis=0)", STATISTICS),
    (
        "kernels/token_stats_backward.py",
        "grad = p * (level + slope * t)",
        "grad = p * (level - slope * t)",
        STATISTICS,
    ),
    ("kernels/token_stats_backward.py", "return own * scale, (level", "return own, (level", STATISTICS),
    ("kernels/token_stats_backward.py", "g_logp * one_minus_exp(logp)", "g_logp * (1.0 - tl.exp(logp))", STATISTICS),
    ("kernels/token_stats_forward.py", "here = (place >= 0) & (place < full)", "here = place < 0", STATISTICS),
    ("rlloss/torch_kernels/rows.py", "own - g_logp * torch.expm1(logp)", "own + g_logp * (1 - logp.exp())", STATISTICS),
    (
        "kernels/token_stats_backward.py",
        "(1.0 - bend * bend) * logit_scale",
        "(1.0 - bend) * logit_scale",
        STATISTICS,
    ),
    (
        "kernels/logits_tile.py",
        "target = tl.load(target_ptr + row).to(tl.int64) - first\n    scale, k = scales(row, temperature, temperature_"
        "ptr, softcap, logit_scale)  # type: ignore\n    m = tl.load(running_ptr",
        "target = tl.load(target_ptr + row).to(tl.int64)\n    scale, k = scales(row, temperature, temperature_"
        "ptr, softcap, logit_scale)  # type: ignore\n    m = tl.load(running_ptr",
        HEAD,
    ),
    ("kernels/token_pass.py", "share = weight / tl.maximum(n, 1).to(tl.float32)", "share = weight", PASS),
    (
        "kernels/token_pass.py",
        "drift = tl.sum(total_drift, axis=0) / tl.maximum(n, 1).to(tl.float32)",
        "drift = tl.sum(total_drift, axis=0)",
        PASS,
    ),
    (
        "kernels/surrogates.py",
        "upper = tl.where(advantage > 0.0, gain, loss)",
        "upper = tl.where(advantage >= 0.0, loss, gain)",
        PASS,
    ),
    ("kernels/surrogates.py", "lower = tl.where(advantage < 0.0, low, 0.0)", "lower = low", PASS),
    (
        "kernels/surrogates.py",
        "tl.where(estimator == 2, -d, 1.0)",
        "tl.where(estimator == 2, d, 1.0)",
        PASS,
    ),
    (
        "kernels/gradient_in_forward.py",
        "coef = tl.where(coef == 0.0, 0.0, coef * weight)",
        "coef = tl.where(coef == 0.0, 0.0, coef)",
        IN_FORWARD,
    ),
    (
        "kernels/gradient_in_forward.py",
        "coefs_of_row(coef, g_entropy, 0.0, logp, entropy, scale)",
        "coefs_of_row(coef, g_entropy, 0.0, logp, 0.0, scale)",
        "all: tests/logits/test_gradient_in_forward.py",
    ),
    (
        "kernels/entropy_quantile.py",
        "passed = tl.cumsum(counts, axis=0) <= rank",
        "passed = tl.cumsum(counts, axis=0) < rank",
        QUANTILE,
    ),
    (
        "kernels/entropy_quantile.py",
        "passed = before + tl.cumsum(equal.to(tl.int64), axis=0) < wanted",
        "passed = before + tl.cumsum(equal.to(tl.int64), axis=0) <= wanted",
        QUANTILE,
    ),
    (
        "rlloss/torch_kernels/token_stats_forward.py",
        "(log_s - w / s) * math.log(2)",
        "(log_s - w) * math.log(2)",
        STATISTICS,
    ),
    (
        "rlloss/torch_kernels/token_stats_backward.py",
        "g_entropy * (entropy - log_s * math.log(2))",
        "g_entropy * entropy",
        STATISTICS,
    ),
    ("rlloss/torch_kernels/token_stats_backward.py", "        live &= mask\n", "        pass\n", STATISTICS),
    (
        "rlloss/torch_kernels/entropy_quantile.py",
        "digit = passed.sum(1).clamp(max=BINS - 1)",
        "digit = (passed.sum(1) + 1).clamp(max=BINS - 1)",
        QUANTILE,
    ),
    (
        "rlloss/losses/surrogates.py",
        "return 1.0 - config.epsilon_low, gain, loss",
        "return 1.0 - config.epsilon_high, gain, loss",
        LOSSES,
    ),
    ("rlloss/losses/surrogates.py", "1.0, value) * (4.0 / t)", "1.0, value) * (2.0 / t)", LOSSES),
    ("rlloss/losses/surrogates.py", "(ratio * small * (1.0 - small))", "(ratio * small)", LOSSES),
    ("rlloss/losses/surrogates.py", "gain, c = x.advantage >= 0", "gain, c = x.advantage > 0", LOSSES),
    (
        "rlloss/losses/ratios.py",
        "self.of_tokens.abs() < _MAX_LOG_WEIGHT",
        "self.of_tokens.abs() < 1.0",
        "all: tests/losses/test_loss_types.py",
    ),
    (
        "rlloss/losses/coefficients.py",
        ".masked_fill_(of_logp == 0.0, 0.0)",
        "",
        PASS,
    ),
    (
        "integrations/trl/model_call.py",
        "temperature[:, 1:][inputs",
        "temperature[:, :-1][inputs",
        "tests/trl/test_remedies.py",
    ),
    (
        "rlloss/losses/surrogates.py",
        "return None if value is None else torch.where(acts, value, 0.0)",
        "return None if value is None else value * acts",
        "tests/losses",
    ),
    (
        "rlloss/losses/ratios.py",
        "log = of_tokens.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)",
        "log = of_tokens.mean(-1, keepdim=True)",
        LOSSES,
    ),
    (
        "rlloss/losses/ratios.py",
        "return ~(log_ratio.abs() >= bound)",
        "return log_ratio.abs() < bound",
        "all: tests/losses/test_loss_overflow.py",
    ),
    (
        "rlloss/losses/aggregate.py",
        "return x / counted.sum(-1, keepdim=True).clamp(min=1)",
        "return x / max(counted.shape[-1], 1)",
        LOSSES,
    ),
    ("rlloss/losses/aggregate.py", "return counted.sum().clamp(min=1)", "return counted.numel()", LOSSES),
    ("rlloss/losses/kl.py", "small, e - d - 1.0)", "small, e + d - 1.0)", LOSSES),
    (
        "rlloss/losses/acting_tokens.py",
        "else acts & (ratio != 0)",
        "else acts",
        "tests/losses tests/logits/test_overflow.py",
    ),
    (
        "rlloss/losses/acting_tokens.py",
        "candidates = candidates & ~flat & ~log_ratio.isnan()",
        "candidates = candidates",
        "tests/tokens/test_covariance.py tests/losses/test_losses.py",
    ),
    (
        "rlloss/losses/ratios.py",
        "return torch.where(self.mask, each, 0.0)",
        "return each.expand_as(self.mask)",
        "tests/losses",
    ),
    (
        "rlloss/loss_types.py",
        '"luspo": LossType("clip", _CLIP, divided_by="sequences"',
        '"luspo": LossType("clip", _CLIP',
        LOSSES,
    ),
    (
        "rlloss/tokens/masks.py",
        "kept = (entropy >= cutoff) | entropy.isnan()",
        "kept = entropy > cutoff",
        "tests/tokens/test_masks.py",
    ),
    (
        "rlloss/tokens/masks.py",
        "return (advantage >= 0) | (mean_drift <= threshold)",
        "return mean_drift <= threshold",
        "tests/tokens/test_masks.py tests/losses/test_losses.py",
    ),
    (
        "rlloss/tokens/covariance.py",
        "(covariance >= config.low) & (covariance <= config.high)",
        "(covariance >= config.low)",
        "tests/tokens/test_covariance.py",
    ),
    ("rlloss/rewards/advantages.py", "(count_B1 - 1).clamp(min=1)", "count_B1.clamp(min=1)", "tests/rewards"),
    (
        "rlloss/rewards/advantages.py",
        "fulfilled_N = rewards_NK[:, l] >= threshold",
        "fulfilled_N = rewards_NK[:, l] > threshold",
        "tests/rewards",
    ),
    (
        "rlloss/rewards/overlong.py",
        "(left / cache).clamp(-1.0, 0.0)",
        "(left / max_length).clamp(-1.0, 0.0)",
        "tests/rewards",
    ),
    (
        "rlloss/torch_kernels/entropy_temperature.py",
        "torch.where(found < least, 0.0, found)",
        "found",
        "tests/entropy/test_temperature.py",
    ),
    (
        "rlloss/config.py",
        'checks.require(self.epsilon_low >= 0.0, "epsilon_low"',
        'checks.require(True, "epsilon_low"',
        "all: tests/losses/test_loss_config.py tests/house/test_wrong_calls.py",
    ),
    (
        "rlloss/operators.py",
        "backward is None and torch.is_grad_enabled()",
        "False",
        "tests/losses/test_token_pass.py tests/logits/test_statistics.py",
    ),
    (
        "rlloss/lm_head/jacobian.py",
        "total.mul_(torch.exp2((before - now)",
        "total.mul_(torch.exp2((now - now)",
        "tests/lm_head/test_jacobian.py",
    ),
    (
        "rlloss/lm_head/jacobian.py",
        "(now, nothing, nothing, None)",
        "(now, nothing, nothing - torch.inf, None)",
        "tests/lm_head/test_jacobian.py",
    ),
    (
        "rlloss/lm_head/vocab_loop.py",
        "head.offset + start,\n                target[r],",
        "head.offset,\n                target[r],",
        HEAD,
    ),
    (
        "rlloss/lm_head/vocab_loop.py",
        "(target >= 0) & (target < V), math.nan)",
        "(target >= 0) & (target <= V), math.nan)",
        "tests/lm_head/test_lm_head_statistics.py",
    ),
    (
        "rlloss/lm_head/row_subset.py",
        "fill_value=len(flags)",
        "fill_value=0",
        "tests/lm_head/test_static_capacity.py",
    ),
    (
        "rlloss/lm_head/plans.py",
        '"recompute": (1 + r * (1 + gradients), 0)',
        '"recompute": (1 + r * gradients, 0)',
        "tests/lm_head tests/house/test_plan.py",
    ),
    (
        "rlloss/lm_head/gradient_in_forward.py",
        "scaled = torch.where(coefs == 0.0, 0.0, coefs * factor)",
        "scaled = coefs",
        "tests/lm_head/test_lm_head_loss.py",
    ),
    (
        "integrations/trl/trainer.py",
        "denominator = denominator / self.args.steps_per_generation",
        "pass",
        "tests/trl/test_trainer.py tests/trl/test_drop_in.py",
    ),
    (
        "integrations/trl/trainer.py",
        "        loss = loss / accumulation\n",
        "",
        "tests/trl/test_trainer.py tests/trl/test_drop_in.py",
    ),
    (
        "integrations/trl/compat.py",
        "        trainer._metrics, trainer._logs = metrics, logs\n",
        "        pass\n",
        "tests/trl/test_dynamic_sampling.py",
    ),
]  # fmt: skip


def copied(folder: Path) -> Path:
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def caught(tree: Path, fault: tuple[str, str, str, str], limit: float) -> tuple[bool, str]:
    """(whether the tests fail, the reason)."""
    file, text, instead, tests = fault
    path = tree / file
    source = path.read_text(encoding="utf-8")
    if source.count(text) != 1:
        return False, f"the text occurs {source.count(text)} times, expected once"
    path.write_text(source.replace(text, instead), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x"]
    for plugin in ("benchmark", "cacheprovider", "xdist"):
        command += ["-p", f"no:{plugin}"]
    if not tests.startswith("all: "):
        command += ["-m", "not slow"]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*command, *tests.removeprefix("all: ").split()], cwd=tree, env=environment, capture_output=True, text=True,
            timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return True, f"no end after {limit:.0f} s"
    finally:
        path.write_text(source, encoding="utf-8")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1 and bool(failed), failed[0][:110] if failed else "no test fails"


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether the fast tests find deliberate faults.")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of rows, from 1")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of a row's tests (default 300)")
    options = parser.parse_args()
    chosen = [(i, fault) for i, fault in enumerate(FAULTS, 1) if not options.only or i in options.only]
    begin, trees = time.monotonic(), SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        for job in range(options.jobs):
            trees.put(copied(Path(folder) / str(job)))

        def run(numbered):
            number, fault = numbered
            tree = trees.get()
            found, why = caught(tree, fault, options.limit)
            trees.put(tree)
            print(f"{'caught' if found else 'MISSED'} {number:2} {fault[0]}: {why}", flush=True)
            return found

        with ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(run, chosen))
    print(f"caught {sum(results)} of {len(results)} in {(time.monotonic() - begin) / 60:.1f} minutes")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
