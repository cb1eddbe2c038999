"""The machine in words and in two measured rates, and the least time it needs for a list of forwards."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

READ_BYTES = 512 * 2**20  # far beyond any cache
GEMM_SIZE = 2048
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
        """Seconds for `forwards`: each is bound by reading its weights or by multiplying with them.

        Attention, KV reads, sampling and Python count as free, so the floor is a little too low.
        """
        return sum(
            max(f.weight_bytes / self.read_bytes_per_second, f.flops / self.gemm_flops_per_second) for f in forwards
        )


def measure(dtype: torch.dtype = torch.float32) -> Rates:
    """Reading by a sum over a large buffer, multiplying by a square product: the best of a few rounds."""
    buffer = torch.ones(READ_BYTES // dtype.itemsize, dtype=dtype)
    square = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype)
    return Rates(READ_BYTES / _best(buffer.sum), 2 * GEMM_SIZE**3 / _best(lambda: square @ square))


def describe(rates: Rates) -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "read_gb_per_second": round(rates.read_bytes_per_second / 1e9, 1),
        "gemm_gflops_per_second": round(rates.gemm_flops_per_second / 1e9, 1),
    }


def _best(work: Callable[[], Any]) -> float:
    work()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
