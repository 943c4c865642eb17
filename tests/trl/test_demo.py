"""Test a small demo: it runs end to end, its arms are comparable, and remedies without effect are called inactive."""

import io
import json
import math
import random
import re

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlloss import cli
from rlloss.integrations.trl.demo import run as demo
from rlloss.integrations.trl.demo import task

pytestmark = pytest.mark.usefixtures("on_torch")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    terminal = io.StringIO()
    console = Console(file=terminal, width=100)
    result = demo.run_demo(output, steps=10, warm_start_steps=6, held_out_samples=1, seed=3, console=console)
    return result, json.loads(result.history.read_text(encoding="utf-8")), terminal.getvalue()


def test_the_job_leaves_report_history_and_a_table(ran):
    result, record, terminal = ran
    page = result.report.read_text(encoding="utf-8")
    for text in (page, terminal):
        for word in ("plain GRPO", "remedies", "entropy", "live share", "warm start"):
            assert word in text
    shown = page.split("<script")[0]
    assert "rlloss/live_share" in shown
    assert shown.index("Entropy ends at") < shown.index("<table") < shown.index("<svg")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert data["runs"] == ["plain_grpo", "remedies"]
    assert {c[9] for c in data["completions"]} == {0, 1} and len(data["completions"]) >= 40
    assert (
        record["command"]
        == "rlloss.integrations.trl.demo.run.run_demo(steps=10, seed=3, warm_start_steps=6, held_out_samples=1)"
    )
    assert record["command"] in page
    assert [arm["name"] for arm in record["arms"]] == ["plain GRPO", "remedies"]


def test_every_step_was_taken_with_finite_numbers(ran):
    result, record, _ = ran
    for arm in record["arms"]:
        assert [row["step"] for row in arm["history"]] == list(range(1, 11))
        for row in arm["history"]:
            assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
            assert 0.0 <= row["rlloss/live_share"] <= row["entropy/kept_share"] <= 1.0
            assert row["clip_ratio/region_mean"] is not None
        for mean, error in arm["held_out"].values():
            assert 0.0 <= mean <= 1.0 and error >= 0.0


def test_a_generation_serves_at_least_four_updates(ran):
    _, record, _ = ran
    assert record["updates_per_generation"] >= 4
    for arm in record["arms"]:
        generated = [row["step"] for row in arm["history"] if "reward" in row]
        assert generated == list(range(1, 11, record["updates_per_generation"]))
        # The first update has the weights that generated, so every ratio is 1. Later updates differ.
        assert arm["history"][0]["clip_ratio/region_mean"] == 0.0


def test_arms_start_from_the_same_weights_and_completions(ran):
    plain, remedies = (arm.history for arm in ran[0].arms)
    for metric in ("entropy", "completions/mean_length", *demo.REWARD_METRICS):
        assert plain[0][metric] == pytest.approx(remedies[0][metric], rel=1e-6), metric
    assert plain[-1]["entropy"] != remedies[-1]["entropy"]


def test_the_same_seed_measures_the_same(ran, tmp_path):
    plain, _ = (arm.history for arm in ran[0].arms)
    again = demo.run_demo(
        tmp_path, steps=3, warm_start_steps=6, held_out_samples=1, seed=3, arms=demo.ARMS[:1],
        console=Console(file=io.StringIO()),
    )  # fmt: skip
    for metric in ("loss", "entropy", "grad_norm", "reward"):
        assert [row.get(metric) for row in again.arms[0].history] == [row.get(metric) for row in plain[:3]]


def test_the_terminal_is_left_to_the_progress_bars(tmp_path, capfd):
    demo.run_demo(
        tmp_path,
        steps=1,
        warm_start_steps=1,
        held_out_samples=1,
        arms=demo.ARMS[:1],
        console=Console(file=io.StringIO()),
    )
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_the_arms_are_the_announced_ones(ran):
    plain, remedies = ran[0].arms
    assert (plain.options["epsilon_high"], remedies.options["epsilon_high"]) == (0.2, 0.28)
    assert plain.options["epsilon_low"] == remedies.options["epsilon_low"] == 0.2
    assert all(row["entropy/kept_share"] == 1.0 for row in plain.history)
    assert all(0.15 < (row["entropy/kept_share"] or 0.0) < 0.3 for row in remedies.history)


CLIPPED = {"clip_ratio/region_mean": 0.01, "entropy/kept_share": 0.2}
UNCLIPPED = {"clip_ratio/region_mean": 0.0, "entropy/kept_share": 0.2}


@pytest.mark.parametrize(
    ("history", "quantile", "expected"),
    [
        ([UNCLIPPED, CLIPPED], 0.2, []),
        ([UNCLIPPED, UNCLIPPED], 0.2, ["clip"]),
        ([UNCLIPPED, {"clip_ratio/region_mean": None}], 0.2, ["clip"]),
        ([{**CLIPPED, "entropy/kept_share": 1.0}] * 2, 0.2, ["entropy mask"]),
        ([{**CLIPPED, "entropy/kept_share": 1.0}] * 2, 1.0, []),
        ([{**UNCLIPPED, "entropy/kept_share": 1.0}], 0.2, ["clip", "entropy mask"]),
        ([{"clip_ratio/region_mean": 0.01, "entropy/kept_share": 1.0}, CLIPPED], 0.2, []),
    ],
)
def test_what_never_acted_is_named(history, quantile, expected):
    assert demo.what_never_acted(history, {"top_entropy_quantile": quantile}) == expected


def test_an_inactive_arm_is_labelled_in_the_table():
    arms = [
        demo.ArmResult("one", {}, [dict(CLIPPED)], {}, 1.0),
        demo.ArmResult("two", {}, [dict(UNCLIPPED)], {}, 1.0, ["clip"]),
    ]
    table = demo._training_table(demo.DemoResult(None, None, arms, {}, {}))  # type: ignore[arg-type]
    assert ["inactive", "no", "clip"] in table.rows


def test_start_and_end_are_tenths_of_what_was_measured():
    rows = [{"reward": float(i)} if i % 2 == 0 else {"reward": None} for i in range(40)]
    assert demo.start_and_end(rows, "reward") == (1.0, 37.0)  # (0, 2) and (36, 38)
    assert all(map(math.isnan, demo.start_and_end(rows, "absent")))


@pytest.mark.parametrize("name", ["steps", "warm_start_steps", "held_out_samples"])
def test_bad_sizes_are_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: found 0, expected at least 1"):
        demo.run_demo(tmp_path, **{name: 0})


@pytest.mark.parametrize(
    ("completion", "right", "formed"),
    [
        ("<a>42</a>", 1.0, 1.0),
        ("42", 1.0, 0.0),
        ("<a>42<a>", 1.0, 0.0),
        ("<a>41</a>", 0.0, 1.0),
        ("<a>42</a>7", 1.0, 0.0),
        ("<a>4</a>2", 0.0, 0.0),
        ("<a>-42</a>", 0.0, 1.0),
        ("<a></a>", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_the_two_rewards_are_independent(completion, right, formed):
    assert task.answer_right(completions=[completion], answer=[42]) == [right]
    assert task.format_right(completions=[completion], answer=[42]) == [formed]


def test_problems_are_right_and_held_out_ones_are_not_trained_on():
    training, held_out = task.make_problems(operand_limit=12, seed=5)
    for problem in training + held_out:
        assert eval(problem.prompt.rstrip("=")) == problem.answer >= 0
    assert len(training) + len(held_out) == 144 + 78
    assert not {p.prompt for p in training} & {p.prompt for p in held_out}
    assert task.make_problems(operand_limit=12, seed=5) == (training, held_out)


def test_the_tokenizer_keeps_every_character():
    tokenizer = task.make_tokenizer()
    text = "27+15=<a>42</a>" + task.EOS
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 16 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == text and tokenizer.decode(ids, skip_special_tokens=True) == "27+15=<a>42</a>"


def test_the_warm_start_text_is_imperfect_in_the_announced_shares():
    rng = random.Random(0)
    problem = task.Problem("27+15=", 42)
    texts = [task.imperfect_completion(problem, rng) for _ in range(4000)]
    wrong = 1 - sum(task.answer_right(completions=texts, answer=[42] * 4000)) / 4000
    broken = 1 - sum(task.format_right(completions=texts)) / 4000
    assert wrong == pytest.approx(task.WRONG_ANSWER_SHARE, abs=0.03)  # 4 standard errors
    assert broken == pytest.approx(task.BROKEN_FORMAT_SHARE, abs=0.035)


def test_the_warm_start_learns_and_repeats():
    tokenizer = task.make_tokenizer()
    training, _ = task.make_problems(operand_limit=8)
    losses = []
    for _ in range(2):
        model = task.make_model(hidden_size=32, layers=1)
        losses.append(list(task.warm_start(model, tokenizer, training, steps=30, batch_size=16)))
    assert losses[0] == losses[1]
    assert losses[0][0] == pytest.approx(math.log(len(tokenizer)), abs=0.5)  # nothing known: uniform
    assert losses[0][-1] < 0.5 * losses[0][0]


def test_the_warm_start_runs_in_fp32_alone():
    """A CPU without bf16 units multiplies bf16 many times slower."""
    dtypes = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            dtypes.update(x.dtype for x in tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    training, _ = task.make_problems(operand_limit=8)
    model = task.make_model(hidden_size=32, layers=1)
    with Record():
        list(task.warm_start(model, task.make_tokenizer(), training, steps=1, batch_size=4))
    assert {dtype for dtype in dtypes if dtype.is_floating_point} == {torch.float32}


def test_muon_is_torchs_but_for_bf16():
    torch_muon = getattr(torch.optim, "Muon", None)
    if torch_muon is None:
        pytest.skip("torch 2.8 has no Muon")
    g = torch.Generator().manual_seed(0)
    for shape in ((16, 16), (24, 8), (8, 24)):
        ours, theirs = (torch.zeros(shape, requires_grad=True) for _ in range(2))
        optimizers = task._Muon([ours], {"lr": 0.02}), torch_muon([theirs], lr=0.02, weight_decay=0.0)
        for _ in range(3):
            ours.grad = theirs.grad = torch.randn(shape, generator=g)
            for optimizer in optimizers:
                optimizer.step()
        # Three steps of 0.02 times a matrix with singular values about 1, whose 16 products were rounded to bf16.
        assert (ours - theirs).norm() < 16 * torch.finfo(torch.bfloat16).eps * ours.norm()


def test_scoring_repeats_and_leaves_the_generator_alone():
    tokenizer, model = task.make_tokenizer(), task.make_model(hidden_size=32, layers=1)
    _, held_out = task.make_problems(operand_limit=8)
    before = torch.get_rng_state()
    first = task.evaluate(model, tokenizer, held_out, samples=2, seed=1)
    assert first == task.evaluate(model, tokenizer, held_out, samples=2, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_default_model_has_half_a_million_parameters():
    assert 0.4e6 < sum(p.numel() for p in task.make_model().parameters()) < 0.6e6


def test_each_arm_is_the_folder_of_a_run(ran):
    result, record, terminal = ran
    for arm in result.arms:
        folder = result.report.parent / arm.folder
        assert json.loads((folder / "run.json").read_text())["model"] and (folder / "metrics.jsonl").exists()
        assert sorted(path.name for path in (folder / "tokens").iterdir()) == ["process-00000.jsonl"]
    assert "Entropy ends at" in terminal and "of the tokens carry a gradient with remedies" in " ".join(
        terminal.split()
    )


def arm(name, entropy, live, score, error=0.01, **more):
    history = [{"entropy": e, "rlloss/live_share": live} for e in entropy]
    return demo.ArmResult(name, {}, history, {"answer_right": (score, error)}, 1.0, **more)


def test_the_verdict_says_what_was_measured():
    plain, more = arm("plain", [0.3, 0.1], 0.8, 0.40), arm("more", [0.3, 0.2], 0.2, 0.41)
    assert demo.verdict([plain, more]) == [
        "Entropy ends at 0.200 nats with more and at 0.100 with plain.",
        "20% of the tokens carry a gradient with more, 80% with plain.",
        "No difference in answer right beyond noise: 0.410 and 0.400 (one seed).",
    ]
    less = arm("less", [0.3, 0.05], 0.2, 0.30, inactive=["clip"])
    assert demo.verdict([plain, less])[2:] == [
        "Answer right is less often with less: 0.300, not 0.400 (one seed).",
        "Parts of less never acted: clip.",
    ]
    best = arm("best", [], None, 0.50)
    assert demo.verdict([plain, best]) == [
        "Answer right is more often with best: 0.500, not 0.400 (one seed).",
    ]
    counted = arm("counted", [], None, 0.40)
    counted.history = [{"rlloss/products": 1.5, "rlloss/products_plain": 3.0}]
    assert "The lm_head runs 1.5 products there instead of the 3.0 of plain logits" in demo.verdict([plain, counted])[0]


def test_quick_is_a_smaller_demo(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(demo, "run_demo", lambda output, **given: seen.update(given))
    assert cli.main(["demo", "--quick"]) == 0
    assert seen == {"seed": 0, **demo.QUICK} and seen["steps"] < 120
    assert cli.main(["demo", "--quick", "--full"]) == 2
    assert "--quick: found --full or --steps beside it" in capsys.readouterr().err


def test_a_demo_takes_away_its_own_logs_alone(tmp_path):
    folder = tmp_path / "remedies"
    (folder / "tokens").mkdir(parents=True)
    mine = [folder / "thesis.tex", folder / "tokens" / "notes.jsonl"]
    logs = [folder / name for name in demo.LOGS] + [folder / "tokens" / "process-00000.jsonl"]
    for path in mine + logs:
        path.write_text("x")
    assert demo.fresh_run_folder(folder) == folder
    assert all(path.exists() for path in mine) and not any(path.exists() for path in logs)
