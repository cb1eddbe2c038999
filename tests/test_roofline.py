"""The model of `python -m bench roofline`: sizes against transformers and the engine, times against arithmetic."""

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from bench import costs, counted, kernels, rivals, roofline, schedule, variants
from bench.assumptions import perfect, values
from bench.schedule import Job, Shape
from bench.sizes import GPUS, MODELS, merges
from stars_kernels import StarsConfig
from stars_kernels.decoder import width as decoder_width
from stars_kernels.hf import sizing
from stars_kernels.hf.cache import prefill
from stars_kernels.hf.proposing import graphs
from stars_kernels.hf.sizing import Gpu, round_cost
from stars_kernels.hf.view.copying import view_of
from stars_kernels.ops.triton import fork_attention
from stars_kernels.ops.triton import lm_head_sample as lm_head
from stars_kernels.ops.triton import segment_sample as sampling
from stars_kernels.ops.triton.lm_head_sample import lm_head_sample_triton
from stars_kernels.ops.triton.segment_sample import segment_sample_triton
from tests.ops.test_fork_attention import make_case

ROOT = Path(__file__).parents[1]
PARAMETERS = {"llama-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248, "qwen2.5-0.5b": 494_032_768}  # as published
KV_BYTES = {"llama-7b": 512 * 2**10, "llama-3-8b": 128 * 2**10, "qwen2.5-0.5b": 12 * 2**10}  # a token, bf16
JOB = Job(GPUS["h100"], MODELS["llama-7b"], prompts=64, prompt_tokens=128, segment=15, acceptance=0.25)
GIVEN = values()


def seconds(job, width=4, prompts=64, prefix=200.0, graph=True):
    return costs.round_seconds(job.gpu, costs.ours(job, prompts, width, prefix), graph, GIVEN)


def rounds_seconds(job, cost, choose):
    return sum(r.happens * cost(r) for r in schedule.schedule(job, choose))


def faster(gpu, **factors):
    return replace(gpu, **{name: getattr(gpu, name) * factor for name, factor in factors.items()})


def on_meta(name):
    m = MODELS[name]
    kind, config = (Qwen2ForCausalLM, Qwen2Config) if m.qkv_bias else (LlamaForCausalLM, LlamaConfig)
    with torch.device("meta"):
        return kind(
            config(
                num_hidden_layers=m.layers, hidden_size=m.hidden, num_attention_heads=m.heads,
                num_key_value_heads=m.kv_heads, intermediate_size=m.intermediate, vocab_size=m.vocabulary,
                tie_word_embeddings=m.tied,
            )
        )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_kv_are_those_of_the_model_in_transformers(name):
    m, model = MODELS[name], on_meta(name)
    layer = model.model.layers[0]
    linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    assert model.num_parameters() == m.parameters == PARAMETERS[name]
    assert sum(linear.weight.numel() for linear in linears) == m.linears
    assert len(linears) == counted.LINEARS
    assert m.kv_bytes == KV_BYTES[name]


@pytest.mark.parametrize("name", MODELS)
def test_the_shape_of_auto_is_the_decoders(name):
    """By the sizes that the engine finds in the model itself."""
    model, job = on_meta(name), replace(JOB, model=MODELS[name])
    view = view_of(model.bfloat16())
    gpu = Gpu(job.gpu.bandwidth, job.gpu.tensor_flops)
    cost = round_cost(view, [view.base_model], job.segment, graphs=True, gpu=gpu)
    if merges(job.model, job.gpu):  # for which "meta" has no memory
        fewer = decoder_width.MERGED_LAUNCHES
        model, *rewards = (replace(size, layer_launches=fewer) for size in (cost.model, *cost.rewards))
        cost = replace(cost, model=model, rewards=tuple(rewards))
    miss = decoder_width.AcceptanceHistory().miss  # starts at 3 in 4
    found = [schedule.auto_shape(job)(prompts) for prompts in (1, 2, 8, 64)]
    assert found == [decoder_width.best_shape(n, schedule.MAX_ATTEMPTS, miss, cost) for n in (1, 2, 8, 64)]
    assert found[0].width >= found[2].width > found[3].width >= found[3].wave


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("memory", [40e9, 80e9, 141e9])
def test_the_batch_of_auto_is_the_engines(name, memory):
    model, job = on_meta(name).bfloat16(), replace(JOB, model=MODELS[name], gpu=replace(JOB.gpu, memory=memory))
    view, tokens = view_of(model), job.prompt_tokens + schedule.NEW_TOKENS
    free = int(schedule.MEMORY_SHARE * memory - job.weights)
    gpu = Gpu(job.gpu.bandwidth, job.gpu.tensor_flops)
    cost = round_cost(view, [view.base_model], job.segment, graphs=True, gpu=gpu)
    miss = decoder_width.AcceptanceHistory().miss
    found = min(
        sizing.fitting_prompts(
            view, [view.base_model], tokens, schedule.MAX_ATTEMPTS, job.segment, free=lambda device: free
        ),
        decoder_width.enough_slots(schedule.MAX_ATTEMPTS, miss, cost),
    )
    assert schedule.auto_batch(job) == found > 1


def test_numbers_that_are_the_packages():
    assert StarsConfig().batch_size == StarsConfig().width == "auto"
    assert StarsConfig().max_attempts == schedule.MAX_ATTEMPTS
    assert sizing.MEMORY_SHARE == schedule.BATCH_SHARE
    assert (prefill.PREFILL_TOKENS, prefill.PREFILL_PIECES) == (costs.PREFILL_TOKENS, costs.PREFILL_PIECES)
    assert all(schedule.bucket_of(n) == graphs.bucket_of(n) for n in range(1, 2000))
    at = fork_attention
    for name in ("SPLIT_KEYS", "MAX_SPLITS", "TARGET_PROGRAMS", "WHOLE_SPLITS", "WORKSPACE"):
        assert getattr(at, name) == getattr(kernels, name), name
    assert (sampling.CHUNK, sampling.GROUP, lm_head.BLOCK_V) == (kernels.CHUNK, kernels.GROUP, kernels.HEAD_BLOCK)


def test_known_kernels():
    m = MODELS["llama-3-8b"]
    head = kernels.lm_head(m, "", 256, 1)
    assert head.bytes == 2 * (128256 * 4096 + 256 * 4096 + 256 * 128256) and head.flops == 2 * 128256 * 4096 * 256
    plain, filtered = (kernels.segment_sample(m, "", 256, 256, 1, f) for f in (False, True))
    row = 256 * 128256 * 2
    assert plain[0].bytes == row + 256 * 63 * 16  # the winner, maximum and mass of each chunk of 2,048
    assert 2 * row < sum(k.bytes for k in filtered) < 2.2 * row
    by_name = {k.name: k for k in costs.ours(replace(JOB, model=m), 64, 4, 200.0)}
    kv = 2 * 8 * 128 * 2  # bytes of a token of a layer
    moved = 2 * 2 * 256 * 32 * 128  # queries and outputs
    assert by_name["step: fork_attention"].bytes == kv * (64 * 200 + 256 * 7.5) + moved  # prefixes once a prompt
    assert by_name["step: fork_attention"].flops == 4 * 256 * 32 * 128 * 207.5
    assert by_name["RM: fork_attention"].flops == 4 * 256 * 15 * 32 * 128 * (200 + 8)  # causal: 1 to 15 own keys
    moved = 2 * 2 * 256 * 15 * 32 * 128
    assert by_name["RM: fork_attention"].bytes == kv * (64 * 200 + 256 * 15) + moved
    assert by_name["RM: fork_attention"].l2_bytes == kv * (8 - 1) * 64 * 200  # 60 queries a row: 2 blocks, 8 a prompt
    assert by_name["step: linears"].bytes == 2 * 32 * m.linears
    assert by_name["RM: reward_head"].bytes == 2 * 4096 * 257 + 4 * 256
    assert by_name["step: linears"].calls == 14


def test_twice_the_bandwidth_halves_what_memory_bounds_and_nothing_else():
    quick = faster(JOB.gpu, bandwidth=2)
    given = replace(perfect(GIVEN), ridge=1.0)
    for k in costs.ours(JOB, 64, 4, 200.0):
        limits = k.limits(JOB.gpu, given)
        if not any(limits.values()):
            continue
        others = max(limits["tensor"], limits["vector"])
        assert k.seconds(quick, given) == pytest.approx(k.calls * max(limits["memory"] / 2, others))
    weights = kernels.Kernel("", bytes=3.35e12 * 0.8)
    assert (weights.seconds(JOB.gpu, GIVEN), weights.seconds(quick, GIVEN)) == pytest.approx((1.0, 0.5))


def test_a_round_is_the_sum_of_its_kernels():
    found, waved = costs.ours(JOB, 64, 4, 200.0), costs.ours(JOB, 64, 4, 200.0, wave=2)

    def work(part):
        run = sum(k.calls * k.launches for k in part)
        return sum(k.seconds(JOB.gpu, GIVEN) for k in part) + GIVEN.gap_seconds * run

    assert seconds(JOB) == pytest.approx(work(found)), "the host is a round behind"
    later = sum(k.calls for k in waved if k.name.startswith(costs.LATER_WAVE))
    expected = GIVEN.host_seconds * (1 + later / 2)
    for phase in ("last token", "segment", "RM", "RM, wave 2"):  # in waves the host waits at the end of each
        part = [k for k in waved if k.phase == phase]
        replays = {"segment": JOB.segment - 1, "RM, wave 2": later}.get(phase, 1)
        issued = replays + sum(k.calls * k.launches for k in part if not k.graph)
        expected += max(work(part), GIVEN.issue_seconds * issued)
    assert costs.round_seconds(JOB.gpu, waved, True, GIVEN) == pytest.approx(expected)
    assert {k.phase for k in found if k.graph} == {"last token", "segment", "RM"}
    *rows, total = roofline.kernel_rows([JOB])
    assert total["kernel"] == "total" and total["calls"] == ""
    for column in ("MB/round", "Gflop/round", "H100 SXM ms"):
        assert total[column] == pytest.approx(sum(row[column] for row in rows))
    again = costs.ours(JOB, JOB.prompts, roofline.KERNEL_WIDTH, JOB.middle)
    assert sum(row["MB/round"] for row in rows) == pytest.approx(sum(k.calls * k.bytes for k in again) / 1e6)
    for row, k in zip(rows, again, strict=True):
        assert row["H100 SXM floor us/call"] == pytest.approx(1e6 * max(k.limits(JOB.gpu, GIVEN).values()))


def test_width_1_is_the_sequential_algorithm():
    attempts = sum(n * 0.25 * 0.75 ** (n - 1) for n in range(1, 20)) + 20 * 0.75**19  # geometric, cut at 20
    assert JOB.rounds(1) == pytest.approx(attempts)
    steps = next(k for k in costs.ours(JOB, 64, 1, 200.0) if k.name == "step: fork_attention")
    one_row_a_prompt = next(
        k for k in kernels.forward(JOB.model, "", 64, prefixes=64, prefix=200.0, own=7.5) if "attention" in k.name
    )
    assert steps.bytes == one_row_a_prompt.bytes
    # One prompt, a constant cost: the time is the expected number of attempts of all segments.
    alone = replace(JOB, prompts=1)
    assert rounds_seconds(alone, lambda r: 1.0, lambda prompts: Shape(1, 1)) == pytest.approx(8 * attempts, rel=1e-4)


def test_the_last_of_many_prompts_takes_longer_as_simulated():
    generator = torch.Generator().manual_seed(0)
    simulated = []
    for _ in range(300):
        tries = torch.rand(64, 8, 5, generator=generator) < 1 - 0.75**4  # five rounds of 4 attempts at most
        used = torch.where(tries.any(-1), tries.int().argmax(-1) + 1, 5)
        simulated.append(used.sum(-1).max().item())
    expected = rounds_seconds(JOB, lambda r: 1.0, lambda prompts: Shape(4, 4))
    assert expected == pytest.approx(sum(simulated) / len(simulated), rel=0.01)


@pytest.mark.parametrize("graph", [False, True])
def test_monotone(graph):
    base = seconds(JOB, graph=graph)
    more = [{"width": 6}, {"prompts": 80}, {"prefix": 300.0}]
    assert all(seconds(JOB, graph=graph, **change) >= base for change in more)
    assert seconds(replace(JOB, segment=30), graph=graph) > base
    assert seconds(replace(JOB, gpu=GPUS["a100"]), graph=graph) >= base
    assert seconds(JOB, graph=False) >= seconds(JOB, graph=True)
    assert all(a > b for a, b in zip(map(JOB.rounds, range(1, 20)), map(JOB.rounds, range(2, 21)), strict=True))
    jobs = [replace(JOB, acceptance=a) for a in (0.1, 0.25, 0.5, 1.0)]
    speeds = [variants.ours_as(job, "", variants.a_call(job, "tuned")).speed(GIVEN) for job in jobs]
    assert speeds == sorted(speeds)


def test_vllm_is_charged_prefixes_by_row_and_favoured_elsewhere():
    by_name = {rival.name: rival for rival in rivals.RIVALS}

    def vllm(prefix, name):
        passes = rivals.vllm(JOB, 64, Shape(4, 4), prefix, by_name[name])
        return rivals.vllm_seconds(JOB.gpu, passes, 256, GIVEN, by_name[name])

    no_prefix = vllm(0.0, "vLLM")
    assert no_prefix < vllm(200.0, "vLLM, waves, L2") < vllm(200.0, "vLLM") == vllm(200.0, "vLLM, waves")
    assert vllm(200.0, "vLLM, waves, requests") == pytest.approx(vllm(200.0, "vLLM") + 256 * GIVEN.request_seconds)
    bare = rivals.perfect_seconds(JOB.gpu, costs.ours(JOB, 64, 4, 0.0), GIVEN)
    assert no_prefix <= bare + GIVEN.host_seconds + 1e-3  # nothing to lose where no prefix is


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter")
@pytest.mark.parametrize(("rows", "steps"), [(4, 15), (4, 1), (33, 1), (2, 30)])
def test_a_prefix_is_read_as_often_as_the_kernel_reads_it(monkeypatch, rows, steps):
    """Each tile of 32 keys is two products: those with a prefix of 320, less those without."""
    from triton.runtime.interpreter import InterpreterBuilder

    def products(prefix):
        case = make_case(
            steps=steps, shape=(4, 1, 16, 16), dtype=torch.float16, lengths=(prefix,), prompt=(0,) * rows,
            suffix_len=[steps] * rows, query_len=[steps] * rows,
        )  # fmt: skip
        count.clear()
        fork_attention.fork_attention_triton(**{"window": 0, "softcap": 0.0, "sinks": None} | case)
        return len(count)

    count: list[None] = []
    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *args: (count.append(None), dot(*args))[1])
    monkeypatch.setattr(fork_attention, "MAX_SPLITS", 1)
    model = replace(MODELS["llama-3-8b"], heads=4, kv_heads=1)
    assert fork_attention.settings(torch.bfloat16, 128)["block_m"] == kernels.QUERY_BLOCK
    assert products(320) - products(0) == 2 * 10 * kernels.prefix_reads(model, rows, steps)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter")
@pytest.mark.parametrize("filtered", [False, True])
def test_launches_of_the_ops(monkeypatch, filtered):
    from triton.runtime.interpreter import InterpretedFunction

    names, run = [], InterpretedFunction.run
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *a, **k: (names.append(self), run(self, *a, **k))[1])

    def launched(call, *args):
        names.clear()
        call(*args)
        return len(names)

    m, zeros = JOB.model, torch.zeros(2, dtype=torch.int64)
    draw = launched(segment_sample_triton, torch.zeros(2, 9), zeros, zeros, zeros, None, 1.0, 3 * filtered, 1.0, 0.0, 0)
    assert draw == sum(k.launches for k in kernels.segment_sample(m, "", 2, 2, 1, filtered))
    head = launched(lm_head_sample_triton, torch.zeros(2, 8), torch.zeros(9, 8), zeros, zeros, zeros, 1.0, 0)
    assert head == sum(k.launches for k in kernels.lm_head_sample(m, "", 2, 1))


def test_what_does_not_fit_is_left_out():
    assert not replace(JOB, gpu=GPUS["l4"]).widths
    assert JOB.memory(1) > 4 * JOB.model.parameters - 2 * JOB.model.head


def run(path=None, write=None, **changes):
    arguments = {"gpu": list(GPUS), "model": list(MODELS), "prompts": 64, "prompt_tokens": 128, "acceptance": 0.25}
    with redirect_stdout(io.StringIO()) as printed:
        assert roofline.run(SimpleNamespace(**arguments | changes, json=path, write=write)) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the command prints, and its JSON."""
    folder = tmp_path_factory.mktemp("roofline")
    text = run(folder / "out.json", folder / "out.md")
    assert (folder / "out.md").read_text() == text
    return text, json.loads((folder / "out.json").read_text())


def test_the_report_says_that_it_is_a_model_and_what_others_published(report):
    text, found = report
    titles = [line for line in text.splitlines() if re.search("kernels of a round|tokens a second,|speed over", line)]
    assert len(titles) == 11 and all(title.startswith("## MODEL, not a measurement") for title in titles)
    for speed in ("185.0", "195.0", "120.5"):
        assert re.search(rf"{speed} tokens/s \(published\)", text)
    assert "Published by others, read second-hand" in text and "vLLM's favour" in text
    assert found["heading"] == "MODEL, not a measurement"
    assert {n: len(rows) for n, rows in found["decoding"].items()} == {"64": 20, "1": 20}
    assert "(nothing fits)" in run(gpu=["l4"], model=["llama-7b"])


def test_the_document_is_what_the_command_prints(report):
    assert (ROOT / "docs/roofline.md").read_text() == report[0], (
        "run `python -m bench roofline --write docs/roofline.md`"
    )


def test_the_figures_of_the_readme_are_modelled(report):
    """The first table's rows: the engine as it is by default, with all parts, and that against the strongest rival."""
    shipped, *_, whole, strongest, _ = report[1]["stages"]

    def figures(row):
        middles = [f"{row[f'{model} x {n}'][1]:.2f}x" for n in (64, 1) for model in ("Llama-3-8B", "Qwen2.5-0.5B")]
        return "{} and {} with 64 prompts, {} and {} with one".format(*middles)

    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"reaches {figures(shipped)}" in readme
    assert f"would make that {figures(whole)} ({figures(strongest)} where" in readme


def test_it_imports_no_torch():
    check = (
        "import sys; sys.argv = ['bench', 'roofline', '--gpu', 'l4']\n"
        "from bench.__main__ import main\nassert main() == 0\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True)
