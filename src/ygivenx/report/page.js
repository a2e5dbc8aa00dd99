// The page: sections from the data, the bar above them, and the keys.

const THEMES = ["auto", "light", "dark"];

function section(id, title, count, ...children) {
  const heading = el("h2", "", title, count === null ? null : el("span", "count", shown(count)));
  const link = set(el("a", "", title, count === null ? null : el("span", "count", shown(count))), {
    href: `#${id}`,
  });
  byId("nav").append(link);
  byId("main").append(set(el("section", "", heading, ...children), { id, "aria-label": title }));
}

function exampleNode(example) {
  const named = example !== null && typeof example === "object" && !Array.isArray(example);
  return el(
    "li",
    "",
    named ? facts(Object.entries(example), "fields") : paint(text("p", "", ""), shown(example), false),
  );
}

function findingNode(finding) {
  const severity = ["error", "warning", "info"].includes(finding.severity) ? finding.severity : "info";
  const extent = [];
  if (finding.count !== null)
    extent.push(`${shown(finding.count)} ${finding.count === 1 ? "case" : "cases"}`);
  if (finding.share !== null) extent.push(percent(finding.share));
  const part = (name, node) => el("div", "part", el("h3", "", name), node);
  const prose = (name, value) => (value ? part(name, paint(text("p", "", ""), shown(value), false)) : null);
  const examples = finding.examples?.length
    ? part("Examples", el("ol", "examples", ...finding.examples.map(exampleNode)))
    : null;
  const node = el(
    "details",
    `finding ${severity}`,
    el(
      "summary",
      "",
      el("span", "severity", shown(finding.severity)),
      paint(text("span", "message", ""), shown(finding.message), false),
      el("span", "extent number", extent.join(" · ")),
      el("code", "rule", shown(finding.rule)),
    ),
    prose("Why it matters", finding.why),
    prose("What to do", finding.fix),
    examples,
  );
  node.open = severity === "error";
  return node;
}

/** The result first: one line, and what to do about the worst finding. */
function verdictNode(verdict, worst) {
  const tone = ["error", "warning"].includes(worst?.severity) ? worst.severity : "fine";
  const next = tone !== "fine" && worst.fix ? el("p", "next", `Do first: ${worst.fix}`) : null;
  return set(el("div", `verdict ${tone}`, text("p", "", verdict), next), { role: "status" });
}

/** Curves need two steps; what was logged once is a number. The first chart is the widest. */
function chartNodes(charts) {
  const steps = (chart) => new Set(chart.curves.flatMap((curve) => curve.x)).size;
  const drawn = charts.filter((chart) => steps(chart) > 1);
  const once = charts
    .filter((chart) => steps(chart) === 1)
    .flatMap((chart) => chart.curves.map((curve) => [`${chart.title}: ${curve.name}`, curve.y[0]]));
  return [
    drawn.length ? el("div", "grid charts", ...drawn.map((chart) => new Chart(chart).node)) : null,
    once.length ? facts(once, "fields once") : null,
  ];
}

function ledgerNode(ledger) {
  const keys = ["kind", "tokens", "weight", "log_p", "nats_per_token", "share"];
  const names = ["segment", "tokens", "weight", "Σ log p", "nats / token", "share of loss"];
  const fixed = (value) => (isNumber(value) ? decimals(value, 3) : shown(value));
  const exact = (value) => (isNumber(value) && Math.abs(value) >= 0.01 ? decimals(value, 4) : shown(value));
  const cell = { log_p: fixed, nats_per_token: fixed, share: shareNode };
  const cells = (row) => keys.map((key) => (cell[key] ?? ((value) => value))(row[key]));
  const sum = (key) => ledger.rows.reduce((total, row) => total + (isNumber(row[key]) ? row[key] : 0), 0);
  const total = {
    kind: "total",
    tokens: sum("tokens"),
    weight: sum("weight"),
    log_p: sum("log_p"),
    share: sum("share"),
  };
  // A first token has no log p, so the mean's count comes from the rows' own means.
  const scored = ledger.rows.reduce(
    (count, row) => count + (row.nats_per_token ? -row.log_p / row.nats_per_token : 0),
    0,
  );
  total.nats_per_token = scored ? -total.log_p / scored : null;
  return el(
    "article",
    "ledger",
    table(ledger.title, names, ledger.rows.map(cells), cells(total)),
    ledger.facts.length ? facts(ledger.facts, "fields", exact) : null,
    notes(ledger.notes),
  );
}

function shareNode(share) {
  const bar = el("span", "share", percent(share));
  bar.style.setProperty("--share", isNumber(share) ? Math.max(0, Math.min(1, share)) : 0);
  return bar;
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").lastChild.textContent = `Theme: ${theme}`;
  set(byId("theme"), { "aria-label": `Theme: ${theme}` });
}

function nextTheme() {
  const now = document.documentElement.dataset.theme ?? "auto";
  setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
}

function keyActions(list) {
  const keys = { "?": () => byId("keys").showModal(), d: nextTheme };
  if (list)
    Object.assign(keys, {
      "/": () => list.search.focus(),
      "[": () => list.turn(-1),
      "]": () => list.turn(1),
      c: () => list.colour(list.node.className === "colour-log-p" ? "weight" : "log-p"),
    });
  return keys;
}

function listenToKeys(list) {
  const keys = keyActions(list);
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      hideTip();
      return;
    }
    const typing = event.target.matches?.("input, select, textarea") || byId("keys").open;
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });
  byId("theme").addEventListener("click", nextTheme);
  byId("help").addEventListener("click", keys["?"]);
}

function main() {
  const data = JSON.parse(byId("data").textContent);
  let list = null;
  byId("subtitle").textContent = data.subtitle;
  if (data.verdict) byId("main").append(verdictNode(data.verdict, data.findings[0]));
  if (data.summary.length) byId("main").append(facts(data.summary, "summary"));
  if (data.findings.length)
    section("findings", "Findings", data.findings.length, ...data.findings.map(findingNode));
  if (data.charts.length)
    section("curves", "Curves", null, ...chartNodes(data.charts));
  if (data.tables.length) {
    const tables = data.tables.map((t) =>
      el("article", "", table(t.title, t.columns, t.rows), notes(t.notes)),
    );
    section("tables", "Comparisons", null, ...tables);
  }
  if (data.ledgers.length)
    section("ledgers", "Ledgers", data.ledgers.length, el("div", "grid", ...data.ledgers.map(ledgerNode)));
  if (data.strips.length) {
    list = new RowList(data);
    section("rows", "Rows", data.strips.length, list.node);
  }
  if (data.about.length) section("about", "About", null, facts(data.about, "fields"));
  const empty = !byId("nav").childElementCount && !data.summary.length && !data.verdict;
  if (empty) byId("main").append(el("p", "note", "Nothing was reported."));
  listenToKeys(list);
  addEventListener("beforeprint", () => {
    for (const finding of document.querySelectorAll(".finding")) finding.open = true;
  });
  performance.mark("drawn");
}

main();
