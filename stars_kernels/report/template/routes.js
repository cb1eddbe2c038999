/* Addresses and keys: which view is shown. The last file; it draws the page. */

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
  else if (event.key === "/" && here === null) {
    event.preventDefault();
    parts.search.focus();
  } else if (
    here !== null &&
    !event.target.closest?.(".scroll") &&
    (event.key === "ArrowLeft" || event.key === "ArrowRight")
  )
    byId("main")
      .querySelector(`.nav a[rel=${event.key === "ArrowLeft" ? "previous" : "next"}]`)
      ?.click();
}

/* The bar: what the page is, and a switch between light and dark. */
function bar() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const word = () =>
    (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark" ? "Light" : "Dark";
  const button = h("button", { type: "button", class: "button", id: "theme" });
  const name = () => {
    button.textContent = word();
    button.setAttribute("aria-label", `${word()} colours`);
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = word().toLowerCase();
    name();
  });
  dark.addEventListener("change", name);
  name();
  const star = s(
    "svg",
    { viewBox: "-10 -10 20 20", "aria-hidden": "true" },
    s("path", { d: "M0-10C1.5-3 3-1.5 10 0 3 1.5 1.5 3 0 10-1.5 3-3 1.5-10 0-3-1.5-1.5-3 0-10z" }),
  );
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
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
addEventListener("hashchange", route);
addEventListener("keydown", pressed);
route();
performance.mark("interactive");
