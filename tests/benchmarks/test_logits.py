"""The benchmark of log-probabilities and entropies from logits: it runs, its peers are right, wrong ones get no number.

No time is checked here.
"""

import dataclasses
import json

import pytest
import torch

from benchmarks.contenders import logits as peers
from benchmarks.suites import logits as bench

FORWARD, STEP = bench.Measure("forward", 0.5), bench.Measure("step", 0.5, 0.2)
N, V = 32, 96


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.setenv("RLLOSS_BACKEND", "torch")


@pytest.mark.slow
def test_the_program_runs(tmp_path, capsys, monkeypatch):
    measures = [bench.Measure("forward", 1.0), bench.Measure("step", 1.0, 1.0), STEP]
    monkeypatch.setattr(bench, "CASES", [(N, V, torch.float32, measure) for measure in measures])
    bench.main(["--rounds", "2", "--no-compile", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*/token_stats.json")
    found = json.loads(path.read_text())["results"]
    assert [r["measure"]["label"] for r in found] == ["forward", "step, 100% live", "step, 20% live, 50% padding"]
    for result in found:
        ours = result["peers"]["rlloss"]
        assert len(ours["seconds"]) == len(result["copy"]["seconds"]) == 2
        if result["measure"]["kind"] == "step":
            both = [f + b for f, b in zip(ours["forward"], ours["backward"], strict=True)]
            assert ours["seconds"] == both
    assert path.with_suffix(".md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize("measure", [FORWARD, STEP], ids=lambda m: m.label)
def test_those_for_a_gpu_are_right_too(measure, monkeypatch):
    for module in ("trl", "liger_kernel"):
        pytest.importorskip(module)
    monkeypatch.delenv("RLLOSS_BACKEND")
    case = bench.make_case(N, V, torch.float32, measure)
    for peer in peers.peers(compiled=False):
        errors = bench.check(dataclasses.replace(peer, gpu=False), case, measure)
        assert errors and (peer.name != "Liger kernels" or "entropy" not in errors)


def too_large(logits, target, mask):
    logp, entropy = peers.eager(logits, target, mask)
    return 1.001 * logp, entropy


def without_the_mask(logits, target, mask):
    return peers.eager(logits, target, None)


def through_dead_rows(logits, target, mask):
    logp, entropy = peers.eager(logits, target, mask)
    return logp + logits.mean(), entropy


@pytest.mark.parametrize(
    "function, measure, reason",
    [
        (peers.eager, FORWARD, None),
        (peers.eager, STEP, None),
        (too_large, FORWARD, "logp is off"),
        (too_large, STEP, "gradient at the target is off"),
        (without_the_mask, FORWARD, "logp of a masked row is not 0"),
        (through_dead_rows, STEP, "the gradient of a dead row is not 0"),
    ],
)
def test_a_wrong_peer_gets_no_number(function, measure, reason):
    case = bench.make_case(N, V, torch.float32, measure)
    found = bench.examine(peers._peer("x", "", function), case, measure)
    if reason is None:
        assert found["status"] == "measured" and found["peak_bytes"] > 0
        return
    assert set(found) == {"status"} and found["status"].startswith(f"wrong: x: {reason}")
    with pytest.raises(ArithmeticError):  # but an error of rlloss is no result
        bench.examine(peers._peer("rlloss", "", function), case, measure)
