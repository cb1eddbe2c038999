"""`stars compare`: what its YAML file may say, and what is told of a wrong one."""

import json

import pytest

from stars_kernels.cli.arguments import UsageError
from stars_kernels.cli.compare import judge_options, rules_of, shared_settings
from stars_kernels.decoder.rules import BestOf, Cards, Plain
from tests.cli.test_cli import models, stars  # noqa: F401


@pytest.fixture
def here(models, tmp_path, monkeypatch):  # noqa: F811
    """A folder with prompts, a judge, and the options of a comparison without its rules."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "my_judges.py").write_text("def longer(p, a, b):\n    return [len(x) - len(y) for x, y in zip(a, b)]\n")
    return f"model: {models[1]}\nreward-model: {models[3]}\nprompts: p.txt\nmax-new-tokens: 4\ncalibration-samples: 4\n"


def test_a_comparison(here, tmp_path):
    (tmp_path / "c.yaml").write_text(
        f"{here}rules: {{stars: {{segment-size: 2}}, best-of-2: {{rule: best-of, n: 2}}}}\n"
        "judge: {function: my_judges:longer}\n"
    )
    first = stars("compare", "c.yaml", "-o", "out", "--limit", "2", "--seed", "3")
    assert "2 prompts; plain sampling's mean reward is" in first.stdout and "best-of-2" in first.stdout
    assert "rule 3 of 3: best-of-2" in first.stderr and "tables and pictures: out/comparison.md" in first.stderr
    stars("compare", "c.yaml", "-o", "out", "--seed", "3")
    data = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert data["rules"]["stars"]["settings"]["segment_size"] == 2 and data["rules"]["plain"]["settings"]["seed"] == 3
    assert data["rules"]["best-of-2"]["figures"]["answers"] == 3 and "my_judges:longer (" in data["judge"]
    told = stars("compare", "c.yaml", "-o", "out", "--seed", "4", code=2).stderr
    assert "setting seed is 4, it was 3" in told


def test_prompts_that_fail_give_code_1_and_retry(here, tmp_path):
    (tmp_path / "p.jsonl").write_text('"one"\n"two"\n""\n')
    (tmp_path / "c.yaml").write_text(f"{here}rules: {{b: {{rule: best-of, n: 2}}}}\noutput: out\n")
    told = stars("compare", "c.yaml", "-i", "p.jsonl", code=1).stderr
    assert "2 answers or verdicts failed: --retry tries those again" in told
    (tmp_path / "p.jsonl").write_text('"one"\n"two"\n"three"\n')
    assert "failed" not in stars("compare", "c.yaml", "-i", "p.jsonl", "--retry").stderr


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("rules: {}\n", "rules is {}, expected names and settings"),
        ("rules: {x: 3}\n", "rule 'x' is 3, expected settings such as {rule: best-of, n: 8}, or {}"),
        ("rules: {x: {rule: best}}\n", "rule 'x': rule is 'best', expected one of args"),
        ("rules: {x: {rule: best-of, n: 8, m: 8}}\n", "rule 'x': unknown option 'm'"),
        ("rules: {x: {rule: best-of}}\n", "rule 'x': rule is 'best-of' without n"),
        ("rules: {x: {segmentsize: 8}}\n", "rule 'x': unknown option 'segmentsize'; did you mean 'segment-size'?"),
        ("rules: {x: {}, x: {rule: best-of}}\n", "'x' is there twice, expected it once"),
        ("ruels: {x: {}}\n", "unknown option 'ruels'; did you mean 'rules'?"),
        ("rules: {x: {}}\njudge: longer\n", "judge is 'longer', expected one of"),
        ("rules: {x: {}}\njudge: {model: m}\n", "judge has no kind, expected one of reward-model, function, endpoint"),
        ("rules: {x: {}}\njudge: {function: a:b, endpoint: c}\n", "judge has function and endpoint, expected one"),
        ("rules: {x: {}}\njudge: {endpoint: c, api-key: k}\n", "unknown option 'api-key'; did you mean 'api-key-env'"),
        ("rules: {x: {}}\nprompts: nowhere.jsonl\n", "expected a file, or one of builtin, hh-rlhf"),
        ("rules: {x: {}}\nlimit: 0\n", "limit is 0, expected 1 or more"),
        ("rules: {plain: {}}\n", "the rule 'plain' is Stars("),
        ("rules: {x: {}}\njudge: {function: my_judges:none}\n", "judge: function my_judges:none: "),
        ("rules: {x: {}}\njudge: {endpoint: 'http://localhost:1'}\n", "the judge's model is None, expected its name"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_told(here, tmp_path, text, why):
    (tmp_path / "c.yaml").write_text("".join(line for line in here.splitlines(True) if line[:7] not in text) + text)
    told = stars("compare", "c.yaml", "-o", "out", code=2).stderr
    assert "error: " in told and why in told and "Traceback" not in told
    assert not (tmp_path / "out" / "rules").exists()


def test_no_output_and_no_file(here, tmp_path):
    (tmp_path / "c.yaml").write_text(f"{here}rules: {{stars: {{}}}}\n")
    assert "--output is missing, expected a folder" in stars("compare", "c.yaml", code=2).stderr
    assert "c.yml" in stars("compare", "c.yml", "-o", "out", code=2).stderr


def test_settings_of_all_rules_hold_for_those_that_have_them():
    shared = shared_settings({"segment_size": 4, "beta": 2.0, "temperature": 0.5, "model": "m"})
    assert shared == {"seed": 0, "segment_size": 4, "beta": 2.0, "temperature": 0.5}
    found = rules_of(
        {
            "plain": {"rule": "plain"}, "b": {"rule": "best-of", "n": 2}, "s": {"beta": 1.0}, "c": {"rule": "cards"},
            5: None,
        },
        shared,
    )  # fmt: skip
    assert found["plain"] == {"seed": 0, "temperature": 0.5, "rule": Plain()} and found["b"]["rule"] == BestOf(2)
    assert found["s"] == {**shared, "beta": 1.0} and found["5"] == shared
    assert found["c"]["rule"] == Cards(segment_size=4, beta=2.0)


def test_what_a_judge_may_be():
    assert judge_options(None) is None
    assert list(judge_options({"model": "m", "endpoint": "u"})) == ["endpoint", "model"]
    with pytest.raises(UsageError, match="judge: unknown option 'at-one'; did you mean 'at-once'"):
        judge_options({"function": "a:b", "at-one": 3})


def test_a_calibration_s_picture(models, tmp_path):  # noqa: F811
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    files = ["-i", tmp_path / "p.txt", "-o", tmp_path / "c.json", "--plot", tmp_path / "new" / "c.svg"]
    told = stars("calibrate", *models, *files, "--samples", "8", "--set", "max_new_tokens=4").stderr
    rewards = json.loads((tmp_path / "c.json").read_text())["rewards"]
    assert "from 8 continuations; 25.0% of such are expected to be accepted at r*" in told and len(rewards) == 8
    picture = (tmp_path / "new" / "c.svg").read_text()
    assert ">r* = " in picture and "25% are expected to be accepted<" in picture
