"""Draw the way of the data through the code as SVG, from the imports: `python -m docs.generate`."""

import html
from pathlib import Path

from tests.house.test_house import MODULES, ROOT, imports_of

FILE = Path(__file__).parent / "images" / "imports.svg"
# Floor by floor from above: a folder or file, and what goes in and comes out of it.
PLACES = [
    [
        ("rlloss.integrations.trl", "a trainer's batch -> tensors"),
        ("rlloss.integrations.transformers", "ids -> hidden states"),
    ],
    [("rlloss.modules", "GRPOLoss, LinearGRPOLoss: tensors -> loss, metrics")],
    [
        ("rlloss.lm_head", "hidden states -> logp, entropy; gradient"),
        ("rlloss.logits", "logits -> logp, entropy; gradient"),
    ],
    [("rlloss.losses", "logp, advantage -> loss, one coefficient a token")],
    [
        ("rlloss.rewards", "rewards -> advantages"), ("rlloss.tokens", "which count, are kept, are picked"),
        ("rlloss.entropy", "gauges, temperatures"),
    ],
    [("rlloss.backends", "triton, interpreter or torch")],
    [("rlloss.torch_kernels", "rows and tiles, in torch"), ("rlloss.kernels", "rows and tiles, in Triton")],
]  # fmt: skip
WIDTH, BOX, STEP = 860, 46, 94


def place_of(module: str) -> str | None:
    names = [name for row in PLACES for name, _ in row]
    return next((name for name in names if module == name or module.startswith(f"{name}.")), None)


def edges() -> dict[tuple[str, str], int]:
    """{(from, to): imports}."""
    found: dict[tuple[str, str], int] = {}
    for module in MODULES:
        for name, _ in imports_of(module):
            pair = place_of(module), place_of(name)
            if pair[0] and pair[1] and pair[0] != pair[1]:
                found[pair] = found.get(pair, 0) + 1
    return found


def imports() -> str:
    """An arrow is as thick as the imports are many; no arrow goes up."""
    at: dict[str, tuple[float, float, float]] = {}
    boxes = []
    for i, row in enumerate(PLACES):
        wide = WIDTH / len(row)
        for j, (name, text) in enumerate(row):
            x, y, w = wide * (j + 0.5), 26 + STEP * i, min(wide - 50, 400)
            at[name] = x, y, w
            files = sum(place_of(module) == name for module in MODULES)
            path = MODULES[name] if name in MODULES else ROOT / name.removeprefix("rlloss.")
            title = path.relative_to(ROOT).as_posix().removesuffix("/__init__.py") + f" ({files} files)" * (files > 1)
            boxes.append(
                f'<rect x="{x - w / 2:.0f}" y="{y}" width="{w:.0f}" height="{BOX}" rx="6" fill="#e8eef8"'
                ' stroke="#3b5b92"/>'
                f'<text x="{x:.0f}" y="{y + 19}" font-weight="600">{title}</text>'
                f'<text x="{x:.0f}" y="{y + 37}" font-size="12">{html.escape(text)}</text>'
            )
    arrows = []
    for (a, b), count in sorted(edges().items()):
        (x0, y0, _), (x1, y1, w1) = at[a], at[b]
        level = y0 == y1
        y0, y1 = (y0 + BOX / 2, y1 + BOX / 2) if level else (y0 + BOX, y1)
        x1 = x1 - (w1 / 2 if x1 > x0 else -w1 / 2) if level else x1 + max(-w1 / 3, min(w1 / 3, (x0 - x1) / 4))
        thick = min(6.0, 1 + count / 4)
        arrows.append(f'<path d="M{x0:.0f} {y0:.0f}L{x1:.0f} {y1:.0f}" stroke-width="{thick:.1f}"/>')
    height = 26 + STEP * len(PLACES)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="14" text-anchor="middle">\n'
        "<title>The folders of rlloss, floor by floor, and the imports between them</title>\n"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" orient="auto" '
        'markerUnits="userSpaceOnUse"><path d="M0 0L8 4L0 8z" fill="#7a8aa8"/></marker></defs>\n'
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#ffffff"/>\n'
        f'<g stroke="#7a8aa8" stroke-opacity="0.55" marker-end="url(#tip)">\n'
        + "\n".join(arrows)
        + '\n</g>\n<g fill="#17233c">\n' + "\n".join(boxes) + "\n</g>\n</svg>\n"
    )  # fmt: skip
