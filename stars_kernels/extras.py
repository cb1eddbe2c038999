"""Libraries that come with an extra of this package, and are imported where they are used."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any


def require(name: str, extra: str) -> Any:
    """Import an optional library.

    Args:
        name: of the library's module.
        extra: of this package, which installs it.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    if find_spec(name.partition(".")[0]) is None:
        raise ImportError(f"{name} is not installed: pip install 'stars-kernels[{extra}]'")
    return importlib.import_module(name)
