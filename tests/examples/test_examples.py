"""Every file of examples/ runs as its reader runs it, and docs/examples.md names it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
FILES = sorted(path.name for path in EXAMPLES.iterdir() if path.is_file())
ENVIRONMENT = {
    **os.environ, "RLLOSS_BACKEND": "torch", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    "PYTHONDONTWRITEBYTECODE": "1",
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """What a command says; it writes nothing beside the folder `out`."""

    def run(*command):
        before = set(tmp_path.iterdir())
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert set(tmp_path.iterdir()) - before <= {tmp_path / "out"}
        return done.stdout

    return run


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".py")])
def test_an_example_is_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < 80


def test_the_page_names_every_example_and_every_example_is_tested():
    page, here = (ROOT / "docs" / "examples.md").read_text(), Path(__file__).read_text()
    assert [name for name in FILES if f"](../examples/{name})" not in page] == []
    assert [name for name in FILES if not name.endswith(".ipynb") and f'"{name}"' not in here] == []


def test_trl_grpo(run, tmp_path):
    said = run(EXAMPLES / "trl_grpo.py", "out")
    assert re.search(r"rlloss: \d+ % of [\d,]+ tokens had a gradient", said)
    assert "rlloss report out" in said
    assert (tmp_path / "out" / "metrics.jsonl").is_file() and list((tmp_path / "out" / "tokens").glob("*.jsonl"))


def test_torch_loop(run, tmp_path):
    run(EXAMPLES / "torch_loop.py", "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 10 and all(0 <= line["reward"] <= 1 for line in lines)
    assert all(0 < line["live_share"] <= line["kept_share"] < 0.5 for line in lines)


@pytest.mark.slow
def test_accelerate_ddp(run, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    said = run(*launcher, EXAMPLES / "accelerate_ddp.py", "out")
    assert "2 processes; their parameters differ by at most 0.0." in said
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_multi_turn(run):
    said = run(EXAMPLES / "multi_turn.py", "out")
    (own, loss, changed), (gradient, *others) = re.findall(r"tokens ([\d.]+), loss (\S+), and (\S+) with", said)
    assert float(own) == 0 and loss == changed
    assert float(gradient) > 0 and others[0] != others[1]


@pytest.mark.slow
def test_own_reward(run):
    said = run(EXAMPLES / "own_reward.py", "out")
    shown = dict(re.findall(r"^  (\S+) +(\S+)$", said, re.M))
    weights = [float(shown[f"reward_resolution/effective_weight/{name}"]) for name in ("one_number", "near")]
    assert sum(weights) == pytest.approx(1, abs=2e-3)


@pytest.mark.slow
def test_lora(run, tmp_path):
    pytest.importorskip("peft")
    said = run(EXAMPLES / "lora.py", "out")
    products = dict(re.findall(r"^(\w+) head: \w+: ([\d.]+) matrix products", said, re.M))
    assert products == {"trained": "1.60", "frozen": "1.40"}
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_read_run(run, tmp_path):
    said = run(EXAMPLES / "read_run.py", "out")
    assert "tokens had a gradient." in said and "Tokens of highest entropy" in said
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_a_run_without_a_script(run, tmp_path):
    from rlloss.integrations.trl.demo import task

    for name in ("train.yaml", "rewards.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    for part in (task.make_model(hidden_size=64, layers=2), task.make_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    rows = task.make_dataset(task.make_problems()[0][:32])
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--max_steps", "4", "--max_completion_length", "12", "--token_log_steps", "2")
    said = run("-m", "rlloss.cli", "train", "--config", "train.yaml", *options)
    assert "had a gradient" in said and "Saved model and tokenizer to out" in said
    assert "out/report.html" in run("-m", "rlloss.cli", "report", "out")
