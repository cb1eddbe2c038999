"""`--device cuda` of the benchmarks without a GPU: the refusal, and the whole way with the CPU in its place."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from bench import __main__ as command
from bench import calls, common, decode, machine, models, ops, ours, report, versions
from stars_kernels.hf import call, serving
from stars_kernels.hf.proposing.graphs import Graphs
from tests.captured import rerun

RATES = machine.Rates(1e10, 1e11)


@pytest.mark.parametrize("suite", command.TIMED + command.ALONE)
def test_no_cuda_device(monkeypatch, capsys, suite):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench", suite, "--device", "cuda"])
    with pytest.raises(SystemExit):
        command.main()
    assert f"argument --device: no CUDA device (torch {torch.__version__})" in capsys.readouterr().err


@pytest.mark.parametrize("suite", command.TIMED + command.ALONE)
def test_the_device_is_a_cpu_by_default(suite):
    assert command.parse([suite])[2].device == "cpu"
    assert command.parse([suite, "--device", "cuda"])[2].device == "cuda"


def test_without_a_suite_all_are_timed(monkeypatch, capsys):
    found, calls, status = [], [], {"decode": 1}

    def run(command):
        calls.append(command[2:])
        return Namespace(returncode=next((code for name, code in status.items() if name in command), 0))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "find_spec", lambda name: found)
    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["bench", "--device", "cuda"])
    suites = [["bench", "ops", "--device", "cuda"], ["bench", "decode", "--device", "cuda"]]
    assert command.main() == 1 and calls == suites
    assert "NOT RUN: bench.rival_vllm, vllm is not installed" in capsys.readouterr().out
    found.append("vllm")
    calls.clear()
    status.clear()
    monkeypatch.setattr("sys.argv", ["bench", "--device", "cuda", "--quick"])
    assert command.main() == 0
    assert calls == [[*suite, "--quick"] for suite in suites] + [["bench.rival_vllm", "--quick"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a suite (decode, ops, roofline, calls, first), or --device for all of them"),
        (["--device", "cuda", "ops"], "--device and --quick of one suite go behind its name, ops"),
        (["--device", "cuda"], f"argument --device: no CUDA device (torch {torch.__version__})"),
    ],
)
def test_the_command_is_refused(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    assert message in capsys.readouterr().err


def test_a_gpu_is_not_timed_with_the_definitions(monkeypatch):
    common.check_triton()
    served = {**common.backends(), "kv_commit": {"cuda": "definition: no Triton kernels (why)"}}
    monkeypatch.setattr(common, "backends", lambda: served)
    for suite in (decode, ops):
        args = Namespace(device="cuda", quick=True, model="tiny", prompts=1, rewards=None, only="", rates=RATES)
        with pytest.raises(report.CheckError, match=r"found \{'kv_commit': 'definition: no Triton"):
            suite.run(args)


@pytest.fixture
def graphs(monkeypatch):
    """All Graphs that engines make, from stand-ins for CUDA graphs."""
    made = []

    def stand_in(device):
        made.append(Graphs(rerun))
        return made[-1]

    monkeypatch.setattr(call.Workspace, "make_graphs", staticmethod(stand_in))
    monkeypatch.setattr(serving.Serving, "_why_eager", lambda self: None if self._config.graphs else "graphs=False")
    return made


def test_decode_on_a_gpu(graphs, monkeypatch, capsys):
    monkeypatch.setattr(decode, "SEGMENTS", 2)
    monkeypatch.setattr(decode, "check_exact", lambda device: None)
    for name in ("naive", "cached", "plain"):  # they take long
        monkeypatch.setitem(decode.OTHERS, name, decode.eager)
    args = Namespace(device="cpu", quick=False, model="tiny", prompts=2, rates=RATES)
    rows = decode.run_on_gpu(args)
    jobs = {name: [row.against for row in rows if row.name == name] for name in dict.fromkeys(row.name for row in rows)}
    one = ["naive", "cached", "batched", "plain", "an engine a call", "ours, eager"]
    assert jobs == {
        f"{job}, {dtype}": against
        for dtype in ("float32", "bfloat16")
        for job, against in (
            ("one prompt", one),
            ("2 prompts", ["naive", "batched", "ours, eager"]),
            ("2 prompts of 200 tokens", ["batched", "ours, eager"]),
        )
    }
    assert all(row.target is None and row.ratio > 0 and row.floor > 0 for row in rows)
    assert sum(made.counts.replays for made in graphs) > 10
    printed = capsys.readouterr().out
    assert printed.index("check in float64") < printed.index("check CUDA graphs") < printed.index("time, one prompt")


def test_graphs_that_differ_or_do_not_replay_fail_the_check(graphs, monkeypatch):
    decode.check_graphs("cpu")
    monkeypatch.setattr(decode, "eager", lambda job: [])
    with pytest.raises(report.CheckError, match="CUDA graphs and eager segments differ"):
        decode.check_graphs("cpu")
    monkeypatch.setattr(serving.Serving, "_why_eager", lambda self: "why not")
    with pytest.raises(report.CheckError, match="no segment was replayed"):
        decode.check_graphs("cpu")


def test_an_engine_takes_the_random_head_on_a_model_from_a_checkpoint(tmp_path):
    job = decode.make_job("tiny", prompts=1).cut(prompts=1, segments=1)
    job.model.save_pretrained(tmp_path)
    model = type(job.model).from_pretrained(tmp_path)
    again = replace(job, loaded=models.Models(model, models.reward_model(model), job.prompts))
    assert decode.ours(again) == decode.once(again) == decode.ours(job)


def test_forwards_are_counted_and_no_longer():
    """Among them the largest: each model reads the prompt once, the logits of its last token alone."""
    job = decode.make_job("tiny", prompts=1).cut(prompts=1, segments=2)
    with ours.counted(job.loaded) as forwards:
        results = decode.ours(job)
    count = len(forwards)
    flops = sorted(forward.flops for forward in forwards)
    body = sum(p.numel() for p in job.model.model.layers.parameters())
    head = job.model.lm_head.weight.numel()
    assert flops[-2:] == [2 * body * 200, 2 * (body * 200 + head)]
    assert {forward.weight_bytes for forward in forwards} == {4 * body, 4 * (body + head)}
    assert all(forward.seconds > 0 for forward in forwards)
    assert decode.ours(job) == results and len(forwards) == count


def test_each_call_of_an_engine_is_the_same_and_is_told(capsys, monkeypatch):
    arguments = ["calls", "--model", "tiny", "--calls", "2", "--tokens", "4"]
    assert calls.run(command.parse(arguments)[2]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| call") and len(lines) == 6
    for line in lines[2:]:
        _, _, seconds, setup, share, _ = (cell.strip() for cell in line.split("|"))
        assert 0 < float(setup) < float(seconds) and 0 < float(share.rstrip("%")) < 100
    real = calls.decode

    def other(*args, config, **given):
        return real(*args, config=config.replace(top_k=2), **given)

    monkeypatch.setattr(calls, "decode", other)
    assert calls.run(command.parse(arguments)[2]) == 1
    assert "CHECK FAILED: calls give different answers" in capsys.readouterr().out


class FakeEvent:
    """Of torch.cuda: what is recorded takes 20 ms."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 20.0


def test_ops_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(ops, "DATA_BYTES", {"cpu": 1})
    names = []
    for case in ops.gpu_cases(prefixes=(128,), device="cpu"):
        case.check(0)
        names.append(case.name)
    assert not any("packed_linear" in name for name in names)
    for dtype in ("fp32", "bf16"):
        heads = {name.split()[0] for name in names if name.endswith(dtype)}
        assert heads == {"fork_attention", "segment_sample", "lm_head_sample", "kv_commit", "reward_head"}
    assert sum(name.startswith("accept") for name in names) == 2

    calls = []
    assert ops.seconds_of(calls.append, 1, 3, "cuda") == pytest.approx(0.02 / ops.CUDA_CALLS)
    assert calls[:4] == [1, 2, 0, 1] and len(calls) == ops.CUDA_CALLS
    monkeypatch.setattr(ops, "wait", lambda device: None)
    row = ops.measure(ops.commit_case(torch.float32, prompts=1, depth=1), RATES, 0.0, "cuda")
    assert row.target is None and row.ratio == 1.0


def test_the_gpu_is_named(monkeypatch):
    device = Namespace(name="NVIDIA X", total_memory=80e9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(machine, "first_line", lambda *command: "580.1")
    facts = machine.describe(RATES, "cuda")
    assert {"gpu", "driver", "torch", "triton", "date", "cuda", "gemm_dtype"} <= set(facts)
    assert (facts["gpu"], facts["driver"], facts["compute_capability"]) == ("NVIDIA X", "580.1", "9.0")
    assert "gpu" not in machine.describe(RATES)


def test_a_command_that_is_not_there():
    assert versions.first_line("no-such-command-anywhere") == versions.MISSING
    assert versions.first_line("echo", "here") == "here"
