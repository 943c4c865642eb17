"""Test the page of a run in a real browser: no script throws, texts stay texts, and the view follows its controls.

Each check opens a copy of the page in a headless Chromium. The copy ends with a script of the test, which writes its
findings into the document, and the browser prints the document. Without Chromium these tests are skipped.
"""

import json
import os
import re
import shutil
import subprocess
from html import unescape

import pytest

from rlloss.report.run_report import STATES, write_run_report
from tests.support.run_pages import HOSTILE, completion, make_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"needs a browser: none of {', '.join(NAMES)} was found")

WATCH = """<script>
window.failures = [];
addEventListener("error", event => failures.push(event.message), true);
addEventListener("unhandledrejection", event => failures.push(String(event.reason)));
addEventListener("securitypolicyviolation", event => failures.push("refused: " + event.blockedURI));
window.alert = text => failures.push("alert: " + text);
</script>"""
CHECK = """<pre id="found"></pre><script>
const all = selector => [...document.querySelectorAll(selector)];
const settled = () => new Promise(done => setTimeout(done, 400));
const to = async hash => { location.hash = hash; await settled(); };
const click = async selector => { document.querySelector(selector).click(); await settled(); };
const write = async (name, text) => {
  const field = document.querySelector("#filters").elements[name];
  field.value = text;
  field.dispatchEvent(new Event("input", {bubbles: true}));
  await settled();
};
const facts = name => all("article header span").map(s => s.textContent).filter(t => t.startsWith(name + " "))
  .map(t => t.slice(name.length + 1));
const pager = () => document.querySelector(".pager").textContent.replace(/Show all$/, "");
const first = selector => [...document.querySelector("#list article").querySelectorAll(selector)];
const tokens = selector => first(".t" + (selector ?? "")).map(t => t.textContent);
const point = (svg, type, x) => {
  const box = svg.getBoundingClientRect();
  const at = {clientX: box.left + box.width * x / 520, clientY: box.top + 20};
  svg.dispatchEvent(new PointerEvent(type, {bubbles: true, ...at}));
};
(async () => {
  const found = {};
  try { await (async () => {%s})(); } catch (error) { failures.push(String(error.stack)); }
  found.failures = failures;
  found.problem = document.getElementById("problem").textContent;
  found.requests = performance.getEntriesByType("resource").map(entry => entry.name);
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>"""


def look(tmp_path, run, script, *, hash="", clock="--virtual-time-budget=20000", more=()):
    """Return the findings of `script` on the page of a run. Errors and network requests fail the test.

    `clock`: the browser's virtual clock, which does not wait. Without it the page is printed as soon as it is loaded.
    """
    page = write_run_report(run)
    source = page.read_text(encoding="utf-8")
    head, body = source.split("</head>", 1)
    page.write_text(head + WATCH + "</head>" + body.replace("</body>", CHECK % script + "</body>"), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
        *(["--no-sandbox"] if os.geteuid() == 0 else []), *([clock] if clock else []), "--dump-dom",
        *more, page.as_uri() + hash,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    text = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert text and text[1], f"the page did not come to its end: {done.stdout[-500:]} {done.stderr[-2000:]}"
    found = json.loads(unescape(text[1]))
    assert found.pop("failures") == [] and found.pop("problem") == "" and found.pop("requests") == []
    return found


def many(tmp_path, n=45):
    """Steps 0 to n - 1, reward k % 3, advantage -k; every fifth holds a " Wait" of high entropy."""
    lines = [
        completion([f"w{k}", " Wait" if k % 5 == 0 else " the", "!"], step=k, prompt=f"Prompt {k % 2}",
                   entropy=[0.0, 2.5 if k % 5 == 0 else 0.001, 0.1 * (k % 4)], state="lec", advantage=-k,
                   rewards={"right": float(k % 3), "other": None if k % 2 else 1.0})
        for k in range(n)
    ]  # fmt: skip
    return make_run(tmp_path / "run", lines, [{"step": k, "entropy": 1 / (k + 1), "loss": 0.5} for k in range(n)])


def test_pages_and_filters(tmp_path):
    found = look(tmp_path, many(tmp_path), """
        found.first = [pager(), facts("step")];
        await click(".pager button:nth-of-type(3)");
        found.next = [pager(), facts("step"), location.hash];
        await to("page=99");
        found.last = [pager(), facts("step")];
        await to("step=7");
        found.step = facts("step");
        await to("step=3-6&sort=advantage");
        found.steps = facts("advantage");
        await to("of=right&min=1&max=1&step=0-9");
        found.rewards = [facts("step"), facts("right"), document.querySelector("#filters").elements.of.value];
        await to("of=other&min=0&step=0-4");
        found.none = facts("step");
        await to("min=-4&max=-2");
        found.advantage = facts("step");
        await to("step=many");
        found.complaint = pager();
        await to("sort=entropy&step=5-9");
        found.entropy = facts("step");
        await click("#filters button[type=reset]");
        found.reset = [pager(), location.hash];
    """)  # fmt: skip
    twenty = [str(k) for k in range(20)]
    assert found["first"] == ["FirstPreviouspage 1 of 3NextLast45 of 45 completions", twenty]
    assert found["next"] == ["FirstPreviouspage 2 of 3NextLast45 of 45 completions", [str(k) for k in range(20, 40)],
                             "#page=2"]  # fmt: skip
    assert found["last"][0].startswith("FirstPreviouspage 3 of 3") and found["last"][1] == [
        "40",
        "41",
        "42",
        "43",
        "44",
    ]
    assert found["step"] == ["7"]
    assert found["steps"] == ["-3", "-4", "-5", "-6"]
    assert found["rewards"] == [["1", "4", "7"], ["1", "1", "1"], "right"]
    assert found["none"] == ["0", "2", "4"]
    assert found["advantage"] == ["2", "3", "4"]
    assert "Step: found many, expected a number, or two as in 3-7. 45 of 45" in found["complaint"]
    assert found["entropy"] == ["5", "7", "6", "9", "8"]
    assert found["reset"] == [found["first"][0], ""]


def test_a_link_opens_its_view(tmp_path):
    found = look(tmp_path, many(tmp_path), 'found.view = [pager(), facts("step")];', hash="#step=0-30&page=2")
    assert found["view"] == ["FirstPreviouspage 2 of 2NextLast31 of 45 completions", [str(k) for k in range(20, 31)]]


def test_search_forking_tokens_and_kinds(tmp_path):
    found = look(tmp_path, many(tmp_path), """
        await write("q", "W7 THE");
        found.search = [facts("step"), tokens(".hit"), location.hash];
        await write("q", " the!");
        found.end = tokens(".hit");
        await to("q=w7");
        found.begin = tokens(".hit");
        await write("q", "prompt 1");
        found.prompt = [pager(), tokens(".hit")];
        await write("q", "");
        const rows = () => all("#table tbody tr").map(row => [...row.cells].map(cell => cell.textContent));
        found.table = rows();
        await click("[data-by='1']");
        found.byCount = rows().map(row => row[1]);
        await click("[data-by='1']");
        found.byCountUp = rows().map(row => row[1]);
        await click("#table tbody tr:first-child a");
        found.token = [location.hash, pager(), facts("step"), tokens(".hit")];
        await click("button[data-only=c]");
        found.kind = [location.hash, tokens(".only"), all("button[aria-pressed=true]").map(b => b.dataset.only)];
        const over = new PointerEvent("pointerover", {bubbles: true});
        document.querySelector("#list .t:nth-of-type(2)").dispatchEvent(over);
        found.tip = [...document.getElementById("tip").children].map(line => line.textContent);
        point(document.querySelector("svg[data-panel]"), "pointermove", 280);
        found.chart = [...document.getElementById("point").children].map(line => line.textContent);
    """)  # fmt: skip
    assert found["search"] == [["7"], ["w7", " the"], "#q=W7+THE"]
    assert found["end"] == [" the", "!"] and found["begin"] == ["w7"]
    assert found["prompt"][0].endswith("22 of 45 completions") and found["prompt"][1] == []
    assert found["table"] == [
        ["␣Wait", "9", "2.500", "0 %"],
        ["!", "45", "0.147", "0 %"],
        ["␣the", "36", "0.001", "0 %"],
    ]
    assert found["byCount"] == ["45", "36", "9"] and found["byCountUp"] == ["9", "36", "45"]
    hash, pager, steps, hits = found["token"]
    assert hash == "#token=+Wait" and pager.endswith("9 of 45 completions with the token ␣Wait")
    assert steps == [str(k) for k in range(0, 45, 5)] and hits == [" Wait"]
    assert found["kind"] == ["#token=+Wait&only=c", ["!"], ["c"]]
    assert found["tip"] == ["␣Wait", "entropy 2.5000 nats", "dropped: " + STATES["e"][1], "token 2 of 3"]
    assert found["chart"] == ["step 22", "entropy 0.04348"]


def test_hostile_texts_stay_texts(tmp_path):
    n = len(HOSTILE)
    lines = [
        completion(HOSTILE, step=k, prompt=text, entropy=[None, *([0.5] * (n - 1))], state=("X" + "lcevdomp" * n)[:n],
                   rewards={text: 1.0})
        for k, text in enumerate(HOSTILE)
    ]  # fmt: skip
    metrics = [{"step": 1, **{text: 1.0 for text in HOSTILE if text}}]
    found = look(tmp_path, make_run(tmp_path / "<b>run&", lines, metrics), """
        found.tokens = tokens();
        found.classes = first(".t").slice(0, 2).map(t => t.className);
        found.prompts = all(".prompt").map(p => p.textContent);
        found.elements = all("img, main b b, main script, body > script").length;
        found.links = all("#table a").map(a => a.textContent);
        found.counts = [];
        for (let k = 0; k < found.links.length; k++) {
          await click(`#table tbody tr:nth-child(${k + 1}) a`);
          found.counts.push(facts("step").length);
        }
        await to("q=%3Cscript%3E");
        found.search = facts("step").length;
        found.title = document.title;
    """)  # fmt: skip
    shown = {"\u2028": "⟨U+2028⟩", "\ud800": "⟨U+D800⟩", "\x00": "⟨U+0000⟩", "\x1b[31m": "⟨U+001B⟩[31m",
             "\u202eabc": "⟨U+202E⟩abc", "\n": "⏎\n", "a\n\nb": "a⏎\n⏎\nb", "\t": "⇥\t", "": "∅"}  # fmt: skip
    assert found["tokens"] == [shown.get(text, text) for text in HOSTILE]
    assert found["classes"] == ["t hn s-unknown", "t h5 s-l"]
    in_prompt = {**shown, "\n": "\n", "a\n\nb": "a\n\nb", "": ""}
    assert found["prompts"] == [in_prompt.get(text, text) for text in HOSTILE]
    assert found["elements"] == 3  # the data, the script of the page and that of this test
    # A lone surrogate has no form in an address: its link finds nothing.
    without_row = 1 + lines[0]["state"].count("m")  # the first has no entropy
    assert sorted(found["counts"]) == [0, *[n] * (n - 1 - without_row)]
    assert found["search"] == len(HOSTILE)
    assert found["title"] == "rlloss: <b>run&"


def test_a_page_without_completions_and_one_without_metrics(tmp_path):
    script = 'found.sections = all("h2").map(h => h.textContent); found.charts = all("svg").length;'
    only_metrics = make_run(tmp_path / "a", metrics=[{"step": 1, "loss": 1.0}])
    assert look(tmp_path, only_metrics, script) == {"sections": ["Metrics", "Completions"], "charts": 1}
    only_tokens = make_run(tmp_path / "b", [completion()])
    assert look(tmp_path, only_tokens, script) == {
        "sections": ["Metrics", "Completions", "Forking tokens"],
        "charts": 0,
    }


def groups(tmp_path, name="run", steps=(0, 10)):
    """Two prompts with three completions each at every step, in a mixed order, with states of every kind."""
    lines = [
        completion(["a", "b", "c", "d"], step=step, prompt=f"P{k % 2}", entropy=[0.02, 0.3, 1.2, 2.5],
                   state="lcem" if k < 4 else "dddm", advantage=(k * 7) % 5 - 2, rewards={"right": float(k % 3 == 0)})
        for step in steps for k in range(6)
    ]  # fmt: skip
    metrics = [
        {"step": s, "entropy": 2.0 - s / 20, "entropy/p50": 0.5, "entropy/p80": 1.0, "entropy/p95": 1.5,
         "loss": 0.1, "rlloss/live_share": 0.25} for s in range(1, 21)
    ]  # fmt: skip
    return make_run(tmp_path / name, lines, metrics)


def test_what_teaches_is_seen_and_a_prompts_completions_stand_together(tmp_path):
    found = look(tmp_path, groups(tmp_path), """
        const looks = () => first(".t").map(t => getComputedStyle(t).backgroundColor);
        found.prompts = all(".group .prompt").map(p => p.textContent);
        found.advantages = facts("advantage");
        found.classes = first(".t").map(t => t.className.split(" ").filter(c => c === "faded" || c === "grey").join());
        found.taught = looks();
        await click("[name=solid]");
        found.solid = looks();
        found.hash = location.hash;
        await click("#filters button[type=reset]");
        found.again = looks();
        await to("sort=step");
        found.bystep = [all(".group").length, all("article .prompt").length];
    """)  # fmt: skip
    assert found["prompts"] == ["P0", "P1", "P0", "P1"]
    of_prompts = [[(k * 7) % 5 - 2 for k in range(first, 6, 2)] for first in (0, 1)]
    expected = [str(advantage) for of in of_prompts for advantage in sorted(of, reverse=True)]
    assert found["advantages"] == expected * 2
    assert sorted(found["classes"]) in (["", "faded", "faded", "grey"], ["grey"] * 4)
    assert found["taught"] == found["again"] != found["solid"] and "solid=1" in found["hash"]
    assert found["bystep"] == [0, 12]


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_every_token_is_readable(tmp_path, scheme):
    """The contrast of text and background by WCAG 2 is at least 4.5 to 1, also after a click dims the text."""
    found = look(tmp_path, groups(tmp_path), """
        const numbers = text => {
          const c = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
          c.fillStyle = text; c.fillRect(0, 0, 1, 1);
          return [...c.getImageData(0, 0, 1, 1).data];
        };
        const linear = x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
        const light = ([r, g, b]) => [r, g, b].map(x => linear(x / 255)).reduce(
          (sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
        const under = e => { for (; e; e = e.parentElement) {
          const c = numbers(getComputedStyle(e).backgroundColor);
          if (c[3] === 255) return c; } return [255, 255, 255]; };
        const worst = () => Math.min(...all("#list .t").map(t => {
          const [a, b] = [light(numbers(getComputedStyle(t).color)), light(under(t))].sort((x, y) => y - x);
          return (a + .05) / (b + .05);
        }));
        found.page = numbers(getComputedStyle(document.body).backgroundColor)[0];
        const colour = kind => getComputedStyle(document.querySelector("#list .t" + kind)).color;
        found.texts = [".s-l", ".faded", ".grey"].map(colour);
        found.plain = worst();
        await to("only=l");
        found.dimmed = worst();
        await to("token=c");
        found.hits = worst();
        await to("solid=1&colours=rank");
        found.rank = worst();
    """, more=[f"--blink-settings=preferredColorScheme={scheme}"])  # fmt: skip
    assert (found["page"] < 60) == (scheme == 0)
    live, *others = found["texts"]  # of little entropy, so that only the text can tell it from those that do not teach
    assert live not in others
    assert min(found[name] for name in ("plain", "dimmed", "hits", "rank")) >= 4.5


def test_colours_by_rank(tmp_path):
    found = look(tmp_path, groups(tmp_path), """
        const shades = () => first(".t").map(t => [...t.classList].find(c => /^h[0-9]$/.test(c)));
        const scales = () => all(".scale").map(s => getComputedStyle(s).display !== "none");
        found.absolute = [shades(), scales()];
        await to("colours=rank");
        found.rank = [shades(), scales(), document.querySelector("#filters").elements.colours.value];
    """)  # fmt: skip
    assert found["absolute"] == [["h1", "h4", "h6", "h8"], [True, False]]
    assert found["rank"][1:] == [[False, True], "rank"] and found["rank"][0] != found["absolute"][0]
    assert found["rank"][0][-1] == "h9"


def test_charts_switch_lines_move_nothing_and_lead_to_a_steps_completions(tmp_path):
    found = look(tmp_path, groups(tmp_path), """
        const svg = document.querySelector("svg[data-panel]"), figure = svg.closest("figure");
        const places = () => all("figure, section, .keys").map(e => e.getBoundingClientRect().top);
        found.keys = [...figure.querySelectorAll("button[data-line]")].map(b => b.textContent);
        const tops = {};
        for (const f of all("#metrics figure")) {
          const top = Math.round(f.getBoundingClientRect().top);
          (tops[top] ??= new Set()).add(Math.round(f.querySelector("svg").getBoundingClientRect().top));
        }
        found.rows_of_plots = Object.values(tops).map(of => of.size);
        found.bands = figure.querySelectorAll("path.band").length;
        const before = places();
        point(svg, "pointermove", 280);
        found.shown = !document.getElementById("point").hidden;
        found.moved = places().some((top, i) => top !== before[i]);
        const visible = e => getComputedStyle(e).display !== "none";
        const drawn = () => [...figure.querySelectorAll(".line0")].filter(visible).length;
        found.lines = [drawn()];
        figure.querySelector("[data-line='0']").click();
        found.lines.push(drawn());
        point(svg, "pointermove", 280);
        found.rows = [...document.getElementById("point").children].map(e => e.textContent);
        figure.querySelector("[data-line='0']").click();
        found.lines.push(drawn());
        point(svg, "click", 300);
        await settled();
        found.step = [location.hash, facts("step")];
        await click(".pager button:last-child");
        found.back = [location.hash, facts("step").length];
        const loss = all("figure").filter(f => f.textContent.includes("Loss"))[0];
        found.single = loss.querySelectorAll(".keys").length;
    """)  # fmt: skip
    assert found["keys"] == ["entropy", "entropy/p50", "entropy/p80", "entropy/p95"] and found["bands"] == 1
    assert set(found["rows_of_plots"]) == {1}
    assert found["shown"] and not found["moved"]
    assert found["lines"][0] == found["lines"][2] > found["lines"][1] == 0
    assert not any(row.startswith("entropy ") for row in found["rows"]) and len(found["rows"]) == 4
    assert found["step"] == ["#step=10", ["10"] * 6]
    assert found["back"] == ["", 12] and found["single"] == 0


def test_runs_over_one_another(tmp_path):
    first, second = groups(tmp_path, "a"), groups(tmp_path, "b", steps=(5,))
    (first / "run.json").write_text('{"model": "m", "options": {"epsilon_high": "0.28", "loss_type": "dapo"}}')
    (second / "run.json").write_text('{"model": "m", "device": "cpu", "options": {"loss_type": "dapo"}}')
    (second / "findings.jsonl").write_text('{"step": 7, "kind": "x", "message": "the entropy collapses."}\n')
    found = look(tmp_path, [first, second], """
        const buttons = document.querySelector("figure").querySelectorAll("button[data-line]");
        found.keys = [...buttons].map(b => b.textContent);
        found.titles = all("figcaption").map(e => e.firstChild.textContent.trim());
        found.table = all("table:not(#table) tbody tr").map(row => [...row.cells].map(c => c.textContent));
        found.said = all(".found li").map(li => li.textContent);
        found.marks = document.querySelector("svg").querySelectorAll(".mark title").length;
        found.all = pager();
        await write("run", "b");
        found.b = [facts("run"), facts("step")];
    """)  # fmt: skip
    assert found["keys"] == ["a", "b"]
    assert found["table"] == [["device", "unknown", "cpu"], ["epsilon_high", "0.28", "as TRL"]]
    assert found["titles"] == ["entropy", "rlloss/live_share", "loss", "entropy/p50", "entropy/p80", "entropy/p95"]
    assert "Step 7: the entropy collapses." in found["said"] and found["marks"] == 1
    assert "Entropy goes from 1.92 to 1.02 nats per token." in found["said"]
    assert found["all"].endswith("18 of 18 completions") and found["b"] == [["b"] * 6, ["5"] * 6]


def test_filters_fold_away_on_a_phone(tmp_path):
    script = """
        found.open = document.getElementById("filter-box").open;
        found.wide = document.documentElement.scrollWidth <= innerWidth;
        found.cards = all("figure, article, .found").every(e => e.scrollWidth <= e.clientWidth + 1);
    """
    run = groups(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "rewards/a_very_long_name_of_a_reward_function_that_somebody_wrote/mean": 1.0}\n')
    assert look(tmp_path, run, script, more=["--window-size=500,844"]) == {"open": False, "wide": True, "cards": True}
    assert look(tmp_path, run, script, more=["--window-size=1400,900"]) == {"open": True, "wide": True, "cards": True}


@pytest.mark.slow
def test_ten_thousand_completions_open_at_once(tmp_path):
    texts = [f"w{k} " for k in range(300)]
    lines = [
        completion([texts[(k * 7 + t * t) % 300] for t in range(200)], step=k, entropy=[t / 100 for t in range(200)])
        for k in range(10_000)
    ]
    run = make_run(tmp_path / "run", lines)
    script = 'found.opened = performance.now(); found.articles = all("article").length;'
    found = look(tmp_path, run, script, clock=None)
    assert found["articles"] == 20
    assert 0 < found["opened"] < 3000  # milliseconds; 250 were measured on two cores
    assert (run / "report.html").stat().st_size < 14 * 2**20
    found = look(tmp_path, run, 'await to("q=w299 w1"); found.some = pager();')
    matches = sum("w299 w1" in "".join(line["tokens"]) for line in lines)
    assert 0 < matches < 10_000 and f"{matches:,} of 10,000 completions" in found["some"]
