"""STARS decoding (arXiv 2511.03827): align a Hugging Face causal language model while it decodes.

output = stars_kernels.decode(model, reward_model, "Write a review of a hotel.", tokenizer=tokenizer)
print(output.text, output.reward)

torch and transformers are imported with the first of these names that is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stars_kernels import versions

versions.check()  # before torch and transformers are imported

if TYPE_CHECKING:
    from stars_kernels.api import calibrate, decode, stream
    from stars_kernels.decoder.config import StarsConfig
    from stars_kernels.decoder.errors import DecodeError, StarsError
    from stars_kernels.decoder.output import Calibration, Counts, Segment, StarsEvent, StarsOutput
    from stars_kernels.decoder.rules import Args, BestOf, BlockBestOf, Cards, Plain, SpeculativeRejection, Stars
    from stars_kernels.hf.engine import Engine
    from stars_kernels.hf.generate import StarsGenerateOutput, generate
    from stars_kernels.hf.scoring.head import GatedHead
    from stars_kernels.hf.scoring.reward_model import Likelihood, RewardModel
    from stars_kernels.ops import backends, reference

__version__ = "0.1.0"

_PLACES = {
    "api": ("calibrate", "decode", "stream"),
    "decoder.config": ("StarsConfig",),
    "decoder.errors": ("DecodeError", "StarsError"),
    "decoder.output": ("Calibration", "Counts", "Segment", "StarsEvent", "StarsOutput"),
    "decoder.rules": ("Args", "BestOf", "BlockBestOf", "Cards", "Plain", "SpeculativeRejection", "Stars"),
    "hf.engine": ("Engine",),
    "hf.generate": ("StarsGenerateOutput", "generate"),
    "hf.scoring.head": ("GatedHead",),
    "hf.scoring.reward_model": ("Likelihood", "RewardModel"),
    "ops": ("backends", "reference"),
}
"""Module -> its names that are this package's."""
_PACKAGES = ("api", "data", "decoder", "evaluation", "hf", "ops", "report", "serve")

__all__ = [
    "Args",
    "BestOf",
    "BlockBestOf",
    "Calibration",
    "Cards",
    "Counts",
    "DecodeError",
    "Engine",
    "GatedHead",
    "Likelihood",
    "Plain",
    "RewardModel",
    "Segment",
    "SpeculativeRejection",
    "Stars",
    "StarsConfig",
    "StarsError",
    "StarsEvent",
    "StarsGenerateOutput",
    "StarsOutput",
    "backends",
    "calibrate",
    "decode",
    "generate",
    "reference",
    "stream",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for (PEP 562)."""
    if name in _PACKAGES:
        return import_module(f"stars_kernels.{name}")
    place = next((place for place, names in _PLACES.items() if name in names), None)
    if place is None:
        raise AttributeError(f"module 'stars_kernels' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"stars_kernels.{place}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
