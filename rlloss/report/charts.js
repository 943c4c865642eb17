"use strict";
// The values under the pointer stand in a box of their own, so that nothing moves; a button of a legend switches its line.
const data = JSON.parse(document.getElementById("data").textContent);
const valueText = x => x == null ? "not measured" : String(+x.toPrecision(4));
function stepUnder(svg, event) {
  const low = +svg.dataset.low, high = +svg.dataset.high, box = svg.getBoundingClientRect();
  const across = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width, [left, right] = data.plot;
  const x = low + (across - left) / (right - left) * (high - low);
  return x < low || x > high ? null : [x, across];
}
for (const svg of document.querySelectorAll("svg[data-panel]")) {
  const lines = data.lines[svg.dataset.panel], cursor = svg.querySelector(".cursor"), hidden = new Set();
  const box = document.getElementById("point"), figure = svg.closest("figure");
  const leave = () => { cursor.style.visibility = "hidden"; box.hidden = true; };
  svg.addEventListener("pointermove", event => {
    const found = stepUnder(svg, event);
    if (!found) return leave();
    const [x, across] = found, shown = lines.filter((line, n) => !hidden.has(n));
    const rows = shown.map(([name, steps, values]) => {
      const best = steps.reduce((b, s, i) => Math.abs(s - x) < Math.abs(steps[b] - x) ? i : b, 0);
      return name + " " + valueText(values[best]);
    });
    const marks = [...svg.querySelectorAll(".mark")].filter(mark =>
      Math.abs(+mark.firstChild.getAttribute("x1") - across) < 5).map(mark => mark.querySelector("title").textContent);
    box.replaceChildren(...["step " + Math.round(x), ...rows, ...marks].map(text => {
      const line = document.createElement("div");
      line.textContent = text;
      return line;
    }));
    for (const side of ["x1", "x2"]) cursor.setAttribute(side, across);
    cursor.style.visibility = "visible";
    box.hidden = false;
    const size = box.getBoundingClientRect();
    box.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - size.width - 8)) + "px";
    box.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - size.height - 8)) + "px";
  });
  svg.addEventListener("pointerleave", leave);
  for (const button of figure.querySelectorAll("button[data-line]")) {
    button.addEventListener("click", () => {
      const n = +button.dataset.line, off = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", !off);
      off ? hidden.add(n) : hidden.delete(n);
      for (const drawn of svg.querySelectorAll(".line" + n)) drawn.style.display = off ? "none" : "";
    });
  }
}
