"""The kernels compile for GPUs that are not here, without spills, and are not compiled again for every length.

In processes of their own: kernels imported under TRITON_INTERPRET=1 cannot be compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
VOCABULARY = ("forward", "merge", "backward")
QUANTILE = ("histogram", "narrow first", "narrow", "narrow to quantile", "narrow to top k", "ties", "last tie")


def run_without_interpreter(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_report(*arguments: str) -> list[dict]:
    return json.loads(run_without_interpreter("benchmarks/compile_report.py", "--json", *arguments))


def spills(row: dict) -> int:
    return row["local"] + row["stack"] + row.get("LDL", 0) + row.get("STL", 0)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_vocabulary_kernels_compile_without_spills_and_with_16_byte_loads(target):
    table = compile_report(target, *VOCABULARY)
    assert {(row["kernel"], row["dtype"], row["flags"]) for row in table} >= {
        (kernel, dtype, flags)
        for kernel in VOCABULARY
        for dtype, flags in (("bf16", "plain"), ("fp32", "plain"), ("bf16", "all"))
    }
    if target.startswith("gfx"):
        return  # the wheel has no disassembler for it: that it compiles is what is shown
    for row in table:
        assert not spills(row), row
        assert row["max.NaN"] > 0, row  # the floor of the exponents lets NaN through; the interpreter's always does
        if row["kernel"] != "merge":
            # A thread's entries of a tile: 8 in 2-byte types, in one load; 8 in fp32, in two.
            assert row["LDG.E.128"] == (2 if row["dtype"] == "fp32" else 1), row
        if row["kernel"] == "backward":
            assert row["STG.E.128"] > 0, row
        if row["flags"] == "plain":
            assert row["registers"] <= 64, row  # 1024 threads a multiprocessor or more


def test_the_quantile_kernels_compile_without_spills_for_every_target():
    table = compile_report(*QUANTILE)
    assert {(row["kernel"], row["target"]) for row in table} == {(k, t) for k in QUANTILE for t in TARGETS}
    for row in (r for r in table if not r["target"].startswith("gfx")):
        assert not spills(row), row
        assert row["registers"] <= 128, row  # all warps of a program fit a multiprocessor


COUNT_SPECIALISATIONS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from rlloss.kernels.entropy_quantile import entropy_quantile, entropy_top_k
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
for N in (0, 1, 2, 16, 17, 5000, 2 ** 20):
    entropy, mask = torch.zeros(N), torch.ones(N, dtype=torch.bool)
    for rho in (0, 0.0, 0.2, 0.7, 1.0, 1):
        entropy_quantile(entropy, mask, rho)
        entropy_top_k(entropy, mask, rho)
print({name: len(keys) for name, keys in seen.items()})
"""


def test_no_recompilation_when_rows_lengths_or_temperature_change():
    counts = eval(run_without_interpreter("-c", COUNT_SPECIALISATIONS))
    # The forward exists for whole and for split rows; narrow for the first, a middle and two kinds of last pass.
    assert counts == {
        "token_stats_forward_kernel": 2, "token_stats_merge_kernel": 1, "token_stats_backward_kernel": 1,
        "entropy_histogram_kernel": 1, "entropy_narrow_kernel": 4, "entropy_ties_kernel": 1,
        "entropy_last_tie_kernel": 1,
    }  # fmt: skip
