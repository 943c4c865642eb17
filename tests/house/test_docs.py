"""What README.md and docs/ show runs, their numbers are those measured, and their links lead somewhere."""

import dataclasses
import json
import re
import statistics
from pathlib import Path

import pytest

from tests.rewards.test_advantages import markdown_tables
from tests.rewards.test_resolution import markdown

ROOT = Path(__file__).resolve().parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
RESULTS = ROOT / "benchmarks/results/cpu-2-cores"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [README, *sorted(DOCS.glob("*.md"))]}
REMEDIES = PAGES["docs/remedies.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if BLOCK.search(text)])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """From top to bottom: a block may go on where the one before it ends."""
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLLOSS_BACKEND", "torch")
    names: dict = {}
    for code in BLOCK.findall(PAGES[page]):
        exec(compile(code, page, "exec"), names)


def test_there_are_blocks_to_run():
    assert len(BLOCK.findall(PAGES["README.md"])) >= 2
    assert sum(len(BLOCK.findall(text)) for text in PAGES.values()) >= 8


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            wrong.append(target)
    assert not wrong


def test_the_front_page_links_to_every_page_and_is_short():
    text = PAGES["README.md"]
    assert [page for page in PAGES if page != "README.md" and f"]({page})" not in text] == []
    assert len(text.splitlines()) <= 180


def test_the_figures_of_the_front_page_are_those_measured():
    entries = json.loads((RESULTS / "step.json").read_text())["result"]["contenders"]
    ms = {name: 1e3 * statistics.median(entries[name]["seconds"]) for name in ("TRL", "rlloss forward_only")}
    mib = {name: entries[name]["peak_bytes"] / 2**20 for name in ms}
    said = ", ".join(
        f"{label} {ms[name]:,.0f} ms and {mib[name]:,.0f} MiB"
        for label, name in (("TRL", "TRL"), ("rlloss", "rlloss forward_only"))
    )
    assert said in PAGES["README.md"]
    assert all(max(entries[name]["errors"].values()) < 1e-6 for name in ms if name != "TRL")


def test_the_options_of_the_remedies_exist():
    pytest.importorskip("trl")
    from rlloss.integrations.trl.config import GRPOConfig

    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \|", REMEDIES, re.M)
    options = {name for row in rows for name in re.findall(r"`?\b([a-z_]+)=", row) if '": ' not in name}
    assert len(options) >= 12 and options <= {field.name for field in dataclasses.fields(GRPOConfig)}


def test_the_table_of_resolution_is_the_one_computed():
    assert markdown() in REMEDIES


def test_the_comparison_shown_is_the_one_that_was_run():
    run = (RESULTS / "demo_full.md").read_text()
    section = PAGES["docs/demo.md"]
    shown = re.findall(r"\d\.\d+ ± \d\.\d+", section)
    assert len(shown) == 3 * 13 and all(cell in run for cell in shown)
    differences = re.findall(r"[+-]\d\.\d{3}(?: \*)?", section)
    assert len(differences) == 3 * 12 and all(f"| {cell} |" in run for cell in differences)


def test_the_heads_of_real_models_are_those_measured():
    """The cells of the table are the medians of hidden.json, in ms, at rho 0.2 and 1."""
    results = json.loads((RESULTS / "hidden.json").read_text())["results"]
    section = PAGES["docs/performance.md"].split("## The heads of real models")[1].split("\n\n")[2]
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


def test_the_advantages_shown_are_those_computed():
    shown = {line for line in PAGES["docs/rewards.md"].splitlines() if re.match(r"\| \d \| \(\d, \d\) \|", line)}
    assert len(shown) == 4 + 6
    assert shown <= set(markdown_tables().splitlines())
