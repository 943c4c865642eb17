"""The notebook runs from top to bottom, and it is stored as it was after such a run."""

import json
import re
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("trl")

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs/collapse.ipynb"
CELLS = [c for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CELLS]
SHOWS = re.compile(r"^(?:    )*(?:print\(|plt\.show\()", re.M)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_cells_run_in_order(tmp_path, monkeypatch, capsys):
    """With fewer steps than the notebook takes."""
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("RLLOSS_BACKEND", "torch")
    code, found = re.subn(r"^STEPS = \d+", "STEPS = 16", "\n".join(SOURCES), count=1, flags=re.M)
    assert found == 1
    plt.switch_backend("Agg")
    names: dict = {}
    try:
        exec(compile(code, NOTEBOOK.name, "exec"), names)
        assert len(plt.get_fignums()) == 3
    finally:
        plt.close("all")
    assert [len(run["logs"]) for run in names["runs"].values()] == [16] * 4
    assert "held-out prompts" in capsys.readouterr().out


def test_it_was_run_from_top_to_bottom():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    for cell, source in zip(CELLS, SOURCES, strict=True):
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert kinds <= {"stream", "display_data"}  # no error
        assert all(output.get("name") != "stderr" for output in cell["outputs"])
        assert bool(kinds) == bool(SHOWS.search(source))
        assert ("display_data" in kinds) == ("plt.show()" in source)


def test_it_is_small_and_names_no_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 500_000
    shown = json.dumps([[output.get("text") for output in cell["outputs"]] for cell in CELLS])
    assert not re.search(r"/(tmp|home|work|root|usr)/|site-packages", shown)
