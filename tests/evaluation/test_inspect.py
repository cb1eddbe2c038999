"""Inspect's evaluations are answered by an engine, as a call of it would."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("inspect_ai", reason="the extra eval is not installed")

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageTool, ChatMessageUser, ContentImage, GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.tool import ToolInfo

from stars_kernels import BestOf, Engine
from stars_kernels.evaluation.inspect_provider import STOP_REASONS, StarsAPI, _message_of, _settings_of_call
from stars_kernels.hf.by_name import engine_by_name
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
SET = dict(segment_size=4, max_attempts=3, reward_threshold=1.0, beta=1.0, progress=False)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("lm", tiny_language_model()), ("rm", tiny_reward_model())):
        model.save_pretrained(folder / name)
        byte_tokenizer(TEMPLATE).save_pretrained(folder / name)
    return str(folder / "lm"), str(folder / "rm")


def test_a_task(names, tmp_path):
    """Three samples, twice each: the epochs differ, and each is the answer to its id."""
    samples = [Sample(input=text, target="x", id=text) for text in ("Hi", "Ho", "Ha")]
    task = Task(dataset=samples, scorer=includes(), epochs=2)
    given = dict(model_args={"reward_model": names[1], **SET}, max_tokens=8, seed=5, top_k=20, stop_seqs=["zq"])
    given |= dict(log_dir=str(tmp_path), display="none")
    logs = [eval(task, model=f"stars/{names[0]}", **given)[0] for _ in range(2)]
    for log in logs:
        assert log.status == "success" and len(log.samples) == 6, log.error
    found = {(sample.id, sample.output.completion) for sample in logs[0].samples}
    assert found == {(sample.id, sample.output.completion) for sample in logs[1].samples} and len(found) == 6
    with engine_by_name(*names, max_new_tokens=8, top_k=20, stop_strings=["zq"], seed=5, **SET) as engine:
        for sample in logs[0].samples:
            chat = [{"role": "user", "content": sample.input}]
            digest = hashlib.blake2b(json.dumps(chat).encode(), digest_size=8).hexdigest()
            alone = engine.decode(chat, request_ids=f"{sample.id}/{sample.epoch}/{digest}/0")
            output = sample.output
            assert (output.completion, output.metadata["reward"]) == (alone.text, alone.reward)
            assert output.metadata["seed"] == 5 and output.stop_reason == STOP_REASONS[alone.finish_reason]
            assert output.usage.input_tokens == len(f"user: {sample.input}\nassistant:")
            assert output.usage.output_tokens == len(alone.token_ids)


def test_rules_and_calibrations(names, tmp_path):
    with Engine(*names, max_new_tokens=4) as engine:
        engine.calibrate(["one", "two"], calibration_samples=4, seed=0).save(tmp_path / "c.json")
    model = get_model(f"stars/{names[0]}", reward_model=names[1], rule="best-of", n=2, max_new_tokens=4, memoize=False)
    assert model.api.engine.config.rule == BestOf(2) and model.api.max_connections() == 32
    model.api.close()
    api = StarsAPI(names[0], reward_model=names[1], calibration=str(tmp_path / "c.json"))
    assert api.engine.config.reward_threshold is not None and api.collapse_user_messages()
    api.close()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (dict(), "reward_model is missing, expected -M reward_model=NAME"),
        (dict(reward_model="rm", segment_sise=3), "unknown argument 'segment_sise'; did you mean 'segment_size'?"),
        (dict(reward_model="rm", xyz=3), "unknown argument 'xyz', expected reward_model, device, dtype, calibration"),
        (dict(reward_model="rm", rule="best"), "rule is 'best', expected one of"),
        (dict(reward_model="{rm}", beta=1.0), "reward_threshold or beta is missing, expected -M reward_threshold=R"),
    ],
)
def test_wrong_arguments_are_told(names, given, why):
    given = {name: value.format(rm=names[1]) if isinstance(value, str) else value for name, value in given.items()}
    with pytest.raises(ValueError, match=why.replace("?", r"\?")):
        StarsAPI(names[0], **given)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (dict(num_choices=2), "num_choices is 2, expected none"),
        (dict(logprobs=True), "logprobs is True, expected none"),
        (dict(frequency_penalty=0.5), "frequency_penalty is 0.5, expected none"),
    ],
)
def test_settings_that_are_not_there_are_refused(config, why):
    with pytest.raises(ValueError, match=why):
        _settings_of_call(GenerateConfig(**config))
    assert _settings_of_call(GenerateConfig(num_choices=1, logprobs=False, max_tokens=3)) == {"max_new_tokens": 3}


def test_what_is_no_text_is_refused(names):
    with pytest.raises(ValueError, match="a message holds image, expected text alone"):
        _message_of(ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AAAA")]))
    with pytest.raises(ValueError, match="a message is of the role 'tool', expected system, user or assistant"):
        _message_of(ChatMessageTool(content="4"))
    api = StarsAPI(names[0], reward_model=names[1], **SET)
    with pytest.raises(ValueError, match="the tool 'add' is given, expected none"):
        api.generate(
            [ChatMessageUser(content="Hi")], [ToolInfo(name="add", description="")], "auto", GenerateConfig()
        ).send(None)
    api.close()


def test_the_command_of_the_document(names, tmp_path):
    """By the entry point, as where the package is installed."""
    document = (ROOT / "docs" / "harness.md").read_text()
    (tmp_path / "task.py").write_text(re.search(r"^```py\n(.*?)^```", document, re.MULTILINE | re.DOTALL)[1])
    ((name, target),) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "inspect_ai"
    ].items()
    installed = tmp_path / "installed" / "stars_kernels_of_test-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: stars_kernels_of_test\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(f"[inspect_ai]\n{name} = {target}\n")
    command = re.search(r"^    inspect (eval .*)$", document, re.MULTILINE)[1]
    words = command.replace("MODEL", names[0]).replace("RM", names[1]).split()
    path = os.pathsep.join([str(installed.parent), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-m", "inspect_ai", *words, "--max-tokens=8", "--log-dir=logs", "--log-format=json"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    (log,) = (tmp_path / "logs").glob("*.json")
    samples = json.loads(log.read_text())["samples"]
    assert len(samples) == 2 and all(sample["output"]["metadata"]["seed"] == 0 for sample in samples)
    assert len({sample["output"]["completion"] for sample in samples}) == 2
