"""Write runs by hand, make their pages, and parse a page."""

import base64
import json
from html.parser import HTMLParser

from rlloss.report.run_report import write_run_report

VOID = {"meta", "line", "circle", "path", "br", "input"}
HOSTILE = (
    "</script><script>alert(1)</script>", "<!--", "<img src=x onerror=alert(1)>", "\u2028", "\ud800", "\x00",
    "\x1b[31m", "\u202eabc", "\n", "a\n\nb", "\t", "", "'\"&amp;", "  ", "😀", "e\u0301", "日本語", "`${x}`",
    "__proto__",
)  # fmt: skip


def completion(tokens=("a", "b"), *, step=1, prompt="p", entropy=None, state=None, advantage=0.5, rewards=None):
    """A line of tokens/*.jsonl."""
    return {
        "step": step,
        "prompt": prompt,
        "tokens": list(tokens),
        "entropy": [0.0] * len(tokens) if entropy is None else entropy,
        "state": "l" * len(tokens) if state is None else state,
        "advantage": advantage,
        "rewards": {} if rewards is None else rewards,
    }


def make_run(folder, completions=None, metrics=None):
    """Write a run. completions: lines, or {file: lines}. A line is an object or a literal text."""
    if completions is not None:
        files = completions if isinstance(completions, dict) else {"process-00000.jsonl": completions}
        (folder / "tokens").mkdir(parents=True, exist_ok=True)
        for name, lines in files.items():
            _write(folder / "tokens" / name, lines)
    if metrics is not None:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "metrics.jsonl", metrics)
    return folder


def _write(path, lines):
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")


class Page(HTMLParser):
    """The elements and texts of a page. Elements must be closed in order. data: the data that its script reads."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.elements, self.text = [], [], {}
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.data = json.loads(self.text["script"][0])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def find(self, tag, **attrs):
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attrs.items())]

    def completions(self):
        """The completions as lines of tokens/*.jsonl, with the advantage as on the page."""
        data, lines = self.data, []
        for step, prompt, advantage, rewards, _, _, tokens, entropy, state, _ in data["completions"]:
            lines.append({
                "step": step,
                "prompt": data["prompts"][prompt],
                "tokens": [data["texts"][i] for i in integers(tokens, 4 if data["wide"] else 2)],
                "entropy": [None if q == data["missing"] else q / data["scale"] for q in integers(entropy, 2)],
                "state": state,
                "advantage": advantage,
                "rewards": dict(zip(data["rewards"], rewards, strict=True)),
            })  # fmt: skip
        return lines


def integers(text, width):
    data = base64.b64decode(text)
    return [int.from_bytes(data[i : i + width], "little") for i in range(0, len(data), width)]


def page_of(run, **options):
    return Page(write_run_report(run, **options))
