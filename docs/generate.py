"""Write the tables and figures of README.md and docs/ from results, settings and the code itself.

    python -m docs.generate

A page has `<!-- figures: NAME -->` where a block begins and `<!-- end -->` behind it; the lines between are rewritten.
`tests/house/test_docs.py` asserts that a rewrite changes nothing.
"""

import ast
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.report.pages import TABLES
from docs import draw
from rlloss import plan
from rlloss.loss_types import LOSSES, read_by_some
from rlloss.report import replace_file
from rlloss.rewards import resolution_table

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- figures: ([^>]+) -->\n).*?(<!-- end -->)", re.S)
DEMO = ROOT / "benchmarks" / "results" / "cpu-2-cores" / "demo_full.md"


def fields() -> dict[str, list[tuple[str, str, str]]]:
    """{class of rlloss/config.py: [(field, default, docstring)]}."""
    found = {}
    for node in ast.parse((ROOT / "rlloss" / "config.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            pairs = zip(node.body, node.body[1:], strict=False)
            found[node.name] = [
                (
                    ast.unparse(a.target),
                    ast.unparse(a.value or ast.Constant(None)),
                    " ".join(ast.literal_eval(b.value).split()),
                )
                for a, b in pairs
                if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)
            ]
    return found


def settings(loss_type: str) -> list[str]:
    """The settings that this loss reads and others may not."""
    row, of = LOSSES[loss_type], fields()
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name, default, text in of["LossConfig"]:
        if name not in row.reads:
            continue
        inner = of.get(f"{name.capitalize()}Config")
        for field, value, said in inner or [("", default, text)]:
            full = f"{name}.{field}" if inner else name
            if inner is None or full in row.reads or not read_by_some(full):
                value = "to be given" if row.caps_ratio and full == "epsilon_high" else f"`{value}`"
                lines.append(f"| `{full}` | {value} | {said.replace('|', chr(92) + '|')} |")
    return lines


def options_of_the_plugin() -> list[str]:
    """What GRPOConfig has beside TRL's options."""
    from rlloss.integrations.trl.config import PluginOptions

    lines = ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(PluginOptions):
        text = field.metadata["help"].replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{field.default!r}` | {text} |")
    return lines


def groups_of_rewards() -> list[str]:
    """What GRPO and GDPO tell apart of all groups of 2 binary rewards."""
    lines = ["| generations | groups of rewards | GRPO | GRPO without std | GDPO |", "|---:|---:|---:|---:|---:|"]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in resolution_table(2)]


def advantages(title: str) -> list[str]:
    from tests.rewards.test_advantages import markdown_tables

    return markdown_tables().partition(f"**{title}**\n\n")[2].partition("\n\n")[0].splitlines()


def arms_of_the_demo() -> list[str]:
    """The first cells of the tables of `rlloss demo --full`, side by side."""
    wanted = ("answer right", "format right", "entropy", "live share")
    cells: dict[str, list[str]] = {}
    titles = []
    for table in re.findall(r"(?:^\|.*\|\n)+", DEMO.read_text(encoding="utf-8"), re.M):
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        for i, title in enumerate(head):
            if title in wanted:
                titles += [title, "to plain"]
                for row in rows:
                    cells.setdefault(row[0], []).extend(row[i : i + 2])
    lines = [f"| arm | {' | '.join(titles)} |", "|---" + "|---:" * len(titles) + "|"]
    return lines + [f"| {arm} | {' | '.join(row)} |" for arm, row in cells.items()]


def plan_of_qwen() -> list[str]:
    costs = plan.head_costs(ROOT / "docs" / "qwen3-8b.json", completions=16, tokens=4096, rho=0.2, dtype="bf16")
    command = "rlloss plan rlloss/docs/qwen3-8b.json --completions 16 --tokens 4096 --rho 0.2 --dtype bf16"
    return ["```text", f"$ {command}", *str(costs).splitlines(), "```"]


BLOCKS: dict[str, Callable[[], list[str]]] = {
    **TABLES,
    **{f"settings of {name}": (lambda name=name: settings(name)) for name in LOSSES},
    "options of the plugin": options_of_the_plugin,
    "resolution": groups_of_rewards,
    "advantages of four": lambda: advantages("One group of four"),
    "advantages of three groups": lambda: advantages("Three groups of two"),
    "advantages of different rates": lambda: advantages("One group of four, rewards of different rates"),
    "arms of the demo": arms_of_the_demo,
    "plan": plan_of_qwen,
}


def filled(text: str) -> str:
    """A page with the contents of its blocks."""
    return BLOCK.sub(lambda m: m[1] + "\n".join(BLOCKS[m[2]]()) + "\n" + m[3], text)


def pages() -> list[Path]:
    """README.md in both languages, and all of docs/, where they have a block."""
    found = (*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md"))
    return sorted(path for path in found if BLOCK.search(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    for page in pages():
        replace_file(page, filled(page.read_text(encoding="utf-8")))
        print(page.relative_to(ROOT))
    replace_file(draw.FILE, draw.imports())
    print(draw.FILE.relative_to(ROOT))
