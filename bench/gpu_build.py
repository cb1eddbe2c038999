"""Compile every Triton kernel for four GPUs with none at hand, and read what came out: python -m bench.gpu_build.

The launchers run on tensors without data under a driver that names a target, so signatures, specialisations and launch
settings are the real ones. What ptxas and the disassembler say becomes one table; what must not be fails the command.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

from bench.gpu_code import AMD, DATA, NVIDIA, Report, compiled

AMD_SHARED = 65536  # bytes a program may have on a gfx942
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TABLES = {"3.9.0": DOCS / "gpu_build.md", "3.6.0": DOCS / "gpu_build_triton_3.6.md"}
"""The document of each Triton that is compiled with."""
SMALL_SPILL = 64  # bytes stored, outside loops

Known = dict[tuple[str, str, str], str]
KNOWN: Known = {
    ("_fork_attention", "spills in a loop", "^Gemma-2-2B 8/4 x 256, "): (
        "Tiles of head size 256 fill the registers, and the kernel has a second pass, for values that are not finite."
    ),
}
"""(kernel, fault, pattern of its cases): why it stays. One that is gone is a fault itself."""
KNOWN_OF: dict[str, Known] = {}
"""The same of one Triton, by its release."""
TENSOR_CORES = ("_fork_attention", "_lm_head_race")  # in half precision


Built = list[tuple[tuple[str, str, str], list[Report]]]
"""Cases with the kernels that they launch."""
Rows = list[tuple[str, list[Report]]]
"""The cases of a kernel with its reports by target."""


def build(target: str) -> Built:
    from bench.gpu_cases import cases

    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")  # the launchers' choice, not this command's
    built = []
    for case in cases():
        try:
            built.append((case.name, compiled(case.launch, target)))
        except Exception as error:  # not all of Triton's get back from a process
            raise RuntimeError(f"{case.name} for {target}: {error!r}") from None
    return built


def by_kernel(built: list[Built]) -> Rows:
    """One row for equal reports on all targets, which are in the order of `built`; kernels in the order of DATA."""
    rows: dict[tuple[Report, ...], list[tuple[str, ...]]] = {}
    for calls in zip(*built, strict=True):
        for reports in zip(*(launched for _, launched in calls), strict=True):
            rows.setdefault(reports, []).append(calls[0][0])
    place = [*DATA, *(reports[0].kernel for reports in rows)]
    return sorted(
        ((joined(names), list(reports)) for reports, names in rows.items()), key=lambda r: place.index(r[1][0].kernel)
    )


def joined(names: list[tuple[str, ...]]) -> str:
    """Names that differ in one part alone become one."""
    for i in range(3):
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            groups.setdefault(name[:i] + name[i + 1 :], []).append(name[i])
        names = [(*rest[:i], " + ".join(dict.fromkeys(parts)), *rest[i:]) for rest, parts in groups.items()]
    return "; ".join(", ".join(name) for name in names)


def faults(case: str, r: Report) -> dict[str, str]:
    """What must not be: kind to figures."""
    found = {}
    if any(r.spills):
        kind = "spills in a loop" if r.spills_in_loop else "large spills" if r.spills[0] > SMALL_SPILL else "spills"
        found[kind] = f"{r.spills[0]} bytes stored, {r.spills[1]} loaded"
    if r.kernel in DATA and r.loads < 128:
        found["narrow loads"] = f"{r.loads} bits" if r.loads else f"none match {DATA[r.kernel]}"
    if r.kernel in TENSOR_CORES and "fp32" not in case and r.mma == "-":
        found["no tensor cores"] = "in half precision"
    return found


def judge(rows: Rows, known: Known) -> tuple[list[str], list[str]]:
    """Lines of what is wrong, and of what is known."""
    found: dict[tuple[str, str, str, str], list[str]] = {}  # kernel, kind, case, figures: targets
    for case, reports in rows:
        for target, r in zip(NVIDIA, reports, strict=False):
            for kind, figures in faults(case, r).items():
                found.setdefault((r.kernel, kind, case, figures), []).append(target)
    wrong, excused, met = [], [], set()
    for (kernel, kind, case, figures), targets in found.items():
        line = f"`{kernel}`, {case}, {' / '.join(targets)}: {kind}, {figures}"
        key = next((k for k in known if k[:2] == (kernel, kind) and re.search(k[2], case)), None)
        met.add(key)
        if key is None:
            wrong.append(line)
        else:
            excused.append(f"- {line}. {known[key]}")
    return wrong + [f"{', '.join(key)}: is in KNOWN, but gone" for key in known if key not in met], excused


def document(rows: Rows, known: list[str]) -> str:
    def cell(*values: object) -> str:
        return " / ".join(map(str, values)) if len(set(values)) > 1 else str(values[0])

    head = ("kernel", "case", "warps", "registers", "spills", "shared", "loads", "stores", "tensor cores", AMD)
    lines = [head, ("---",) * len(head)]
    for case, (*r, amd) in rows:
        lines.append((
            f"`{r[0].kernel}`", case, cell(*(x.warps for x in r)), cell(*(x.registers for x in r)),
            cell(*(f"{x.spills[0]}+{x.spills[1]}" if any(x.spills) else 0 for x in r)), cell(*(x.shared for x in r)),
            cell(*(x.loads or "" for x in r)), cell(*(x.stores for x in r)), cell(*(x.mma for x in r)),
            "compiles" if amd.shared <= AMD_SHARED else f"compiles; takes {amd.shared} of {AMD_SHARED} bytes shared",
        ))  # fmt: skip
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    known = known or ["- none"]
    return (
        HEADING.format(versions=versions(), sources=sources(), amd=AMD)
        + table
        + "\n\n## Exceptions\n\n"
        + "\n".join(known)
        + "\n"
    )


HEADING = """# The Triton kernels, compiled ahead of time

**None of this has run on a GPU.** It says what the compilers made of each kernel, not that it is right or fast.
Written by [bench/gpu_build.py](../bench/gpu_build.py) with {versions}. A hash of
the kernels' and the cases' sources: {sources}.

A row is a kernel and its cases with equal figures: on sm_80 / sm_90 / sm_100, or one figure where they agree.

- case: heads/key heads x size, vocabulary (x features), or features; the call; the dtype
- registers: of a thread; spills: bytes that a thread stores + loads; shared: bytes
- loads: bits of the narrowest load that carries data, not an index; stores: bits of the widest one
- tensor cores: instructions in the machine code, all loops together
- {amd}: that it compiles, and whether its shared memory suffices

"""


def versions() -> str:
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version

    old, new = (re.search(r"V([\d.]+)", get_ptxas_version(arch)) for arch in (80, 100))
    return f"Triton {triton.__version__}, ptxas {old and old[1]} for sm_80 and {new and new[1]} for sm_90 and sm_100"


def sources() -> str:
    """A hash of what the compilers are given, by which tests/test_gpu_build.py knows a table of other kernels."""
    files = [*sorted((ROOT / "stars_kernels/ops/triton").glob("*.py")), ROOT / "bench/gpu_cases.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def table() -> Path | None:
    """The document of the installed Triton."""
    return TABLES.get(metadata.version("triton"))


def check(file: Path, text: str) -> bool:
    """Whether `text` is what the file holds; with a document of another Triton there is nothing to compare."""
    committed = file.read_text()
    if versions() not in committed:
        print(f"NOT COMPARED with {file}: it was not written with {versions()}")
        return file.resolve() != table()
    diff = difflib.unified_diff(committed.splitlines(), text.splitlines(), str(file), "now", lineterm="", n=0)
    print("\n".join(lines := list(diff)) or f"{file} agrees")
    return not lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_build", description=__doc__)
    own = {"type": Path, "metavar": "FILE", "nargs": "?", "const": table()}
    parser.add_argument(
        "--write", **own, help="write the table here, or without a name where the installed Triton's is"
    )
    parser.add_argument("--check", **own, help="compare with this table, or with the installed Triton's")
    args = parser.parse_args()
    if table() is None and {"--write", "--check"} & {*sys.argv} and not args.write and not args.check:
        parser.error(f"Triton {metadata.version('triton')} has no table, only {', '.join(TABLES)}: name a FILE")
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
        with ProcessPoolExecutor(min(4, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
            rows = by_kernel(list(pool.map(build, (*NVIDIA, AMD))))
    wrong, known = judge(rows, KNOWN | KNOWN_OF.get(metadata.version("triton"), {}))
    text = document(rows, known)
    if args.write:
        args.write.write_text(text)
    agrees = check(args.check, text) if args.check else True
    if not args.write and not args.check:
        print(text)
    print("\n".join(wrong) or f"{len(rows)} kernels for {len(NVIDIA) + 1} targets: nothing wrong")
    return int(bool(wrong) or not agrees)


if __name__ == "__main__":
    sys.exit(main())
