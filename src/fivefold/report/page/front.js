// The Pareto front: any two metrics, the budget as a region, every measured trial one point, and the chosen one in words.
function frontSection() {
  const lead = "Each point is one trial, measured in full in the engine that serves it. A trial is on the front when no"
    + " other trial within the budget is better on both axes.";
  if (present.length < 2) return section("front", "The front", lead, missing("no trial has two measured numbers yet"));
  const quality = DATA.axes.find((n) => metric(n).resource === "quality");
  const wanted = (DATA.settings.minimize || DATA.settings.objectives || "").split(",").map((s) => s.trim()).filter((n) => present.includes(n));
  const axes = { x: wanted[0] || DATA.axes[0] || present[0], y: quality || wanted[1] || present[1] };
  if (axes.x === axes.y) axes.y = present.find((n) => n !== axes.x);
  axes.logx = spread(axes.x);
  axes.logy = spread(axes.y);
  const detail = el("aside", { class: "detail", "aria-live": "polite" });
  const below = el("p", { class: "note" });
  const plot = figure((width) => drawFront(width, axes, below));
  const axis = (key, words) => {
    const log = el("input", { type: "checkbox", checked: axes[`log${key}`], onchange: (e) => { axes[`log${key}`] = e.target.checked; plot.redraw(); } });
    const pick = (name) => { axes[key] = name; axes[`log${key}`] = log.checked = spread(name); plot.redraw(); };
    return el("div", {}, choose(words, present, axes[key], pick), el("label", {}, log, "log"));
  };
  watchers.push((number) => {
    detail.replaceChildren(...describe(number));
    for (const node of plot.box.querySelectorAll(".point")) node.classList.toggle("selected", +node.dataset.number === number);
  });
  return section("front", "The front", lead,
    el("div", { class: "controls" }, axis("x", "across"), axis("y", "up")),
    el("div", { class: "split" }, el("div", {}, plot.box, legend(), below), detail), unmeasured());
}

// A logarithmic axis by default when the values spread over more than a factor of three.
function spread(name) {
  const values = MEASURED.map((t) => value(t, name)).filter((v) => v !== null);
  return metric(name).unit !== "%" && Math.min(...values) > 0 && Math.max(...values) > 3 * Math.min(...values);
}

function drawFront(width, axes, below) {
  const height = Math.max(300, Math.min(520, width * 0.66)), left = 58, right = width - 14, top = 14, bottom = height - 48;
  const [mx, my] = [metric(axes.x), metric(axes.y)];
  const shown = MEASURED.filter((t) => value(t, axes.x) !== null && value(t, axes.y) !== null);
  const lacking = MEASURED.length - shown.length;
  below.textContent = lacking ? `${lacking} measured trial${lacking > 1 ? "s have" : " has"} no value for these axes.` : "";
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", id: "front-plot",
    "aria-label": `${mx.label} against ${my.label}, ${shown.length} trials` });
  if (!shown.length) return root;
  const x = makeScale(shown.map((t) => value(t, axes.x) / mx.factor), left, right, axes.logx);
  const y = makeScale(shown.map((t) => value(t, axes.y) / my.factor), bottom, top, axes.logy);
  const at = (t) => [x(value(t, axes.x) / mx.factor), y(value(t, axes.y) / my.factor)];
  root.append(budgetRegion(x, y, axes, { left, right, top, bottom }));
  for (const [v, label] of x.ticks(Math.max(3, width / 110))) {
    root.append(svg("line", { class: "grid", x1: x(v), x2: x(v), y1: top, y2: bottom }),
      svg("text", { x: x(v), y: bottom + 17, "text-anchor": "middle" }, label));
  }
  for (const [v, label] of y.ticks(6)) {
    root.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(v), y2: y(v) }),
      svg("text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, label));
  }
  root.append(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
    svg("line", { class: "axis", x1: left, x2: left, y1: top, y2: bottom }),
    svg("text", { class: "title", x: right, y: height - 8, "text-anchor": "end" }, fit(axes.x, right - left)),
    svg("text", { class: "title", x: -top, y: 12, "text-anchor": "end", transform: "rotate(-90)" }, fit(axes.y, bottom - top)));
  const front = frontOf(shown, axes.x, axes.y);
  root.append(stairs(front, at, axes));
  const order = [...shown].sort((a, b) => rank(a, front) - rank(b, front));
  for (const t of order) root.append(pointOf(t, at(t), front.includes(t), x, y, axes));
  label(root, order.filter((t) => ROLES.has(t.number) || t.number === DATA.parent), at, { right, top, bottom });
  return root;
}

const rank = (t, front) => (t.number === DATA.parent || ROLES.has(t.number) ? 2 : front.includes(t) ? 1 : 0);
function fit(name, room) {
  const text = `${title(name)} (${better(name)})`;
  return text.length * 6.2 <= room ? text : title(name).length * 6.2 <= room ? title(name) : `${name}, ${metric(name).unit}`;
}

// Trials that meet the budget (all, where none does or none is set) and that nothing dominates on these two axes.
function frontOf(trials, a, b) {
  const sign = (n) => (metric(n).better === "lower" ? 1 : -1);
  const within = trials.filter((t) => t.fits);
  const pool = within.length ? within : trials;
  const pair = (t) => [sign(a) * value(t, a), sign(b) * value(t, b)];
  return pool.filter((t) => {
    const [p, q] = pair(t);
    return !pool.some((o) => { const [r, s] = pair(o); return r <= p && s <= q && (r < p || s < q); });
  });
}

function stairs(front, at, axes) {
  const points = front.map(at).sort((a, b) => a[0] - b[0] || b[1] - a[1]);
  const up = metric(axes.y).better === metric(axes.x).better;
  let path = "";
  points.forEach(([px, py], i) => {
    if (i === 0) path = `M${px} ${py}`;
    else path += (metric(axes.x).better === "lower") ? `H${px}V${py}` : `V${py}H${px}`;
  });
  return svg("path", { class: "stair", d: path || "M0 0", "data-up": up ? 1 : 0 });
}

function budgetRegion(x, y, axes, box) {
  const group = svg("g", {});
  const edges = { ...box };
  let any = false;
  for (const [name, scale, low, high] of [[axes.x, x, "left", "right"], [axes.y, y, "bottom", "top"]]) {
    const bound = DATA.bounds[name];
    if (!bound || bound.limit === null) continue;
    any = true;
    edges[bound.upper ? high : low] = scale.clamp(bound.limit / metric(name).factor);
    const at = edges[bound.upper ? high : low];
    group.append(name === axes.x
      ? svg("line", { class: "bound", x1: at, x2: at, y1: box.top, y2: box.bottom })
      : svg("line", { class: "bound", x1: box.left, x2: box.right, y1: at, y2: at }));
  }
  if (any) group.prepend(svg("rect", { class: "region", x: edges.left, y: edges.top,
    width: Math.max(0, edges.right - edges.left), height: Math.max(0, edges.bottom - edges.top) }));
  return group;
}

function mark(t, px, py) {
  return t.number === DATA.parent
    ? svg("path", { class: "dot", d: `M${px} ${py - 7}l7 7l-7 7l-7 -7z` })
    : svg("circle", { class: "dot", cx: px, cy: py, r: 5 });
}
function pointOf(t, [px, py], front, x, y, axes) {
  const names = ["point", front ? "front" : "", t.fits !== false ? "fits" : "", t.number === DATA.parent ? "parent" : "",
    t.number === selected ? "selected" : ""];
  const group = svg("g", { class: names.filter(Boolean).join(" "), "data-number": t.number, tabindex: "0", role: "button",
    "aria-label": `trial ${t.number}: ${t.recipe}`, onmouseenter: () => select(t.number), onfocus: () => select(t.number),
    ...press(() => select(t.number)) });
  if (front || ROLES.has(t.number)) {
    for (const [name, scale, across] of [[axes.x, x, true], [axes.y, y, false]]) {
      const c = t.values[name], f = metric(name).factor;
      if (c.lo === undefined || c.hi === undefined || (scale.log && c.lo <= 0)) continue;
      const [a, b] = [scale.clamp(c.lo / f), scale.clamp(c.hi / f)];
      group.append(svg("line", { class: "whisker", ...(across ? { x1: a, x2: b, y1: py, y2: py } : { x1: px, x2: px, y1: a, y2: b }) }));
    }
  }
  group.append(svg("circle", { class: "halo", cx: px, cy: py, r: 12 }), mark(t, px, py));
  if (ROLES.has(t.number)) group.append(svg("circle", { class: "ring", cx: px, cy: py, r: 8.5 }));
  return group;
}

// Names of the picks and the parent, moved apart where they would overlap.
function label(root, trials, at, box) {
  const taken = [];
  for (const t of trials.sort((a, b) => at(a)[1] - at(b)[1])) {
    const [px, py] = at(t), words = (ROLES.get(t.number) || ["parent"]).join(", ");
    const wide = words.length * 6.6, leftwards = px + 14 + wide > box.right;
    const x0 = leftwards ? px - 13 - wide : px + 13;
    let ty = Math.max(box.top + 10, py + 4);
    while (taken.some(([a, b, c]) => Math.abs(ty - b) < 15 && x0 < a + c && a < x0 + wide)) ty += 15;
    taken.push([x0, ty, wide]);
    root.append(svg("text", { class: ROLES.has(t.number) ? "tag" : "title", x: leftwards ? px - 13 : px + 13, y: ty,
      "text-anchor": leftwards ? "end" : "start" }, words));
  }
}

function legend() {
  const fake = (classes, number) => svg("svg", { viewBox: "0 0 18 18", "aria-hidden": "true" },
    svg("g", { class: classes }, number === "parent" ? svg("path", { class: "dot", d: "M9 2l7 7l-7 7l-7 -7z" })
      : svg("circle", { class: "dot", cx: 9, cy: 9, r: 5 }), number === "pick" ? svg("circle", { class: "ring", cx: 9, cy: 9, r: 8 }) : null));
  const bounded = Object.keys(DATA.bounds).length > 0;
  const items = [[fake("point front fits"), "on the front"], [fake("point fits"), "dominated"],
    [fake("point parent fits", "parent"), "parent"]];
  if (ROLES.size) items.push([fake("point front fits", "pick"), "pick"]);
  if (bounded) items.push([fake("point"), "open: misses the budget"], [el("span", { class: "swatch", style: "background:var(--region);border:1px dotted var(--front)" }), "budget"]);
  return el("div", { class: "legend" }, items.map(([icon, text]) => el("span", {}, icon, text)));
}

const CORE = new Set(["size", "memory", "latency", "ttft", "decode", "energy", "money", "network", "agreement", "kl", ...Object.keys(DATA.bounds)]);
function describe(number) {
  const t = TRIALS.get(number);
  if (!t) return [el("p", { class: "dim" }, "Point at a trial, tap it, or move to it with Tab: its recipe and numbers appear here.")];
  const known = present.filter((n) => t.values[n]), core = known.filter((n) => CORE.has(n)), rest = known.filter((n) => !CORE.has(n));
  const table = (names) => el("table", {}, el("tbody", {}, names.map((n) =>
    el("tr", {}, el("td", {}, n), el("td", {}, quantity(t.values[n]), interval(t.values[n]))))));
  const roles = ROLES.get(number) || [];
  return [el("h3", {}, [`Trial ${t.number}`, ...roles].join(" · ")), el("code", {}, t.recipe),
    t.fits === false ? el("p", { class: "note" }, "Misses the budget.") : null,
    t.coverage.length ? el("p", { class: "note" }, t.coverage.join("; ")) : null, table(core),
    rest.length ? el("details", {}, el("summary", {}, `${rest.length} more numbers`), table(rest)) : null].filter(Boolean);
}

function unmeasured() {
  const rest = DATA.trials.filter((t) => t.failed || t.outcome === "predicted");
  if (!rest.length) return el("p", { class: "note" }, "No trial was refused or failed.");
  const rows = rest.map((t) => [t.number, el("code", {}, t.recipe), t.outcome, t.sentence]);
  return el("details", {}, el("summary", {}, `Refused, failed, or dropped before any work, and why (${rest.length})`),
    grid(["trial", "recipe", "outcome", "why"], rows, [0]));
}
