/* The overview: the run's figures, its charts, and what it was. */

const letter = (i) => both && h("span", { class: `of ${"AB"[i]}` }, "AB"[i]);

function head() {
  return h(
    "div",
    { class: "head" },
    h(
      "h1",
      { tabindex: -1 },
      data.names.map((name, i) => [i ? h("span", { class: "quiet" }, " beside ") : null, h("bdi", {}, name)]),
    ),
    data.runs.map((run, i) => h("p", {}, letter(i), run.headline.join(" · "))),
  );
}

function cards() {
  const labels = [...new Set(data.runs.flatMap((run) => run.cards.map((card) => card.label)))];
  return h(
    "dl",
    { class: "panel cards" },
    labels.map((label) =>
      h(
        "div",
        { class: "card" },
        h("dt", {}, label),
        data.runs.map((run, i) => {
          const card = run.cards.find((one) => one.label === label) ?? { value: "–", note: "" };
          return [h("dd", { class: "value" }, letter(i), card.value), h("dd", { class: "told" }, card.note)];
        }),
      ),
    ),
  );
}

function charts() {
  const series = data.runs.map((run, i) => ({
    name: both ? data.names[i] : "answers",
    style: `bar-${"AB"[i]}`,
    values: data.rows.map((row) => number(row.sides[i]?.reward)).filter(Number.isFinite),
  }));
  const calibrated = data.runs.find((run) => run.calibration.length);
  if (calibrated)
    series.unshift({
      name: "plain answers of the calibration",
      style: "bar-plain",
      values: calibrated.calibration.map(number),
    });
  const shown = series.filter((one) => one.values.length);
  const tests = data.rows.some((row) => /[af]/.test(row.sides[0]?.outcomes ?? ""));
  const known = data.runs.map((run, i) => [`r* of ${data.names[i]}`, number(run.target)]);
  const finite = known.filter(([, target]) => Number.isFinite(target));
  const targets = finite.every(([, target]) => target === finite[0][1])
    ? finite.slice(0, 1).map(([, target]) => ["r*", target])
    : finite;
  return h(
    "div",
    { class: "panels" },
    shown.length > 0 && panel("Rewards", `${tests ? "wide" : "seven"}`, histogram(shown, targets)),
    tests &&
      panel(both ? `Segments of ${data.names[0]}, by attempts` : "Segments, by attempts", "slim", attemptsHistogram()),
    data.runs.some((run) => Object.keys(run.phases).length) &&
      panel(
        "Seconds an answer took",
        tests ? "slim" : "five",
        phases(),
        h("p", {}, "Of the start to the end of an answer, on average: answers decoded side by side take the same seconds."),
      ),
  );
}

const panel = (title, size, ...children) => h("section", { class: `panel ${size}` }, h("h2", {}, title), children);

function phases() {
  return data.runs.map((run, i) => {
    const all = Object.entries(run.phases).map(([phase, seconds]) => [phase, number(seconds)]);
    const most = Math.max(...all.map(([, seconds]) => seconds));
    return (
      all.length > 0 &&
      h(
        "dl",
        { class: "phases" },
        both && h("dt", {}, letter(i)),
        both && h("dd", {}, h("span"), h("span")),
        all
          .sort((a, b) => b[1] - a[1])
          .map(([phase, seconds]) => {
            const bar = h("span");
            bar.style.width = percent(seconds / most);
            return [
              h("dt", {}, phase),
              h(
                "dd",
                {},
                h("span", { class: "track" }, bar),
                h("span", { class: "told" }, `${seconds >= 100 ? fixed(seconds) : seconds.toPrecision(2)} s`),
              ),
            ];
          }),
      )
    );
  });
}

function facts() {
  return data.runs.map((run, i) =>
    h(
      "details",
      { class: "panel facts" },
      h("summary", {}, letter(i), "What it was: rule, settings, models, versions"),
      h(
        "div",
        { class: "groups" },
        run.facts.map(([title, entries]) =>
          h(
            "section",
            {},
            h("h3", {}, title),
            h(
              "dl",
              {},
              entries.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
            ),
          ),
        ),
      ),
    ),
  );
}
