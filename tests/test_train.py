"""`rlloss train` on a model directory, a JSONL file and a reward module that the user wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

from rlloss import __version__, arithmetic, cli, train

ROOT = Path(__file__).resolve().parents[1]
REWARDS = """
NUMBER = 3

def short(completions, **kwargs):
    return [1.0 / (1 + len(text)) for text in completions]

def has_answer(completions, answer, **kwargs):
    return [float(str(a) in text) for text, a in zip(completions, answer)]
"""
OPTIONS = {
    "model": "policy",
    "dataset": "prompts.jsonl",
    "max_steps": 2,
    "save_steps": 1,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 4,
    "gradient_checkpointing": False,
    "report_to": "none",
    "seed": 1,
}


@pytest.fixture(scope="module", autouse=True)
def without_the_interpreter():
    """What the kernels compute is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLLOSS_BACKEND", "torch")
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A user's directory: policy/, prompts.jsonl, my_rewards.py."""
    home = tmp_path_factory.mktemp("project")
    arithmetic.make_model(hidden_size=16, layers=1).save_pretrained(home / "policy")
    arithmetic.make_tokenizer().save_pretrained(home / "policy")
    problems, _ = arithmetic.make_problems(operand_limit=4)
    rows = [json.dumps({"prompt": p.prompt, "answer": p.answer}) for p in problems]
    (home / "prompts.jsonl").write_text("\n".join(rows))
    (home / "my_rewards.py").write_text(REWARDS)
    (home / "needs_missing.py").write_text("import no_such_library_anywhere\n")
    return home


def flags(**options):
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]


def rlloss(project, *arguments, launcher=("-m",), **variables):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(project / "cache"),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return subprocess.run(
        [sys.executable, *launcher, "rlloss.cli", *arguments],
        cwd=project, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(project):
    rewards = ["--reward", "my_rewards:short", "--reward", "my_rewards:has_answer"]
    ran = rlloss(project, "train", *flags(**OPTIONS, output_dir="out", epsilon_low=0.1), *rewards)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return project / "out"


def state(checkpoint):
    return json.loads((checkpoint / "trainer_state.json").read_text())


def test_training_leaves_a_model_that_loads_and_its_checkpoints(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert {"checkpoint-1", "checkpoint-2"} <= {p.name for p in trained.iterdir()}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert tokenizer("1+2=")["input_ids"] == arithmetic.make_tokenizer()("1+2=")["input_ids"]
    start = AutoModelForCausalLM.from_pretrained(trained.parent / "policy")
    moved = [not a.equal(b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert any(moved)


def test_both_rewards_and_our_metrics_are_logged(trained):
    first = state(trained / "checkpoint-2")["log_history"][0]
    assert {"rewards/short/mean", "rewards/has_answer/mean", "live_share", "entropy"} <= first.keys()


def test_resume_from_yaml_goes_on_where_it_stopped(project, trained):
    import yaml

    settings = OPTIONS | {"reward": ["my_rewards:short", "my_rewards:has_answer"], "output_dir": "out", "max_steps": 3}
    (project / "train.yaml").write_text(yaml.safe_dump(settings))
    ran = rlloss(project, "train", "--config", "train.yaml", "--resume_from_checkpoint", "last")
    assert ran.returncode == 0, ran.stderr[-3000:]
    resumed, before = state(trained / "checkpoint-3"), state(trained / "checkpoint-2")
    assert resumed["global_step"] == 3
    assert resumed["log_history"][: len(before["log_history"])] == before["log_history"]
    assert "Saved model and tokenizer to out" in ran.stdout


def test_accelerate_launches_it(project):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no", "-m")
    options = OPTIONS | {"output_dir": "launched", "max_steps": 1, "reward": "my_rewards:short"}
    ran = rlloss(project, "train", *flags(**options), launcher=launcher)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert state(project / "launched" / "checkpoint-1")["global_step"] == 1


def test_two_processes_train_together(project, trained):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m")
    options = OPTIONS | {"output_dir": "two", "max_steps": 2, "save_steps": 2, "reward": "my_rewards:short"}
    ran = rlloss(project, "train", *flags(**options), launcher=launcher, ACCELERATE_USE_CPU="true")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("Saved model and tokenizer") == 1  # by the first process
    both, alone = (state(project / out / "checkpoint-2")["epoch"] for out in ("two", trained.name))
    assert both == 2 * alone  # twice the prompts a step


def test_the_command_reports_bad_input_in_one_line(project):
    ran = rlloss(project, "train", *flags(**OPTIONS | {"dataset": "absent.jsonl"}), "--reward", "my_rewards:short")
    assert ran.returncode == 2
    lines = [line for line in ran.stderr.splitlines() if "error" in line]
    assert len(lines) == 1 and "found no file 'absent.jsonl'" in lines[0] and "Traceback" not in ran.stderr


def test_a_config_file_gives_defaults_that_options_replace(project, monkeypatch):
    monkeypatch.chdir(project)
    Path("some.yaml").write_text("model: a\ndataset: b\nreward: [m:f, m:g]\nlearning_rate: 0.5\nbeta: 0.1\n")
    arguments, config, _ = train.parse(["--config", "some.yaml", "--reward", "m:h", "--beta", "0.2"])
    assert (arguments.model, arguments.reward) == ("a", ["m:h"])
    assert (config.learning_rate, config.beta) == (0.5, 0.2)
    arguments, _, _ = train.parse(["--config", "some.yaml"])
    assert arguments.reward == ["m:f", "m:g"]
    Path("single.yaml").write_text("model: a\ndataset: b\nreward: m:f\n")
    assert train.parse(["--config", "single.yaml"])[0].reward == ["m:f"]


def test_rewards_may_be_repeated_or_listed():
    base = ["--model", "a", "--dataset", "b"]
    for given in (["--reward", "m:f", "--reward", "m:g"], ["--reward", "m:f", "m:g"]):
        assert train.parse([*base, *given])[0].reward == ["m:f", "m:g"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "b"], "--model: found none"),
        (["--model", "a"], "--dataset: found none"),
        (["--model", "a", "--model_name_or_path", "c", "--dataset", "b"], "found both, expected one"),
        (["--model", "a", "--dataset", "b", "--no_such_option", "1"], "--no_such_option"),
        (["--config", "absent.yaml"], "--config: found no file 'absent.yaml'"),
        (["--model", "a", "--dataset", "b", "--epsilon", "0.3", "--epsilon_low", "0.1"], "epsilon_low"),
    ],
)
def test_bad_options_are_named(argv, message):
    with pytest.raises(train.UserError, match=message):
        train.parse(argv)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_rewards", "found 'my_rewards', expected module:function"),
        (":short", "expected module:function"),
        ("no_such_module:short", "no module 'no_such_module', expected one that is installed or a file in"),
        ("my_rewards.sub:short", "no module 'my_rewards.sub'"),
        ("my_rewards:long", "has no 'long', expected a function; it has has_answer, short"),
        ("my_rewards:NUMBER", "found int, expected a function"),
    ],
)
def test_bad_rewards_are_named(project, monkeypatch, name, message):
    monkeypatch.chdir(project)
    with pytest.raises(train.UserError, match=message):
        train.load_reward(name)


def test_rewards_come_from_the_current_directory(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert train.load_reward("my_rewards:short")(completions=["abc"]) == [0.25]
    with pytest.raises(train.UserError, match="2 functions named 'short'"):
        train.load_rewards(["my_rewards:short", "my_rewards:short"])
    with pytest.raises(train.UserError, match="--reward: found none"):
        train.load_rewards([])
    with pytest.raises(ModuleNotFoundError, match="no_such_library_anywhere"):  # the user's own bug, in full
        train.load_reward("needs_missing:f")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": "1+1=", "answer": 2}\n', "found the columns question, answer, expected .* 'prompt'"),
        ("b.jsonl", '{"prompt": "1+1="}\n{"prompt": 3\n', "this file could not be read"),
        ("c.jsonl", '{"prompt": 3}\n', "row 0 has the prompt '3', expected a string or a list"),
        ("d.jsonl", '{"prompt": [{"text": "hi"}]}\n', "row 0 has the prompt"),
        ("e.jsonl", '{"prompt": "1+1="}\n{"prompt": ""}\n', "row 1 has the prompt ''"),
        ("f.txt", "1+1=", "expected one of .jsonl, .json, .csv, .parquet"),
    ],
)
def test_bad_datasets_are_named(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).write_text(content)
    with pytest.raises(train.UserError, match=message):
        train.load_prompts(str(tmp_path / name))


def test_prompts_may_be_conversations_with_other_columns(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": "1+1?"}], "answer": 2}))
    dataset = train.load_prompts(str(path))
    assert dataset[0] == {"prompt": [{"role": "user", "content": "1+1?"}], "answer": 2}


def test_a_checkpoint_is_found_or_missed_by_name(tmp_path):
    newest = tmp_path / "out" / "checkpoint-10"
    for step in (2, 10):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
    (newest / "trainer_state.json").write_text("{}")
    assert train.find_checkpoint(None, "out") is None and train.find_checkpoint("false", "out") is None
    for value in ("last", "True", str(newest)):
        assert train.find_checkpoint(value, str(tmp_path / "out")) == str(newest)
    with pytest.raises(train.UserError, match="found no checkpoint-"):
        train.find_checkpoint("last", str(tmp_path / "empty"))
    with pytest.raises(train.UserError, match="found no trainer_state.json"):
        train.find_checkpoint(str(tmp_path), "out")


def test_help_and_version(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert "demo" in shown and "train" in shown
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"rlloss {__version__}\n"


@pytest.mark.parametrize("command", ["demo", "train"])
def test_a_missing_extra_is_one_line(monkeypatch, capsys, command):
    monkeypatch.setattr(cli, "NEEDED", ("json", "no_such_library_anywhere"))
    assert cli.main([command]) == 1
    assert capsys.readouterr().err == (
        f'rlloss {command}: error: not installed: no_such_library_anywhere. pip install "rlloss[trl]"\n'
    )


def test_zero_steps_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--steps", "0"])
    assert stop.value.code == 2 and "--steps: found 0, expected at least 1" in capsys.readouterr().err
