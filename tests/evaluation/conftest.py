"""An engine of tiny models, and a file of prompts."""

import json

import pytest

from stars_kernels import BestOf, Engine
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

SET = dict(max_new_tokens=8, segment_size=4, max_attempts=3, width=2, wave=2, batch_size=4, progress=False)
SET |= dict(calibration_samples=12, seed=0)


@pytest.fixture(scope="package")
def engine():
    with Engine(
        tiny_language_model(), tiny_reward_model(), tokenizer=byte_tokenizer(), prefix_cache=0, **SET
    ) as engine:
        yield engine


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the pictures, which take longer than the tiny models."""
    monkeypatch.setattr("stars_kernels.evaluation.comparison.plot_rewards", lambda *args: None)


@pytest.fixture
def rules():
    return {"stars": {}, "best-of-3": {"rule": BestOf(3)}}


@pytest.fixture
def prompts(tmp_path):
    """Eight prompts; the fourth has no tokens."""
    path = tmp_path / "prompts.jsonl"
    texts = [f"prompt {i}" if i != 3 else "" for i in range(8)]
    path.write_text("".join(json.dumps({"prompt": text, "custom_id": f"p{i}"}) + "\n" for i, text in enumerate(texts)))
    return path
