"""The benchmark of the whole loss from logits: its peers are right, and one that is wrong gets no number."""

import dataclasses
import math

import pytest
import torch

from benchmarks import suite
from benchmarks.contenders import loss as loss_peers
from benchmarks.suites import loss as loss_bench


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.setenv("RLLOSS_BACKEND", "torch")


@pytest.fixture(scope="module")
def loss_case():
    return {rho: loss_bench.solve(loss_bench.make_case((4, 8, 300), torch.float32, rho, 0.5)) for rho in (0.2, 1.0)}


class TestTheWholeLoss:
    @pytest.mark.parametrize("rho", [0.2, 1.0])
    def test_the_reference_is_what_autograd_makes_in_fp64(self, loss_case, rho):
        case, expected = loss_case[rho]
        leaf = case.logits.double().requires_grad_()
        loss, entropy = loss_peers._formula(lambda: loss_peers.eager, leaf, case)
        loss.backward()
        torch.testing.assert_close(expected.loss, loss, check_dtype=False)
        torch.testing.assert_close(expected.entropy, entropy, check_dtype=False)
        rows = leaf.grad.flatten(0, 1)
        place = case.target.flatten().unsqueeze(-1)
        p = torch.softmax(case.logits.double().flatten(0, 1), -1).gather(-1, place).squeeze(-1)
        torch.testing.assert_close(
            rows.gather(-1, place).squeeze(-1), expected.coefficient * (1 - p), atol=1e-7, rtol=1e-5
        )

    @pytest.mark.parametrize("factor, reason", [(1.0, None), (1.001, "gradient"), (math.nan, "not 0")])
    def test_a_wrong_peer_gets_no_number(self, loss_case, factor, reason):
        def function(logits, case):
            loss, entropy = loss_peers._formula(lambda: loss_peers.eager, logits, case)
            return factor * loss + (1 - factor) * loss.detach(), entropy

        wrong = loss_peers.LossPeer("wrong", "", function)
        found = loss_bench.examine(wrong, *loss_case[0.2])
        assert found["status"] == "measured" if reason is None else found["status"].startswith("wrong: ")
        assert reason is None or reason in found["status"] and set(found) == {"status"}
        ours = dataclasses.replace(wrong, name="rlloss")
        if reason is not None:
            with pytest.raises(ArithmeticError):
                loss_bench.examine(ours, *loss_case[0.2])
            status = loss_bench.examine(ours, *loss_case[0.2], strict=False)["status"]
            result = {"suite": "loss", "model": None, "dtype": "float32", "rho": 0.2, "fill": 0.5, "kind": "step"}
            bad = suite.failures([result | {"status": "measured", "peers": {"rlloss": {"status": status}}}])
            assert len(bad) == 1 and "rlloss: wrong" in bad[0]  # and the run ends with 1

    def test_a_peer_that_raises_does_not_end_the_run(self, loss_case):
        def function(logits, case):
            raise RuntimeError("no kernel image\nand more")

        found = loss_bench.examine(loss_peers.LossPeer("broken", "", function), *loss_case[1.0], strict=False)
        assert found == {"status": "failed: RuntimeError: no kernel image"}

    @pytest.mark.parametrize("rho", [0.2, 1.0])
    def test_those_for_a_gpu_are_right_too(self, loss_case, rho, monkeypatch):
        for module in ("trl", "liger_kernel"):
            pytest.importorskip(module)
        monkeypatch.delenv("RLLOSS_BACKEND")
        case, expected = loss_case[rho]
        small = dataclasses.replace(
            case, **{name: getattr(case, name)[:, :4].contiguous() for name in ("logits", "target", "mask")}
        )
        small, expected = loss_bench.solve(dataclasses.replace(small, cutoff=None))
        checked = set()
        for peer in loss_peers.loss_peers(compiled=False):
            peer = dataclasses.replace(peer, gpu=False)
            if peer.case(small).rho == rho:
                loss_bench.check(peer, small, expected)
                checked.add(peer.name)
        assert {"rlloss single launch", "rlloss in place", "TRL kernel"} <= checked
        assert ({"Liger", "Liger in place"} <= checked) == (rho == 1.0)

    def test_an_in_place_peer_leaves_the_case_as_it_was(self, loss_case):
        case, _ = loss_case[1.0]
        before = case.logits.clone()
        peer = next(p for p in loss_peers.loss_peers(compiled=False) if p.name == "rlloss in place")
        first, second = peer.step(case).gradient.clone(), peer.step(case).gradient
        assert torch.equal(case.logits, before) and torch.equal(first, second)
        assert second.data_ptr() == case.scratch[peer.name].data_ptr()


def test_a_slow_peer_is_not_timed_but_rlloss_is(loss_case):
    peers = {peer.name: peer for peer in loss_peers.loss_peers(compiled=False)}
    status = {
        name: loss_bench.examine(peers[name], *loss_case[1.0], longest_step=0.0)["status"]
        for name in ("rlloss", "torch eager")
    }
    assert status["rlloss"] == "measured" and status["torch eager"].startswith("not measured: a step takes ")
