"""The command `stars`: what it prints, what it writes, and what it says of a wrong command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import stars_kernels
from stars_kernels import Calibration
from stars_kernels.cli.app import app
from stars_kernels.cli.arguments import UsageError, merged, parsed, settings_of
from stars_kernels.decoder.naming import rule_names
from stars_kernels.hf.by_name import reward_of
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

FEW = ["--max-new-tokens", "8", "--set", "segment_size=4", "--set", "max_attempts=3", "--seed", "3"]
TARGET = ["--reward-threshold", "1.0", "--beta", "1.0"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`-m FOLDER -r FOLDER` of tiny models on disk."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("lm", tiny_language_model()), ("rm", tiny_reward_model())):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return ["-m", str(folder / "lm"), "-r", str(folder / "rm")]


def stars(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_one_prompt(models):
    result = stars("run", *models, *FEW, *TARGET, "Hi")
    expected = stars_kernels.decode(
        models[1], models[3], "Hi", max_new_tokens=8, segment_size=4, max_attempts=3, seed=3, reward_threshold=1.0,
        beta=1.0, progress=False,
    )  # fmt: skip
    assert result.stdout == expected.text + "\n"
    assert f"reward {expected.reward:.4f}" in result.stderr and "seed 3" in result.stderr


def test_set_may_undo_a_default(models, tmp_path):
    (tmp_path / "p.txt").write_text("one\n")
    (tmp_path / "c.yaml").write_text("top-k: 7\nreward-threshold: 1.0\nbeta: 1.0\n")
    files = ["-i", tmp_path / "p.txt", "-o", tmp_path / "out", "--config", tmp_path / "c.yaml"]
    stars("run", *models, *FEW, *files, "--set", "top_k=null", "--set", "eos_token_id=[]", "--set", "pack=false")
    config = json.loads((tmp_path / "out" / "manifest.json").read_text())["config"]
    assert (config["top_k"], config["eos_token_id"], config["pack"]) == (None, [], False)


def test_models_in_another_dtype(models):
    first, second = (stars("run", *models, *FEW, *TARGET, *more, "Hi") for more in ([], ["--dtype", "bfloat16"]))
    assert first.stdout and second.stdout and first.stderr != second.stderr


def test_calibrate_heeds_its_file(models, tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    (tmp_path / "c.yaml").write_text(
        f"input: {tmp_path / 'p.txt'}\nseed: 5\ncalibration_samples: 3\nmax-new-tokens: 4\n"
    )
    found = []
    for i, more in enumerate((["--seed", "5"], [], ["--seed", "6"])):
        stars("calibrate", *models, "--config", tmp_path / "c.yaml", "-o", tmp_path / "new" / f"{i}.json", *more)
        found.append(Calibration.load(tmp_path / "new" / f"{i}.json").rewards)
    assert found[0] == found[1] != found[2] and len(found[0]) in (3, 4)


def test_one_prompt_as_it_grows(models):
    pieces = [json.loads(line) for line in stars("run", *models, *FEW, *TARGET, "--stream", "Hi").stdout.splitlines()]
    assert "".join(piece["text"] for piece in pieces) == stars("run", *models, *FEW, *TARGET, "Hi").stdout[:-1]


def test_a_file_and_the_same_command_again(models, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "one", "custom_id": "a"}\n{"prompt": ""}\n"three"\n')
    command = ["run", *models, *FEW, *TARGET, "-i", tmp_path / "p.jsonl", "-o", tmp_path / "out"]
    assert "2 of 3 prompts answered, 1 failed, 0 left" in stars(*command, code=1).stderr
    first = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert [json.loads(line)["custom_id"] for line in first.splitlines()] == ["a", 2, 3]
    assert (
        "tokens/s" not in stars(*command, code=1).stderr and (tmp_path / "out" / "results.jsonl").read_bytes() == first
    )
    told = stars(*command, "--temperature", "0.5", code=2).stderr
    assert "holds another run" in told and "setting temperature is 0.5, it was 1.0" in told
    stars(*command, "--temperature", "0.5", "--overwrite", code=1)
    assert (tmp_path / "out" / "results.jsonl").read_bytes() != first


def test_a_rule_and_options_of_a_file(models, tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    (tmp_path / "run.yaml").write_text(
        f"model: {models[1]}\nreward-model: [{models[3]}@2.0]\n"
        f"input: {tmp_path / 'p.txt'}\noutput: {tmp_path / 'out'}\n"
        "rule: block-best-of\nn: 2\nsegment_size: 4\nmax-new-tokens: 8\nseed: 1\n"
    )
    stars("run", "--config", tmp_path / "run.yaml", "--seed", "5")
    config = json.loads((tmp_path / "out" / "manifest.json").read_text())["config"]
    assert config["seed"] == 5 and config["rule"]["name"] == "BlockBestOf" and config["max_new_tokens"] == 8


def test_calibrate_then_run(models, tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    stars(
        "calibrate",
        *models,
        "-i",
        tmp_path / "p.txt",
        "-o",
        tmp_path / "c.json",
        "--samples",
        "4",
        "--set",
        "max_new_tokens=8",
    )
    found = Calibration.load(tmp_path / "c.json")
    assert len(found.rewards) == 4
    stars("run", *models, *FEW, "-i", tmp_path / "p.txt", "-o", tmp_path / "out", "--calibration", tmp_path / "c.json")
    config = json.loads((tmp_path / "out" / "manifest.json").read_text())["config"]
    assert config["reward_threshold"] == found.reward_threshold and config["beta"] == found.beta


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "--model is missing, expected a hub name, a folder, or a .gguf file"),
        (["-m", "m"], "--reward-model is missing"),
        (["-m", "m", "-r", "nothing:here"], "reward_model nothing:here: No module named 'nothing'"),
        (["-m", "./nowhere", "-r", "json:dumps"], "model is './nowhere', which does not exist"),
        (["--rule", "best"], "rule is 'best', expected one of args, best-of, block-best-of, cards, plain"),
        (["--set", "max_new_token=3"], "unknown option 'max-new-token'; did you mean 'max-new-tokens'?"),
        (["--set", "seed"], "--set is 'seed', expected NAME=VALUE"),
        (["--n", "3"], "unknown option 'n'"),
        (["-i", "p.jsonl"], "a prompt and --input are given, expected one of them"),
        (["-o", "out"], "--input and --output go together"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["-m", "m", "-r", "r", "--temperature", "0"], "temperature is 0"),
        (["-m", "m", "-r", "r", "--device", "cuda:9"], "device is 'cuda:9', which is not here"),
        (["-m", "m", "-r", "r", "--dtype", "int3"], "dtype is 'int3', expected one of float32, bfloat16, float16"),
        (["--actors", "2"], "--actors is given without --ray, expected both"),
        (["--ray"], "--ray is given without --input, expected a file of prompts"),
        (["-m", "m", "--set", "overwrite='no'"], "overwrite is 'no', expected true or false"),
    ],
)
def test_a_wrong_command_line_is_told(arguments, why):
    told = stars("run", "Hi", *arguments, code=2).stderr
    assert told.startswith("error: ") and why in told and "Traceback" not in told


def test_neither_a_prompt_nor_a_file():
    assert "neither a prompt nor --input is given" in stars("run", code=2).stderr


def test_words_of_a_command_line(tmp_path):
    kinds = {"stars", "plain", "best-of", "block-best-of", "args", "speculative-rejection", "cards"}
    assert set(rule_names()) == kinds
    assert parsed(["a-b=3", "c=[1, 2]", "d=null", "e=x=y"]) == {"a_b": 3, "c": [1, 2], "d": None, "e": "x=y"}
    first, second = reward_of(["json:dumps@0.5", "json:loads@-1e1"], "cpu", None)
    assert (first.model, first.weight, second.model, second.weight) == (json.dumps, 0.5, json.loads, -10.0)
    with pytest.raises(UsageError, match="the value is not YAML"):
        parsed(["a=[1"])
    assert parsed(["beta=1e-3"]) == {"beta": 0.001}
    settings = settings_of(
        {"rule": "block-best-of", "n": [4, 2], "segment_size": 5, "seed": 1, "model": "m"}, {"rule", "model"}
    )
    assert settings == {"rule": stars_kernels.BlockBestOf((4, 2), segment_size=5), "seed": 1}
    assert settings_of({"rule": "stars", "segment_size": 5}, {"rule"}) == {"segment_size": 5}
    (tmp_path / "c.yaml").write_text("max-new-tokens: 5\nseed: 1\n")
    assert merged(tmp_path / "c.yaml", {"seed": 2, "beta": None}) == {"max_new_tokens": 5, "seed": 2}
    (tmp_path / "c.yaml").write_text("- 1\n")
    with pytest.raises(UsageError, match=r"c\.yaml is of type list, expected options"):
        merged(tmp_path / "c.yaml", {})


def test_env_and_families():
    assert "transformers" in stars("env").stdout and "fork_attention" in stars("env").stdout
    assert "LlamaForCausalLM" in stars("families", "llamafor").stdout
    assert "no class has 'xyz' in its name" in stars("families", "xyz").stdout


def test_help_has_examples():
    for command in ("run", "calibrate"):
        assert f"stars {command} -m MODEL" in stars(command, "--help").stdout


def test_a_reader_that_goes_away(models, tmp_path):
    """As `stars run --stream | head -n 1`: no traceback, and what was answered is there."""
    (tmp_path / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(30)))
    code = "from stars_kernels.cli import main; main()"
    command = [
        *models,
        *FEW,
        *TARGET,
        "-i",
        tmp_path / "p.txt",
        "-o",
        tmp_path / "out",
        "--stream",
        "--batch-size",
        "1",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    told = process.stderr.read().decode()
    assert process.wait() == 1 and "Traceback" not in told, told
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert 0 < len(rows) < 30 and not any("error" in row for row in rows)


def test_a_report(models, tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    run = tmp_path / "out"
    stars("run", *models, *FEW, *TARGET, "-i", tmp_path / "p.txt", "-o", run)
    assert stars("report", run).stdout == f"{run / 'report.html'}\n" and (run / "report.html").exists()
    stars("report", run / "results.jsonl", "--beside", run, "-o", tmp_path / "new" / "both.html")
    output = stars_kernels.decode(models[1], models[3], "Hi", max_new_tokens=4, trace="full", **{
        "reward_threshold": 1.0, "beta": 1.0, "progress": False,
    })  # fmt: skip
    (tmp_path / "one.json").write_text(json.dumps(output.to_dict()))
    for more, there in (([], False), (["--tokenizer", models[1]], True)):
        told = stars("report", tmp_path / "one.json", *more).stdout
        page = (tmp_path / "one.html").read_text()
        assert told == f"{tmp_path / 'one.html'}\n" and ('"texts":' in page.split('id="details"')[1]) == there
    for arguments, why in (
        ([tmp_path], "has neither results.jsonl nor rules/*/results.jsonl, expected a folder of `stars run`"),
        ([tmp_path / "none"], "does not exist"),
        ([run, "--max-mb", "0"], "max_mb is 0.0, expected a number > 0"),
        ([run, "--tokenizer", "./nowhere"], "--tokenizer is './nowhere', which does not exist"),
        ([run, "-o", tmp_path], "is a folder, expected a file to write the page to"),
    ):
        told = stars("report", *arguments, code=2).stderr
        assert told.startswith("error: ") and why in told and "Traceback" not in told


def test_the_version():
    assert stars("--version").stdout == f"{stars_kernels.__version__}\n"


def test_why_prompts_failed_is_told(models, tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "one", "max_tokens": 3}\n{"prompt": ""}\n{"prompt": ""}\nno row\n{"x": 1}\n'
    )
    command = ["run", *models, *FEW, *TARGET, "-i", tmp_path / "p.jsonl", "-o", tmp_path / "out"]
    told = stars(*command, code=1).stderr
    assert "0 of 5 prompts answered, 5 failed" in told and told.count(" failed: ") == 3
    assert "1 failed: line 1: it has max_tokens" in told and "results.jsonl has 2 more reasons" in told


def test_a_missing_calibration_is_named(models):
    told = stars("run", *models, "--calibration", "nothing.json", "Hi", code=2).stderr
    assert told == "error: nothing.json: No such file or directory\n"


def test_calibrate_takes_the_length_of_answers(models, tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    command = ["calibrate", *models, "-i", tmp_path / "p.txt", "--samples", "4", "--max-new-tokens", "5"]
    stars(*command, "-o", tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json").sampled <= 4 * 5


def test_a_model_that_is_nowhere_is_named(models):
    for arguments, name in (
        (["check", "nosuch/model"], "model 'nosuch/model'"),
        (["run", "-m", "nosuch/model", "-r", models[3], "Hi"], "model 'nosuch/model'"),
        (["run", *models[:2], "-r", "nosuch/rm", "Hi"], "reward_model 'nosuch/rm'"),
    ):
        told = stars(*arguments, code=1).stderr
        assert f"error: {name} cannot be read, neither as a folder nor as a model of the hub: " in told
        assert told.count("\n") == 1


def test_what_needs_no_model_is_refused_before_one_is_loaded(tmp_path):
    (tmp_path / "p.txt").write_text("one\n")
    (tmp_path / "c.yaml").write_text("rules: {stars: {}}\njudge: {function: 'nosuch:judge'}\n")
    gone = ["-m", "nosuch/model", "-r", "nosuch/rm"]
    told = stars("compare", tmp_path / "c.yaml", *gone, "-i", tmp_path / "p.txt", "-o", tmp_path / "out", code=2).stderr
    assert "judge: function nosuch:judge: No module named 'nosuch'" in told and "nosuch/model" not in told
    assert "the server's rule needs r* and beta" in stars("serve", *gone, code=2).stderr
