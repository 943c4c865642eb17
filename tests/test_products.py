"""Products in the CPU's bf16 units: nearly the sums of fp32, and the process's setting as it was."""

import threading

import pytest
import torch

from rlloss import products

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
    if products.has_bf16_units():
        assert rounded > 1e-4  # the units are really used


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
