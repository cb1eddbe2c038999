"use strict";
/* Elements, texts and numbers. Every text goes through `put`, which sets it as text. */

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("overview").textContent);
const both = data.runs.length === 2;
const OUTCOMES = { a: "accepted", f: "fallback", b: "best", u: "undecided" };
const ROWS = 100; // of a page of the grid, and of a table of attempts at first
const CELLS = 24; // of a strip of segments, at most
const OPEN = 40; // attempts at an answer, at most, whose tables lie open at first
const PREVIEW = 240; // characters of a prompt or an answer in the grid

/* What nobody would see, or what would turn the text around it: it is shown by its name. */
const HIDDEN =
  /[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\u{e0000}-\u{e007f}]/gu;

function nameOf(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  return `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
}

/* A text without hidden characters, for attributes and charts. */
const plain = (text) => String(text).replace(HIDDEN, nameOf);

/* Append a text to an element, its hidden characters shown. */
function put(node, text) {
  let from = 0;
  for (const found of text.matchAll(HIDDEN)) {
    const name = h("span", { class: "code", title: "a hidden character" });
    name.textContent = nameOf(found[0]);
    node.append(text.slice(from, found.index), name);
    from = found.index + found[0].length;
  }
  node.append(text.slice(from));
}

const h = (tag, attributes, ...children) => filled(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) =>
  filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/* Set attributes (on... are listeners; false and null are left out) and append children, texts or elements. */
function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined)
      node.setAttribute(name, value === true ? "" : plain(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child instanceof Node) node.append(child);
    else if (child !== null && child !== undefined && child !== false)
      node instanceof SVGElement ? node.append(plain(child)) : put(node, String(child));
  }
  return node;
}

/* The texts of a prompt, each with who says it. */
function messagesOf(prompt) {
  if (prompt === null || prompt === undefined) return [];
  if (typeof prompt === "string") return [{ role: "", text: prompt }];
  if (prompt.every((part) => typeof part === "number")) return [{ role: "token ids", text: prompt.join(" ") }];
  return prompt.map((message) => ({
    role: String(message.role ?? ""),
    text: typeof message.content === "string" ? message.content : JSON.stringify(message),
  }));
}

/* The first characters of a text, on one line. */
function preview(text) {
  const line = text.slice(0, 2 * PREVIEW).replace(/\s+/g, " ");
  const characters = Array.from(line);
  return characters.length > PREVIEW ? characters.slice(0, PREVIEW).join("") + "…" : line;
}

const formats = new Map();

/* Read a number of the data, where NaN and infinities are strings. */
function number(value) {
  if (value === "inf" || value === "-inf") return value === "inf" ? Infinity : -Infinity;
  return value === null || value === undefined ? NaN : Number(value);
}

function fixed(value, digits = 0) {
  if (Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (!formats.has(digits))
    formats.set(digits, new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
  const text = formats.get(digits).format(value).replace("-", "−");
  return /[1-9]/.test(text) ? text : text.replace("−", "");
}

const reward = (value) => fixed(number(value), data.digits);
const signed = (value) => (value > 0 ? "+" : "") + fixed(value, data.digits);
const plural = (count, word) => `${fixed(count)} ${word}${count === 1 ? "" : "s"}`;

/* A probability, with two digits that say something. */
function probability(value) {
  if (Number.isNaN(value)) return "–";
  if (value === 0 || value === 1) return String(value);
  if (value >= 0.995) return "0.99+";
  if (value >= 0.001) return value.toFixed(value >= 0.01 ? 2 : 3);
  return value.toExponential(0).replace("-", "−");
}

/* The probability with which a rule that tests accepts an attempt: min(1, exp((r - tau) / beta)). */
function chance(run, r, tau) {
  if (run.hard) return r >= tau ? 1 : 0;
  const beta = number(run.beta);
  return Number.isNaN(beta) ? NaN : Math.exp(Math.min(0, (r - tau) / beta));
}
