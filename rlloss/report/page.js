// Texts of tokens and prompts only ever become the text of an element. The address's part after # is the state of the
// view, such as #step=3-7&of=reward&min=1&page=2: a link to a view, which the browser's back button knows too.
const $ = id => document.getElementById(id);
function problem(text) { $("problem").textContent = text; $("problem").hidden = false; }
window.addEventListener("error", event => problem("The script of this page failed: " + event.message));
const PER_PAGE = 20;
const STEP = 0, PROMPT = 1, ADVANTAGE = 2, REWARDS = 3, MEAN = 4, SHARE = 5, TOKENS = 6, ENTROPY = 7, STATE = 8, RUN = 9;
const UNKNOWN = ["unknown", "a state that this page does not know"];

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
const number = (x, digits = 3) => x == null ? "unknown" : String(+x.toPrecision(digits));
const percent = x => x == null ? "unknown" : number(100 * x) + " %";
const edges = () => view.colours === "rank" ? data.ranks : data.edges;
const bucket = nats => nats == null ? "n" : edges().filter(edge => nats >= edge).length;

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
          token: asked.get("token"), only: get("only"), run: get("run"), colours: get("colours"), solid: get("solid"), page: Math.max(1, parseInt(get("page")) || 1)};
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
    if (view.run !== "" && data.runs[c[RUN]] !== view.run) return;
    const value = valueOf(c);
    if (bounded && (value == null || !(value >= least && value <= greatest))) return;
    if (q && !searchedText(i).includes(q)) return;
    if (token != null && !tokensOf(c).includes(token)) return;
    found.push(i);
  });
  if (view.sort === "") {
    // The completions of a prompt together, the best advantage first: what GRPO compares.
    const best = data.completions.map(c => mean(c[ADVANTAGE]) ?? -Number.MAX_VALUE), C = data.completions;
    found.sort((a, b) => C[a][STEP] - C[b][STEP] || C[a][RUN] - C[b][RUN] || C[a][PROMPT] - C[b][PROMPT]
      || best[b] - best[a] || a - b);
  } else if (Object.hasOwn(ORDERS, view.sort)) {
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
function groupOf(i) {
  const c = data.completions[i];
  return [c[STEP], c[RUN], c[PROMPT]].join();
}
function groupHeader(i, members) {
  const c = data.completions[i], made = element("div", "group");
  const facts = [["completions of one prompt", members.length]];
  data.rewards.forEach((name, k) => {
    const known = members.map(m => data.completions[m][REWARDS][k]).filter(x => x != null);
    if (known.length) facts.push([name + ", mean", number(known.reduce((a, b) => a + b) / known.length)]);
  });
  for (const [label, value] of facts) {
    const fact = element("span", "", label + " ");
    fact.append(element("b", "", value));
    made.append(fact);
  }
  made.append(element("p", "text prompt", plain(data.prompts[c[PROMPT]])));
  return made;
}
// The articles of a page; in the order by prompt each group below its prompt.
function articles(shown) {
  if (view.sort !== "") return shown.map(i => article(i, true));
  const members = Map.groupBy ? Map.groupBy(found, groupOf) : grouped(found);
  let last = null;
  return shown.flatMap(i => {
    const group = groupOf(i), begins = group !== last;
    last = group;
    return begins ? [groupHeader(i, members.get(group)), article(i, false)] : [article(i, false)];
  });
}
function grouped(list) {
  const groups = new Map();
  for (const i of list) groups.set(groupOf(i), [...(groups.get(groupOf(i)) ?? []), i]);
  return groups;
}
function article(i, withPrompt) {
  const c = data.completions[i], texts = tokensOf(c).map(t => data.texts[t]), nats = natsOf(c);
  const made = element("article"), header = element("header"), body = element("p", "text");
  const advantages = Array.isArray(c[ADVANTAGE]) ? c[ADVANTAGE].slice(1) : [c[ADVANTAGE]];
  const from = [...(data.runs.length > 1 ? [["run", data.runs[c[RUN]]]] : []), ["step", c[STEP]]];
  const facts = [...from, ["advantage", advantages.map(a => number(a)).join(" to ")]];
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
    if (data.kinds[letter]) token.classList.add(data.kinds[letter]);
    token.classList.add("s-" + (Object.hasOwn(data.states, letter) ? letter : "unknown"));
    if (text === view.token || hits.some(([from, to]) => from < end && to > at)) token.classList.add("hit");
    if (letter === view.only) token.classList.add("only");
    token.dataset.at = k;
    at = end;
    body.append(token);
  });
  made.dataset.completion = i;
  made.append(header, ...(withPrompt ? [element("p", "text prompt", plain(data.prompts[c[PROMPT]]))] : []), body);
  return made;
}

function apply() {
  readView();
  const form = $("filters");
  form.elements.solid.checked = view.solid !== "";
  for (const name of ["run", "step", "q", "of", "min", "max", "sort", "colours"]) {
    if (form.elements[name] && document.activeElement !== form.elements[name]) form.elements[name].value = view[name];
  }
  const complaint = find(), pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
  view.page = Math.min(view.page, pages);
  const list = $("list"), from = (view.page - 1) * PER_PAGE;
  list.toggleAttribute("data-only", view.only !== "");
  list.toggleAttribute("data-hits", view.token != null);
  list.classList.toggle("teach", view.solid === "");
  $("completions").classList.toggle("by-rank", view.colours === "rank");
  list.replaceChildren(...articles(found.slice(from, from + PER_PAGE)));
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
      element("span", "absent", count), ...(found.length < data.completions.length ? [all_()] : []));
  }
  $("tip").hidden = true;
}

// The way back from any filter.
function all_() {
  const made = element("button", "", "Show all");
  made.type = "button";
  made.addEventListener("click", () => location.replace("#"));
  return made;
}

function fillTable(by, ascending) {
  const rows = [...data.table], text = row => data.texts[row[0]];
  const order = by ? (a, b) => a[by] - b[by] : (a, b) => text(a) < text(b) ? -1 : text(a) > text(b) ? 1 : 0;
  rows.sort((a, b) => ascending ? order(a, b) : order(b, a));
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
    const shown = element("span", "t h" + bucket(row[2]), row[2].toFixed(3));
    nats.append(shown);
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

// A click on a chart shows the completions of the logged step that is next to it.
for (const svg of document.querySelectorAll("svg[data-panel]")) {
  svg.addEventListener("click", event => {
    const found = stepUnder(svg, event), steps = data.completions.map(c => c[STEP]);
    if (!found || !steps.length) return;
    const step = steps.reduce((best, s) => Math.abs(s - found[0]) < Math.abs(best - found[0]) ? s : best);
    show({step: String(step)}, true);
    $("completions").scrollIntoView();
  });
}

if ($("completions")) {
  const form = $("filters");
  if (form.elements.run) {
    form.elements.run.append(...["all", ...data.runs].map((name, k) => new Option(name, k ? name : "")));
  }
  if (matchMedia("(max-width: 760px)").matches) $("filter-box").open = false;
  form.elements.of.append(...["advantage", ...data.rewards].map((name, k) => new Option(name, k ? name : "")));
  let waiting;
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    const asked = {solid: "", ...Object.fromEntries(new FormData(form))};
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
