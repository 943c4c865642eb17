"""`rlloss doctor`: all is well here, and in a broken environment it says what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlloss import cli, doctor

ROOT = Path(__file__).resolve().parents[1]


def said(*folders, **environment):
    """(exit status, output) of the command in a process of its own, which finds `folders` first."""
    path = os.pathsep.join([*map(str, folders), str(ROOT)])
    clean = {name: value for name, value in os.environ.items() if name not in ("RLLOSS_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "rlloss.cli", "doctor", "--no-benchmark"],
        env={**clean, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def check_of(report, name):
    return next(check for check in report.checks if check.name.startswith(name))


def test_all_is_well_here(monkeypatch):
    for name in ("RLLOSS_BACKEND", "TRITON_INTERPRET"):  # the interpreter takes a minute for the benchmark
        monkeypatch.delenv(name, raising=False)
    report = doctor.doctor(seconds=0.0)
    assert report.ok and "what to do" not in str(report) and str(report).endswith("All is well.")
    assert torch.__version__ in str(report) and "ms" in check_of(report, "benchmark").text
    assert any(check.name == "results of torch" for check in report.checks)


def package(folder, name, version, code):
    """An installed package of this name and version, with this __init__.py."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.slow
def test_a_trl_without_the_hooks(tmp_path):
    pytest.importorskip("trl")
    package(tmp_path, "trl", "1.10.0", "__version__ = '1.10.0'\nclass GRPOTrainer: pass\n")
    status, output = said(tmp_path)
    assert status == 1 and output.count("what to do: ") == 2
    assert "rlloss needs trl >= 1.14" in output and "cannot be imported: ImportError: " in output


def test_a_trl_that_is_too_new(monkeypatch):
    plugin = pytest.importorskip("rlloss.integrations.trl_grpo")
    monkeypatch.setattr(plugin, "IN_TESTED_RANGE", False)
    check = doctor._trl()
    assert check.remedy == 'pip install "trl>=1.14.0,<1.17.0"' and plugin.trl.__version__ in check.text
    assert not doctor.Report((check,)).ok


@pytest.mark.slow
def test_a_trl_whose_import_raises(tmp_path):
    package(tmp_path, "trl", "1.16.0", "raise RuntimeError('a library of mine is broken')\n")
    status, output = said(tmp_path)
    assert status == 1 and "RuntimeError: a library of mine is broken" in output and "what to do: pip install" in output


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU the torch backend is the right one")
def test_without_triton_and_without_trl(tmp_path):
    package(tmp_path, "triton", "3.7.1", "raise ImportError('no Triton')\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'trl' else find(name, *more)\n"
    )
    status, output = said(tmp_path)
    assert status == 0 and "TRL is not installed; the plain API works without it" in output, output
    assert "torch (no CUDA device)" in output


def test_no_triton_on_a_gpu_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "_place", lambda: "cuda")
    monkeypatch.setattr(doctor.backends, "triton_forward", None)
    monkeypatch.setattr(doctor.backends, "choose_backend", lambda x: "torch")
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: None)
    assert "pip install triton" in doctor._backend().remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has Triton")
def test_a_forced_backend_that_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("RLLOSS_BACKEND", "triton")
    assert cli.main(["doctor", "--no-benchmark"]) == 1
    output = capsys.readouterr().out
    assert "'triton' was forced" in output and "what to do: unset RLLOSS_BACKEND" in output
    assert "results of" not in output


def test_a_wrong_result_is_seen(monkeypatch):
    exact = doctor._by_rlloss
    monkeypatch.setattr(doctor, "_by_rlloss", lambda *way: tuple(x * (1 + 1e-5) for x in exact(*way)))
    check = doctor._self_check("torch")
    assert check.remedy is not None and "at most" in check.text
    monkeypatch.setattr(doctor, "_by_rlloss", lambda *way: tuple(x * torch.nan for x in exact(*way)))
    assert doctor._self_check("torch").remedy is not None
    monkeypatch.setattr(doctor, "_by_rlloss", exact)
    assert doctor._self_check("torch").remedy is None


def test_old_libraries_and_a_broken_installation(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_requirements", lambda: {"torch": "99.0", "trl": "99.1"})
    assert "rlloss needs torch >= 99.0" in doctor._torch().remedy
    pytest.importorskip("trl")
    (check,) = doctor._libraries()
    assert "rlloss needs trl >= 99.1" in check.remedy
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    assert "without rlloss.kernels and rlloss.integrations" in doctor._rlloss().text


def test_the_lowest_versions_are_read_from_the_package():
    assert doctor._requirements()["torch"] == "2.8" and doctor._requirements()["trl"] == "1.14"
