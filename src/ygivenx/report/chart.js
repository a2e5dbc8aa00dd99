// Line charts: axes, direct labels, values on hover and by arrow keys, a table for whoever prefers one.

const CHART = { height: 280, top: 16, right: 16, bottom: 44, left: 56 };

/** About `count` round values that cover [low, high]. */
function ticks(low, high, count) {
  const rough = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const first = Math.floor(low / step), last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: Math.max(last - first, 1) + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function scale(low, high, from, to) {
  const ratio = (to - from) / (high - low || 1);
  return (value) => from + (value - low) * ratio;
}

/** Where a chart's values lie on a canvas of this width: x and y scales and their ticks. */
function axes(chart, width) {
  const finite = (key) => chart.curves.flatMap((curve) => curve[key].filter(isNumber));
  // A chart of nothing still has axes.
  const xs = finite("x").concat(finite("x").length ? [] : [0, 1]), ys = finite("y").concat([0]);
  const range = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  const [left, right] = range(xs), yTicks = ticks(...range(ys), 5);
  const end = width - CHART.right;
  return {
    x: scale(left, right, CHART.left, end),
    y: scale(yTicks[0], yTicks.at(-1), CHART.height - CHART.bottom, CHART.top),
    xTicks: ticks(left, right, Math.max(2, Math.min(8, Math.floor(width / 90)))).filter((t) => t >= left && t <= right),
    yTicks, left, right, end,
  };
}

/** An SVG path that breaks where a value is missing. */
function linePath(curve, at) {
  let pen = "M";
  return curve.x.map((x, i) => {
    if (!isNumber(x) || !isNumber(curve.y[i])) { pen = "M"; return ""; }
    const step = `${pen}${at.x(x).toFixed(1)},${at.y(curve.y[i]).toFixed(1)}`;
    pen = "L";
    return step;
  }).join("");
}

function frame(chart, at) {
  const group = svg("g", { class: "axes" });
  const base = CHART.height - CHART.bottom;
  for (const value of at.yTicks) {
    const y = at.y(value);
    group.append(svg("line", { x1: CHART.left, x2: at.end, y1: y, y2: y, class: value === 0 ? "zero" : "" }),
      svg("text", { x: CHART.left - 8, y: y + 4, "text-anchor": "end" }, shown(value)));
  }
  for (const value of at.xTicks) {
    group.append(svg("text", { x: at.x(value), y: base + 20, "text-anchor": "middle" }, shown(value)));
  }
  group.append(svg("text", { x: at.end, y: CHART.height - 6, "text-anchor": "end", class: "label" }, chart.x_label));
  return group;
}

function drawChart(node, chart, width) {
  const at = axes(chart, width);
  set(node, { viewBox: `0 0 ${width} ${CHART.height}`, width, height: CHART.height });
  node.replaceChildren(frame(chart, at));
  chart.curves.forEach((curve, i) => {
    const points = curve.x.filter((x, j) => isNumber(x) && isNumber(curve.y[j]));
    node.append(svg("path", { d: linePath(curve, at), class: `line line-${i % 4}` }));
    if (points.length === 1) {
      node.append(svg("circle", { cx: at.x(points[0]), cy: at.y(curve.y[curve.x.indexOf(points[0])]), r: 4, class: `dot line-${i % 4}` }));
    }
  });
  node.append(svg("g", { class: "cursor" }));
  return at;
}

/** Each curve's value at the point nearest to x. */
function valuesAt(chart, x) {
  return chart.curves.map((curve) => {
    let best = -1;
    curve.x.forEach((at, i) => {
      if (isNumber(at) && (best < 0 || Math.abs(at - x) < Math.abs(curve.x[best] - x))) best = i;
    });
    return best < 0 ? null : curve.y[best];
  });
}

function chartTable(chart, steps) {
  const rows = steps.map((x) => [x, ...chart.curves.map((curve) => {
    const i = curve.x.indexOf(x);
    return i < 0 ? null : curve.y[i];
  })]);
  return table(chart.title, [chart.x_label, ...chart.curves.map((curve) => curve.name)], rows);
}

/** A figure for {title, x_label, curves}. */
function chartFigure(chart) {
  const canvas = svg("svg", { class: "chart", tabindex: "0", role: "slider", "aria-label": `${chart.title}, by ${chart.x_label}` });
  const legend = el("ul", "legend", ...chart.curves.map((curve, i) => el("li", "",
    svg("svg", { class: "key", width: 28, height: 10, "aria-hidden": "true" }, svg("path", { d: "M0,5L28,5", class: `line line-${i % 4}` })),
    text("span", "", curve.name), el("output", "number", ""))));
  const where = el("p", "at number", "");
  const steps = [...new Set(chart.curves.flatMap((curve) => curve.x.filter(isNumber)))].sort((a, b) => a - b);
  const state = { at: null, index: steps.length - 1 };

  function read(index) {
    if (!steps.length) return;
    state.index = Math.max(0, Math.min(steps.length - 1, index));
    const x = steps[state.index], values = valuesAt(chart, x), px = state.at.x(x);
    legend.querySelectorAll("output").forEach((output, i) => { output.textContent = shown(values[i]); });
    where.textContent = `${chart.x_label} ${shown(x)}`;
    canvas.querySelector(".cursor").replaceChildren(
      svg("line", { x1: px, x2: px, y1: CHART.top, y2: CHART.height - CHART.bottom }),
      ...values.flatMap((y, i) => isNumber(y) ? [svg("circle", { cx: px, cy: state.at.y(y), r: 4, class: `dot line-${i % 4}` })] : []));
    set(canvas, { "aria-valuemin": 0, "aria-valuemax": steps.length - 1, "aria-valuenow": state.index,
      "aria-valuetext": [where.textContent, ...chart.curves.map((curve, i) => `${curve.name} ${shown(values[i])}`)].join(", ") });
  }
  function nearest(x) {
    return steps.reduce((best, value, i) => Math.abs(value - x) < Math.abs(steps[best] - x) ? i : best, 0);
  }
  canvas.addEventListener("pointermove", (event) => {
    const { left } = canvas.getBoundingClientRect(), { at } = state;
    read(nearest(at.left + (event.clientX - left - CHART.left) / (at.end - CHART.left) * (at.right - at.left)));
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: state.index - 1, ArrowRight: state.index + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    read(move);
  });

  const values = el("details", "", el("summary", "", "Values as a table"));
  values.addEventListener("toggle", () => values.append(chartTable(chart, steps)), { once: true });
  const holder = el("div", "holder", canvas);
  new ResizeObserver(([entry]) => {
    state.at = drawChart(canvas, chart, Math.max(260, Math.floor(entry.contentRect.width)));
    read(state.index);
  }).observe(holder);
  return el("figure", "", text("figcaption", "", chart.title), el("div", "reading", legend, where), holder, values);
}
