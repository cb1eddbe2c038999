"""The fork cache: logits and rewards as the model's own, bits that stay where they are, and its memory."""

import pytest
import torch

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.hf.cache import open_cache
from stars_kernels.hf.cache.prefill import PREFILL_TOKENS, packed_chunks
from stars_kernels.hf.proposing.proposer import ModelProposer
from stars_kernels.hf.scoring.classifier import ClassifierScorer
from stars_kernels.hf.view.copying import view_of
from stars_kernels.ops.philox import request_key
from tests.runs import admit, run_of
from tests.tiny import tiny_language_model, tiny_reward_model

PROMPTS = [[1, 2, 3], [40], list(range(50, 61))]


@pytest.fixture
def cache(lm):
    cache = open_cache(view_of(lm), [len(p) + 12 for p in PROMPTS], 6)
    cache.groups[0].arena.fill_(torch.nan)
    return cache


def fill(view, cache, prompts=PROMPTS):
    for chunk in packed_chunks(dict(enumerate(prompts)), cache):
        with cache.prefill(chunk.slots, chunk.counts) as inputs:
            view(input_ids=torch.tensor([chunk.ids]), **inputs)


def forward(view, cache, tokens, query_len=None):
    with cache.extend(tokens.shape[1], query_len) as inputs, torch.no_grad():
        return view(input_ids=tokens, **inputs).logits


@torch.no_grad()
def test_logits_equal_the_models_own(lm, cache):
    view = view_of(lm)
    fill(view, cache)
    rows = torch.tensor([2, 0, 0, 1, 2])
    cache.fork(rows)
    cache.groups[0].suffix.fill_(torch.nan)
    tokens = torch.randint(0, 250, (5, 6), generator=torch.Generator().manual_seed(0))
    step_by_step = [forward(view, cache, tokens[:, i : i + 1]) for i in range(3)]
    at_once = forward(view, cache, tokens[:, 3:])
    cache.rollback(2)
    again = forward(view, cache, tokens[:, 2:6])
    for r, p in enumerate(rows.tolist()):
        own = lm(torch.tensor([PROMPTS[p] + tokens[r].tolist()])).logits[0, len(PROMPTS[p]) :]
        torch.testing.assert_close(torch.cat([*step_by_step, at_once], dim=1)[r], own, rtol=0, atol=1e-6)
        torch.testing.assert_close(again[r], own[2:], rtol=0, atol=1e-6)


@torch.no_grad()
def test_prompts_longer_than_a_packed_forward():
    """Logits and rewards do not depend on how the prompts were cut and packed."""
    lm = tiny_language_model(max_position_embeddings=4096)
    rm = tiny_reward_model(max_position_embeddings=4096)
    prompts = [torch.arange(n).remainder(250).tolist() for n in (PREFILL_TOKENS - 3, 2 * PREFILL_TOKENS + 5, 7)]
    proposer = ModelProposer(view_of(lm))
    admit(proposer, prompts, 4, 2)
    for p, prompt in enumerate(prompts):
        own = lm(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(proposer.logits[p], own, rtol=0, atol=1e-6)
    rewards = admit(ClassifierScorer(view_of(rm), 0), prompts, 4, 2).rewards
    for reward, prompt in zip(rewards, prompts, strict=True):
        assert reward.item() == pytest.approx(rm(torch.tensor([prompt])).logits.item(), abs=1e-6)


def loop_of(lm, rm, config, prompts=PROMPTS):
    answers = [Answer(request_key(0, p), prompt, config.max_new_tokens) for p, prompt in enumerate(prompts)]
    return run_of(ModelProposer(view_of(lm)), ClassifierScorer(view_of(rm), 0), config, answers)


def poison(cache):
    cache.groups[0].suffix.fill_(torch.nan)
    for p, (offset, length) in enumerate(zip(cache.offsets.tolist(), cache.lengths.tolist(), strict=True)):
        end = cache.offsets[p + 1] if p + 1 < len(cache.offsets) else cache.groups[0].arena.shape[2]
        cache.groups[0].arena[:, :, offset + length : end] = torch.nan


def _places(opened):
    """Where rows lie that were opened in this order."""
    return {row: place for place, row in enumerate(opened)}


@torch.inference_mode()
def test_commit_is_bit_exact_and_rejection_moves_nothing(lm, rm, monkeypatch):
    """After each round: committed places equal the winner's suffix, every other place is as before, NaN poison too."""
    seen = {"advanced": 0, "best so far": 0, "stored earlier": 0}

    def watch(cache):
        real = cache.commit

        def commit(prompt, row, count, advance):
            before, lengths = cache.groups[0].arena.clone(), cache.lengths.clone()
            settle = real(prompt, row, count, advance)
            assert torch.equal(cache.groups[0].arena.view(torch.int64), before.view(torch.int64))  # not before settle()
            assert torch.equal(cache.lengths, lengths)
            lies = _places(cache._opened or range(len(cache.slot)))
            settle()
            expected, moved = before.clone(), lengths.clone()
            for p, r, n, go in zip(prompt.tolist(), row.tolist(), count.tolist(), advance.tolist(), strict=True):
                start = int(cache.offsets[p] + lengths[p])
                if r >= 0:
                    expected[:, :, start : start + n] = cache.groups[0].suffix[:, :, lies[r], :n]
                moved[p] += n * go
                seen["advanced" if go and r >= 0 else "stored earlier" if go else "best so far"] += 1
            assert torch.equal(cache.groups[0].arena.view(torch.int64), expected.view(torch.int64))
            assert torch.equal(cache.lengths, moved)
            return lambda: None

        monkeypatch.setattr(cache, "commit", commit)

    config = StarsConfig(
        segment_size=5, max_new_tokens=20, max_attempts=5, width=2, reward_threshold=2.5, beta=0.3, seed=0
    )
    loop = loop_of(lm, rm, config)
    loop.admit()
    caches = loop.round.proposer.cache, loop.round.scorer.cache
    for cache in caches:
        poison(cache)
        watch(cache)

    def prefixes():
        return [
            [cache.groups[0].arena[:, :, o : o + n].clone() for o, n in zip(cache.offsets, cache.lengths, strict=True)]
            for cache in caches
        ]

    before = prefixes()
    for _ in loop.rounds():
        for cache, saved in zip(caches, before, strict=True):  # no byte below the length has changed
            for p, prefix in enumerate(saved):
                start = cache.offsets[p]
                now = cache.groups[0].arena[:, :, start : start + prefix.shape[2]]
                assert torch.equal(now.contiguous().view(torch.int64), prefix.view(torch.int64))
        before = prefixes()
    assert [answer.error for answer in loop.answers] == [None] * len(PROMPTS)
    assert all(seen.values()), seen


@torch.inference_mode()
@pytest.mark.parametrize("width", [1, 4, 7])
def test_memory_of_a_round(lm, rm, width):
    """KV of a round: the slots' capacities + rows * segment_size tokens, for the LM and for the RM."""
    config = StarsConfig(
        segment_size=5,
        max_new_tokens=10,
        max_attempts=7,
        width=width,
        reward_threshold=50.0,
        beta=1.0,
        seed=0,
    )
    loop = loop_of(lm, rm, config)
    loop.run()
    capacity = sum(len(prompt) + config.max_new_tokens for prompt in PROMPTS)
    for cache in (loop.round.proposer.cache, loop.round.scorer.cache):
        tokens = capacity + max(width, 1) * len(PROMPTS) * config.segment_size
        per_token = lm.config.num_hidden_layers * 2 * lm.config.num_key_value_heads * lm.config.head_dim * 8
        assert cache.kv_tokens == tokens
        assert cache.kv_bytes == tokens * per_token
        assert (
            sum(
                t.numel() * t.element_size()
                for t in [*vars(cache).values(), *vars(cache.groups[0]).values()]
                if torch.is_tensor(t) and t.is_floating_point()
            )
            == cache.kv_bytes
        )


def test_view_leaves_the_model_alone(lm):
    model = tiny_language_model().train()
    view = view_of(model)
    assert model.training and not view.training
    assert all(a.training for a in model.modules()) and not any(b.training for b in view.modules())
    assert [p.data_ptr() for p in model.parameters()] == [p.data_ptr() for p in view.parameters()]
    assert model.config._attn_implementation != view.config._attn_implementation == "stars"
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False).shape == (1, 4)


def test_a_model_that_does_not_call_the_hook_is_refused(lm):
    view = view_of(tiny_language_model())
    view.config._attn_implementation = "sdpa"
    proposer = ModelProposer(view)
    with pytest.raises(
        ValueError, match="LlamaForCausalLM cannot be decoded exactly: 0 of 2 layers called the stars attention hook"
    ):
        admit(proposer, [[1, 2, 3]], 4, 2)


def test_rollback_out_of_range(cache):
    cache.fork(torch.tensor([0]))
    with pytest.raises(ValueError, match="rollback to 1 suffix tokens, expected 0 to 0"):
        cache.rollback(1)
