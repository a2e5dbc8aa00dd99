// Token strips: what each row teaches, token by token.

const STRIP_LIMIT = 1500; // tokens drawn before one asks for more
const EDGES = [0.1, 0.5, 1, 2, 4, 8]; // −log p in nats; bins of surprise 0 to 6

const FRAME = new Set(["template", "bos", "end_of_turn", "token"]); // kinds that need no label
const INFINITE = { "−∞": -Infinity, "∞": Infinity };

/** The bin of a log p. */
const surprise = (logP) => EDGES.filter((edge) => -logP >= edge).length;

/** Lower case, character by character where the whole would change its length (İ). */
function fold(value) {
  const lower = value.toLowerCase();
  if (lower.length === value.length) return lower;
  return Array.from(value, (c) => (c.toLowerCase().length === c.length ? c.toLowerCase() : c)).join("");
}

const spread = (runs) => runs.flatMap(([value, count]) => Array(count).fill(value));

/** One row of the page with its runs spread out, made when first needed. */
class Row {
  constructor(data, strip, index) {
    Object.assign(this, { data, strip, index, tokens: strip.tokens });
    this.current = 0;
  }
  get weights() {
    return (this.spreadWeights ??= spread(this.strip.weights));
  }
  get kinds() {
    return (this.spreadKinds ??= spread(this.strip.kinds));
  }
  token(i) {
    return this.data.vocabulary[this.tokens[i]][0];
  }
  id(i) {
    return this.data.vocabulary[this.tokens[i]][1];
  }
  kind(i) {
    return this.data.kinds[this.kinds[i]];
  }
  /** log p of token i, nats; NaN where there is none. */
  logP(i) {
    const value = this.strip.log_p[i];
    return isNumber(value) ? value : (INFINITE[value] ?? NaN);
  }
  get text() {
    return (this.joined ??= this.tokens.map((_, i) => this.token(i)).join(""));
  }
  get searchable() {
    const texts = [this.strip.title, this.text, ...this.strip.fields.flat().map(shown)];
    return (this.folded ??= fold(texts.join("\n")));
  }
  /** Trained tokens, their mean weighted loss in nats, the place and value of the lowest log p among them. */
  get stats() {
    return (this.counted ??= this.count());
  }
  count() {
    const stats = { trained: 0, weight: 0, loss: 0, worst: null, worstAt: -1 };
    this.weights.forEach((weight, i) => {
      if (!isTrained(weight)) return;
      const logP = this.logP(i);
      stats.trained += 1;
      if (Number.isNaN(logP)) return;
      stats.weight += weight;
      stats.loss -= weight * logP;
      if (stats.worst === null || logP < stats.worst) Object.assign(stats, { worst: logP, worstAt: i });
    });
    stats.mean = stats.weight ? stats.loss / stats.weight : null;
    return stats;
  }
}

/** Which tokens a search text touches. */
function hits(row, words) {
  const touched = new Set();
  if (!words) return touched;
  const whole = fold(row.text);
  const needle = fold(words);
  let token = 0;
  let end = row.token(0)?.length ?? 0;
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
  const weight = row.weights[i];
  const logP = row.logP(i);
  node.dataset.i = i;
  set(node, { role: "option", tabindex: i === row.current ? "0" : "-1" });
  if (!Number.isNaN(logP)) node.classList.add(`bin-${surprise(logP)}`);
  if (isTrained(weight)) {
    node.classList.add("trained");
    const share = Math.max(0.2, Math.min(1, Math.abs(weight) / row.data.unit));
    if (share !== 1) node.style.setProperty("--weight", share);
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
      const kind = row.kind(i);
      const run = el("span", FRAME.has(kind) ? "run frame" : "run");
      nodes.push(set(run, { role: "group", "aria-label": kind, "data-kind": kind }));
    }
    nodes.at(-1).append(tokenNode(row, i, view));
  }
  return nodes;
}

function stripNode(row, view) {
  const strip = set(el("div", "strip"), {
    role: "listbox",
    "aria-label": `Tokens of row ${row.index + 1}`,
    "aria-orientation": "horizontal",
  });
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
  if (stats.mean !== null) {
    summary.push(`${decimals(stats.mean, 3)} nats per token`, `lowest log p ${decimals(stats.worst, 2)}`);
  }
  const node = el(
    "li",
    "row",
    el(
      "div",
      "head",
      el("span", "index", shown(row.index + 1)),
      paint(text("h3", "", ""), row.strip.title, false),
      el("span", "stats number", summary.join(" · ")),
    ),
    ...stripNode(row, view),
    notes(row.strip.notes),
    row.strip.fields.length ? facts(row.strip.fields, "fields") : null,
  );
  node.dataset.row = row.index;
  return node;
}

/** What is known of token i, as named values. */
function tokenFacts(row, i) {
  const logP = row.logP(i);
  const weight = row.weights[i];
  const known = !Number.isNaN(logP);
  const missing = i === 0 ? "none: nothing before it" : "none";
  return [
    ["token", JSON.stringify(row.token(i))],
    ["id", row.id(i) === null ? null : String(row.id(i))],
    ["position", String(i)],
    ["segment", row.kind(i)],
    ["log p", known ? `${decimals(logP, 4)} nats` : missing],
    ["probability", known ? probability(logP) : null],
    ["weight", isTrained(weight) ? `${shown(weight)}, trained` : weight === 0 ? "0, not trained" : "not finite"],
    ["loss", isTrained(weight) && known ? `${decimals(-weight * logP, 4)} nats` : null],
  ].filter(([, value]) => value !== null);
}

function probability(logP) {
  const p = Math.exp(logP);
  return p >= 0.001 || p === 0 ? percent(p) : signed(p.toExponential(1));
}

function showTip(row, token) {
  const tip = byId("tip");
  tip.replaceChildren(facts(tokenFacts(row, Number(token.dataset.i)), "tip-facts"));
  tip.hidden = false;
  set(token, { "aria-describedby": "tip" });
  placeTip(token);
}

/** Below the token, or above it where there is no room. */
function placeTip(token) {
  const tip = byId("tip");
  const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const above = box.bottom + own.height + 12 > innerHeight && box.top > own.height + 12;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - own.width - 8))}px`;
  tip.style.top = `${above ? box.top - own.height - 6 : box.bottom + 6}px`;
}

const hideTip = () => {
  byId("tip").hidden = true;
};
