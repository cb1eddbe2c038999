"""batch_size="auto" and the cost of a round: from the models, and from a device that is told or found."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import stars_kernels
from stars_kernels import RewardModel, StarsConfig
from stars_kernels.decoder.width import MAX_SLOTS, AcceptanceHistory, CpuCost, GpuCost, best_shape, enough_slots
from stars_kernels.hf import sizing
from stars_kernels.hf.cache import open_cache
from stars_kernels.hf.engine import Engine
from stars_kernels.hf.proposing.proposer import ModelProposer
from stars_kernels.hf.sizing import Gpu, fitting_prompts, gpu_of, prompt_bytes, round_cost, size_of
from stars_kernels.hf.view.copying import view_of
from tests.hf import families
from tests.sequential import sequential_decode
from tests.tiny import EOS, byte_tokenizer, tiny_language_model, tiny_reward_model

GB = 10**9
H100 = Gpu(bandwidth=3.35e12, flops=989e12)
FAMILIES = ("gpt2", "opt", "bloom", "mpt", "falcon", "gemma3", "mixtral", "deepseek_v3", "mamba", "jamba", "qwen3_next")
SET = dict(seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=8, segment_size=4, max_attempts=3)
PROMPTS = [[1 + p, 2, 3][: 3 - p % 3] for p in range(19)]
CLOCKS = {  # kHz and bits as the drivers tell them; bytes and operations a second of the datasheets
    "H100": ((9, 0, 132, 1_830_000, 2_619_000, 5120), (3.35e12, 989e12, 62e12)),
    "A100": ((8, 0, 108, 1_410_000, 1_593_000, 5120), (2.039e12, 312e12, 19.5e12)),
    "L4": ((8, 9, 58, 2_040_000, 6_251_000, 192), (300e9, 121e12, 30.3e12)),
}


@pytest.fixture(scope="module")
def llama():
    """Llama-3-8B without weights, its layers as a reward model, in bf16."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("meta"):
        view = view_of(LlamaForCausalLM(config).bfloat16())
    return view, [view.base_model]


def prompts_for(llama, free, tokens=256, width=20, segment=15):
    return fitting_prompts(*llama, tokens, width, segment, free=lambda device: free)


def test_size_of_a_model(llama):
    size, rm = size_of(llama[0]), size_of(llama[1][0])
    assert size.parameters == 8_030_261_248 - 128256 * 4096  # the table of embeddings is looked up
    assert (size.weights, size.kv_bytes, size.state_bytes) == (2 * size.parameters, 128 * 2**10, 8192)
    assert (size.layers, size.logits_bytes, rm.logits_bytes) == (32, 2 * 128256, 0)
    assert rm.parameters == size.parameters - 128256 * 4096
    tied = view_of(tiny_language_model(tie_word_embeddings=True))
    assert size_of(tied).parameters == tied.num_parameters()  # here it is the output layer as well


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_all_kinds_have_a_size(family):
    size = size_of(view_of(families.tiny(family)))
    assert size.weights > 0 and size.layers > 0


@pytest.mark.parametrize("device", CLOCKS)
def test_figures_of_a_gpu_are_the_datasheets(monkeypatch, device):
    names = ("major", "minor", "multi_processor_count", "clock_rate", "memory_clock_rate", "memory_bus_width")
    told, (bandwidth, flops, float_flops) = CLOCKS[device]
    found = SimpleNamespace(**dict(zip(names, told, strict=True)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    gpu = gpu_of(torch.device("cuda", 0), torch.bfloat16)
    assert (gpu.bandwidth, gpu.flops) == (pytest.approx(bandwidth, rel=0.01), pytest.approx(flops, rel=0.01))
    assert gpu_of(torch.device("cuda", 0), torch.float32).flops == pytest.approx(float_flops, rel=0.01)


def test_unknown_gpus_are_as_the_newest_before_them(monkeypatch):
    found = SimpleNamespace(major=99, minor=9, multi_processor_count=100, clock_rate=1e6, memory_clock_rate=1e6,
                            memory_bus_width=4096)  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    newest = gpu_of(torch.device("cuda", 0), torch.bfloat16).flops
    found.major, found.minor = max(sizing.HALF_FLOPS)
    assert gpu_of(torch.device("cuda", 0), torch.bfloat16).flops == newest > 0
    found.major, found.minor = 7, 0
    assert gpu_of(torch.device("cuda", 0), torch.bfloat16).flops > 0


def test_cost_of_a_round_is_the_devices(lm, rm, llama):
    view = view_of(lm)
    body = view_of(rm).base_model
    on_a_cpu = round_cost(view, [body], 15, graphs=False)
    assert on_a_cpu == CpuCost(15) and round_cost(view, [], 15, graphs=False, asks=True) == on_a_cpu
    assert round_cost(view, [], 15, graphs=False) == CpuCost(15, reads=False)  # a head on hidden states
    cost = round_cost(*llama, 15, graphs=True, gpu=H100)
    assert isinstance(cost, GpuCost)
    miss = AcceptanceHistory().miss
    assert best_shape(64, 20, miss, cost) == (4, 1)  # as the roofline's best
    assert best_shape(64, 20, miss, on_a_cpu) == (2, 1)
    assert 0.1 < cost.sample(64 * 3) + cost.score(64 * 3) < 0.4  # seconds: 0.2 by `python -m bench roofline`


def test_models_of_every_kind_of_reward(lm, rm):
    reference = stars_kernels.Likelihood(lm, tiny_language_model(seed=5))
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                   num_labels=1)
    ).double()  # fmt: skip
    tokenizer = byte_tokenizer()
    parts = [rm, RewardModel(reference), RewardModel(bert, tokenizer), torch.nn.Linear(24, 1).double()]
    parts.append(lambda prompts, answers: [0.0] * len(answers))
    models = Engine(lm, parts, tokenizer=tokenizer, **SET).models
    kinds = [type(model).__name__ for model in models.reward_models]
    assert kinds == ["LlamaModel", "LlamaForCausalLM", "LlamaForCausalLM", "BertForSequenceClassification"]
    cost = round_cost(models.lm, models.reward_models, 4, graphs=True, gpu=H100)
    assert [size.kv_bytes > 0 for size in cost.rewards] == [True, True, True, False]
    assert fitting_prompts(models.lm, models.reward_models, 99, 3, 4, free=lambda device: GB) == 256


def test_bytes_of_a_prompt_are_those_of_its_caches(lm, rm):
    view, reward = view_of(lm), view_of(rm).base_model
    held = 0
    for model in (view, reward):
        cache = open_cache(model, [30], 4)
        cache.fork(torch.zeros(7, dtype=torch.int64))
        held += cache.kv_bytes
    logits = 8 * 260 * 8
    assert prompt_bytes(view, [reward], tokens=30, width=7, segment_size=4) == {view.device: held + logits}


def test_free_memory_becomes_prompts(llama):
    kv, logits = 2 * 128 * 2**10 * (256 + 20 * 15), 21 * 2 * 128256
    one = (kv + logits) / sizing.MEMORY_SHARE
    found = {n: prompts_for(llama, int(n * one) + 10) for n in (0.5, 1, 2, 3, 8, 15, 16, 100, 10**4)}
    assert found == {0.5: 1, 1: 1, 2: 2, 3: 2, 8: 8, 15: 8, 16: 16, 100: 64, 10**4: MAX_SLOTS}
    assert prompts_for(llama, 45 * GB) >= 64  # of an H100, beside both models
    more = [prompts_for(llama, GB * n) for n in range(1, 200, 7)]
    assert more == sorted(more)
    assert prompts_for(llama, 20 * GB, tokens=8192) < prompts_for(llama, 20 * GB, width=1, tokens=200)


def test_the_fullest_device_decides(llama):
    """Of a language model and a reward model on two."""
    free = {"meta": 40 * GB}
    plenty = fitting_prompts(*llama, 256, 20, 15, free=lambda device: free[device.type])
    free["meta"] = GB
    assert fitting_prompts(*llama, 256, 20, 15, free=lambda device: free[device.type]) < plenty
    elsewhere = view_of(tiny_reward_model()).base_model
    free |= {"meta": 40 * GB, "cpu": 10**5}
    assert fitting_prompts(llama[0], [elsewhere], 256, 20, 15, free=lambda device: free[device.type]) == 1


@pytest.mark.parametrize("family", ["falcon", "mamba"])
def test_models_whose_rows_keep_more_have_few_slots(family):
    """Copies of whole rows, states: not told by the layout."""
    view = view_of(families.tiny(family))
    assert fitting_prompts(view, [], 20, 3, 4, free=lambda device: 10**15) == sizing.UNKNOWN_BATCH


def test_free_memory_counts_what_torch_holds_unused(monkeypatch):
    for name, value in {"mem_get_info": (5, 90), "memory_reserved": 20, "memory_allocated": 12}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert sizing.free_memory_of(torch.device("cuda", 0)) == 13


def test_free_memory_of_a_cpu_is_the_systems(monkeypatch):
    assert 2**20 < sizing.free_memory_of(torch.device("cpu")) < 2**60
    assert sizing.free_memory_of(torch.device("meta")) == sys.maxsize
    monkeypatch.setattr(sizing, "MEMINFO", Path("/nowhere"))
    assert sizing.free_memory_of(torch.device("cpu")) == sys.maxsize


def slots(monkeypatch, lm, rm, count, **settings):
    """The slots that a decode of `count` prompts has, and its answers."""
    sizes, reserve = [], ModelProposer.reserve

    def noted(self, room):
        sizes.append(room.slots)
        return reserve(self, room)

    monkeypatch.setattr(ModelProposer, "reserve", noted)
    outputs = stars_kernels.decode(lm, rm, PROMPTS[:count], request_ids=range(count), **{**SET, **settings})
    return sizes, [output.token_ids for output in outputs]


def test_auto_is_what_the_cost_says_and_an_integer_wins(monkeypatch, lm, rm):
    assert StarsConfig().batch_size == "auto"
    miss = AcceptanceHistory().miss
    wanted = enough_slots(3, miss, CpuCost(4))
    assert 8 <= wanted <= 16
    sizes, expected = slots(monkeypatch, lm, rm, 19)
    assert sizes == [wanted]
    assert slots(monkeypatch, lm, rm, 3) == ([3], expected[:3])
    assert slots(monkeypatch, lm, rm, 19, batch_size=7) == ([7], expected)
    monkeypatch.setattr(sizing, "MEMORY_SHARE", 0.0)  # no memory that is known to be free
    assert slots(monkeypatch, lm, rm, 3)[0] == [1]
    for p, prompt in enumerate(PROMPTS[:3]):
        assert sequential_decode(lm, rm, prompt, p, StarsConfig(**SET), eos=(EOS,))[0] == expected[p]


def test_what_the_engine_tells_of_its_prompts(monkeypatch, lm, rm):
    asked = []
    monkeypatch.setattr("stars_kernels.hf.call.fitting_prompts", lambda lm, rms, *sizes: asked.append(sizes[:-1]) or 5)
    assert slots(monkeypatch, lm, rm, 6)[0] == [5]
    assert asked == [(11, 3, 4)]  # tokens of the longest, attempts, tokens of a segment
    asked.clear()
    slots(monkeypatch, lm, rm, 3, width=2, segment_size=99)
    assert asked == [(11, 2, 8)]


def test_slots_of_a_device_that_gains_nothing_and_of_one_that_gains_for_ever():
    assert enough_slots(20, 0.75, Quadratic()) == 1
    assert enough_slots(20, 0.75, Free()) == MAX_SLOTS
    found = [enough_slots(20, miss / 10, CpuCost(15)) for miss in range(10)]
    assert set(found) <= {8, 16, 32}


class Quadratic:
    waves = True

    def sample(self, rows):
        return rows**2

    score = sample

    def judge(self, later):
        return 0.0


class Free:
    waves = False

    def sample(self, rows):
        return 1.0

    score = sample

    def judge(self, later):
        return 0.0


def test_the_width_follows_the_cost_and_the_answers_do_not(monkeypatch, lm, rm):
    def decoded(cost):
        """The widths of first rounds, and the answers."""
        asked = []
        monkeypatch.setattr("stars_kernels.hf.call.round_cost", lambda *of: asked.append(of[2:]) or cost)
        outputs = stars_kernels.decode(lm, rm, PROMPTS[:3], request_ids=range(3), **SET)
        assert asked == [(4, False, False)]  # tokens of a segment, no graphs on a CPU, no function
        widths = {segment.widths[0] for output in outputs for segment in output.segments}
        return widths, [output.token_ids for output in outputs]

    dear, free = decoded(Quadratic()), decoded(Free())
    assert (dear[0], free[0]) == ({1}, {3}) and dear[1] == free[1]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "all", "8"])
def test_other_batch_sizes_are_refused(value):
    with pytest.raises(ValueError, match=rf'^batch_size is {value!r}, expected an integer >= 1 or "auto"$'):
        StarsConfig(batch_size=value)
