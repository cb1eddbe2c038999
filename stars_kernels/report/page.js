"use strict";
/* Draws the page from its two data elements. Every text goes through `put`, which sets it as text. */

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("overview").textContent);
const both = data.runs.length === 2;
const OUTCOMES = { a: "accepted", f: "fallback", b: "best", u: "undecided" };
const ROWS = 100; // of a page of the grid, and of a table of attempts at first
const CELLS = 24; // of a strip of segments, at most
const OPEN = 40; // attempts at an answer, at most, whose tables lie open at first
const PREVIEW = 240; // characters of a prompt or an answer in the grid

/* --- elements and texts ------------------------------------------------------------------------------------------ */

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

/* --- numbers ----------------------------------------------------------------------------------------------------- */

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

/* --- charts ------------------------------------------------------------------------------------------------------ */

const SHAPES = {
  accepted: "M5 0A5 5 0 1 1-5 0 5 5 0 1 1 5 0z",
  best: "M0-6 6 5-6 5z",
  fallback: "M0-6.5 6.5 0 0 6.5-6.5 0z",
  undecided: "M-4.5-4.5h9v9h-9z",
  on: "M0-5 5 4-5 4z",
  rejected: "M3.5 0A3.5 3.5 0 1 1-3.5 0 3.5 3.5 0 1 1 3.5 0z",
  dropped: "M3.5 0A3.5 3.5 0 1 1-3.5 0 3.5 3.5 0 1 1 3.5 0z",
};
const WORDS = { on: "went on", best: "taken: the best" };

const percent = (share) => `${(100 * share).toFixed(3)}%`;
const mark = (kind, x, y, title) =>
  s("svg", { class: `mark ${kind}`, x, y }, s("path", { d: SHAPES[kind] }, title && s("title", {}, title)));
const swatch = (kind) =>
  s("svg", { class: `mark ${kind}`, viewBox: "-7 -7 14 14", "aria-hidden": "true" }, s("path", { d: SHAPES[kind] }));
const chip = (style) =>
  s("svg", { viewBox: "0 0 14 14", "aria-hidden": "true" }, s("rect", { class: style, width: 14, height: 14, rx: 3 }));
const dash = (style) =>
  s("svg", { class: "plot", viewBox: "0 0 14 14", "aria-hidden": "true" },
    s("line", { class: style, x1: 0, x2: 14, y1: 7, y2: 7 }));
const legend = (entries) => h("ul", { class: "legend" }, entries.map(([sign, word]) => h("li", {}, sign, word)));

/* Round places between two ends of an axis. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((by) => by * power).find((size) => size >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i += 1) found.push(i * step);
  return found;
}

/* Lines across a plot with their numbers at the left. */
const levels = (values, y, word) => values.map((value) => [
  s("line", { class: "grid", x1: 0, x2: "100%", y1: y(value), y2: y(value) }),
  s("text", { x: 0, dx: -9, y: y(value), dy: 4, "text-anchor": "end" }, word(value))]);

/* Numbers under a plot. */
const below = (x, word) => s("text", { x: percent(x), y: "100%", dy: 18, "text-anchor": "middle" }, word);
const frame = (plot) => h("div", { class: "frame" }, plot);

const shortTick = (value) => String(Number(value.toPrecision(6))).replace("-", "−");

/* The ends of an axis for some values, with room around them. */
function ends(values) {
  const finite = values.filter(Number.isFinite);
  let low = Infinity;
  let high = -Infinity;
  for (const value of finite) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (!finite.length) return [0, 1];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}

/* Bars of several series side by side in each bin, each as a share of its series; and r* as a line. */
function histogram(series, target) {
  const [low, high] = ends([...series.flatMap((one) => one.values), target]);
  const bins = 20;
  const heights = series.map(({ values }) => {
    const finite = values.filter(Number.isFinite);
    const counts = new Array(bins).fill(0);
    for (const value of finite) counts[Math.min(bins - 1, Math.floor(((value - low) / (high - low)) * bins))] += 1;
    return counts.map((count) => count / (finite.length || 1));
  });
  const top = Math.max(...heights.flat(), 1e-9);
  const plot = s("svg", { class: "plot", role: "img", "aria-label": toldOf(series, target) },
    levels(ticks(0, top, 3), (value) => percent(1 - value / top), (value) => `${shortTick(100 * value)}%`));
  heights.forEach((shares, i) =>
    shares.forEach((share, bin) => {
      if (!share) return;
      const width = 0.84 / bins / series.length;
      plot.append(s("rect", {
        class: series[i].style, x: percent((bin + 0.08) / bins + i * width), width: percent(width * 0.94),
        y: percent(1 - share / top), height: percent(share / top), rx: 1.5,
      }, s("title", {}, `${series[i].name}: ${percent(share).replace(/\.?0+%/, "%")}`)));
    }));
  plot.append(s("line", { class: "axis", x1: 0, x2: "100%", y1: "100%", y2: "100%" }));
  for (const tick of ticks(low, high, 5))
    plot.append(below((tick - low) / (high - low), shortTick(tick)));
  if (Number.isFinite(target)) {
    const x = (target - low) / (high - low);
    plot.append(
      s("line", { class: "target", x1: percent(x), x2: percent(x), y1: -6, y2: "100%" }),
      s("text", { class: "target", x: percent(x), y: -10, "text-anchor": x > 0.9 ? "end" : "middle" }, `r* ${reward(target)}`));
  }
  return h("figure", {},
    frame(plot), legend(series.map((one) => [chip(one.style), `${one.name} (${fixed(one.values.length)})`])));
}

function toldOf(series, target) {
  const means = series.map(({ name, values }) => `${name}: mean ${reward(mean(values))}`);
  return `Histogram of rewards. ${means.join("; ")}${Number.isFinite(target) ? `; r* ${reward(target)}` : ""}.`;
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/* How many attempts the segments took; those that fell back are marked. */
function attemptsHistogram() {
  const counts = new Map();
  let fallbacks = 0;
  for (const row of data.rows) {
    const side = row.sides[0];
    (side?.tries ?? []).forEach((tries, i) => {
      if (side.outcomes[i] === "f") fallbacks += 1;
      else if (side.outcomes[i] === "a") counts.set(tries, (counts.get(tries) ?? 0) + 1);
    });
  }
  const most = Math.max(...counts.keys(), 1);
  const per = Math.ceil(most / 20);
  const bars = Array.from({ length: Math.ceil(most / per) }, () => 0);
  for (const [tries, count] of counts) bars[Math.floor((tries - 1) / per)] += count;
  const columns = bars.length + (fallbacks ? 1.6 : 0);
  const top = Math.max(...bars, fallbacks, 1);
  const all = [...bars.map((count, i) => [count, i, "bar-A"]), ...(fallbacks ? [[fallbacks, bars.length + 0.6, "bar-fallback"]] : [])];
  const names = bars.map((_, i) => (per === 1 ? `${i + 1}` : `${i * per + 1}–${(i + 1) * per}`));
  const plot = s("svg", { class: "plot", role: "img",
    "aria-label": `Segments by attempts: ${names.map((name, i) => `${name}: ${bars[i]}`).join(", ")}; fallbacks: ${fallbacks}.` });
  const whole = (value) => Number.isInteger(value);
  plot.append(...levels(ticks(0, top, 3).filter(whole), (value) => percent(1 - value / top), shortTick).flat());
  for (const [count, place, style] of all.filter(([count]) => count))
    plot.append(s("rect", { class: style, x: percent((place + 0.1) / columns), width: percent(0.8 / columns), rx: 1.5,
      y: percent(1 - Math.max(count / top, 0.015)), height: percent(Math.max(count / top, 0.015)) },
      s("title", {}, `${style === "bar-A" ? `after ${names[place]}` : "fallback"}: ${plural(count, "segment")}`)));
  plot.append(s("line", { class: "axis", x1: 0, x2: "100%", y1: "100%", y2: "100%" }));
  const every = Math.ceil(names.length / 6);
  names.forEach((name, i) => {
    if (i % every === 0) plot.append(below((i + 0.5) / columns, name));
  });
  const told = [[chip("bar-A"), "accepted"], ...(fallbacks ? [[chip("bar-fallback"), `fallback (${fixed(fallbacks)})`]] : [])];
  return h("figure", {}, frame(plot), legend(told));
}

/* Every attempt's reward as a mark, segment by segment, against tau and r*. */
function rewardChart(run, name, segments, [low, high]) {
  const y = (value) => percent(Math.min(1, Math.max(0, 1 - (value - low) / (high - low))));
  const width = 1 / segments.length;
  const plot = s("svg", { class: "plot", role: "img", "aria-label": toldOfSegments(segments) });
  segments.forEach((_, i) => {
    if (i % 2) plot.append(s("rect", { class: "band", x: percent(i * width), width: percent(width), height: "100%" }));
  });
  plot.append(...levels(ticks(low, high, 6), y, shortTick).flat());
  const target = number(run.target);
  if (Number.isFinite(target)) plot.append(s("line", { class: "target", x1: 0, x2: "100%", y1: y(target), y2: y(target) }));
  thresholdLine(plot, segments, y);
  const every = Math.ceil(segments.length / 24);
  segments.forEach((segment, i) => {
    const kinds = segment.rewards.map((_, j) => kindOf(segment, j));
    segment.rewards.forEach((value, j) => {
      const x = percent((i + (j + 1) / (segment.rewards.length + 1)) * width);
      const title = `segment ${i + 1}, attempt ${nameOfAttempt(segment, j)}: ${kinds[j]}, reward ${reward(value)}`;
      if (!Number.isNaN(number(value))) plot.append(mark(kinds[j], x, y(number(value)), title));
    });
    if (i % every === 0) plot.append(below((i + 0.5) * width, i + 1));
  });
  const framed = frame(plot);
  framed.style.minWidth = `${44 + segments.length * 16}px`;
  return h("figure", { class: "tall" }, h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Chart of rewards ${name}` },
    framed), legendOf(segments, target));
}

/* The ends of the axis of rewards for what some runs made of a prompt, so that their charts can be compared. */
const endsOf = (traces) => ends([
  ...data.runs.map((run) => number(run.target)),
  ...traces.flatMap((trace) => trace?.segments ?? []).flatMap((segment) => [...segment.rewards, ...(segment.thresholds ?? [])].map(number)),
]);

/* tau of each segment, of the length that its taken attempt has, as a stair. */
function thresholdLine(plot, segments, y) {
  const width = 1 / segments.length;
  let before = NaN;
  segments.forEach((segment, i) => {
    const tau = number(segment.thresholds?.[segment.chosen]);
    if (!Number.isFinite(tau)) return;
    if (Number.isFinite(before))
      plot.append(s("line", { class: "tau", x1: percent(i * width), x2: percent(i * width), y1: y(before), y2: y(tau) }));
    plot.append(s("line", { class: "tau", x1: percent(i * width), x2: percent((i + 1) * width), y1: y(tau), y2: y(tau) }));
    before = tau;
  });
}

function legendOf(segments, target) {
  const kinds = new Set(segments.flatMap((segment) => segment.rewards.map((_, j) => kindOf(segment, j))));
  const entries = Object.keys(SHAPES).filter((kind) => kinds.has(kind)).map((kind) => [swatch(kind), WORDS[kind] ?? kind]);
  if (segments.some((segment) => segment.thresholds)) entries.push([dash("tau"), "threshold tau"]);
  if (Number.isFinite(target)) entries.push([dash("target"), `r* ${reward(target)}`]);
  return legend(entries);
}

function toldOfSegments(segments) {
  const taken = segments.map((segment) => reward(segment.rewards[segment.chosen]));
  return `Rewards of the attempts at ${plural(segments.length, "segment")}. Taken: ${taken.join(", ")}. All are in the tables below.`;
}

/* --- overview ---------------------------------------------------------------------------------------------------- */

const letter = (i) => both && h("span", { class: `of ${"AB"[i]}` }, "AB"[i]);

function head() {
  return h("div", { class: "head" },
    h("h1", { tabindex: -1 }, data.names.map((name, i) => [i ? h("span", { class: "quiet" }, " beside ") : null, h("bdi", {}, name)])),
    data.runs.map((run, i) => h("p", {}, letter(i), run.headline.join(" · "))));
}

function cards() {
  const labels = [...new Set(data.runs.flatMap((run) => run.cards.map((card) => card.label)))];
  return h("dl", { class: "panel cards" }, labels.map((label) => h("div", { class: "card" }, h("dt", {}, label),
    data.runs.map((run, i) => {
      const card = run.cards.find((one) => one.label === label) ?? { value: "–", note: "" };
      return [h("dd", { class: "value" }, letter(i), card.value), h("dd", { class: "told" }, card.note)];
    }))));
}

function charts() {
  const series = data.runs.map((run, i) => ({ name: both ? data.names[i] : "answers", style: `bar-${"AB"[i]}`,
    values: data.rows.map((row) => number(row.sides[i]?.reward)).filter(Number.isFinite) }));
  const calibrated = data.runs.find((run) => run.calibration.length);
  if (calibrated) series.unshift({ name: "plain answers of the calibration", style: "bar-plain",
    values: calibrated.calibration.map(number) });
  const shown = series.filter((one) => one.values.length);
  const tests = data.rows.some((row) => /[af]/.test(row.sides[0]?.outcomes ?? ""));
  const targets = data.runs.map((run) => number(run.target)).filter(Number.isFinite);
  return h("div", { class: "panels" },
    shown.length > 0 && panel("Rewards", `${tests ? "wide" : "seven"}`, histogram(shown, targets[0] ?? NaN)),
    tests && panel(both ? `Segments of ${data.names[0]}, by attempts` : "Segments, by attempts", "slim", attemptsHistogram()),
    data.runs.some((run) => Object.keys(run.phases).length) && panel("Seconds of an answer", tests ? "slim" : "five", phases(),
      h("p", {}, "Answers that were decoded side by side share their seconds.")));
}

const panel = (title, size, ...children) => h("section", { class: `panel ${size}` }, h("h2", {}, title), children);

function phases() {
  return data.runs.map((run, i) => {
    const all = Object.entries(run.phases).map(([phase, seconds]) => [phase, number(seconds)]);
    const most = Math.max(...all.map(([, seconds]) => seconds));
    return all.length > 0 && h("dl", { class: "phases" }, both && h("dt", {}, letter(i)), both && h("dd", {}, h("span"), h("span")),
      all.sort((a, b) => b[1] - a[1]).map(([phase, seconds]) => {
        const bar = h("span");
        bar.style.width = percent(seconds / most);
        return [h("dt", {}, phase), h("dd", {}, h("span", { class: "track" }, bar),
          h("span", { class: "told" }, `${seconds >= 100 ? fixed(seconds) : seconds.toPrecision(2)} s`))];
      }));
  });
}

function facts() {
  return data.runs.map((run, i) => h("details", { class: "panel facts" },
    h("summary", {}, letter(i), "What it was: rule, settings, models, versions"),
    h("div", { class: "groups" }, run.facts.map(([title, entries]) => h("section", {}, h("h3", {}, title),
      h("dl", {}, entries.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])))))));
}

/* --- grid -------------------------------------------------------------------------------------------------------- */

const view = { query: "", outcome: "", finish: "", sort: null, down: true, page: 0, shown: [], focus: null, scroll: 0 };
const collator = new Intl.Collator("en", { numeric: true });
let haystacks = null;

const gain = (side) => number(side?.reward) - number(side?.empty);
const difference = (row) => number(row.sides[0]?.reward) - number(row.sides[1]?.reward);
const count = (side, outcome) => (side?.outcomes ?? "").split(outcome).length - 1;

/* The columns: what to sort by, and what stands in a cell. */
const COLUMNS = both
  ? [
    { name: "Prompt", value: (row) => String(row.id), cell: promptCell, up: true },
    { name: "Reward A", numeric: true, wide: true, value: (row) => number(row.sides[0]?.reward), cell: (row) => rewardCell(row.sides[0]) },
    { name: "Reward B", numeric: true, wide: true, value: (row) => number(row.sides[1]?.reward), cell: (row) => rewardCell(row.sides[1]) },
    { name: "A − B", numeric: true, value: difference, cell: differenceCell },
    { name: "Attempts", numeric: true, wide: true, value: (row) => number(row.sides[0]?.attempts),
      cell: (row) => row.sides.map((side) => h("div", {}, fixed(number(side?.attempts)))) },
    { name: "Segments", wide: true, value: (row) => count(row.sides[0], "f") - count(row.sides[1], "f"), cell: (row) => strips(row, "") },
    { name: "End", wide: true, value: (row) => finishOf(row.sides[0]), cell: (row) => row.sides.map((side) => h("div", {}, finishOf(side))), up: true },
  ]
  : [
    { name: "Prompt", value: (row) => String(row.id), cell: promptCell, up: true },
    { name: "Reward", numeric: true, value: (row) => number(row.sides[0].reward), cell: (row) => rewardCell(row.sides[0]) },
    { name: "Gain", numeric: true, wide: true, value: (row) => gain(row.sides[0]), cell: (row) => signed(gain(row.sides[0])) },
    { name: "Tokens", numeric: true, wide: true, value: (row) => number(row.sides[0].tokens), cell: (row) => fixed(number(row.sides[0].tokens)) },
    { name: "Attempts", numeric: true, wide: true, value: (row) => number(row.sides[0].attempts), cell: (row) => fixed(number(row.sides[0].attempts)) },
    { name: "Segments", wide: true, value: (row) => count(row.sides[0], "f"), cell: (row) => strips(row, "") },
    { name: "End", wide: true, value: (row) => finishOf(row.sides[0]), cell: (row) => finishOf(row.sides[0]), up: true },
  ];

const finishOf = (side) => (side ? (side.error ? "error" : side.finish) : "missing");

function rewardCell(side) {
  if (!side) return h("span", { class: "quiet" }, "missing");
  return side.error ? h("span", { class: "error" }, "failed") : reward(side.reward);
}

function differenceCell(row) {
  const found = difference(row);
  if (Number.isNaN(found)) return h("span", { class: "quiet" }, row.sides.every(Boolean) ? "–" : `only in ${row.sides[0] ? "A" : "B"}`);
  return h("span", { class: found > 0 ? "better" : found < 0 ? "worse" : "" }, signed(found));
}

function promptCell(row) {
  const side = row.sides.find((one) => one && !one.error) ?? row.sides.find(Boolean);
  const messages = messagesOf(row.prompt);
  return [
    h("a", { class: "id", href: `#/${row.key}`, tabindex: -1 }, h("bdi", {}, row.id)),
    messages.length > 0 && h("div", { class: "clamp", dir: "auto" }, preview(messages.at(-1).text)),
    side.error
      ? h("div", { class: "clamp error", dir: "auto" }, preview(side.error))
      : h("div", { class: "clamp answer", dir: "auto" }, side.text === null ? "no text: it was decoded without a tokenizer" : preview(side.text)),
    strips(row, "narrow"),
  ];
}

/* A row of cells per run, one per segment, with the number of attempts in it. */
function strips(row, style) {
  return row.sides.map((side, i) => {
    if (!side || side.error) return both && h("div", { class: `strip ${style}` }, letter(i), h("span", { class: "quiet" }, finishOf(side)));
    const told = Object.entries(OUTCOMES).map(([key, word]) => [count(side, key), word]).filter(([times]) => times);
    const label = `${plural(side.tries.length, "segment")}: ${told.map(([times, word]) => `${times} ${word}`).join(", ")}`;
    const more = side.tries.length - CELLS;
    return h("div", { class: `strip ${style}`, role: "img", "aria-label": label, title: label }, letter(i),
      side.tries.slice(0, CELLS).map((tries, j) => h("span", { class: `cell ${OUTCOMES[side.outcomes[j]]}` }, tries)),
      more > 0 && h("span", { class: "cell more" }, `+${more}`));
  });
}

/* All texts of a prompt that a search looks through. */
function haystack(row) {
  const texts = [String(row.id), ...messagesOf(row.prompt).map((message) => message.text)];
  for (const side of row.sides) texts.push(side?.text ?? "", side?.error ?? "");
  return texts.join("\n").toLowerCase();
}

function matching() {
  const query = view.query.trim().toLowerCase();
  if (query) haystacks ??= data.rows.map(haystack);
  const found = data.rows.map((_, place) => place).filter((place) => {
    const row = data.rows[place];
    return (!query || haystacks[place].includes(query)) && fits(row);
  });
  if (view.sort !== null) {
    const values = data.rows.map(COLUMNS[view.sort].value);
    found.sort((a, b) => ordered(values[a], values[b], view.down) || a - b);
  }
  return found;
}

function fits(row) {
  const sides = row.sides.filter(Boolean);
  if (view.finish && !row.sides.some((side) => finishOf(side) === view.finish)) return false;
  if (view.outcome === "A" || view.outcome === "B" || view.outcome === "=") {
    const found = difference(row);
    return view.outcome === "A" ? found > 0 : view.outcome === "B" ? found < 0 : found === 0;
  }
  if (view.outcome === "only") return row.sides.some((side) => !side || side.error);
  if (view.outcome === "none") return sides.some((side) => side.outcomes && !side.outcomes.includes("f"));
  return !view.outcome || sides.some((side) => side.outcomes?.includes(view.outcome));
}

/* Compare values for sorting; what is no number comes last in both directions. */
function ordered(a, b, down) {
  if (typeof a === "string") return down ? collator.compare(b, a) : collator.compare(a, b);
  if (Number.isNaN(a) || Number.isNaN(b)) return Number(Number.isNaN(a)) - Number(Number.isNaN(b));
  return a === b ? 0 : (down ? b - a : a - b);
}

/* The filters that the rows of this report can tell apart. */
function filters() {
  const sides = data.rows.flatMap((row) => row.sides);
  const outcomes = new Set(sides.flatMap((side) => [...(side?.outcomes ?? "")]));
  const choices = [["", "All segments"]];
  if (outcomes.has("f")) choices.push(["f", "With a fallback"], ["none", "Without a fallback"]);
  if (outcomes.has("u")) choices.push(["u", "With an undecided one"]);
  if (both) choices.push(["A", "A has more reward"], ["B", "B has more reward"], ["=", "Equal rewards"], ["only", "Answered once or not"]);
  const finishes = [...new Set(sides.map(finishOf))].sort();
  return [
    choices.length > 1 && select("outcome", "Filter by outcome", choices),
    finishes.length > 1 && select("finish", "Filter by how it ended", [["", "All ends"], ...finishes.map((end) => [end, end])]),
  ];
}

function select(name, label, choices) {
  const change = (event) => { view[name] = event.target.value; view.page = 0; drawRows(); };
  return h("select", { "aria-label": label, onchange: change }, choices.map(([value, word]) => h("option", { value }, word)));
}

const parts = {};

function grid() {
  const search = (event) => { view.query = event.target.value; view.page = 0; drawRows(); };
  parts.search = h("input", { type: "search", placeholder: "Search prompts and answers", "aria-label": "Search prompts and answers", oninput: search });
  parts.heads = COLUMNS.map((column, i) => h("th", { scope: "col", class: classOf(column), "aria-sort": "none" },
    h("button", { type: "button", onclick: () => sortBy(i) }, column.name)));
  parts.body = h("tbody", { onclick: openRow, onkeydown: moveInRows });
  parts.told = h("span", { role: "status" });
  parts.pager = h("span", { class: "pager" });
  const used = new Set(data.rows.flatMap((row) => row.sides.flatMap((side) => [...(side?.outcomes ?? "")])));
  return h("section", { class: "panel" },
    h("div", { class: "tools" }, h("h2", {}, "Prompts"), parts.search, filters()),
    h("table", { class: "prompts" }, h("caption", { class: "unseen" }, "Prompts, with their rewards and segments"),
      h("thead", {}, h("tr", {}, parts.heads)), parts.body),
    h("div", { class: "keys" }, parts.told, parts.pager),
    h("div", { class: "keys" },
      h("span", {}, used.size > 0 && "Segments: attempts at each, ", Object.entries(OUTCOMES).filter(([key]) => used.has(key)).map(([, word]) =>
        h("span", { class: "key" }, h("span", { class: `cell ${word}`, "aria-hidden": "true" }, "\u00a0"), word, "\u00a0 "))),
      h("span", {}, h("kbd", {}, "↑"), " ", h("kbd", {}, "↓"), " choose · ", h("kbd", {}, "Enter"), " opens · ", h("kbd", {}, "/"), " searches · ", h("kbd", {}, "Esc"), " closes")));
}

const classOf = (column) => `${column.numeric ? "number" : ""}${column.wide ? " wide" : ""}`;

/* A first click sorts, a second one turns it round, a third one gives the order of the file. */
function sortBy(i) {
  const first = !COLUMNS[i].up;
  if (view.sort !== i) [view.sort, view.down] = [i, first];
  else if (view.down === first) view.down = !first;
  else view.sort = null;
  view.page = 0;
  parts.heads.forEach((head, j) => head.setAttribute("aria-sort", view.sort === j ? (view.down ? "descending" : "ascending") : "none"));
  drawRows();
}

/* Draw the page of rows that is looked at. */
function drawRows() {
  view.shown = matching();
  const pages = Math.max(1, Math.ceil(view.shown.length / ROWS));
  view.page = Math.min(view.page, pages - 1);
  const from = view.page * ROWS;
  const places = view.shown.slice(from, from + ROWS);
  parts.body.replaceChildren(...places.map((place) => {
    const row = data.rows[place];
    return h("tr", {}, COLUMNS.map((column) => h("td", { class: classOf(column) }, column.cell(row))));
  }));
  if (!places.length) parts.body.append(h("tr", {}, h("td", { colspan: COLUMNS.length, class: "quiet" }, "No prompt is like that.")));
  const links = parts.body.querySelectorAll("a.id");
  if (links.length) links[0].tabIndex = 0;
  parts.told.textContent = view.shown.length
    ? `${fixed(from + 1)}–${fixed(from + places.length)} of ${plural(view.shown.length, "prompt")}` : "0 prompts";
  parts.pager.replaceChildren(...(pages > 1 ? [pageButton("Previous", -1, view.page > 0), pageButton("Next", 1, view.page < pages - 1)] : []));
}

function pageButton(word, by, there) {
  const turn = () => { view.page += by; drawRows(); parts.body.closest("section").scrollIntoView(); };
  return h("button", { type: "button", class: "button", disabled: !there, onclick: turn }, word);
}

function openRow(event) {
  const link = event.target.closest("tr")?.querySelector("a.id");
  if (link && !event.target.closest("a") && getSelection().isCollapsed) location.hash = link.hash;
}

/* Arrow keys (or j and k), Home and End go from row to row. */
function moveInRows(event) {
  const links = [...parts.body.querySelectorAll("a.id")];
  const at = links.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, j: at + 1, ArrowUp: at - 1, k: at - 1, Home: 0, End: links.length - 1 }[event.key];
  if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  focusRow(links, Math.min(links.length - 1, Math.max(0, to)));
}

function focusRow(links, to) {
  links.forEach((link, i) => { link.tabIndex = i === to ? 0 : -1; });
  links[to].focus();
}

/* --- a prompt ---------------------------------------------------------------------------------------------------- */

let lines = null;

/* The attempts at a prompt's answers: read once it is opened. */
function detailsOf(place) {
  lines ??= byId("details").textContent.split("\n");
  return JSON.parse(lines[place]);
}

function promptView(place) {
  const row = data.rows[place];
  const found = detailsOf(place);
  return [
    navigation(place),
    h("div", { class: "head" }, h("h1", { tabindex: -1 }, h("bdi", {}, row.id)), both && comparison(row)),
    h("div", { class: "panels" }, promptPanel(row), row.sides.map((side, i) => sidePanels(row, side, i, found[i], endsOf(found)))),
  ];
}

function navigation(place) {
  const at = view.shown.indexOf(place);
  const step = (word, to) => {
    const row = data.rows[view.shown[to]];
    return row && at >= 0 ? h("a", { class: "button", href: `#/${row.key}`, rel: word.toLowerCase() }, word)
      : h("a", { class: "button", role: "link", "aria-disabled": "true" }, word);
  };
  return h("nav", { class: "nav", "aria-label": "Prompts" }, h("a", { class: "button", href: "#/" }, "← All prompts"),
    h("span", {}, step("Previous", at - 1), step("Next", at + 1)));
}

function comparison(row) {
  const found = difference(row);
  const word = Number.isNaN(found) ? "There are not two rewards to compare." : [
    "A − B: ", h("span", { class: found > 0 ? "better" : found < 0 ? "worse" : "" }, signed(found)), " of reward"];
  return h("p", {}, data.names.map((name, i) => [letter(i), name, " \u00a0 "]), word);
}

function promptPanel(row) {
  const given = [row.prompt, ...row.sides.map((side) => side?.prompt).filter(Boolean)];
  return given.map((prompt, i) => h("section", { class: "panel" },
    h("h2", {}, i ? "Prompt of the other run, under the same id" : "Prompt"),
    prompt === null ? h("p", { class: "quiet" }, "It was not kept.") : messagesOf(prompt).map((message) => [
      message.role && h("p", { class: "role" }, message.role), h("div", { class: "text", dir: "auto" }, message.text)])));
}

/* What one run made of a prompt: its answer, the chart, the segments. */
function sidePanels(row, side, i, trace, axis) {
  const size = both ? "wide" : "five";
  if (!side) return h("section", { class: `panel ${size}` }, h("h2", {}, letter(i), "Answer"), h("p", { class: "quiet" }, "This run has no such prompt."));
  if (side.error) return h("section", { class: `panel ${size}` }, h("h2", {}, letter(i), "Error"), h("p", { class: "text error", dir: "auto" }, side.error));
  const answer = h("section", { class: `panel ${size}` }, h("h2", {}, letter(i), "Answer"), answerText(row, side, trace, i), figures(side, trace));
  if (!trace) return [answer, h("section", { class: "panel seven" }, h("p", { class: "quiet" }, "The attempts were left out to keep the page small."))];
  const chart = trace.segments.length > 0 && panel([letter(i), "Reward of every attempt"], both ? "" : "seven", rewardChart(data.runs[i], both ? "AB"[i] : "", trace.segments, axis));
  const list = segmentList(data.runs[i], trace.segments, i);
  return both ? h("div", { class: "wide side" }, answer, chart, list) : [answer, chart, list];
}

/* The answer, its segments marked where their texts are known. */
function answerText(row, side, trace, i) {
  if (!side.tokens) return h("p", { class: "quiet" }, "It has no tokens.");
  if (side.text === null) return h("p", { class: "quiet" }, "It was decoded without a tokenizer, so there is no text.");
  const pieces = trace?.segments.map((segment) => segment.texts?.[segment.chosen]) ?? [];
  if (!pieces.length || pieces.some((piece) => piece === undefined)) return h("div", { class: "text answer-text", dir: "auto" }, side.text);
  const links = pieces.length <= 40;
  return h("div", { class: "text answer-text", dir: "auto" }, pieces.map((piece, j) => {
    const segment = trace.segments[j];
    return h(links ? "a" : "span", { class: `seg ${segment.outcome}`, "data-n": j + 1, title: titleOf(segment, j),
      href: links ? `#/${row.key}/${j + 1}${i ? "/B" : ""}` : null }, piece);
  }));
}

const titleOf = (segment, j) =>
  `segment ${j + 1}: ${segment.outcome}, ${plural(segment.rewards.length, "attempt")}, reward ${reward(segment.rewards[segment.chosen])}`;

function figures(side, trace) {
  const seconds = Object.values(trace?.seconds ?? {}).reduce((sum, value) => sum + number(value), 0);
  const entries = [
    ["reward", reward(side.reward)], ["of the empty answer", reward(side.empty)], ["tokens", fixed(side.tokens)],
    ["attempts", fixed(side.attempts)], ["rejected tokens", fixed(side.rejected)], ["ended by", side.finish],
    ...(seconds ? [["seconds", seconds.toPrecision(3)]] : []),
  ];
  return h("dl", { class: "figures" }, entries.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

/* What became of an attempt; in a race, at the border behind its turn. */
function kindOf(segment, j) {
  if (j === segment.chosen) return segment.outcome;
  if (!segment.kept) return "rejected";
  return segment.kept[segment.turns[j]]?.includes(segment.numbers[j]) ? "on" : "dropped";
}

const nameOfAttempt = (segment, j) => (segment.numbers ? (segment.numbers[j] ?? -1) + 1 || "?" : j + 1);

/* The segments with their tables; they lie open where that is not much to look at. */
function segmentList(run, segments, side) {
  const blocks = segments.map((segment, j) => segmentBlock(run, segment, j, side));
  const toggle = () => { const open = blocks.some((block) => !block.open); blocks.forEach((block) => show(block, open)); };
  const button = h("button", { type: "button", class: "button", onclick: toggle }, "Open or close all");
  if (segments.reduce((sum, segment) => sum + segment.rewards.length, 0) <= OPEN) blocks.forEach((block) => show(block, true));
  if (!segments.length) return null;
  return h("section", { class: "panel" }, h("div", { class: "segments" }, h("div", { class: "segments-head" },
    h("h2", {}, letter(side), "Segments and their attempts"), segments.length > 1 && button), blocks,
    segments.some((segment) => segment.thresholds) && (run.hard || run.beta !== null) && h("p", { class: "told-p" },
      run.hard ? "p: an attempt is accepted if its reward is tau or more." :
        "p: the probability with which an attempt is accepted, min(1, exp((reward − tau) / beta)); tau rises to r* with the answer.")));
}

function show(block, open) {
  if (open) block.build?.();
  block.open = open;
}

function segmentBlock(run, segment, j, side) {
  const tries = segment.rewards.length;
  const taken = `${segment.outcome}${segment.kept ? "" : `, attempt ${segment.chosen + 1} of ${tries}`}`;
  const tau = number(segment.thresholds?.[segment.chosen]);
  const rest = segment.lengths.reduce((sum, length) => sum + length, 0) - segment.lengths[segment.chosen];
  const block = h("details", { class: "segment", id: `segment-${side}-${j + 1}` },
    h("summary", {}, h("span", { class: `cell ${segment.outcome}` }, j + 1), h("span", { class: "what" }, taken),
      h("span", { class: "even" }, h("span", { class: "quiet" }, "reward "), reward(segment.rewards[segment.chosen])),
      Number.isFinite(tau) && h("span", { class: "even" }, h("span", { class: "quiet" }, "tau "), reward(tau)),
      h("span", {}, plural(segment.lengths[segment.chosen], "token")),
      !segment.kept && h("span", { class: "quiet even" }, `${fixed(rest)} rejected`),
      segment.widths && h("span", { class: "quiet" }, `${segment.widths.length === 1 ? "a round" : "rounds"} of ${segment.widths.slice(0, 12).join(", ")}${segment.widths.length > 12 ? ", …" : ""}`)));
  block.build = () => { if (block.children.length === 1) block.append(attemptsTable(run, segment)); };
  block.addEventListener("toggle", () => block.open && block.build());
  return block;
}

/* The columns of a table of attempts: those that this segment has something for. */
function attemptColumns(run, segment) {
  const tests = segment.thresholds !== undefined;
  return [
    segment.turns && ["turn", "number", (j) => segment.turns[j] + 1],
    [segment.turns ? "attempt" : "#", "number", (j) => nameOfAttempt(segment, j)],
    ["reward", "number", (j) => reward(segment.rewards[j])],
    tests && ["tau", "number", (j) => reward(segment.thresholds[j])],
    tests && (run.hard || run.beta !== null) && ["p", "number", (j) => chanceCell(run, segment, j)],
    ["outcome", "outcome", (j) => [swatch(kindOf(segment, j)), kindOf(segment, j) === "on" ? WORDS.on : kindOf(segment, j)]],
    ["tokens", "number", (j) => fixed(segment.lengths[j])],
    segment.texts && ["text", "said", (j) => saidCell(segment, j)],
  ].filter(Boolean);
}

function chanceCell(run, segment, j) {
  const p = chance(run, number(segment.rewards[j]), number(segment.thresholds[j]));
  const bar = h("i");
  bar.style.width = percent(Number.isNaN(p) ? 0 : p);
  return h("span", { class: "chance" }, probability(p), bar);
}

function saidCell(segment, j) {
  const text = segment.texts[j];
  if (text === null) return h("span", { class: "quiet" }, "left out");
  return [h("bdi", { dir: "auto" }, text), segment.ends?.includes(j) && h("span", { class: "end" }, "end")];
}

function attemptsTable(run, segment) {
  const columns = attemptColumns(run, segment);
  const body = h("tbody", { role: "rowgroup" });
  const table = h("table", { class: "attempts", role: "table" },
    h("caption", { class: "unseen" }, "Attempts in the order in which they were judged"),
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, columns.map(([name, style]) =>
      h("th", { scope: "col", role: "columnheader", class: style === "number" ? "number" : "" }, name)))), body);
  const more = h("button", { type: "button", class: "button", onclick: () => grow() });
  let there = 0;
  const grow = () => {
    const end = Math.min(segment.rewards.length, there + ROWS);
    for (; there < end; there += 1) body.append(attemptRow(columns, segment, there));
    more.textContent = `Show ${fixed(Math.min(ROWS, segment.rewards.length - there))} more`;
    more.hidden = there === segment.rewards.length;
  };
  grow();
  return h("div", {}, table, more);
}

function attemptRow(columns, segment, j) {
  const style = j === segment.chosen ? `taken ${segment.outcome}` : "";
  return h("tr", { class: style, role: "row" }, columns.map(([name, kind, cell]) =>
    h("td", { class: kind, role: "cell", "data-label": kind === "said" || kind === "outcome" ? null : name }, cell(j))));
}

/* --- routes and keys --------------------------------------------------------------------------------------------- */

const places = new Map(data.rows.map((row, place) => [row.key, place]));
let overview = null;
let here = null; // the place of the prompt that is shown

function notes(more) {
  return [...data.notes, ...(more ? [more] : [])].map((note) => h("p", { class: "note" }, note));
}

function showOverview(note) {
  overview ??= [head(), h("div"), cards(), charts(), h("div", { class: "panels" }, facts()), grid()];
  overview[1].replaceChildren(...notes(note));
  byId("main").replaceChildren(...overview);
  document.title = `${plain(data.names.join(" beside "))} · STARS report`;
  if (!parts.body.children.length) drawRows();
  if (here === null) return;
  here = null;
  const links = [...parts.body.querySelectorAll("a.id")];
  const at = links.findIndex((link) => link.hash === view.focus);
  scrollTo({ top: view.scroll, behavior: "instant" });
  if (at >= 0) focusRow(links, at);
}

function showPrompt(place, segment, side) {
  if (here !== place) {
    if (here === null) view.scroll = scrollY;
    here = place;
    view.focus = `#/${data.rows[place].key}`;
    if (!view.shown.length) view.shown = matching();
    byId("main").replaceChildren(...promptView(place));
    document.title = `${plain(data.rows[place].id)} · ${plain(data.names.join(" beside "))} · STARS report`;
    scrollTo({ top: 0, behavior: "instant" });
    byId("main").querySelector("h1").focus({ preventScroll: true });
  }
  const block = segment && byId(`segment-${side === "B" ? 1 : 0}-${segment}`);
  if (!block) return;
  show(block, true);
  block.scrollIntoView();
  block.querySelector("summary").focus({ preventScroll: true });
}

function route() {
  if (location.hash && !location.hash.startsWith("#/")) return;
  const [key, segment, side] = location.hash.slice(2).split("/");
  if (!key) showOverview();
  else if (places.has(key)) showPrompt(places.get(key), segment, side);
  else showOverview(`This report has no prompt ${key}.`);
}

function pressed(event) {
  const writing = event.target.closest?.("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && here !== null) location.hash = "#/";
  else if (event.key === "Escape" && writing === parts.search) writing.blur();
  else if (writing) return;
  else if (event.key === "/" && here === null) { event.preventDefault(); parts.search.focus(); }
  else if (here !== null && !event.target.closest?.(".scroll") && (event.key === "ArrowLeft" || event.key === "ArrowRight"))
    byId("main").querySelector(`.nav a[rel=${event.key === "ArrowLeft" ? "previous" : "next"}]`)?.click();
}

/* The bar: what the page is, and a switch between light and dark. */
function bar() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const word = () => ((document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark" ? "Light" : "Dark");
  const button = h("button", { type: "button", class: "button", id: "theme" });
  const name = () => { button.textContent = word(); button.setAttribute("aria-label", `${word()} colours`); };
  button.addEventListener("click", () => { document.documentElement.dataset.theme = word().toLowerCase(); name(); });
  dark.addEventListener("change", name);
  name();
  const star = s("svg", { viewBox: "-10 -10 20 20", "aria-hidden": "true" }, s("path", { d: "M0-10C1.5-3 3-1.5 10 0 3 1.5 1.5 3 0 10-1.5 3-3 1.5-10 0-3-1.5-1.5-3 0-10z" }));
  return [h("span", { class: "brand" }, star, "STARS report"), button];
}

/* On paper everything that is folded lies open. */
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((block) => show(block, true));
});
addEventListener("afterprint", () => folded.forEach((block) => show(block, false)));

byId("bar").append(...bar());
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); byId("main").focus(); });
addEventListener("hashchange", route);
addEventListener("keydown", pressed);
route();
performance.mark("interactive");
