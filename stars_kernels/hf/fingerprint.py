"""Fingerprints of models: by them a calibration is known to belong to the models that it is used with."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import fields
from types import CodeType

import torch
from torch import Tensor, nn

from stars_kernels.hf.scoring.reward_model import Likelihood, RewardModel

SAMPLES = 16
"""Numbers of each parameter that are read: training changes all of them."""


def fingerprint_of(model: nn.Module) -> str:
    """Return a module's class and a hash of its parameters: names, shapes, dtypes and SAMPLES numbers of each.

    A change of a few single weights may go unseen. Nothing depends on the device.
    """
    digest, sampled = hashlib.blake2b(digest_size=8), list[Tensor]()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {type(parameter).__name__}\n".encode())
        if type(parameter) is nn.Parameter and parameter.numel():  # a quantized weight has no plain numbers
            flat = parameter.detach().reshape(-1)
            sampled.append(flat[:: -(-flat.numel() // SAMPLES)].double().cpu())
    if sampled:
        digest.update(torch.cat(sampled).numpy().tobytes())
    return f"{type(model).__name__} {digest.hexdigest()}"


def reward_fingerprint(parts: Iterable[tuple[RewardModel, nn.Module | None]]) -> str:
    """Return the fingerprint of a reward: of each part as it was described, and as it was loaded.

    A function is known by its module and name, a lambda by its code too; so is a template that is one.
    """
    return " + ".join(_part(described, loaded) for described, loaded in parts)


def _part(described: RewardModel, loaded: nn.Module | None) -> str:
    given = described.model
    if loaded is None:
        kind = f"function {_name(given)}"
    else:
        kind = ("likelihood " if isinstance(given, Likelihood) else "") + fingerprint_of(loaded)
    settings = [
        f"{field.name}={_name(value)}"
        for field in fields(described)
        if field.name not in ("model", "tokenizer") and (value := getattr(described, field.name)) != field.default
    ]
    return " ".join([kind, *settings])


def _name(value: object) -> str:
    if not callable(value):
        return repr(value)
    if isinstance(value, functools.partial):
        return f"partial({_name(value.func)}, {value.args}, {value.keywords})"
    code = getattr(value, "__code__", None)
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if code is None or "<lambda>" not in name:
        return name
    return f"{name} {hashlib.blake2b(_said(code), digest_size=8).hexdigest()}"


def _said(code: CodeType) -> bytes:
    """What a function's code does, that of the functions inside of it included."""
    parts = [_said(c) if isinstance(c, CodeType) else repr(c).encode() for c in code.co_consts]
    return b"\n".join([code.co_code, repr(code.co_names).encode(), *parts])
