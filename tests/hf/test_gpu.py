"""A whole decode on a GPU: in float64 as on a CPU, with graphs as without, never waiting, each time the same."""

import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import pytest
import torch

import stars_kernels
from stars_kernels import RewardModel
from stars_kernels.hf import call
from stars_kernels.hf.proposing.graphs import Graphs, bucket_of
from stars_kernels.hf.proposing.proposer import ModelProposer
from tests.hf.scoring.test_encoder_rewards import encoder, pair_tokenizer
from tests.hf.scoring.test_process_rewards import process_model
from tests.hf.scoring.test_text_rewards import MERGING
from tests.hf.test_exactness import CONFIGS, EOS_IDS, IDS, PROMPTS
from tests.tiny import byte_tokenizer, spelling_model, tiny_language_model, tiny_reward_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"),
]

TRITON = ("fork_attention", "kv_commit", "lm_head_sample", "reward_head", "segment_sample")
HALF = [torch.bfloat16, torch.float16]
SETTINGS = dict(
    seed=3, reward_threshold=2.0, beta=1.0, max_new_tokens=24, segment_size=4, eos_token_id=(), progress=False
)
NOT_PADDED = 4
"""A width whose rows fill a bucket for 1 to 5 prompts: graphs and eager segments then multiply the same shapes."""


def on_gpu(dtype):
    return tiny_language_model(dtype).cuda(), tiny_reward_model(dtype).cuda()


def answers(outputs):
    """All that is decided."""
    return [(o.token_ids, [s.attempts for s in o.segments], o.finish_reason) for o in outputs]


def share_of_equal(outputs, expected):
    same = [a.token_ids == b.token_ids for a, b in zip(outputs, expected, strict=True)]
    return sum(same) / len(same)


@contextmanager
def no_waiting():
    """An error where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def graphs(monkeypatch):
    """All Graphs of the decodes of a test."""
    made = []

    class Recorded(Graphs):
        def __init__(self, capture):
            super().__init__(capture)
            made.append(self)

    monkeypatch.setattr(call, "Graphs", Recorded)
    return made


def test_waiting_is_seen():
    """The instrument of the tests below works."""
    number = torch.ones((), device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        number.item()
    assert number.item() == 1


def test_the_kernels_are_there():
    found = {op: devices["cuda"] for op, devices in stars_kernels.backends().items()}
    assert {found[op] for op in TRITON} == {"triton"} and found["accept"] in ("triton", "cuda")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("width", [1, 3, "auto"])
def test_float64_is_the_cpus_answer(lm, rm, config, width):
    settings = dict(config=CONFIGS[config].replace(eos_token_id=EOS_IDS), request_ids=IDS, width=width)
    expected = stars_kernels.decode(lm, rm, PROMPTS, **settings)
    outputs = stars_kernels.decode(*on_gpu(torch.float64), PROMPTS, **settings)
    assert answers(outputs) == answers(expected)
    assert [o.reward for o in outputs] == pytest.approx([o.reward for o in expected], rel=1e-9)
    assert outputs[0].backends["segments"].startswith("eager: float64")


def test_float64_decides_the_same_whatever_the_width_and_the_batch():
    models = on_gpu(torch.float64)
    expected = answers(stars_kernels.decode(*models, PROMPTS, width=1, **SETTINGS))
    for changes in ({"width": 5}, {"width": "auto"}, {"width": 3, "batch_size": 2}):
        assert answers(stars_kernels.decode(*models, PROMPTS, **changes, **SETTINGS)) == expected


@pytest.mark.parametrize("filters", [{}, {"top_k": None}], ids=["filters", "fused head"])
@pytest.mark.parametrize("prompts", [1, len(PROMPTS)])
def test_graphs_change_nothing(graphs, prompts, filters):
    assert all(bucket_of(NOT_PADDED * count) == NOT_PADDED * count for count in range(1, len(PROMPTS) + 1))
    models = on_gpu(torch.float32)
    settings = dict(SETTINGS, width=NOT_PADDED, **filters)
    outputs = stars_kernels.decode(*models, PROMPTS[:prompts], **settings)
    assert sum(made.counts.replays for made in graphs) > 3
    expected = stars_kernels.decode(*models, PROMPTS[:prompts], graphs=False, **settings)
    assert answers(outputs) == answers(expected)
    assert [o.reward for o in outputs] == [o.reward for o in expected]
    assert [[s.rewards for s in o.segments] for o in outputs] == [[s.rewards for s in o.segments] for o in expected]
    assert outputs[0].backends["segments"] == "CUDA graphs"
    assert expected[0].backends["segments"] == "eager: graphs=False"
    for output in (outputs[0], expected[0]):
        served = {op: output.backends[op] for op in TRITON}
        unfused = "not used: top_k, top_p or min_p is set"  # by default top_k is 40
        assert served.pop("lm_head_sample") == ("triton" if filters else unfused)
        assert set(served.values()) == {"triton"}


def test_padded_graphs(graphs):
    """Padding makes matrices of other shapes, which may round otherwise: rarely enough to tip a choice in float32."""
    models = on_gpu(torch.float32)
    outputs = stars_kernels.decode(*models, PROMPTS, width=3, **SETTINGS)
    assert sum(made.counts.replays for made in graphs) > 3
    share = share_of_equal(outputs, stars_kernels.decode(*models, PROMPTS, width=3, graphs=False, **SETTINGS))
    print(f"padded graphs, float32: {share:.0%} of the answers are those of eager segments")
    assert share >= 0.8


def test_float32_is_near_the_cpus_answer():
    expected = stars_kernels.decode(
        tiny_language_model(torch.float32), tiny_reward_model(torch.float32), PROMPTS, **SETTINGS
    )
    outputs = stars_kernels.decode(*on_gpu(torch.float32), PROMPTS, **SETTINGS)
    share = share_of_equal(outputs, expected)
    print(f"float32: {share:.0%} of the answers are the CPU's")
    assert share >= 0.8
    for a, b in zip(outputs, expected, strict=True):
        assert a.token_ids != b.token_ids or a.reward == pytest.approx(b.reward, rel=1e-4, abs=1e-4)


def test_early_ends_stop_strings_and_calibration():
    """What is decided outside of segments, which run to their end on a GPU."""
    settings = dict(seed=5, max_new_tokens=12, segment_size=5, eos_token_id=[257, 3, 77, 130])
    for dtype in (torch.float64, torch.float32):
        cpu = stars_kernels.decode(tiny_language_model(dtype), tiny_reward_model(dtype), PROMPTS, **settings)
        gpu = stars_kernels.decode(*on_gpu(dtype), PROMPTS, **settings)
        share = share_of_equal(gpu, cpu)
        print(f"calibrated, {dtype}: {share:.0%} of the answers are the CPU's")
        assert share == 1 or dtype == torch.float32
        assert any(output.finish_reason == "eos" for output in gpu)
        assert all(o.token_ids[-1] in settings["eos_token_id"] for o in gpu if o.finish_reason == "eos")


@pytest.mark.parametrize("filters", [{}, {"top_k": None}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_an_eager_segment_waits_for_nothing(monkeypatch, dtype, filters):
    models, settings = on_gpu(dtype), dict(SETTINGS, width=3, graphs=False, **filters)
    expected = stars_kernels.decode(*models, PROMPTS, **settings)  # compiles every kernel
    watched = []
    segment = ModelProposer._segment

    def watch(self, *args):
        watched.append(len(args[0]))
        with no_waiting():
            return segment(self, *args)

    monkeypatch.setattr(ModelProposer, "_segment", watch)
    assert answers(stars_kernels.decode(*models, PROMPTS, **settings)) == answers(expected)
    assert len(watched) > 3


def test_a_replay_waits_for_nothing(monkeypatch):
    models, settings = on_gpu(torch.float32), dict(SETTINGS, width=3)
    expected = stars_kernels.decode(*models, PROMPTS, **settings)
    watched = []

    class Watched(Graphs):
        def run(self, key, work):
            if key not in self.holds:
                return super().run(key, work)
            watched.append(key)
            with no_waiting():
                return super().run(key, work)

    monkeypatch.setattr(call, "Graphs", Watched)
    assert answers(stars_kernels.decode(*models, PROMPTS, **settings)) == answers(expected)
    assert len(watched) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_share_of_equal_answers(dtype):
    """A figure, not a promise: batches of other shapes round differently."""
    models = on_gpu(dtype)
    prompts = [[p, 2 * p + 1, 3] for p in range(32)]
    expected = stars_kernels.decode(*models, prompts, width=1, batch_size=1, **SETTINGS)
    for changes in ({"width": 4}, {"width": 16}, {"width": "auto"}, {"width": 3, "batch_size": 8}):
        outputs = stars_kernels.decode(*models, prompts, **changes, **SETTINGS)
        share = share_of_equal(outputs, expected)
        print(f"{dtype}, {changes}: {share:.0%} of the answers are those of width 1 alone")
        assert all(output.finish_reason == "length" for output in outputs)


@pytest.mark.parametrize("changes", [{}, {"graphs": False}, {"width": 3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_two_calls_are_bit_identical(dtype, changes):
    models = on_gpu(dtype)
    first, second = (stars_kernels.decode(*models, PROMPTS, seed=9, max_new_tokens=30, **changes) for _ in range(2))
    assert answers(first) == answers(second)
    assert [[s.rewards for s in o.segments] for o in first] == [[s.rewards for s in o.segments] for o in second]
    assert [o.config for o in first] == [o.config for o in second]


def test_two_decodes_in_two_threads():
    """On the same models; both capture, replay and wait while the other does."""
    models, rounds = on_gpu(torch.float32), 3
    halves = [PROMPTS[:2], PROMPTS[2:]]
    alone = [answers(stars_kernels.decode(*models, half, width=NOT_PADDED, **SETTINGS)) for half in halves]
    start = Barrier(2)

    def run(half):
        found = []
        for _ in range(rounds):
            start.wait(timeout=120)
            found.append(answers(stars_kernels.decode(*models, half, width=NOT_PADDED, **SETTINGS)))
        return found

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, halves))
    assert together == [[expected] * rounds for expected in alone]


def test_memory_does_not_grow_over_rounds(monkeypatch):
    models, allocated = on_gpu(torch.float32), []

    class Measured(Graphs):
        def keep(self, *args):
            allocated.append(torch.cuda.memory_allocated())
            return super().keep(*args)

    monkeypatch.setattr(call, "Graphs", Measured)
    settings = dict(SETTINGS, reward_threshold=1000.0, beta=0.1, max_attempts=20, max_new_tokens=40, width=NOT_PADDED)
    stars_kernels.decode(*models, PROMPTS[0], **settings)  # 10 segments of 5 rounds, 9 last tokens
    assert len(allocated) == 59
    print(f"allocated before a round: {allocated[0]} bytes, after the capture {max(allocated[5:25])}")
    assert max(allocated[25:]) <= max(allocated[5:25])


def test_memory_comes_back_after_a_decode():
    models = on_gpu(torch.float32)
    after = []
    for _ in range(4):
        stars_kernels.decode(*models, PROMPTS, width=NOT_PADDED, **SETTINGS)
        gc.collect()
        after.append(torch.cuda.memory_allocated())
    assert after[3] <= after[1], after


def test_on_the_device_of_the_model():
    """Another GPU than the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU alone")
    settings = dict(SETTINGS, width=NOT_PADDED)
    expected = stars_kernels.decode(*on_gpu(torch.float32), PROMPTS, **settings)
    models = [model.to("cuda:1") for model in on_gpu(torch.float32)]
    assert answers(stars_kernels.decode(*models, PROMPTS, **settings)) == answers(expected)


@pytest.mark.parametrize("lm_on_gpu", [True, False])
@pytest.mark.parametrize("kind", ["ids", "text", "encoder", "steps", "sum"])
def test_a_reward_model_on_another_device(kind, lm_on_gpu):
    """One of the two on the CPU: in float64 the answer of both on the CPU."""

    def described(place):
        ids, text = tiny_reward_model().to(place), tiny_reward_model(vocab_size=300).to(place)
        return {
            "ids": ids,
            "text": RewardModel(text, MERGING),
            "encoder": RewardModel(encoder().to(place), pair_tokenizer()),
            "steps": RewardModel(process_model().to(place), MERGING, label=1, step="c"),
            "sum": [ids, RewardModel(text, MERGING, weight=0.5)],
        }[kind]

    lm, settings = spelling_model("abc "), dict(SETTINGS, tokenizer=byte_tokenizer(), width=3)
    expected = stars_kernels.decode(lm, described("cpu"), ["ab", "c"], **settings)
    places = ("cuda", "cpu") if lm_on_gpu else ("cpu", "cuda")
    outputs = stars_kernels.decode(spelling_model("abc ").to(places[0]), described(places[1]), ["ab", "c"], **settings)
    assert answers(outputs) == answers(expected)
    assert [o.reward for o in outputs] == pytest.approx([o.reward for o in expected], rel=1e-9)
