"""What the README shows runs."""

import re
from pathlib import Path

import pytest
from test_advantages import readme_tables

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=lambda number: BLOCKS[number].splitlines()[0])
def test_python_blocks_run(number, tmp_path, monkeypatch, capsys):
    """A block may go on where the one before it ends."""
    if "trl" in BLOCKS[number]:
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLLOSS_BACKEND", "torch")
    names: dict = {}
    for code in (BLOCKS[number],) if "trl" in BLOCKS[number] else BLOCKS[: number + 1]:
        if code is BLOCKS[number] or "trl" not in code:
            exec(compile(code, str(README), "exec"), names)


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 2


def test_the_advantages_shown_are_those_computed():
    shown = {line for line in README.read_text().splitlines() if re.match(r"\| \d \| \(\d, \d\) \|", line)}
    assert len(shown) == 4 + 6
    assert shown <= set(readme_tables().splitlines())
