/* The grid: a row per prompt, to be sorted, filtered and searched. */

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
      {
        name: "Reward A",
        numeric: true,
        wide: true,
        value: (row) => number(row.sides[0]?.reward),
        cell: (row) => rewardCell(row.sides[0]),
      },
      {
        name: "Reward B",
        numeric: true,
        wide: true,
        value: (row) => number(row.sides[1]?.reward),
        cell: (row) => rewardCell(row.sides[1]),
      },
      { name: "A − B", numeric: true, value: difference, cell: differenceCell },
      {
        name: "Attempts",
        numeric: true,
        wide: true,
        value: (row) => number(row.sides[0]?.attempts),
        cell: (row) => row.sides.map((side) => h("div", {}, fixed(number(side?.attempts)))),
      },
      {
        name: "Segments",
        wide: true,
        value: (row) => count(row.sides[0], "f") - count(row.sides[1], "f"),
        cell: (row) => strips(row, ""),
      },
      {
        name: "End",
        wide: true,
        value: (row) => finishOf(row.sides[0]),
        cell: (row) => row.sides.map((side) => h("div", {}, finishOf(side))),
        up: true,
      },
    ]
  : [
      { name: "Prompt", value: (row) => String(row.id), cell: promptCell, up: true },
      {
        name: "Reward",
        numeric: true,
        value: (row) => number(row.sides[0].reward),
        cell: (row) => rewardCell(row.sides[0]),
      },
      {
        name: "Gain",
        numeric: true,
        wide: true,
        value: (row) => gain(row.sides[0]),
        cell: (row) => signed(gain(row.sides[0])),
      },
      {
        name: "Tokens",
        numeric: true,
        wide: true,
        value: (row) => number(row.sides[0].tokens),
        cell: (row) => fixed(number(row.sides[0].tokens)),
      },
      {
        name: "Attempts",
        numeric: true,
        wide: true,
        value: (row) => number(row.sides[0].attempts),
        cell: (row) => fixed(number(row.sides[0].attempts)),
      },
      { name: "Segments", wide: true, value: (row) => count(row.sides[0], "f"), cell: (row) => strips(row, "") },
      {
        name: "End",
        wide: true,
        value: (row) => finishOf(row.sides[0]),
        cell: (row) => finishOf(row.sides[0]),
        up: true,
      },
    ];

const finishOf = (side) => (side ? (side.error ? "error" : side.finish) : "missing");

function rewardCell(side) {
  if (!side) return h("span", { class: "quiet" }, "missing");
  return side.error ? h("span", { class: "error" }, "failed") : reward(side.reward);
}

function differenceCell(row) {
  const found = difference(row);
  if (Number.isNaN(found))
    return h("span", { class: "quiet" }, row.sides.every(Boolean) ? "–" : `only in ${row.sides[0] ? "A" : "B"}`);
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
      : h(
          "div",
          { class: "clamp answer", dir: "auto" },
          side.text === null ? "no text: it was decoded without a tokenizer" : preview(side.text),
        ),
    strips(row, "narrow"),
  ];
}

/* A row of cells per run, one per segment, with the number of attempts in it. */
function strips(row, style) {
  return row.sides.map((side, i) => {
    if (!side || side.error)
      return both && h("div", { class: `strip ${style}` }, letter(i), h("span", { class: "quiet" }, finishOf(side)));
    const told = Object.entries(OUTCOMES)
      .map(([key, word]) => [count(side, key), word])
      .filter(([times]) => times);
    const label = `${plural(side.tries.length, "segment")}: ${told.map(([times, word]) => `${times} ${word}`).join(", ")}`;
    const more = side.tries.length - CELLS;
    return h(
      "div",
      { class: `strip ${style}`, role: "img", "aria-label": label, title: label },
      letter(i),
      side.tries.slice(0, CELLS).map((tries, j) => h("span", { class: `cell ${OUTCOMES[side.outcomes[j]]}` }, tries)),
      more > 0 && h("span", { class: "cell more" }, `+${more}`),
    );
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
  const found = data.rows
    .map((_, place) => place)
    .filter((place) => {
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
  return a === b ? 0 : down ? b - a : a - b;
}

/* The filters that the rows of this report can tell apart. */
function filters() {
  const sides = data.rows.flatMap((row) => row.sides);
  const outcomes = new Set(sides.flatMap((side) => [...(side?.outcomes ?? "")]));
  const choices = [["", "All segments"]];
  if (outcomes.has("f")) choices.push(["f", "With a fallback"], ["none", "Without a fallback"]);
  if (outcomes.has("u")) choices.push(["u", "With an undecided one"]);
  if (both)
    choices.push(
      ["A", "A has more reward"],
      ["B", "B has more reward"],
      ["=", "Equal rewards"],
      ["only", "Answered once or not"],
    );
  const finishes = [...new Set(sides.map(finishOf))].sort();
  return [
    choices.length > 1 && select("outcome", "Filter by outcome", choices),
    finishes.length > 1 &&
      select("finish", "Filter by how it ended", [["", "All ends"], ...finishes.map((end) => [end, end])]),
  ];
}

function select(name, label, choices) {
  const change = (event) => {
    view[name] = event.target.value;
    view.page = 0;
    drawRows();
  };
  return h(
    "select",
    { "aria-label": label, onchange: change },
    choices.map(([value, word]) => h("option", { value }, word)),
  );
}

const parts = {};

function grid() {
  const search = (event) => {
    view.query = event.target.value;
    view.page = 0;
    drawRows();
  };
  parts.search = h("input", {
    type: "search",
    placeholder: "Search prompts and answers",
    "aria-label": "Search prompts and answers",
    oninput: search,
  });
  parts.heads = COLUMNS.map((column, i) =>
    h(
      "th",
      { scope: "col", class: classOf(column), "aria-sort": "none" },
      h("button", { type: "button", onclick: () => sortBy(i) }, column.name),
    ),
  );
  parts.body = h("tbody", { onclick: openRow, onkeydown: moveInRows });
  parts.told = h("span", { role: "status" });
  parts.pager = h("span", { class: "pager" });
  const used = new Set(data.rows.flatMap((row) => row.sides.flatMap((side) => [...(side?.outcomes ?? "")])));
  return h(
    "section",
    { class: "panel" },
    h("div", { class: "tools" }, h("h2", {}, "Prompts"), parts.search, filters()),
    h(
      "table",
      { class: "prompts" },
      h("caption", { class: "unseen" }, "Prompts, with their rewards and segments"),
      h("thead", {}, h("tr", {}, parts.heads)),
      parts.body,
    ),
    h("div", { class: "keys" }, parts.told, parts.pager),
    h(
      "div",
      { class: "keys" },
      h(
        "span",
        {},
        used.size > 0 && "Segments: attempts at each, ",
        Object.entries(OUTCOMES)
          .filter(([key]) => used.has(key))
          .map(([, word]) =>
            h(
              "span",
              { class: "key" },
              h("span", { class: `cell ${word}`, "aria-hidden": "true" }, "\u00a0"),
              word,
              "\u00a0 ",
            ),
          ),
      ),
      h(
        "span",
        {},
        h("kbd", {}, "↑"),
        " ",
        h("kbd", {}, "↓"),
        " choose · ",
        h("kbd", {}, "Enter"),
        " opens · ",
        h("kbd", {}, "/"),
        " searches · ",
        h("kbd", {}, "Esc"),
        " closes",
      ),
    ),
  );
}

const classOf = (column) => `${column.numeric ? "number" : ""}${column.wide ? " wide" : ""}`;

/* A first click sorts, a second one turns it round, a third one gives the order of the file. */
function sortBy(i) {
  const first = !COLUMNS[i].up;
  if (view.sort !== i) [view.sort, view.down] = [i, first];
  else if (view.down === first) view.down = !first;
  else view.sort = null;
  view.page = 0;
  parts.heads.forEach((head, j) =>
    head.setAttribute("aria-sort", view.sort === j ? (view.down ? "descending" : "ascending") : "none"),
  );
  drawRows();
}

/* Draw the page of rows that is looked at. */
function drawRows() {
  view.shown = matching();
  const pages = Math.max(1, Math.ceil(view.shown.length / ROWS));
  view.page = Math.min(view.page, pages - 1);
  const from = view.page * ROWS;
  const places = view.shown.slice(from, from + ROWS);
  parts.body.replaceChildren(
    ...places.map((place) => {
      const row = data.rows[place];
      return h(
        "tr",
        {},
        COLUMNS.map((column) => h("td", { class: classOf(column) }, column.cell(row))),
      );
    }),
  );
  if (!places.length)
    parts.body.append(h("tr", {}, h("td", { colspan: COLUMNS.length, class: "quiet" }, "No prompt is like that.")));
  const links = parts.body.querySelectorAll("a.id");
  if (links.length) links[0].tabIndex = 0;
  parts.told.textContent = view.shown.length
    ? `${fixed(from + 1)}–${fixed(from + places.length)} of ${plural(view.shown.length, "prompt")}`
    : "0 prompts";
  parts.pager.replaceChildren(
    ...(pages > 1 ? [pageButton("Previous", -1, view.page > 0), pageButton("Next", 1, view.page < pages - 1)] : []),
  );
}

function pageButton(word, by, there) {
  const turn = () => {
    view.page += by;
    drawRows();
    parts.body.closest("section").scrollIntoView();
  };
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
  links.forEach((link, i) => {
    link.tabIndex = i === to ? 0 : -1;
  });
  links[to].focus();
}
