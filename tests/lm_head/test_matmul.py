"""Test products in a CPU's bf16 units: they are close to fp32 sums, and torch's setting is restored."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlloss.lm_head import matmul as products

SETTING = getattr(torch.backends.mkldnn, "matmul", None)
needs_setting = pytest.mark.skipif(not hasattr(SETTING, "fp32_precision"), reason="this torch has no such setting")


def operands(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype).float() for shape in ((48, 256), (256, 64))]


def error(dtype, of, add=False):
    a, b = operands(of)
    out = torch.ones(48, 64)
    products.multiply(out, a, b, "logits", add=add, dtype=dtype)
    expected = a.double() @ b.double() + (1.0 if add else 0.0)
    return (out - expected).abs().max().item() / expected.abs().max().item()


@pytest.mark.parametrize("add", [True, False])
def test_widened_bf16_loses_nothing(add):
    assert error(torch.bfloat16, of=torch.bfloat16, add=add) < 1e-6


def test_operands_are_rounded_only_where_they_may_be():
    assert error(torch.float32, of=torch.float32) < 1e-6
    assert error(None, of=torch.float32) < 1e-6
    rounded = error(torch.bfloat16, of=torch.float32)
    assert rounded < 4e-3  # 2^-8: two operands, each off by half a unit in the last place
    assert (rounded > 1e-4) == products.has_bf16_units()  # the units are used if and only if the flag says so


class Counted(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@needs_setting
@pytest.mark.parametrize("rounds", [True, False])
def test_the_units_are_found_by_a_product(rounds, monkeypatch):
    """The probe also works inside autocast, which would round too, and no counter sees it."""
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: mm(a.bfloat16().float(), b) if rounds else mm(a, b))
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: not rounds, raising=False)
    monkeypatch.setattr(products._Bf16Operands, "__enter__", lambda self: None)
    monkeypatch.setattr(products._Bf16Operands, "__exit__", lambda self, *_: None)
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), Counted() as counted:
        assert products.has_bf16_units.__wrapped__() == rounds
    assert counted.calls == 0


def test_a_limit_of_onednn_counts():
    program = f"import runpy; print(runpy.run_path({products.__file__!r})['has_bf16_units']())"  # torch alone
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert subprocess.check_output([sys.executable, "-c", program], env=limited, text=True) == "False\n"


@needs_setting
@pytest.mark.parametrize("before", ["none", "ieee", "bf16"])
def test_the_setting_is_put_back(before, monkeypatch):
    monkeypatch.setattr(products, "has_bf16_units", lambda: True)
    was = SETTING.fp32_precision
    a, b = operands(torch.bfloat16)
    try:
        SETTING.fp32_precision = before
        before = SETTING.fp32_precision
        products.multiply(torch.empty(48, 64), a, b, "logits", dtype=torch.bfloat16)
        assert SETTING.fp32_precision == before
        with pytest.raises(RuntimeError):
            products.multiply(torch.empty(48, 64), a, b.t(), "logits", dtype=torch.bfloat16)
        assert SETTING.fp32_precision == before
    finally:
        SETTING.fp32_precision = was


@needs_setting
def test_the_last_thread_puts_the_setting_back():
    context, before = products._Bf16Operands(), SETTING.fp32_precision
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with context:
            inside.set()
            leave.wait(10)

    first = threading.Thread(target=stay)
    first.start()
    assert inside.wait(10)
    with context:
        leave.set()
        first.join(10)
        assert SETTING.fp32_precision == "bf16"  # the first one has left, and did not take it away
    assert SETTING.fp32_precision == before


def test_no_units_no_setting(monkeypatch):
    monkeypatch.setattr(products, "has_bf16_units", lambda: False)
    assert not isinstance(products.operands_in(torch.bfloat16, torch.zeros(1)), products._Bf16Operands)
    monkeypatch.setattr(products, "has_bf16_units", lambda: True)
    assert isinstance(products.operands_in(torch.bfloat16, torch.zeros(1)), products._Bf16Operands)
    for dtype, operand in ((torch.float32, torch.zeros(1)), (torch.bfloat16, torch.zeros(1).double())):
        assert not isinstance(products.operands_in(dtype, operand), products._Bf16Operands)


class OnGpu(torch.Tensor):
    """A tensor on a CPU that says it is on a GPU."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("refused", [None, "mm", "addmm"])
def test_a_gpu_that_cannot_write_fp32_gets_wide_operands(refused, add, monkeypatch):
    """As GPUs before Ampere and some versions of ROCm. The device is asked once."""
    asked = []

    def product(name, plain):
        def run(*operands, out_dtype=None, out=None):
            if out_dtype is not None:
                asked.append(name)
                if name == refused:
                    raise RuntimeError("only supported for CUDA devices with compute capability 8.0 or higher")
            return plain(*(x.float() if x.dtype == torch.bfloat16 else x for x in operands), out=out)

        return run

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, product(name, getattr(torch, name)))
    products.writes_fp32.cache_clear()
    a, b = (x.bfloat16() for x in operands(torch.bfloat16))
    for _ in range(2):
        out = torch.ones(48, 64)
        products.multiply(out, a.as_subclass(OnGpu), b, "logits", add=add)
        torch.testing.assert_close(out, (1.0 if add else 0.0) + a.float() @ b.float())
    products.writes_fp32.cache_clear()
    probe = {"mm": ["mm"]}.get(refused, ["mm", "addmm"])
    assert asked == (probe if refused else [*probe, *(["addmm" if add else "mm"] * 2)])


def test_a_full_memory_says_nothing_about_the_device(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    products.writes_fp32.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", full)
        with pytest.raises(torch.OutOfMemoryError):
            products.writes_fp32(torch.device("cpu"), torch.bfloat16)
    assert not products.writes_fp32(torch.device("cpu"), torch.bfloat16)  # a CPU refuses
    products.writes_fp32.cache_clear()
