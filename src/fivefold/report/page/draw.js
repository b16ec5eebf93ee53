// Small helpers: elements, scales, ticks, and the one selection all views share. Text is only ever set as text.
const DATA = JSON.parse(document.getElementById("data").textContent);
const TRIALS = new Map(DATA.trials.map((t) => [t.number, t]));
const MEASURED = DATA.trials.filter((t) => t.outcome === "measured");
const ROLES = new Map();
for (const pick of DATA.picks.rows) ROLES.set(pick.number, [...(ROLES.get(pick.number) || []), ...String(pick.role).split(", ")]);

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child instanceof Node ? child : String(child));
  }
  return node;
}
const el = (tag, attributes, ...children) => put(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  put(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const metric = (name) => DATA.metrics[name] || { label: name, unit: "", factor: 1, better: "lower" };
const present = Object.keys(DATA.metrics).filter((name) => MEASURED.some((t) => value(t, name) !== null));
function value(trial, name) {
  const cell = trial.values[name];
  return cell && cell.v !== undefined ? cell.v : null;
}
const title = (name) => metric(name).label + (metric(name).unit ? `, ${metric(name).unit}` : "");
const better = (name) => (metric(name).better === "lower" ? "lower is better" : "higher is better");

function digits(number, step) {
  if (number === 0) return "0";
  const size = Math.abs(number);
  if (size < 1e-4 || size >= 1e7) return number.toExponential(1).replace("-", "−");
  const places = Math.max(0, Math.min(6, -Math.floor(Math.log10(step || size) + 1e-9)));
  return number.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places }).replace("-", "−");
}

// Round ticks between low and high, about `count` of them.
function linearTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(i * step);
  return out.map((v) => [v, digits(v, step === 2.5 * power ? step / 10 : step)]);
}
function logTicks(low, high, count) {
  for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 7]]) {
    const out = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const m of steps) if (m * 10 ** e >= low * 0.999 && m * 10 ** e <= high * 1.001) out.push([m * 10 ** e, m]);
    if (out.length >= Math.min(3, count)) {
      const every = Math.ceil(out.length / (count + 2));
      return out.filter((_, i) => i % every === 0).map(([v, m]) => [v, digits(v, m === 1.5 ? v / 10 : v)]);
    }
  }
  return linearTicks(low, high, count);
}

// A scale from values (in display units) to pixels, with a margin; log only when every value is positive.
function makeScale(values, from, to, wantsLog) {
  const log = wantsLog && Math.min(...values) > 0, f = log ? Math.log10 : (v) => v;
  let low = f(Math.min(...values)), high = f(Math.max(...values));
  const pad = high > low ? 0.07 * (high - low) : Math.abs(high) * 0.1 || 1;
  const floor = !log && low >= 0 ? 0 : -Infinity;
  low = Math.max(floor, low - pad);
  high += pad;
  const scale = (v) => from + ((f(v) - low) / (high - low)) * (to - from);
  const inverse = log ? (x) => 10 ** x : (x) => x;
  scale.log = log;
  scale.ticks = (count) => (log ? logTicks : linearTicks)(inverse(low), inverse(high), count);
  scale.clamp = (v) => Math.max(Math.min(from, to), Math.min(Math.max(from, to), log && v <= 0 ? from : scale(v)));
  return scale;
}

// A figure that is drawn again whenever its width changes, so that text keeps its size.
function figure(draw) {
  const box = el("div", { class: "plot" });
  let width = 0;
  const redraw = () => { if (width > 0) box.replaceChildren(draw(width)); };
  new ResizeObserver((entries) => {
    const now = Math.floor(entries[0].contentRect.width);
    if (now !== width) { width = now; requestAnimationFrame(redraw); }
  }).observe(box);
  return { box, redraw };
}

let selected = null;
const watchers = [];
function select(number) {
  selected = number;
  for (const watch of watchers) watch(number);
}
const press = (act) => ({
  onclick: act,
  onkeydown: (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); act(); } },
});

function quantity(cell, unit = true) {
  if (!cell) return el("span", { class: "dim" }, "–");
  if (cell.v === undefined) return el("span", { class: "dim", title: cell.r || "not known" }, "– " + (cell.r || ""));
  const said = [cell.m, cell.n > 1 ? `n = ${cell.n}` : "", cell.r || ""].filter(Boolean).join("; ");
  return el("span", { title: said }, el("span", { class: "mark", "aria-label": cell.m }, DATA.marks[cell.m]),
    cell.t + (unit && cell.u ? ` ${cell.u}` : ""));
}
const interval = (cell) => {
  const parts = cell && cell.v !== undefined ? [cell.i, cell.n > 1 ? `n ${cell.n}` : ""].filter(Boolean) : [];
  return parts.length ? el("small", {}, parts.join(" · ")) : null;
};
const missing = (why) => el("p", { class: "missing" }, `Missing: ${why}.`);
function section(id, heading, lead, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-h` }, el("h2", { id: `${id}-h` }, heading),
    lead ? el("p", {}, lead) : null, ...children);
}
function grid(headings, rows, numeric = []) {
  const head = headings.map((h, i) => el("th", { scope: "col", class: numeric.includes(i) ? "num" : null }, h));
  const body = rows.map((row) => el("tr", {}, row.map((c, i) => el("td", { class: numeric.includes(i) ? "num" : "text" }, c))));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": headings.filter(Boolean).join(", ") },
    el("table", { class: "wide" }, el("thead", {}, el("tr", {}, head)), el("tbody", {}, body)));
}
function choose(label, names, chosen, act) {
  const options = names.map((n) => el("option", { value: n, selected: n === chosen }, metric(n).label));
  return el("label", {}, label, el("select", { onchange: (e) => act(e.target.value) }, options));
}
