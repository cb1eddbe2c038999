"""`python -m bench.gpu_build` sees what is planted, and compiles for a GPU that is not there.

Run as a module, this file compiles: under pytest Triton may be in its interpreter (tests/conftest.py).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu_build, gpu_code
from bench.gpu_build import faults, joined, judge
from bench.gpu_code import Report

triton = pytest.importorskip("triton")
tl = triton.language

ROOT = Path(__file__).parents[1]
GOOD = Report("_fork_attention", 8, 0, 100, loads=128, stores=128, mma="8 HMMA")


@triton.jit
def planted(source, out, turns, STEP: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(source + at * STEP).to(tl.float32)
    for _ in range(turns):
        x -= tl.max(x)  # all values have to wait for the last one
    tl.store(out + at, x.to(tl.bfloat16))


def compile_planted() -> dict[str, list[Report]]:
    import torch

    from bench.gpu_cases import cases

    source = torch.empty(1 << 15, dtype=torch.bfloat16, device="meta")

    def report(data: str, step: int, values: int) -> list[Report]:
        gpu_code.DATA["planted"] = data
        size = 32 * values  # of one warp
        return gpu_code.compiled(lambda: planted[(1,)](source, source, 7, step, size, num_warps=1), "sm_90")

    case = next(case for case in cases() if case.name[0].startswith("Qwen") and case.name[2] == "bf16")
    return {
        "clean": report(r"tl\.load\(source", 1, 8),
        "narrow": report(r"tl\.load\(source", 2, 8),
        "not found": report(r"tl\.load\(elsewhere", 1, 16),
        "spills": report(r"tl\.load\(source", 1, 512),
        "engine": gpu_code.compiled(case.launch, "sm_90"),
        "amd": gpu_code.compiled(case.launch, gpu_code.AMD),
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-m", "tests.test_gpu_build"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return {name: [Report(*fields) for fields in reports] for name, reports in json.loads(run.stdout).items()}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("clean", []), ("narrow", ["narrow loads"]), ("not found", ["narrow loads"]), ("spills", ["spills in a loop"])],
)
def test_planted_faults_are_found(built, name, kinds, monkeypatch):
    monkeypatch.setitem(gpu_code.DATA, "planted", "")
    (report,) = built[name]
    assert list(faults("", report)) == kinds
    assert report.registers > 0 and report.warps == 1
    assert report.loads == {"clean": 128, "narrow": 16, "not found": 0, "spills": 128}[name]


def test_a_launch_of_the_engine_is_compiled(built):
    for reports in (built["engine"], built["amd"]):
        assert [report.kernel for report in reports] == ["_fork_attention", "_merge"]
    attention, merge = built["engine"]
    assert not faults("bf16", attention) and not faults("bf16", merge)
    assert re.match(r"\d+ HMMA\b", attention.mma) and attention.shared > 0  # 32 queries are few for HGMMA's 64
    assert built["amd"][0].shared > 0 and built["amd"][0].registers == 0


def test_faults_have_kinds():
    assert list(faults("bf16", GOOD._replace(mma="-"))) == ["no tensor cores"]
    assert not faults("fp32", GOOD._replace(mma="-"))
    assert list(faults("bf16", GOOD._replace(spills=(4, 4)))) == ["spills"]
    assert list(faults("bf16", GOOD._replace(spills=(400, 4)))) == ["large spills"]
    assert list(faults("bf16", GOOD._replace(spills=(4, 4), spills_in_loop=True))) == ["spills in a loop"]


def test_a_known_fault_is_excused_and_a_stale_one_is_not():
    rows = [("a case, bf16", [GOOD, GOOD._replace(loads=64), GOOD])]
    key = ("_fork_attention", "narrow loads", "^a case")
    wrong, _ = judge(rows, {})
    assert len(wrong) == 1 and "sm_90: narrow loads, 64 bits" in wrong[0]
    wrong, known = judge(rows, {key: "For a reason."})
    assert not wrong and "For a reason." in known[0]
    (wrong,), _ = judge([("a case, bf16", [GOOD] * 3)], {key: "For a reason."})
    assert wrong == "_fork_attention, narrow loads, ^a case: is in KNOWN, but gone"
    assert judge(rows, {(*key[:2], "^another"): "For a reason."})[0]


def test_names_that_differ_in_one_part_are_joined():
    assert joined([("a", "x", "1"), ("b", "x", "1"), ("a", "y", "1"), ("b", "y", "1")]) == "a + b, x + y, 1"
    assert joined([("a", "x", "1"), ("b", "y", "1")]) == "a, x, 1; b, y, 1"


def test_check_compares_only_with_a_table_of_the_same_compilers(tmp_path, capsys, monkeypatch):
    reports = [GOOD, GOOD, GOOD, Report("_fork_attention", 8, 0)]
    file = tmp_path / "table.md"
    file.write_text(gpu_build.document([("case", reports)], []))
    assert gpu_build.check(file, file.read_text())
    worse = gpu_build.document([("case", [GOOD._replace(registers=101), *reports[1:]])], [])
    assert not gpu_build.check(file, worse)
    assert "-| `_fork_attention` | case | 8 | 100 |" in (out := capsys.readouterr().out) and "101 / 100 / 100" in out
    file.write_text(file.read_text().replace(gpu_build.versions(), "Triton 0, another one"))
    assert gpu_build.check(file, worse)  # another Triton's
    assert "NOT COMPARED" in capsys.readouterr().out
    monkeypatch.setattr(gpu_build, "TABLES", {triton.__version__: file})
    assert not gpu_build.check(file, worse)  # the installed Triton's own, so it is out of date
    assert "NOT COMPARED" in capsys.readouterr().out


@pytest.mark.parametrize("pins", ["constraints.txt", ".ci/pins/torch-2.11.txt"])
def test_the_committed_tables_are_of_the_pinned_tritons_and_of_every_kernel(pins):
    (version,) = re.findall(r"^triton==(.+)", (ROOT / pins).read_text(), re.MULTILINE)
    table = gpu_build.TABLES[version].read_text()
    assert f"with Triton {version}, ptxas" in table and "None of this has run on a GPU" in table
    assert f"sources: {gpu_build.sources()}." in table, "write the table anew: CONTRIBUTING.md"
    for file in (ROOT / "stars_kernels/ops/triton").glob("*.py"):
        for kernel in re.findall(r"\b(_\w+)\[\(", file.read_text()):
            assert f"| `{kernel}` |" in table, kernel


if __name__ == "__main__":
    print(json.dumps(compile_planted()))
