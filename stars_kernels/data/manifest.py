"""What a run is: models, settings, seed, r*, beta and prompts. The same command goes on with the same run alone."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import stars_kernels
from stars_kernels.data.journal import write_whole
from stars_kernels.data.prompts import BadRow, PromptRow
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.output import Calibration
from stars_kernels.decoder.serial import checked_version

FREE = ("width", "wave", "batch_size", "graphs", "progress", "max_time")
"""Settings that may be others when a run goes on: they change speed alone, or end it early."""
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What a run's answers follow from.

    versions: of this package, Python, torch and transformers. models: names and fingerprints of the language model and
    the reward model. config: the settings, with the seed, r* and beta. calibration: of r* and beta, where they are
    calibrated. prompts: hash of each prompt by its id, in the file's order.
    """

    versions: dict[str, str]
    models: dict[str, str]
    config: StarsConfig
    calibration: Calibration | None
    prompts: dict[int | str, str]

    def save(self, path: Path) -> None:
        """Write it as JSON, in one step."""
        data = {
            "version": VERSION,
            "versions": self.versions,
            "models": self.models,
            "config": self.config.to_dict(),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "prompts": list(self.prompts.items()),  # JSON has no integer keys
        }
        write_whole(path, (json.dumps(data, indent=1) + "\n").encode())

    @staticmethod
    def load(path: Path, rules: Sequence[type] = ()) -> Manifest:
        """Read it from a file that `save` wrote; rules: of the user's own that it may name."""
        data = checked_version(json.loads(path.read_text()), str(path))
        calibration = data["calibration"]
        return Manifest(
            data["versions"],
            data["models"],
            StarsConfig.from_dict(data["config"], rules),
            None if calibration is None else Calibration.from_dict(calibration),
            {row_id: digest for row_id, digest in data["prompts"]},
        )

    def differences(self, now: Manifest, prompts: Mapping[int | str, str]) -> list[str]:
        """Say what is another in `now` and these prompts, a line each; prompts may have come since."""
        told = []
        for what in ("versions", "models"):
            before, after = getattr(self, what), getattr(now, what)
            told += [_line(f"{what}: {name}", before.get(name), after.get(name)) for name in {**before, **after}]
        before, after = self.config.to_dict(), now.config.to_dict()
        told += [_line(f"setting {name}", before[name], after[name]) for name in before if name not in FREE]
        told += [_line(f"prompt {i!r}", digest, prompts.get(i)) for i, digest in self.prompts.items()]
        return [line for line in told if line]


def versions() -> dict[str, str]:
    """Return the versions that answers may depend on."""
    return {
        "stars-kernels": stars_kernels.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def hashes(rows: Sequence[PromptRow | BadRow]) -> dict[int | str, str]:
    """Return the hash of each row by its id."""
    return {row.id: row.hash for row in rows}


def _line(what: str, before: object, after: object) -> str:
    if before == after:
        return ""
    gone = "is gone" if after is None and what.startswith("prompt") else f"is {_shown(after)}"
    return f"{what} {gone}, it was {_shown(before)}"


def _shown(value: object) -> str:
    return json.dumps(value) if not isinstance(value, Mapping) else json.dumps(dict(value))
