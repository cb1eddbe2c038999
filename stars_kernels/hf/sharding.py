"""Models whose weights are shared out between processes: tensor parallelism, as transformers' tp_plan."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

from stars_kernels.decoder.config import StarsConfig


def is_sharded(modules: Iterable[nn.Module]) -> bool:
    """Say whether a module has a weight of which each process holds a part."""
    tensors = sys.modules.get("torch.distributed.tensor")  # else there is no such weight
    if tensors is None:
        return False
    return any(isinstance(weight, tensors.DTensor) for module in modules for weight in module.parameters())


def why_steps_differ(config: StarsConfig) -> str | None:
    """Say what would lead the processes of such a model to different steps; None = nothing.

    A step is one forward of all of them together: a process that takes another one waits for the others without end.
    """
    open_ = {
        "seed is None": (config.seed is None, "draw its own"),
        "batch_size is 'auto'": (config.batch_size == "auto", "choose by its own free memory"),
        f"max_time is {config.max_time}": (config.max_time is not None, "look at its own clock"),
    }
    for what, (wrong, why) in open_.items():
        if wrong:
            expected = "None" if what.startswith("max_time") else "a number"
            return f"{what}, expected {expected}: the model is shared out between processes, and each would {why}"
    return None
