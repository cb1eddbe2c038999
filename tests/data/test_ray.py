"""Actors of Ray, however many and whatever kills them, end with the files of one process."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from stars_kernels.cli.app import app
from stars_kernels.data import PromptLine, StarsPredictor, read_results, run_file, run_file_ray
from stars_kernels.data import ray as ray_module
from stars_kernels.data.ray import is_fatal
from stars_kernels.data.run import MANIFEST, RESULTS
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.errors import DecodeError
from stars_kernels.hf.by_name import engine_by_name
from tests.data.test_run import fixed
from tests.test_docs import blocks
from tests.tiny import byte_tokenizer, tiny_language_model

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
ROOT = Path(__file__).parents[2]
SET = dict(max_new_tokens=8, segment_size=4, max_attempts=3, progress=False, seed=3)
REWARD = "tests.data.ray_rewards:length"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, a file of prompts and the results of one process; a cluster runs meanwhile."""
    home = tmp_path_factory.mktemp("ray")
    (home / "notes").mkdir()
    tiny_language_model().save_pretrained(home / "lm")
    byte_tokenizer().save_pretrained(home / "lm")
    lines = [json.dumps({"prompt": f"prompt {i}", "custom_id": f"p{i}"}) for i in range(22)]
    lines[4], lines[9], lines[15] = '{"prompt": ""}', "not a row", '{"prompt": "broken", "custom_id": "b"}'
    (home / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        settings = {"RAY_TEST_NOTES": str(home / "notes"), "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        for name, value in settings.items():
            patch.setenv(name, value)
        with engine_by_name(str(home / "lm"), REWARD, device="cpu", **SET) as engine:
            run_file(engine, home / "prompts.jsonl", home / "whole")
        ray.init("local", num_cpus=3, include_dashboard=False, logging_level="ERROR")
        yield home
        ray.shutdown()


@pytest.fixture
def notes(home):
    for file in (home / "notes").iterdir():
        file.unlink()
    return home / "notes"


def run(home, folder, **changes):
    given = dict(model=str(home / "lm"), reward_model=REWARD, per_call=2) | SET | changes
    return run_file_ray(home / "prompts.jsonl", home / folder, **given)


def example(home, number):
    """An example of the document, with this test's model, reward and settings."""
    settings = ", ".join(f"{name}={value!r}" for name, value in SET.items())
    changes = {"seed=0": f"{settings}, per_call=2", '"seed": 0': '"seed": 3, "max_new_tokens": 8', '"RM"': repr(REWARD)}
    block = blocks("py", [ROOT / "docs" / "ray.md"])[number][1].replace('"MODEL"', repr(str(home / "lm")))
    for old, new in changes.items():
        block = block.replace(old, new)
    return block


def stars(home, number, folder):
    """Run a command of the document, with this test's model, reward and settings."""
    command = re.findall(r"^    stars (run .*--ray.*)$", (ROOT / "docs" / "ray.md").read_text(), re.MULTILINE)[number]
    changes = {"MODEL": str(home / "lm"), "RM": REWARD, "0": "3", "many": folder}
    words = [changes.get(word, word) for word in shlex.split(command)]
    settings = [f"--set={name}={str(value).lower()}" for name, value in SET.items() if name != "seed"]
    result = CliRunner().invoke(app, [*words, *settings])
    assert result.exit_code == 1, (result.output, result.exception)  # two prompts of the file are bad ones
    return result.stderr


def results(home, folder):
    return (home / folder / RESULTS).read_bytes()


def pids(notes):
    """Of the processes that gave rewards, in the order of their first ones."""
    files = sorted(notes.glob("pid *"), key=lambda file: file.stat().st_mtime_ns)
    return [int(file.name.split()[1]) for file in files]


def until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_three_actors_and_one_is_killed(home, notes, monkeypatch):
    monkeypatch.chdir(home)
    (notes / "slow").touch()

    def kill():
        until(lambda: len(pids(notes)) == 3)
        killed.append(pids(notes)[-1])  # the others may have done their part
        os.kill(killed[0], signal.SIGKILL)
        (notes / "slow").unlink()

    killed, thread = [], threading.Thread(target=kill)
    thread.start()
    told = stars(home, 0, "three")
    thread.join()
    assert killed and len(pids(notes)) == 4  # another process has taken its place
    assert "20 of 22 prompts answered, 2 failed, 0 left" in told and results(home, "three") == results(home, "whole")


def test_the_driver_is_killed(home, notes, monkeypatch):
    """The same run by a command goes on; so may one process, which finds nothing to do."""
    monkeypatch.chdir(home)
    (notes / "slow").touch()
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen([sys.executable, "-c", example(home, 0)], env={**os.environ, "RAY_ADDRESS": address})
    until(lambda: (home / "many" / RESULTS).exists() and len(results(home, "many").splitlines()) > 4)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    (notes / "slow").unlink()
    assert len(results(home, "many").splitlines()) < 22
    connected = []
    with monkeypatch.context() as patch:  # this process is connected already
        patch.setattr(ray, "is_initialized", lambda: bool(connected))
        patch.setattr(ray, "init", lambda address, **options: connected.append(address))
        patch.setattr(ray, "shutdown", lambda: connected.append("left"))
        assert "20 of 22 prompts answered, 2 failed, 0 left" in stars(home, 1, "many")
    assert connected == ["HEAD:6379", "left"]
    manifests = [json.loads((home / folder / MANIFEST).read_text()) for folder in ("whole", "many")]
    assert results(home, "many") == results(home, "whole") and fixed(manifests[0]) == fixed(manifests[1])
    with engine_by_name(str(home / "lm"), REWARD, device="cpu", **SET) as engine:
        assert run_file(engine, home / "prompts.jsonl", home / "many").tokens == 0


def test_an_actor_whose_device_fails_ends_and_at_last_is_given_up(home, notes, monkeypatch):
    monkeypatch.setattr(ray_module, "RESTARTS", 0)
    (notes / "break").touch()
    with pytest.warns(RuntimeWarning, match=r"an actor died 1 times and is given up, while .* are left: .*'b'"):
        summary = run(home, "given-up", actors=2)
    left = {row["custom_id"] for row in read_results(home / "whole")}
    left -= {row["custom_id"] for row in read_results(home / "given-up")}
    assert "b" in left and len(left) == 2 == summary.prompts - summary.answers - summary.errors


def test_ray_data(home, capsys):
    """By the example of the document."""
    exec(compile(example(home, 1), "docs/ray.md", "exec"), {})
    shown = capsys.readouterr().out
    with engine_by_name(str(home / "lm"), REWARD, device="cpu", max_new_tokens=8) as engine:
        for name in ("colour", "fruit", "town"):
            alone = engine.decode(f"Name a {name}.", request_ids=name, seed=3, reward_threshold=1.0, beta=0.5)
            assert f"{name} {alone.text} {alone.reward} \n" in shown


def test_a_batch_of_columns(home):
    """Each row is as in a run; a prompt that failed is one too."""
    config = json.loads((home / "whole" / MANIFEST).read_text())["config"]
    target = {name: config[name] for name in ("reward_threshold", "beta")}
    predictor = StarsPredictor(str(home / "lm"), REWARD, device="cpu", threads=1, **target, **SET)
    ids, prompts = np.array(["p3", "5", "none", "p1"], object), np.array(["prompt 3", "", None, "prompt 1"], object)
    batch = predictor({"id": ids, "prompt": prompts, "kind": np.arange(4)})
    expected = {row["custom_id"]: row for row in read_results(home / "whole")}
    for i in (0, 3):
        one = expected[ids[i]]
        assert json.loads(batch["result"][i]) == one and batch["error"][i] == "" and batch["kind"][i] == i
        assert all(batch[name][i] == one[name] for name in ("text", "reward", "finish_reason"))
    assert batch["error"][1:3] == [
        "prompt '5': it has no tokens, expected at least one",
        "prompt 'none': found id, prompt, expected one of prompt, messages, prompt_token_ids",
    ]
    assert np.isnan(batch["reward"][1:3]).all() and batch["text"][1:3] == batch["finish_reason"][1:3] == ["", ""]
    assert json.loads(batch["result"][1]) == {"custom_id": "5", "error": batch["error"][1]}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (dict(max_time=3), "max_time is 3.0, expected None: with Ray it would hold for each batch anew"),
        (dict(per_call=0), "per_call is 0, expected 1 or more, or None"),
        (dict(actors=True), "actors is True, expected 1 or more, or None"),
        (dict(device="cuda", actors=2), "actors is 2, but the cluster has 0 GPUs, expected one an actor"),
        (dict(device="cuda:1"), "device is 'cuda:1', expected cpu, cuda or None"),
        (dict(address="auto"), "address is 'auto', but this process is connected to Ray already, expected None"),
    ],
)
def test_a_wrong_call_is_told(home, given, why):
    with pytest.raises(ValueError, match=why):
        run(home, "wrong", **given)
    assert not (home / "wrong").exists()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (dict(), "seed is None, expected a number: each actor would draw one of its own"),
        (dict(seed=1, beta=1.0), "reward_threshold or beta is None, expected both, or calibration="),
        (dict(seed=1, max_time=1), "max_time is 1.0, expected None"),
    ],
)
def test_what_actors_would_differ_in_must_be_given(given, why):
    with pytest.raises(ValueError, match=why):
        StarsPredictor("lm", "rm", **given)


def test_columns():
    """Of a batch as Ray Data gives it: numpy, with empty entries and chats whose messages have other keys."""
    hi = {"role": "user", "content": "Hi", "name": None}
    batch = {"id": np.array([1, 2, 3, 4]), "messages": np.empty(4, object), "prompt_token_ids": np.empty(4, object)}
    batch["messages"][:] = [np.array([hi]), None, None, np.array([hi])]
    batch["prompt_token_ids"][:] = [None, np.array([5, 6]), None, np.array([5])]
    lines = ray_module._lines_of(batch)
    assert lines[0].prompt == [{"role": "user", "content": "Hi"}] and lines[1].prompt == [5, 6]
    assert [line.error for line in lines[2:]] == [
        "prompt 3: found id, messages, prompt_token_ids, expected one of prompt, messages, prompt_token_ids",
        "prompt 4: found messages and prompt_token_ids, expected one of prompt, messages, prompt_token_ids",
    ]
    with pytest.raises(ValueError, match="the batch has the columns id, text, expected id and one of prompt"):
        ray_module._lines_of({"id": [1], "text": ["Hi"]})
    with pytest.raises(TypeError, match="the batch is of type list, expected columns"):
        ray_module._lines_of([1])


def test_an_actor_that_differs_is_refused(home):
    """As where a machine has another version of a model under the same name."""
    names = {"model": str(home / "lm"), "reward_model": [REWARD], "device": "cpu"}
    worker = ray_module._Worker(1, names, StarsConfig(reward_threshold=1.0, beta=1.0, **SET))
    config, manifest = worker.plan(None, [PromptLine("a", "Hi", 1)], None)
    ((line_id, row, cost),) = worker.answer(config, manifest, [PromptLine("a", "Hi", 1)])
    assert line_id == "a" and row["text"] and cost["counts"]["sampled"] > 0
    other = replace(manifest, models={**manifest.models, "model": "LlamaForCausalLM 0123"})
    with pytest.raises(ValueError, match=r'an actor of Ray differs .*: models: model is "Llama.*", it was ".* 0123"'):
        worker.answer(config, other, [PromptLine("a", "Hi", 1)])


def test_when_all_actors_have_died():
    dead = MagicMock()  # Ray as the pool knows it
    dead.exceptions.RayActorError, dead.exceptions.RayTaskError = type("Died", (Exception,), {}), KeyError
    dead.get.side_effect = dead.exceptions.RayActorError("it was shot")
    dead.wait.side_effect = lambda tasks, num_returns: (tasks[:num_returns], tasks[num_returns:])
    dead.remote().return_value.remote.return_value.answer.remote.side_effect = lambda *given: object()
    pool = ray_module._Pool(dead, ray_module._Place(2, "cpu", 1.0), {}, StarsConfig())
    with pytest.raises(ChildProcessError, match=r"the first actor died 4 times before the run began. .*it was shot"):
        pool.plan()
    lines = [PromptLine(i, "Hi", i) for i in range(10)]
    with pytest.warns(RuntimeWarning, match="an actor died 4 times and is given up, while it answered 3 prompts"):
        with pytest.raises(ChildProcessError, match="all actors have died, and 4 more prompts are left"):
            list(pool.answers(lines, StarsConfig(), ray_module.Manifest({}, {}, {}, None, {}), per_call=3))


def test_what_is_fatal():
    gpu = RuntimeError("CUDA error: an illegal memory access was encountered")
    told = DecodeError("prompt 3 failed")
    told.__cause__ = gpu
    assert is_fatal(gpu) and is_fatal(told) and is_fatal(torch.AcceleratorError("device-side assert"))
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory"), KeyError()):
        assert not is_fatal(error)


def test_without_ray(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"Ray is missing: pip install 'stars-kernels\[ray\]'"):
        run(home, "wrong")
