"""Reward functions for actors of Ray, which a test tells what to do by files in the folder RAY_TEST_NOTES."""

import os
import time
from pathlib import Path


def length(prompts, answers):
    """Return how long the answers are; slow enough to be killed on the way, it leaves its process's id."""
    notes = Path(os.environ["RAY_TEST_NOTES"])
    if not (note := notes / f"pid {os.getpid()}").exists():
        note.touch()
    if (notes / "slow").exists():
        time.sleep(0.1)
    if any("broken" in prompt for prompt in prompts) and (notes / "break").exists():
        raise RuntimeError("CUDA error: device-side assert triggered")
    return [float(len(answer)) for answer in answers]
