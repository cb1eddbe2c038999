"""STARS decoding (arXiv 2511.03827): align a Hugging Face causal language model while it decodes.

output = stars_kernels.decode(model, reward_model, "Write a review of a hotel.", tokenizer=tokenizer)
print(output.text, output.reward)
"""

from stars_kernels import versions

versions.check()  # before torch and transformers are imported

# isort: split
from stars_kernels.api import calibrate, decode, stream
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.errors import DecodeError, StarsError
from stars_kernels.decoder.output import Calibration, Counts, Segment, StarsEvent, StarsOutput
from stars_kernels.decoder.rules import Args, BestOf, BlockBestOf, Cards, Plain, SpeculativeRejection, Stars
from stars_kernels.hf.engine import Engine
from stars_kernels.hf.generate import StarsGenerateOutput, generate
from stars_kernels.hf.scoring.reward_model import Likelihood, RewardModel
from stars_kernels.ops import backends, reference

__version__ = "0.1.0"

__all__ = [
    "Args",
    "BestOf",
    "BlockBestOf",
    "Calibration",
    "Cards",
    "Counts",
    "DecodeError",
    "Engine",
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
