// Token strips: what each row teaches, token by token. Rows are filtered in memory and drawn a page at a time.

const PAGE_SIZE = 20;
const STRIP_LIMIT = 1500; // tokens drawn before one asks for more
const EDGES = [0.1, 0.5, 1, 2, 4, 8]; // −log p in nats; bins of surprise 0 to 6

const surprise = (logP) => isNumber(logP) ? EDGES.filter((edge) => -logP >= edge).length : logP === null ? null : EDGES.length;

const spread = (runs) => runs.flatMap(([value, count]) => Array(count).fill(value));

/** One row of the page with its runs spread out, made when first needed. */
class Row {
  constructor(data, strip, index) {
    Object.assign(this, { data, strip, index, tokens: strip.tokens, logP: strip.log_p });
    this.current = 0;
  }
  get weights() { return this.spreadWeights ??= spread(this.strip.weights); }
  get kinds() { return this.spreadKinds ??= spread(this.strip.kinds); }
  token(i) { return this.data.vocabulary[this.tokens[i]][0]; }
  id(i) { return this.data.vocabulary[this.tokens[i]][1]; }
  kind(i) { return this.data.kinds[this.kinds[i]]; }
  get text() { return this.joined ??= this.tokens.map((_, i) => this.token(i)).join(""); }
  get searchable() {
    return this.lowered ??= [this.strip.title, this.text, ...this.strip.fields.flat().map(shown)].join("\n").toLowerCase();
  }
  /** Trained tokens, their mean weighted loss in nats, and the place and value of the lowest log p among them. */
  get stats() { return this.counted ??= this.count(); }
  count() {
    const stats = { trained: 0, weight: 0, loss: 0, worst: null, worstAt: -1 };
    this.weights.forEach((weight, i) => {
      if (!(weight > 0)) return;
      const logP = this.logP[i];
      stats.trained += 1;
      if (!isNumber(logP)) return;
      stats.weight += weight;
      stats.loss -= weight * logP;
      if (stats.worst === null || logP < stats.worst) Object.assign(stats, { worst: logP, worstAt: i });
    });
    stats.mean = stats.weight ? stats.loss / stats.weight : null;
    return stats;
  }
}

const ORDERS = {
  "in order": null,
  "highest loss first": (row) => -(row.stats.mean ?? -Infinity),
  "least expected token first": (row) => row.stats.worst ?? Infinity,
  "most trained tokens first": (row) => -row.stats.trained,
};

/** A test of one token from the filters, or null where every token passes. */
function tokenTest({ trained, kind, below }) {
  if (trained === "any" && kind < 0 && below === null) return null;
  return (row, i) =>
    (trained === "any" || (row.weights[i] > 0) === (trained === "trained")) &&
    (kind < 0 || row.kinds[i] === kind) &&
    (below === null || (isNumber(row.logP[i]) && row.logP[i] <= below));
}

function select(rows, filters) {
  const words = filters.words.toLowerCase(), test = tokenTest(filters), order = ORDERS[filters.order];
  const kept = rows.filter((row) =>
    (!words || row.searchable.includes(words)) && (!test || row.tokens.some((_, i) => test(row, i))));
  return order ? kept.sort((a, b) => order(a) - order(b) || a.index - b.index) : kept;
}

/** Which tokens a search text touches. */
function hits(row, words) {
  const touched = new Set();
  if (!words) return touched;
  const whole = row.text.toLowerCase(), needle = words.toLowerCase();
  let token = 0, end = row.token(0)?.length ?? 0;
  for (let at = whole.indexOf(needle); at >= 0; at = whole.indexOf(needle, at + needle.length)) {
    while (end <= at) end += row.token(++token).length;
    for (let i = token, stop = end; ; stop += row.token(++i).length) {
      touched.add(i);
      if (stop >= at + needle.length) break;
    }
  }
  return touched;
}

function tokenNode(row, i, { test, touched }) {
  const node = paint(el("span", "token"), row.token(i));
  if (!row.token(i)) node.append(el("i", "empty"));
  if (!row.token(i).trim()) set(node, { "aria-label": JSON.stringify(row.token(i)) });
  const weight = row.weights[i], bin = surprise(row.logP[i]);
  node.dataset.i = i;
  set(node, { role: "option", tabindex: i === row.current ? "0" : "-1" });
  if (bin !== null) node.classList.add(`bin-${bin}`);
  if (weight > 0) {
    node.classList.add("trained");
    if (weight !== 1) node.style.setProperty("--weight", Math.max(0.2, Math.min(1, weight)));
  }
  if (touched.has(i)) node.classList.add("hit");
  if (test && !test(row, i)) node.classList.add("dim");
  return node;
}

/** Tokens [from, to) of a row, one element for each run of a kind. */
function runNodes(row, from, to, view) {
  const nodes = [];
  for (let i = from; i < to; i += 1) {
    if (i === from || row.kinds[i] !== row.kinds[i - 1]) {
      nodes.push(set(el("span", "run"), { role: "group", "aria-label": row.kind(i), "data-kind": row.kind(i) }));
      if (["template", "bos", "end_of_turn", "token"].includes(row.kind(i))) nodes.at(-1).classList.add("frame");
    }
    nodes.at(-1).append(tokenNode(row, i, view));
  }
  return nodes;
}

function stripNode(row, view) {
  const strip = set(el("div", "strip"), { role: "listbox", "aria-label": `Tokens of row ${row.index + 1}`, "aria-orientation": "horizontal" });
  const total = row.tokens.length;
  row.current = Math.min(row.current, Math.max(0, Math.min(total, STRIP_LIMIT) - 1));
  strip.append(...runNodes(row, 0, Math.min(total, STRIP_LIMIT), view));
  if (total <= STRIP_LIMIT) return [strip];
  const more = button(`Show ${shown(total - STRIP_LIMIT)} more tokens`, () => {
    strip.append(...runNodes(row, STRIP_LIMIT, total, view));
    more.remove();
  });
  more.classList.add("more");
  return [strip, more];
}

function rowNode(row, view) {
  const { stats } = row;
  const summary = [`${shown(row.tokens.length)} tokens`, `${shown(stats.trained)} trained`];
  if (stats.mean !== null) summary.push(`${decimals(stats.mean, 3)} nats per token`, `lowest log p ${decimals(stats.worst, 2)}`);
  const node = el("li", "row",
    el("div", "head", el("span", "index", shown(row.index + 1)), paint(text("h3", "", ""), row.strip.title, false),
      el("span", "stats number", summary.join(" · "))),
    ...stripNode(row, view), notes(row.strip.notes), row.strip.fields.length ? facts(row.strip.fields, "fields") : null);
  node.dataset.row = row.index;
  return node;
}

/** What is known of token i, as named values. */
function tokenFacts(row, i) {
  const logP = row.logP[i], weight = row.weights[i];
  const missing = i === 0 ? "none: nothing before it" : "none";
  return [
    ["token", JSON.stringify(row.token(i))],
    ["id", row.id(i) === null ? null : String(row.id(i))],
    ["position", String(i)],
    ["segment", row.kind(i)],
    ["log p", logP === null ? missing : isNumber(logP) ? `${decimals(logP, 4)} nats` : logP],
    ["probability", isNumber(logP) ? probability(logP) : logP === "−∞" ? "0" : null],
    ["weight", weight > 0 ? `${shown(weight)}, trained` : "0, not trained"],
    ["loss", weight > 0 && isNumber(logP) ? `${decimals(-weight * logP, 4)} nats` : null],
  ].filter(([, value]) => value !== null);
}

function probability(logP) {
  const p = Math.exp(logP);
  return p >= 0.001 ? percent(p) : signed(p.toExponential(1));
}

function showTip(row, token) {
  const tip = byId("tip");
  tip.replaceChildren(facts(tokenFacts(row, Number(token.dataset.i)), "tip-facts"));
  tip.hidden = false;
  set(token, { "aria-describedby": "tip" });
  const box = token.getClientRects()[0] ?? token.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const above = box.bottom + own.height + 12 > innerHeight && box.top > own.height + 12;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - own.width - 8))}px`;
  tip.style.top = `${above ? box.top - own.height - 6 : box.bottom + 6}px`;
}

const hideTip = () => { byId("tip").hidden = true; };

/** The list with its filters and pages; the one owner of what is shown. */
class RowList {
  constructor(data) {
    this.rows = data.strips.map((strip, i) => new Row(data, strip, i));
    this.filters = { words: "", trained: "any", kind: -1, below: null, order: "in order" };
    this.page = 0;
    this.count = set(el("p", "count"), { role: "status" });
    this.list = el("ol", "rows");
    this.pagers = [this.pager(), this.pager()];
    this.node = el("div", "colour-log-p", this.form(data), this.legend(), el("div", "line", this.count, this.pagers[0]), this.list, this.pagers[1]);
    this.listen();
    this.filter();
  }

  form(data) {
    const form = set(el("div", "filters"), { role: "search", "aria-label": "Filter rows" });
    const field = (label, input, change) => {
      input.addEventListener("input", () => { change(input.value); this.later(); });
      form.append(el("label", "", label, input));
      return input;
    };
    const options = (pairs) => el("select", "", ...pairs.map(([value, label]) => set(el("option", "", label), { value })));
    const names = (list) => list.map((name) => [name, name]);
    this.search = field("Text", set(el("input"), { type: "search", placeholder: "in tokens, titles, texts", "aria-keyshortcuts": "/", autocomplete: "off", spellcheck: "false" }),
      (value) => { this.filters.words = value; });
    field("Tokens", options([["any", "all"], ["trained", "trained"], ["untrained", "not trained"]]), (value) => { this.filters.trained = value; });
    field("Segment", options([[-1, "all"], ...data.kinds.map((kind, i) => [i, kind])]), (value) => { this.filters.kind = Number(value); });
    field("log p at most", set(el("input"), { type: "number", step: "0.5", placeholder: "e.g. −5" }),
      (value) => { this.filters.below = value === "" ? null : Number(value); });
    field("Order", options(names(Object.keys(ORDERS))), (value) => { this.filters.order = value; });
    return form;
  }

  legend() {
    const scale = set(el("span", "scale"), { role: "img", "aria-label": `Colour scale of minus log p, in nats, from 0 to more than ${EDGES.at(-1)}` });
    [0, ...EDGES].forEach((edge, i) => scale.append(el("span", `token bin-${i}`, i === EDGES.length ? `≥ ${edge}` : String(edge))));
    const weight = el("span", "scale", ...[0.25, 0.5, 1].map((w) => {
      const sample = el("span", "token trained", String(w));
      sample.style.setProperty("--weight", w);
      return sample;
    }));
    const choice = (value, ...label) => {
      const input = set(el("input"), { type: "radio", name: "colour", value });
      input.checked = value === "log-p";
      input.addEventListener("change", () => this.colour(value));
      return el("label", "choice", input, ...label);
    };
    this.choices = [choice("log-p", "−log p, nats ", scale), choice("weight", "weight ", weight)];
    return el("fieldset", "legend-bar", el("legend", "", "Colour"), ...this.choices,
      el("span", "sample", el("span", "token trained", "underlined"), " = trained"));
  }

  colour(value) {
    this.node.className = `colour-${value}`;
    for (const choice of this.choices) choice.firstChild.checked = choice.firstChild.value === value;
  }

  pager() {
    const label = el("span", "number"), turn = (by) => () => this.turn(by);
    const nav = set(el("nav", "pager", button("‹ Previous", turn(-1)), label, button("Next ›", turn(1))), { "aria-label": "Pages of rows" });
    return nav;
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.filter(), 120);
  }

  filter() {
    this.kept = select(this.rows, this.filters);
    this.view = { test: tokenTest(this.filters) };
    this.show(0);
  }

  get pages() { return Math.max(1, Math.ceil(this.kept.length / PAGE_SIZE)); }

  turn(by) {
    const page = this.page + by;
    if (page < 0 || page >= this.pages) return;
    this.show(page);
    this.node.scrollIntoView();
  }

  show(page) {
    hideTip();
    this.page = page;
    const focused = this.list.contains(document.activeElement);
    const from = page * PAGE_SIZE, drawn = this.kept.slice(from, from + PAGE_SIZE);
    this.list.replaceChildren(...drawn.map((row) => rowNode(row, { ...this.view, touched: hits(row, this.filters.words) })));
    set(this.list, { start: from + 1 });
    const of = this.kept.length === this.rows.length ? "" : ` of ${shown(this.rows.length)}`;
    this.count.textContent = this.kept.length
      ? `${shown(this.kept.length)}${of} rows, ${shown(from + 1)}–${shown(from + drawn.length)} shown`
      : "No row passes these filters.";
    for (const pager of this.pagers) {
      const [back, label, on] = pager.children;
      pager.hidden = this.pages === 1;
      label.textContent = `${shown(page + 1)} / ${shown(this.pages)}`;
      back.disabled = page === 0;
      on.disabled = page === this.pages - 1;
    }
    if (focused) this.list.querySelector('.token[tabindex="0"]')?.focus({ preventScroll: true });
  }

  rowOf(token) { return this.rows[Number(token.closest(".row").dataset.row)]; }

  focus(item, i) {
    const row = this.rows[Number(item.dataset.row)];
    if (i >= STRIP_LIMIT) item.querySelector(".more")?.click();
    const target = item.querySelector(`.token[data-i="${i}"]`);
    if (!target) return;
    item.querySelector('.token[tabindex="0"]')?.setAttribute("tabindex", "-1");
    target.setAttribute("tabindex", "0");
    row.current = i;
    target.focus();
  }

  move(event) {
    const token = event.target.closest?.(".token");
    if (!token || event.ctrlKey || event.metaKey || event.altKey) return;
    const row = this.rowOf(token), item = token.closest(".row"), i = Number(token.dataset.i);
    const target = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: row.tokens.length - 1,
      n: row.weights.findIndex((weight, j) => j > i && weight > 0), w: row.stats.worstAt }[event.key];
    const sibling = { ArrowUp: item.previousElementSibling, ArrowDown: item.nextElementSibling }[event.key];
    if (target === undefined && sibling === undefined) return;
    event.preventDefault();
    if (sibling) this.focus(sibling, this.rows[Number(sibling.dataset.row)].current);
    else if (target !== undefined) this.focus(item, target);
  }

  listen() {
    const onToken = (act) => (event) => {
      const token = event.target.closest?.(".rows .token");
      if (token) act(token);
    };
    const show = onToken((token) => showTip(this.rowOf(token), token));
    this.list.addEventListener("pointerover", show);
    this.list.addEventListener("focusin", show);
    this.list.addEventListener("pointerleave", hideTip);
    this.list.addEventListener("focusout", hideTip);
    this.list.addEventListener("click", onToken((token) => this.focus(token.closest(".row"), Number(token.dataset.i))));
    this.list.addEventListener("keydown", (event) => this.move(event));
    addEventListener("scroll", () => { if (!document.activeElement?.matches?.(".rows .token")) hideTip(); }, { passive: true });
  }
}
