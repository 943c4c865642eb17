"""Test the report page: it is well formed, self-contained and escaped, and names missing values."""

import math
import os
import re
from pathlib import Path

import pytest

from rlloss.report import Arm, Panel, Table, replace_file, smooth, ticks, write_report
from tests.support.run_pages import Page

HOSTILE = "</script><script>alert(1)</script> & \"quoted\" 'arm'"
PANELS = [Panel("entropy", "Entropy", "nats"), Panel("clip", "Clipped", low=0.0)]


def arm(name="plain", **series):
    lengths = {len(v) for v in series.values()}
    return Arm(name, list(range(1, max(lengths) + 1)), series)


def write(tmp_path, arms, **options):
    path = write_report(tmp_path / "deep" / "report.html", arms, **{"panels": PANELS, "title": "A run", **options})
    return Page(path)


def test_every_text_is_escaped(tmp_path):
    hostile = Arm(HOSTILE, [1, 2], {"entropy": [1.0, 2.0], HOSTILE: [0.0, 1.0]}, settings=HOSTILE, note=HOSTILE)
    table = Table(["x", HOSTILE], [[HOSTILE, HOSTILE]], HOSTILE)
    page = write(
        tmp_path, [hostile], panels=[PANELS[0], Panel(HOSTILE, HOSTILE, HOSTILE)], title=HOSTILE, tables=[table],
        paragraphs=[HOSTILE], command=HOSTILE,
    )  # fmt: skip
    assert "alert" not in "".join(page.text["script"][1:])
    assert len(page.find("script")) == 2
    assert page.text["h1"] == [HOSTILE] and page.text["td"] == [HOSTILE] and page.text["code"] == [HOSTILE]
    assert page.data["lines"][0][0][0] == HOSTILE


def test_nothing_is_fetched(tmp_path):
    page = write(tmp_path, [arm(entropy=[1.0, 2.0], clip=[0.0, 0.1])])
    assert not re.search(r"https?:|@import|url\(", page.source)
    for tag, attrs in page.elements:
        assert tag not in {"link", "img", "iframe"} and not {"src", "href"} & attrs.keys(), tag
    policy = page.find("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'")


def test_gaps_are_gaps(tmp_path):
    values = [1.0, None, 3.0, 3.5, math.nan, math.inf, 2.0]
    page = write(tmp_path, [arm(entropy=values)], panels=PANELS[:1])
    raw = page.find("path", **{"class": "raw arm0 line0"})[0]["d"]
    assert raw.count("M") == 3 and raw.count("L") == 1  # 1 | 3, 3.5 | 2
    assert len(page.find("circle")) == 2  # the lone points
    assert "nan" not in raw and "inf" not in raw
    assert page.data["lines"][0][0][2] == [1.0, None, 3.0, 3.5, None, None, 2.0]


def test_points_lie_where_their_values_say(tmp_path):
    page = write(tmp_path, [arm(clip=[0.0, 0.5, 1.0])], panels=[Panel("clip", "Clipped", low=0.0, high=1.0)])
    numbers = [float(n) for n in re.findall(r"[\d.]+", page.find("path", **{"class": "raw arm0 line0"})[0]["d"])]
    assert numbers == [52.0, 216.0, 280.0, 114.0, 508.0, 12.0]  # left bottom, middle, right top of the plot


def test_what_an_arm_lacks_is_said(tmp_path):
    page = write(tmp_path, [arm("one", entropy=[1.0], clip=[0.1]), arm("two", entropy=[1.0], clip=[None])])
    assert "not measured: two" in page.text["p"]


def test_arms_keep_one_colour_and_the_note_is_shown(tmp_path):
    first, second = arm("one", entropy=[1.0, 2.0]), Arm("two", [1, 2], {"entropy": [2.0, 1.0]}, note="inactive: clip")
    page = write(tmp_path, [first, second], panels=PANELS[:1])
    assert [a["class"] for a in page.find("i")] == ["arm0", "arm1"] * 2  # of the page and of the chart
    drawn = {f"{kind} arm{n} line{n}" for kind in ("raw", "mean") for n in (0, 1)}
    assert {a["class"] for a in page.find("path")} == drawn
    assert page.text["strong"] == ["inactive: clip"]


def test_groups_are_sections_with_their_own_arms(tmp_path):
    arms = [Arm(name, [1.0, 2.0], {"entropy": [value, value]}) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    groups = [("First", ["a", "b"]), ("Second", ["a", "c"])]
    page = write(tmp_path, arms, panels=PANELS[:1], groups=groups)
    data = page.data
    assert [[values for _, _, values in of] for of in data["lines"]] == [
        [[1.0, 1.0], [2.0, 2.0]], [[1.0, 1.0], [3.0, 3.0]],
    ]  # fmt: skip
    assert [[name for name, _, _ in of] for of in data["lines"]] == [["a", "b"], ["a", "c"]]
    assert page.text["h2"][:2] == ["First", "Second"]
    with pytest.raises(ValueError, match="groups: found 'd', expected names of arms: a, b, c"):
        write(tmp_path, arms, panels=PANELS[:1], groups=[("First", ["d"])])


@pytest.mark.parametrize(
    ("arms", "panels", "message"),
    [
        ([], PANELS[:1], "arms: found none"),
        ([Arm("a", [1, 2], {"entropy": [1.0]})], PANELS[:1], r"'entropy' of arm 'a' has 1 values, expected 2"),
        ([Arm("a", [1], {"entropy": [1.0]})], PANELS, "found 'clip', expected a metric that an arm has: entropy"),
    ],
)
def test_bad_input_is_named(tmp_path, arms, panels, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "r.html", arms, panels=panels, title="A run")
    assert not (tmp_path / "r.html").exists()


def test_what_was_found_comes_first(tmp_path):
    page = write(tmp_path, [arm(entropy=[1.0], clip=[0.0])], found=["Entropy <rises>.", HOSTILE], tables=[Table(["a"])])
    assert page.text["li"][:2] == ["Entropy <rises>.", HOSTILE]
    assert page.source.index("Entropy &lt;rises&gt;.") < page.source.index("<table") < page.source.index("<svg")
    assert not write(tmp_path, [arm(entropy=[1.0], clip=[0.0])]).find("ul", **{"class": "found"})


def test_smooth_is_a_centred_mean_that_skips_gaps():
    assert smooth([1.0, 2.0, 6.0, None, 4.0], 3) == [1.5, 3.0, 4.0, None, 4.0]
    assert smooth([1.0, 5.0], 1) == [1.0, 5.0]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (1, 300, [100, 200, 300]), (-0.03, 0.07, [-0.02, 0, 0.02, 0.04, 0.06])],
)
def test_ticks_are_round_numbers_inside(low, high, expected):
    assert ticks(low, high, 5) == pytest.approx(expected)


@pytest.mark.parametrize(
    "argument", ["path", "arms", "panels", "title", "tables", "paragraphs", "command", "groups", "found"]
)
def test_an_argument_of_another_type_is_named(tmp_path, argument):
    right = {"path": tmp_path / "page.html", "arms": [arm(entropy=[1.0])], "panels": PANELS[:1], "title": "A run"}
    for wrong in (3, 1.5, b"x", object(), *([[3], "x"] if argument not in ("path", "title", "command") else [[3]])):
        with pytest.raises(TypeError, match=f"^{argument}: found .*(int|float|bytes|object|list|str), expected "):
            write_report(**{**right, argument: wrong})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["file", "nothing", "read-only"])
def test_a_link_is_replaced_and_its_target_left_alone(tmp_path, target):
    kept, path = tmp_path / "kept", tmp_path / "page.html"
    if target != "nothing":
        kept.write_text("mine")
    if target == "read-only":
        kept.chmod(0o400)
    path.symlink_to(kept)
    replace_file(path, "é\ud800\n")
    assert not path.is_symlink() and path.read_bytes() == "é\\ud800\n".encode()
    assert kept.read_text() == "mine" if target != "nothing" else not kept.exists()
    assert {p.name for p in tmp_path.iterdir()} <= {"kept", "page.html"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "page.html"
    replace_file(path, b"old")
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    path.chmod(0o600)
    replace_file(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: '.*page.html'"):
        replace_file(path, "newer")
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_what_is_no_file_is_written_to_and_never_replaced(tmp_path):
    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path, "x")
    replace_file("/dev/null", "x")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(FileExistsError, match="file"):
        (tmp_path / "file").write_text("")
        replace_file(tmp_path / "file" / "page.html", "x")


def test_no_whole_file_is_written_another_way():
    """Covers the package and the benchmarks. Logs are appended to."""
    other = re.compile(
        r"\.write_text\(|\.write_bytes\(|savefig\((?!drawn)|open\([^)]*\bmode=|open\(\"[wx]|json\.dump\("
    )
    root = Path(__file__).resolve().parents[2]
    files = [path for folder in ("rlloss", "integrations", "benchmarks") for path in (root / folder).rglob("*.py")]
    files = [path for path in files if path.resolve().is_relative_to(root / path.relative_to(root).parts[0])]
    found = [f"{p.name}: {m[0]}" for p in files for m in other.finditer(p.read_text())]
    assert sorted(found) == ["charts.py: .write_bytes(", 'charts.py: open("x']
