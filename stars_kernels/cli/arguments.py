"""What the words of a command line mean: models, reward models, rules and settings."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from stars_kernels.decoder.naming import SETTINGS, near, rule_of
from stars_kernels.hf.loading.language_model import check_path
from stars_kernels.hf.loading.reward_model import load_reward_model
from stars_kernels.hf.scoring.reward_model import Reward, RewardModel

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""`module:function`, as of a reward function."""
WEIGHTED = re.compile(r"(.+)@([^@]+)")
"""`NAME@WEIGHT`, of a reward model among several."""


class UsageError(ValueError):
    """What a command was given cannot be meant."""


def reward_of(names: Iterable[str], device: str, dtype: torch.dtype | None) -> Reward:
    """Load the reward model that is named: a hub name, a folder or `module:function`; of several the weighted sum."""
    parts = [_part(name, device, dtype) for name in names]
    if not parts:
        raise UsageError("--reward-model is missing, expected a hub name, a folder, or module:function")
    return parts


def _part(name: str, device: str, dtype: torch.dtype | None) -> RewardModel:
    weighted, weight = WEIGHTED.fullmatch(name), 1.0
    if weighted and _number(weighted[2]) is not None and not Path(name).exists():
        name, weight = weighted[1], float(weighted[2])
    if FUNCTION.fullmatch(name) and not Path(name).exists():
        return RewardModel(function_of("--reward-model", name), weight=weight)
    check_path("--reward-model", name)
    loaded = load_reward_model(name, None, trust_remote_code=False)
    return RewardModel(moved(loaded.model, device, dtype), loaded.tokenizer, weight=weight)


def moved(model: Any, device: str, dtype: torch.dtype | None) -> Any:
    """Move a model to a device; dtype: None = as it is."""
    return model.to(device=device, dtype=dtype)


def function_of(option: str, name: str) -> Any:
    """Import `module:function`, which an option names; the module may lie where the command is given."""
    if not FUNCTION.fullmatch(str(name)):
        raise UsageError(f"{option} is {name!r}, expected module:function")
    module, function = name.split(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{option} {name}: {error}") from error


def parsed(pairs: Iterable[str]) -> dict[str, Any]:
    """Read `name=value` pairs, the values as YAML has them: 3, 0.5, true, [8, 4], null, text."""
    found = dict[str, Any]()
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--set is {pair!r}, expected NAME=VALUE")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {pair!r}: the value is not YAML: {error}") from None
        number = _number(value) if isinstance(value, str) else None  # YAML 1.1 takes 1e-3 for text
        found[name.replace("-", "_")] = value if number is None else number
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class _OnceLoader(yaml.SafeLoader):
    """Reads YAML as `safe_load` does, but refuses a key that comes twice, of which that would drop the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {twice!r} is there twice, expected it once")
        return super().construct_mapping(node, deep)


def merged(file: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a YAML file, and over them those that were given: those that are not None."""
    options = dict[str, Any]()
    if file is not None:
        try:
            data = yaml.load(file.read_text(encoding="utf-8"), _OnceLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} is not YAML: {error}") from None
        if not isinstance(data, Mapping):
            raise UsageError(
                f"{file} is of type {type(data).__name__}, expected options, one a line: max-new-tokens: 64"
            )
        options = {str(name).replace("-", "_"): value for name, value in data.items()}
    return options | {name: value for name, value in given.items() if value is not None}


def settings_of(options: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Take the settings of a call out of options, and refuse what is neither a setting nor `known` to the command."""
    known = set(known)
    settings = {name: value for name, value in options.items() if name not in known}
    rule = rule_of(options.get("rule"), settings, "--rule")
    for name in settings:
        if name not in SETTINGS:
            flags = [other.replace("_", "-") for other in (*SETTINGS, *known)]
            hint = near(name.replace("_", "-"), flags) or f", expected one of {sorted(known)} or a setting"
            raise UsageError(f"unknown option {name.replace('_', '-')!r}{hint}")
    return settings if rule is None else {**settings, "rule": rule}
