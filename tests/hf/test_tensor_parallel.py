"""A model that is shared out between two processes gives the answers of the whole one, in both of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stars_kernels import Engine
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

PROMPTS = [[1, 2, 3], [4, 5, 6, 7]]
SET = dict(seed=1, batch_size=2, max_new_tokens=12, segment_size=4, max_attempts=3)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the processes found, and a process of its own with the whole models."""
    folder = tmp_path_factory.mktemp("shared")
    lm, rm = tiny_language_model(), tiny_reward_model()
    for name, model in (("lm", lm), ("rm", rm)):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    with Engine(lm, rm, progress=False) as engine:
        calibration = engine.calibrate(PROMPTS, calibration_samples=4, **SET)
        whole = [[o.token_ids, o.reward] for o in engine.decode(PROMPTS, calibration=calibration, **SET)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    run = subprocess.run(
        [*command, "tests.hf.tensor_parallel", str(folder)], cwd=Path(__file__).parents[2], capture_output=True,
        text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads((folder / "rank0.json").read_text())["example"][0] in run.stdout
    return whole, *(json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2))


def test_answers_are_those_of_the_whole_model(found):
    whole, first, second = found
    assert first == second and first["shards"] == ["DTensor", 24, 24]  # half of the rows of [48, 24]
    assert [tokens for tokens, _ in first["torch.float64"]] == [tokens for tokens, _ in whole]
    assert [reward for _, reward in first["torch.float64"]] == pytest.approx([reward for _, reward in whole], rel=1e-12)
    assert len(first["torch.float32"]) == 2


def test_what_would_lead_the_processes_apart_is_refused(found):
    _, first, _ = found
    shared = "the model is shared out between processes, and each would"
    assert first["refused"] == {
        "seed": f"seed is None, expected a number: {shared} draw its own",
        "batch_size": f"batch_size is 'auto', expected a number: {shared} choose by its own free memory",
        "max_time": f"max_time is 60.0, expected None: {shared} look at its own clock",
        "adecode": "the model is shared out between processes, to which requests would come in different orders; "
        "expected decode or stream, called alike in each of them",
    }
