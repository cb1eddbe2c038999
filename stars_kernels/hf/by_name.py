"""Models and rules by the words of a command line: hub names, folders, `module:function`, best-of."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Unpack

import torch

from stars_kernels.decoder.config import RULE_SETTINGS, Settings, StarsConfig, resolve_config
from stars_kernels.decoder.errors import message_of
from stars_kernels.decoder.rules import RULES, Rule, Stars
from stars_kernels.hf.engine import Config, Engine
from stars_kernels.hf.loading.language_model import check_path, load_language_model
from stars_kernels.hf.loading.reward_model import load_reward_model
from stars_kernels.hf.scoring.reward_model import Reward, RewardModel

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""`module:function`, as of a reward function."""
WEIGHTED = re.compile(r"(.+)@([^@]+)")
"""`NAME@WEIGHT`, of a reward model among several."""
SETTINGS = tuple(field.name for field in dataclasses.fields(StarsConfig) if field.name != "rule")
"""Of a call, which a command line has by their names."""
DTYPES = {str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.bfloat16, torch.float16)}
"""What models may be turned to, by name."""


def engine_by_name(
    model: str,
    reward_model: str | Iterable[str],
    *,
    device: str | None = None,
    dtype: str | None = None,
    config: Config = None,
    **settings: Unpack[Settings],
) -> Engine:
    """Load the models that are named onto a device, and make their engine.

    Args:
        model: hub name, folder, or .gguf file.
        reward_model: hub name, folder, or `module:function`; of several, each as NAME@WEIGHT, the weighted sum.
        device: None = cuda where there is one, else cpu.
        dtype: float32, bfloat16 or float16; None = as saved.

    Raises:
        ValueError, TypeError: a name, the device, the dtype or a setting is not usable, as `Engine` says.
        OSError: there is no such model.
    """
    resolved = resolve_config(config, settings)  # before anything is loaded
    check_path("model", model)
    place, kind = device_of(device), dtype_of(dtype)
    reward = reward_of([reward_model] if isinstance(reward_model, str) else reward_model, place, kind)
    loaded, tokenizer = load_language_model(model, None, trust_remote_code=False)
    return Engine(moved(loaded, place, kind), reward, tokenizer=tokenizer, config=resolved)


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
        return RewardModel(_function(name), weight=weight)
    check_path("reward_model", name)
    loaded = load_reward_model(name, None, trust_remote_code=False)
    return RewardModel(moved(loaded.model, device, dtype), loaded.tokenizer, weight=weight)


def moved(model: Any, device: str, dtype: torch.dtype | None) -> Any:
    """Move a model to a device; dtype: None = as it is."""
    return model.to(device=device, dtype=dtype)


def _function(name: str) -> Any:
    """Import `module:function`; the module may lie where the command is given."""
    module, function = name.split(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward_model {name}: {error}") from error


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


def rule_names() -> dict[str, type[Any]]:
    """Return the rules by the names that they have on a command line."""
    return {re.sub(r"(?<!^)(?=[A-Z])", "-", rule.__name__).lower(): rule for rule in RULES}


def rule_of(name: str | None, settings: dict[str, Any]) -> Rule | None:
    """Make the rule of this name, and take its settings out of `settings`; None = STARS, whose are `StarsConfig`'s."""
    names = rule_names()
    if name is None or names.get(name) is Stars:
        return None
    if name not in names:
        raise ValueError(f"rule is {name!r}, expected one of {', '.join(names)}{near_one(name, names)}")
    kind = names[name]
    own = {field.name for field in dataclasses.fields(kind)}
    given = {
        key: settings.pop(key) for key in [*settings] if key in own and (key in RULE_SETTINGS or key not in SETTINGS)
    }
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


def near_one(name: str, names: Iterable[str]) -> str:
    """Ask whether one of `names` was meant, if one is near."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {found[0].replace('_', '-')!r}?" if found else ""
