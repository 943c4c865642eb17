"""The page of a run in a real browser: nothing throws, texts stay texts, and the view follows its controls.

Each check runs in a headless Chromium on a copy of the page that ends with a script of the test; what that script finds
it leaves in the document, which the browser prints. Skipped where there is no Chromium.
"""

import json
import os
import re
import shutil
import subprocess
from html import unescape

import pytest
from run_pages import HOSTILE, completion, make_run

from rlloss.report.run_report import STATES, write_run_report

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
const pager = () => document.querySelector(".pager").textContent;
const tokens = selector => all("#list article:first-child .t" + (selector ?? "")).map(t => t.textContent);
(async () => {
  const found = {};
  try { await (async () => {%s})(); } catch (error) { failures.push(String(error.stack)); }
  found.failures = failures;
  found.problem = document.getElementById("problem").textContent;
  found.requests = performance.getEntriesByType("resource").map(entry => entry.name);
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>"""


def look(tmp_path, run, script, *, hash="", clock="--virtual-time-budget=20000"):
    """What `script` found on the page of a run; nothing may have failed and nothing been requested.

    The clock is the browser's own, which does not wait; without it the page is printed once it is loaded.
    """
    page = write_run_report(run)
    source = page.read_text(encoding="utf-8")
    head, body = source.split("</head>", 1)
    page.write_text(head + WATCH + "</head>" + body.replace("</body>", CHECK % script + "</body>"), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
        *(["--no-sandbox"] if os.geteuid() == 0 else []), *([clock] if clock else []), "--dump-dom",
        page.as_uri() + hash,
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
        const svg = document.querySelector("svg[data-panel]"), box = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width * 280 / 520}));
        found.chart = document.querySelector(".values").textContent;
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
    assert found["chart"] == "step 22: entropy 0.04348"


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
        found.classes = all("#list article:first-child .t").slice(0, 2).map(t => t.className);
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
        "sections": ["Metrics", "Forking tokens", "Completions"],
        "charts": 0,
    }


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
