"""The kernels compile for GPUs that are not here, without spills, and are not compiled again for every length.

In processes of their own: kernels imported under TRITON_INTERPRET=1 cannot be compiled.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# How often a row is read by tiles; where it is scaled, without the reads of the loop that scales it.
VOCABULARY = {
    "forward": 1, "merge": 0, "backward": 1, "loss gradient": 2, "fold tile": 1, "gradient tile": 1,
    "entropy temperature": 1,
}  # fmt: skip


def run_without_interpreter(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_report(*arguments: str) -> list[dict]:
    return json.loads(run_without_interpreter("benchmarks/compile_report.py", "--json", *arguments))


def spills(row: dict) -> int:
    return row["local"] + row["stack"] + row.get("LDL", 0) + row.get("STL", 0)


@pytest.fixture(scope="module")
def sm_90():
    return compile_report("sm_90")


def jitted_kernels() -> set[str]:
    """The functions under kernels/ that are decorated with triton.jit and called a kernel."""
    functions = [
        node
        for path in sorted((ROOT / "kernels").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    return {f.name for f in functions if "_kernel" in f.name}


def test_no_kernel_is_forgotten(sm_90):
    assert len(jitted_kernels()) >= 9
    assert {row["function"] for row in sm_90} == jitted_kernels()


def test_every_kernel_compiles_for_amd():
    # The wheel has no disassembler for it: that it compiles is what is shown.
    table = compile_report("gfx942", "plain", "held", "all, by sequence")
    assert {row["function"] for row in table} == jitted_kernels()


def test_no_kernel_spills_and_registers_leave_room(sm_90):
    assert {(row["kernel"], row["dtype"]) for row in sm_90} >= {
        (kernel, dtype) for kernel in ("forward", "backward", "loss gradient") for dtype in ("bf16", "fp16", "fp32")
    }
    for row in sm_90:
        assert not spills(row), row
        # 64: 1024 threads a multiprocessor or more. 128: 16 warps, the most that a program of these has, fit.
        light = row["kernel"] in VOCABULARY and row["flags"] != "all"
        assert row["registers"] <= (64 if light else 128), row


def test_the_vocabulary_is_read_and_written_by_16_bytes(sm_90):
    for row in (row for row in sm_90 if row["kernel"] in VOCABULARY):
        assert row["max.NaN"] > 0, row  # the floor of the exponents lets NaN through; the interpreter's always does
        # A thread's entries of a tile: 8 in 2-byte types, in one load; 8 in fp32, in two.
        loads = 2 if row["dtype"] == "fp32" or row["kernel"].endswith("tile") else 1
        # The loop that scales a row is so short that it may be unrolled: there a load goes with each store.
        scaling = row.get("STG.E.128", 0) if row["kernel"] == "entropy temperature" else 0
        assert row.get("LDG.E.128", 0) == VOCABULARY[row["kernel"]] * loads + scaling, row
        writes = row["kernel"] in ("backward", "loss gradient", "gradient tile", "entropy temperature")
        assert (row.get("STG.E.128", 0) > 0) == writes, row


COUNT_SPECIALISATIONS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from rlloss.kernels.clip_surrogate import clip_surrogate
from rlloss.kernels.entropy_quantile import entropy_quantile, entropy_top_k
from rlloss.kernels.entropy_temperature import RULES, entropy_temperature
from rlloss.kernels.linear_token_stats import fold_tile, gradient_tile
from rlloss.kernels.loss_gradient import loss_gradient
from rlloss.kernels.token_stats import token_stats_forward
from rlloss.kernels.token_stats_backward import token_stats_backward

backend = make_backend(GPUTarget("cuda", 90, 32))
seen = {}

def record(self, *args, grid, warmup, **kwargs):
    binder = create_function_from_signature(self.signature, self.params, backend)
    _, specialization, options = binder(*args, **kwargs)
    seen.setdefault(self.fn.__name__, set()).add((str(specialization), str(sorted(options.items()))))

JITFunction.run = record
V = 4000
for B, T in ((1, 1), (1, 7), (2, 16), (3, 17), (16, 33), (5, 128)):
    for temperature in (1.0, 0.7, 2):
        logits, target = torch.zeros(B, T + 1, V, dtype=torch.bfloat16)[:, :-1], torch.zeros(B * T, dtype=torch.int64)
        for split in (False, True):
            logp, entropy, lse, saved, _ = token_stats_forward(
                logits, target, None, temperature, None, 1, split=split)
        token_stats_backward(logits, target, None, temperature, None, 1, saved, entropy, logp, None, None)
        x, mask = torch.zeros(B, T), torch.ones(B, T, dtype=torch.bool)
        settings = {
            "cispo": False, "low": 0.8 * temperature, "gain": 0.2, "loss_bound": 3.0, "max_log_ratio": None,
            "beta": 0.0, "kl_estimator": 3, "kl_bias_correction": False,
        }
        loss_gradient(
            logits, target, mask, temperature, None, 1.0, x, x, None, None, None, torch.ones(2, B), bonus=False,
            **settings)
        clip_surrogate(
            x, x[:, :1].contiguous(), mask, x, None, None, None, None, None, None, temperature, sequence=False,
            mean_of_sequence=False, kept_counts=False, high=1.2, delta=None, off_policy_threshold=None,
            entropy_coef=0.0, **settings)
        tile, running = torch.zeros(B * T, V), torch.zeros(7, B * T)
        wanted = dict.fromkeys(("entropy", "squares", "mean", "top1"), False)
        for start in (0, 1, 16 * V):
            fold_tile(tile, start, target, running, temperature, None, 1, **wanted)
            row = running[0]
            gradient_tile(tile, start, target, row, row, None, row, None, None, temperature, None, 1, torch.bfloat16)
for N in (0, 1, 2, 16, 17, 5000, 2 ** 20):
    entropy, mask = torch.zeros(N), torch.ones(N, dtype=torch.bool)
    for rho in (0, 0.0, 0.2, 0.7, 1.0, 1):
        entropy_quantile(entropy, mask, rho)
        entropy_top_k(entropy, mask, rho)
for N, V in ((1, 1), (1, 7), (2, 16), (17, 4000), (64, 32768)):
    for constants in ((1.2, 1.0, 0.672), (1.0, 1.0, 0.0), (0.7, 2, 3)):
        for rule in RULES:
            logits = torch.zeros(N, (V + 7) // 8 * 8, dtype=torch.bfloat16)[:, :V]
            entropy_temperature(logits, torch.ones(N, dtype=torch.bool), logits, rule, constants, 0.01, block_v=2048)
print({name: len(keys) for name, keys in seen.items()})
"""


def test_no_recompilation_when_rows_lengths_or_temperature_change():
    counts = eval(run_without_interpreter("-c", COUNT_SPECIALISATIONS))
    # The forward exists for whole and for split rows; narrow for the first, a middle and two kinds of last pass; the
    # temperature for each rule.
    assert counts == {
        "token_stats_forward_kernel": 2, "token_stats_merge_kernel": 1, "token_stats_backward_kernel": 1,
        "fold_tile_kernel": 1, "gradient_tile_kernel": 1, "loss_gradient_kernel": 1,
        "clip_surrogate_kernel": 1, "entropy_histogram_kernel": 1,
        "entropy_narrow_kernel": 4, "entropy_ties_kernel": 1, "entropy_last_tie_kernel": 1,
        "entropy_temperature_kernel": 3,
    }  # fmt: skip
