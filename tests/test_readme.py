"""What the README shows runs."""

import re
from pathlib import Path

import pytest
from test_advantages import readme_tables

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.splitlines()[0])
def test_python_blocks_run(code, tmp_path, monkeypatch, capsys):
    if "trl_grpo" in code:
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 2


def test_the_advantages_shown_are_those_computed():
    shown = {line for line in README.read_text().splitlines() if re.match(r"\| \d \| \(\d, \d\) \|", line)}
    assert len(shown) == 4 + 6
    assert shown <= set(readme_tables().splitlines())
