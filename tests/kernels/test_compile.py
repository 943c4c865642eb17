"""What the compiler makes of the kernels for GPUs that are not here: see `benchmarks/compiler/report.py`, which is the
judge, and its table. And how often they are compiled.

In processes of their own: kernels imported under TRITON_INTERPRET=1 cannot be compiled.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compiler import assembly

ROOT = Path(__file__).resolve().parents[2]
REPORT = ("-m", "benchmarks.compiler.report")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def run_without_interpreter(*arguments: str | Path, path: Path = ROOT, fails: bool = False) -> str:
    """The output, or where it has to fail the errors."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=path, capture_output=True, text=True, timeout=600
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout


def jitted_kernels() -> set[str]:
    """The functions under kernels/ that are decorated with triton.jit and called a kernel."""
    functions = [
        node
        for path in sorted((ROOT / "kernels").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    return {f.name for f in functions if "_kernel" in f.name}


def kinds(line: str) -> set[str]:
    """What falls short in a line of the report, in fewer words."""
    variant, _, wrong = line.partition(": ")
    kernel, target, _, _ = variant.split(", ", 3)
    return {f"{what.partition(':')[0]}: {kernel}, {target}" for what in wrong.split("; ")}


@pytest.mark.parametrize(
    "target, flags", [("sm_90", ["plain"]), *(pytest.param(t, [], marks=pytest.mark.slow) for t in TARGETS)]
)
def test_what_the_compiler_makes_of_the_kernels(target, flags):
    rows = json.loads(run_without_interpreter(*REPORT, "--json", target, *flags))
    assert {row["function"] for row in rows} == jitted_kernels()
    assert len(jitted_kernels()) >= 12
    short = [f"{row['name']}: {'; '.join(row['violations'])}" for row in rows if row["violations"]]
    assert short == []


# File, what is replaced by what ("": added at its end), the kernel to which that shows, and what the report says.
FAULTS = [
    ("online.py", "    e = tl.exp2(t)\n", "    e = tl.exp2(t) * tl.exp2(0.5 * t)\n", "forward", "exponentials"),
    ("online.py", "x, EXP2_FLOOR, propagate_nan=tl.PropagateNan.ALL", "x, EXP2_FLOOR", "gradient tile", "NaN"),
    ("token_stats_backward.py", "        row_ptr = tl.multiple_of(row_ptr, 16)\n", "", "backward", "narrow"),
    ("token_stats_backward.py", "            write_zeros(out_ptr, start", "            pass  # ", "backward", "loops"),
    (
        "launch_table.py", "", '\nTABLE["statistics", "", "fp32", LARGEST] = Choice((8192, 4))\n', "fold tile",
        "registers",
    ),
    ("token_stats_forward.py", "in range(chunks):\n        slot_ptr", "in ():\n        slot_ptr", "merge", "compiler"),
]  # fmt: skip


@pytest.mark.slow
def test_a_fault_of_each_kind_is_found(tmp_path):
    shutil.copytree(ROOT / "rlloss", tmp_path / "rlloss")  # with what the links point to
    for file, before, after, _, _ in FAULTS:
        path = tmp_path / "rlloss" / "kernels" / file
        text = path.read_text()
        assert before in text, (file, before)
        path.write_text(text.replace(before, after) if before else text + after)
    targets, kernels = ("sm_90", "gfx942"), tuple({fault[3] for fault in FAULTS})
    errors = run_without_interpreter(*REPORT, "--check", "plain", *targets, *kernels, path=tmp_path, fails=True)
    found = {what for line in errors.splitlines() if line.startswith(kernels) for what in kinds(line)}
    expected = {f"{what}: {kernel}, {target}" for *_, kernel, what in FAULTS for target in targets}
    assert expected - found == {"NaN: gradient tile, gfx942"}  # where there is no instruction of its own


SPILLS_AND_LISTINGS = """
import subprocess, tempfile
from benchmarks.compiler import assembly, report as compile_report, variants as compile_variants
from benchmarks.compiler.variants import Variant

kernels = compile_variants.KERNELS
plain = Variant("forward", "sm_90", compile_variants.simple("forward")[0])
kernels["forward"] = kernels["forward"]._replace(options={"maxnreg": 24})
(row,) = compile_report.rows([plain])
print(row["violations"][0])
kernels["forward"] = kernels["forward"]._replace(options={})
for arch in (80, 90, 100, 120):
    made = [compile_variants.compile_variant(Variant(name, f"sm_{arch}", compile_variants.simple(name)[0]))
            for name in ("narrow", "ties")]
    codes = assembly.disassemble([kernel.asm["cubin"] for kernel in made], arch)
    for kernel, code in zip(made, codes):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(kernel.asm["cubin"])
            f.flush()
            listing = assembly.parse_sass(assembly.run_tool("cuobjdump", "-sass", f.name))
        start = min(code)
        moved = {at - start: (i.opcode, i.predicated, tuple(n - start for n in i.next)) for at, i in code.items()}
        print(len(moved) > 99 and moved == {at: tuple(i) for at, i in listing.items()})
"""


@pytest.mark.slow
def test_spills_are_seen_and_code_is_read_as_cuobjdump_reads_it():
    spills, *equal = run_without_interpreter("-c", SPILLS_AND_LISTINGS, path=ROOT / "benchmarks").splitlines()
    assert spills.startswith("spills: ")
    assert equal == ["True"] * 8


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
        /*00d0*/                   BRA 0xd0;
"""


def test_loops_are_found_in_a_listing():
    code = assembly.parse_sass(NESTED)
    inner, end = assembly.innermost_loops(code)
    # The loop around it, in which the detour to 0xb0 lies, is none of the innermost.
    assert [i.opcode for i in inner] == ["LDG.E.128", "MUFU.EX2", "CALL.REL.NOINC", "BRA"]
    assert [i.opcode for i in end] == ["BRA"]
    without = {at: i for at, i in code.items() if at not in (0x50,)} | {0x50: code[0x50]._replace(next=(0x60,))}
    outer, _ = assembly.innermost_loops(without)
    assert [i.opcode for i in outer][-2:] == ["STG.E.U16", "BRA"] and len(outer) == 11


@pytest.mark.parametrize("wrong", ["BRX R2 -0x10 ;", "BSYNC B0 ;", "BRA R2 ;"])
def test_a_jump_that_is_not_understood_raises(wrong):
    with pytest.raises(ValueError, match="found .* expected|found a jump"):
        assembly.parse_sass(f"/*0000*/ {wrong}\n/*0010*/ EXIT ;\n")


@pytest.mark.parametrize("opcode, access", [
    ("LDG.E.128", ("load", 128)), ("LDG.E.ENL2.256", ("load", 256)), ("LDG.E.U16", ("load", 16)),
    ("LDG.E", ("load", 32)), ("STG.E.64.STRONG.GPU", ("store", 64)), ("LDGSTS.E.BYPASS.128", ("load", 128)),
    ("LDS.128", None), ("LDL", None), ("RED.E.ADD.F32", None),
])  # fmt: skip
def test_widths_of_accesses(opcode, access):
    assert assembly.sass_access(opcode) == access


@pytest.mark.parametrize("opcode, access", [
    ("global_load_dwordx4", ("load", 128)), ("buffer_store_short", ("store", 16)), ("global_load_ushort", ("load", 16)),
    ("global_store_short_d16_hi", ("store", 16)), ("ds_read_b128", None), ("s_load_dwordx4", None),
    ("scratch_load_dword", None),
])  # fmt: skip
def test_widths_of_accesses_on_amd(opcode, access):
    assert assembly.amdgcn_access(opcode) == access


COUNT_SPECIALISATIONS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from rlloss.kernels.token_pass import TokenSettings, TokenTensors, token_pass
from rlloss.kernels.entropy_quantile import entropy_quantile, entropy_top_k
from rlloss.kernels.entropy_temperature import RULES, entropy_temperature
from rlloss.kernels.logits_tile import fold_tile, gradient_tile
from rlloss.kernels.gradient_in_forward import LossTensors, gradient_in_forward
from rlloss.kernels.token_stats_forward import token_stats_forward
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
        settings = TokenSettings(0.0, 0.8 * temperature, 1.2, 0.2, 3.0)
        gradient_in_forward(
            logits, target, mask, temperature, None, 1.0, LossTensors(x, x, None, None, None, torch.ones(2, B)),
            settings)
        for sequence in (0.0, 1.0):
            token_pass(
                TokenTensors(x, x[:, :1].contiguous(), mask, x, x, None, x, x),
                settings._replace(
                    sequence=sequence, denominator=temperature, kl_estimator=2.0 + sequence, beta=temperature))
        tile, running = torch.zeros(B * T, V), torch.zeros(7, B * T)
        for start in (0, 1, 16 * V):
            fold_tile(tile, start, target, running, temperature, None, 1, entropy=False, extra=False)
            row = running[0]
            gradient_tile(tile, start, target, row, row, None, row, None, None, temperature, None, 1, torch.bfloat16)
for N in (0, 1, 2, 16, 17, 5000, 2 ** 20):
    entropy, mask = torch.zeros(N), torch.ones(N, dtype=torch.bool)
    for rho in (0, 0.0, 0.2, 0.7, 1.0, 1):
        for limit in (0, 2 ** 24):
            entropy_quantile(entropy, mask, rho, rounded_up_to=limit)
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
        "fold_tile_kernel": 1, "gradient_tile_kernel": 1, "gradient_in_forward_kernel": 1,
        "token_pass_kernel": 1, "entropy_histogram_kernel": 1,
        "entropy_narrow_kernel": 4, "entropy_ties_kernel": 1, "entropy_last_tie_kernel": 1,
        "entropy_temperature_kernel": 3,
    }  # fmt: skip
