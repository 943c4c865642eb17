"""Compile the kernels for GPUs that are not present, check the result with `benchmarks/compiler/report.py`, and count
the kernels.

The tests start new processes, because kernels imported under TRITON_INTERPRET=1 cannot be compiled.
"""

import ast
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compiler import assembly
from benchmarks.compiler.report import PASSES

ROOT = Path(__file__).resolve().parents[2]
REPORT = ("-m", "benchmarks.compiler.report", "--check")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def run_without_interpreter(*arguments: str, path: Path = ROOT, fails: bool = False) -> str:
    """Return the output. With `fails` the program must fail."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=path, capture_output=True, text=True, timeout=900
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("asked", [("sm_90", "gfx942", "bf16, plain"), pytest.param(TARGETS, marks=pytest.mark.slow)])
def test_what_the_compiler_makes_of_the_kernels(asked):
    assert ": 0 of " in run_without_interpreter(*REPORT, *asked)


BOTH_SIZES = """
from benchmarks.compiler.launches import BEYOND, launches
for launch in launches("gfx942"):
    logits = launch.arguments.get("logits_ptr") or launch.arguments.get("tile_ptr")
    if launch.constant("ALIGNED"):
        print(launch.kernel, BEYOND in launch.case, logits[1])
"""


def test_logits_on_amd_are_compiled_for_both_sizes():
    """AMD's compiler takes other instructions for tensors of up to 2 GB (S)."""
    lines = set(run_without_interpreter("-c", BOTH_SIZES).splitlines())
    for kernel in PASSES:
        assert {f"{kernel} False DS", f"{kernel} True D"} <= lines, (kernel, lines)


# File, text and its replacement ("": append it), the kernel that the fault affects, and the text of the report.
FAULTS = [
    ("online.py", "    e = tl.exp2(t)\n", "    e = tl.exp2(t) * tl.exp2(0.5 * t)\n", "token_stats_forward",
     "exponentials"),
    ("online.py", "x, EXP2_FLOOR, propagate_nan=tl.PropagateNan.ALL", "x, EXP2_FLOOR", "gradient_tile", "NaN"),
    ("rows.py", "        offset = offset // LANES * LANES\n", "", "token_stats_backward", "narrow"),
    (
        "token_stats_backward.py", "            write_zeros(out_ptr, start", "            pass  # ",
        "token_stats_backward", "loops",
    ),
    ("launch_table.py", "", '\nTABLE["statistics", "", "fp32", LARGEST] = Choice((8192, 4))\n', "fold_tile",
     "registers"),
    ("token_pass.py", "**registers(logp, NUM_WARPS, simple=False)", "maxnreg=32", "token_pass", "spills"),
]  # fmt: skip


@pytest.mark.slow
def test_a_fault_of_each_kind_is_found(tmp_path):
    for folder in ("rlloss", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)  # with the targets of the links
    for file, before, after, _, _ in FAULTS:
        path = tmp_path / "rlloss" / "kernels" / file
        text = path.read_text()
        assert before in text, (file, before)
        path.write_text(text.replace(before, after) if before else text + after)
    kernels = sorted({f"{fault[3]}_kernel" for fault in FAULTS})
    found = run_without_interpreter(*REPORT, "sm_90", *kernels, path=tmp_path, fails=True).splitlines()
    for *_, kernel, what in FAULTS:
        assert any(line.startswith(f"{kernel}_kernel") and f" {what}: " in line for line in found), (kernel, what)


FLAGS = """
from benchmarks.compiler.launches import launches
from rlloss.kernels.entropy_temperature import RULES
for kernel in {launch.kernel: launch.function for launch in launches("sm_90")}.values():
    print(kernel.fn.__name__, " ".join(p.name for p in kernel.params if p.is_constexpr))
"""


def test_a_kernel_has_few_flags():
    """A kernel has fewer than 64 combinations of settings besides dtype, alignment of rows and vocabulary size."""
    lines = (line.split() for line in run_without_interpreter("-c", FLAGS).splitlines())
    found = {name: set(constants) for name, *constants in lines}
    assert found.keys() == {name for name in JITTED if name.endswith("_kernel")} and len(found) >= 12
    for name, constants in found.items():
        flags = constants - {"ALIGNED", "BLOCK_V", "CHUNK_V", "BLOCK", "BINS", "BLOCK_T", "BLOCK_B", "FIELDS"}
        switches = [*(flags - {"RULE"}), *optional(name)]
        on = [set(itertools.compress(switches, x)) for x in itertools.product((0, 1), repeat=len(switches))]
        settings = sum("last_ptr" not in x or "cutoff_ptr" in x for x in on) * (3 if "RULE" in flags else 1)
        assert settings < 64, (name, settings, switches)


JITTED = {
    node.name: node
    for path in sorted((ROOT / "kernels").glob("*.py"))
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
}


def optional(kernel: str) -> set[str]:
    """Parameters that may be None: the kernel, or a function that it calls, compares them with None."""
    found = set()
    for node in ast.walk(JITTED[kernel]):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            found.add(ast.unparse(node.left))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in JITTED:
            called = JITTED[node.func.id]
            names = [a.arg for a in called.args.args]
            given = {name: ast.unparse(value) for name, value in zip(names, node.args, strict=False)}
            found |= {given[name] for name in optional(node.func.id)}
    return found & {a.arg for a in JITTED[kernel].args.args}


NESTED = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/               @P1 CALL.REL.NOINC 0x60 ;
        /*0050*/                   BRA 0x20 ;
        /*0060*/               @P2 BRA 0xb0 ;
        /*0070*/                   BSSY B0, 0x90 ;
        /*0080*/                   BSYNC B0 ;
        /*0090*/                   BRA.U UP0, 0x10          ?trans5;
        /*00a0*/                   EXIT ;
        /*00b0*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*00c0*/                   BRA 0x70 ;
"""


def test_loops_are_found_in_a_listing():
    code = assembly.parse_sass(NESTED)
    # The loop around it, which contains the detour to 0xb0, is not an innermost loop.
    assert assembly.loops(code, "MUFU.EX2") == [assembly.Loop({128: 1}, {}, 1)]
    code[0x50] = code[0x50]._replace(next=(0x60,))
    assert assembly.loops(code, "MUFU.EX2") == [assembly.Loop({128: 1}, {16: 1}, 1)]
    with pytest.raises(ValueError, match="found no address"):
        assembly.parse_sass("/*0000*/ BRA R2 ;\n")


@pytest.mark.parametrize("opcode, access", [
    ("LDG.E.128", ("load", 128)), ("LDG.E.ENL2.256", ("load", 256)), ("LDG.E.U16", ("load", 16)),
    ("LDG.E", ("load", 32)), ("STG.E.64.STRONG.GPU", ("store", 64)), ("LDS.128", None), ("LDL", None),
    ("RED.E.ADD.F32", None), ("global_load_dwordx4", ("load", 128)),
    ("buffer_store_short", ("store", 16)), ("global_load_ushort", ("load", 16)),
    ("global_store_short_d16_hi", ("store", 16)), ("ds_read_b128", None), ("s_load_dwordx4", None),
])  # fmt: skip
def test_widths_of_accesses(opcode, access):
    assert (assembly.sass_access if opcode.isupper() else assembly.amdgcn_access)(opcode) == access


SPECIALISATIONS = """
import torch
from benchmarks.compiler import launches
from rlloss.kernels import entropy_quantile, entropy_temperature, gradient_in_forward, logits_tile, token_pass
from rlloss.kernels import token_stats_backward, token_stats_forward

def of_a_batch(start, *shape, dtype=torch.float32):  # a slice of a batch begins at any entry
    return torch.zeros(start + torch.Size(shape).numel(), dtype=dtype)[start:].view(shape)

def call():
    for B, T in ((1, 1), (1, 7), (2, 16), (3, 17), (16, 33), (5, 128)):
        for number, start in ((1.0, 0), (0.7, 1), (2, 3)):
            logits = torch.zeros(B, T + 1, 4000, dtype=torch.bfloat16)[:, :-1]
            target = of_a_batch(start, B * T, dtype=torch.int64)
            mask = of_a_batch(start, B * T, dtype=torch.bool)
            for split in (False, True):
                logp, entropy, lse, saved, _ = token_stats_forward.token_stats_forward(
                    logits, target, mask, (number, None, 1), split=split)
            token_stats_backward.token_stats_backward(
                logits, target, mask, (number, None, 1), (saved, entropy), (logp, None, None))
            x, y, z = (of_a_batch(i * start, B, T) for i in range(3))
            settings = token_pass.TokenSettings(0.0, 0.8 * number, 1.2, 0.2, 3.0)
            gradient_in_forward.gradient_in_forward(
                logits, target, mask.view(B, T), (number, None, 1.0),
                gradient_in_forward.LossTensors(x, y, None, None, None, torch.ones(2, B)), settings)
            for on in (0.0, 1.0):
                token_pass.token_pass(
                    token_pass.TokenTensors(x, of_a_batch(start, B, 1), mask.view(B, T), y, z, None, z, y),
                    settings._replace(
                        sequence=on, mean_of_sequence=on, kept_counts=on, denominator=number, beta=number,
                        kl_estimator=2.0 + on, kl_bias_correction=on, off_policy_threshold=number, delta=number))
            tile, running = torch.zeros(B * T, 4000), torch.zeros(7, B * T)
            for first in (0, 1, 64000):
                logits_tile.fold_tile(tile, first, target, running, (number, None, 1), entropy=True, extra=False)
                row = running[0]
                logits_tile.gradient_tile(
                    tile, first, target, (number, None, 1), (row, row, row, None), (row, None, None), torch.bfloat16)
    for N in (0, 1, 2, 16, 17, 5000, 2 ** 20):
        entropy, mask = torch.zeros(N), torch.ones(N, dtype=torch.bool)
        for rho in (0, 0.0, 0.2, 0.7, 1.0, 1):
            for limit in (0, 2 ** 24):
                entropy_quantile.entropy_quantile(entropy, mask, rho, rounded_up_to=limit)
            entropy_quantile.entropy_top_k(entropy, mask, rho)
    for N, V in ((1, 1), (1, 7), (2, 16), (17, 4000), (64, 32768)):
        for constants in ((1.2, 1.0, 0.672), (1.0, 1.0, 0.0), (0.7, 2, 3)):
            logits = torch.zeros(N, (V + 7) // 8 * 8, dtype=torch.bfloat16)[:, :V]
            entropy_temperature.entropy_temperature(
                logits, torch.ones(N, dtype=torch.bool), logits, "edt", constants, 0.01, block_v=2048)

launches.CALLS = {"": call}
for launch in launches.launches("sm_90"):
    print(launch.kernel)
"""


def test_no_recompilation_when_rows_lengths_temperature_or_settings_change():
    found = run_without_interpreter("-c", SPECIALISATIONS).split()
    # The forward exists for whole and for split rows, "narrow" for the first, a middle and two kinds of last pass.
    several = {"token_stats_forward_kernel": 2, "entropy_narrow_kernel": 4}
    assert {name: found.count(name) for name in found} == {name: several.get(name, 1) for name in set(found)}
    assert set(found) == {name for name in JITTED if name.endswith("_kernel")}
