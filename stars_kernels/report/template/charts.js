/* Charts: svg whose places are in percent, so that they follow the width of the page and texts keep their size. */

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
  s(
    "svg",
    { class: "plot", viewBox: "0 0 14 14", "aria-hidden": "true" },
    s("line", { class: style, x1: 0, x2: 14, y1: 7, y2: 7 }),
  );
const legend = (entries) =>
  h(
    "ul",
    { class: "legend" },
    entries.map(([sign, word]) => h("li", {}, sign, word)),
  );

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
const levels = (values, y, word) =>
  values.map((value) => [
    s("line", { class: "grid", x1: 0, x2: "100%", y1: y(value), y2: y(value) }),
    s("text", { x: 0, dx: -9, y: y(value), dy: 4, "text-anchor": "end" }, word(value)),
  ]);

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

/* Bars of several series side by side in each bin, each as a share of its series; and a line for each target, [name, r*]. */
function histogram(series, targets) {
  const [low, high] = ends([...series.flatMap((one) => one.values), ...targets.map(([, value]) => value)]);
  const bins = 20;
  const heights = series.map(({ values }) => {
    const finite = values.filter(Number.isFinite);
    const counts = new Array(bins).fill(0);
    for (const value of finite) counts[Math.min(bins - 1, Math.floor(((value - low) / (high - low)) * bins))] += 1;
    return counts.map((count) => count / (finite.length || 1));
  });
  const top = Math.max(...heights.flat(), 1e-9);
  const plot = s(
    "svg",
    { class: "plot", role: "img", "aria-label": toldOf(series, targets) },
    levels(
      ticks(0, top, 3),
      (value) => percent(1 - value / top),
      (value) => `${shortTick(100 * value)}%`,
    ),
  );
  heights.forEach((shares, i) =>
    shares.forEach((share, bin) => {
      if (!share) return;
      const width = 0.84 / bins / series.length;
      plot.append(
        s(
          "rect",
          {
            class: series[i].style,
            x: percent((bin + 0.08) / bins + i * width),
            width: percent(width * 0.94),
            y: percent(1 - share / top),
            height: percent(share / top),
            rx: 1.5,
          },
          s("title", {}, `${series[i].name}: ${percent(share).replace(/\.?0+%/, "%")}`),
        ),
      );
    }),
  );
  plot.append(s("line", { class: "axis", x1: 0, x2: "100%", y1: "100%", y2: "100%" }));
  for (const tick of ticks(low, high, 5)) plot.append(below((tick - low) / (high - low), shortTick(tick)));
  targets.forEach(([name, target], i) => {
    const x = (target - low) / (high - low);
    plot.append(
      s("line", { class: "target", x1: percent(x), x2: percent(x), y1: -6, y2: "100%" }),
      s(
        "text",
        { class: "target", x: percent(x), y: -10 - 14 * i, "text-anchor": x > 0.9 ? "end" : "middle" },
        `${name} ${reward(target)}`,
      ),
    );
  });
  return h(
    "figure",
    {},
    frame(plot),
    legend(series.map((one) => [chip(one.style), `${one.name} (${fixed(one.values.length)})`])),
  );
}

function toldOf(series, targets) {
  const means = series.map(({ name, values }) => `${name}: mean ${reward(mean(values))}`);
  return `Histogram of rewards. ${[...means, ...targets.map(([name, target]) => `${name} ${reward(target)}`)].join("; ")}.`;
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
  const all = [
    ...bars.map((count, i) => [count, i, "bar-A"]),
    ...(fallbacks ? [[fallbacks, bars.length + 0.6, "bar-fallback"]] : []),
  ];
  const names = bars.map((_, i) => (per === 1 ? `${i + 1}` : `${i * per + 1}–${(i + 1) * per}`));
  const plot = s("svg", {
    class: "plot",
    role: "img",
    "aria-label": `Segments by attempts: ${names.map((name, i) => `${name}: ${bars[i]}`).join(", ")}; fallbacks: ${fallbacks}.`,
  });
  const whole = (value) => Number.isInteger(value);
  plot.append(...levels(ticks(0, top, 3).filter(whole), (value) => percent(1 - value / top), shortTick).flat());
  for (const [count, place, style] of all.filter(([count]) => count))
    plot.append(
      s(
        "rect",
        {
          class: style,
          x: percent((place + 0.1) / columns),
          width: percent(0.8 / columns),
          rx: 1.5,
          y: percent(1 - Math.max(count / top, 0.015)),
          height: percent(Math.max(count / top, 0.015)),
        },
        s("title", {}, `${style === "bar-A" ? `after ${names[place]}` : "fallback"}: ${plural(count, "segment")}`),
      ),
    );
  plot.append(s("line", { class: "axis", x1: 0, x2: "100%", y1: "100%", y2: "100%" }));
  const every = Math.ceil(names.length / 6);
  names.forEach((name, i) => {
    if (i % every === 0) plot.append(below((i + 0.5) / columns, name));
  });
  const told = [
    [chip("bar-A"), "accepted"],
    ...(fallbacks ? [[chip("bar-fallback"), `fallback (${fixed(fallbacks)})`]] : []),
  ];
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
  if (Number.isFinite(target))
    plot.append(s("line", { class: "target", x1: 0, x2: "100%", y1: y(target), y2: y(target) }));
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
  return h(
    "figure",
    { class: "tall" },
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Chart of rewards ${name}` }, framed),
    legendOf(segments, target),
  );
}

/* The ends of the axis of rewards for what some runs made of a prompt, so that their charts can be compared. */
const endsOf = (traces) =>
  ends([
    ...data.runs.map((run) => number(run.target)),
    ...traces
      .flatMap((trace) => trace?.segments ?? [])
      .flatMap((segment) => [...segment.rewards, ...(segment.thresholds ?? [])].map(number)),
  ]);

/* tau of each segment, of the length that its taken attempt has, as a stair. */
function thresholdLine(plot, segments, y) {
  const width = 1 / segments.length;
  let before = NaN;
  segments.forEach((segment, i) => {
    const tau = number(segment.thresholds?.[segment.chosen]);
    if (!Number.isFinite(tau)) return;
    if (Number.isFinite(before))
      plot.append(
        s("line", { class: "tau", x1: percent(i * width), x2: percent(i * width), y1: y(before), y2: y(tau) }),
      );
    plot.append(
      s("line", { class: "tau", x1: percent(i * width), x2: percent((i + 1) * width), y1: y(tau), y2: y(tau) }),
    );
    before = tau;
  });
}

function legendOf(segments, target) {
  const kinds = new Set(segments.flatMap((segment) => segment.rewards.map((_, j) => kindOf(segment, j))));
  const entries = Object.keys(SHAPES)
    .filter((kind) => kinds.has(kind))
    .map((kind) => [swatch(kind), WORDS[kind] ?? kind]);
  if (segments.some((segment) => segment.thresholds)) entries.push([dash("tau"), "threshold tau"]);
  if (Number.isFinite(target)) entries.push([dash("target"), `r* ${reward(target)}`]);
  return legend(entries);
}

function toldOfSegments(segments) {
  const taken = segments.map((segment) => reward(segment.rewards[segment.chosen]));
  return `Rewards of the attempts at ${plural(segments.length, "segment")}. Taken: ${taken.join(", ")}. All are in the tables below.`;
}
