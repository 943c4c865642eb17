"""Run the suite's contenders one after the other under pytest-benchmark: `make bench-pytest`."""

import functools

import pytest
import torch

from benchmarks import suite
from benchmarks.harness.conditions import conditions
from benchmarks.harness.contest import Contest, examine
from benchmarks.harness.readings import is_ours
from benchmarks.harness.shapes import FIRST_RHOS, QUICK_MODELS, Cell
from benchmarks.harness.timing import CUDA, DEVICE, refuse_interpreter

DTYPE = "bfloat16" if CUDA else "float32"
CELLS = suite.cells(list(suite.SUITES), QUICK_MODELS[DEVICE.type], [DTYPE], FIRST_RHOS, [1.0])
CASES = [(cell, name) for cell in CELLS for name in suite.SUITES[cell.suite].notes(CUDA)]


@functools.lru_cache(maxsize=1)
def contest(cell: Cell) -> Contest:
    suite.forget()
    return suite.SUITES[cell.suite].contest(cell, CUDA)


@pytest.mark.parametrize("cell, name", CASES, ids=str)
def test_contender(benchmark, cell, name):
    refuse_interpreter()
    found = contest(cell)
    entrant = next(e for e in (*found.peers, *found.limits) if e.name == name)
    entry = examine(entrant) if entrant in found.peers else {"status": "measured"}
    assert not (is_ours(name) and entry["status"].startswith(("wrong", "failed"))), entry["status"]
    if entry["status"] != "measured":
        pytest.skip(entry["status"])
    benchmark.group = str(cell)
    benchmark.extra_info.update(conditions() | suite.describe(cell) | found.facts | entry)

    def synchronised() -> None:
        entrant.run()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, setup=entrant.prepare, rounds=20 if CUDA else 5, warmup_rounds=1)
