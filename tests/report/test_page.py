"""The page in a browser: what can be seen, found, sorted and reached by keys, and that nothing runs or is loaded."""

import json

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from stars_kernels.report import write_report
from tests.report.conftest import RULES
from tests.report.example import write_rows, write_run

UNFOLD = "document.querySelectorAll('details').forEach((block) => { block.build?.(); block.open = true; })"
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<!-- <script>",
    "<img src=x onerror=alert(3)>",
    "{{script}} \\u003c ]]> &lt;b&gt;",
    "a\u2028b\u2029c\0d\x1b[31me\x85f",
    "\u202egnp.exe\u202c \u2066x\u2069 \u200b \ufeff",
    "lone \ud800 half",
    "\u05e9\u05dc\u05d5\u05dd and \u0627\u0644\u0639",
    "\U000e0041\U000e0042 tags, 👩‍👩‍👧 family",
    "__proto__",
    "constructor",
]


def rows(page):
    return page.locator(".prompts tbody tr")


def ids(page):
    return page.locator(".prompts tbody a.id").all_inner_texts()


def titled(page, title):
    """Wait for a page of this title: an address is followed a moment after a click."""
    expect(page.locator("h1")).to_have_text(title)


def test_overview(visit, pages):
    page = visit(pages["single"])
    assert page.title() == "stars · STARS report" and rows(page).count() == 12
    cards = dict(
        zip(page.locator(".card dt").all_inner_texts(), page.locator(".card .value").all_inner_texts(), strict=True)
    )
    assert cards["Answers"] == "12" and cards["Target r*"] == "0.800" and cards["Accepted"].endswith("%")
    assert page.locator("svg[role=img]").count() == 2
    assert "r* 0.800" in page.locator("figure svg").first.text_content()
    page.get_by_text("What it was").click()
    assert page.get_by_text("LlamaForCausalLM 0123456789abcdef").is_visible()
    assert page.locator(".strip[role=img]").first.get_attribute("aria-label").startswith("8 segments: ")


@pytest.mark.parametrize("hash", ["#/", "#/p3/2"])
@pytest.mark.parametrize("kind", ["single", "beside"])
def test_nobody_is_shut_out_and_nothing_sticks_out(visit, few, kind, hash):
    page = visit(few[kind] + hash)
    page.evaluate(UNFOLD)
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):  # others are as in light
            page.emulate_media(color_scheme=scheme)
            found = Axe().run(page, options=rules)
            assert found.violations_count == 0, (width, scheme, found.generate_report())


def test_sort(visit, pages):
    page = visit(pages["single"])
    before, head = ids(page), page.locator("th").nth(1)
    assert before == [f"p{i}" for i in range(12)] and head.get_attribute("aria-sort") == "none"

    def rewards():
        return [float(text.replace("\u2212", "-")) for text in rows(page).locator("td:nth-child(2)").all_inner_texts()]

    for order, expected in (("descending", sorted(rewards(), reverse=True)), ("ascending", sorted(rewards()))):
        head.locator("button").click()
        assert rewards() == expected and head.get_attribute("aria-sort") == order
    head.locator("button").click()
    assert ids(page) == before and head.get_attribute("aria-sort") == "none"
    page.locator("th button").first.click()
    page.locator("th button").first.click()
    assert ids(page)[:3] == ["p11", "p10", "p9"]  # as numbers


def test_search_and_filter(visit, tmp_path):
    folder = write_run(tmp_path / "run", prompts=6)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    lines[1]["prompt"], lines[2]["text"] = "Find the NEEDLE here.", "an answer with a needle"
    lines[3] = {"custom_id": "p3", "error": "line 4: a needle has no tokens"}
    lines[4]["segments"][0]["outcome"], lines[4]["finish_reason"] = "fallback", "stop"
    for i in (0, 1, 2, 5):
        lines[i]["finish_reason"] = "length"
        for segment in lines[i]["segments"]:
            segment["outcome"] = "accepted"
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = visit(write_report(folder, tmp_path / "page.html").as_uri())
    search = page.get_by_label("Search prompts and answers")
    search.fill("needle")
    assert ids(page) == ["p1", "p2", "p3"] and page.get_by_role("status").inner_text() == "1\u20133 of 3 prompts"
    search.fill("nothing like it")
    assert page.get_by_text("No prompt is like that.").is_visible()
    search.fill("")
    page.get_by_label("Filter by outcome").select_option("With a fallback")
    assert ids(page) == ["p4"]
    page.get_by_label("Filter by outcome").select_option("All segments")
    for end, expected in (("error", ["p3"]), ("stop", ["p4"]), ("length", ["p0", "p1", "p2", "p5"])):
        page.get_by_label("Filter by how it ended").select_option(end)
        assert ids(page) == expected
    page.get_by_label("Filter by how it ended").select_option("error")
    page.locator("a.id").click()
    titled(page, "p3")
    assert page.get_by_text("line 4: a needle has no tokens").is_visible()


def test_keys(visit, pages):
    page = visit(pages["single"])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.type") == "search"
    page.keyboard.press("Escape")
    page.locator("a.id").first.focus()
    for key in ("ArrowDown", "j", "ArrowDown", "k", "ArrowUp", "End", "Home", "ArrowUp", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.textContent") == "p2"
    page.keyboard.press("Enter")
    titled(page, "p2")
    assert page.evaluate("document.activeElement.tagName") == "H1"
    page.keyboard.press("ArrowRight")
    titled(page, "p3")
    page.keyboard.press("ArrowLeft")
    titled(page, "p2")
    page.keyboard.press("Escape")
    page.wait_for_selector(".prompts")
    assert page.evaluate("document.activeElement.textContent") == "p2"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_prompt_and_links_into_it(visit, pages, run):
    row = json.loads((run / "results.jsonl").read_text().splitlines()[3])
    page = visit(pages["single"] + "#/p3")
    assert page.locator("h1").inner_text() == "p3" and page.title().startswith("p3 · stars")
    assert page.get_by_text("You are a helpful assistant.").is_visible()
    assert page.locator(".answer-text").text_content() == row["text"]
    assert page.locator(".answer-text a").count() == 8
    attempts = [len(segment["rewards"]) for segment in row["segments"]]
    assert page.locator("figure .mark").count() >= sum(attempts)
    page.locator(".answer-text a").nth(5).click()
    expect(page.locator("#segment-0-6 summary")).to_be_focused()
    assert page.url.endswith("#/p3/6") and page.locator("#segment-0-6 .attempts tbody tr").count() == attempts[5]
    for i, text in enumerate(row["segments"][5]["texts"]):
        cells = page.locator("#segment-0-6 tbody tr").nth(i).locator("td")
        assert cells.nth(6).locator("bdi").text_content() == text
        r, tau = row["segments"][5]["rewards"][i], row["segments"][5]["thresholds"][i]
        assert cells.nth(1).inner_text() == f"{r:.3f}".replace("-", "\u2212")
        assert cells.nth(2).inner_text() == f"{tau:.3f}"
    page = visit(pages["single"] + "#/p5/2")
    assert page.locator("#segment-0-2").get_attribute("open") is not None
    page = visit(pages["single"] + "#/nowhere")
    assert page.get_by_text("This report has no prompt nowhere.").is_visible() and rows(page).count() == 12
    rows(page).nth(4).locator("td").nth(2).click()
    titled(page, "p4")


def test_two_runs_side_by_side(visit, pages):
    page = visit(pages["beside"])
    assert rows(page).count() == 14 and page.locator("th button").all_inner_texts()[:4] == [
        "Prompt", "Reward A", "Reward B", "A \u2212 B",
    ]  # fmt: skip
    assert "only in B" in rows(page).nth(13).inner_text() and "missing" in rows(page).nth(13).inner_text()
    page.get_by_role("button", name="A \u2212 B").click()
    found = [text for text in rows(page).locator("td:nth-child(4)").all_inner_texts() if "only" not in text]
    numbers = [float(text.replace("\u2212", "-")) for text in found]
    assert len(numbers) == 12 and numbers == sorted(numbers, reverse=True)
    page.get_by_label("Filter by outcome").select_option("Answered once or not")
    assert rows(page).count() == 2
    page.goto(pages["beside"] + "#/p3/2/B")
    titled(page, "p3")
    assert page.locator(".answer-text").count() == 2 and page.locator("#segment-1-2").get_attribute("open") is not None
    page.goto(pages["beside"] + "#/p13")
    titled(page, "p13")
    assert page.get_by_text("This run has no such prompt.").is_visible()


def test_hostile_texts_are_texts(visit, run, tmp_path):
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    costs = [json.loads(line) for line in (run / "costs.jsonl").read_text().splitlines()]
    for line, cost, text in zip(lines, costs, HOSTILE, strict=True):
        line["custom_id"] = cost["custom_id"] = line["text"] = text
        line["prompt"] = [{"role": text, "content": text}]
        for segment in line["segments"]:
            segment["texts"] = [text] * len(segment["rewards"])
    lines[0] = {"custom_id": HOSTILE[0], "error": HOSTILE[1]}
    folder = write_rows(tmp_path / "<b>run & <!-- <script>", lines, costs)
    target = write_report(folder, tmp_path / "page.html")
    raw = target.read_text(encoding="utf-8")
    assert raw.count("</script>") == 3 and raw.count("<script") == 3 and "\u202e" not in raw and "\u2028" not in raw
    page = visit(target.as_uri())
    assert page.locator("h1").inner_text() == "<b>run & <!-- <script>" and rows(page).count() == 12
    seen = ids(page)
    for i, text in enumerate(HOSTILE):
        page.locator("a.id").nth(i).click()
        titled(page, seen[i])
        if text.isascii() and "\0" not in text:
            assert seen[i] == text
            if i:
                assert page.locator(".answer-text").text_content() == text * 8
        page.evaluate(UNFOLD)
        page.keyboard.press("Escape")
        page.wait_for_selector(".prompts")
    assert "U+2028" in seen[5] and "␀" in seen[5] and "␛" in seen[5] and "U+0085" in seen[5]
    assert "U+202E" in seen[6] and "U+2066" in seen[6] and "U+200B" in seen[6] and "U+FEFF" in seen[6]
    assert "U+D800" in seen[7] and seen[8] == HOSTILE[8] and "U+E0041" in seen[9] and "👩‍👩‍👧" in seen[9]
    assert page.locator("main img, main script").count() == 0


def test_nothing_but_its_own_script_runs(visit, pages):
    """The policy is at work: what was written into the page afterwards is not run."""
    page = visit(pages["single"], told="Content Security Policy")
    violated = page.evaluate(
        """() => new Promise((done) => {
            document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
        })"""
    )
    assert violated == "script-src-elem" and not page.evaluate("window.ran")
    console = page.evaluate("document.querySelector('meta[http-equiv]').content")
    assert "default-src 'none'" in console and "unsafe" not in console


def test_light_and_dark(visit, pages):
    page = visit(pages["single"], color_scheme="dark")

    def dark():
        return page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 19, 23)"

    assert dark() and page.locator("#theme").inner_text() == "Light"
    page.locator("#theme").click()
    assert not dark() and page.locator("#theme").inner_text() == "Dark"
    page.emulate_media(media="print")
    assert not page.locator("#theme").is_visible() and rows(page).first.is_visible()


def test_a_full_page_is_small_and_quick(visit, tmp_path):
    folder = write_run(tmp_path / "full", 64, 8, 20, full=True)
    target = write_report(folder, tmp_path / "page.html")
    assert target.stat().st_size < 2_000_000
    times = []
    for _ in range(3):
        page = visit(target.as_uri())
        times.append(page.evaluate("performance.getEntriesByName('interactive')[0].startTime"))
        if times[-1] < 1000:
            break
    assert min(times) < 1000, times
    spent = page.evaluate(
        """async () => {
            const before = performance.now();
            location.hash = "#/p63";
            await new Promise((done) => addEventListener("hashchange", done, { once: true }));
            return performance.now() - before;
        }"""
    )
    assert page.locator("figure .mark").count() > 160 and spent < 1000


def test_ten_thousand_prompts(visit, run, tmp_path):
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    for line in lines:
        line["segments"] = line["segments"][:3]
        for segment in line["segments"]:
            del segment["texts"], segment["tokens"]
    many = [{**lines[i % 12], "custom_id": i, "token_ids": []} for i in range(10_000)]
    target = write_report(write_rows(tmp_path / "many", many, []), tmp_path / "page.html")
    page = visit(target.as_uri())
    assert page.evaluate("performance.getEntriesByName('interactive')[0].startTime") < 5000
    assert rows(page).count() == 100 and page.get_by_role("status").inner_text() == "1\u2013100 of 10,000 prompts"
    page.get_by_role("button", name="Next").click()
    assert ids(page)[0] == "100"
    page.get_by_role("button", name="Prompt", exact=True).click()
    page.get_by_role("button", name="Prompt", exact=True).click()
    assert ids(page)[:2] == ["9999", "9998"]
    page.get_by_label("Search prompts and answers").fill("777")
    assert page.get_by_role("status").inner_text() == "1\u201319 of 19 prompts"
    page.locator("a.id").first.click()
    titled(page, "9777")
    assert page.locator("figure .mark").count() > 0


def test_each_rule(visit, runs, tmp_path):
    """Also a run without rows, and one whose numbers are none."""
    for rule in RULES:
        page = visit(write_report(runs / rule, tmp_path / "page.html").as_uri())
        kept = [json.loads(line) for line in (runs / rule / "results.jsonl").read_text().splitlines()]
        for row in kept[:2]:
            page.evaluate(f"location.hash = '#/{row['custom_id']}'")
            titled(page, str(row["custom_id"]))
            attempts = sum(len(segment["rewards"]) for segment in row["segments"])
            assert page.locator("figure .plot .mark").count() == attempts
            page.evaluate(UNFOLD)
            assert page.locator(".attempts tbody tr").count() == attempts
            assert page.locator(".attempts tr.taken").count() == len(row["segments"])
            heads = page.locator(".attempts").first.locator("th").all_inner_texts()
            assert ("tau" in heads) == ("p" in heads) == (rule in ("stars", "hard", "cards"))
    kept[0]["reward"], kept[0]["prompt_reward"] = "-inf", "nan"
    for segment in kept[0]["segments"]:
        segment["rewards"] = [("nan", "inf", "-inf")[i % 3] for i in range(len(segment["rewards"]))]
    for rows in ([], kept[:1]):
        target = write_report(write_rows(tmp_path / f"{len(rows)}", rows, []), tmp_path / "page.html")
        page = visit(target.as_uri() + ("#/1" if rows else ""))
        assert page.get_by_text("\u2212∞" if rows else "No prompt is like that.").first.is_visible()


def test_each_run_s_target_is_drawn_where_they_differ(visit, tmp_path):
    first, second = (write_run(tmp_path / name, 4, seed=3) for name in ("first", "second"))
    manifest = second / "manifest.json"
    text = manifest.read_text()
    assert '"reward_threshold": 0.8' in text
    manifest.write_text(text.replace('"reward_threshold": 0.8', '"reward_threshold": 0.6'))
    for beside, drawn in ((first, ["r* 0.800"]), (second, ["r* of first 0.800", "r* of second 0.600"])):
        page = visit(write_report(first, tmp_path / f"{beside.name}.html", beside).as_uri())
        assert page.locator("figure svg").first.locator("text.target").all_text_contents() == drawn
