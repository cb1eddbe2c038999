"""A run survives what ends it: the same call again gives what an uninterrupted one would have given."""

import json
import os
import random
import signal
import time

import pytest

from stars_kernels import BestOf, Engine
from stars_kernels.data import journal as journal_module
from stars_kernels.data import read_prompts, run_file
from stars_kernels.data.manifest import SPEED_SETTINGS
from stars_kernels.data.run import COSTS, MANIFEST, RESULTS, read_results
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

KILLS = int(os.environ.get("STARS_KILLS", "3"))
"""How often a run is killed here; more for those who doubt."""
SET = dict(max_new_tokens=8, segment_size=4, max_attempts=3, progress=False)
TEXTS = ["one", "two", "three", "", "five" * 60, "six", "seven"]  # the fourth has no tokens, the fifth too many


@pytest.fixture(scope="module")
def engine():
    with Engine(tiny_language_model(), tiny_reward_model(), tokenizer=byte_tokenizer(), **SET) as engine:
        yield engine


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": text, "custom_id": f"p{i}"}) for i, text in enumerate(TEXTS)]
    path.write_text("\n".join([*lines[:2], "not a row", *lines[2:]]) + "\n")
    return path


def told(folder):
    return (folder / RESULTS).read_bytes(), json.loads((folder / MANIFEST).read_text())


def test_answers_are_those_of_decode(engine, prompts, tmp_path):
    summary = run_file(engine, prompts, tmp_path / "out", seed=3)
    assert (summary.prompts, summary.answers, summary.errors) == (8, 5, 3)
    rows = {row["custom_id"]: row for row in read_results(tmp_path / "out")}
    assert list(rows) == ["p0", "p1", 3, "p2", "p3", "p4", "p5", "p6"]  # the file's order
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    target = {name: manifest["config"][name] for name in ("reward_threshold", "beta")}
    assert manifest["calibration"]["reward_threshold"] == target["reward_threshold"] and manifest["config"]["seed"] == 3
    for i, text in enumerate(TEXTS):
        row = rows[f"p{i}"]
        if i in (3, 4):
            assert list(row) == ["custom_id", "error"] and ("no tokens" in row["error"] or "context" in row["error"])
            continue
        alone = engine.decode(text, request_ids=f"p{i}", seed=3, **target)
        assert (row["text"], row["token_ids"], row["reward"]) == (alone.text, alone.token_ids, alone.reward)
        assert [s["rewards"] for s in row["segments"]] == [s.rewards for s in alone.segments]
    assert "line 3" in rows[3]["error"]
    costs = [json.loads(line) for line in (tmp_path / "out" / COSTS).read_text().splitlines()]
    assert {cost["custom_id"] for cost in costs} == {"p0", "p1", "p2", "p5", "p6"} and costs[0]["counts"]["sampled"] > 0


def test_a_full_trace_has_the_texts_of_all_attempts(engine, prompts, tmp_path):
    run_file(engine, prompts, tmp_path / "whole", seed=3, trace="full", reward_threshold=9.0, beta=0.1)
    rows = [row for row in read_results(tmp_path / "whole") if "error" not in row]
    assert [row["prompt"] for row in rows] == ["one", "two", "three", "six", "seven"]
    for row in rows:
        assert "".join(segment["texts"][segment["chosen"]] for segment in row["segments"]) == row["text"]
        assert all(len(part["texts"]) == len(part["tokens"]) == len(part["rewards"]) for part in row["segments"])
    run_file(engine, prompts, tmp_path / "by turns", seed=3, trace="full", reward_threshold=9.0, beta=0.1, limit=2)
    run_file(engine, prompts, tmp_path / "by turns", seed=3, trace="full", reward_threshold=9.0, beta=0.1, width=1)
    assert (tmp_path / "by turns" / RESULTS).read_bytes() == (tmp_path / "whole" / RESULTS).read_bytes()


def fixed(manifest):
    """What is the same in every such run."""
    config = {name: value for name, value in manifest["config"].items() if name not in SPEED_SETTINGS}
    return {**manifest, "config": config, "calibration": {**manifest["calibration"], "seconds": 0, "rm_scored": 0}}


class Killed(BaseException):
    """What stops the process: nothing catches it."""


class Mortal(journal_module.FileIO):
    """A file whose process is killed after so many bytes more, of all files together."""

    life = 0

    def write(self, data):
        taken = min(len(data), Mortal.life)
        Mortal.life -= taken
        super().write(bytes(data[:taken]))
        if taken < len(data):
            raise Killed
        return taken


def test_killed_at_any_byte_it_ends_with_the_same_files(engine, prompts, tmp_path, monkeypatch):
    run_file(engine, prompts, tmp_path / "whole", seed=3)
    expected = told(tmp_path / "whole")
    size = sum((tmp_path / "whole" / name).stat().st_size for name in (RESULTS, COSTS))
    monkeypatch.setattr(journal_module, "FileIO", Mortal)
    rng, deaths = random.Random(0), 0
    for case in range(8):
        folder = tmp_path / f"killed{case}"
        while True:
            Mortal.life = rng.randint(0, size // 2)
            try:
                run_file(engine, prompts, folder, seed=3, batch_size=rng.choice([1, 3, "auto"]))
                break
            except Killed:
                deaths += 1
        assert told(folder)[0] == expected[0] and fixed(told(folder)[1]) == fixed(expected[1])
        costs = [json.loads(line) for line in (folder / COSTS).read_text().splitlines()]
        assert {cost["custom_id"] for cost in costs} == {"p0", "p1", "p2", "p5", "p6"}
    assert deaths > 8


def test_kill_9(engine, tmp_path):
    """At random moments: the end is the same."""
    prompts, folder = tmp_path / "many.txt", tmp_path / "out"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(60)))
    target = dict(seed=3, reward_threshold=1.0, beta=1.0)
    run_file(engine, prompts, tmp_path / "whole", **target)
    rng, kills, finished = random.Random(1), 0, False
    while not finished:
        before, child = rows_in(folder), os.fork()  # a process of its own, without the seconds of importing
        if not child:
            try:
                run_file(engine, prompts, folder, batch_size=1, **target)
                os._exit(0)
            finally:
                os._exit(1)
        if kills < KILLS:
            wanted, end = before + rng.randint(0, 60 // KILLS - 1), time.monotonic() + 60
            while rows_in(folder) < wanted and time.monotonic() < end:
                time.sleep(rng.random() / 50)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        finished = status == 0
        assert finished or (os.WIFSIGNALED(status) and kills < KILLS), status
        kills += not finished
    assert kills == KILLS and (folder / RESULTS).read_bytes() == (tmp_path / "whole" / RESULTS).read_bytes()


def rows_in(folder):
    """How many whole rows there are."""
    return (folder / RESULTS).read_bytes().count(b"\n") if (folder / RESULTS).exists() else 0


def test_a_finished_run_decodes_nothing_more(engine, prompts, tmp_path, monkeypatch):
    run_file(engine, prompts, tmp_path / "out", seed=3)
    before = told(tmp_path / "out")
    monkeypatch.setattr(engine, "calibrate", None)
    summary = run_file(engine, prompts, tmp_path / "out", seed=3)
    assert told(tmp_path / "out") == before and (summary.answers, summary.errors, summary.tokens) == (5, 3, 0)


def test_without_a_seed_it_goes_on_with_the_one_that_was_drawn(engine, prompts, tmp_path):
    run_file(engine, prompts, tmp_path / "out", limit=2)
    first = told(tmp_path / "out")
    run_file(engine, prompts, tmp_path / "out")
    second = told(tmp_path / "out")
    assert second[0].startswith(first[0]) and second[1]["config"] == first[1]["config"]
    assert len(second[1]["prompts"]) == len(first[1]["prompts"]) == 8
    summary = run_file(engine, prompts, tmp_path / "out", limit=1)
    assert told(tmp_path / "out") == second and (summary.prompts, summary.answers, summary.errors) == (1, 1, 0)


def test_a_limit_does_not_change_what_is_calibrated_on(engine, prompts, tmp_path):
    for limit in (1, 4, None):
        run_file(engine, prompts, tmp_path / "out", seed=3, limit=limit)
    run_file(engine, prompts, tmp_path / "whole", seed=3)
    assert told(tmp_path / "out")[0] == told(tmp_path / "whole")[0]
    for limit in (0, -1, True):
        with pytest.raises(ValueError, match=f"limit is {limit}, expected 1 or more, or None"):
            run_file(engine, prompts, tmp_path / "out", seed=3, limit=limit)


def test_a_calibration_of_other_models_is_refused(engine, prompts, tmp_path):
    with Engine(tiny_language_model(seed=9), tiny_reward_model(), tokenizer=byte_tokenizer(), **SET) as other:
        found = other.calibrate(["one"], calibration_samples=2)
    for settings, why in (({}, "the calibration was made with the language model"), ({"rule": BestOf(2)}, "has no r")):
        with pytest.raises(ValueError, match=why):
            run_file(engine, prompts, tmp_path / "out", calibration=found, **settings)
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(engine, prompts, tmp_path):
    settings = dict(seed=3, reward_threshold=1.0, beta=1.0, limit=1)
    run_file(engine, prompts, tmp_path / "out", **settings)
    for tokenizer in (byte_tokenizer(chat_template="{{ messages[0].content }}"), byte_tokenizer(reverse=True)):
        with Engine(engine.models.lm, tiny_reward_model(), tokenizer=tokenizer, **SET) as other:
            with pytest.raises(ValueError, match=r"models: tokenizer is .*, it was "):
                run_file(other, prompts, tmp_path / "out", **settings)


def test_a_bad_line_may_be_mended(engine, prompts, tmp_path):
    run_file(engine, prompts, tmp_path / "out", seed=3)
    prompts.write_text(prompts.read_text().replace("not a row", '"now it is"'))
    assert run_file(engine, prompts, tmp_path / "out", seed=3).errors == 3
    assert run_file(engine, prompts, tmp_path / "out", seed=3, retry=True).errors == 2


def test_what_is_overwritten_goes_when_the_new_run_begins(engine, prompts, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no calibration today")

    run_file(engine, prompts, tmp_path / "out", seed=3)
    before = told(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no calibration today"):
        patch.setattr(engine, "calibrate", fail)
        run_file(engine, prompts, tmp_path / "out", seed=4, overwrite=True)
    assert told(tmp_path / "out") == before


def test_an_answer_is_kept_before_it_is_told(engine, prompts, tmp_path):
    def tell(event):
        if event.output is not None:
            raise BrokenPipeError

    for count in range(1, 4):
        with pytest.raises(BrokenPipeError):
            run_file(engine, prompts, tmp_path / "out", seed=3, batch_size=1, on_event=tell)
        rows = [row["custom_id"] for row in read_results(tmp_path / "out")]
        assert len(rows) >= count + 1 and len(set(rows)) == len(rows)


def test_another_run_is_refused_and_what_is_different_is_named(engine, prompts, tmp_path):
    run_file(engine, prompts, tmp_path / "out", seed=3)
    before = told(tmp_path / "out")
    for changed, why in (
        (dict(seed=4), "setting seed is 4, it was 3"),
        (dict(seed=3, temperature=0.5), "setting temperature is 0.5, it was 1.0"),
        (dict(seed=3, reward_threshold=9.0), r"setting reward_threshold is 9.0, it was -?\d"),
        (dict(seed=3, rule=BestOf(2)), 'setting rule is {"name": "BestOf"'),
    ):
        with pytest.raises(ValueError, match=r"holds another run; expected .*(?s:.)*" + why.replace("{", r"\{")):
            run_file(engine, prompts, tmp_path / "out", **changed)
    text = prompts.read_text()
    for old, new, why in (("two", "zwei", r'prompt \'p1\' is "'), ('"p1"', '"q1"', "prompt 'p1' is gone, it was")):
        prompts.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=why):
            run_file(engine, prompts, tmp_path / "out", seed=3)
    prompts.write_text(text)
    with Engine(tiny_language_model(seed=9), tiny_reward_model(), tokenizer=byte_tokenizer(), **SET) as other:
        with pytest.raises(
            ValueError, match=r'models: model is "LlamaForCausalLM [0-9a-f]+", it was "LlamaForCausalLM '
        ):
            run_file(other, prompts, tmp_path / "out", seed=3)
    assert told(tmp_path / "out") == before
    run_file(engine, prompts, tmp_path / "out", seed=4, overwrite=True, width=2)
    assert told(tmp_path / "out")[1]["config"]["seed"] == 4
    run_file(engine, prompts, tmp_path / "out", seed=4, width=3, batch_size=2)  # speed alone
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"has results\.jsonl but no manifest\.json"):
        run_file(engine, prompts, tmp_path / "out", seed=4)


def test_one_process_at_a_time(engine, prompts, tmp_path):
    def again(event):
        with pytest.raises(ValueError, match=r"another process is at work in .*out, expected none"):
            run_file(engine, prompts, tmp_path / "out", seed=3, overwrite=True)
        seen.append(event)

    seen = []
    run_file(engine, prompts, tmp_path / "out", seed=3, on_event=again)
    assert seen and run_file(engine, prompts, tmp_path / "out", seed=3).answers == 5


def test_what_failed_may_be_tried_again(prompts, tmp_path):
    broken = True

    def reward(prompts, answers):
        if broken and any("two" in prompt for prompt in prompts):
            raise OSError("the reward server is away")
        return [float(len(answer)) for answer in answers]

    with Engine(tiny_language_model(), reward, tokenizer=byte_tokenizer(), **SET) as engine:
        settings = dict(seed=3, reward_threshold=8.0, beta=1.0)
        assert run_file(engine, prompts, tmp_path / "out", **settings).errors == 4
        assert run_file(engine, prompts, tmp_path / "out", **settings).errors == 4
        broken = False
        assert run_file(engine, prompts, tmp_path / "out", retry=True, **settings).errors == 3
        run_file(engine, prompts, tmp_path / "whole", **settings)
    assert told(tmp_path / "out")[0] == told(tmp_path / "whole")[0]


def test_answers_that_a_clock_cut_are_decoded_anew(engine, prompts, tmp_path):
    settings = dict(seed=3, reward_threshold=1.0, beta=1.0)
    summary = run_file(engine, prompts, tmp_path / "out", max_time=1e-9, **settings)
    assert {len(row) for row in read_results(tmp_path / "out")} == {2}  # errors alone
    assert (summary.answers, summary.errors) == (0, 3) and summary.prompts == 8
    run_file(engine, prompts, tmp_path / "out", **settings)
    run_file(engine, prompts, tmp_path / "whole", **settings)
    assert told(tmp_path / "out")[0] == told(tmp_path / "whole")[0]


def test_a_full_disk_ends_the_run_and_it_goes_on_later(engine, prompts, tmp_path, monkeypatch):
    from tests.data.test_journal import Full

    settings = dict(seed=3, reward_threshold=1.0, beta=1.0)
    run_file(engine, prompts, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device") as raised:
        patch.setattr(journal_module, "FileIO", Full)
        Full.room = 2000
        run_file(engine, prompts, tmp_path / "out", **settings)
    assert raised.value.filename.endswith(".jsonl")
    assert all(json.loads(line) for line in (tmp_path / "out" / RESULTS).read_text().splitlines())
    run_file(engine, prompts, tmp_path / "out", **settings)
    assert told(tmp_path / "out")[0] == told(tmp_path / "whole")[0]


def test_events_are_told(engine, prompts, tmp_path):
    events = []
    run_file(engine, prompts, tmp_path / "out", seed=3, on_event=events.append)
    answers = {event.request_id: event.output for event in events if event.output is not None}
    assert len(answers) == 7 and sum(isinstance(output, Exception) for output in answers.values()) == 2


def test_an_empty_file_is_refused(engine, tmp_path):
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(ValueError, match="has no prompts, expected one at least"):
        run_file(engine, tmp_path / "p.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists() and read_prompts(tmp_path / "p.txt") == []
