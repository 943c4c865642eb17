"""Test the page of a run: it has the logged data with right counts, and logged texts stay plain text."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlloss.cli import main
from rlloss.integrations.transformers.token_log import MetricsLog, TokenLog
from rlloss.integrations.trl.demo.task import make_tokenizer
from rlloss.losses.token_states import TokenState
from rlloss.report.run_log import count, read_run
from rlloss.report.run_report import EDGES, MAX_POINTS, STATES, write_run_report
from tests.support.run_pages import HOSTILE, Page, completion, make_run, page_of


def test_what_was_written_is_on_the_page(tmp_path):
    tokenizer = make_tokenizer()
    log, metrics = TokenLog(tmp_path, tokenizer), MetricsLog(tmp_path)
    ids = torch.tensor([tokenizer.encode("<a>42</a>") + [tokenizer.eos_token_id]] * 2)
    g = torch.Generator().manual_seed(0)
    entropy = torch.rand(ids.shape, generator=g) * 3
    states = torch.randint(0, len(TokenState), ids.shape, generator=g).to(torch.int8)
    log.write(7, ids[:, :3], ids, torch.ones_like(ids, dtype=torch.bool), entropy, states, torch.tensor([0.5, -0.5]),
              {"right": torch.tensor([1.0, math.nan])})  # fmt: skip
    control = SimpleNamespace(is_world_process_zero=True, global_step=7)
    metrics.on_log(None, control, None, logs={"entropy": 0.25, "kl": math.nan})

    page = page_of(tmp_path)
    first, second = page.completions()
    assert first["tokens"] == [*"<a>42</a>", "<eos>"] and first["prompt"] == "<a>" and first["step"] == 7
    assert torch.tensor([first["entropy"], second["entropy"]]).sub(entropy).abs().max() < 1.6e-4
    assert [first["state"], second["state"]] == ["".join(TokenState(s).letter for s in row) for row in states.tolist()]
    assert first["advantage"] == 0.5 and first["rewards"] == {"right": 1.0} and second["rewards"] == {"right": None}
    assert [line for chart in page.data["lines"] for line in chart] == [["entropy", [7], [0.25]], ["kl", [7], [None]]]


def test_the_letters_are_those_of_the_states():
    names = {state.letter: state.name.lower().replace("off_policy", "off-policy") for state in TokenState}
    assert {letter: name for letter, (name, _) in STATES.items()} == names
    assert {state.letter for state in TokenState if state.is_live} == set("lp")


def test_every_text_stays_text(tmp_path):
    name = "<b>run & 'co'</b>"
    lines = [completion(HOSTILE, step=k, prompt=text, rewards={text: 1.0}) for k, text in enumerate(HOSTILE)]
    run = make_run(tmp_path / name.replace("/", ""), lines, [{"step": 1, text: 1.0} for text in HOSTILE if text])
    page = page_of(run)
    assert len(page.find("script")) == 2 and not page.find("img")
    data = "".join(page.text["script"][:1])
    assert data.isascii() and "<" not in data
    assert page.text["h1"] == [run.name] and page.text["title"] == [f"rlloss: {run.name}"]
    assert [line["tokens"] for line in page.completions()] == [list(HOSTILE)] * len(HOSTILE)
    assert [line["prompt"] for line in page.completions()] == list(HOSTILE)
    assert sorted(page.data["rewards"]) == sorted(text.replace("\ud800", "\\ud800") for text in HOSTILE)


def test_nothing_is_fetched(tmp_path):
    page = page_of(make_run(tmp_path, [completion()], [{"step": 1, "entropy": 1.0}]))
    assert not re.search(r"https?:|@import|url\(|\beval\(|new Function|innerHTML", page.source)
    for tag, attrs in page.elements:
        assert tag not in {"link", "img", "iframe", "base"} and not {"src", "href", "action"} & attrs.keys(), tag
    policy = page.find("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'")


def test_tokens_are_counted_by_hand(tmp_path):
    lines = [
        completion("aabb", entropy=[1.0, 2.0, 0.0, None], state="ldpm"),
        completion("aab", entropy=[3.0, 0.5, 0.25], state="mev"),
        completion("bc", entropy=[0.25, 9.0], state="lc"),
    ]
    run = read_run(make_run(tmp_path, lines))
    counts = count(run, top=10)
    a, b, c = (run.texts[text] for text in "abc")
    assert counts.at_least == 3
    assert [row[:2] for row in counts.rows] == [(a, 3), (b, 3)]
    assert counts.rows[0][2:] == pytest.approx(((1.0 + 2.0 + 0.5) / 3, 1 / 3))
    assert counts.rows[1][2:] == pytest.approx(((0.0 + 0.25 + 0.25) / 3, 2 / 3))
    assert counts.states == {"l": 2, "d": 1, "p": 1, "m": 2, "e": 1, "v": 1, "c": 1}
    assert counts.tokens == 7 and counts.live == 3
    assert counts.mean == (1.0 + 2.0 + 0.0 + 0.5 + 0.25 + 0.25 + 9.0) / 7
    assert [counts.quantile(share) for share in (0.0, 0.5, 0.8, 1.0)] == [0.0, 0.5, 2.0, 9.0]
    assert run.completions[0].tokens[0] == a and c == 2


def test_the_page_states_the_counts(tmp_path):
    lines = [completion("aabb", entropy=[0.005, 0.3, 0.3, None], state="ldem", step=s) for s in (3, 9)]
    page = page_of(make_run(tmp_path, lines))
    assert page.text["dd"] == ["3 to 9", "2", "6", "0.202 nats", "0.3 nats", "33.3 %"]
    shares = dict(zip(("", *(f"{edge:g}" for edge in EDGES)), page.text["span"][: len(EDGES) + 1], strict=True))
    assert shares[""] == "33.3 %" and shares["0.25"] == "66.7 %" and set(shares.values()) == {"33.3 %", "66.7 %", "0 %"}
    assert [a["data-only"] for a in page.find("button") if "data-only" in a] == ["l", "e", "d", "m"]
    mean, live = page.data["completions"][0][4:6]
    assert mean == pytest.approx(0.605 / 3, abs=1e-4) and live == pytest.approx(1 / 3, abs=1e-4)


def test_an_advantage_per_token_is_summed_up(tmp_path):
    page = page_of(make_run(tmp_path, [completion(advantage=[1.0, None, 2.0]), completion(advantage=[None])]))
    assert [line["advantage"] for line in page.completions()] == [[1.5, 1.0, 2.0], None]


def test_more_completions_than_fit_are_thinned_and_counted_all(tmp_path):
    page = page_of(make_run(tmp_path, [completion(step=s) for s in range(100)]), max_completions=10)
    assert [line["step"] for line in page.completions()] == [*range(0, 100, 10)]
    assert page.text["dd"][:3] == ["0 to 99", "100", "200"]
    assert any("10 of 100 completions are on this page" in text for text in page.text["p"])
    with pytest.raises(ValueError, match="max_completions: found 0"):
        write_run_report(tmp_path, max_completions=0)
    for name, wrong in (("run_dir", None), ("run_dir", 3), ("output", 3), ("max_completions", "9")):
        with pytest.raises(TypeError, match=f"{name}: found (NoneType|int|str), expected "):
            write_run_report(**{"run_dir": tmp_path, name: wrong})


def test_more_texts_than_16_bits_can_tell_apart(tmp_path):
    tokens = [f"t{i}" for i in range(66_000)]
    page = page_of(make_run(tmp_path, [completion(tokens)]))
    assert page.data["wide"] and page.completions()[0]["tokens"] == tokens


def test_processes_are_merged_by_step(tmp_path):
    files = {f"p{p}.jsonl": [completion([str(p)], step=s) for s in (1, 2)] for p in (1, 0)}
    found = page_of(make_run(tmp_path, files)).completions()
    assert [(line["step"], line["tokens"]) for line in found] == [(1, ["0"]), (1, ["1"]), (2, ["0"]), (2, ["1"])]


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    steps = [(1, "a"), (2, "a"), (2, "a"), (3, "a"), (2, "b"), (3, "b"), (3, "b")]
    metrics = [{"step": s, "x": v} for s, v in [(1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0)]] + [{"step": 2, "y": 5.0}]
    page = page_of(make_run(tmp_path, [completion([t], step=s) for s, t in steps], metrics))
    found = [(line["step"], line["tokens"][0]) for line in page.completions()]
    assert found == [(1, "a"), (2, "b"), (3, "b"), (3, "b")]
    assert page.data["lines"] == [[["x", [1, 2], [1.0, 20.0]]], [["y", [2], [5.0]]]]


@pytest.mark.parametrize("steps, kept", [
    # Lines of the first process, of the second, and the result. Each letter is one session of the first process.
    (["a0 a1 a2 a3 b2 b3", "a0 a1 a2 a3"], "a0 a0 a1 a1 b2 b3"),
    (["a0 a1 a2 a3 b2 b3", "b2 b3"], "a0 a1 b2 b2 b3 b3"),  # it came with the resumption
    (["a1 a2 a3 b2 b3 c0", "a1 a2 a3 b2 b3"], "c0"),
    (["a0 a1 b0 b1", "b0 b1"], "b0 b0 b1 b1"),  # of either run, by its steps: kept
    (["a0 a1 a2 a3 b2", ""], "a0 a1 b2"),
])  # fmt: skip
def test_processes_that_were_not_resumed_with_the_first(tmp_path, steps, kept):
    files = {
        f"process-{n:05d}.jsonl": [completion([text[0]], step=int(text[1])) for text in of_process.split()]
        for n, of_process in enumerate(steps)
    }
    found = page_of(make_run(tmp_path, files)).completions()
    assert sorted(f"{line['tokens'][0]}{line['step']}" for line in found) == sorted(kept.split())


def test_what_is_no_file_is_left_out_and_named(tmp_path):
    run = make_run(tmp_path, [GOOD])
    (run / "tokens" / "a.jsonl").mkdir()
    (run / "tokens" / "b.jsonl").symlink_to(run / "nowhere")
    os.mkfifo(run / "tokens" / "c.jsonl")
    (run / "tokens" / "d.jsonl").symlink_to("d.jsonl")
    (run / "metrics.jsonl").mkdir()
    (run / "tokens" / "e.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\xff\xfe\n" + b"\0" * 9)
    page = page_of(run)
    assert len(page.completions()) == 2
    noted = (
        "Left out as not readable: a.jsonl (a directory), b.jsonl (a link to nothing), c.jsonl (not a file), "
        "d.jsonl (a link to nothing), e.jsonl:2 and 2 more."
    )
    assert noted in page.text["p"]


def test_a_file_that_may_not_be_read_is_left_out_and_named(tmp_path, monkeypatch):
    run, opened = make_run(tmp_path, {"a.jsonl": [GOOD], "b.jsonl": [GOOD]}), Path.open

    def refused(path, *args, **kwargs):
        if path.name == "a.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    found = read_run(run)
    assert len(found.completions) == 1 and found.unreadable == ["a.jsonl (Permission denied)"]


GOOD = completion()


@pytest.mark.parametrize("bad", [
    '{"step": 2, "prompt": "torn',
    "[]",
    "7",
    {**GOOD, "step": "1"},
    {**GOOD, "step": True},
    {**GOOD, "step": -1},
    {**GOOD, "prompt": None},
    {**GOOD, "tokens": ["a"]},
    {**GOOD, "tokens": ["a", 3]},
    {**GOOD, "entropy": [0.5, "x"]},
    {**GOOD, "entropy": [0.5, math.nan]},
    {**GOOD, "state": "l😀"},
    {**GOOD, "advantage": "x"},
    {**GOOD, "advantage": 10**400},
    {**GOOD, "rewards": [1.0]},
    {key: value for key, value in GOOD.items() if key != "state"},
    "[" * 100_000,
], ids=str)  # fmt: skip
def test_a_line_that_does_not_fit_is_left_out_and_named(tmp_path, bad):
    page = page_of(make_run(tmp_path, [GOOD, bad, GOOD]))
    assert len(page.completions()) == 2
    assert "Left out as not readable: process-00000.jsonl:2." in page.text["p"]


def test_metrics_are_drawn_by_kind_and_none_is_lost(tmp_path):
    known = ["entropy", "entropy/p50", "entropy/p80", "entropy/cutoff", "rlloss/live_share", "clip_ratio/low_mean",
             "reward", "rewards/right/mean", "rewards/right/std", "kl", "loss", "cov/logp_advantage"]  # fmt: skip
    metrics = [{"step": s, **dict.fromkeys([*known, "step_time", "eval_loss"], s / 2)} for s in (1, 2, 4)]
    page = page_of(make_run(tmp_path, metrics=metrics))
    drawn = [[line[0] for line in chart] for chart in page.data["lines"]]
    assert drawn[0] == ["entropy", "entropy/p50", "entropy/p80", "entropy/cutoff"]
    assert drawn[-2:] == [["eval_loss"], ["step_time"]] and "2 more metrics" in page.text["summary"]
    assert sorted(name for chart in drawn for name in chart) == sorted([*known, "step_time", "eval_loss"])
    assert all(line[1:] == [[1, 2, 4], [0.5, 1.0, 2.0]] for chart in page.data["lines"] for line in chart)
    assert any("This run has no tokens/*.jsonl. token_log_steps=20" in text for text in page.text["p"])


def test_a_chart_with_many_lines_is_split(tmp_path):
    page = page_of(make_run(tmp_path, metrics=[{"step": 1, **{f"cov/logp_advantage/{k}": 1.0 for k in range(8)}}]))
    assert [len(chart) for chart in page.data["lines"]] == [6, 2]


def test_gaps_and_numbers_that_cannot_be_drawn(tmp_path):
    values = [1.0, None, math.inf, 1e300, -3.0]
    page = page_of(make_run(tmp_path, metrics=[{"step": s, "loss": v} for s, v in enumerate(values)]))
    assert page.data["lines"] == [[["loss", [0, 1, 2, 3, 4], [1.0, None, None, None, -3.0]]]]
    assert page.find("path", **{"class": "raw arm0 line0"})[0]["d"].count("M") == 2


def test_long_runs_are_drawn_by_means(tmp_path):
    n = 3 * MAX_POINTS
    page = page_of(make_run(tmp_path, metrics=[{"step": s, "loss": float(s % 3)} for s in range(n)]))
    [[[_, steps, values]]] = page.data["lines"]
    assert steps == [*range(1, n, 3)] and values == [1.0] * MAX_POINTS


def hint(tmp_path, kind):
    """A folder in which there is no run."""
    run = tmp_path / "run"
    if kind == "file":
        run.write_text("")
    if kind not in ("file", "absent"):
        run.mkdir()
    if kind == "other":
        (run / "config.json").write_text("{}")
    if kind == "no history":
        (run / "trainer_state.json").write_text("[]")
    if kind == "no files":
        (run / "tokens").mkdir()
    if kind == "no lines":
        make_run(run, [], [])
    if kind == "bad lines":
        make_run(run, ["{", "{"])
    return run


@pytest.mark.parametrize("kind, message", [
    ("absent", "found no '.*run', expected the folder of a run, with tokens/"),
    ("file", "found a file, '.*run', expected the folder of a run"),
    ("empty", "found nothing in '.*run', expected .*token_log_steps=20 in GRPOConfig writes the tokens"),
    ("no history", "found no completion and no metric"),
    ("other", "found only config.json in '.*run', expected"),
    ("no files", "found tokens/ without a .jsonl file in '.*run', expected"),
    ("no lines", "found no completion and no metric in the files of '.*run', expected"),
    ("bad lines", r"found no .* in the files of '.*run' \(not readable: process-00000.jsonl:1, .*:2\), expected"),
])  # fmt: skip
def test_the_command_says_in_a_line_what_is_no_run(tmp_path, capsys, kind, message):
    run = hint(tmp_path, kind)
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert re.match("rlloss report: error: run_dir: " + message, error)
    assert not (tmp_path / "page.html").exists()


def test_the_command_writes_where_it_is_told(tmp_path, capsys):
    run = make_run(tmp_path / "run", [GOOD])
    assert main(["report", str(run)]) == 0
    assert main(["report", str(run), "--output", str(tmp_path / "deep" / "page.html")]) == 0
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(tmp_path / "deep" / "page.html")]
    assert Page(run / "report.html").source == Page(tmp_path / "deep" / "page.html").source
    assert main(["report", str(run), "--output", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_needs_neither_trl_nor_transformers(tmp_path):
    run = make_run(tmp_path, [GOOD], [{"step": 1, "loss": 1.0}])
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['trl', 'transformers', 'datasets', 'tokenizers'], None))\n"
        f"from rlloss.cli import main\nsys.exit(main(['report', {str(run)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(Page(run / "report.html").text["script"][0])["texts"] == ["a", "b"]


def test_without_a_log_the_metrics_are_those_of_the_trainers_state(tmp_path):
    for number, losses in ((2, [1.0]), (10, [1.0, 0.5])):  # the newest by number, not by name
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        history = [{"step": step, "epoch": 0.1, "loss": loss, "note": "x"} for step, loss in enumerate(losses, 1)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    page = page_of(tmp_path)
    assert [["loss", [1, 2], [1.0, 0.5]]] in page.data["lines"]
    assert any("token_log_steps=20 in GRPOConfig" in text for text in page.text["p"])


def test_several_runs_are_named_apart_and_written_to_the_first(tmp_path, capsys):
    folders = [make_run(tmp_path / name / "out", metrics=[{"step": 1, "loss": 1.0}]) for name in ("a", "b")]
    assert main(["report", *map(str, folders)]) == 0
    path = capsys.readouterr().out.strip()
    assert path == str(folders[0] / "report.html")
    assert Page(folders[0] / "report.html").data["lines"] == [[["a/out", [1], [1.0]], ["b/out", [1], [1.0]]]]
    again = write_run_report([folders[0], folders[0]], tmp_path / "same.html")
    assert [line[0] for line in Page(again).data["lines"][0]] == ["out (1)", "out (2)"]
    with pytest.raises(ValueError, match="run_dir: found none"):
        write_run_report([])
