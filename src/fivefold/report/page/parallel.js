// Parallel coordinates: five resources and quality, oriented so that up is better on every axis.
function parallelSection() {
  const lead = "One line is one trial. Every axis points up to better, so a line that stays high costs little everywhere."
    + " Tap a line to follow it; drag or tap on an axis to keep only the lines that pass there.";
  if (DATA.axes.length < 2) return section("resources", "Five resources at once", lead, missing("fewer than two resources were measured"));
  const brushes = new Map();
  const said = el("p", { class: "note", "aria-live": "polite" });
  const plot = figure((width) => drawParallel(Math.max(width, 96 * DATA.axes.length), brushes, said, () => plot.redraw()));
  watchers.push((number) => {
    for (const node of plot.box.querySelectorAll(".line")) node.classList.toggle("selected", +node.dataset.number === number);
    const chosen = plot.box.querySelector(".line.selected");
    if (chosen) chosen.parentNode.append(chosen);
    said.textContent = TRIALS.has(number) ? `Trial ${number}: ${TRIALS.get(number).recipe}` : "";
  });
  return section("resources", "Five resources at once", lead,
    el("div", { class: "scroll" }, plot.box), said);
}

function drawParallel(width, brushes, said, redraw) {
  const height = 330, top = 58, bottom = height - 16, names = DATA.axes;
  const gap = (width - 110) / (names.length - 1), at = (i) => 55 + i * gap;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", id: "parallel-plot",
    style: `min-width:${width}px`, "aria-label": `parallel coordinates over ${names.join(", ")}` });
  const scales = names.map((n) => {
    const values = MEASURED.map((t) => value(t, n)).filter((v) => v !== null).map((v) => v / metric(n).factor);
    const up = metric(n).better === "higher";
    return makeScale(values, up ? bottom : top, up ? top : bottom, spread(n));
  });
  const y = (t, i) => (value(t, names[i]) === null ? null : scales[i](value(t, names[i]) / metric(names[i]).factor));
  const kept = (t) => [...brushes].every(([i, [a, b]]) => { const v = y(t, i); return v !== null && v >= a && v <= b; });
  const lines = svg("g", {});
  const front = new Set(DATA.front.length ? DATA.front : []);
  for (const t of MEASURED) {
    const points = names.map((_, i) => [at(i), y(t, i)]);
    let path = "", pen = "M";
    for (const [px, py] of points) { if (py === null) pen = "M"; else { path += `${pen}${px} ${py}`; pen = "L"; } }
    const names_ = ["line", front.has(t.number) ? "front" : "", t.number === DATA.parent ? "parent" : "", t.number === selected ? "selected" : ""];
    const line = svg("path", { d: path || "M0 0", class: names_.filter(Boolean).join(" "), "data-number": t.number, tabindex: "0", role: "button",
      "aria-label": `trial ${t.number}: ${t.recipe}`, onfocus: () => select(t.number), ...press(() => select(t.number)) });
    if (!kept(t)) line.style.opacity = "0.07";
    lines.append(line);
  }
  names.forEach((n, i) => {
    root.append(svg("line", { class: "axis", x1: at(i), x2: at(i), y1: top, y2: bottom }),
      svg("text", { class: "title", x: at(i), y: 18, "text-anchor": "middle" }, n),
      svg("text", { x: at(i), y: 34, "text-anchor": "middle" }, metric(n).unit));
    for (const [v, text] of scales[i].ticks(4)) {
      root.append(svg("line", { class: "axis", x1: at(i) - 3, x2: at(i) + 3, y1: scales[i](v), y2: scales[i](v) }),
        svg("text", { x: at(i) + 6, y: scales[i](v) - 3 }, text));
    }
  });
  root.append(lines);
  names.forEach((n, i) => root.append(brush(root, i, at(i), top, bottom, brushes, redraw)));
  return root;
}

function brush(root, i, x, top, bottom, brushes, redraw) {
  const group = svg("g", {});
  const range = brushes.get(i);
  if (range) group.append(svg("rect", { class: "region", x: x - 8, y: range[0], width: 16, height: range[1] - range[0], stroke: "currentColor", "stroke-opacity": 0.4 }));
  let start = null;
  const where = (e) => {
    const box = root.getBoundingClientRect();
    return Math.max(top, Math.min(bottom, (e.clientY - box.top) * (root.viewBox.baseVal.height / box.height)));
  };
  group.append(svg("rect", { x: x - 8, y: top, width: 16, height: bottom - top, fill: "transparent", style: "cursor:ns-resize",
    onpointerdown: (e) => { start = where(e); e.target.setPointerCapture(e.pointerId); },
    onpointerup: (e) => {
      if (start === null) return;
      const end = where(e), wide = Math.abs(end - start) > 6;
      if (wide) brushes.set(i, [Math.min(start, end), Math.max(start, end)]);
      else if (brushes.has(i)) brushes.delete(i);
      else brushes.set(i, [Math.max(top, end - 14), Math.min(bottom, end + 14)]);
      start = null;
      redraw();
    } }));
  return group;
}
