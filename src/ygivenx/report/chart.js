// Line charts: axes, direct labels, values on hover and by arrow keys, a table for whoever prefers one.

const CHART = { height: 280, top: 16, right: 16, bottom: 44, left: 56 };

/** About `count` round values that cover [low, high]. */
function ticks(low, high, count) {
  const rough = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const first = Math.floor(low / step);
  const last = Math.max(first + 1, Math.ceil(high / step - 1e-9));
  // To 12 digits, since 3 × 0.1 isn't 0.3.
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** A linear map from [low, high] to [from, to]; `.back` is its inverse. */
function scale(low, high, from, to) {
  const ratio = (to - from) / (high - low || 1);
  const map = (value) => from + (value - low) * ratio;
  map.back = (place) => low + (place - from) / ratio;
  return map;
}

function range(values) {
  return values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
}

/** Where a chart's values lie on a canvas of this width: scales and their ticks; y always shows 0. */
function axes(chart, width) {
  const values = (key) => chart.curves.flatMap((curve) => curve[key].filter(isNumber));
  const xs = values("x");
  const [left, right] = range(xs.length ? xs : [0, 1]);
  const yTicks = ticks(...range([0, ...values("y")]), 5);
  const xTicks = ticks(left, right, Math.max(2, Math.min(8, Math.floor(width / 90))));
  const end = width - CHART.right;
  return {
    x: scale(left, right, CHART.left, end),
    y: scale(yTicks[0], yTicks.at(-1), CHART.height - CHART.bottom, CHART.top),
    xTicks: xTicks.filter((t) => t >= left && t <= right),
    yTicks,
    end,
  };
}

/** An SVG path that breaks where a value is missing; a point alone is a dot (its round cap). */
function linePath(curve, at) {
  let pen = false;
  const steps = curve.x.map((x, i) => {
    const drawn = isNumber(x) && isNumber(curve.y[i]);
    const point = drawn ? `${at.x(x).toFixed(1)},${at.y(curve.y[i]).toFixed(1)}` : "";
    const step = !drawn ? "" : pen ? `L${point}` : `M${point}h0`;
    pen = drawn;
    return step;
  });
  return steps.join("");
}

function frame(chart, at) {
  const group = svg("g", { class: "axes" });
  const base = CHART.height - CHART.bottom;
  for (const value of at.yTicks) {
    const y = at.y(value);
    group.append(
      svg("line", { x1: CHART.left, x2: at.end, y1: y, y2: y, class: value === 0 ? "zero" : "" }),
      svg("text", { x: CHART.left - 8, y: y + 4, "text-anchor": "end" }, shown(value)),
    );
  }
  for (const value of at.xTicks) {
    group.append(svg("text", { x: at.x(value), y: base + 20, "text-anchor": "middle" }, shown(value)));
  }
  group.append(
    svg("text", { x: at.end, y: CHART.height - 6, "text-anchor": "end", class: "label" }, chart.x_label),
  );
  return group;
}

function drawChart(node, chart, width) {
  const at = axes(chart, width);
  set(node, { viewBox: `0 0 ${width} ${CHART.height}`, width, height: CHART.height });
  node.replaceChildren(frame(chart, at));
  const line = (curve, i) => svg("path", { d: linePath(curve, at), class: `line line-${i % 4}` });
  node.append(...chart.curves.map(line), svg("g", { class: "cursor" }));
  return at;
}

/** A curve's point nearest to x, null for a curve without points. */
function nearest(curve, x) {
  let best = null;
  curve.x.forEach((at, i) => {
    if (isNumber(at) && (!best || Math.abs(at - x) < Math.abs(best.x - x))) best = { x: at, y: curve.y[i] };
  });
  return best;
}

function chartTable(chart, steps) {
  const at = (curve, x) => curve.y[curve.x.indexOf(x)];
  const rows = steps.map((x) => [x, ...chart.curves.map((curve) => at(curve, x))]);
  return table(chart.title, [chart.x_label, ...chart.curves.map((curve) => curve.name)], rows);
}

function legendItem(curve, i) {
  const line = svg("path", { d: "M0,5L28,5", class: `line line-${i % 4}` });
  const key = svg("svg", { class: "key", width: 28, height: 10, "aria-hidden": "true" }, line);
  return el("li", "", key, text("span", "", curve.name), el("output", "number", ""));
}

/** The figure of {title, x_label, curves}; a cursor stands on one of the steps of all curves together. */
class Chart {
  constructor(chart) {
    this.chart = chart;
    const steps = new Set(chart.curves.flatMap((curve) => curve.x.filter(isNumber)));
    this.steps = [...steps].sort((a, b) => a - b);
    this.index = this.steps.length - 1;
    const label = `${chart.title}, by ${chart.x_label}`;
    this.canvas = svg("svg", { class: "chart", tabindex: "0", role: "slider", "aria-label": label });
    this.legend = el("ul", "legend", ...chart.curves.map(legendItem));
    this.where = el("p", "at number", "");
    const caption = text("figcaption", "", chart.title);
    const holder = el("div", "holder", this.canvas);
    this.node = el(
      "figure",
      "",
      caption,
      el("div", "reading", this.legend, this.where),
      holder,
      this.values(),
    );
    this.listen();
    new ResizeObserver(([entry]) => this.draw(entry.contentRect.width)).observe(holder);
  }

  values() {
    const node = el("details", "", el("summary", "", "Values as a table"));
    node.addEventListener("toggle", () => node.append(chartTable(this.chart, this.steps)), { once: true });
    return node;
  }

  draw(width) {
    this.at = drawChart(this.canvas, this.chart, Math.max(260, Math.floor(width)));
    this.read(this.index);
  }

  /** Put the cursor on step `index` and say what the curves are there. */
  read(index) {
    if (!this.steps.length) return;
    this.index = Math.max(0, Math.min(this.steps.length - 1, index));
    const x = this.steps[this.index];
    const points = this.chart.curves.map((curve) => nearest(curve, x));
    const said = points.map((point) => this.say(point, x));
    this.where.textContent = `${this.chart.x_label} ${shown(x)}`;
    this.legend.querySelectorAll("output").forEach((output, i) => output.replaceChildren(said[i]));
    this.mark(x, points);
    const named = this.chart.curves.map((curve, i) => `${curve.name} ${said[i]}`);
    set(this.canvas, {
      "aria-valuemin": 0,
      "aria-valuemax": this.steps.length - 1,
      "aria-valuenow": this.index,
      "aria-valuetext": [this.where.textContent, ...named].join(", "),
    });
  }

  say(point, x) {
    if (!point) return shown(null);
    return point.x === x ? shown(point.y) : `${shown(point.y)} (${this.chart.x_label} ${shown(point.x)})`;
  }

  mark(x, points) {
    const px = this.at.x(x);
    const cursor = this.canvas.querySelector(".cursor");
    cursor.replaceChildren(svg("line", { x1: px, x2: px, y1: CHART.top, y2: CHART.height - CHART.bottom }));
    points.forEach((point, i) => {
      if (!point || !isNumber(point.y)) return;
      const place = { cx: this.at.x(point.x), cy: this.at.y(point.y), r: 4 };
      cursor.append(svg("circle", { ...place, class: `dot line-${i % 4}` }));
    });
  }

  listen() {
    this.canvas.addEventListener("pointermove", (event) => {
      const x = this.at.x.back(event.clientX - this.canvas.getBoundingClientRect().left);
      const away = (i) => Math.abs(this.steps[i] - x);
      this.read(this.steps.reduce((best, _, i) => (away(i) < away(best) ? i : best), 0));
    });
    this.canvas.addEventListener("keydown", (event) => {
      const moves = {
        ArrowLeft: this.index - 1,
        ArrowRight: this.index + 1,
        Home: 0,
        End: this.steps.length - 1,
      };
      if (!Object.hasOwn(moves, event.key)) return;
      event.preventDefault();
      this.read(moves[event.key]);
    });
  }
}
