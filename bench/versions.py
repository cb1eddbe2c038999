"""python -m bench.versions: what a run depends on, one line each: packages, compilers, driver, devices, commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = (
    *("torch", "triton", "transformers", "tokenizers", "huggingface_hub", "safetensors", "numpy", "accelerate", "peft"),
    *("pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "ninja", "setuptools", "scipy", "gguf", "vllm"),
)
ROOT = Path(__file__).parents[1]
MISSING = "missing"


def versions() -> dict[str, str]:
    """Return name: version, "missing" where there is none, and what torch says of the devices."""
    toolkit = f"{os.environ['PATH']}:{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
    nvcc, sanitizer = (shutil.which(name, path=toolkit) or name for name in ("nvcc", "compute-sanitizer"))
    return {
        "commit": commit(),
        "python": f"{platform.python_version()} ({sys.executable})",
        **{name: package(name) for name in PACKAGES},
        **devices(),
        "driver": first_line("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "nvcc": last_line(nvcc, "--version"),
        "compute-sanitizer": last_line(sanitizer, "--version"),
        "c++": first_line(os.environ.get("CXX", "c++"), "--version"),
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
    }


def commit() -> str:
    """The commit of this tree; where there is no .git, what STARS_COMMIT says."""
    return os.environ.get("STARS_COMMIT") or first_line("git", "-C", str(ROOT), "rev-parse", "HEAD")


def package(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return MISSING


def devices() -> dict[str, str]:
    """torch's CUDA, and its devices with compute capability and memory."""
    try:
        import torch
    except ImportError as error:
        return {"devices": f"torch cannot be imported: {error}"}
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    named = [f"{d.name} {d.major}.{d.minor}, {d.total_memory / 2**30:.0f} GiB" for d in found]
    return {"torch's CUDA": torch.version.cuda or MISSING, "devices": "; ".join(named) or "no CUDA device"}


def first_line(*command: str) -> str:
    return (_lines(*command) or [MISSING])[0]


def last_line(*command: str) -> str:
    return (_lines(*command) or [MISSING])[-1]


def _lines(*command: str) -> list[str]:
    """What a command prints; nothing where there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def main() -> int:
    for name, version in versions().items():
        print(f"{name}: {version}", flush=True)
    missing = [name for name in ("torch", "transformers") if package(name) == MISSING]
    if missing:
        print(f"expected an environment with {', '.join(missing)}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
