const data = JSON.parse(document.getElementById("data").textContent);
for (const svg of document.querySelectorAll("svg[data-panel]")) {
  const series = data.panels[svg.dataset.panel], low = +svg.dataset.low, high = +svg.dataset.high;
  const cursor = svg.querySelector(".cursor"), out = svg.parentNode.querySelector(".values");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), across = (event.clientX - box.left) / box.width;
    const x = low + (across - data.left) / (data.right - data.left) * (high - low);
    if (x < low || x > high) return;
    const found = data.arms[svg.dataset.panel].map((arm, a) => {
      let best = -1;
      arm.steps.forEach((s, i) => { if (best < 0 || Math.abs(s - x) < Math.abs(arm.steps[best] - x)) best = i; });
      const value = series[a][best];
      return arm.name + " " + (value == null ? "not measured" : +value.toPrecision(4));
    });
    cursor.setAttribute("x1", across * svg.viewBox.baseVal.width);
    cursor.setAttribute("x2", across * svg.viewBox.baseVal.width);
    cursor.style.visibility = "visible";
    out.textContent = "step " + Math.round(x) + ": " + found.join(", ");
  });
  svg.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; out.textContent = ""; });
}
