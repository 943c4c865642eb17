"""Test `rlloss doctor`: it passes in this environment, and in a broken one it says what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlloss
from rlloss import cli, doctor

ROOT = Path(__file__).resolve().parents[2]


def said(*folders, **environment):
    """(exit status, output) of the command in a new process, with `folders` first on its path."""
    path = os.pathsep.join([*map(str, folders), str(ROOT)])
    clean = {name: value for name, value in os.environ.items() if name not in ("RLLOSS_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "rlloss.cli", "doctor", "--no-benchmark"],
        env={**clean, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def check_of(report, name):
    return next(check for check in report.checks if check.name.startswith(name))


def test_all_is_well_here(monkeypatch):
    for name in ("RLLOSS_BACKEND", "TRITON_INTERPRET"):  # the interpreter takes a minute for the benchmark
        monkeypatch.delenv(name, raising=False)
    report = doctor.doctor(seconds=0.0)
    assert report.ok and "what to do" not in str(report) and str(report).endswith("All is well.")
    assert torch.__version__ in str(report) and "ms" in check_of(report, "benchmark").text
    assert any(check.name == "results of torch" for check in report.checks)
    assert max(map(len, str(report).splitlines())) <= 100


def test_the_benchmark_takes_one_thread_and_says_if_the_machine_was_busy(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(doctor, "_compare", lambda seconds: torch.get_num_threads())
    assert doctor._benchmark(0.0) == 1 and torch.get_num_threads() == before
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 8)
    assert doctor._disturbed(1.9) == "" and "load 2.1 on 8 cores" in doctor._disturbed(2.1)


class Installed:
    """Metadata of a distribution in `root`."""

    def __init__(self, root, version, editable):
        self.root, self.version = root, version
        self.origin = json.dumps({"url": root.as_uri(), "dir_info": {"editable": True}}) if editable else None

    def read_text(self, name):
        return self.origin

    def locate_file(self, name):
        return self.root


@pytest.mark.parametrize("editable", [True, False])
def test_how_it_was_installed(monkeypatch, tmp_path, editable):
    monkeypatch.setattr(doctor.importlib.metadata, "distribution", lambda name: Installed(*found, editable))
    found = ROOT, rlloss.__version__
    text = "editable, of" if editable else "in"
    assert doctor._installation() == doctor.Check("installation", f"{text} {ROOT}")
    found = tmp_path, rlloss.__version__
    check = doctor._installation()
    assert "another copy" in check.text and check.remedy is None
    found = tmp_path, "0.0.1"
    assert "and not 0.0.1" in doctor._installation().text and "PYTHONPATH" in doctor._installation().remedy


def test_not_installed_is_no_fault(monkeypatch):
    def none(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "distribution", none)
    check = doctor._installation()
    assert check.remedy is None and check.text.startswith("not installed")


def test_a_folder_that_hides_an_editable_installation(monkeypatch, tmp_path):
    finder = type("Finder", (), {"__module__": "__editable___rlloss_0_1_0_finder", "find_spec": lambda *_: None})
    monkeypatch.setattr(doctor.importlib.metadata, "distribution", lambda _: Installed(ROOT, rlloss.__version__, True))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.chdir(tmp_path)
    assert doctor._installation().remedy is None
    (tmp_path / "rlloss").mkdir()
    check = doctor._installation()
    assert str(tmp_path) in check.text and "without -e" in check.remedy


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
    plugin = pytest.importorskip("rlloss.integrations.trl.compat")
    monkeypatch.setattr(plugin, "IN_TESTED_RANGE", False)
    check = doctor._trl()
    first, beyond = plugin.TESTED
    assert check.remedy == f'pip install "trl>={first},<{beyond}"' and plugin.trl.__version__ in check.text
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
    monkeypatch.setattr(doctor.backends, "triton", None)
    monkeypatch.setattr(doctor.backends, "choose_backend", lambda x: "torch")
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: None)
    assert "pip install triton" in doctor._backend().remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has Triton")
def test_a_forced_backend_that_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("RLLOSS_BACKEND", "triton")
    assert cli.main(["doctor", "--no-benchmark"]) == 1
    output = " ".join(capsys.readouterr().out.split())
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
