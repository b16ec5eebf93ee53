// The page from top to bottom.
function head() {
  const counts = Object.entries(DATA.counts).map(([outcome, n]) => `${n} ${outcome}`).join(", ") || "no trial yet";
  const settings = Object.entries(DATA.settings);
  return el("header", {}, el("h1", {}, DATA.title), el("p", { class: "lead" }, `A search for cheaper ways to run this model: ${counts}.`),
    settings.length ? el("dl", { class: "settings" }, settings.map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, v)))) : null,
    brief(), DATA.budget_trouble ? el("p", { class: "warn" }, DATA.budget_trouble) : null);
}

// The honesty card: the machine, and what was measured, counted and modelled, with the typical uncertainty.
function brief() {
  const names = (method) => DATA.honesty.filter((r) => r.methods.includes(method)).map((r) =>
    r.metric + (r.width === null || r.width < 5e-4 ? "" : ` ±${digits(100 * r.width, r.width < 0.1 ? 0.1 : 1)} %`)).join(", ");
  const lacking = DATA.honesty.filter((r) => r.known < r.of).map((r) => r.metric).join(", ");
  const machine = DATA.machine.filter(([k]) => ["processor", "memory", "accelerator", "os", "date"].includes(k)).map(([, v]) => v).join(", ");
  const items = [["Machine", machine || "not recorded"], ["● Measured", names("measured")], ["= Counted", names("counted")], ["~ Modelled", names("modelled")],
    ["Not obtained everywhere", lacking]].filter(([, v]) => v);
  return el("dl", { class: "brief", "aria-label": "how far to trust these numbers" }, items.map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, v))));
}

function trustSection() {
  const lead = "Every number says how it was obtained: measured (a clock, a counter, a score on data), counted (exact by construction),"
    + " or modelled (computed from other numbers by stated assumptions).";
  if (!DATA.honesty.length) return section("trust", "How far to trust these numbers", lead, missing("nothing has been measured yet"));
  const rows = DATA.honesty.map((r) => [el("span", {}, r.label, el("small", {}, r.metric)),
    r.methods.map((m) => `${DATA.marks[m]} ${m}`).join(", ") || "not obtained", `${r.known} of ${r.of}`, r.n.length ? (r.n.length > 1 ? `${r.n[0]} to ${r.n[r.n.length - 1]}` : r.n[0]) : "–",
    r.width === null ? "–" : `±${digits(100 * r.width, 0.1)} %`, r.notes.join("; ")]);
  const facts = [...DATA.machine, ...DATA.contexts];
  return section("trust", "How far to trust these numbers", lead,
    facts.length ? el("dl", { class: "facts" }, facts.map(([k, v]) => el("div", { class: "fact" }, el("dt", {}, k), el("dd", {}, v)))) : missing("the machine was not recorded"),
    grid(["number", "how", "trials with it", "samples each", "typical interval", "note"], rows, [2, 3, 4]));
}

const HEADLINE = { smallest: ["size", "network", "memory"], greenest: ["energy", "carbon"], safest: ["agreement", "kl", "label_loyalty"], fastest: ["latency", "decode"], cheapest: ["money"] };
function picksSection() {
  const budget = Object.values(DATA.bounds).map((b) => b.text + (b.shown && b.text.endsWith("x") ? ` (${b.shown})` : "")).join(", ");
  const lead = budget ? `Within the budget: ${budget}. Each against the parent, the model as it came.` : "Each against the parent, the model as it came. No budget was set.";
  const parent = TRIALS.get(DATA.parent);
  const cards = DATA.picks.rows.filter((p) => TRIALS.has(p.number)).map((p) => pickCard(p, TRIALS.get(p.number), parent));
  return section("picks", "What to take", lead, DATA.infeasible ? el("p", { class: "warn" }, DATA.infeasible) : null,
    cards.length ? el("div", { class: "cards" }, cards) : DATA.infeasible ? null : missing(DATA.picks.why),
    parent ? null : missing("the parent has not been measured, so nothing can be compared with it"));
}

function pickCard(pick, t, parent) {
  const role = String(pick.role), lead = [...role.split(", ").flatMap((r) => HEADLINE[r] || []), ...DATA.axes].find((n) => present.includes(n) && t.values[n]);
  const against = (n) => {
    const given = (pick.against_parent || {})[n];
    if (given && given.v !== undefined) return el("span", {}, `${given.t}×`, el("small", { class: "dim" }, given.i || ""));
    const [a, b] = [value(t, n), parent ? value(parent, n) : null];
    return el("span", {}, a !== null && b && metric(n).resource !== "quality" ? `${digits(a / b, a / b < 10 ? 0.01 : 1)}×` : "");
  };
  const names = [...new Set(["size", "memory", "latency", "ttft", "energy", "money", "agreement", "kl", "accuracy", ...Object.keys(DATA.bounds)])].filter((n) => t.values[n]);
  const payback = DATA.payback.rows.filter((r) => r.number === t.number && r.sentence).map((r) => `${r.resource}: ${r.sentence}`);
  const c = lead ? t.values[lead] : null;
  return el("article", { class: "card" }, el("div", { class: "role" }, `${role} · trial ${t.number}`),
    c && c.v !== undefined ? el("div", { class: "big" }, c.t, el("small", {}, ` ${c.u || ""} ${lead}`)) : null,
    el("code", {}, t.recipe),
    el("table", {}, el("thead", {}, el("tr", {}, el("th", {}), el("th", {}), el("th", { scope: "col" }, "× parent"))), el("tbody", {}, names.map((n) => el("tr", {}, el("td", {}, n), el("td", {}, quantity(t.values[n]), el("small", { class: "dim" }, t.values[n].i || "")), el("td", {}, against(n)))))),
    [pick.ratios, pick.tested].filter(Boolean).map((said) => el("p", { class: "why dim" }, said)), pick.why ? el("p", { class: "why" }, pick.why) : null, payback.length ? el("p", { class: "why dim" }, payback.join("; ")) : null,
    t.coverage.length ? el("p", { class: "why dim" }, t.coverage.join("; ")) : null);
}

const SECTIONS = [picksSection, frontSection, parallelSection, tableSection, effectsSection, interactionsSection,
  paybackSection, predictionSection, rooflineSection, spendSection, trustSection];
const sections = SECTIONS.map((make) => make());
const header = head();
header.append(el("nav", { "aria-label": "sections" }, sections.map((s) => el("a", { href: `#${s.id}` }, s.querySelector("h2").textContent))));
document.getElementById("page").replaceChildren(header, ...sections);
select((DATA.picks.rows.find((p) => TRIALS.has(p.number)) || {}).number ?? DATA.parent);
