"""What README.md and docs/ show runs, their numbers are those measured, and their links lead somewhere."""

import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks.report import pages
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


def test_the_figures_are_those_measured():
    """`python -m benchmarks.report.pages` writes them."""
    shown = {path.relative_to(ROOT).as_posix() for path in pages.pages()}
    assert {"README.md", "docs/performance.md"} <= shown
    for page in shown:
        assert pages.filled(PAGES[page]) == PAGES[page], page


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


def test_the_advantages_shown_are_those_computed():
    shown = {line for line in PAGES["docs/rewards.md"].splitlines() if re.match(r"\| \d \| \(\d, \d\) \|", line)}
    assert len(shown) == 4 + 6
    assert shown <= set(markdown_tables().splitlines())
