// Every trial, sortable by every column; each number with its method's mark, interval and sample count.
const RUNGS = { measured: (t) => t.outcome === "measured", screened: (t) => t.outcome === "screened",
  "refused or failed": (t) => t.failed, "dropped by prediction": (t) => t.outcome === "predicted", all: () => true };

function tableSection() {
  const lead = "Measured trials are results. The others are kept with the reason why they are not: a screen or a prediction"
    + " chooses what to run and is never shown as a result.";
  if (!DATA.trials.length) return section("trials", "All trials", lead, missing("the study has no trial yet"));
  const state = { rung: MEASURED.length ? "measured" : "all", by: "number", up: true };
  const first = ["size", "memory", "latency", "ttft", "energy", "money", "agreement", "kl"].filter((n) => present.includes(n));
  const ordered = [...first, ...present.filter((n) => !first.includes(n))];
  const columns = [
    { name: "number", head: "trial", get: (t) => t.number, show: (t) => t.number, num: true },
    { name: "recipe", head: "recipe", get: (t) => t.recipe, class: "recipe", show: (t) => [el("code", {}, t.recipe), roleNote(t)] },
    { name: "outcome", head: "outcome", get: (t) => t.outcome, class: "text", show: (t) => [t.outcome, t.sentence ? el("small", {}, t.sentence) : null] },
    ...ordered.map((n) => ({ name: n, head: n, unit: metric(n).unit, get: (t) => value(t, n), num: true, label: metric(n).label,
      show: (t) => (t.values[n] ? [quantity(t.values[n], false), interval(t.values[n])] : el("span", { class: "dim" }, "–")) })),
    { name: "coverage", head: "coverage", get: (t) => t.coverage.join("; "), class: "text", show: (t) => t.coverage.join("; ") },
    { name: "spent", head: "spent", unit: "s", get: (t) => t.spent, num: true, show: (t) => digits(t.spent, 0.1) },
  ];
  const body = el("tbody", {}), heads = el("tr", {});
  const table = el("table", { class: "wide sticky", id: "trials-table" }, el("thead", {}, heads), body);
  const draw = () => {
    const column = columns.find((c) => c.name === state.by);
    const rows = DATA.trials.filter(RUNGS[state.rung]).sort((a, b) => compare(column.get(a), column.get(b), state.up));
    const shown = columns.filter((c) => c.name !== "outcome" || state.rung !== "measured");
    heads.replaceChildren(...shown.map((c) => el("th", { scope: "col", class: c.num ? "num" : null, title: c.label,
      "aria-sort": c.name === state.by ? (state.up ? "ascending" : "descending") : "none" },
    el("button", { type: "button", onclick: () => { state.up = c.name === state.by ? !state.up : true; state.by = c.name; draw(); } }, c.head),
    c.unit ? el("small", {}, c.unit) : null)));
    body.replaceChildren(...rows.map((t) => el("tr", { "data-number": t.number, class: t.number === selected ? "selected" : null,
      onclick: () => select(t.number) }, shown.map((c) => el("td", { class: c.num ? "num" : c.class }, c.show(t))))));
    if (!rows.length) body.append(el("tr", {}, el("td", { colspan: columns.length }, "None.")));
  };
  watchers.push((number) => { for (const row of body.rows) row.classList.toggle("selected", +row.dataset.number === number); });
  draw();
  const counted = (name) => DATA.trials.filter(RUNGS[name]).length;
  const options = Object.keys(RUNGS).map((n) => el("option", { value: n, selected: n === state.rung }, `${n} (${counted(n)})`));
  return section("trials", "All trials", lead,
    el("div", { class: "controls" }, el("label", {}, "show", el("select", { onchange: (e) => { state.rung = e.target.value; draw(); } }, options)),
      el("span", { class: "note" }, Object.entries(DATA.marks).map(([m, s]) => `${s} ${m}`).join("   "))),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "table of trials" }, table));
}

function compare(a, b, up) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "number" ? a - b : String(a).localeCompare(String(b));
  return up ? order : -order;
}
function roleNote(t) {
  const notes = [...(ROLES.get(t.number) || []), t.number === DATA.parent ? "parent" : "", t.fits === false ? "misses the budget" : ""];
  const text = notes.filter(Boolean).join(", ");
  return text ? el("small", {}, text) : null;
}
