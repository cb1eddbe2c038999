"""bench/gpu.sh with a stand-in for python: the order of its parts, their limits, the table, the report."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from zipfile import ZipFile

import pytest

from bench import gpu_report

ROOT = Path(__file__).parents[1]
PARTS = ["versions", "build", "ops", "kernels", "decoder", "first", "sanitizer"]
COMMANDS = {
    "versions": "-m bench.versions",
    "build": "setup.py --quiet build_ext --inplace",
    "ops": "/ops.xml",
    "kernels": "/kernels.xml",
    "decoder": "/decoder.xml",
    "first": "-m bench first",
    "sanitizer": "/sanitizer.xml",
}
STUB = """#!/bin/bash
case "$*" in
  *get_device_capability*) [ -n "${DEVICE-9.0}" ] && echo "${DEVICE-9.0}" && exit; echo "no such device" >&2; exit 1 ;;
  *bench.gpu_report*|"-m zipfile"*) exec "$REAL" "$@" ;;
  *pytest_timeout*) echo "xdist pytest_timeout"; exit ;;
  *cuda_reason*) exit ;;
esac  # below, set -m gives a child a process group of its own, as ninja does
echo "$TORCH_CUDA_ARCH_LIST $STARS_EXPECT_CUDA $PYTHONPATH $*" >> "$CALLS"
case "$*" in
  *"$FAILING"*) echo "$FAILING is broken"; exit 3 ;;
  *"$HANGING"*) set -m; (trap '' TERM; echo $BASHPID > "$CALLS.child"; while :; do sleep 0.1; done) & wait ;;
  *"$CHATTING"*) set -m; touch "$CALLS.kept"; (trap '' TERM; echo $BASHPID > "$CALLS.child"; sleep 60) & ;;
  *"$SKIPPING"*) echo "=== 4 skipped in 0.1s ===" ;;
  *pytest*) echo "=== 2 passed, 4 skipped in 0.1s ===" ;;
esac
case "$*" in
  *"$REPORTING"*) all=$*; xml=${all#*--junitxml }; cp "$JUNIT" "${xml%% *}" ;;
esac
exit 0
"""
JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.ops.test_a" name="test_ran"/>
<testcase classname="tests.ops.test_a" name="test_left_out"><skipped message="no GPU here">a.py:3</skipped></testcase>
</testsuite></testsuites>"""
NEVER = "-never-"


class Run:
    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        (folder / "bin").mkdir(parents=True)
        for name, text in (("python", STUB), ("compute-sanitizer", '#!/bin/bash\nshift 6\nexec "$@"\n')):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "junit.xml").write_text(JUNIT)
        self.script = ROOT / "bench/gpu.sh"

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        names = ("FAILING", "HANGING", "CHATTING", "SKIPPING", "REPORTING")
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("STARS_")},
            **dict.fromkeys(names, NEVER),
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "PYTHON": str(self.folder / "bin" / "python"),
            "CALLS": str(self.folder / "calls"),
            "JUNIT": str(self.folder / "junit.xml"),
            "REAL": sys.executable,
            **environment,
        }
        command = [self.script, *arguments, self.out]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def __call__(self, *arguments: str, **environment: str) -> int:
        process = self.start(*arguments, **environment)
        self.printed, _ = process.communicate(timeout=120)
        return process.returncode

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    @property
    def table(self) -> dict[str, str]:
        """Part: status."""
        return {row[0]: row[1] for row in gpu_report.rows((self.out / "table.txt").read_text())}

    def child_is_gone(self) -> bool:
        stat = Path("/proc") / (self.folder / "calls.child").read_text().strip() / "stat"
        return not stat.exists() or stat.read_text().split()[2] == "Z"


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def test_all_parts_in_order(run):
    assert run() == 0, run.printed
    assert run.table == dict.fromkeys(PARTS, "passed")
    steps = [call for call in run.calls if any(command in call for command in COMMANDS.values())]
    assert [next(part for part in PARTS if COMMANDS[part] in call) for call in steps] == PARTS
    assert all(call.startswith("9.0 9.0 ") for call in steps)  # one architecture; and no build without CUDA passes
    (first,) = [call for call in steps if "-m bench first" in call]
    assert f"--out {run.out} --device cuda --model llama-3-8b qwen2.5-0.5b --seconds 81" in first
    selected = ("tests/ops -m not gpu", "tests/ops -m gpu", "tests/hf -m gpu", "tests/ops -m gpu -k test_on_a_gpu")
    assert all(arguments in call for arguments, call in zip(selected, [*steps[2:5], steps[6]], strict=True))
    assert "-n " in steps[2] and "--timeout 90" in steps[2] and f"--junitxml {run.out}/ops.xml" in steps[2]
    assert run.printed.index("== sanitizer") < run.printed.index("part ") < run.printed.index("report: ")


def test_the_limits_leave_room_in_ten_minutes(run):
    def limits(*arguments):
        run(*arguments)
        return [int(row[3]) for row in gpu_report.rows((run.out / "table.txt").read_text())]

    assert sum(limits()) + 60 < 570  # and the search for a device
    assert sum(limits("--time", "1070")) == 1070
    assert len(limits("--full")) == len(PARTS) + 3


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_fails_stops_none(run, part):
    assert run(FAILING=COMMANDS[part]) == 1
    assert run.table == dict.fromkeys(PARTS, "passed") | {part: "FAILED (3)"}
    assert f"{COMMANDS[part]} is broken" in run.printed
    report = (run.out / "report.md").read_text()
    assert f"## {part}: FAILED (3)" in report and f"{COMMANDS[part]} is broken" in report


def test_a_part_that_hangs_is_ended_with_its_children(run):
    began = time.monotonic()
    assert run("--time", "15", HANGING=COMMANDS["kernels"]) == 1
    assert run.table == dict.fromkeys(PARTS, "passed") | {"kernels": "FAILED (over its limit)"}
    assert time.monotonic() - began < 60 and run.child_is_gone()


def test_what_a_part_leaves_running_is_ended(run):
    assert run(CHATTING=COMMANDS["ops"]) == 0
    assert (run.folder / "calls.kept").exists() and run.child_is_gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ended_from_outside_it_still_tells(run, number):
    process = run.start(FAILING=COMMANDS["build"], HANGING=COMMANDS["decoder"])
    child = run.folder / "calls.child"
    deadline = time.monotonic() + 60
    while not child.exists() or not child.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(timeout=30)
    told = {"build": "FAILED (3)", "first": "not run", "sanitizer": "not run"}
    if number == signal.SIGTERM:
        assert process.returncode == 143 and run.child_is_gone()
        told["decoder"] = "FAILED (stopped)"
    else:
        os.kill(int(child.read_text()), signal.SIGKILL)
        told["decoder"] = "running"
    process.stdout.close()
    assert run.table == dict.fromkeys(PARTS, "passed") | told
    assert "| build | FAILED (3) |" in (run.out / "report.md").read_text()


def test_on_a_gpu_a_part_of_skips_has_failed(run):
    assert run(SKIPPING=COMMANDS["decoder"]) == 1
    assert run.table["decoder"] == "FAILED (all skipped)"


def test_the_rehearsal_names_what_it_does_not_reach(run):
    assert run("--device", "cpu", DEVICE="", SKIPPING=COMMANDS["decoder"], REPORTING=COMMANDS["kernels"]) == 0
    assert run.table == dict.fromkeys(PARTS, "passed") | {"decoder": "not reached", "sanitizer": "not reached"}
    assert (run.out / "not_reached.txt").read_text().splitlines() == [
        "tests/ops/triton: Triton's interpreter takes minutes; make matrix has it",
        "part sanitizer: it needs a GPU",
        "tests.ops.test_a::test_left_out: no GPU here",
    ]
    assert "- tests.ops.test_a::test_left_out: no GPU here" in (run.out / "report.md").read_text()
    assert any("--device cpu --model tiny" in call for call in run.calls)
    assert not any("/sanitizer.xml" in call for call in run.calls)


def test_without_a_device_nothing_runs(run):
    assert run(DEVICE="") == 2
    assert "no CUDA device" in run.printed and "no such device" in run.printed
    assert not (run.folder / "calls").exists() and not (run.out / "table.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--time", "0"], "--time is '0'"),
        (["--time", "soon"], "--time is 'soon'"),
        (["--quick"], "'--quick' is no option"),
        (["a"], "is a second FOLDER"),
    ],
)
def test_a_bad_argument_is_refused(run, arguments, message):
    assert run(*arguments) == 2
    assert message in run.printed and "expected bench/gpu.sh [--device cuda|cpu]" in run.printed


def test_an_earlier_run_in_the_same_folder_is_not_reported(run):
    (run.out / "other").mkdir(parents=True)
    (run.out / "notes.log").write_text("not ours")
    assert run(FAILING=COMMANDS["ops"], REPORTING=COMMANDS["kernels"]) == 1
    assert run() == 0
    assert (run.out / "not_reached.txt").read_text() == ""
    assert "FAILED" not in (run.out / "report.md").read_text()
    assert (run.out / "notes.log").read_text() == "not ours"


def test_wheels_that_travelled_come_first(run, tmp_path):
    (tmp_path / "tree" / "wheels").mkdir(parents=True)
    shutil.copytree(ROOT / "bench", tmp_path / "tree" / "bench")
    with ZipFile(tmp_path / "tree/wheels/some-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some/__init__.py", "")
    run.script = tmp_path / "tree/bench/gpu.sh"
    assert run(PYTHONPATH="/before") == 0, run.printed
    unpacked = run.out / "wheels/some-1.0-py3-none-any"
    assert (unpacked / "some/__init__.py").exists()
    assert any(f" {unpacked}:/before " in call for call in run.calls)
