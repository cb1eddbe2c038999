"""A comparison's figures are those of the answers in its folder, whatever stopped it on the way."""

import csv
import dataclasses
import json
import os
import random
import signal
import time

import numpy as np
import pytest

from stars_kernels import BestOf, Calibration, Cards, Engine, Plain
from stars_kernels.data import journal as journal_module
from stars_kernels.data.run import COSTS, RESULTS, read_results
from stars_kernels.evaluation import FunctionJudge, JudgeError, RewardJudge, compare
from stars_kernels.evaluation.judges import key_of
from stars_kernels.evaluation.tables import OF_TIME
from tests.evaluation.conftest import SET
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

KILLS = int(os.environ.get("STARS_KILLS", "3"))
"""How often a comparison is killed here; more for those who doubt."""


def later(prompts, firsts, seconds):
    """Prefer the answer that stands later in the alphabet."""
    return [(first > second) - (first < second) for first, second in zip(firsts, seconds, strict=True)]


def always_first(prompts, firsts, seconds):
    return ["first"] * len(prompts)


def answers(folder, rule):
    return {row["custom_id"]: row for row in read_results(folder / "rules" / rule) if "error" not in row}


def written(folder, timed=False):
    """All that a comparison wrote, but for what depends on time."""
    names = ["verdicts.jsonl", *(f"rules/{path.name}/{RESULTS}" for path in sorted((folder / "rules").iterdir()))]
    found = {name: (folder / name).read_bytes() for name in names}
    rows = list(csv.DictReader((folder / "comparison.csv").read_text().splitlines()))
    found["comparison.csv"] = [{name: row[name] for name in row if timed or name not in OF_TIME} for row in rows]
    return found


@pytest.fixture(scope="module")
def done(engine, tmp_path_factory):
    """A comparison that nothing stopped, judged by `later`: the prompts' file, the folder, what compare returned."""
    folder = tmp_path_factory.mktemp("done")
    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"prompt {i}" if i != 3 else "", "custom_id": f"p{i}"}) for i in range(12)]
    prompts.write_text("\n".join([*lines, "no row"]))
    rules = {"stars": {}, "best-of-3": {"rule": BestOf(3)}}
    return prompts, folder / "out", compare(engine, prompts, folder / "out", rules, judge=FunctionJudge(later))


def test_figures_are_those_of_the_answers(done):
    _, folder, found = done
    assert (found.prompts, found.errors, found.left) == (13, 6, 0)
    plain = answers(folder, "plain")
    assert [one.rule for one in found.figures] == ["plain", "stars", "best-of-3"] and len(plain) == 11
    for one in found.figures:
        own = answers(folder, one.rule)
        assert (one.answers, one.errors, one.paired, one.left_out) == (11, 2, 11, 2)
        assert one.reward.mean == pytest.approx(np.mean([row["reward"] for row in own.values()]))
        assert one.length == pytest.approx(np.mean([len(row["token_ids"]) for row in own.values()]))
        costs = [json.loads(line) for line in (folder / "rules" / one.rule / COSTS).read_text().splitlines()]
        assert one.sampled == pytest.approx(np.mean([cost["counts"]["sampled"] for cost in costs]))
        assert one.seconds == pytest.approx(np.mean([cost["elapsed"] for cost in costs])) and one.seconds > 0
        rejections = sum(row["counts"]["rejections"] for row in own.values())
        if one.rule == "plain":
            assert one.gain is None and one.against_plain is None and one.waste_per_rejection is None
            continue
        assert one.waste_per_rejection == sum(row["counts"]["rejected"] for row in own.values()) / rejections
        gains = [own[i]["reward"] - plain[i]["reward"] for i in plain]
        assert one.gain.mean == pytest.approx(np.mean(gains)) and one.gain.low <= one.gain.mean <= one.gain.high
        texts = [(own[i]["text"], plain[i]["text"]) for i in plain]
        assert one.against_plain.wins == sum(a > b for a, b in texts) and one.against_plain.losses == sum(
            a < b for a, b in texts
        )
        assert one.against_plain.ties == sum(a == b for a, b in texts) and one.against_plain.flip_rate == 0
        assert one.against_plain.win_rate.mean == pytest.approx(
            (one.against_plain.wins + one.against_plain.ties / 2) / 11
        )
    stars, best = found.figures[1:]
    assert 0 < stars.acceptance_rate <= 1 and best.acceptance_rate is None and best.gain.mean > 0


def test_what_is_written(done):
    _, folder, found = done
    names = {path.name for path in folder.iterdir()} - {".lock", "rules"}
    tables = {f"comparison.{kind}" for kind in ("md", "csv", "json")}
    assert names == {"calibration.json", "verdicts.jsonl", "reward_tokens.svg", "reward_seconds.svg", *tables}
    data = json.loads((folder / "comparison.json").read_text())
    assert data["version"] == 1 and data["judge"].startswith("function tests.evaluation.test_compare:later (")
    assert data["rules"]["stars"]["figures"]["gain"]["mean"] == found.figures[1].gain.mean
    known = json.loads((folder / "calibration.json").read_text())
    stars = json.loads((folder / "rules" / "stars" / "manifest.json").read_text())
    assert stars["config"]["reward_threshold"] == known["reward_threshold"] == data["calibration"]["reward_threshold"]
    assert stars["calibration"] == {name: value for name, value in known.items()}
    assert len(data["pairs"]) == 22 and {pair["result"] for pair in data["pairs"]} <= {"win", "tie", "loss"}
    text = (folder / "comparison.md").read_text()
    assert "95% percentile bootstrap over prompts, 10,000 resamples" in text and "| stars |" in text
    assert max(map(len, (line for line in text.splitlines() if line[:1] not in "|-"))) <= 120
    picture = (folder / "reward_tokens.svg").read_text()
    assert all(f">{name}<" in picture for name in ("plain", "stars", "best-of-3")) and "<dc:date>" not in picture


def test_the_same_folder_gives_the_same_bytes_and_asks_nothing(engine, done, monkeypatch):
    prompts, folder, found = done
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    monkeypatch.setattr(engine, "decode", None)
    monkeypatch.setattr(engine, "calibrate", None)
    judge = FunctionJudge(later)
    judge.function = None
    again = compare(engine, prompts, folder, {"stars": {}, "best-of-3": {"rule": BestOf(3)}}, judge=judge)
    assert again == found
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before


@pytest.mark.usefixtures("no_pictures")
def test_rules_and_prompts_may_be_added(engine, prompts, rules, tmp_path):
    first = compare(engine, prompts, tmp_path / "out", {"stars": {}}, judge=FunctionJudge(later), limit=3)
    assert (first.prompts, first.left, first.figures[1].answers) == (3, 0, 3)
    compare(engine, prompts, tmp_path / "out", rules, judge=FunctionJudge(later), limit=5)
    found = compare(engine, prompts, tmp_path / "out", rules, judge=FunctionJudge(later))
    whole = compare(engine, prompts, tmp_path / "whole", rules, judge=FunctionJudge(later))
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    few = compare(engine, prompts, tmp_path / "out", rules, judge=FunctionJudge(later), limit=2)
    assert few.prompts == 2 and few.figures == found.figures and whole.figures[0].answers == 7


@pytest.mark.usefixtures("no_pictures")
def test_a_judge_that_likes_a_place_gets_ties_alone(engine, prompts, rules, tmp_path):
    found = compare(engine, prompts, tmp_path / "out", rules, judge=FunctionJudge(always_first))
    for one in found.figures[1:]:
        texts = [answers(tmp_path / "out", rule) for rule in ("plain", one.rule)]
        equal = sum(texts[0][i]["text"] == texts[1][i]["text"] for i in texts[0])
        assert (
            one.against_plain.wins,
            one.against_plain.ties,
            one.against_plain.losses,
            one.against_plain.flip_rate,
        ) == (0, 7, 0, 1.0) and equal < 7
        assert one.against_plain.win_rate.mean == 0.5


@pytest.mark.usefixtures("no_pictures")
def test_a_reward_model_judges(engine, prompts, rules, tmp_path):
    with Engine(
        engine.models.lm, tiny_reward_model(seed=5), tokenizer=byte_tokenizer(), prefix_cache=0, **SET
    ) as other:
        found = compare(engine, prompts, tmp_path / "out", rules, judge=RewardJudge(other))
        plain = answers(tmp_path / "out", "plain")
        ids = list(plain)
        texts = [f"prompt {i[1:]}" for i in ids]
        for one in found.figures[1:]:
            own = answers(tmp_path / "out", one.rule)
            scores = [other.score(texts, [rows[i]["token_ids"] for i in ids]) for rows in (plain, own)]
            assert (
                one.against_plain.wins == sum(b > a for a, b in zip(*scores, strict=True))
                and one.against_plain.flip_rate is None
            )
            assert one.against_plain.losses == sum(b < a for a, b in zip(*scores, strict=True))
    keys = [json.loads(line)["custom_id"] for line in (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys))
    own = compare(engine, prompts, tmp_path / "own", rules, judge=RewardJudge(engine))
    assert (
        own.figures[2].against_plain.losses == 0
    )  # the best of three by this very reward, among them plain sampling's
    assert "are no evidence of their own" in " ".join((tmp_path / "own" / "comparison.md").read_text().split())


@pytest.mark.usefixtures("no_pictures")
def test_what_a_reward_model_cannot_score_is_an_error(engine, prompts, rules, tmp_path):
    away = True

    def reward(prompts, answers):
        if away and any("prompt 5" in prompt for prompt in prompts):
            raise OSError("away")
        return [float(len(answer)) for answer in answers]

    with Engine(engine.models.lm, reward, tokenizer=byte_tokenizer(), prefix_cache=0, **SET) as other:
        found = compare(engine, prompts, tmp_path / "out", rules, judge=RewardJudge(other))
        assert [one.against_plain.failed for one in found.figures[1:]] == [1, 1] and found.errors == 3 + 2
        away = False
        assert compare(engine, prompts, tmp_path / "out", rules, judge=RewardJudge(other)).errors == 5
        assert compare(engine, prompts, tmp_path / "out", rules, judge=RewardJudge(other), retry=True).errors == 3


@pytest.mark.usefixtures("no_pictures")
def test_calibration_is_made_once_for_all(engine, prompts, tmp_path, monkeypatch):
    calls, calibrate = [], engine.calibrate
    monkeypatch.setattr(engine, "calibrate", lambda *args, **kwargs: calls.append(1) or calibrate(*args, **kwargs))
    rules = {
        "stars": {}, "cards": {"rule": Cards()}, "own": {"reward_threshold": 0.5, "beta": 2.0},
        "half": {"calibration_quantile": 0.5}, "hard": {"accept": "hard"},
    }  # fmt: skip
    compare(engine, prompts, tmp_path / "out", rules, limit=2)
    assert len(calls) == 1
    config = {
        name: json.loads((tmp_path / "out/rules" / name / "manifest.json").read_text())["config"] for name in rules
    }
    known = json.loads((tmp_path / "out" / "calibration.json").read_text())
    target = (known["reward_threshold"], known["beta"])
    assert (config["stars"]["reward_threshold"], config["stars"]["beta"]) == target
    cards = config["cards"]["rule"]["settings"]
    assert (cards["reward_threshold"], cards["beta"]) == target and config["own"]["reward_threshold"] == 0.5
    assert config["half"]["reward_threshold"] == pytest.approx(np.quantile(known["rewards"], 0.5))
    assert config["hard"]["reward_threshold"] == target[0]
    given = dataclasses.replace(Calibration.from_dict(known), reward_threshold=7.0, beta=3.0)
    found = compare(engine, prompts, tmp_path / "given", rules, limit=1, calibration=given)
    used = json.loads((found.folder / "comparison.json").read_text())["rules"]
    assert used["stars"]["settings"]["reward_threshold"] == 7.0 and used["stars"]["settings"]["beta"] == 3.0
    assert used["half"]["settings"]["reward_threshold"] == config["half"]["reward_threshold"]
    with pytest.raises(ValueError, match=r"calibration\.json is another calibration than the one given"):
        compare(engine, prompts, tmp_path / "given", rules, limit=1, calibration=Calibration.from_dict(known))
    compare(engine, prompts, tmp_path / "given", rules, limit=1)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ({"plain": {"rule": BestOf(2)}}, r"the rule 'plain' is BestOf\(n=2\), expected plain sampling"),
        ({"../x": {}}, r"a rule's name is '../x', expected letters"),
        ({"x": {"beta": -1}}, "rule 'x': beta is -1, expected a finite number > 0"),
        ({"x": {"betta": 1}}, "rule 'x': unknown setting 'betta'; did you mean 'beta'"),
        ({"x": {"rule": Plain(), "beta": 1.0}}, "rule 'x': beta is given beside rule"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_is_written(engine, prompts, tmp_path, rules, why):
    with pytest.raises((ValueError, TypeError), match=why):
        compare(engine, prompts, tmp_path / "out", rules)
    assert not (tmp_path / "out").exists()


def test_an_engine_that_remembers_prompts_is_refused(engine, prompts, tmp_path):
    with Engine(engine.models.lm, tiny_reward_model(), tokenizer=byte_tokenizer(), **SET) as other:
        with pytest.raises(ValueError, match="the engine has prefix_cache=4096, expected 0"):
            compare(other, prompts, tmp_path / "out", {})


@pytest.mark.usefixtures("no_pictures")
def test_a_changed_rule_is_refused_by_name_and_other_models_too(engine, prompts, tmp_path):
    compare(engine, prompts, tmp_path / "out", {"x": {"rule": BestOf(2)}, "stars": {}}, limit=2)
    with pytest.raises(ValueError, match=r"rules/x holds another run(?s:.)*setting rule is"):
        compare(engine, prompts, tmp_path / "out", {"x": {"rule": BestOf(3)}}, limit=2)
    with Engine(
        tiny_language_model(seed=9), tiny_reward_model(), tokenizer=byte_tokenizer(), prefix_cache=0, **SET
    ) as other:
        with pytest.raises(ValueError, match="the calibration was made with the language model"):
            compare(other, prompts, tmp_path / "out", {"stars": {}}, limit=2)
    found = compare(engine, prompts, tmp_path / "out", {"x": {"rule": BestOf(3)}}, limit=2, overwrite=True)
    assert found.figures[1].judged == 24


@pytest.mark.usefixtures("no_pictures")
def test_a_judge_that_breaks_keeps_what_it_said(engine, prompts, rules, tmp_path):
    calls = []

    def breaks(texts, firsts, seconds):
        calls.append(len(texts))
        if len(calls) == 3:
            raise OSError("away")
        return later(texts, firsts, seconds)

    with pytest.raises(JudgeError, match=r"breaks.* raised OSError: away"):
        compare(engine, prompts, tmp_path / "out", rules, judge=FunctionJudge(breaks, "breaks", at_once=2))
    assert len((tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()) == 4
    compare(engine, prompts, tmp_path / "out", rules, judge=FunctionJudge(breaks, "breaks", at_once=2))
    verdicts = len((tmp_path / "out" / "verdicts.jsonl").read_text().splitlines())
    assert sum(calls) - 2 == verdicts  # but for the call that failed


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda p, a, b: ["A"] * len(p), "gave 'A', expected one of"),
        (lambda p, a, b: [float("nan")] * len(p), "gave nan, expected"),
        (lambda p, a, b: [True] * len(p), "gave True, expected"),
        (lambda p, a, b: [], r"gave 0 verdicts on \d+ pairs"),
    ],
)
def test_a_verdict_that_is_none_is_refused(engine, prompts, tmp_path, function, why):
    with pytest.raises(JudgeError, match=why):
        compare(
            engine, prompts, tmp_path / "out", {"b": {"rule": BestOf(3)}}, judge=FunctionJudge(function, "f"), limit=3
        )


@pytest.mark.usefixtures("no_pictures")
def test_overwritten_rules_are_not_judged_anew(engine, prompts, rules, tmp_path):
    compare(engine, prompts, tmp_path / "out", rules, judge=FunctionJudge(later))
    before, asked = written(tmp_path / "out"), []
    judge = FunctionJudge(later)
    judge.function = lambda *texts: asked.extend(texts[0]) or later(*texts)
    compare(engine, prompts, tmp_path / "out", rules, judge=judge, overwrite=True)
    assert written(tmp_path / "out") == before and not asked


def logging_judge(log):
    """`later`, which notes in a file what it is asked, and takes its time."""

    def ask(prompts, firsts, seconds):
        time.sleep(0.004)
        with open(log, "a") as file:
            for prompt, first, second in zip(prompts, firsts, seconds, strict=True):
                file.write(key_of(judge.identity, prompt, [first, second]) + "\n")
        return later(prompts, firsts, seconds)

    judge = FunctionJudge(ask, "ask", at_once=1)
    return judge


@pytest.mark.usefixtures("no_pictures")
def test_kill_9(engine, prompts, rules, tmp_path):
    """At random moments of decoding and judging: the end is the same, and nothing that was kept is asked again."""
    log, rng, kills, cases = tmp_path / "log", random.Random(2), 0, 0
    judge = logging_judge(log)
    began = time.monotonic()
    compare(engine, prompts, tmp_path / "whole", rules, judge=judge)
    seconds, questions = time.monotonic() - began, len(log.read_text().splitlines())
    assert questions == len((tmp_path / "whole" / "verdicts.jsonl").read_text().splitlines()) > 10
    while kills < KILLS:
        log.unlink()
        folder, finished, seen, kept, here = tmp_path / f"out{cases}", False, 0, set(), 0
        while not finished:
            child = os.fork()  # a process of its own, without the seconds of importing
            if not child:
                try:
                    compare(engine, prompts, folder, rules, judge=judge)
                    os._exit(0)
                finally:
                    os._exit(1)
            if kills < KILLS:
                time.sleep(seconds * rng.random() / (1 + here))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            finished = status == 0
            assert finished or (os.WIFSIGNALED(status) and kills < KILLS), status
            kills, here = kills + (not finished), here + 1
            asked = log.read_text().splitlines()[seen:] if log.exists() else []
            assert not kept & set(asked) and len(asked) == len(set(asked))
            seen += len(asked)
            kept = kept_in(folder / "verdicts.jsonl")
            assert set(asked[:-1]) <= kept  # of its questions, the last one's verdict alone may be lost
        assert questions <= seen < questions + here and written(folder) == written(tmp_path / "whole")
        cases += 1
    print(f"{kills} kills in {cases} comparisons")


def kept_in(path):
    """The keys of the whole rows."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return {json.loads(line)["custom_id"] for line in lines if line.endswith(b"\n")}


@pytest.mark.usefixtures("no_pictures")
def test_a_full_disk(engine, prompts, rules, tmp_path, monkeypatch):
    from tests.data.test_journal import Full

    compare(engine, prompts, tmp_path / "whole", rules, judge=FunctionJudge(later))
    rows = (tmp_path / "whole" / "verdicts.jsonl").stat().st_size
    runs = sum(path.stat().st_size for path in (tmp_path / "whole").glob("rules/*/*.jsonl"))
    for where, room in (("results", runs // 2), ("verdicts", runs + rows // 2)):
        folder = tmp_path / where
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device") as raised:
            patch.setattr(journal_module, "FileIO", Full)
            Full.room = room
            compare(engine, prompts, folder, rules, judge=FunctionJudge(later))
        assert raised.value.filename.endswith(".jsonl")
        assert ("verdicts" in raised.value.filename) == (where == "verdicts")
        for path in folder.rglob("*.jsonl"):
            assert all(json.loads(line) for line in path.read_text().splitlines())
        compare(engine, prompts, folder, rules, judge=FunctionJudge(later))
        assert written(folder) == written(tmp_path / "whole")


def test_a_full_disk_leaves_the_tables_as_they_were(engine, done, monkeypatch):
    prompts, folder, _ = done
    before = (folder / "comparison.json").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal_module.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*out"):
        compare(engine, prompts, folder, {"stars": {}, "best-of-3": {"rule": BestOf(3)}}, judge=FunctionJudge(later))
    assert (folder / "comparison.json").read_bytes() == before and not list(folder.rglob("*.new"))


@pytest.mark.usefixtures("no_pictures")
def test_one_process_at_a_time(engine, prompts, tmp_path):
    def again(text):
        with pytest.raises(ValueError, match=r"another process is at work in .*out, expected none"):
            compare(engine, prompts, tmp_path / "out", {}, limit=1)
        told.append(text)

    told = []
    compare(engine, prompts, tmp_path / "out", {}, limit=1, tell=again)
    assert told == ["rule 1 of 1: plain"]


def test_judges_by_name():
    judge = FunctionJudge.named("tests.evaluation.test_compare:always_first")
    assert judge.identity.startswith("function tests.evaluation.test_compare:always_first (")
    for wrong in ("json", "json:nothing", "nothing:here"):
        with pytest.raises(ValueError, match=f"the judge's function is '{wrong}', expected module:function"):
            FunctionJudge.named(wrong)
    with pytest.raises(ValueError, match=r"the judge is .*<lambda>, which is not at the top of a module: expected na"):
        FunctionJudge(lambda p, a, b: [0.0])
    with pytest.raises(ValueError, match="at-once is 0, expected 1 or more"):
        FunctionJudge(later, at_once=0)
