"""Compile a launch for a GPU that is not there; read registers, spills, load widths and tensor core instructions."""

from __future__ import annotations

import contextlib
import io
import linecache
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

NVIDIA, AMD = ("sm_80", "sm_90", "sm_100"), "gfx942"
DATA = {  # kernel: the source lines whose loads carry its data; indices and lengths may be narrow
    "_fork_attention": r"tl\.load\((k_at|v_at)\b",
    "_merge": r"tl\.load\(partial\b",
    "_race": r"tl\.load\(logits \+ at",
    "_groups": r"tl\.load\(logits \+ at",
    "_gather": r"tl\.load\(logits \+ row",
    "_lm_head_race": r"tl\.load\(w \+ d\b",
    "_reward_head": r"tl\.load\((hidden|weight|norm_weight) \+ d\b",
    "_rms_norm": r"tl\.load\((x \+ row|weight) \+ d\b",
    "_add_rms_norm": r"tl\.load\((x \+ row|residual \+ row|weight) \+ d\b",
    "_gated": r"tl\.load\((gate|up) \+ row",
    "_rotary_store": r"tl\.load\((source|value) \+",
    "_commit": r"tl\.load\(suffix \+ word",
}
MMA = r"[HQIO]MMA|HGMMA|UTC[HQIO]MMA"


class Report(NamedTuple):
    """A compiled kernel; for AMD the first three alone."""

    kernel: str
    warps: int
    shared: int  # bytes
    registers: int = 0
    spills: tuple[int, int] = (0, 0)  # bytes stored, loaded
    spills_in_loop: bool = False
    loads: int = 0  # bits of the narrowest load of data; 0: none found
    stores: int = 0  # bits of the widest store
    mma: str = "-"  # tensor core instructions


class Driver:
    """What Triton asks before it compiles; devices are named after their target, as kernels are kept by device."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.name = target
        self.target = GPUTarget("hip", target, 64) if target == AMD else GPUTarget("cuda", int(target[3:]), 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str | None = None) -> int:
        return 0


def compiled(launch: Callable[[], Any], target: str) -> list[Report]:
    """A report of each kernel that `launch` would launch on `target`, in order."""
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, reports = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as log:  # empty where this process has compiled it before
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in _reports:
            _reports[kernel.hash] = read(kernel, log.getvalue())
        reports.append(_reports[kernel.hash])

    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    driver.set_active(Driver(target))
    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    return reports


_reports: dict[str, Report] = {}


def variants(launches: Iterable[Callable[[], Any]], target: str) -> Counter[str]:
    """How often `target` would compile each kernel, by name, for all `launches` together. Nothing is compiled."""
    from triton import knobs
    from triton.runtime import driver

    keys = set()

    def counted(*, key: str, fn: Any, **_: Any) -> bool:
        keys.add((fn.name, key))
        return True  # do not compile

    driver.set_active(Driver(target))
    knobs.runtime.jit_cache_hook = counted
    try:
        for launch in launches:
            launch()
    finally:
        knobs.runtime.jit_cache_hook = None
    return Counter(name for name, _ in keys)


def read(kernel: Any, log: str) -> Report:
    report = Report(kernel.name, kernel.metadata.num_warps, kernel.metadata.shared)
    if "cubin" not in kernel.asm:
        return report
    used = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not used or not spills:
        raise RuntimeError(f"{kernel.name}: no registers and spills in what ptxas says:\n{log}")
    loads, stores = accesses(kernel.asm["ptx"], DATA.get(kernel.name))
    in_loop, wide, mma = read_code(disassembly(kernel.asm["cubin"]))
    if wide < sum(bits >= 128 for bits in loads):
        raise RuntimeError(f"{kernel.name}: loads of {loads} bits in the PTX, {wide} wide ones in the machine code")
    return report._replace(
        registers=int(used[1]), spills=(int(spills[1]), int(spills[2])), spills_in_loop=in_loop,
        loads=min(loads, default=0), stores=max(stores, default=0), mma=mma,
    )  # fmt: skip


def accesses(ptx: str, data: str | None) -> tuple[list[int], list[int]]:
    """Bits of each global load on a source line that matches `data`, and of each global store.

    From the PTX: the machine code has wrong lines for loads, as LLVM counts a line on with each of a multi-line asm.
    """
    files = {number: path for number, path in re.findall(r'\.file\s+(\d+) "(.+?)"', ptx)}
    access = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.\w(\d+) |cp\.async\.c[ag]\S* .*?\], .*?\], (\w+)")
    loads, stores, source, inside, first = [], [], "", False, False
    for line in ptx.splitlines():
        if "inline asm" in line:
            inside = first = "begin" in line
        elif place := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            if first or not inside:
                source = linecache.getline(files[place[1]], int(place[2]))
        else:
            first = False
            if found := access.search(line):
                kind, vector, bits, size = found.groups()
                width = 8 * int(size, 0) if size else int(vector or 1) * int(bits)
                if kind == "st":
                    stores.append(width)
                elif data and re.search(data, source):
                    loads.append(width)
    return loads, stores


def disassembly(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "--print-code", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_code(code: str) -> tuple[bool, int, str]:
    """Whether a spill lies between a backward branch and its target; loads of 16 bytes; tensor core instructions."""
    labels: dict[str, int] = {}
    spills, loops, wide, mma = [], [], 0, Counter[str]()
    for number, line in enumerate(code.splitlines()):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = number
        elif branch := re.search(r"\bBRA\b.*\((\.L_\w+)\)", line):
            if branch[1] in labels:
                loops.append((labels[branch[1]], number))
        elif re.search(r"\b(LDL|STL)\b", line):
            spills.append(number)
        elif re.search(r"\bLDG(STS)?\b[.\w]*\.(128|256)\b", line):
            wide += 1
        elif name := re.search(rf"\b({MMA})\b", line):
            mma[name[1]] += 1
    in_loop = any(first < spill < last for spill in spills for first, last in loops)
    return in_loop, wide, ", ".join(f"{count} {name}" for name, count in mma.items()) or "-"
