"""The benchmarks from hidden states and of an update step: they run, they judge right, and a wrong peer gets no number.

No time is checked here.
"""

import importlib
import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.contenders import hidden as linear_peers
from benchmarks.contenders import hidden_case as linear_case
from benchmarks.contenders import limits
from benchmarks.suites import hidden as bench
from rlloss import backends
from rlloss.lm_head import vocab_loop

SHAPE = linear_case.Shape(4, 16, 16, 96)


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.setenv("RLLOSS_BACKEND", "torch")


def solved(rho=0.2, dtype=torch.float32):
    return bench.solved(SHAPE, dtype, rho)


@pytest.fixture(params=["this device", "as on a GPU"])
def device(request, monkeypatch):
    """The program also with what is different on a GPU: TRL leaves padding out, and tiles have other shapes.

    They are made smaller than the sizes here, as the real ones are than real sizes.
    """
    choice, meta = backends.choice, torch.device("meta")
    monkeypatch.setattr(backends, "choice", lambda name, *of: (512, 1 << 19) if name == "tile" else choice(name, *of))
    if request.param == "as on a GPU":
        tile_shape, chunk_rows = vocab_loop.tile_shape, vocab_loop.chunk_rows
        monkeypatch.setattr(
            vocab_loop, "tile_shape", lambda rows, V, _, invariant: tile_shape(rows, V, meta, invariant)
        )
        monkeypatch.setattr(vocab_loop, "chunk_rows", lambda _, V, invariant: chunk_rows(meta, V, invariant))
        monkeypatch.setattr(linear_peers, "trl_compacts", lambda device: True)


@pytest.mark.slow
def test_the_program_runs(device, tmp_path, capsys):
    absent = {peer.name: peer.absent() for peer in linear_peers.peers()}
    arguments = "--rounds 2 --shape 4 16 16 96 --dtypes float32 --rho 0.2 --out".split()
    bench.main([*arguments, str(tmp_path)])
    (text,) = tmp_path.glob("*/linear.md")
    assert text.read_text() in capsys.readouterr().out
    report = json.loads(text.with_suffix(".json").read_text())
    assert [(r["dtype"], r["rho"]) for r in report["results"]] == [("float32", 0.2)]
    for result in report["results"]:
        assert result["live"] == int(result["rho"] * (result["counted"] - 1)) + 1
        r = result["live"] / result["counted"]
        entries = result["peers"] | result["bare"]
        of_trl = 4 * 16
        if not absent["TRL"] and linear_peers.trl_compacts(bench.DEVICE):
            of_trl = result["counted"]
        for name, expected in {
            "rlloss recompute": 1 + 3 * r,
            "rlloss keep": 1 + 2 * r,
            "rlloss gradient_in_forward": 1 + 2 * r,
            "TRL": 4 * of_trl / result["counted"],
            "naive": 3 * 4 * 16 / result["counted"],
            "bare 1 + 3r": 1 + 3 * r,
            "bare 1 + 3r, fresh": 1 + 3 * r,
            "bare 1 + 2r": 1 + 2 * r,
        }.items():
            if absent.get(name):
                assert entries[name]["status"] == absent[name]
                continue
            assert entries[name]["status"] == "measured" and len(entries[name]["seconds"]) == 2
            assert entries[name]["units"] == pytest.approx(expected)
        assert all(entries[name]["peak_bytes"] > 0 for name in ("rlloss", "TRL", "naive") if not absent[name])
    assert report["targets"] == []  # they are for another shape


def test_trl_without_datasets_is_absent(monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it raises, as if it were not installed
    monkeypatch.delitem(sys.modules, "trl.trainer.utils", raising=False)
    (trl,) = (peer for peer in linear_peers.peers() if peer.name == "TRL")
    assert "trl.trainer.utils cannot be loaded" in trl.absent() and "datasets" in trl.absent()


def test_everyone_is_right_in_bf16_with_every_token_kept():
    case, references = solved(1.0, torch.bfloat16)
    errors = {
        peer.name: bench.examine(peer, case, references)["errors"] for peer in linear_peers.peers() if not peer.absent()
    }
    assert errors["rlloss"]["entropy"] < 1e-6 < 1e-4 < errors["naive"]["entropy"]  # its logits are fp32


@pytest.mark.parametrize("rho", [0.2, 1.0])
def test_the_reference_is_what_autograd_makes_in_fp64(rho):
    case, references = solved(rho)
    expected, rows, live, cutoff = references[rho]
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
    """The naive peer, its loss and entropy changed."""
    naive = next(p for p in linear_peers.peers() if p.name == "naive")

    def function(hidden, weight, case):
        return change(*naive.function(hidden, weight, case), hidden, weight, case)

    return replace(naive, name="wrong", function=function)


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
        lambda loss, entropy, hidden, weight, case: linear_peers._naive(hidden, weight, replace(case, rho=1.0)),
        "dead row",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_peer_gets_no_number(what, monkeypatch):
    change, reason = WRONG[what]
    wrong = naive_but(change)
    case, references = solved()
    entry = bench.examine(wrong, case, references)
    if reason is None:
        assert entry["status"] == "measured"
        return
    assert entry["status"].startswith("wrong: ") and reason in entry["status"] and set(entry) == {"status"}
    with pytest.raises(ArithmeticError):  # but an error of rlloss is no result
        bench.examine(replace(wrong, plan="auto"), case, references)


def test_a_wrong_or_missing_peer_is_not_timed():
    wrong, missing = naive_but(WRONG["another loss"][0]), replace(linear_peers.peers()[-2], module="no_such_module")
    ours = linear_peers.peers()[0]
    result = bench.compare(SHAPE, torch.float32, 0.2, [ours, wrong, missing], 2)
    assert [len(result["peers"][name]["seconds"]) for name in ("rlloss", "wrong", missing.name)] == [2, 0, 0]
    row = bench._row("wrong", result["peers"]["wrong"], 0.2)
    assert "loss is off" in row and " ms" not in row
    assert result["peers"][missing.name]["status"] == "no_such_module is not installed"


def test_one_that_cannot_select_is_checked_with_every_token_kept():
    case, references = solved()
    keeps_all = replace(next(p for p in linear_peers.peers() if p.name == "naive"), ignores_rho=True)
    entry = bench.examine(keeps_all, case, references)
    assert (entry["status"], entry["rho"]) == ("measured", 1.0)


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("again, gradients", [(True, 3), (False, 2)])
def test_the_bare_products_are_as_many(tiled, again, gradients, fresh):
    case, _ = solved()
    with limits.Flop() as counted:
        gradient = limits.bare_products(case, again=again, tiled=tiled, fresh=fresh)()()
    assert gradient.shape == case.weight.shape
    assert counted.flop == 2 * 16 * 96 * (case.counted + gradients * case.live)


def made_up(dtype, rho, shape=bench.SHAPE_A, **seconds):
    peers = {name: {"seconds": values, "peak_bytes": 100 * len(name)} for name, values in seconds.items()}
    bare = {"bare 1 + 3r": {"seconds": [1.0, 1.0]}, "bare 1 + 3r, fresh": {"seconds": [1.7, 1.7]}}
    return {"shape": shape._asdict(), "dtype": dtype, "rho": rho, "peers": peers, "bare": bare}


def test_the_targets_are_judged_by_medians():
    judged = bench.judge(
        [
            made_up("float32", 0.2, rlloss=[9.0, 1.0, 1.1], TRL=[5.6, 5.5, 0.1], naive=[]),
            made_up("float32", 1.0, rlloss=[1.0], TRL=[2.7], **{"rlloss recompute": [1.19]}),
            made_up("float32", 1.0, shape=SHAPE, rlloss=[1.0], TRL=[9.0]),
        ]
    )
    found = {(j["dtype"], j["rho"], j["what"], j["of"]): (j["found"], j["met"]) for j in judged}
    assert found["float32", 0.2, "seconds", "TRL"] == (pytest.approx(1.1 / 5.5), True)
    assert found["float32", 0.2, "seconds", "naive"] == (None, None)
    assert found["float32", 0.2, "peak_bytes", "naive"] == (pytest.approx(6 / 5), False)
    assert found["float32", 1.0, "seconds", "TRL"] == (pytest.approx(1 / 2.7), False)
    assert found["float32", 1.0, "seconds", "bare 1 + 3r"] == (pytest.approx(1.19), True)
    assert found["float32", 1.0, "seconds", "bare 1 + 3r, fresh"] == (pytest.approx(0.7), True)
    assert len(judged) == 10 and not any(j["dtype"] == "bfloat16" for j in judged)
    lines = bench._judged_lines(judged)
    assert "| float32, rho 0.2 | time of rlloss / TRL | 1/5 | 1/5 | met |" in lines
    assert "| float32, rho 1 | time of rlloss / TRL | 1/2.7 | 1/2.8 | missed |" in lines
    assert "| float32, rho 0.2 | time of rlloss / naive | no number | 1/2.7 | not measured |" in lines


@pytest.fixture(scope="module")
def step():
    pytest.importorskip("trl")
    return importlib.import_module("benchmarks.suites.step")


@pytest.mark.slow
class TestStep:
    @pytest.mark.parametrize("beta", ["0", "0.04"])
    def test_the_program_runs(self, step, tmp_path, beta):
        size = "--B 8 --P 4 --T 8 --D 16 --V 64 --layers 1 --F 24 --heads 2".split()
        report = step.main(["--rounds", "2", *size, "--beta", beta, "--name", "small", "--out", str(tmp_path)])
        (text,) = tmp_path.glob("*/small.md")
        assert json.loads(text.with_suffix(".json").read_text())["result"]["size"]["V"] == 64
        found = report["result"]["contenders"]
        for name in ("TRL", "rlloss keep", "rlloss forward_only"):
            assert found[name]["status"] == "measured" and len(found[name]["seconds"]) == 2
        units = found["rlloss forward_only"]["units"]
        assert units == pytest.approx(4.0) if beta != "0" else units < 3.0  # with a KL every token is live
        assert found["rlloss drop"]["status"].startswith("refused: ") and not found["rlloss drop"]["seconds"]
        assert 0 < report["result"]["with_signal"] < report["result"]["counted"]

    def test_the_target_is_for_the_default_mode(self, step):
        def entry(*seconds):
            return {"seconds": list(seconds)}

        found = {"TRL": entry(4.0, 4.0, 9.0), "rlloss keep": entry(3.0), "rlloss forward_only": entry(1.0)}
        assert step.judge(found) == {
            "ratios": {"TRL": 1.0, "rlloss keep": 0.75, "rlloss forward_only": 0.25}, "target": 0.25, "met": True
        }  # fmt: skip
        assert step.judge(found | {"rlloss forward_only": entry(1.01)})["met"] is False
        assert step.judge(found | {"rlloss forward_only": entry()})["met"] is None
        assert step.judge({"TRL": entry()})["ratios"] == {}

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
            assert max(step.check(expected._replace(**change), expected).values()) == 0.0
            return
        with pytest.raises(ArithmeticError, match=reason):
            step.check(expected._replace(**change), expected)
