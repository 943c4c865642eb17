"""Test `rlloss train` on a model directory, a JSONL file and a reward module of the user."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
import trl.trainer.grpo_trainer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlloss import __version__, cli
from rlloss.integrations.trl import GRPOConfig, train, train_help
from rlloss.integrations.trl.checkpoints import what_is_wrong
from rlloss.integrations.trl.demo import task as arithmetic

pytestmark = pytest.mark.usefixtures("on_torch")
ROOT = Path(__file__).resolve().parents[2]
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
    assert "had a gradient" in ran.stdout
    return project / "out"


def state(checkpoint):
    return json.loads((checkpoint / "trainer_state.json").read_text())


def test_training_leaves_a_model_that_loads_and_its_checkpoints(trained):
    from transformers import AutoTokenizer

    assert {"checkpoint-1", "checkpoint-2"} <= {p.name for p in trained.iterdir()}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert tokenizer("1+2=")["input_ids"] == arithmetic.make_tokenizer()("1+2=")["input_ids"]
    start = AutoModelForCausalLM.from_pretrained(trained.parent / "policy")
    moved = [not a.equal(b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert any(moved)
    card = (trained / "README.md").read_text()
    assert "- Model: `policy`" in card and "- Dataset: `prompts.jsonl`" in card and "None" not in card


def test_both_rewards_and_our_metrics_are_logged(trained):
    first = state(trained / "checkpoint-2")["log_history"][0]
    assert {"rewards/short/mean", "rewards/has_answer/mean", "rlloss/live_share", "entropy"} <= first.keys()


@pytest.mark.slow
def test_resume_from_yaml_goes_on_where_it_stopped(project, trained):
    import yaml

    settings = OPTIONS | {"reward": ["my_rewards:short", "my_rewards:has_answer"], "output_dir": "out", "max_steps": 3}
    (project / "train.yaml").write_text(yaml.safe_dump(settings))
    shutil.copytree(trained / "checkpoint-2", trained / "checkpoint-3")
    (trained / "checkpoint-3" / "trainer_state.json").unlink()
    (trained / "checkpoint-3" / "optimizer.pt").write_bytes(b"PK")
    ran = rlloss(project, "train", "--config", "train.yaml", "--resume_from_checkpoint", "last")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "resumes from checkpoint-2; skipped as not complete: checkpoint-3 (no trainer_state.json)" in ran.stderr
    resumed, before = state(trained / "checkpoint-3"), state(trained / "checkpoint-2")
    assert resumed["global_step"] == 3
    assert resumed["log_history"][: len(before["log_history"])] == before["log_history"]
    assert "Saved model and tokenizer to out" in ran.stdout


@pytest.mark.slow
def test_accelerate_launches_it(project):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no", "-m")
    options = OPTIONS | {"output_dir": "launched", "max_steps": 1, "reward": "my_rewards:short"}
    ran = rlloss(project, "train", *flags(**options), launcher=launcher)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert state(project / "launched" / "checkpoint-1")["global_step"] == 1


@pytest.mark.slow
def test_two_processes_train_together(project, trained):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m")
    options = OPTIONS | {"output_dir": "two", "max_steps": 2, "save_steps": 2, "reward": "my_rewards:short"}
    shutil.copytree(trained / "checkpoint-1", project / "two" / "checkpoint-1")
    shutil.copytree(trained / "checkpoint-1", project / "two" / "checkpoint-2")
    (project / "two" / "checkpoint-2" / "trainer_state.json").write_text("{")
    options |= {"resume_from_checkpoint": "last"}
    ran = rlloss(project, "train", *flags(**options), launcher=launcher, ACCELERATE_USE_CPU="true")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("Saved model and tokenizer") == 1  # by the first process
    skipped = "resumes from checkpoint-1; skipped as not complete: checkpoint-2 (trainer_state.json cut off)"
    assert ran.stderr.count(skipped) == 1
    both, alone = (state(project / out / "checkpoint-2")["epoch"] for out in ("two", trained.name))
    assert both == 2 * alone  # twice the prompts a step


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
        (["--model", "a", "--dataset", "b", "--no_such_option", "1"], "unknown option no_such_option, expected one of"),
        (["--config", "absent.yaml"], "--config: found no file 'absent.yaml'"),
        (["--config"], "--config: found no file behind it"),
        (
            ["--model", "a", "--dataset", "b", "--learnig-rate", "1"],
            "unknown option learnig_rate, did you mean learning_rate",
        ),
        (["--model", "a", "--dataset", "b", "more"], "more: found a value without an option"),
        (["--model", "a", "--dataset", "b", "--max_steps", "x"], "max_steps.*: invalid int value: 'x'"),
        (["--model", "a", "--dataset", "b", "--optim", "x"], "--optim: invalid choice: 'x'"),
        (["--model", "a", "--dataset", "b", "--epsilon", "0.3", "--epsilon_low", "0.1"], "epsilon_low"),
    ],
)
def test_bad_options_are_named(argv, message):
    with pytest.raises(train.UserError, match=message):
        train.parse(argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate: 1", "unknown option learnig_rate, did you mean learning_rate"),
        ("3: 4", "unknown option 3, expected one of"),
        ("a: [1", "found no YAML: .* line 1"),
        ("model: caf\udce9", "found no YAML"),
        ("- model", "found list, expected a mapping"),
        ("", "found NoneType, expected a mapping"),
        ("env: 3", "env: found 3, expected a mapping"),
        ("max_steps: [1]", r"max_steps: found \[1\], expected a number"),
        ("max_steps: 2.5", "max_steps.*: invalid int value: '2.5'"),
        ("max_steps: abc", "max_steps.*: invalid int value: 'abc'"),
        ("dataset: [b]", r"--dataset: found \['b'\], expected one"),
        ("reward: {a: b}", "--reward: found {'a': 'b'}, expected module:function"),
        ("temperature: [1]", r"temperature: found \[1\], expected a number"),
    ],
)
def test_bad_config_files_are_named(tmp_path, text, message):
    path = tmp_path / "some.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(train.UserError, match=message):
        train.parse(["--model", "a", *([] if "dataset" in text else ["--dataset", "b"]), "--config", str(path)])


def test_a_config_file_may_hold_numbers_where_texts_are_expected(tmp_path):
    (tmp_path / "some.yaml").write_text(
        "model: 3\ndataset: b\noutput_dir: 2026-11-26\nlearning_rate: 1e-4\nenv: {X_1: 2}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("X_1", raising=False)
        arguments, config, _ = train.parse(["--config", str(tmp_path / "some.yaml")])
        assert os.environ["X_1"] == "2"
    os.environ.pop("X_1", None)
    assert (arguments.model, config.output_dir, config.learning_rate) == ("3", "2026-11-26", 1e-4)


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
        ("b.jsonl", '{"prompt": "1+1="}\n\n{"prompt": 3\n', "line 3 is not JSON: Expecting ',' delimiter at column 13"),
        ("c.jsonl", '{"prompt": 3}\n', "line 1 has the prompt '3', expected a string or a list"),
        ("d.jsonl", '{"prompt": [{"text": "hi"}]}\n', "line 1 has the prompt"),
        ("e.jsonl", '{"prompt": "1+1="}\n\n{"prompt": ""}\n', "line 3 has the prompt ''"),
        ("g.jsonl", '{"prompt": "1+1="}\n{"answer": 3, "b": 4}\n', "line 2 has answer, b, expected a 'prompt'"),
        ("h.jsonl", '{"prompt": "1+1="}\n7\n', "line 2 holds '7', expected an object with a 'prompt'"),
        ("i.jsonl", '{"prompt": "caf\udce9"}\n', "line 1 could not be read: .*utf-8"),
        ("j.jsonl", "", "found no rows, expected at least one"),
        ("k.jsonl", "\n\n", "found no rows, expected at least one"),
        ("l.csv", "prompt,answer\n", "found no rows, expected at least one"),
        ("m.csv", 'prompt,answer\n"1,2\n', "this file could not be read: Error tokenizing"),
        ("n.parquet", "PAR1", "this file could not be read: Parquet"),
        ("o.json", '[{"prompt": 3}]', "row 0 has the prompt '3'"),
        ("f.txt", "1+1=", "expected one of .jsonl, .json, .csv, .parquet"),
    ],
)
def test_bad_datasets_are_named(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(train.UserError, match=message):
        train.load_prompts(str(tmp_path / name))


def test_prompts_may_be_conversations_with_other_columns(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": "1+1?"}], "answer": 2}))
    dataset = train.load_prompts(str(path))
    assert dataset[0] == {"prompt": [{"role": "user", "content": "1+1?"}], "answer": 2}


CHECKED = {".json", ".safetensors", ".pt", ".pth", ".bin"}  # files that tell how long they are
NEEDED = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def resumed(output_dir, capsys):
    """(the step that "last" finds, the printed text)."""
    found = train.find_checkpoint("last", str(output_dir))
    return int(Path(found).name.removeprefix("checkpoint-")), capsys.readouterr().err


def copies(tmp_path, trained, change=None):
    """A folder with two checkpoints, and the newer one of them."""
    older, newer = (tmp_path / "out" / f"checkpoint-{number}" for number in (2, 10))
    shutil.copytree(trained / "checkpoint-2", older)
    if change is not None:
        change(older)
    shutil.copytree(older, newer)
    return tmp_path / "out", newer


def in_shards(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")


def as_adapter(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


def of_two_processes(folder):
    for n in (0, 1):
        shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{n}.pth")
    (folder / "rng_state.pth").unlink()


def of_fsdp(folder):
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / name).mkdir()
        for file in (".metadata", "__0_0.distcp"):
            (folder / name / file).write_bytes(b"x" * 64)
    for name in ("model.safetensors", "optimizer.pt"):
        (folder / name).unlink()


def of_deepspeed(folder):
    (folder / "global_step2").mkdir()
    (folder / "latest").write_text("global_step2")
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        (folder / name).rename(folder / "global_step2" / f"{name.partition('.')[0]}.pt")
    shutil.copy(folder / "training_args.bin", folder / "global_step2" / "model.pt")


LAYOUTS = {
    # how the checkpoint is written: its required files
    None: NEEDED,
    in_shards: NEEDED - {"model.safetensors"} | {"model.safetensors.index.json", "model-*-of-*.safetensors"},
    as_adapter: NEEDED - {"model.safetensors"} | {"adapter_model.safetensors", "adapter_config.json"},
    of_two_processes: NEEDED - {"rng_state.pth"} | {"rng_state_0.pth", "rng_state_1.pth"},
    of_fsdp: NEEDED - {"model.safetensors", "optimizer.pt"} | {"*_fsdp_0/.metadata", "optimizer_0/.metadata"},
    of_deepspeed: {"rng_state.pth", "trainer_state.json", "latest"},
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: getattr(layout, "__name__", "one file"))
def test_the_newest_complete_checkpoint_is_taken(trained, tmp_path, capsys, layout):
    """If any file of the newest checkpoint is missing or truncated, the one before it is taken."""
    folder, newest = copies(tmp_path, trained, layout)
    capsys.readouterr()  # progress bars
    assert resumed(folder, capsys) == (10, "")
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    needed = {path for pattern in LAYOUTS[layout] for path in newest.glob(pattern)}
    assert len(needed) >= len(LAYOUTS[layout])
    for path in files:
        name, whole = path.relative_to(newest).as_posix(), path.read_bytes()
        path.unlink()
        expected = (2, f"checkpoint-10 (no {name})") if path in needed else (10, "")
        step, said = resumed(folder, capsys)
        if name in ("model.safetensors", "pytorch_model_fsdp_0/.metadata"):
            expected = (2, "checkpoint-10 (no ")
        elif name == "latest":
            expected = (2, "checkpoint-10 (no latest global_step)")
        elif "adapter_model" in name or name.endswith("index.json"):
            expected = (2, "checkpoint-10 (no weights)")
        assert (step, expected[1] in said) == (expected[0], True), name
        for kept in (0, len(whole) // 2, len(whole.rstrip()) - 1) if path.suffix in CHECKED else ():
            path.write_bytes(whole[:kept])
            cut = f"skipped as not complete: checkpoint-10 ({name} cut off)\n"
            assert resumed(folder, capsys) == (2, f"rlloss train: resumes from checkpoint-2; {cut}"), (name, kept)
        path.write_bytes(whole)
    assert resumed(folder, capsys) == (10, "")


def test_a_checkpoint_is_found_or_missed_by_name(trained, tmp_path):
    folder, newest = copies(tmp_path, trained)
    (folder / "checkpoint-99").write_text("a file")
    (folder / "checkpoint-x").mkdir()
    for value in (None, "false", False):
        assert train.find_checkpoint(value, str(folder)) is None
    for value in ("last", "True", True, str(newest)):
        assert train.find_checkpoint(value, str(folder)) == str(newest)
    for empty in ("empty", "absent"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(train.UserError, match="found no checkpoint-"):
            train.find_checkpoint("last", str(tmp_path / empty))
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(train.UserError, match="found no trainer_state.json in"):
            train.find_checkpoint(str(path), "out")
    for name in ("checkpoint-2", "checkpoint-10"):
        (folder / name / "optimizer.pt").write_bytes(b"PK")
    with pytest.raises(train.UserError, match="found optimizer.pt cut off in '.*checkpoint-10', expected a complete"):
        train.find_checkpoint(str(newest), str(folder))
    with pytest.raises(train.UserError, match=r"not complete: checkpoint-10 \(optimizer.pt cut off\), checkpoint-2 \("):
        train.find_checkpoint("last", str(folder))


def test_what_the_trainer_has_not_written_does_not_matter(trained, tmp_path, capsys):
    folder, newest = copies(tmp_path, trained)
    for name in ("log.json", "vocab.json", "tok.bin", "x.index.json"):
        (newest / name).write_text("{}\n{")
    (newest / "gone.json").symlink_to("nowhere")
    weights = load_file(newest / "model.safetensors")
    save_file(weights, newest / "model.safetensors", metadata={"format": "pt", "dtype": "bf16"})
    assert resumed(folder, capsys) == (10, "")
    for text in ("[]", "[" * 100_000, "{}{"):
        (newest / "trainer_state.json").write_text(text)
        assert resumed(folder, capsys)[0] == 2
    in_shards(folder / "checkpoint-2")
    for text in ("{}", "[1]", '{"weight_map": ["a"]}', '{"weight_map": {"a": [1]}}'):
        (folder / "checkpoint-2" / "model.safetensors.index.json").write_text(text)
        assert "model.safetensors.index.json cut off" in str(what_is_wrong(folder / "checkpoint-2"))


def test_weights_alone_are_complete(trained, tmp_path, capsys):
    """A checkpoint of save_only_model has only weights and is complete. One that lacks only some parts is not."""
    folder, newest = copies(tmp_path, trained)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (newest / name).unlink()
        assert resumed(folder, capsys)[0] == (10 if name == "rng_state.pth" else 2)


def test_a_checkpoint_that_is_written_over_is_not_complete_meanwhile(trained, tmp_path, capsys):
    folder, newest = copies(tmp_path, trained)
    args = SimpleNamespace(output_dir=str(folder))
    for main, saves, step in ((False, True, 10), (True, False, 10), (True, True, 11), (True, True, 10)):
        assert resumed(folder, capsys)[0] == 10
        state = SimpleNamespace(is_world_process_zero=main, global_step=step)
        train._WrittenOver().on_step_end(args, state, SimpleNamespace(should_save=saves))
    assert resumed(folder, capsys)[0] == 2


@pytest.mark.parametrize("change, message", [
    ({"output_dir": "my_rewards.py"}, "--output_dir: found 'my_rewards.py': Not a directory, expected a folder"),
    ({"output_dir": "my_rewards.py/out"}, "--output_dir: found 'my_rewards.py/out': Not a directory"),
    ({"output_dir": "logged", "token_log_steps": 1}, "logged/tokens/process-00000.jsonl: Is a directory"),
    ({"output_dir": "measured", "token_log_steps": 1}, "folder: found a directory measured/metrics.jsonl"),
    ({"model": "nowhere"}, "--model nowhere: no such directory in .*, and as a Hub id it could not be loaded"),
    ({"model": "./nowhere"}, "--model: found no directory './nowhere'"),
    ({"model": "empty"}, "--model empty: found nothing, expected a model with its config.json and its tokenizer"),
    ({"dataset": "x" * 300}, "x" * 300),
    ({"dataset": "absent.jsonl"}, "--dataset: found no file 'absent.jsonl'"),
    ({"reward": "my_rewards:long"}, "has no 'long'"),
    ({"loss_type": "clipcov"}, "loss_type: found 'clipcov'"),
    ({"loss_type": "kl_cov", "epsilon_high": 0.28}, "epsilon_high: found 0.28, expected none: leave it out"),
    ({"resume_from_checkpoint": "last"}, "--resume_from_checkpoint last: found no checkpoint-"),
], ids=str)  # fmt: skip
def test_the_option_that_does_not_fit_is_blamed_before_weights_are_loaded(
    project, monkeypatch, capsys, change, message
):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    if "token_log_steps" not in change and change.get("model") != "nowhere":  # those are known no sooner
        monkeypatch.setattr(trl.trainer.grpo_trainer, "create_model_from_path", load)
    monkeypatch.chdir(project)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", project / "cache")
    for folder in ("empty", "logged/tokens/process-00000.jsonl", "measured/metrics.jsonl"):
        (project / folder).mkdir(parents=True, exist_ok=True)
    options = OPTIONS | {"reward": "my_rewards:short", "output_dir": "unused", "use_cpu": "true"} | change
    assert cli.main(["train", *flags(**options)]) == 2
    shown = capsys.readouterr().err
    said = [line for line in shown.splitlines() if "error" in line]
    assert len(said) == 1 and "Traceback" not in shown and re.match(f"rlloss train: error: .*{message}", said[0])


def test_help_is_one_screen_and_knows_every_option_of_ours(capsys):
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 48 and max(map(len, shown.splitlines())) <= 110
    ours = {f.name for f in dataclasses.fields(GRPOConfig)} - {f.name for f in dataclasses.fields(trl.GRPOConfig)}
    ours |= {f.name for f in dataclasses.fields(train.TrainArguments)}
    assert {name for name in ours if f"  --{name} " not in shown} == set()


def test_help_all_begins_with_the_options_that_people_set(capsys):
    assert cli.main(["train", "--help", "all"]) == 0
    named = re.findall(r"^  --(?!no_)(\w+)", capsys.readouterr().out, re.M)
    first = [name for options in train_help.OPTIONS.values() for name in options]
    assert named[: len(first) + 1] == ["config", *first]
    groups = (train.TrainArguments, GRPOConfig, trl.ModelConfig)
    assert {f.name for group in groups for f in dataclasses.fields(group) if f.init} <= set(named)


def filled_in(text):
    for name, value in (("model", "policy"), ("dataset", "prompts.jsonl"), ("reward", "my_rewards:short")):
        text, replaced = re.subn(rf"^{name}:.*$", f"{name}: {value}", text, flags=re.M)
        assert replaced == 1
    return text


NEEDS = {
    "entropy_denominator": "top_entropy_quantile: 0.2", "exact_k": "top_entropy_quantile: 0.2",
    "covariance": "loss_type: clip_cov", "gdpo_token_weighted": "multi_objective_aggregation: gdpo",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for options in train_help.OPTIONS.values() for name in options])
def test_each_line_of_the_template_may_be_used(tmp_path, name):
    text = filled_in(train_help.template()).replace(f"# {name}: ", f"{name}: ", 1)
    (tmp_path / "train.yaml").write_text(text + NEEDS.get(name, "") + "\n")
    _, config, _ = train.parse(["--config", str(tmp_path / "train.yaml"), "--use_cpu", "true"])
    assert name in ("model", "dataset", "reward", "dataset_split", "dataset_config") or hasattr(config, name)


def test_a_run_from_the_template(project):
    ran = rlloss(project, "train", "--init", "template.yaml")
    assert ran.returncode == 0 and ran.stdout == "template.yaml\n"
    again = rlloss(project, "train", "--init", "template.yaml")
    assert again.returncode == 2 and "--init: found 'template.yaml': File exists" in again.stderr
    file = project / "template.yaml"
    file.write_text(filled_in(file.read_text()))
    option = rlloss(project, "train", "--init", "--config")
    assert option.returncode == 2 and not (project / "--config").exists()
    options = {name: value for name, value in OPTIONS.items() if name not in ("model", "dataset")}
    ran = rlloss(
        project, "train", "--config", "template.yaml", *flags(**options | {"max_steps": 1}, output_dir="filled")
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert (project / "filled" / "model.safetensors").exists()


def test_an_error_is_two_lines(capsys, recwarn):
    assert cli.main(["train", "--learning_rate", "fast"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("usage: rlloss train --config") and "Error" not in lines[1]
    assert cli.main(["train", "--model", "a", "--dataset", "b", "--reward", "c", "--zero_advantage", "skip"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("rlloss train: error: zero_advantage: found 'skip'") and len(lines) == 2
    assert not [w for w in recwarn if w.category is FutureWarning]


def test_a_rerun_says_that_it_is_added(tmp_path, capsys):
    train._say_what_is_there(str(tmp_path))
    assert capsys.readouterr().err == ""
    (tmp_path / "metrics.jsonl").write_text("")
    train._say_what_is_there(str(tmp_path))
    assert "has the logs of an earlier run" in capsys.readouterr().err


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
