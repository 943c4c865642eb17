"""Set up every test: Triton's interpreter if there is no GPU, no access to the Hub, and NaN in fresh memory."""

import collections
import os
import sys
import zlib

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()

# Triton reads this when a kernel is decorated, so it has to be set before rlloss.kernels is imported.
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"


def _round_bf16_as_the_hardware_does() -> None:
    """Make Triton's interpreter round fp32 to the nearest bf16, ties to even, as GPUs do. It truncates otherwise."""
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, source, destination, rounding_mode):
        if source == float32 and destination == bfloat16:
            return torch.from_numpy(data.astype("float32")).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
        return convert(data, source, destination, rounding_mode)

    interpreter._convert_float = rounded


def _patch_the_language_once_a_launch() -> None:
    """Patch triton.language once per launch. The interpreter repeats this at every call of a jit helper, needlessly."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # Triton 3.4 has another interpreter
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_once(fn):
        seen = tuple(
            name for name, value in fn.__globals__.items() if value is interpreter.tl or value is interpreter.tl.core
        )
        if seen in patched:
            return interpreter._LangPatchScope()
        patched.add(seen)
        return patch(fn)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew


if os.environ.get("TRITON_INTERPRET") == "1":
    _round_bf16_as_the_hardware_does()
    _patch_the_language_once_a_launch()

# Workers that use all cores slow each other down.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


# `make test` runs this many cases per test: those with the smallest hash, which sample the values of every parameter.
FAST_CASES = 3


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
        if item.get_closest_marker("gpu") and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    for of_test in cases.values():
        for item in sorted(of_test, key=lambda item: zlib.crc32(item.nodeid.encode()))[FAST_CASES:]:
            item.add_marker(pytest.mark.slow)


def _filled_with_nan(allocate):
    def poisoned(*args, **kwargs):
        fresh = allocate(*args, **kwargs)
        # Torch's own allocations are not filled: tracers allocate too, and would record the write in their graphs.
        if torch.compiler.is_compiling() or sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            return fresh
        if fresh.is_floating_point() or fresh.is_complex():
            with torch.no_grad():
                fresh.fill_(float("nan"))
        return fresh

    return poisoned


def _new_empty(tensor, *size, **kwargs):
    # The operator instead of the method: dynamo cannot trace the method once torch.Tensor's own is replaced.
    return torch.ops.aten.new_empty(tensor, size if all(isinstance(n, int) for n in size) else size[0], **kwargs)


@pytest.fixture(scope="module")
def on_torch():
    """Use plain torch in modules that do not test the kernels, because the interpreter runs kernels slowly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLLOSS_BACKEND", "torch")
        yield


@pytest.fixture(autouse=True)
def nan_filled_empty(monkeypatch):
    """Fill fresh floating-point memory with NaN, so that reads of memory that was never written become visible.

    (`torch.utils.deterministic.fill_uninitialized_memory` does so only under deterministic algorithms.)
    """
    monkeypatch.setattr(torch, "empty", _filled_with_nan(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _filled_with_nan(torch.empty_like))
    monkeypatch.setattr(torch, "empty_strided", _filled_with_nan(torch.empty_strided))
    monkeypatch.setattr(torch.Tensor, "new_empty", _filled_with_nan(_new_empty))
