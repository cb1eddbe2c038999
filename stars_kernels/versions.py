"""The versions that stars_kernels is made for, and every condition on one of them."""

from __future__ import annotations

import platform
import warnings
from importlib import metadata

from packaging.version import Version

RANGES = {"python": ("3.11", "3.13"), "torch": ("2.11", "2.14"), "transformers": ("5.17", "5.24")}
"""The first and the last minor release, by package."""
TRITON = ("3.6", "3.9")
"""Of Triton, which only torch with CUDA needs."""
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
"""What a transformers model may call its cache: since 5.24 `cache`, before `past_key_values`, or for state space models
`cache_params`. Of those that a forward takes the first counts."""

ROPE_BY_MATMUL = "5.18"
"""The last release of transformers whose rotary phases are a matrix product, which TF32 would round."""


def check() -> None:
    """Refuse packages older than the range, and warn of newer ones.

    Raises:
        ImportError: one is missing or too old; the message names what was found, what is expected, and the remedy.
    """
    for name, (first, last) in RANGES.items():
        found = installed(name)
        if found is None:
            raise ImportError(f"stars_kernels needs {name} {first} to {last}, which is missing: pip install {name}")
        if release(found) < Version(first):
            remedy = f"pip install '{name}>={first}'" if name != "python" else "a newer Python"
            raise ImportError(f"stars_kernels needs {name} {first} to {last}, found {found}: {remedy}")
        if release(found) > Version(last):
            warnings.warn(
                f"stars_kernels is made for {name} {first} to {last}, found {found}, which is not tested",
                RuntimeWarning,
                stacklevel=3,
            )


def why_no_triton() -> str | None:
    """Return why the Triton kernels cannot run with what is installed, or None."""
    found = installed("triton")
    if found is None:
        return f"triton is missing: pip install 'triton>={TRITON[0]}'"
    if release(found) < Version(TRITON[0]):
        return f"triton {found} is installed, expected {TRITON[0]} to {TRITON[1]}"
    return None


def rope_by_matmul() -> bool:
    """Say whether the installed transformers computes rotary phases as a matrix product."""
    found = installed("transformers")
    return found is not None and release(found) <= Version(ROPE_BY_MATMUL)


def installed(name: str) -> str | None:
    """Return the version of an installed package, or of Python; None where it is missing."""
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> Version:
    """Return a version's minor release: 2.13 of "2.13.1a0+cu130"."""
    return Version(".".join(map(str, Version(version).release[:2])))
