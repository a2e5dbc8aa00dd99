"use strict";
// Elements, text and numbers. Strings reach the page as text nodes only.

const byId = (id) => document.getElementById(id);

function el(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function svg(tag, attributes, ...children) {
  const node = set(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes);
  node.append(...children);
  return node;
}

/** A block of someone's text, set in its own direction. */
const text = (tag, className, value) => set(el(tag, className, value), { dir: "auto" });

function button(label, onClick) {
  const node = set(el("button", "", label), { type: "button" });
  node.addEventListener("click", onClick);
  return node;
}

const isNumber = (value) => typeof value === "number";
/** A weight may be negative; one that isn't finite trains nothing. */
const isTrained = (weight) => isNumber(weight) && weight !== 0;
const signed = (shown) => shown.replace(/^-/, "−");
const decimals = (value, digits) =>
  signed(
    value.toLocaleString("en", {
      minimumFractionDigits: digits,
      maximumFractionDigits: digits,
    }),
  );
const percent = (value) => (isNumber(value) ? `${decimals(value * 100, 1)} %` : shown(value));

/** A value for people: whole numbers grouped, others with 4 significant digits, null as a dash. */
function shown(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "object") return JSON.stringify(value);
  if (!isNumber(value)) return String(value);
  if (Number.isInteger(value)) return signed(value.toLocaleString("en"));
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return signed(value.toExponential(1));
  return signed(
    value.toLocaleString("en", { maximumSignificantDigits: Math.max(4, Math.trunc(Math.log10(size)) + 3) }),
  );
}

// Joiners belong to words and emoji; anywhere else, like other invisible characters, they are spelled out.
const JOINS = String.raw`[\p{L}\p{M}\p{Extended_Pictographic}\ufe0f]`;
const INVISIBLE =
  String.raw`[\p{Cc}\p{Cs}\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb` +
  String.raw`\u{e0000}-\u{e007f}]`;
const VISIBLE = new RegExp(`[ ]|${INVISIBLE}|(?<!${JOINS})[\u200c\u200d]|[\u200c\u200d](?!${JOINS})`, "gu");
const SPACES = { " ": "space", "\n": "newline", "\t": "tab" };

function codePoint(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCharCode(0x2400 + code);
  return `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
}

/** Append text with whitespace marked (where wanted) and control characters spelled out. */
function paint(parent, value, whitespace = true) {
  let from = 0;
  for (const match of value.matchAll(VISIBLE)) {
    const character = match[0];
    const space = SPACES[character];
    if (space && !whitespace) continue;
    parent.append(
      value.slice(from, match.index),
      space ? el("i", space, character) : el("i", "control", codePoint(character)),
    );
    from = match.index + character.length;
  }
  parent.append(value.slice(from));
  return parent;
}

/** Named values: [[name, value], ...]. */
function facts(pairs, className, format = shown) {
  const list = el("dl", className);
  for (const [name, value] of pairs) {
    const cell = set(el("dd", isNumber(value) ? "number" : ""), { dir: "auto" });
    list.append(el("div", "", text("dt", "", name), paint(cell, format(value), false)));
  }
  return list;
}

const numeral = (value) =>
  isNumber(value) || value instanceof Node || /^[−+-]?[\d.,]+(e[−-]?\d+)?( ?%)?$/.test(value);

/** A table with a caption; `foot` is a last row of its own. Cells are values or nodes. */
function table(caption, columns, rows, foot) {
  const numeric = columns.map((_, i) => i > 0 && rows.some((row) => numeral(row[i])));
  const line = (cells, header) =>
    el(
      "tr",
      "",
      ...cells.map((cell, i) => {
        const node = el(header || i === 0 ? "th" : "td", numeric[i] ? "number" : "");
        if (header || i === 0) set(node, { scope: header ? "col" : "row" });
        node.dir = "auto";
        if (cell instanceof Node) node.append(cell);
        else paint(node, shown(cell), false);
        return node;
      }),
    );
  const node = el(
    "table",
    "",
    text("caption", "", caption),
    el("thead", "", line(columns, true)),
    el("tbody", "", ...rows.map((row) => line(row, false))),
  );
  if (foot) node.append(el("tfoot", "", line(foot, false)));
  return set(el("div", "scroll", node), { tabindex: "0", role: "region", "aria-label": caption });
}

const notes = (texts) =>
  texts.length ? el("ul", "notes", ...texts.map((note) => text("li", "", note))) : null;
