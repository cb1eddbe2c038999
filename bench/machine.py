"""The machine in words and in two measured rates, and the least time it needs for a list of forwards."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.versions import commit, first_line

READ_BYTES = {"cpu": 512 * 2**20, "cuda": 2 * 2**30}  # far beyond any cache
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
GEMM_DTYPE = {
    "cpu": torch.float32,
    "cuda": torch.bfloat16,
}  # a GPU's floor is that of its tensor cores, for every dtype
ROUNDS = 5


@dataclass(frozen=True)
class Forward:
    """The work of one forward that no implementation can avoid."""

    weight_bytes: int
    """Every weight that takes part is read once."""
    flops: int
    """2 x weights x tokens; of the output layer, only the tokens whose logits are asked for."""
    seconds: float = 0.0
    """It took."""


@dataclass(frozen=True)
class Rates:
    read_bytes_per_second: float
    gemm_flops_per_second: float

    def floor(self, forwards: Sequence[Forward]) -> float:
        """Return the least seconds for `forwards`: each is bound by reading its weights or by multiplying with them.

        Attention, KV reads, sampling and Python count as free, so the floor is a little too low.
        """
        return sum(
            max(f.weight_bytes / self.read_bytes_per_second, f.flops / self.gemm_flops_per_second) for f in forwards
        )


def measure(device: str = "cpu") -> Rates:
    """Measure reading by a sum over a large buffer and multiplying by a square product, each the best of a few."""
    bytes_read, size, dtype = READ_BYTES[device], GEMM_SIZE[device], GEMM_DTYPE[device]
    buffer = torch.ones(bytes_read // 4, dtype=torch.float32, device=device)
    square = torch.ones(size, size, dtype=dtype, device=device)
    return Rates(bytes_read / _best(buffer.sum, device), 2 * size**3 / _best(lambda: square @ square, device))


def wait(device: torch.device | str) -> None:
    """Wait for all that a GPU has been given to do; a CPU has done it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def describe(rates: Rates, device: str = "cpu") -> dict[str, Any]:
    return {
        **facts(device),
        "read_gb_per_second": round(rates.read_bytes_per_second / 1e9, 1),
        "gemm_gflops_per_second": round(rates.gemm_flops_per_second / 1e9, 1),
    }


def facts(device: str = "cpu") -> dict[str, Any]:
    """Return what is known of the machine without measuring."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **(_gpu() if device == "cuda" else {}),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def _best(work: Callable[[], Any], device: str) -> float:
    work()
    seconds = []
    for _ in range(ROUNDS):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _gpu() -> dict[str, Any]:
    import triton

    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "gpu_gb": round(device.total_memory / 1e9, 1),
        "compute_capability": f"{device.major}.{device.minor}",
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "gemm_dtype": str(GEMM_DTYPE["cuda"]).removeprefix("torch."),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
