"""The page of a run: its style, its parts, and the script that shows completions a page at a time.

Texts of tokens and prompts only ever become the text of an element. The address's part after # is the state of the
view, such as #step=3-7&of=reward&min=1&page=2: a link to a view, which the browser's back button knows too.
"""

FORKING = """<section id="forking"><h2>Forking tokens</h2>
<p class="absent">Where the policy hesitates: the {rows} tokens of highest mean entropy among those that occur at least
{at_least} times. A click on a token shows it in its completions.</p>
<div class="scroll tall"><table id="table"><thead><tr>
<th scope="col"><button type="button" data-by="0">token</button></th>
<th scope="col"><button type="button" data-by="1">count</button></th>
<th scope="col" aria-sort="descending"><button type="button" data-by="2">mean entropy, nats</button></th>
<th scope="col"><button type="button" data-by="3">with a gradient</button></th>
</tr></thead><tbody></tbody></table></div>
</section>"""

COMPLETIONS = """<section id="completions"><h2>Completions</h2>
<div class="legend-box">
<div><b>Entropy</b> <small>in nats, and the share of tokens</small><ol class="scale">{scale}</ol></div>
<div><b>Tokens</b> <small>and their share; a click shows one kind alone</small><div class="kinds">{states}</div></div>
</div>
<form id="filters">
<label>Step <input name="step" size="8" placeholder="3 or 3-7" autocomplete="off"></label>
<label>Search <input name="q" type="search" size="18" placeholder="prompt or completion" autocomplete="off"></label>
<fieldset><label>Range of <select name="of"></select></label>
<label>from <input name="min" type="number" step="any"></label>
<label>to <input name="max" type="number" step="any"></label></fieldset>
<label>Order <select name="sort"><option value="">step</option>
<option value="entropy">mean entropy, highest first</option>
<option value="live">with a gradient, most first</option><option value="advantage">advantage, highest first</option>
<option value="length">length, longest first</option></select></label>
<button type="reset">Show all</button></form>
<nav class="pager"></nav><div id="list"></div><nav class="pager"></nav></section>"""

STYLE = """
:root{--h0:#fff;--h1:#efe3c0;--h2:#e5c993;--h3:#ddac65;--h4:#d68c35;--h5:#c96e07;--h6:#bd4a03;--h7:#ae1b25;
--h8:#8c023e;--h9:#660246;--low:#1c1e21;--high:#fff;--turn:#1c1e21;--hit:#1d5fd0}
@media (prefers-color-scheme:dark){:root{--h0:#1c1f24;--h1:#3c2a43;--h2:#5f3458;--h3:#873e63;--h4:#b14763;--h5:#db5454;
--h6:#f37344;--h7:#fe9a4a;--h8:#fec272;--h9:#ffe6a4;--low:#fff;--high:#14161a;--turn:#14161a;--hit:#7db4ff}}
#metrics .charts{grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:12px}
#metrics svg text{font-size:15px}
[hidden]{display:none!important}
section{margin-top:30px}h2{font-size:1.2rem}
.warn,#problem{color:var(--warn);margin:4px 0}
#summary{display:flex;flex-wrap:wrap;gap:8px 34px;margin:12px 0 0}
dt{color:var(--soft);font-size:.82rem}dd{margin:0;font-size:1.12rem;font-weight:600;font-variant-numeric:tabular-nums}
.keys{list-style:none;display:flex;flex-wrap:wrap;gap:0 14px;margin:2px 0 4px;padding:0;
font-size:.82rem;color:var(--soft)}
.keys i{display:inline-block;width:16px;height:3px;border-radius:2px;margin-right:5px;vertical-align:middle}
details{margin-top:14px}summary{cursor:pointer;color:var(--soft)}
.tall{max-height:440px;overflow:auto;border:1px solid var(--line);border-radius:8px}.tall table{border:0}
thead th{position:sticky;top:0;background:var(--card);z-index:1}
thead button{all:unset;cursor:pointer;font-weight:600}thead button:focus-visible{outline:2px solid var(--hit)}
th[aria-sort=descending] button::after{content:" \\2193"}th[aria-sort=ascending] button::after{content:" \\2191"}
td .bar{display:inline-block;width:120px;height:9px;margin-right:9px;text-align:left;vertical-align:middle}
.bar i{display:block;height:100%;border-radius:2px;border:1px solid var(--line)}
#table a{color:inherit;text-decoration:none;font:13px/1.6 ui-monospace,Menlo,Consolas,monospace;white-space:pre;
border:1px solid var(--line);border-radius:4px;padding:1px 5px}#table a:hover{border-color:var(--hit)}
.legend-box{display:flex;flex-wrap:wrap;gap:12px 44px;position:sticky;top:0;z-index:2;background:var(--page);
padding:8px 0 10px;border-bottom:1px solid var(--line)}
.scale{list-style:none;display:flex;margin:4px 0 0;padding:0;font-variant-numeric:tabular-nums}
.scale li{width:52px}.scale span{display:block;text-align:center;font-size:.74rem;line-height:20px;height:20px;
border:1px solid var(--line);border-width:1px 0;white-space:nowrap}
.scale li:first-child span{border-left-width:1px}.scale li:last-child span{border-right-width:1px}
.scale small{display:block;height:1.3em;margin-left:-26px;width:52px;text-align:center;font-size:.74rem}
.kinds{display:flex;flex-wrap:wrap;gap:6px;margin-top:4px}
.kinds button,.pager button,form button{font:inherit;font-size:.82rem;color:inherit;background:var(--card);
cursor:pointer;border:1px solid var(--line);border-radius:6px;padding:2px 9px}
.kinds button[aria-pressed=true]{border-color:var(--hit);box-shadow:0 0 0 1px var(--hit)}
.pager button:disabled{opacity:.4;cursor:default}
form{display:flex;flex-wrap:wrap;gap:8px 18px;align-items:center;margin:12px 0 0;font-size:.88rem}
fieldset{border:0;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:8px}
input,select{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:6px;
padding:3px 7px}input[type=number]{width:5.5em}
.pager{display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin:12px 0;font-size:.88rem}
article{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px 12px;margin:0 0 12px}
article header{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:.85rem;color:var(--soft);
font-variant-numeric:tabular-nums}
header b{color:var(--ink)}
.text{font:13px/1.85 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
white-space:pre-wrap;overflow-wrap:anywhere;margin:0}
.prompt{color:var(--soft);border-left:3px solid var(--line);padding-left:10px;margin:7px 0;line-height:1.5;
max-height:6em;overflow:auto}
.t{padding:2px 0;border-radius:2px;unicode-bidi:isolate}
.h0{background:var(--h0);color:var(--low)}.h1{background:var(--h1);color:var(--low)}.h2{background:var(--h2);color:var(--low)}
.h3{background:var(--h3);color:var(--low)}.h4{background:var(--h4);color:var(--low)}.h5{background:var(--h5);color:var(--turn)}
.h6{background:var(--h6);color:var(--high)}.h7{background:var(--h7);color:var(--high)}.h8{background:var(--h8);color:var(--high)}
.h9{background:var(--h9);color:var(--high)}
.hn{background:repeating-linear-gradient(135deg,var(--card) 0 4px,var(--line) 4px 6px)}
.s-e,.s-d,.s-o,.s-p{text-underline-offset:4px;text-decoration-thickness:1.5px;text-decoration-skip-ink:none}
.s-e{text-decoration:underline dotted 1.5px}.s-d{text-decoration:underline dashed 1px}
.s-o{text-decoration:underline double 1px}.s-p{text-decoration:overline 2px}
.s-c{outline:1.5px solid var(--ink)}.s-v{outline:1.5px dashed var(--ink)}
.s-c,.s-v{outline-offset:1px;margin:0 2px;position:relative}
.s-m{text-decoration:line-through 1.5px;opacity:.55}
#list[data-only] .t:not(.only),#list[data-hits] .t:not(.hit){opacity:.28}
.t.hit{outline:2px solid var(--hit);position:relative}
.t:hover{box-shadow:0 0 0 2px var(--hit)}
#tip{position:fixed;z-index:3;max-width:340px;pointer-events:none;background:var(--ink);color:var(--page);font-size:.85rem;
border-radius:6px;padding:6px 10px;line-height:1.4}#tip code{white-space:pre-wrap;overflow-wrap:anywhere}
@media (max-width:760px){.legend-box{position:static}.scale li{width:34px}.scale small{width:34px;margin-left:-17px}
.scale span{font-size:.6rem}}
"""

SCRIPT = r"""
"use strict";
const $ = id => document.getElementById(id);
function problem(text) { $("problem").textContent = text; $("problem").hidden = false; }
window.addEventListener("error", event => problem("The script of this page failed: " + event.message));
const data = JSON.parse($("data").textContent), PER_PAGE = 20;
const STEP = 0, PROMPT = 1, ADVANTAGE = 2, REWARDS = 3, MEAN = 4, SHARE = 5, TOKENS = 6, ENTROPY = 7, STATE = 8;
const UNKNOWN = ["unknown", "a state that this page does not know"];

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
const number = (x, digits = 3) => x == null ? "unknown" : String(+x.toPrecision(digits));
const percent = x => x == null ? "unknown" : number(100 * x) + " %";
const bucket = nats => nats == null ? "n" : data.edges.filter(edge => nats >= edge).length;

// What has no shape of its own, or would change the shape of its surroundings, is shown by its number.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu;
const code = c => "⟨U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩";
const plain = text => text.replace(HIDDEN, c => c === "\n" ? c : c === "\t" ? "⇥\t" : code(c));
const visible = text => text === "" ? "∅" : plain(text).replace(/\n/g, "⏎\n");
const inLine = text => visible(text).replace(/[\n\t]/g, "").replace(/^ +| +$/g, spaces => "␣".repeat(spaces.length));

function integers(base64, wide) {
  const bytes = atob(base64), width = wide ? 4 : 2, result = new Array(bytes.length / width);
  for (let i = 0; i < result.length; i++) {
    let x = 0;
    for (let k = width - 1; k >= 0; k--) x = x * 256 + bytes.charCodeAt(i * width + k);
    result[i] = x;
  }
  return result;
}
const tokensOf = c => integers(c[TOKENS], data.wide);
const natsOf = c => integers(c[ENTROPY]).map(q => q === data.missing ? null : q / data.scale);
const searched = [];
function searchedText(i) {
  const c = data.completions[i];
  return searched[i] ??= (data.prompts[c[PROMPT]] + "\n" + tokensOf(c).map(t => data.texts[t]).join("")).toLowerCase();
}

// The view: what is asked for in the address after #.
let view = {}, found = [];
function readView() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const get = name => asked.get(name) ?? "";
  view = {step: get("step"), q: get("q"), of: get("of"), min: get("min"), max: get("max"), sort: get("sort"),
          token: asked.get("token"), only: get("only"), page: Math.max(1, parseInt(get("page")) || 1)};
}
function show(changes, keep) {
  const next = {...view, page: 1, ...changes}, asked = new URLSearchParams();
  for (const [name, value] of Object.entries(next)) {
    const plain = value == null || (value === "" && name !== "token") || (name === "page" && value === 1);
    if (!plain) asked.set(name, value);
  }
  if (keep) location.hash = asked.toString();
  else location.replace("#" + asked);
}

const mean = advantage => Array.isArray(advantage) ? advantage[0] : advantage;
function valueOf(c) {
  const at = data.rewards.indexOf(view.of);
  return at < 0 ? mean(c[ADVANTAGE]) : c[REWARDS][at];
}
const ORDERS = {entropy: c => c[MEAN], live: c => c[SHARE], advantage: c => mean(c[ADVANTAGE]),
                length: c => c[STATE].length};
function find() {
  const steps = /^\s*(\d+)\s*(?:-\s*(\d+)\s*)?$/.exec(view.step);
  const first = steps ? +steps[1] : 0, last = steps ? +(steps[2] ?? steps[1]) : Infinity;
  const least = view.min === "" ? -Infinity : +view.min, greatest = view.max === "" ? Infinity : +view.max;
  const bounded = view.min !== "" || view.max !== "", q = view.q.toLowerCase();
  const token = view.token == null ? null : data.texts.indexOf(view.token);
  found = [];
  data.completions.forEach((c, i) => {
    if (c[STEP] < first || c[STEP] > last) return;
    const value = valueOf(c);
    if (bounded && (value == null || !(value >= least && value <= greatest))) return;
    if (q && !searchedText(i).includes(q)) return;
    if (token != null && !tokensOf(c).includes(token)) return;
    found.push(i);
  });
  if (Object.hasOwn(ORDERS, view.sort)) {
    const key = data.completions.map(c => ORDERS[view.sort](c) ?? -Number.MAX_VALUE);
    found.sort((a, b) => key[b] - key[a] || a - b);
  }
  return view.step && !steps ? "Step: found " + view.step + ", expected a number, or two as in 3-7. " : "";
}

// Where a search matches: [from, to) in the text of the tokens together.
function matches(texts) {
  const q = view.q.toLowerCase(), all = texts.join("").toLowerCase(), result = [];
  for (let at = all.indexOf(q); q && at >= 0; at = all.indexOf(q, at + q.length)) result.push([at, at + q.length]);
  return result;
}
function article(i) {
  const c = data.completions[i], texts = tokensOf(c).map(t => data.texts[t]), nats = natsOf(c);
  const made = element("article"), header = element("header"), body = element("p", "text");
  const advantages = Array.isArray(c[ADVANTAGE]) ? c[ADVANTAGE].slice(1) : [c[ADVANTAGE]];
  const facts = [["step", c[STEP]], ["advantage", advantages.map(a => number(a)).join(" to ")]];
  data.rewards.forEach((name, k) => facts.push([name, c[REWARDS][k] == null ? "none" : number(c[REWARDS][k], 4)]));
  facts.push(["tokens", texts.length], ["mean entropy", number(c[MEAN])], ["with a gradient", percent(c[SHARE])]);
  for (const [label, value] of facts) {
    const fact = element("span", "", label + " ");
    fact.append(element("b", "", value));
    header.append(fact);
  }
  const hits = matches(texts);
  let at = 0;
  texts.forEach((text, k) => {
    const letter = c[STATE][k], token = element("span", "t h" + bucket(nats[k]), visible(text)), end = at + text.length;
    token.classList.add("s-" + (Object.hasOwn(data.states, letter) ? letter : "unknown"));
    if (text === view.token || hits.some(([from, to]) => from < end && to > at)) token.classList.add("hit");
    if (letter === view.only) token.classList.add("only");
    token.dataset.at = k;
    at = end;
    body.append(token);
  });
  made.dataset.completion = i;
  made.append(header, element("p", "text prompt", plain(data.prompts[c[PROMPT]])), body);
  return made;
}

function apply() {
  readView();
  const form = $("filters");
  for (const name of ["step", "q", "of", "min", "max", "sort"]) {
    if (document.activeElement !== form.elements[name]) form.elements[name].value = view[name];
  }
  const complaint = find(), pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
  view.page = Math.min(view.page, pages);
  const list = $("list"), from = (view.page - 1) * PER_PAGE;
  list.toggleAttribute("data-only", view.only !== "");
  list.toggleAttribute("data-hits", view.token != null);
  list.replaceChildren(...found.slice(from, from + PER_PAGE).map(article));
  for (const button of document.querySelectorAll("[data-only]:is(button)")) {
    button.setAttribute("aria-pressed", button.dataset.only === view.only);
  }
  const token = view.token == null ? "" : " with the token " + inLine(view.token);
  const [some, all] = [found, data.completions].map(list => list.length.toLocaleString("en"));
  const count = complaint + some + " of " + all + " completions" + token;
  for (const pager of document.querySelectorAll(".pager")) {
    const button = (label, page) => {
      const made = element("button", "", label);
      made.type = "button";
      made.disabled = page < 1 || page > pages || page === view.page;
      made.addEventListener("click", () => { show({page}, true); $("completions").scrollIntoView(); });
      return made;
    };
    pager.replaceChildren(button("First", 1), button("Previous", view.page - 1),
      element("span", "", "page " + view.page + " of " + pages), button("Next", view.page + 1), button("Last", pages),
      element("span", "absent", count));
  }
  $("tip").hidden = true;
}

function fillTable(by, ascending) {
  const rows = [...data.table], text = row => data.texts[row[0]];
  const order = by ? (a, b) => a[by] - b[by] : (a, b) => text(a) < text(b) ? -1 : text(a) > text(b) ? 1 : 0;
  rows.sort((a, b) => ascending ? order(a, b) : order(b, a));
  const longest = Math.max(...rows.map(row => row[2]));
  $("table").tBodies[0].replaceChildren(...rows.map(row => {
    const made = element("tr"), name = element("th"), link = element("a", "", inLine(text(row))), nats = element("td");
    link.href = "#" + new URLSearchParams({token: text(row)});
    link.addEventListener("click", event => {
      event.preventDefault();
      show({token: text(row)}, true);
      $("completions").scrollIntoView();
    });
    name.scope = "row";
    name.append(link);
    const bar = element("span", "bar"), fill = element("i", "h" + bucket(row[2]));
    fill.style.width = 100 * row[2] / (longest || 1) + "%";
    bar.append(fill);
    nats.append(bar, row[2].toFixed(3));
    made.append(name, element("td", "", row[1].toLocaleString("en")), nats, element("td", "", percent(row[3])));
    return made;
  }));
}

function tip(event) {
  const token = event.target.closest?.("#list .t"), box = $("tip");
  box.hidden = !token;
  if (!token) return;
  const c = data.completions[token.closest("article").dataset.completion], k = +token.dataset.at;
  const [name, says] = Object.hasOwn(data.states, c[STATE][k]) ? data.states[c[STATE][k]] : UNKNOWN;
  const nats = natsOf(c)[k], text = data.texts[tokensOf(c)[k]];
  const lines = [nats == null ? "entropy unknown" : "entropy " + nats.toFixed(4) + " nats", name + ": " + says,
    "token " + (k + 1) + " of " + c[STATE].length];
  box.replaceChildren(element("code", "", inLine(text)), ...lines.map(line => element("div", "", line)));
  const at = token.getClientRects()[0], size = box.getBoundingClientRect();
  box.style.left = Math.max(4, Math.min(at.left, innerWidth - size.width - 8)) + "px";
  box.style.top = (at.top > size.height + 12 ? at.top - size.height - 7 : at.bottom + 7) + "px";
}

for (const svg of document.querySelectorAll("svg[data-panel]")) {
  const lines = data.lines[svg.dataset.panel], low = +svg.dataset.low, high = +svg.dataset.high;
  const cursor = svg.querySelector(".cursor"), out = svg.parentNode.querySelector(".values");
  const {width} = svg.viewBox.baseVal, [left, right] = data.plot;
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), across = (event.clientX - box.left) / box.width * width;
    const x = low + (across - left) / (right - left) * (high - low);
    if (x < low || x > high) return;
    const near = lines.map(([name, steps, values]) => {
      const best = steps.reduce((b, s, i) => Math.abs(s - x) < Math.abs(steps[b] - x) ? i : b, 0);
      return name + " " + (values[best] == null ? "not measured" : number(values[best], 4));
    });
    cursor.setAttribute("x1", across);
    cursor.setAttribute("x2", across);
    cursor.style.visibility = "visible";
    out.textContent = "step " + Math.round(x) + ": " + near.join(", ");
  });
  svg.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; out.textContent = ""; });
}

if ($("completions")) {
  const form = $("filters");
  form.elements.of.append(...["advantage", ...data.rewards].map((name, k) => new Option(name, k ? name : "")));
  let waiting;
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    const asked = Object.fromEntries(new FormData(form));
    waiting = setTimeout(() => show(asked), 150);
  });
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => location.replace("#"));
  for (const button of document.querySelectorAll("button[data-only]")) {
    const {only} = button.dataset;
    button.addEventListener("click", () => show({only: view.only === only ? "" : only, page: view.page}));
  }
  for (const button of document.querySelectorAll("[data-by]")) {
    button.addEventListener("click", () => {
      const cell = button.closest("th"), ascending = cell.getAttribute("aria-sort") === "descending";
      for (const other of cell.parentNode.children) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      fillTable(+button.dataset.by, ascending);
    });
  }
  for (const name of ["pointerover", "scroll"]) addEventListener(name, tip, {capture: true, passive: true});
  addEventListener("hashchange", apply);
  fillTable(2, false);
  apply();
}
"""
