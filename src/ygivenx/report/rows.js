// The list of rows: filtered in memory, drawn a page at a time, walked by keys.

const PAGE_SIZE = 20;

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
    (trained === "any" || isTrained(row.weights[i]) === (trained === "trained")) &&
    (kind < 0 || row.kinds[i] === kind) &&
    (below === null || row.logP(i) <= below);
}

function select(rows, filters) {
  const words = fold(filters.words);
  const test = tokenTest(filters);
  const order = ORDERS[filters.order];
  const kept = rows.filter(
    (row) => (!words || row.searchable.includes(words)) && (!test || row.tokens.some((_, i) => test(row, i))),
  );
  return order ? kept.sort((a, b) => order(a) - order(b) || a.index - b.index) : kept;
}

const options = (...pairs) =>
  el("select", "", ...pairs.map(([value, label]) => set(el("option", "", label), { value })));

/** The list with its filters and pages; the one owner of what is shown. */
class RowList {
  constructor(data) {
    // A step's weights are far below 1: what is drawn is their share of the largest.
    const largest = data.strips.flatMap((strip) => strip.weights.map(([weight]) => Math.abs(weight) || 0));
    data.unit = Math.min(1, range([0, ...largest])[1]) || 1;
    this.rows = data.strips.map((strip, i) => new Row(data, strip, i));
    this.filters = { words: "", trained: "any", kind: -1, below: null, order: "in order" };
    this.page = 0;
    this.count = set(el("p", "count"), { role: "status" });
    this.list = el("ol", data.columns > 1 ? "rows beside" : "rows");
    this.pagers = [this.pager(), this.pager()];
    this.node = el(
      "div",
      "colour-log-p",
      this.form(data),
      this.legend(data.unit),
      el("div", "line", this.count, this.pagers[0]),
      this.list,
      this.pagers[1],
    );
    this.listen();
    this.filter();
  }

  /** A labelled control that sets one filter. */
  control(name, label, input, read = (value) => value) {
    input.addEventListener("input", () => {
      this.filters[name] = read(input.value);
      this.later();
    });
    return el("label", "", label, input);
  }

  form(data) {
    this.search = set(el("input"), { type: "search", placeholder: "in tokens, titles, texts" });
    const below = set(el("input"), { type: "number", step: "0.5", placeholder: "e.g. −5" });
    const trained = options(["any", "all"], ["trained", "trained"], ["untrained", "not trained"]);
    const kinds = options([-1, "all"], ...data.kinds.map((kind, i) => [i, kind]));
    const orders = options(...Object.keys(ORDERS).map((name) => [name, name]));
    const form = el(
      "div",
      "filters",
      this.control("words", "Text", this.search),
      this.control("trained", "Tokens", trained),
      this.control("kind", "Segment", kinds, Number),
      this.control("below", "log p at most", below, (value) => (value === "" ? null : Number(value))),
      this.control("order", "Order", orders),
    );
    return set(form, { role: "search", "aria-label": "Filter rows" });
  }

  legend(unit) {
    const scale = set(el("span", "scale"), {
      role: "img",
      "aria-label": `Colours of minus log p, 0 to over ${EDGES.at(-1)} nats`,
    });
    [0, ...EDGES].forEach((edge, i) =>
      scale.append(el("span", `token bin-${i}`, i === EDGES.length ? `≥ ${edge}` : String(edge))),
    );
    const weight = el(
      "span",
      "scale",
      ...[0.25, 0.5, 1].map((w) => {
        const sample = el("span", "token trained", shown(w * unit));
        sample.style.setProperty("--weight", w);
        return sample;
      }),
    );
    const choice = (value, ...label) => {
      const input = set(el("input"), { type: "radio", name: "colour", value });
      input.checked = value === "log-p";
      input.addEventListener("change", () => this.colour(value));
      return el("label", "choice", input, ...label);
    };
    this.choices = [choice("log-p", "−log p, nats ", scale), choice("weight", "weight ", weight)];
    return el(
      "fieldset",
      "legend-bar",
      el("legend", "", "Colour"),
      ...this.choices,
      el("span", "sample", el("span", "token trained", "underlined"), " = trained"),
    );
  }

  colour(value) {
    this.node.className = `colour-${value}`;
    for (const choice of this.choices) choice.firstChild.checked = choice.firstChild.value === value;
  }

  pager() {
    const label = el("span", "number");
    const turn = (by) => () => this.turn(by);
    const nav = el("nav", "pager", button("‹ Previous", turn(-1)), label, button("Next ›", turn(1)));
    return set(nav, { "aria-label": "Pages of rows" });
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

  get pages() {
    return Math.max(1, Math.ceil(this.kept.length / PAGE_SIZE));
  }

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
    const from = page * PAGE_SIZE;
    const drawn = this.kept.slice(from, from + PAGE_SIZE);
    this.list.replaceChildren(
      ...drawn.map((row) => rowNode(row, { ...this.view, touched: hits(row, this.filters.words) })),
    );
    set(this.list, { start: from + 1 });
    this.say(from, from + drawn.length);
    if (focused) this.list.querySelector('.token[tabindex="0"]')?.focus({ preventScroll: true });
  }

  /** Which rows are shown, in words and in the pagers. */
  say(from, to) {
    const of = this.kept.length === this.rows.length ? "" : ` of ${shown(this.rows.length)}`;
    const part = this.pages > 1 ? `, ${shown(from + 1)}–${shown(to)} shown` : "";
    this.count.textContent = this.kept.length
      ? `${shown(this.kept.length)}${of} rows${part}`
      : "No row passes these filters.";
    for (const pager of this.pagers) {
      const [back, label, on] = pager.children;
      pager.hidden = this.pages === 1;
      label.textContent = `${shown(this.page + 1)} / ${shown(this.pages)}`;
      back.disabled = this.page === 0;
      on.disabled = this.page === this.pages - 1;
    }
  }

  rowOf(token) {
    return this.rows[Number(token.closest(".row").dataset.row)];
  }

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
    const row = this.rowOf(token);
    const item = token.closest(".row");
    const i = Number(token.dataset.i);
    const target = {
      ArrowLeft: i - 1,
      ArrowRight: i + 1,
      Home: 0,
      End: row.tokens.length - 1,
      n: row.weights.findIndex((weight, j) => j > i && isTrained(weight)),
      w: row.stats.worstAt,
    }[event.key];
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
    this.list.addEventListener(
      "click",
      onToken((token) => this.focus(token.closest(".row"), Number(token.dataset.i))),
    );
    this.list.addEventListener("keydown", (event) => this.move(event));
    const follow = () => {
      const token = document.activeElement;
      if (token?.matches(".rows .token")) placeTip(token);
      else hideTip();
    };
    addEventListener("scroll", follow, { passive: true });
  }
}
