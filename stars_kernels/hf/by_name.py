"""Models by the words of a command line: a hub name, a folder, a .gguf file, or `module:function` for a reward."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_kernels.decoder.config import Settings, resolve_config
from stars_kernels.decoder.errors import message_of
from stars_kernels.hf.engine import Config, Engine
from stars_kernels.hf.loading.language_model import check_path, load_language_model
from stars_kernels.hf.loading.reward_model import load_reward_model
from stars_kernels.hf.scoring.reward_model import Reward, RewardModel

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""`module:function`, as of a reward function."""
WEIGHTED = re.compile(r"(.+)@([^@]+)")
"""`NAME@WEIGHT`, of a reward model among several."""
DTYPES = {str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.bfloat16, torch.float16)}
"""What models may be turned to, by name."""


@dataclass(frozen=True)
class Loaded:
    """Models that were named, on their device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    reward: Reward

    def engine(self, *, config: Config = None, **settings: Unpack[Settings]) -> Engine:
        """Make their engine."""
        return Engine(self.model, self.reward, tokenizer=self.tokenizer, config=config, **settings)


def load_by_name(
    model: str, reward_model: str | Iterable[str], *, device: str | None = None, dtype: str | None = None
) -> Loaded:
    """Load the models that are named onto a device.

    Args:
        model: hub name, folder, or .gguf file.
        reward_model: hub name, folder, or `module:function`; of several, each as NAME@WEIGHT, the weighted sum.
        device: None = cuda where there is one, else cpu.
        dtype: float32, bfloat16 or float16; None = as saved.

    Raises:
        ValueError, TypeError: a name, the device or the dtype is not usable.
        OSError: there is no such model.
    """
    check_path("model", model)
    place, kind = device_of(device), dtype_of(dtype)
    reward = reward_of(as_list(reward_model), place, kind)
    loaded, tokenizer = load_language_model(model, None, trust_remote_code=False)
    return Loaded(moved(loaded, place, kind), tokenizer, reward)


def engine_by_name(
    model: str,
    reward_model: str | Iterable[str],
    *,
    device: str | None = None,
    dtype: str | None = None,
    config: Config = None,
    **settings: Unpack[Settings],
) -> Engine:
    """Check the settings, then load the models that are named, as `load_by_name` does, and make their engine."""
    resolved = resolve_config(config, settings)
    return load_by_name(model, reward_model, device=device, dtype=dtype).engine(config=resolved)


def reward_of(names: Iterable[str], device: str, dtype: torch.dtype | None) -> Reward:
    """Load the reward model that is named: a hub name, a folder or `module:function`; of several the weighted sum."""
    parts = [_part(name, device, dtype) for name in names]
    if not parts:
        raise ValueError("no reward model is given, expected a hub name, a folder, or module:function")
    return parts


def _part(name: str, device: str, dtype: torch.dtype | None) -> RewardModel:
    weighted, weight = WEIGHTED.fullmatch(name), 1.0
    if weighted and (number := number_of(weighted[2])) is not None and not Path(name).exists():
        name, weight = weighted[1], number
    if FUNCTION.fullmatch(name) and not Path(name).exists():
        return RewardModel(function_of("reward_model", name), weight=weight)
    check_path("reward_model", name)
    loaded = load_reward_model(name, None, trust_remote_code=False)
    return RewardModel(moved(loaded.model, device, dtype), loaded.tokenizer, weight=weight)


def moved(model: Any, device: str, dtype: torch.dtype | None) -> Any:
    """Move a model to a device; dtype: None = as it is."""
    return model.to(device=device, dtype=dtype)


def function_of(option: str, name: str) -> Any:
    """Import `module:function`, which an option names; the module may lie where the command is given."""
    if not FUNCTION.fullmatch(str(name)):
        raise ValueError(f"{option} is {name!r}, expected module:function")
    module, function = name.split(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} {name}: {error}") from error


def as_list(value: Any) -> list[Any]:
    """Return one value, several or none as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)


def number_of(text: str) -> float | None:
    """Return the number that a text writes; None = it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def device_of(name: str | None) -> str:
    """Return the device of this name, which must be here; None = cuda where there is one, else cpu."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}, which is not here: {message_of(error)}") from None
    return name


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype of this name; None = as saved."""
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype is {name!r}, expected one of {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]
