"""Actors of Ray, however many and whatever kills them, end with the files of one process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from stars_kernels.data import StarsPredictor, read_results, run_file, run_file_ray
from stars_kernels.data import ray as ray_module
from stars_kernels.data.ray import is_fatal
from stars_kernels.data.run import MANIFEST, RESULTS
from stars_kernels.decoder.errors import DecodeError
from stars_kernels.hf.by_name import engine_by_name
from tests.data.test_run import fixed
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
    yield home / "notes"
    for file in (home / "notes").iterdir():
        file.unlink()


def run(home, folder, **changes):
    given = dict(model=str(home / "lm"), reward_model=REWARD, per_call=2) | SET | changes
    return run_file_ray(home / "prompts.jsonl", home / folder, **given)


def results(home, folder):
    return (home / folder / RESULTS).read_bytes()


def pids(notes):
    return {int(file.name.split()[1]) for file in notes.glob("pid *")}


def until(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_three_actors_and_one_is_killed(home, notes):
    (notes / "slow").touch()

    def kill():
        until(lambda: len(pids(notes)) == 3)
        killed.append(pids(notes).pop())
        os.kill(killed[0], signal.SIGKILL)
        (notes / "slow").unlink()

    killed, thread = [], threading.Thread(target=kill)
    thread.start()
    summary = run(home, "three", actors=3)
    thread.join()
    assert killed and len(pids(notes)) == 4  # another process has taken its place
    assert summary.answers == 20 and results(home, "three") == results(home, "whole")


SCRIPT = """
import sys
from pathlib import Path
from tests.data.test_ray import run
run(Path(sys.argv[1]), "one", address=sys.argv[2])
"""


def test_one_actor_and_its_driver_is_killed(home, notes):
    """The same call goes on; so may one process, which finds nothing to do."""
    (notes / "slow").touch()
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen([sys.executable, "-c", SCRIPT, str(home), address], cwd=ROOT)
    until(lambda: (home / "one" / RESULTS).exists() and len(results(home, "one").splitlines()) > 4)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    (notes / "slow").unlink()
    assert len(results(home, "one").splitlines()) < 22
    summary = run(home, "one")
    assert (summary.prompts, summary.answers, summary.errors) == (22, 20, 2)
    manifests = [json.loads((home / folder / MANIFEST).read_text()) for folder in ("whole", "one")]
    assert results(home, "one") == results(home, "whole") and fixed(manifests[0]) == fixed(manifests[1])
    with engine_by_name(str(home / "lm"), REWARD, device="cpu", **SET) as engine:
        assert run_file(engine, home / "prompts.jsonl", home / "one").tokens == 0


def test_an_actor_whose_device_fails_ends_and_at_last_is_given_up(home, notes, monkeypatch):
    monkeypatch.setattr(ray_module, "RESTARTS", 0)
    (notes / "break").touch()
    with pytest.warns(RuntimeWarning, match=r"an actor died 1 times and is given up, while .* are left: .*'b'"):
        summary = run(home, "given-up", actors=2)
    left = {row["custom_id"] for row in read_results(home / "whole")}
    left -= {row["custom_id"] for row in read_results(home / "given-up")}
    assert "b" in left and len(left) == 2 == summary.prompts - summary.answers - summary.errors


def test_ray_data(home):
    """Each row is as in a run, whatever the order."""
    import ray.data

    config = json.loads((home / "whole" / MANIFEST).read_text())["config"]
    target = {name: config[name] for name in ("reward_threshold", "beta")}
    rows = [json.loads(line) for line in (home / "prompts.jsonl").read_text().splitlines() if line[0] == "{"]
    items = [{"id": row.get("custom_id", "5"), "prompt": row["prompt"], "kind": "k"} for row in rows]
    ray.data.DataContext.get_current().enable_progress_bars = False
    answered = ray.data.from_items(items, override_num_blocks=2).map_batches(
        StarsPredictor,
        fn_constructor_kwargs={"model": str(home / "lm"), "reward_model": REWARD, "device": "cpu", **target, **SET},
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_size=16,
    )
    found = {row["id"]: row for row in answered.take_all()}
    expected = {row["custom_id"]: row for row in read_results(home / "whole")}
    assert len(found) == 21
    failed = found.pop("5")
    assert failed["error"] == "prompt '5': it has no tokens, expected at least one" and np.isnan(failed["reward"])
    for row_id, row in found.items():
        one = expected[row_id]
        assert json.loads(row["result"]) == one and row["error"] == "" and row["kind"] == "k"
        assert all(row[name] == one[name] for name in ("text", "reward", "finish_reason"))


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


def test_columns(home):
    """Of a batch as Ray Data gives it: numpy, with empty entries and chats whose messages have other keys."""
    with engine_by_name(str(home / "lm"), "json:dumps") as engine:
        engine.models.tokenizer.chat_template = "{{ messages | tojson }}"
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
