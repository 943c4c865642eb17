"""Sphinx builds the site from the pages of this folder and the docstrings: `make docs`."""

import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.search import languages
from sphinx.search.en import SearchEnglish
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rlloss  # noqa: E402

project, author, copyright = "rlloss", "The rlloss authors", "The rlloss authors, Apache-2.0"
version = release = rlloss.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
nitpicky = True  # a missing reference is an error under -W, but for types of other libraries
nitpick_ignore_regex = [(r"py:.*", r"(?!rlloss\b).*|.*\.LmHead")]

html_theme, html_title = "furo", "rlloss"
html_static_path, html_css_files = ["static"], ["site.css"]
html_show_sourcelink = html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # the same as those of GitHub
html_math_renderer = "mathml"
default_role = "code"  # `x` in a docstring
nb_execution_mode = "off"  # the notebook is stored with its outputs
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False

# Files of the repository that are pages of the site too, in the place of the line that links to them.
FILES = {
    "index": "README.md", "changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md", "zh/index": "README.zh-CN.md"
}  # fmt: skip
PAGES = {file: page for page, file in FILES.items()}
# Code is left as it is.
LINK = re.compile(r"^```.*?^```|`[^`\n]+`|\]\((?!https?:|#)([^)\s]+)\)", re.M | re.S)


def as_a_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Links as the site needs them: to pages as pages, also where these are files at the root; else to files."""
    here = (ROOT / FILES.get(page, f"docs/{page}")).parent

    def link(found: re.Match) -> str:
        if found[1] is None:
            return found[0]
        path, _, anchor = found[1].partition("#")
        target = (here / path).resolve().relative_to(ROOT).as_posix()
        of_site = f"{PAGES[target]}.md" if target in PAGES else target.removeprefix("docs/")
        if target in PAGES or target.startswith("docs/"):
            return f"](/{of_site}{'#' * bool(anchor)}{anchor})"
        return f"]({'path:' * target.endswith('.md')}/../{target})"

    text = source[0]
    if page in FILES:
        text = (ROOT / FILES[page]).read_text(encoding="utf-8")
        text += source[0] * (page == "index")
    source[0] = LINK.sub(link, text)


def language_of_the_page(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    if page.startswith("zh/"):
        context["language"] = "zh-CN"


CJK = r"[\u3400-\u9fff]"


class EnglishAndChinese(SearchEnglish):
    """Chinese is written without spaces: it is found by pairs of neighbouring characters."""

    js_splitter_code = """
function splitQuery(query) {
  return query.split(/[^\\p{L}\\p{N}_]+/u).filter(Boolean).flatMap(word => word
    .split(/([\\u3400-\\u9fff]+)/u).filter(Boolean).flatMap(part => !/[\\u3400-\\u9fff]/u.test(part) || part.length < 2
      ? [part] : [...part].slice(1).map((c, i) => [...part][i] + c)));
}
"""

    def split(self, input: str) -> list[str]:
        words = []
        for part in re.split(f"({CJK}+)", input):
            chinese = re.match(CJK, part)
            words += [a + b for a, b in zip(part, part[1:], strict=False)] or [part] if chinese else super().split(part)
        return words

    def word_filter(self, word: str) -> bool:
        return bool(re.match(CJK, word)) or super().word_filter(word)


def formula(visitor, node: nodes.math | nodes.math_block) -> None:
    """MathML, which browsers draw without a script from elsewhere."""
    try:
        visitor.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    except MathError as error:
        logging.getLogger(__name__).warning("formula: %s", error, location=node)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    languages["en"] = EnglishAndChinese
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("source-read", as_a_page)
    app.connect("html-page-context", language_of_the_page)
