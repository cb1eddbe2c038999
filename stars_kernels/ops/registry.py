"""The registry of ops: each has one schema, and a definition in PyTorch that runs anywhere.

Every op is defined in Python, because it must exist without a compiler. Its definition is registered for all devices;
kernels take the keys of their own devices (`stars_kernels.ops.dispatch`), and the dispatcher picks.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch

LIBRARY = torch.library.Library("stars", "DEF")
DEVICES = ("cpu", "cuda")

definitions: dict[str, Callable[..., Any]] = {}
"""Op -> its PyTorch definition."""
_force_definitions = contextvars.ContextVar("stars_force_definitions", default=False)


def define_op(schema: str, definition: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Register op `schema` with its PyTorch `definition` (every device) and its `fake`; returns the op's name."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, definition, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stars::{name}", fake, lib=LIBRARY)
    definitions[name] = definition
    return name


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Within this block every op runs its PyTorch definition, whatever is compiled."""
    token = _force_definitions.set(True)
    try:
        yield
    finally:
        _force_definitions.reset(token)


def is_forced() -> bool:
    """Return whether this is inside of `reference()`."""
    return _force_definitions.get()
