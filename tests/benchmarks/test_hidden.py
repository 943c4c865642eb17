"""Test the benchmarks from hidden states and of an update step: they run, and do not time a wrong contender.

No time is checked here.
"""

import functools
import importlib
import math
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.contenders import hidden as contenders
from benchmarks.contenders import limits
from benchmarks.contenders.hidden_case import Shape, make_case, solve
from benchmarks.harness import shapes
from benchmarks.harness.contest import Contest, entrant, examine, hold
from benchmarks.suites import hidden as bench
from rlloss import backends
from rlloss.lm_head import vocab_loop

SHAPE = Shape(4, 16, 16, 96)


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.setenv("RLLOSS_BACKEND", "torch")
    monkeypatch.setitem(shapes.SMALL, "tiny", SHAPE[2:])
    monkeypatch.setitem(shapes.MODELS, "tiny", SHAPE[2:])
    monkeypatch.setitem(shapes.SMALL_COLUMNS, "hidden", SHAPE[:2])


@functools.cache
def solved(rho=0.2, dtype=torch.float32):
    case = make_case(SHAPE, dtype, rho, torch.device("cpu"))
    expected = solve(case)
    return replace(case, cutoff=expected.cutoff), expected


def entered(peer, case, expected):
    return entrant(peer, case, functools.partial(bench.check, peer, case, expected))


@pytest.fixture(params=["this device", "as on a GPU"])
def device(request, monkeypatch):
    """Run the suite also as on a GPU, where TRL leaves padding out and tiles have other shapes.

    The tiles are made smaller than the sizes of this test, as real tiles are smaller than real sizes.
    """
    choice, meta = backends.choice, torch.device("meta")
    monkeypatch.setattr(backends, "choice", lambda name, *of: (512, 1 << 19) if name == "tile" else choice(name, *of))
    if request.param == "as on a GPU":
        tile_shape, chunk_rows = vocab_loop.tile_shape, vocab_loop.chunk_rows
        monkeypatch.setattr(
            vocab_loop, "tile_shape", lambda rows, V, _, invariant: tile_shape(rows, V, meta, invariant)
        )
        monkeypatch.setattr(vocab_loop, "chunk_rows", lambda _, V, invariant: chunk_rows(meta, V, invariant))
        monkeypatch.setattr(contenders, "trl_compacts", lambda device: True)


def test_the_products_are_those_expected(device):
    absent = {peer.name: peer.absent() for peer in contenders.peers()}
    result = hold(bench.contest(shapes.Cell("hidden", "tiny", "float32", 0.2, 0.5), False), 2)
    assert result["live"] == int(0.2 * (result["counted"] - 1)) + 1
    r = result["live"] / result["counted"]
    entries = result["peers"] | result["limits"]
    of_trl = result["counted"] if not absent["TRL"] and contenders.trl_compacts(torch.device("cpu")) else 4 * 16
    for name, expected in {
        "rlloss recompute": 1 + 3 * r,
        "rlloss keep": 1 + 2 * r,
        "rlloss gradient_in_forward": 1 + 2 * r,
        "TRL": 4 * of_trl / result["counted"],
        "naive": 3 * 4 * 16 / result["counted"],
        "bare 1 + 3r": 1 + 3 * r,
        "bare 1 + 2r": 1 + 2 * r,
    }.items():
        if absent.get(name):
            assert entries[name]["status"] == absent[name]
        elif entries[name]["status"] == "is what rlloss takes":
            assert entries["rlloss"]["units"] == pytest.approx(expected)
        else:
            assert entries[name]["status"] == "measured" and len(entries[name]["backward"]) == 2
            assert entries[name]["units"] == pytest.approx(expected)
    assert all(entries[name]["peak_bytes"] > 0 for name in ("rlloss", "TRL", "naive") if not absent.get(name))


def test_the_products_of_a_frozen_head(device):
    result = hold(bench.contest(shapes.Cell("hidden", "tiny", "float32", 0.2, 1.0, "frozen head"), False), 2)
    r = result["live"] / result["counted"]
    expected = {"rlloss recompute": 1 + 2 * r, "rlloss keep": 1 + r, "rlloss jacobian": 2.0, "naive": 2.0, "TRL": 3.0}
    for name, units in expected.items():
        entry = result["peers"][name]
        entry = result["peers"]["rlloss"] if entry["status"] == "is what rlloss takes" else entry
        if entry["status"] == "measured":
            assert entry["units"] == pytest.approx(units)
        else:
            assert name == "TRL" and entry["status"].startswith("absent")
    assert result["limits"] == {}


def test_trl_without_datasets_is_absent(monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it raises, as if it were not installed
    monkeypatch.delitem(sys.modules, "trl.trainer.utils", raising=False)
    (trl,) = (peer for peer in contenders.peers() if peer.name == "TRL")
    assert "trl.trainer.utils cannot be loaded" in trl.absent() and "datasets" in trl.absent()


def test_everyone_is_right_in_bf16_with_every_token_kept():
    case, expected = solved(1.0, torch.bfloat16)
    errors = {
        peer.name: examine(entered(peer, case, expected))["errors"] for peer in contenders.peers() if not peer.absent()
    }
    assert errors["rlloss"]["entropy"] < 1e-6 < 1e-4 < errors["naive"]["entropy"]  # its logits are fp32


@pytest.mark.parametrize("rho", [0.2, 1.0])
def test_the_reference_is_what_autograd_makes_in_fp64(rho):
    case, (expected, rows, live, cutoff) = solved(rho)
    h, W = (x.double().requires_grad_() for x in (case.hidden, case.weight))
    log_p = torch.log_softmax(h @ W.T, -1)
    entropy = torch.distributions.Categorical(logits=log_p.detach()).entropy()
    kept = case.mask if rho == 1.0 else case.mask & (entropy > cutoff)
    assert torch.equal(kept.flatten(), live) and int(kept.sum()) == case.live
    logp = log_p.gather(-1, case.target.unsqueeze(-1)).squeeze(-1)
    loss = -(torch.exp(logp - logp.detach()) * case.advantage.unsqueeze(-1))[kept].sum() / case.mask.sum()
    loss.backward()
    for found, reference in ((expected.loss, loss), (expected.hidden, h.grad), (expected.weight, W.grad[rows])):
        torch.testing.assert_close(found, reference, check_dtype=False)
    torch.testing.assert_close(expected.entropy, entropy[case.mask].mean())


def naive_but(change):
    """The naive peer with its loss and entropy changed."""

    def function(hidden, weight, case):
        return change(*contenders._naive(hidden, weight, case), hidden, weight, case)

    return contenders._peer("wrong", "", function)


WRONG = {
    "nothing": (lambda loss, entropy, *_: (loss, entropy), None),
    "another loss": (lambda loss, entropy, *_: (loss + 1e-3, entropy), "loss"),
    "another entropy": (lambda loss, entropy, *_: (loss, entropy * 1.001), "entropy"),
    "a NaN": (lambda loss, entropy, *_: (loss * math.nan, entropy), "not 0"),
    "a gradient 0.1 % too large": (
        lambda loss, entropy, *_: (1.001 * loss - 0.001 * loss.detach(), entropy), "gradient of hidden"
    ),
    "only the weight's gradient off": (
        lambda loss, entropy, hidden, weight, case: (loss + ((weight - weight.detach()) * 1e-4).sum(), entropy),
        "gradient of weight",
    ),
    "every token kept": (
        lambda loss, entropy, hidden, weight, case: contenders._naive(hidden, weight, replace(case, rho=1.0)),
        "dead row",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_peer_gets_no_number(what):
    change, reason = WRONG[what]
    entry = examine(entered(naive_but(change), *solved()))
    if reason is None:
        assert entry["status"] == "measured"
    else:
        assert entry["status"].startswith("wrong: ") and reason in entry["status"] and set(entry) == {"status"}


def test_who_is_wrong_or_missing_or_cannot_select_is_not_timed():
    wrong = naive_but(WRONG["another loss"][0])
    right = next(p for p in contenders.peers() if p.name == "naive")
    peers = [
        contenders.peers()[0], wrong, replace(right, name="missing", module="no_such_module"),
        replace(right, name="keeps all", ignores_rho=True),
    ]  # fmt: skip
    found = hold(Contest([entered(peer, *solved()) for peer in peers]), 2)["peers"]
    assert [len(found[peer.name].get("forward", [])) for peer in peers] == [2, 0, 0, 0]
    assert "loss is off" in found["wrong"]["status"]
    assert found["missing"]["status"] == "no_such_module is not installed"
    assert found["keeps all"]["status"] == "keeps every token: at rho 1 only"


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("again, gradients", [(True, 3), (False, 2)])
def test_the_bare_products_are_as_many(tiled, again, gradients):
    case, _ = solved()
    with limits.Flop() as counted:
        gradient = limits.bare_products(case, again=again, tiled=tiled)()()
    assert gradient.shape == case.weight.shape
    assert counted.flop == 2 * 16 * 96 * (case.counted + gradients * case.live)


@pytest.fixture(scope="module")
def step():
    pytest.importorskip("trl")
    return importlib.import_module("benchmarks.suites.step")


@pytest.mark.slow
class TestStep:
    @pytest.mark.parametrize("rho", [0.2, 1.0])
    def test_the_contest_of_an_adapter_runs(self, step, monkeypatch, rho):
        pytest.importorskip("peft")
        monkeypatch.setattr(step, "LLAMA", shapes.Llama(B=8, P=4, T=8, D=16, V=64, layers=1, F=24, heads=2))
        result = hold(step.contest(shapes.Cell("step", "Llama", "float32", rho, 0.5, "LoRA"), False), 2)
        assert {entry["status"] for entry in result["peers"].values()} == {"measured"} and result["limits"] == {}
        # TRL's own trainer does not say which tokens it will keep.
        assert result["peers"]["TRL, patch_trl()"]["units"] == 2.0
        units = result["peers"]["rlloss keep"]["units"]
        assert units == 2.0 if rho == 1.0 else 1.0 < units <= 1.6

    @pytest.mark.parametrize("kind", ["step", "beta 0.04"])
    def test_the_contest_runs(self, step, monkeypatch, kind):
        monkeypatch.setattr(step, "LLAMA", shapes.Llama(B=8, P=4, T=8, D=16, V=64, layers=1, F=24, heads=2))
        result = hold(step.contest(shapes.Cell("step", "Llama", "float32", 0.2, 0.5, kind), False), 2)
        for name in ("TRL", "TRL, patch_trl()", "rlloss keep", "rlloss"):
            assert result["peers"][name]["status"] == "measured" and len(result["peers"][name]["backward"]) == 2
        units = result["peers"]["rlloss"]["units"]
        assert units < 3.0 if kind == "step" else units == pytest.approx(3.0)  # with a KL every token is live
        drop = result["peers"]["rlloss drop"]
        assert drop["status"].startswith("refused: ") and set(drop) == {"status"}
        assert set(result["limits"]) == set(step.PARTS) and (result["B"], result["V"]) == (8, 64)
        assert 0 < result["with_signal"] < result["counted"]

    @pytest.mark.parametrize(
        "change, reason",
        [
            ({}, None),
            ({"loss": torch.tensor(2.001)}, "loss is off"),
            ({"gradients": {"w": torch.tensor([3.0, 4.001])}}, "gradient is off"),
            ({"gradients": {"w": None}}, "gradient of w"),
            ({"gradients": {"w": torch.tensor([3.0, math.nan])}}, "gradient is off"),
            ({"metrics": {"entropy": 1.0}}, "no clip_ratio"),
            ({"metrics": {"entropy": 1.001, "clip_ratio": math.nan}}, "metric is off"),
            ({"metrics": {"entropy": 1.0, "clip_ratio": 0.0}}, "metric is off"),
            ({"metrics": {"entropy": 1.0, "clip_ratio": math.nan, "live_share": 0.5}}, None),
        ],
    )
    def test_a_step_that_differs_gets_no_number(self, step, change, reason):
        expected = step.Result(
            torch.tensor(2.0), {"w": torch.tensor([3.0, 4.0])}, {"entropy": 1.0, "clip_ratio": math.nan}
        )
        if reason is None:
            assert max(step.compare(expected._replace(**change), expected).values()) == 0.0
            return
        with pytest.raises(ArithmeticError, match=reason):
            step.compare(expected._replace(**change), expected)
