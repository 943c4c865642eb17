"""Test the benchmark of the whole loss from logits: peers are right, and a wrong peer is not timed."""

import dataclasses
import functools
import math

import pytest
import torch

from benchmarks import suite
from benchmarks.contenders import loss as contenders
from benchmarks.harness.contest import entrant, examine
from benchmarks.suites import loss as bench


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.setenv("RLLOSS_BACKEND", "torch")


@pytest.fixture(scope="module")
def solved():
    return {rho: bench.solve(bench.make_case((4, 8), 300, torch.float32, rho, 0.5)) for rho in (0.2, 1.0)}


def examined(peer, case, expected, **options):
    return examine(entrant(peer, case, functools.partial(bench.check, peer, case, expected)), **options)


@pytest.mark.parametrize("rho", [0.2, 1.0])
def test_the_reference_is_what_autograd_makes_in_fp64(solved, rho):
    case, expected = solved[rho]
    leaf = case.logits.double().requires_grad_()
    loss, entropy = contenders._formula(lambda: contenders.eager, leaf, case)
    loss.backward()
    torch.testing.assert_close(expected.loss, loss, check_dtype=False)
    torch.testing.assert_close(expected.entropy, entropy, check_dtype=False)
    rows = leaf.grad.flatten(0, 1)
    place = case.target.flatten().unsqueeze(-1)
    p = torch.softmax(case.logits.double().flatten(0, 1), -1).gather(-1, place).squeeze(-1)
    of_target = rows.gather(-1, place).squeeze(-1)
    torch.testing.assert_close(of_target, expected.coefficient * (1 - p), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("factor, reason", [(1.0, None), (1.001, "gradient"), (math.nan, "not 0")])
def test_a_wrong_peer_gets_no_number_and_rlloss_ends_the_run_with_1(solved, factor, reason):
    def function(logits, case):
        loss, entropy = contenders._formula(lambda: contenders.eager, logits, case)
        return factor * loss + (1 - factor) * loss.detach(), entropy

    found = examined(contenders._peer("rlloss", "", function), *solved[0.2])
    result = {"suite": "loss", "model": None, "dtype": "float32", "rho": 0.2, "fill": 0.5, "kind": "step"}
    bad = suite.failures([result | {"status": "measured", "peers": {"rlloss": found, "TRL": found}}])
    if reason is None:
        assert found["status"] == "measured" and not bad
    else:
        assert set(found) == {"status"} and found["status"].startswith("wrong: ") and reason in found["status"]
        assert len(bad) == 1 and "rlloss: wrong" in bad[0]


def test_a_peer_that_raises_does_not_end_the_run(solved):
    def function(logits, case):
        raise RuntimeError("no kernel image\nand more")

    found = examined(contenders._peer("broken", "", function), *solved[1.0])
    assert found == {"status": "failed: RuntimeError: no kernel image"}


@pytest.mark.parametrize("rho", [0.2, 1.0])
def test_those_for_a_gpu_are_right_too(solved, rho, monkeypatch):
    for module in ("trl", "liger_kernel"):
        pytest.importorskip(module)
    monkeypatch.delenv("RLLOSS_BACKEND")
    case, _ = solved[rho]
    first = {name: getattr(case, name)[:, :4].contiguous() for name in ("logits", "target", "mask")}
    small, expected = bench.solve(dataclasses.replace(case, cutoff=None, **first))
    checked = set()
    for peer in contenders.peers(compiled=False):
        if not peer.ignores_rho or rho == 1.0:
            bench.check(peer, small, expected)
            checked.add(peer.name)
    assert {"rlloss single launch", "rlloss in place", "TRL kernel"} <= checked
    assert ({"Liger", "Liger in place"} <= checked) == (rho == 1.0)


def test_an_in_place_peer_leaves_the_case_as_it_was(solved):
    case, _ = solved[1.0]
    before = case.logits.clone()
    peer = next(p for p in contenders.peers(compiled=False) if p.name == "rlloss in place")
    first, second = peer.step(case).gradient.clone(), peer.step(case).gradient
    assert torch.equal(case.logits, before) and torch.equal(first, second)
    assert second.data_ptr() == case.scratch[peer.name].data_ptr()


def test_a_slow_peer_is_not_timed_but_rlloss_is(solved):
    peers = {peer.name: peer for peer in contenders.peers(compiled=False)}
    status = {
        name: examined(peers[name], *solved[1.0], longest_step=0.0)["status"] for name in ("rlloss", "torch eager")
    }
    assert status["rlloss"] == "measured" and status["torch eager"].startswith("not measured: a step takes ")
