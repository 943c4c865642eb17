"""The blocks of the documentation run, its figures are generated, its links lead somewhere, its two languages agree."""

import collections
import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs import draw, generate
from rlloss.loss_types import LOSSES

ROOT = Path(__file__).resolve().parents[2]
FILES = [*sorted(ROOT.glob("README*.md")), ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
CHINESE = {page: page.replace("docs/zh/", "docs/") for page in PAGES if page.startswith("docs/zh/")} | {
    "README.zh-CN.md": "README.md", "docs/zh/quickstart.md": "docs/trl.md"
}  # fmt: skip
CHINESE.pop("docs/zh/index.md", None)  # a line that stands for README.zh-CN.md
FENCE = re.compile(r"^```([\w{}-]*)\n(.*?)^```", re.M | re.S)


def blocks(page, language):
    return [code for name, code in FENCE.findall(PAGES[page]) if name == language]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in CHINESE])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """From top to bottom: a block may go on where the one before it ends."""
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLLOSS_BACKEND", "torch")
    names: dict = {}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), names)


def test_there_are_blocks_to_run():
    assert len(blocks("README.md", "python")) >= 2
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 30


def commands():
    """(page, line) of every shell command; a trailing comment and a continued line are part of it."""
    for page in PAGES:
        for code in blocks(page, "bash"):
            for line in code.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield page, re.sub(r"\s+#.*", "", line).strip()


def test_every_shell_command_is_run_by_a_test_or_exists():
    """README's are run by test_first_hour.py, examples by tests/examples; of the others the program has to exist."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    subcommands = subprocess.run([sys.executable, "-m", "rlloss.cli", "--help"], capture_output=True, text=True).stdout
    wrong = []
    for page, line in commands():
        words = [word for word in line.split() if not re.match(r"[A-Z_]+=", word)]
        program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
        if program == "make":
            fine = rest[0] in targets
        elif program == "rlloss":
            fine = rest[0].startswith("--") or f" {rest[0]} " in subcommands
        elif program in ("python", "accelerate", "torchrun"):
            script = next(word for word in rest if word.endswith(".py") or word in ("-c", "-m"))
            module = rest[rest.index("-m") + 1] if script == "-m" else ""
            fine = script == "-c" or (bool(importlib.util.find_spec(module)) if module else (ROOT / script).is_file())
        elif program.startswith("benchmarks/"):
            fine = (ROOT / program).is_file()
        else:
            fine = program in ("pip", "python3", "git", "cd", ".")
        if not fine:
            wrong.append(f"{page}: {line}")
    assert not wrong


def test_yaml_is_valid():
    yaml = pytest.importorskip("yaml")
    assert all(yaml.safe_load(code) for page in PAGES for code in blocks(page, "yaml"))


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(page):
    """(target as written, file, anchor) of the links within the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", FENCE.sub("", PAGES[page]))):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            yield target, ((ROOT / page).parent / file if file else ROOT / page).resolve(), anchor


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    wrong = [
        target
        for target, file, anchor in links(page)
        if not file.is_file() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8")))
    ]
    assert not wrong


def reached(page):
    return {file.relative_to(ROOT).as_posix() for _, file, _ in links(page)} & set(PAGES)


def test_every_page_is_two_clicks_from_the_front_page():
    first = reached("README.md")
    assert set(PAGES) - {"docs/index.md"} <= first.union(*map(reached, first)) | {"README.md"} | {
        page for page in PAGES if page in ("docs/changelog.md", "docs/contributing.md", "docs/zh/index.md")
    }
    assert len(PAGES["README.md"].splitlines()) <= 180


def test_a_question_of_the_faq_has_an_answer_with_a_link():
    assert "docs/faq.md" in reached("README.md")
    _, *answers = re.split(r"^##+ .*\?$", PAGES["docs/faq.md"], flags=re.M)
    assert len(answers) >= 14 and sum("](" in answer for answer in answers) >= 10


def test_what_is_generated_is_up_to_date():
    """`python -m docs.generate` writes it."""
    shown = {path.relative_to(ROOT).as_posix() for path in generate.pages()}
    assert {"README.md", "docs/performance.md", *(f"docs/losses/{name}.md" for name in LOSSES)} <= shown
    named = {name for page in shown for _, name, _ in generate.BLOCK.findall(PAGES[page])}
    assert named == set(generate.BLOCKS)
    for page in shown:
        assert generate.filled(PAGES[page]) == PAGES[page], page
    assert draw.imports() == draw.FILE.read_text(encoding="utf-8")


def test_a_page_of_a_loss_explains_each_of_its_settings():
    for name, row in LOSSES.items():
        table = "\n".join(generate.settings(name))
        assert all(f"`{setting}" in table for setting in row.reads), name


def test_the_options_of_the_remedies_exist():
    pytest.importorskip("trl")
    from rlloss.integrations.trl.config import GRPOConfig

    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \|", PAGES["docs/remedies.md"], re.M)
    options = {name for row in rows for name in re.findall(r"`?\b([a-z_]+)=", row) if '": ' not in name}
    assert len(options) >= 12 and options <= {field.name for field in dataclasses.fields(GRPOConfig)}


def numbers(text):
    """Of the prose; those that stand for an order, such as "1." of a list, too."""
    text = re.sub(r"\]\([^)]*\)|<!--.*?-->", "", FENCE.sub("", text))
    return collections.Counter(re.findall(r"\d+(?:[.,]\d+)*", text))


@pytest.mark.parametrize("page", CHINESE)
def test_the_chinese_pages_say_what_the_english_ones_say(page):
    """The same headings, blocks and numbers."""
    ours, theirs = PAGES[page], PAGES[CHINESE[page]]
    levels = [[len(found) for found in re.findall(r"^(#+) ", FENCE.sub("", text), re.M)] for text in (ours, theirs)]
    assert levels[0] == levels[1]
    assert FENCE.findall(ours) == FENCE.findall(theirs)
    assert numbers(ours) == numbers(theirs)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_searched_offline(tmp_path):
    pytest.importorskip("furo", reason="`make docs` installs what builds the site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    if not (chromium := shutil.which("chromium") or shutil.which("chromium-browser")):
        pytest.skip("the site was built, but there is no Chromium to search it")
    for query, page in (
        ("static_capacity", "own-loop.html"),
        ("熵崩溃", "zh/remedies.html"),
        ("崩溃", "zh/concepts.html"),
    ):
        browser = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom"]
        url = f"{(tmp_path / 'search.html').as_uri()}?q={query}"
        found = subprocess.run([*browser, url], capture_output=True, text=True, timeout=120).stdout
        assert f'<a href="{page}' in found, (query, re.findall(r'<a href="([^"]*)" data-score', found))
