"""`stars env` and `stars families`: what runs here, and which models."""

from __future__ import annotations

import platform
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stars_kernels.data.manifest import versions
from stars_kernels.hf.by_name import device_of
from stars_kernels.hf.families import CLASSIFIERS, WORKS
from stars_kernels.ops import backends


def env() -> None:
    """Tell what answers and speed depend on: versions, devices, and which version of each op runs here."""
    table = Table("what", "found", title="environment")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {**versions(device_of(None)), "platform": platform.platform(), "threads": str(torch.get_num_threads())}
    for name, value in {**found, "GPU": ", ".join(devices) or "none"}.items():
        table.add_row(name, value)
    ops = Table("op", "CPU", "CUDA", title="versions of the ops")
    for op, here in backends().items():
        ops.add_row(op, here["cpu"], here["cuda"])
    for one in (table, ops):
        Console().print(one)


def families(find: Annotated[str, typer.Argument(help="Part of a class's name.")] = "") -> None:
    """List the model classes that are decoded, and how; of reward models, the sequence classifiers."""
    table = Table("class", "as a language model", "as a reward model")
    for name in sorted({*WORKS, *CLASSIFIERS}, key=str.lower):
        if find.lower() in name.lower():
            table.add_row(name, WORKS.get(name, ""), "classifier" if name in CLASSIFIERS else "")
    Console().print(table if table.row_count else f"no class has {escape(repr(find))} in its name")
