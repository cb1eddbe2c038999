"""What serves each op: loads the compiled kernels at the first call, runs ops, and says which version runs and why.

The compiled extension takes the CPU key of the ops it implements (and the CUDA key of those it has in CUDA), the Triton
launchers take the CUDA key of theirs where that is free. Nothing falls back in silence: `backends()` says what serves
each op, and what is missing warns at the first op call.
"""

from __future__ import annotations

import importlib
import json
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from stars_kernels.ops.registry import DEVICES, LIBRARY, definitions, is_forced
from stars_kernels.versions import why_no_triton

CUDA_OPS = ("accept",)
"""What the extension has for a GPU where it is built with CUDA. Triton has it too, for where it is not."""

REBUILD = "pip install --force-reinstall --no-deps stars-kernels, or . in its folder"
"""What compiles the extension for the torch that is installed."""

_launched: set[str] = set()  # the ops whose CUDA key holds a Triton launcher


def call_op(name: str, *args: Any) -> Any:
    """Run op `name` through the dispatcher, or its definition inside `reference()`."""
    if is_forced():
        return definitions[name](*args)
    _load()
    return getattr(torch.ops.stars, name).default(*args)


@lru_cache(maxsize=1)
def build_info() -> dict[str, Any]:
    """Read what setup.py left behind: {"extension", "reason", "torch", "cuda", "cuda_reason"}, or nothing."""
    file = Path(__file__).parents[1] / "_build_info.json"
    info: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return info


@lru_cache(maxsize=1)
def load_extension() -> str | None:
    """Load the compiled extension once. Returns None when it is loaded, else the reason why it is not."""
    info = build_info()
    if info.get("extension") is False:
        return f"it was not built: {info['reason']}; to see the build's output: STARS_BUILD_EXT=1 {REBUILD}"
    built_for = info.get("torch", torch.__version__)
    if built_for != torch.__version__:
        return f"it was built for torch {built_for} but torch {torch.__version__} is installed: {REBUILD}"
    try:
        importlib.import_module("stars_kernels._C")
    except ImportError as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def load_triton() -> str | None:
    """Give the CUDA keys that the extension leaves to the Triton launchers, once.

    Returns None when they have them, else the reason why not.
    """
    load_extension()
    if reason := why_no_triton():
        return reason
    try:
        launchers = importlib.import_module("stars_kernels.ops.triton").LAUNCHERS
    except ImportError as error:
        return str(error)
    for name, launcher in launchers.items():
        if not has_kernel(name, "cuda"):
            LIBRARY.impl(name, launcher, "CUDA")
            _launched.add(name)
    return None


def has_kernel(name: str, device: str) -> bool:
    """Say whether op `name` has a kernel for `device` besides its definition."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"stars::{name}", device.upper()))


@lru_cache(maxsize=1)
def _load() -> None:
    missing = {"its compiled extension": load_extension()}
    triton = load_triton()
    if torch.cuda.is_available():
        missing["its Triton kernels"] = triton
    for what, reason in missing.items():
        if reason is not None:
            warnings.warn(
                f"stars_kernels runs without {what} ({reason}). Results are the same, speed is not.",
                RuntimeWarning,
                stacklevel=4,
            )


def backend(name: str, device: str) -> str:
    """Say which implementation serves op `name` on `device` ("cpu" | "cuda"): "cpp" | "cuda" | "triton", or
    "definition: <why>"."""
    if is_forced():
        return "definition: forced by stars_kernels.reference()"
    extension, triton = load_extension(), load_triton()
    if has_kernel(name, device):
        return "cpp" if device == "cpu" else "triton" if name in _launched else "cuda"
    missing = []
    if device == "cuda" and triton is not None:
        missing.append(f"no Triton kernels ({triton})")
    if device == "cpu" or name in CUDA_OPS:
        if extension is not None:
            missing.append(f"no compiled extension ({extension})")
        elif device == "cuda":
            missing.append(f"the extension was built without CUDA ({build_info().get('cuda_reason')})")
    return f"definition: {'; '.join(missing) or f'this release has no {name} kernel for {device}'}"


def backends() -> dict[str, dict[str, str]]:
    """Say, for each op and device, which implementation serves it, and why not a better one."""
    return {name: {device: backend(name, device) for device in DEVICES} for name in definitions}
