"""Test the benchmark suite: its files list measured and missing cells, it judges targets, and it stops at a red test.

No time is checked here.
"""

import importlib
import importlib.util
import json
import math
import re

import pytest
import torch

from benchmarks import run, suite
from benchmarks.harness import readings, shapes, targets, timing
from benchmarks.report import pages, plots
from benchmarks.report import summary as report
from rlloss.lm_head import plans

SMALL_LLAMA = shapes.Llama(B=8, P=4, T=8, D=16, V=64, layers=1, F=24, heads=2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    tiny_models(monkeypatch)


def tiny_models(patch):
    patch.setenv("RLLOSS_BACKEND", "torch")
    patch.setitem(shapes.MODELS, "tiny", (16, 96))
    patch.setitem(shapes.SMALL, "tiny", (16, 96))
    for name in shapes.SMALL_COLUMNS:
        patch.setitem(shapes.SMALL_COLUMNS, name, (4, 8))
    patch.setattr(suite.step, "LLAMA", SMALL_LLAMA)


def file_of(folder, name, body):
    (folder / name).write_text(f"def test_it():\n    assert {body}\n")
    return str(folder / name)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(exit code, folder, reports) of a complete run."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("suite")
    with pytest.MonkeyPatch.context() as patch:
        tiny_models(patch)
        arguments = f"--models tiny --dtypes float32 --rhos 0.2 1 --fills 1 --rounds 3 --no-compile --out {folder}"
        green = file_of(folder, "test_green.py", "True")
        code = run.main([*arguments.split(), "--minutes", "5", "--note", "A test.", "--tests", green])
    (path,) = folder.glob("*/summary.md")
    return code, path.parent, report.load(path.parent)


@pytest.mark.slow
class TestARun:
    def test_the_files_are_written(self, done):
        code, folder, reports = done
        assert code == 0
        names = {f"{name}.json" for name in ("token_pass", "logits", "loss", "hidden", "step")}
        names |= {"summary.md", "step.svg", *(f"{name}-float32.svg" for name in plots.NAMES)}
        assert {path.name for path in folder.iterdir()} == names
        for found in reports.values():
            where = found["conditions"]
            assert {"device", "versions", "commit", "date", "load_after", "tests", "minutes"} <= set(where)
            assert {"torch", "trl", "liger-kernel", "cut-cross-entropy", "driver"} <= set(where["versions"])
            assert "1 passed" in where["tests"]["summary"]

    def test_every_cell_is_measured(self, done):
        results = [r for found in done[2].values() for r in found["results"]]
        assert len(results) == 2 + 3 + 2 + 2 + 2 + 3 + 2
        for r in results:
            assert (r["status"], r["peers"]["rlloss"]["status"], r["dtype"]) == ("measured", "measured", "float32")
            for entry in (*r["peers"].values(), *r["limits"].values()):
                counts = [len(entry[name]) for name in ("forward", "backward", "seconds") if name in entry]
                assert set(counts) == ({3} if entry["status"] == "measured" else set())
        hidden = done[2]["hidden"]["results"]
        assert all((r["D"], r["V"], r["B"], r["T"], r["counted"]) == (16, 96, 4, 8, 32) for r in hidden)
        assert [r["live"] for r in hidden] == [int(r["rho"] * 31) + 1 for r in hidden]
        for r in hidden:
            expected = "measured" if r["rho"] == 1 else "keeps every token: at rho 1 only"
            missing = importlib.util.find_spec("liger_kernel") is None
            assert r["peers"]["Liger"]["status"] == ("liger_kernel is not installed" if missing else expected)
            assert r["peers"]["rlloss"]["plan_name"] in plans.PLANS
            assert readings.speedup(r, "TRL") > 0
            if r["kind"] == "frozen head":
                assert r["limits"] == {} and "rlloss jacobian" in r["peers"]
                continue
            assert readings.over_bare(r) > 0
            assert r["limits"]["bare 1 + 3r"]["units"] == pytest.approx(1 + 3 * r["live"] / 32)

    def test_forward_and_backward_make_both(self, done):
        for found in done[2].values():
            for entry in (e for r in found["results"] for e in r["peers"].values() if "forward" in e):
                both = [f + b for f, b in zip(entry["forward"], entry["backward"], strict=True)]
                assert readings.samples(entry) == both and min(entry["forward"] + entry["backward"]) > 0

    def test_the_summary_says_it(self, done):
        text = (done[1] / "summary.md").read_text()
        assert "**A test.**" in text and "1 passed" in text and "(4 x 8 columns, 32 of them count)" in text
        assert all(f"({name}-float32.svg)" in text for name in plots.NAMES)
        assert "| cut-cross-entropy | needs a GPU |" in text or torch.cuda.is_available()
        assert text.count(", met") + text.count(", missed") == (0 if torch.cuda.is_available() else 1)  # of a step
        assert text.rstrip().endswith("Nothing of what was asked for.")
        for r in done[2]["hidden"]["results"]:
            assert report.milliseconds(readings.median(r["peers"]["naive"])) in text

    def test_the_report_can_be_made_again_of_the_json_alone(self, done, tmp_path):
        for path in done[1].glob("*.json"):
            (tmp_path / path.name).write_text(path.read_text())
        (tmp_path / "memory-float32.svg").touch()
        (tmp_path / "hidden_time-bfloat16.svg").touch()
        report.main([str(tmp_path)])
        for name in ("summary.md", "step.svg", *(f"{name}-float32.svg" for name in plots.NAMES)):
            assert (tmp_path / name).read_text() == (done[1] / name).read_text()
        assert (tmp_path / "memory-float32.svg").exists() and not (tmp_path / "hidden_time-bfloat16.svg").exists()


@pytest.mark.slow
def test_a_red_test_and_there_is_no_number(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "run", lambda *_: pytest.fail("it measured"))
    red = file_of(tmp_path, "test_red.py", "1 == 2")
    assert run.main(["--models", "tiny", "--tests", red, "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()
    found = capsys.readouterr().err
    assert "test_red.py::test_it" in found and "nothing is measured" in found


@pytest.mark.slow
def test_no_time_and_everything_is_not_measured(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run, "run_tests", lambda paths: {"command": "pytest", "summary": "1 passed"})
    arguments = f"--models tiny --dtypes float32 --minutes 0 --no-compile --out {tmp_path}"
    assert run.main(arguments.split()) == 0
    (folder,) = tmp_path.iterdir()
    results = [r for found in report.load(folder).values() for r in found["results"]]
    assert len(results) == 5 + len(shapes.RHOS) * (2 + 3 * len(shapes.FILLS)) + len(shapes.FILLS)
    assert {r["status"] for r in results} == {"not measured: too little of the 0 minutes was left"}
    assert not any("peers" in r or "took_s" in r for r in results) and not list(folder.glob("*.svg"))
    text = (folder / "summary.md").read_text()
    assert " ms" not in text and ", met" not in text and "Nowhere, of what was measured." in text
    assert "- hidden, tiny, float32: rho 0.2 at fill 1;" in text


class TestTime:
    @pytest.fixture
    def clock(self, monkeypatch):
        """A clock that the test advances."""
        now = [0.0]
        monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
        return now

    def samples(self, clock, seconds, *arguments, **options):
        def take():
            clock[0] += seconds
            return (seconds,)

        return timing.in_turns({"a": take, "b": take}, *arguments, **options)

    @pytest.mark.parametrize(
        "limit, warm, expected",
        [(math.inf, True, 30), (0.0, True, 3), (0.0, False, 3), (8.0, False, 4), (9.9, True, 3), (10.0, True, 4)],
    )
    def test_the_rounds_fit_the_limit_and_are_three_at_least(self, clock, limit, warm, expected):
        found = self.samples(clock, 1.0, 30, limit, warm=warm)
        assert {name: len(values) for name, values in found.items()} == {"a": expected, "b": expected}

    @pytest.mark.slow
    def test_cells_share_the_time_and_are_left_out_when_it_is_over(self, clock, monkeypatch):
        limits, taken = [], []

        def hold(contest, rounds, limit, longest_step):
            limits.append(limit)
            clock[0] += 20.0
            if contest.rho == 0.5:
                raise ValueError("no such thing")
            return {"peers": {"rlloss": {"status": "measured", "forward": [1.0] * 5, "backward": [2.0] * 5}}}

        monkeypatch.setattr(suite, "hold", hold)
        monkeypatch.setattr(suite.hidden, "contest", lambda cell, compiled: cell)
        cells = suite.cells(["hidden"], ["tiny"], ["float32"], (0.5, 0.2, 1.0), (1.0, 0.5))
        cells = [cell for cell in cells if cell.kind == "step"]
        results = suite.run(cells, timing.Budget(1.25), 30, done=lambda found: taken.append([dict(r) for r in found]))
        assert [(r["rho"], r["fill"]) for r in results][:3] == [(0.2, 1.0), (1.0, 1.0), (0.5, 1.0)]
        # Of the 20 seconds of a cell 2 * 3 went to samples beyond the third.
        assert limits == pytest.approx([75 / 6, 55 / 5, 35 / 4, 15 / 3])
        statuses = [r["status"] for r in results]
        assert statuses[:4] == ["measured"] * 2 + ["failed: ValueError: no such thing"] * 2
        assert statuses[4:] == ["not measured: too little of the 1.25 minutes was left"] * 2
        assert [sum(r["status"] == "measured" for r in found) for found in taken][:2] == [1, 2]
        failed = "hidden: tiny, float32, step, rho 0.5, fill 1: failed: ValueError: no such thing"
        assert suite.failures(results)[0] == failed

    def test_what_a_run_short_of_time_measures_comes_first(self):
        cells = suite.cells(list(suite.SUITES), ["tiny"], ["bfloat16", "float32"], shapes.RHOS, shapes.FILLS)
        assert len(cells) == len(set(cells)) == 4 + 5 + 10 + 8 + 8 + 4
        of_vocabulary = [cell for cell in cells if cell.suite not in ("token pass", "step")]
        assert [cell.first for cell in of_vocabulary] == [True] * 9 + [False] * 21
        assert [cell.suite == "hidden" for cell in of_vocabulary[9:]] == [False] * 13 + [True] * 8

    def test_further_dtypes_are_measured_at_the_small_head(self):
        cells = suite.cells(["hidden"], ["small", "wide", "tiny"], ["float32", "bfloat16"], (0.2,), (0.5, 1.0))
        assert {(c.model, c.dtype, c.fill) for c in cells} == {
            ("small", "float32", 0.5), ("small", "float32", 1.0), ("small", "bfloat16", 0.5),
            ("small", "bfloat16", 1.0), ("wide", "float32", 1.0), ("tiny", "float32", 0.5), ("tiny", "float32", 1.0),
        }  # fmt: skip
        assert all(cell.first for cell in cells if cell.model == "small")


def test_logits_of_models_with_one_vocabulary_are_measured_once(monkeypatch):
    monkeypatch.setitem(shapes.MODELS, "twin", (24, 96))
    monkeypatch.setitem(shapes.MODELS, "other", (16, 97))
    cells = suite.cells(["logits", "loss", "hidden"], ["tiny", "other", "twin"], ["float32"], [1.0], [1.0])
    assert [(c.suite, c.model) for c in cells if c.kind == "step"] == [
        ("logits", "tiny, twin"), ("loss", "tiny, twin"), ("hidden", "tiny"),
        ("logits", "other"), ("loss", "other"), ("hidden", "other"), ("hidden", "twin"),
    ]  # fmt: skip
    described = [suite.describe(c) for c in cells if c.model != "other" and c.kind == "step"]
    assert [(d["D"], d["V"]) for d in described] == [(None, 96), (None, 96), (16, 96), (24, 96)]


def test_lengths_fill_the_share():
    for B, T in ((8, 16), (16, 512), (2, 32)):
        assert shapes.lengths(B, T, 1.0) == [T] * B
        half = shapes.lengths(B, T, 0.5)
        assert sum(half) == B * T // 2 and half == sorted(half) and max(half) <= T


def cell(what, rho, *, model="Qwen3-8B", kind="step", fill=1.0, dtype="bfloat16", **content):
    B, T = (16, 1024) if what == "token pass" else (16, 512)
    model = None if what == "token pass" else model
    return {
        "suite": what, "model": model, "dtype": dtype, "rho": rho, "fill": fill, "kind": kind, "B": B, "T": T,
        "D": 4096, "V": 151936, "status": "measured", "took_s": 1.0, "limits": {}, **content,
    }  # fmt: skip


def entry(forward, backward=None, peak=None, **content):
    times = {"seconds": forward} if backward is None else {"forward": forward, "backward": backward}
    return {"status": "measured", **times, **({} if peak is None else {"peak_bytes": peak}), **content}


def made_up():
    copy = {"copy": {"bytes": 200, "seconds": [2.0, 2.0, 9.0]}}
    absent = {"status": "needs a GPU"}
    return [
        cell("logits", 1.0, kind="forward", ideal_bytes=95.0, limits=copy, peers={"rlloss": entry([1.0, 1.0, 5.0])}),
        cell("logits", 1.0, limits=copy, ideal_bytes=300.0, peers={
            "rlloss": entry([1.0], [1.0], 10), "torch eager": entry([4.0], [4.0], 30), "Liger": entry([1.0], [1.7], 9),
        }),
        cell("logits", 0.2, ideal_bytes=300.0, peers={"rlloss": entry([0.5], [0.5], 10), "TRL": absent}),
        cell("hidden", 0.2, limits={"bare 1 + 3r": entry([1.0], [1.0]), "bare 1 + 2r": entry([0.9], [0.9])}, peers={
            "rlloss": entry([1.0], [1.2], 40, plan_name="recompute"), "TRL": entry([2.0], [4.0], 81),
            "naive": entry([1.0], [1.19, ], 39), "rlloss keep": entry([0.1], [0.1], 1),
        }),
        cell("hidden", 0.2, fill=0.5, peers={"rlloss": entry([9.0], [9.0], 9, plan_name="keep")}),
        cell("hidden", 1.0, limits={"bare 1 + 2r": entry([1.0], [1.0])}, peers={
            "rlloss": entry([1.0], [1.3], 40, plan_name="gradient_in_forward"), "TRL": entry([1.0], [1.5], 79),
            "naive": entry([9.0], [9.0], 160),
        }),
        cell("hidden", 1.0, kind="frozen head", peers={
            "rlloss": entry([1.0], [1.0], 4), "TRL": entry([1.3], [1.0], 3),
        }),
        cell("token pass", 1.0, dtype="float32", peers={"rlloss": entry([29e-6, 30e-6, 31e-6], [1.0, 1.0, 1.0])}),
    ]  # fmt: skip


class TestTargets:
    EXPECTED = {
        "logits, forward without gradient: share of the copy bandwidth": (0.95, True),
        "logits, forward and backward, rho 1: share of the copy bandwidth": (1.5, True),
        "logits, forward and backward, rho 0.2: share of the copy bandwidth": (None, None),
        "hidden states, rho 0.2: time of rlloss / the bare products of its plan": (1.1, True),
        "hidden states, rho 1: time of rlloss / the bare products of its plan": (1.15, True),
        "hidden states, rho 0.2: time of TRL / rlloss": (6.0 / 2.2, True),
        "hidden states, rho 1: time of TRL / rlloss": (2.5 / 2.3, True),
        "frozen head, rho 1: time of TRL / rlloss": (1.15, False),
        "hidden states, rho 0.2: peak memory of rlloss / plain logits": (40 / 39, False),
        "hidden states, rho 1: peak memory of rlloss / plain logits": (0.25, True),
        "token pass of 16,384 tokens, forward": (30.0, True),
    }

    def test_they_are_judged_by_medians(self):
        judged = {j["what"]: j for j in targets.judge(made_up(), "NVIDIA H100 80GB HBM3")}
        assert set(judged) == set(self.EXPECTED)
        for what, (found, met) in self.EXPECTED.items():
            assert judged[what]["met"] is met, what
            assert judged[what]["found"] == (None if found is None else pytest.approx(found)), what
        words = {what: targets.verdict(j) for what, j in judged.items()}
        assert words["hidden states, rho 1: time of TRL / rlloss"] == "1.09x, met"
        assert words["frozen head, rho 1: time of TRL / rlloss"] == "1.15x, missed"
        assert words["logits, forward and backward, rho 0.2: share of the copy bandwidth"] == "not measured"
        assert words["token pass of 16,384 tokens, forward"] == "30 µs, met"

    def test_they_are_for_one_kind_of_device(self):
        assert targets.judge(made_up(), "NVIDIA A100") == []
        assert targets.judge(made_up(), "Intel(R) Xeon(R) Processor, 2 cores") == []  # of other models

    def test_those_of_a_cpu(self):
        small = {"model": "small", "fill": 0.5, "dtype": "float32"}
        trl = {"TRL": entry([2.0, 5.5, 5.6], [0.0] * 3, 200), "naive": {"status": "out of memory"}}
        results = [
            cell("hidden", 0.2, peers={"rlloss": entry([9.0, 1.0, 1.1], [0.0] * 3, 60)} | trl, **small),
            cell("hidden", 1.0, peers={"rlloss": entry([1.0], [1.0], 60), "TRL": entry([3.0], [2.5], 1)}, **small),
            cell("step", 0.2, peers={"rlloss": entry([1.0], [0.0], 9), "TRL": entry([4.0], [0.0], 9)},
                 model=str(shapes.LLAMA), fill=0.5, dtype="float32"),
        ]  # fmt: skip
        judged = {j["what"]: (j["found"], j["met"]) for j in targets.judge(results, "AMD EPYC, 2 cores")}
        of = "hidden states, small, float32, rho"
        assert judged[f"{of} 0.2: time of TRL / rlloss"] == (pytest.approx(5.0), True)
        assert judged[f"{of} 0.2: time of naive / rlloss"] == (None, None)
        assert judged[f"{of} 1: time of TRL / rlloss"] == (pytest.approx(2.75), False)
        assert judged["an update step: time of TRL / rlloss"] == (4.0, True)
        assert not any("bfloat16" in what for what in judged)

    def test_the_token_pass_is_that_of_as_many_tokens(self):
        results = [cell("token pass", 1.0, peers={"rlloss": entry([1e-6], [1e-6])}) | {"T": 8}]
        assert [j["met"] for j in targets.judge(results, "H200")] == [None]

    def test_every_target_is_in_the_summary(self):
        where = {
            "device": "NVIDIA H200", "threads": 16, "load": None, "versions": {"torch": "2.13.0"}, "commit": "abc",
            "date": "2026-11-24T00:00+00:00", "tests": {"command": "pytest", "summary": "9 passed"},
        }  # fmt: skip
        missing = cell("hidden", 0.5, model="Gemma-3-4B") | {"status": "not measured: too little"}
        results = [r | {"model": "Qwen3-8B, Twin"} if r["suite"] == "logits" else r for r in made_up()]
        reports = {
            name: {"conditions": where, "notes": {"rlloss": "ours"}, "results": own}
            for name in suite.SUITES
            if (own := [r for r in [*results, missing] if r["suite"] == name])
        }
        text = report.summary(reports, [])
        for what, (found, met) in self.EXPECTED.items():
            (row,) = (line for line in text.splitlines() if line.startswith(f"| {what} |"))
            word = "not measured" if found is None else ", met" if met else ", missed"
            assert row.count(word) == (2 if what.startswith("logits") else 1), row
        assert "- hidden, Gemma-3-4B, bfloat16: rho 0.5 at fill 1: not measured: too little" in text
        assert "- logits, Qwen3-8B, Twin, bfloat16, rho 1, fill 1: Liger holds 8.58e-06 MiB, rlloss 9.54e-06" in text


def test_where_a_peer_wins_is_listed():
    found = report.losses(made_up())
    where = "hidden, Qwen3-8B, bfloat16, rho 0.2, fill 1"
    assert len(found) == 4 and "Liger holds" in found[0] and "frozen head" in found[3]
    assert found[1] == f"{where}: naive takes 2190 ms, rlloss 2200 (1.00 times as long)"
    assert found[2] == f"{where}: naive holds 3.72e-05 MiB, rlloss 3.81e-05 MiB"
    theirs = entry([0.9, 1.1, 1.3], [0.0] * 3)
    close = cell("loss", 1.0, peers={"rlloss": entry([1.0, 1.2, 1.4], [0.0] * 3), "x": theirs})
    assert [line.endswith("(1.09 times as long, within the spread)") for line in report.losses([close])] == [True]


def test_a_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    def gone(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(plots.importlib, "import_module", gone)
    with pytest.raises(ModuleNotFoundError, match="bench"):
        plots.draw([], {"device": "x", "commit": "y", "date": "z"}, tmp_path)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--rounds 2", "found 2, expected at least 3"),
        ("--minutes -1", "found -1.0, expected 0 or more"),
        ("--rhos 0 1", "--rhos: found 0, expected above 0"),
        ("--fills 1.5", "--fills: found 1.5"),
        ("--models nobody", "invalid choice"),
    ],
)
def test_bad_options_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit):
        run.parse(arguments.split())
    assert words in capsys.readouterr().err


def test_numbers_stand_on_one_line(tmp_path):
    content = {"a": [1.5, 2e-05, -3], "b": [], "c": ["x", 1], "d": [{"e": [1.0]}]}
    run.save(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == content and "[1.5, 2e-05, -3]" in text and "[1.0]" in text
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"] and not re.search(r"\n\s*1\.5", text)


def test_a_table_names_what_was_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    where = {"device": "a device", "versions": dict.fromkeys(("torch", "trl", "liger-kernel"), "1"), "commit": "abc"}
    peers = {"rlloss": entry([0.2], [0.3], 2**20), "TRL": entry([1.5], [0.5], 2**21), "x": {"status": "wrong: it"}}
    results = [cell("hidden", 0.2, peers=peers), cell("hidden", 1.0) | {"status": "not measured: no time"}]
    run.save(tmp_path / "hidden.json", {"conditions": where | {"date": "2026-11-24T"}, "notes": {}, "results": results})
    columns = {"a": {"rho": 0.2, "model": "Qwen3-8B"}, "b": {"rho": 1.0}, "c": {"rho": 0.5}}
    found = pages.table(
        "", "hidden", {"we": "rlloss", "TRL": "TRL", "x": "x"}, columns, pages.ms, pages.of_trl, pages.peak
    )
    assert found[2:5] == [
        "| we | 500, 0.25 of TRL's, 1 MiB | not measured | not measured |",
        "| TRL | 2000, 2 MiB | not measured | not measured |",
        "| x | wrong | not measured | not measured |",
    ]  # fmt: skip
    assert found[-1] == "*Medians; a device; torch 1, trl 1, liger-kernel 1; commit abc, 2026-11-24.*"
