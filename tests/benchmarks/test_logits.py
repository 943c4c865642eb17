"""Test the benchmark of log-probabilities and entropies from logits: peers are right, wrong peers are not timed."""

import dataclasses
import functools

import pytest
import torch

from benchmarks.contenders import logits as contenders
from benchmarks.harness.contest import entrant, examine
from benchmarks.suites import logits as bench

CHECKS = {"forward": bench.check_forward, "step": bench.check_step}


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.setenv("RLLOSS_BACKEND", "torch")


@pytest.fixture(scope="module")
def case():
    return bench.make_case((8, 4), 96, torch.float32, 0.25, 0.5)


@pytest.mark.parametrize("kind", CHECKS)
def test_those_for_a_gpu_are_right_too(case, kind, monkeypatch):
    for module in ("trl", "liger_kernel"):
        pytest.importorskip(module)
    monkeypatch.delenv("RLLOSS_BACKEND")
    for peer in contenders.peers(compiled=False):
        found = CHECKS[kind](dataclasses.replace(peer, on=None), case)["errors"]
        assert found and (peer.name != "Liger kernels" or "entropy" not in found)


def too_large(logits, target, mask):
    logp, entropy = contenders.eager(logits, target, mask)
    return 1.001 * logp, entropy


def without_the_mask(logits, target, mask):
    return contenders.eager(logits, target, None)


def through_dead_rows(logits, target, mask):
    logp, entropy = contenders.eager(logits, target, mask)
    return logp + logits.mean(), entropy


@pytest.mark.parametrize(
    "function, kind, reason",
    [
        (contenders.eager, "forward", None),
        (contenders.eager, "step", None),
        (too_large, "forward", "logp is off"),
        (too_large, "step", "gradient at the target is off"),
        (without_the_mask, "forward", "logp of a masked row is not 0"),
        (through_dead_rows, "step", "the gradient of a dead row is not 0"),
    ],
)
def test_a_wrong_peer_gets_no_number(case, function, kind, reason):
    peer = contenders._peer("x", "", function)
    found = examine(entrant(peer, case, functools.partial(CHECKS[kind], peer, case), phased=kind == "step"))
    if reason is None:
        assert found["status"] == "measured" and found["peak_bytes"] > 0
    else:
        assert set(found) == {"status"} and found["status"].startswith(f"wrong: x: {reason}")


def test_what_has_to_be_moved():
    """Counted rows are read. In a step live rows are read again, and the whole gradient is written."""
    case = bench.make_case((8, 16), 96, torch.bfloat16, 0.25, 0.5)
    assert bench.ideal_bytes(case, "forward") == 64 * 96 * 2
    assert bench.ideal_bytes(case, "step") == (64 + 16 + 128) * 96 * 2
