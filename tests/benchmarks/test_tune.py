"""Test the search for launch shapes: its choice, its errors, and the table that it writes. No GPU is timed here."""

import itertools
from pathlib import Path

import pytest
import torch

from benchmarks import tune
from rlloss import backends
from rlloss.kernels import launch_table
from rlloss.kernels.launch_table import Choice, look_up

ROOT = Path(__file__).resolve().parents[2]
interpreted = pytest.mark.skipif(not backends.triton or torch.cuda.is_available(), reason="runs in the interpreter")
CPU = torch.device("cpu")


def test_the_file_is_what_the_program_writes():
    source = tune.FILE.read_text()
    assert tune.rewritten(source, launch_table.TABLE) == source


def test_what_it_writes_is_the_table():
    table = launch_table.TABLE | {("tile", "sm_90", "fp32", 151936): Choice((8192, 1 << 27), "NVIDIA H200, 2026-11-24")}
    names: dict = {"__name__": "written"}
    exec(compile(tune.rewritten(tune.FILE.read_text(), table), "written", "exec"), names)
    assert {key: tuple(entry) for key, entry in names["TABLE"].items()} == {k: tuple(v) for k, v in table.items()}
    assert names["look_up"]("tile", "sm_90", "fp32", 100) == (8192, 1 << 27)


@pytest.mark.parametrize("times, taken", [
    ([1.0, 0.9], (1,)), ([1.0, 0.99], (0,)), ([1.0, 1.1], (0,)), ([1.0, 1.0], (0,)),
])  # fmt: skip
def test_a_candidate_has_to_be_faster_by_more_than_noise(times, taken):
    samples = {(i,): [t * (1 + 0.001 * k) for k in range(8)] for i, t in enumerate(times)}
    assert tune.better(samples, (0,)) == taken
    # A lower median is no gain if the spread of the samples is as large as the difference.
    wide = {(0,): [0.8, 1.0, 1.2, 1.0], (1,): [0.6, 0.9, 1.2, 0.9]}
    assert tune.better(wide, (0,)) == (0,)


@interpreted
@pytest.mark.parametrize("kernel, values", [
    ("statistics", [(256, 1), (512, 2)]), ("gradient", [(256, 1), (512, 2)]), ("split", [(0,), (2,)]),
    pytest.param("single_launch", [(0,), (10**9,)], marks=pytest.mark.slow),
    pytest.param("tile", [(4, 64), (8, 128)], marks=pytest.mark.slow),
])  # fmt: skip
def test_the_search_takes_the_fastest_and_leaves_the_table_as_it_was(monkeypatch, kernel, values):
    monkeypatch.setitem(tune.CANDIDATES, kernel, values)
    before = dict(launch_table.TABLE)
    key = tune.Key(kernel, "", "fp32", 700)
    ran = []

    def clock(run):
        value = look_up(kernel, "", "fp32", 700)
        ran.append(value)
        run()
        return 0.5 if value == values[-1] else 1.0 + 0.001 * next(steps)

    steps = itertools.count()
    with backends.backend("interpreter"):
        found, samples = tune.search(key, CPU, 3, 3, float("inf"), clock)
    assert found == values[-1] and set(ran) == set(samples) >= set(values)
    assert all(len(x) == 3 for x in samples.values()) and before == launch_table.TABLE


@interpreted
def test_a_candidate_that_gives_something_else_is_an_error(monkeypatch):
    monkeypatch.setitem(tune.CANDIDATES, "statistics", [(256, 1)])
    run = backends.triton.token_stats_forward

    def wrong(logits, *rest):
        spoiled = 0.01 if look_up("statistics", "", "fp32", 700) == (256, 1) else 0.0
        return run(logits * (1 + spoiled), *rest)

    monkeypatch.setattr("rlloss.kernels.token_stats_forward.token_stats_forward", wrong)
    with backends.backend("interpreter"), pytest.raises(ArithmeticError, match=r"with \(256, 1\) another result"):
        tune.search(tune.Key("statistics", "", "fp32", 700), CPU, 3, 3, float("inf"), lambda run: 1.0)


@interpreted
def test_a_candidate_that_fails_is_none(monkeypatch, capsys):
    monkeypatch.setitem(tune.CANDIDATES, "statistics", [(256, 1), (300, 1)])  # no power of two
    with backends.backend("interpreter"):
        _, samples = tune.search(tune.Key("statistics", "", "fp32", 700), CPU, 3, 3, float("inf"), lambda run: 1.0)
    assert (300, 1) not in samples and (256, 1) in samples
    assert "statistics (300, 1)" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_without_a_gpu_nothing_is_tuned(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--write"])
    assert "found no GPU" in capsys.readouterr().err
