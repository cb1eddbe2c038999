"""Scoring in forwards of a bounded size, which shrink where memory runs out."""

import re
import warnings
import weakref

import pytest
import torch

import stars_kernels
from stars_kernels import Likelihood, RewardModel
from stars_kernels.hf.scoring import chunks, likelihood
from stars_kernels.hf.scoring import rewarder as rewards
from stars_kernels.hf.scoring.chunks import Chunks
from tests.hf.scoring.test_encoder_rewards import encoder, pair_tokenizer
from tests.hf.scoring.test_process_rewards import process_model
from tests.hf.scoring.test_text_rewards import MERGING
from tests.tiny import byte_tokenizer, spelling_model, tiny_language_model, tiny_reward_model

SET = dict(seed=1, reward_threshold=9.0, beta=1.0, max_new_tokens=12, segment_size=4, max_attempts=6, width=6)
KINDS = {
    "by ids": tiny_reward_model(),
    "through text": RewardModel(tiny_reward_model(vocab_size=300), MERGING),
    "encoder": RewardModel(encoder(), pair_tokenizer()),
    "process": RewardModel(process_model(), MERGING, label=1),
    "likelihood": Likelihood(tiny_language_model(seed=7), tiny_language_model(seed=8)),
}


def replace_chunks(monkeypatch, kind):
    for module in (rewards, likelihood):
        monkeypatch.setattr(module, "Chunks", kind)


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory.")


def out_of_memory_on_a_cpu():
    return RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")


def test_rows_of_a_chunk():
    chunks, seen = Chunks(10), []
    lengths = [3, 2, 4, 1, 12, 5, 5, 1]
    assert chunks.run(lengths, lambda rows: seen.append(rows) or len(lengths[rows])) == [3 - 1, 2, 1, 2, 1]
    assert seen == [slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 7), slice(7, 8)]


@pytest.mark.parametrize("error", [out_of_memory, out_of_memory_on_a_cpu])
def test_a_forward_without_memory_is_halved(error):
    chunks = Chunks(100)

    def forward(rows):
        if rows.stop - rows.start > 3:
            raise error()
        return rows.stop - rows.start

    with pytest.warns(RuntimeWarning, match="out of memory as the reward model read") as warned:
        assert sum(chunks.run([10] * 8, forward)) == 8
    assert [re.findall(r"\d+", str(w.message)) for w in warned] == [["80", "40"], ["40", "20"]]
    assert chunks.tokens == 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it remembers
        assert chunks.run([10] * 4, forward) == [2, 2]


@pytest.mark.filterwarnings("ignore:out of memory")
def test_what_a_failed_forward_held_is_free_before_memory_is_handed_back(monkeypatch):
    held, alive = [], []
    monkeypatch.setattr(chunks, "free_memory", lambda: alive.append(held[-1]() is not None))

    def forward(rows):
        states = torch.zeros(1)
        held.append(weakref.ref(states))
        if rows.stop - rows.start > 1:
            raise out_of_memory()

    Chunks(8).run([4, 4], forward)
    assert alive == [False]


def test_one_row_without_memory_and_other_errors_are_raised():
    def fail(error):
        def forward(rows):
            raise error

        return forward

    with pytest.warns(RuntimeWarning), pytest.raises(torch.OutOfMemoryError):
        Chunks().run([5, 5], fail(out_of_memory()))
    with pytest.raises(RuntimeError, match="shapes"):
        Chunks().run([5, 5], fail(RuntimeError("shapes do not fit")))


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_do_not_depend_on_the_chunks(monkeypatch, kind):
    lm, settings = spelling_model("abc\n"), dict(SET, tokenizer=byte_tokenizer(), request_ids=[0, 1], progress=False)
    whole = stars_kernels.decode(lm, KINDS[kind], ["ab", "c"], **settings)
    sizes = []

    class Small(Chunks):
        def __init__(self, tokens=30):
            super().__init__(min(tokens, 30))

        def run(self, lengths, forward):
            def counted(rows):
                sizes.append(rows.stop - rows.start)
                return forward(rows)

            return super().run(lengths, counted)

    replace_chunks(monkeypatch, Small)
    parts = stars_kernels.decode(lm, KINDS[kind], ["ab", "c"], **settings)
    assert 1 <= max(sizes) < 12  # of the 12 rows of a round
    assert [o.token_ids for o in parts] == [o.token_ids for o in whole]
    for a, b in zip(parts, whole, strict=True):
        assert a.counts == b.counts
        for s, t in zip(a.segments, b.segments, strict=True):
            assert s.rewards == pytest.approx(t.rewards, abs=1e-9)


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_that_is_repeated_changes_nothing(monkeypatch, kind):
    """Where there is no memory for the rows at all, the loop asks again for fewer; what was read stays true."""
    lm, settings = spelling_model("abc\n"), dict(SET, tokenizer=byte_tokenizer(), request_ids=[0, 1], progress=False)
    expected = stars_kernels.decode(lm, KINDS[kind], ["ab", "c"], **settings)
    failed = []

    class Small(Chunks):
        def run(self, lengths, forward):
            if len(lengths) > 3:
                failed.append(len(lengths))
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().run(lengths, forward)

    replace_chunks(monkeypatch, Small)
    outputs = stars_kernels.decode(lm, KINDS[kind], ["ab", "c"], **settings)
    assert failed
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    for a, b in zip(outputs, expected, strict=True):
        assert a.reward == pytest.approx(b.reward, abs=1e-9)
