// What each technique did, alone and together; payback; how good predictions were; the roofline; what the search cost.
function change(cell, name) {
  const good = cell && cell.v !== undefined && cell.v !== 0 ? (cell.v < 0) === (metric(name).better === "lower") : null;
  const known = cell && (cell.lo === undefined || cell.lo > 0 || cell.hi < 0);
  return el("span", { class: good === null || !known ? null : good ? "better" : "worse" }, quantity(cell), interval(cell));
}

function effectsSection() {
  const lead = "The change a technique makes by itself, other things equal, against the same recipe without it."
    + " Bars are 95 % intervals; one that crosses zero says nothing yet.";
  const { rows, why } = DATA.effects;
  if (!rows.length) return section("effects", "What each technique did", lead, missing(why));
  const names = [...new Set(rows.map((r) => r.metric))];
  let chosen = names[0];
  const plot = figure((width) => drawEffects(width, rows.filter((r) => r.metric === chosen), chosen));
  return section("effects", "What each technique did", lead,
    el("div", { class: "controls" }, choose("on", names, chosen, (v) => { chosen = v; plot.redraw(); })), plot.box);
}

function drawEffects(width, rows, name) {
  const sorted = rows.filter((r) => r.change && r.change.v !== undefined).sort((a, b) => a.change.v - b.change.v);
  const left = Math.min(210, width * 0.36), right = width - 92, step = 30, top = 8, bottom = top + step * sorted.length;
  const root = svg("svg", { viewBox: `0 0 ${width} ${bottom + 44}`, role: "img", "aria-label": `change of ${metric(name).label} by technique` });
  if (!sorted.length) return el("p", { class: "missing" }, "Missing: no change of this metric could be estimated.");
  const unit = sorted[0].change.u, f = sorted[0].change.f;
  const ends = sorted.flatMap((r) => [r.change.v, r.change.lo ?? r.change.v, r.change.hi ?? r.change.v]).map((v) => v / f);
  const low = Math.min(0, ...ends), high = Math.max(0, ...ends), pad = (high - low) * 0.05 || 1;
  const x = (v) => left + ((v - low + pad) / (high - low + 2 * pad)) * (right - left);
  for (const [v, text] of linearTicks(low - pad, high + pad, Math.max(3, width / 130))) {
    root.append(svg("line", { class: v === 0 ? "zero" : "grid", x1: x(v), x2: x(v), y1: top, y2: bottom }),
      svg("text", { x: x(v), y: bottom + 17, "text-anchor": "middle" }, text));
  }
  sorted.forEach((r, i) => {
    const y = top + step * (i + 0.5), c = r.change, open = c.lo !== undefined && c.lo <= 0 && c.hi >= 0;
    root.append(svg("text", { class: "title", x: left - 12, y: y + 4, "text-anchor": "end" }, clip(r.technique, left - 12)),
      c.lo === undefined ? null : svg("line", { x1: x(c.lo / f), x2: x(c.hi / f), y1: y, y2: y, class: "stair" }),
      svg("g", { class: open ? "point" : "point front fits" }, svg("circle", { class: "dot", cx: x(c.v / f), cy: y, r: 5 })),
      svg("text", { x: right + 12, y: y + 4 }, `${c.t}${unit === "%" ? " %" : ""}`, svg("title", {}, `${c.i || ""} n ${c.n}`)));
  });
  root.append(svg("text", { class: "title", x: right, y: bottom + 38, "text-anchor": "end" },
    clip(`change of ${metric(name).label}, ${unit} (${better(name)})`, right)));
  return root;
}
const clip = (text, room) => (String(text).length * 6.4 <= room ? String(text) : String(text).slice(0, Math.max(3, room / 6.4 - 1)) + "…");

function interactionsSection() {
  const lead = "Two techniques together against what their separate effects promise. Better together, worse together, or as promised.";
  const { rows, why } = DATA.interactions;
  const body = rows.length ? grid(["pair", "metric", "promised apart", "measured together", "verdict"],
    rows.map((r) => [el("code", {}, `${r.a} + ${r.b}`), r.metric, change(r.apart, r.metric), change(r.together, r.metric), r.verdict || "–"]), [2, 3])
    : missing(why);
  const bad = DATA.backfired;
  const list = bad.rows.length ? el("ul", { class: "plain" }, bad.rows.map((r) => el("li", {}, el("code", {}, r.what), " ",
    r.change && r.metric ? [r.metric, " ", el("span", { class: "worse" }, quantity(r.change)), r.change.i ? ` (${r.change.i}), n ${r.change.n}` : null] : null, el("div", { class: "dim" }, r.sentence))))
    : missing(bad.why);
  return section("together", "What techniques did together", lead, body, el("h3", { style: "margin-top:36px" }, "What backfired here"), list);
}

function paybackSection() {
  const lead = "What the recipe cost to make, divided by what it saves per token against the parent: after so many tokens it has paid for itself.";
  const { rows, why } = DATA.payback;
  if (!rows.length) return section("payback", "Payback", lead, missing(why));
  const saving = rows.some((r) => r.saving), heads = ["trial", "recipe", "resource", "cost to make", ...(saving ? ["saved per token"] : []), "repaid after"];
  const line = (r) => [r.number, el("code", {}, TRIALS.has(r.number) ? TRIALS.get(r.number).recipe : ""), r.resource, quantity(r.cost),
    ...(saving ? [quantity(r.saving)] : []), r.tokens && r.tokens.v !== undefined ? [quantity(r.tokens), interval(r.tokens)] : r.sentence || "–"];
  const near = rows.filter((r) => ROLES.has(r.number) || DATA.front.includes(r.number)), far = rows.filter((r) => !near.includes(r));
  return section("payback", "Payback", lead, grid(heads, (near.length ? near : far).map(line), [0, 3, 4]),
    near.length && far.length ? el("details", {}, el("summary", {}, "trials that are neither picked nor on the front"), grid(heads, far.map(line), [0, 3, 4])) : null);
}

function predictionSection() {
  const lead = "The cost model and the screen only choose what to run. Here is how far they were from what was measured.";
  const { rows, why } = DATA.predictor;
  const errors = rows.length ? grid(["metric", "median error", "interval"],
    rows.map(([n, c]) => [metric(n).label, quantity(c), c.i ? `${c.i} %, n ${c.n}` : `n ${c.n}`]), [1]) : missing(why);
  const both = (n) => MEASURED.filter((t) => value(t, n) !== null && t.predicted[n] && t.predicted[n].v !== undefined);
  const names = present.filter((n) => both(n).length > 1);
  const screen = DATA.screen.spearman
    ? el("p", {}, "Rank correlation of the screen with the final ", metric(DATA.screen.metric).label, " (Spearman): ",
      quantity(DATA.screen.spearman), " ", interval(DATA.screen.spearman)) : missing(`rank correlation of screen and final value: ${DATA.screen.why}`);
  let chart = null;
  if (names.length) {
    let chosen = names.find((n) => DATA.axes.includes(n)) || names[0];
    const plot = figure((width) => drawPrediction(Math.min(width, 520), both(chosen), chosen));
    chart = el("div", {}, el("div", { class: "controls" }, choose("predicted against measured", names, chosen, (v) => { chosen = v; plot.redraw(); })), plot.box);
  }
  return section("prediction", "Prediction and screen", lead, errors, chart, el("div", { style: "margin-top:24px" }, screen));
}

function drawPrediction(width, trials, name) {
  const height = Math.min(380, width * 0.8), left = 58, right = width - 12, top = 12, bottom = height - 46, f = metric(name).factor;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", style: `max-width:${width}px`, "aria-label": `predicted against measured ${metric(name).label}` });
  const all = trials.flatMap((t) => [value(t, name) / f, t.predicted[name].v / f]);
  const log = Math.min(...all) > 0 && Math.max(...all) / Math.min(...all) > 20;
  const x = makeScale(all, left, right, log), y = makeScale(all, bottom, top, log);
  for (const [v, text] of x.ticks(Math.max(3, width / 130))) root.append(svg("line", { class: "grid", x1: x(v), x2: x(v), y1: top, y2: bottom }), svg("text", { x: x(v), y: bottom + 17, "text-anchor": "middle" }, text));
  for (const [v, text] of y.ticks(5)) root.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(v), y2: y(v) }), svg("text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, text));
  root.append(svg("line", { class: "axis", x1: left, y1: bottom, x2: right, y2: top, "stroke-dasharray": "4 4" }));
  for (const t of trials) root.append(svg("g", { class: "point front fits", "data-number": t.number, onclick: () => select(t.number) },
    svg("circle", { class: "dot", cx: x(value(t, name) / f), cy: y(t.predicted[name].v / f), r: 4.5 }, svg("title", {}, `trial ${t.number}: ${t.recipe}`))));
  root.append(svg("text", { class: "title", x: right, y: height - 8, "text-anchor": "end" }, `measured ${name}, ${metric(name).unit}`),
    svg("text", { class: "title", x: -top, y: 12, "text-anchor": "end", transform: "rotate(-90)" }, `predicted ${name}, ${metric(name).unit}`));
  return root;
}

function rooflineSection() {
  const lead = "Decoding one token reads every weight once, so read bandwidth limits it; a prompt is limited by the arithmetic rate."
    + " The bars show the share of each limit of this machine that was reached: what is left is room for a better engine, not a promise.";
  const names = ["mbu", "mfu"].filter((n) => present.includes(n));
  if (!names.length) return section("roofline", "How near the machine's limits", lead, missing("no share of a machine limit was measured"));
  const chosen = MEASURED.filter((t) => DATA.front.includes(t.number) || ROLES.has(t.number) || t.number === DATA.parent);
  const trials = chosen.length > 1 ? chosen : MEASURED;
  const speed = { mbu: "decode", mfu: "prefill" };
  const bar = (t, n) => {
    const share = value(t, n);
    if (share === null) return quantity(t.values[n]);
    const label = `${metric(n).label}: ${t.values[n].t} %`;
    return [svg("svg", { viewBox: "0 0 160 10", width: 160, height: 10, role: "img", "aria-label": label },
      svg("rect", { class: "track", width: 160, height: 10, rx: 2 }), svg("rect", { class: "bar", width: 160 * Math.min(1, share), height: 10, rx: 2 })),
    el("small", {}, quantity(t.values[n]), " ", t.values[speed[n]] ? quantity(t.values[speed[n]]) : null)];
  };
  return section("roofline", "How near the machine's limits", lead,
    grid(["trial", "recipe", ...names.map((n) => (n === "mbu" ? "decode: share of read bandwidth" : "prefill: share of arithmetic rate"))],
      trials.map((t) => [t.number, el("code", {}, t.recipe), ...names.map((n) => bar(t, n))]), [0]));
}

function spendSection() {
  const { phases, total } = DATA.spend;
  const lead = "Where the time of the search went.";
  if (!phases.length || !total) return section("spend", "What the search cost", lead, missing("no trial recorded what it spent"));
  let x = 0;
  const bars = phases.map(([name, s], i) => {
    const width = (1000 * s) / total, bar = svg("rect", { class: `p${i % 7}`, x, width: Math.max(0, width - 2), height: 22 }, svg("title", {}, `${name}: ${digits(s, 1)} s`));
    x += width;
    return bar;
  });
  const extras = [["energy.J", "J"], ["money.USD", "USD"]].filter(([k]) => DATA.spend[k]).map(([k, unit]) => `${digits(DATA.spend[k], DATA.spend[k] / 100)} ${unit}`);
  return section("spend", "What the search cost", lead,
    svg("svg", { viewBox: "0 0 1000 22", preserveAspectRatio: "none", width: "100%", height: 22, role: "img", "aria-label": "seconds by phase" }, bars),
    el("div", { class: "legend" }, phases.map(([name, s], i) => el("span", {}, el("i", { class: `swatch p${i % 7}` }), `${name} ${digits(s, s < 10 ? 0.1 : 1)} s (${Math.round((100 * s) / total)} %)`))),
    el("p", { class: "note", style: "margin-top:12px" }, [`${digits(total, 1)} s in all`, ...extras].join(", ") + "."));
}
