/* A prompt: its answer, the chart of its attempts, and a table of them per segment. */

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
    h(
      "div",
      { class: "panels" },
      promptPanel(row),
      row.sides.map((side, i) => sidePanels(row, side, i, found[i], endsOf(found))),
    ),
  ];
}

function navigation(place) {
  const at = view.shown.indexOf(place);
  const step = (word, to) => {
    const row = data.rows[view.shown[to]];
    return row && at >= 0
      ? h("a", { class: "button", href: `#/${row.key}`, rel: word.toLowerCase() }, word)
      : h("a", { class: "button", role: "link", "aria-disabled": "true" }, word);
  };
  return h(
    "nav",
    { class: "nav", "aria-label": "Prompts" },
    h("a", { class: "button", href: "#/" }, "← All prompts"),
    h("span", {}, step("Previous", at - 1), step("Next", at + 1)),
  );
}

function comparison(row) {
  const found = difference(row);
  const word = Number.isNaN(found)
    ? "There are not two rewards to compare."
    : ["A − B: ", h("span", { class: found > 0 ? "better" : found < 0 ? "worse" : "" }, signed(found)), " of reward"];
  return h(
    "p",
    {},
    data.names.map((name, i) => [letter(i), name, " \u00a0 "]),
    word,
  );
}

function promptPanel(row) {
  const given = [row.prompt, ...row.sides.map((side) => side?.prompt).filter(Boolean)];
  return given.map((prompt, i) =>
    h(
      "section",
      { class: "panel" },
      h("h2", {}, i ? "Prompt of the other run, under the same id" : "Prompt"),
      prompt === null
        ? h("p", { class: "quiet" }, "It was not kept.")
        : messagesOf(prompt).map((message) => [
            message.role && h("p", { class: "role" }, message.role),
            h("div", { class: "text", dir: "auto" }, message.text),
          ]),
    ),
  );
}

/* What one run made of a prompt: its answer, the chart, the segments. */
function sidePanels(row, side, i, trace, axis) {
  const size = both ? "wide" : "five";
  if (!side)
    return h(
      "section",
      { class: `panel ${size}` },
      h("h2", {}, letter(i), "Answer"),
      h("p", { class: "quiet" }, "This run has no such prompt."),
    );
  if (side.error)
    return h(
      "section",
      { class: `panel ${size}` },
      h("h2", {}, letter(i), "Error"),
      h("p", { class: "text error", dir: "auto" }, side.error),
    );
  const answer = h(
    "section",
    { class: `panel ${size}` },
    h("h2", {}, letter(i), "Answer"),
    answerText(row, side, trace, i),
    figures(side, trace),
  );
  if (!trace)
    return [
      answer,
      h(
        "section",
        { class: "panel seven" },
        h("p", { class: "quiet" }, "The attempts were left out to keep the page small."),
      ),
    ];
  const chart =
    trace.segments.length > 0 &&
    panel(
      [letter(i), "Reward of every attempt"],
      both ? "" : "seven",
      rewardChart(data.runs[i], both ? "AB"[i] : "", trace.segments, axis),
    );
  const list = segmentList(data.runs[i], trace.segments, i);
  return both ? h("div", { class: "wide side" }, answer, chart, list) : [answer, chart, list];
}

/* The answer, its segments marked where their texts are known. */
function answerText(row, side, trace, i) {
  if (!side.tokens) return h("p", { class: "quiet" }, "It has no tokens.");
  if (side.text === null) return h("p", { class: "quiet" }, "It was decoded without a tokenizer, so there is no text.");
  const pieces = trace?.segments.map((segment) => segment.texts?.[segment.chosen]) ?? [];
  if (!pieces.length || pieces.some((piece) => piece === undefined))
    return h("div", { class: "text answer-text", dir: "auto" }, side.text);
  const links = pieces.length <= 40;
  return h(
    "div",
    { class: "text answer-text", dir: "auto" },
    pieces.map((piece, j) => {
      const segment = trace.segments[j];
      return h(
        links ? "a" : "span",
        {
          class: `seg ${segment.outcome}`,
          "data-n": j + 1,
          title: titleOf(segment, j),
          href: links ? `#/${row.key}/${j + 1}${i ? "/B" : ""}` : null,
        },
        piece,
      );
    }),
  );
}

const titleOf = (segment, j) =>
  `segment ${j + 1}: ${segment.outcome}, ${plural(segment.rewards.length, "attempt")}, reward ${reward(segment.rewards[segment.chosen])}`;

function figures(side, trace) {
  const seconds = Object.values(trace?.seconds ?? {}).reduce((sum, value) => sum + number(value), 0);
  const entries = [
    ["reward", reward(side.reward)],
    ["of the empty answer", reward(side.empty)],
    ["tokens", fixed(side.tokens)],
    ["attempts", fixed(side.attempts)],
    ["rejected tokens", fixed(side.rejected)],
    ["ended by", side.finish],
    ...(seconds ? [["seconds", seconds.toPrecision(3)]] : []),
  ];
  return h(
    "dl",
    { class: "figures" },
    entries.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
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
  const toggle = () => {
    const open = blocks.some((block) => !block.open);
    blocks.forEach((block) => show(block, open));
  };
  const button = h("button", { type: "button", class: "button", onclick: toggle }, "Open or close all");
  if (segments.reduce((sum, segment) => sum + segment.rewards.length, 0) <= OPEN)
    blocks.forEach((block) => show(block, true));
  if (!segments.length) return null;
  return h(
    "section",
    { class: "panel" },
    h(
      "div",
      { class: "segments" },
      h(
        "div",
        { class: "segments-head" },
        h("h2", {}, letter(side), "Segments and their attempts"),
        segments.length > 1 && button,
      ),
      blocks,
      segments.some((segment) => segment.thresholds) &&
        (run.hard || run.beta !== null) &&
        h(
          "p",
          { class: "told-p" },
          run.hard
            ? "p: an attempt is accepted if its reward is tau or more."
            : "p: the probability with which an attempt is accepted, min(1, exp((reward − tau) / beta)); tau rises to r* with the answer.",
        ),
    ),
  );
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
  const block = h(
    "details",
    { class: "segment", id: `segment-${side}-${j + 1}` },
    h(
      "summary",
      {},
      h("span", { class: `cell ${segment.outcome}` }, j + 1),
      h("span", { class: "what" }, taken),
      h("span", { class: "even" }, h("span", { class: "quiet" }, "reward "), reward(segment.rewards[segment.chosen])),
      Number.isFinite(tau) && h("span", { class: "even" }, h("span", { class: "quiet" }, "tau "), reward(tau)),
      h("span", {}, plural(segment.lengths[segment.chosen], "token")),
      !segment.kept && h("span", { class: "quiet even" }, `${fixed(rest)} rejected`),
      segment.widths &&
        h(
          "span",
          { class: "quiet" },
          `${segment.widths.length === 1 ? "a round" : "rounds"} of ${segment.widths.slice(0, 12).join(", ")}${segment.widths.length > 12 ? ", …" : ""}`,
        ),
    ),
  );
  block.build = () => {
    if (block.children.length === 1) block.append(attemptsTable(run, segment));
  };
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
    [
      "outcome",
      "outcome",
      (j) => [swatch(kindOf(segment, j)), kindOf(segment, j) === "on" ? WORDS.on : kindOf(segment, j)],
    ],
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
  const table = h(
    "table",
    { class: "attempts", role: "table" },
    h("caption", { class: "unseen" }, "Attempts in the order in which they were judged"),
    h(
      "thead",
      { role: "rowgroup" },
      h(
        "tr",
        { role: "row" },
        columns.map(([name, style]) =>
          h("th", { scope: "col", role: "columnheader", class: style === "number" ? "number" : "" }, name),
        ),
      ),
    ),
    body,
  );
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
  return h(
    "tr",
    { class: style, role: "row" },
    columns.map(([name, kind, cell]) =>
      h(
        "td",
        { class: kind, role: "cell", "data-label": kind === "said" || kind === "outcome" ? null : name },
        cell(j),
      ),
    ),
  );
}
