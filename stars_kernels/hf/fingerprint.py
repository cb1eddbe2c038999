"""Fingerprints of models: by them a calibration is known to belong to the models that it is used with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import fields

import torch
from torch import Tensor, nn

from stars_kernels.hf.scoring.reward_model import Likelihood, RewardModel, is_function

SAMPLES = 16
"""Numbers of each parameter that are read: training changes all of them."""


def fingerprint_of(model: nn.Module) -> str:
    """Return a module's class and a hash of its parameters: names, shapes, dtypes and SAMPLES numbers of each.

    A change of a few single weights may go unseen. Nothing depends on the device.
    """
    digest = hashlib.blake2b(digest_size=8)
    sampled: dict[torch.device, list[Tensor]] = {}
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {type(parameter).__name__}\n".encode())
        if type(parameter) is nn.Parameter and parameter.numel():  # a quantized weight has no plain numbers
            flat = parameter.detach().reshape(-1)
            sampled.setdefault(flat.device, []).append(flat[:: -(-flat.numel() // SAMPLES)].double())
    for parts in sampled.values():
        digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return f"{type(model).__name__} {digest.hexdigest()}"


def reward_fingerprint(parts: Iterable[tuple[RewardModel, nn.Module | None]]) -> str:
    """Return the fingerprint of a reward: of each part as it was described, and as it was loaded.

    A function is known by its name, and so is a template that is one.
    """
    return " + ".join(_part(described, loaded) for described, loaded in parts)


def _part(described: RewardModel, loaded: nn.Module | None) -> str:
    given = described.model
    if loaded is not None:
        kind = ("likelihood " if isinstance(given, Likelihood) else "") + fingerprint_of(loaded)
    else:
        kind = f"function {_name(given)}" if is_function(given) else os.fspath(str(given))
    settings = [
        f"{field.name}={_name(value)}"
        for field in fields(described)
        if field.name not in ("model", "tokenizer") and (value := getattr(described, field.name)) != field.default
    ]
    return " ".join([kind, *settings])


def _name(value: object) -> str:
    if not callable(value):
        return repr(value)
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
