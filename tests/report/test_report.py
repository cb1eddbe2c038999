"""What stands in a report: of each rule, of each kind of source, and what is left out of a large one."""

import json
import math
import re

import pytest

from stars_kernels import SpeculativeRejection, StarsConfig
from stars_kernels.data.run import COSTS, MANIFEST, RESULTS
from stars_kernels.report import read_runs, write_report
from stars_kernels.report.page import to_script
from tests.report.conftest import RULES, SET
from tests.report.example import write_rows, write_run
from tests.tiny import EOS, byte_tokenizer


def parts_of(page):
    """The data of a page: the overview, and the details of each prompt."""
    text = page.read_text(encoding="utf-8")
    overview, details = re.findall(r'<script type="application/json" id="\w+">(.*?)</script>', text, re.DOTALL)
    return json.loads(overview), [json.loads(line) for line in details.split("\n") if line]


@pytest.mark.parametrize("rule", RULES)
def test_a_run_of_each_rule(runs, tmp_path, rule):
    overview, details = parts_of(write_report(runs / rule, tmp_path / "page.html"))
    rows = {row["custom_id"]: row for row in map(json.loads, (runs / rule / RESULTS).read_text().splitlines())}
    assert [row["id"] for row in overview["rows"]] == [1, "second", 3] and overview["notes"] == []
    assert [row["prompt"] for row in overview["rows"]] == ["one", "two", None]
    assert "has no tokens" in overview["rows"][2]["sides"][0]["error"] and details[2] == [None]
    for row, (trace,) in list(zip(overview["rows"], details, strict=True))[:2]:
        kept, (side,) = rows[row["id"]], row["sides"]
        assert side["text"] == kept["text"] and side["reward"] == pytest.approx(kept["reward"], rel=1e-6)
        taken = [segment["texts"][segment["chosen"]] for segment in trace["segments"]]
        assert "".join(taken) == kept["text"]
        assert ["thresholds" in segment for segment in trace["segments"]] == [
            rule in ("stars", "hard", "cards") for _ in taken
        ]
        assert all(segment["widths"] for segment in trace["segments"]) and trace["seconds"]
        ends = [segment["chosen"] in segment["ends"] for segment in trace["segments"]]
        assert any(ends) == (kept["token_ids"][-1] == EOS)
    cards = {card["label"]: card["value"] for card in overview["runs"][0]["cards"]}
    assert cards["Answers"] == "2" and ("Accepted" in cards) == (rule in ("stars", "hard", "cards"))
    assert {"Mean reward", "Answer tokens", "Sampled tokens", "Tokens a second"} <= set(cards)


def test_numbers_and_turns_of_a_race(runs, tmp_path):
    _, details = parts_of(write_report(runs / "race", tmp_path / "page.html"))
    races = [trace["segments"][0] for (trace,) in details[:2] if "kept" in trace["segments"][0]]
    assert any(max(race["turns"]) >= 2 for race in races)
    for race in races:
        assert race["numbers"][:8] == [*range(8)] and None not in race["numbers"]
        texts = {}
        for number, turn, text in zip(race["numbers"], race["turns"], race["texts"], strict=True):
            assert turn == 0 or (number in race["kept"][turn - 1] and text.startswith(texts[number]))
            texts[number] = text


def test_in_a_race_without_tokens_some_numbers_may_be_unknown():
    from stars_kernels.report.attempts import details_of
    from stars_kernels.report.source import Row, Run

    config = StarsConfig(rule=SpeculativeRejection(3, segment_size=2), seed=0).to_dict()
    run = Run("race", config, None, {"eos": "9"}, {}, [], 1, None)
    segment = {
        "rewards": [1.0, 2.0, 0.0, 3.0], "thresholds": ["nan"] * 4, "lengths": [2, 2, 2, 4], "chosen": 3,
        "outcome": "best", "kept": [[0, 1]], "tokens": [[5, 6], [5, 9], [6, 6], [5, 6, 7, 7]],
    }  # fmt: skip
    answer = {"segments": [segment], "counts": {}}
    (known,) = details_of(Row(1, None, answer, None, {}), run, rejected=True)["segments"]
    assert known["numbers"] == [0, 1, 2, 0] and known["turns"] == [0, 0, 0, 1]
    answer = {"segments": [{**segment, "tokens": None}], "counts": {}}
    (unknown,) = details_of(Row(1, None, answer, None, {}), run, rejected=True)["segments"]
    assert unknown["numbers"] == [0, 1, 2, None]


@pytest.mark.parametrize("form", ["one", "list", "lines"])
def test_a_file_of_outputs(engine, tmp_path, form):
    outputs = engine.decode(["one", "two"], **SET, **RULES["stars"])
    data = [output.to_dict() for output in outputs]
    written = {"one": json.dumps(data[0]), "list": json.dumps(data), "lines": "\n".join(map(json.dumps, data))}[form]
    (tmp_path / "outputs.json").write_text(written)
    overview, details = parts_of(write_report(tmp_path / "outputs.json", tmp_path / "page.html"))
    count = 1 if form == "one" else 2
    assert overview["names"] == ["outputs"] and [row["id"] for row in overview["rows"]] == [
        output.request_id for output in outputs[:count]
    ]
    assert "--tokenizer NAME" in overview["notes"][0] and "texts" not in details[0][0]["segments"][0]
    page = write_report(tmp_path / "outputs.json", tmp_path / "page.html", tokenizer=byte_tokenizer())
    overview, details = parts_of(page)
    assert overview["notes"] == []
    assert [segment["lengths"] for segment in details[0][0]["segments"]] == [s.lengths for s in outputs[0].segments]
    assert "".join(s["texts"][s["chosen"]] for s in details[0][0]["segments"]) == outputs[0].text


def test_without_texts_it_says_how_to_have_them(run, tmp_path):
    rows = [json.loads(line) for line in (run / RESULTS).read_text().splitlines()]
    for row in rows:
        for segment in row["segments"]:
            segment["tokens"] = None
            del segment["texts"]
    overview, _ = parts_of(write_report(write_rows(tmp_path / "bare", rows, []), tmp_path / "page.html"))
    assert overview["notes"] == [
        "The attempts' texts were not kept. A run with --set trace=full keeps them, and they are shown here."
    ]
    assert "Sampled tokens" not in {card["label"] for card in overview["runs"][0]["cards"]}  # there are no costs


def test_figures(run, tmp_path):
    overview, _ = parts_of(write_report(run, tmp_path / "page.html"))
    rows = [json.loads(line) for line in (run / RESULTS).read_text().splitlines()]
    costs = [json.loads(line) for line in (run / COSTS).read_text().splitlines()]
    cards = {card["label"]: card for card in overview["runs"][0]["cards"]}
    total = {name: sum(row["counts"][name] for row in rows) for name in rows[0]["counts"]}
    tokens = sum(len(row["token_ids"]) for row in rows)
    assert cards["Mean reward"]["value"] == f"{sum(row['reward'] for row in rows) / len(rows):.3f}"
    assert cards["Accepted"]["value"] == f"{total['accepted'] / total['attempts']:.1%}"
    assert cards["Tokens per rejection"]["value"] == f"{total['rejected'] / total['rejections']:,.1f}"
    assert cards["Sampled tokens"]["value"] == f"{sum(cost['counts']['sampled'] for cost in costs):,}"
    assert cards["Tokens a second"]["value"] == f"{tokens / sum(cost['elapsed'] for cost in costs):,.1f}"
    assert overview["runs"][0]["phases"]["commit"] == pytest.approx(0.2)
    assert len(overview["runs"][0]["calibration"]) == 64


def test_seconds_of_a_run_that_was_stopped(run, tmp_path):
    """Of all its starts; nothing where that is not known."""
    rows = [json.loads(line) for line in (run / RESULTS).read_text().splitlines()]
    costs = [json.loads(line) for line in (run / COSTS).read_text().splitlines()]
    when = [{**cost, "elapsed": elapsed} for cost, elapsed in zip(costs, [5.0, 2.0, 0.5] * 4, strict=True)]
    (found,) = read_runs(write_rows(tmp_path / "stopped", rows, [{**when[0], "elapsed": 99.0}, *when]))
    assert found.seconds == 30.0  # a prompt that was answered twice counts once
    for cost in costs:
        del cost["elapsed"]
    (found,) = read_runs(write_rows(tmp_path / "before", rows, costs))
    assert found.seconds is None


def test_a_run_that_is_at_work(run, tmp_path):
    for name in (RESULTS, COSTS, MANIFEST):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    lines = (run / RESULTS).read_bytes().splitlines(keepends=True)
    (tmp_path / RESULTS).write_bytes(b"".join(lines[:5]) + lines[5][:100])
    overview, details = parts_of(write_report(tmp_path, tmp_path / "page.html"))
    assert len(overview["rows"]) == len(details) == 5
    assert overview["runs"][0]["cards"][0] == {"label": "Answers", "value": "5", "note": "7 left"}
    (tmp_path / RESULTS).write_bytes(b"")
    overview, details = parts_of(write_report(tmp_path, tmp_path / "page.html"))
    assert overview["rows"] == details == [] and overview["runs"][0]["cards"][0]["note"] == "12 left"


def test_numbers_that_are_none(run, tmp_path):
    rows = [json.loads(line) for line in (run / RESULTS).read_text().splitlines()]
    rows[0]["reward"] = rows[0]["prompt_reward"] = "nan"
    rows[1]["reward"] = rows[1]["segments"][-1]["rewards"][-1] = "-inf"
    rows[2]["segments"][0]["thresholds"][0] = "inf"
    folder = write_rows(tmp_path / "nan", rows, [])
    page = write_report(folder, tmp_path / "page.html")
    overview, details = parts_of(page)
    assert [row["sides"][0]["reward"] for row in overview["rows"][:2]] == ["nan", "-inf"]
    assert details[1][0]["segments"][-1]["rewards"][-1] == "-inf"
    assert details[2][0]["segments"][0]["thresholds"][0] == "inf"
    card = overview["runs"][0]["cards"][1]
    assert card["value"] == "\u2212∞" and card["note"].endswith(", of 11 answers")
    assert "NaN" not in page.read_text().split('id="overview"')[1].split("<script>")[0]


def test_two_runs_and_ids_that_look_alike(tmp_path):
    first, second = write_run(tmp_path / "a" / "run", 4), write_run(tmp_path / "b" / "run", 4, seed=1)
    for folder, ids in ((first, [1, "1", "a/b", "x"]), (second, ["1", 1, "y", "é\ud800"])):
        rows = [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]
        write_rows(folder, [{**row, "custom_id": row_id} for row, row_id in zip(rows, ids, strict=True)], [])
    overview, details = parts_of(write_report(first, tmp_path / "page.html", second))
    assert overview["names"] == ["run (1)", "run (2)"]
    assert [row["id"] for row in overview["rows"]] == [1, "1", "a/b", "x", "y", "é\ud800"]
    assert [row["key"] for row in overview["rows"]] == ["1", "1~2", "a%2Fb", "x", "y", "%C3%A9%ED%A0%80"]
    there = [[side is not None for side in row["sides"]] for row in overview["rows"]]
    assert there == [[True, True]] * 2 + [[True, False]] * 2 + [[False, True]] * 2
    assert there == [[trace is not None for trace in line] for line in details]
    assert overview["rows"][0]["sides"][1]["prompt"] != overview["rows"][0]["prompt"]  # it is said that they differ


def test_a_folder_of_a_comparison(tmp_path):
    rewards = {}
    for i, name in enumerate(("stars", "plain", "best")):
        folder = write_run(tmp_path / "rules" / name, 3, seed=i)
        rewards[name] = sum(json.loads(line)["reward"] for line in (folder / "results.jsonl").read_text().splitlines())
    overview, _ = parts_of(write_report(tmp_path, tmp_path / "page.html"))
    assert overview["names"] == [max(("stars", "best"), key=rewards.__getitem__), "plain"]
    assert "Two of 3 rules are shown (best, plain, stars)" in overview["notes"][0]
    with pytest.raises(ValueError, match=r"has several runs, expected one beside another: as .*rules/NAME"):
        write_report(tmp_path, tmp_path / "page.html", tmp_path / "rules" / "stars")


def test_a_cap_leaves_out_rejected_texts_first(tmp_path):
    folder, target = write_run(tmp_path / "full", 12, full=True), tmp_path / "page.html"
    whole = write_report(folder, target).stat().st_size / 1e6
    for share, expected in ((0.8, ["all", "some"]), (0.42, ["some", "none"])):
        page = write_report(folder, target, max_mb=share * whole)
        assert 0.9 * share * whole < page.stat().st_size / 1e6 <= share * whole
        overview, details = parts_of(page)
        assert f"To keep this page below {share * whole:.3g} MB, the texts of rejected" in overview["notes"][-1]
        found = [trace and [text for segment in trace["segments"] for text in segment["texts"]] for (trace,) in details]
        texts = ["none" if one is None else "some" if None in one else "all" for one in found]
        assert texts == sorted(texts, key=("all", "some", "none").index) and [*dict.fromkeys(texts)] == expected
        for row, (trace,) in zip(overview["rows"], details, strict=True):
            taken = trace and "".join(segment["texts"][segment["chosen"]] for segment in trace["segments"])
            assert taken in (None, row["sides"][0]["text"])
        last = re.search(r"from prompt (\d+) of 12 on", overview["notes"][-1])
        assert texts.index(expected[1]) + 1 == int(last[1])
    with pytest.raises(ValueError, match=r"without any attempts the page has 0\.\d+ MB, expected at most 0.02: raise"):
        write_report(folder, tmp_path / "small.html", max_mb=0.02)
    assert not (tmp_path / "small.html").exists()
    with pytest.raises(ValueError, match="max_mb is nan, expected a number > 0"):
        write_report(folder, tmp_path / "small.html", max_mb=math.nan)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("missing", None, "does not exist, expected a folder of `stars run`"),
        ("list.json", "[1]", "list.json, output 1, has int, expected a folder"),
        ("other.json", '{"a": 1}', "output 1, has the keys a, expected"),
        ("empty.jsonl", "\n", "has no outputs, expected one at least"),
        ("torn.jsonl", '{"a": 1}\n{"b', "is neither JSON nor JSON lines"),
        ("binary.json", b"\xff\xfe\x00", "is not UTF-8"),
        ("deep.json", "[" * 100_000, "is neither JSON nor JSON lines"),
    ],
)
def test_what_is_no_run_is_told(tmp_path, name, text, why):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(why)):
        write_report(tmp_path / name, tmp_path / "page.html")


def test_a_folder_that_is_no_run_is_told(run, tmp_path):
    with pytest.raises(ValueError, match=r"has neither results\.jsonl nor rules/\*/results\.jsonl, expected a folder"):
        write_report(tmp_path, tmp_path / "page.html")
    (tmp_path / RESULTS).write_bytes((run / RESULTS).read_bytes())
    with pytest.raises(ValueError, match=r"has results\.jsonl but no manifest\.json, expected both"):
        write_report(tmp_path, tmp_path / "page.html")
    (tmp_path / MANIFEST).write_bytes((run / MANIFEST).read_bytes())
    for line in ("{", "[1]", "{}"):
        (tmp_path / RESULTS).write_text(line + "\n")
        with pytest.raises(ValueError, match="has a line that is no row of a run"):
            write_report(tmp_path, tmp_path / "page.html")


def test_the_example_has_the_form_of_a_run(runs, run):
    """Else the other tests would test nothing."""

    def forms(folder):
        for name in (RESULTS, COSTS):
            yield {key: type(value) for key, value in json.loads((folder / name).read_text().splitlines()[0]).items()}
        yield {key for key in json.loads((folder / MANIFEST).read_text())}

    for made_up, real in zip(forms(run), forms(runs / "stars"), strict=True):
        ids = {"custom_id": str} if isinstance(real, dict) else {}
        assert made_up == ({**real, **ids} if ids else real)


def test_to_script_is_json_that_ends_no_script():
    data = {"</script>": ["<!--", "\u2028\u202e\ud800\0", "é 漢 😀", math.pi]}
    written = to_script(data)
    assert json.loads(written) == data and "<" not in written and "\n" not in written and "é 漢 😀" in written
    written.encode()


def test_the_same_run_gives_the_same_page(run, tmp_path):
    first, second = (write_report(run, tmp_path / f"{i}.html").read_bytes() for i in range(2))
    assert first == second
