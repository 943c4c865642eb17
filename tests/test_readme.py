"""What the README shows runs."""

import dataclasses
import re
from pathlib import Path

import pytest
from test_advantages import readme_tables
from test_reward_resolution import markdown

README = Path(__file__).parents[1] / "README.md"
REMEDIES = README.parent / "docs" / "remedies.md"
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


def test_the_python_of_the_remedies_runs():
    (block,) = re.findall(r"^```python\n(.*?)^```", REMEDIES.read_text(), re.M | re.S)
    exec(compile(block, str(REMEDIES), "exec"), {})


def test_the_options_of_the_remedies_exist():
    pytest.importorskip("trl")
    from rlloss.integrations.trl_config import GRPOConfig

    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \|", REMEDIES.read_text(), re.M)
    options = {name for row in rows for name in re.findall(r"`?\b([a-z_]+)=", row) if '": ' not in name}
    assert len(options) >= 12 and options <= {field.name for field in dataclasses.fields(GRPOConfig)}


def test_the_table_of_resolution_is_the_one_computed():
    assert markdown() in REMEDIES.read_text()


def test_the_comparison_shown_is_the_one_that_was_run():
    run = (README.parent / "benchmarks/results/cpu-2-cores/demo_full.md").read_text()
    section = README.read_text().split("## What the demo shows")[1].split("\n## ")[0]
    shown = re.findall(r"\d\.\d+ ± \d\.\d+", section)
    assert len(shown) == 3 * 13 and all(cell in run for cell in shown)
    differences = re.findall(r"[+-]\d\.\d{3}(?: \*)?", section)
    assert len(differences) == 3 * 12 and all(f"| {cell} |" in run for cell in differences)


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 2


def test_the_advantages_shown_are_those_computed():
    shown = {line for line in README.read_text().splitlines() if re.match(r"\| \d \| \(\d, \d\) \|", line)}
    assert len(shown) == 4 + 6
    assert shown <= set(readme_tables().splitlines())
