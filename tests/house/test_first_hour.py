"""Run a newcomer's first hour with the lines of the README: install into an empty environment, look, train, report."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
INSTALL, LOOK, TRAIN = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
pytestmark = pytest.mark.slow


def clone(to):
    """The files of this checkout, as a clone would have them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).exists() or (ROOT / name).is_symlink():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name, follow_symlinks=False)


class Newcomer:
    """A shell in the folder of the clone, without anything of this environment."""

    def __init__(self, here):
        self.here, self.said = here, ""
        python = here / "bin" / "python3"  # as in a fresh shell, without the environment of the tests
        python.parent.mkdir()
        python.symlink_to(getattr(sys, "_base_executable", sys.executable))
        kept = ("HOME", "LANG", "TMPDIR", *(name for name in os.environ if name.startswith(("PIP_", "SSL_"))))
        self.environment = {name: os.environ[name] for name in kept if name in os.environ}
        self.environment["PATH"] = f"{here / 'env' / 'bin'}:{python.parent}:/usr/local/bin:/usr/bin:/bin"
        # The versions under test. Otherwise pip installs the newest, including torch with CUDA.
        self.environment["PIP_CONSTRAINT"] = str(here / "rlloss" / "constraints.txt")

    def runs(self, script, status=0, timeout=900):
        done = subprocess.run(
            ["bash", "-e", "-c", script], cwd=self.here, env=self.environment, capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip
        assert done.returncode == status, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    here = tmp_path_factory.mktemp("home")
    clone(here / "rlloss")
    newcomer = Newcomer(here)
    newcomer.said = newcomer.runs(INSTALL)
    return newcomer


def test_it_installs_and_the_doctor_finds_nothing(newcomer):
    assert "rlloss 0.1.0" in newcomer.runs("rlloss --version")
    assert "torch" in newcomer.said and "what to do" not in newcomer.said


def test_it_imports_beside_the_clone(newcomer):
    found = newcomer.runs("python -c 'import rlloss; print(rlloss.__version__, rlloss.GRPOLoss.__name__)'")
    assert found.split() == ["0.1.0", "GRPOLoss"]


def test_the_pythons_run_as_one_script(newcomer):
    (newcomer.here / "blocks.py").write_text("\n".join([*PYTHON, "print(loss.item(), *metrics)"]))
    assert "surrogate" in newcomer.runs("python blocks.py")


def test_the_look_first(newcomer):
    said = newcomer.runs(LOOK)
    assert "recompute" in said and (newcomer.here / "rlloss_demo" / "report.html").is_file()


FILL_IN = """
import json
from rlloss.integrations.trl.demo import task
task.make_model().save_pretrained("model")
task.make_tokenizer().save_pretrained("model")
with open("prompts.jsonl", "w") as file:
    for row in list(task.make_dataset(task.make_problems()[0]))[:64]:
        file.write(json.dumps(row) + "\\n")
"""


def test_training_from_the_template_and_a_page_of_two_runs(newcomer):
    here = newcomer.here
    init, *rest = TRAIN.strip().splitlines()
    newcomer.runs(init)
    template = (here / "train.yaml").read_text()
    (here / "make.py").write_text(FILL_IN)
    newcomer.runs("python make.py")
    (here / "rewards.py").write_text(
        textwrap.dedent(
            """
            def short(completions, **columns):
                return [-float(len(text)) for text in completions]
            """
        )
    )
    filled = template
    for name, value in (("model", "model"), ("dataset", "prompts.jsonl"), ("reward", "rewards:short")):
        filled, replaced = re.subn(rf"^{name}:.*$", f"{name}: {value}", filled, flags=re.M)
        assert replaced == 1, f"the template has no line {name}:"
    filled += "\nmax_steps: 2\nnum_generations: 4\nper_device_train_batch_size: 8\nmax_completion_length: 8\n"
    filled += "use_cpu: true\ntoken_log_steps: 1\nlogging_steps: 1\n"
    names = re.findall(r"^(\w+):", filled, re.M)
    for name in {name for name in names if names.count(name) > 1}:  # the template sets it too: keep the later line
        filled = re.sub(rf"^{name}:.*\n", "", filled, count=1, flags=re.M)
    (here / "train.yaml").write_text(filled)
    said = [newcomer.runs(line) for line in rest]
    assert all("had a gradient" in output for output in said[:2])
    page = (here / said[-1].strip().splitlines()[-1]).read_text()
    assert "plain" in page and "kept" in page

    wrong = newcomer.runs(rest[1].replace("top_entropy_quantile", "top_entropy_quantil"), status=2)
    assert "did you mean" in wrong and "top_entropy_quantile" in wrong


def test_the_plan_that_is_shown_is_what_the_command_says(newcomer):
    (command,) = (line for line in LOOK.splitlines() if line.startswith("rlloss plan"))
    page = (ROOT / "docs" / "lm-head.md").read_text()
    (shown,) = re.findall(r"^```text\n\$ (rlloss plan .*?)^```", page, re.M | re.S)
    assert shown.splitlines() == [command, *newcomer.runs(command).splitlines()]


def test_a_machine_can_read_the_plan_too(newcomer):
    (command,) = (line for line in LOOK.splitlines() if line.startswith("rlloss plan"))
    assert isinstance(json.loads(newcomer.runs(f"{command} --json")), dict)
