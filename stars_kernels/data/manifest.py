"""What a run is: models, settings, seed, r*, beta and prompts. The same command goes on with the same run alone."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

import stars_kernels
from stars_kernels.data.journal import write_whole
from stars_kernels.data.prompts import BadLine, PromptLine
from stars_kernels.decoder.output import Calibration
from stars_kernels.decoder.serial import checked_version

SPEED_SETTINGS = ("width", "wave", "batch_size", "graphs", "progress", "max_time")
"""Settings that may be others when a run goes on: they change speed alone, or end it early."""
VERSION = 1
"""Of the form that `save` writes."""


@dataclass(frozen=True)
class Manifest:
    """What a run's answers follow from.

    versions: of this package, Python, torch and transformers, and the kind of device. models: fingerprints of the
    language model, the reward model and the tokenizer, and the ids that end an answer. config: the settings as JSON
    has them, with the seed, r* and beta. calibration: of r* and beta, where they are calibrated. prompts: hash of each
    prompt by its id, in the file's order.
    """

    versions: dict[str, str]
    models: dict[str, str]
    config: dict[str, Any]
    calibration: Calibration | None
    prompts: dict[int | str, str]

    def save(self, path: Path) -> None:
        """Write it as JSON, in one step."""
        data = {
            "version": VERSION,
            "versions": self.versions,
            "models": self.models,
            "config": self.config,
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "prompts": list(self.prompts.items()),  # JSON has no integer keys
        }
        write_whole(path, [(json.dumps(data, indent=1) + "\n").encode()])

    @staticmethod
    def load(path: Path) -> Manifest:
        """Read it from a file that `save` wrote."""
        try:
            data = checked_version(json.loads(path.read_text()), "the manifest")
        except ValueError as error:
            raise ValueError(f"{path} is not the manifest of a run: {error}") from None
        calibration = data["calibration"]
        return Manifest(
            data["versions"],
            data["models"],
            data["config"],
            None if calibration is None else Calibration.from_dict(calibration),
            {line_id: digest for line_id, digest in data["prompts"]},
        )

    def differences(self, now: Manifest, answered: Container[int | str]) -> list[str]:
        """Say what is another in `now`, a line each; of the prompts, those that are answered count."""
        told = []
        for what in ("versions", "models"):
            before, after = getattr(self, what), getattr(now, what)
            told += [_difference(f"{what}: {name}", before.get(name), after.get(name)) for name in {**before, **after}]
        names = [name for name in {**self.config, **now.config} if name not in SPEED_SETTINGS]
        told += [_difference(f"setting {name}", self.config.get(name), now.config.get(name)) for name in names]
        asked = {line_id: digest for line_id, digest in self.prompts.items() if line_id in answered}
        told += [_difference(f"prompt {i!r}", digest, now.prompts.get(i)) for i, digest in asked.items()]
        return [line for line in told if line]


def versions(device: str) -> dict[str, str]:
    """Return the versions that answers may depend on, and the kind of device."""
    return {
        "stars-kernels": stars_kernels.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
    }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return a tokenizer's class and a hash of what it makes of text: vocabulary, rules and chat template."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    told = f"{rules} {tokenizer.chat_template} {sorted(map(str, tokenizer.special_tokens_map.items()))}"
    return f"{type(tokenizer).__name__} {hashlib.blake2b(told.encode(), digest_size=8).hexdigest()}"


def hashes(lines: Sequence[PromptLine | BadLine]) -> dict[int | str, str]:
    """Return the hash of each line's prompt by its id."""
    return {line.id: line.hash for line in lines}


def _difference(what: str, before: object, after: object) -> str:
    if before == after:
        return ""
    gone = "is gone" if after is None and what.startswith("prompt") else f"is {json.dumps(after)}"
    return f"{what} {gone}, it was {json.dumps(before)}"
