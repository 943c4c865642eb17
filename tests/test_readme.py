"""What the README shows runs."""

import dataclasses
import json
import re
import statistics
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


def test_the_heads_of_real_models_are_those_measured():
    """The cells of the table are the medians of hidden.json, in ms, at rho 0.2 and 1."""
    results = json.loads((README.parent / "benchmarks/results/cpu-2-cores/hidden.json").read_text())["results"]
    section = README.read_text().split("**At the heads of real models**")[1].split("\n\n")[1]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines())
    names = ("rlloss", "TRL", "naive", "torch.compile", "bare 1 + 2r")
    assert len(rows) == len(names) and len(header) == 5
    for name, (_, *cells) in zip(names, rows, strict=True):
        for model, cell in zip(header[1:], cells, strict=True):
            found = []
            for rho in (0.2, 1.0):
                (r,) = (r for r in results if (r["model"], r["rho"], r["fill"]) == (model, rho, 1.0))
                if r["status"] != "measured":
                    found.append("not measured")
                    continue
                entry = (r["peers"] | r["bare"])[name]
                both = [f + b for f, b in zip(entry["forward"], entry["backward"], strict=True)]
                found.append(f"{1e3 * statistics.median(both):.0f}")
            assert cell == ", ".join(found), (name, model)


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 2


def test_the_advantages_shown_are_those_computed():
    shown = {line for line in README.read_text().splitlines() if re.match(r"\| \d \| \(\d, \d\) \|", line)}
    assert len(shown) == 4 + 6
    assert shown <= set(readme_tables().splitlines())
