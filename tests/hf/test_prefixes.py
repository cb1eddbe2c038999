"""Prompts that begin alike are read once: what is copied gives the answers that reading gives."""

import random

import pytest
import torch

import stars_kernels
from stars_kernels import BestOf, Engine, SpeculativeRejection, StarsConfig, StarsError
from stars_kernels.decoder.arenas import WORTH_COPYING
from stars_kernels.ops import backends
from tests.hf import families
from tests.sequential import sequential_decode
from tests.tiny import EOS, byte_tokenizer, tiny_language_model, tiny_reward_model

COMMON = [(7 * i) % 250 for i in range(70)]
PROMPTS = [[*COMMON[: 70 - 3 * p], 100 + p, *range(p)] for p in range(6)] + [[1, 2, 3], COMMON, COMMON]
IDS = range(len(PROMPTS))
SET = dict(
    seed=3, reward_threshold=2.0, beta=1.0, max_new_tokens=14, segment_size=4, max_attempts=4, progress=False,
    eos_token_id=(EOS, 3, 77),
)  # fmt: skip


@pytest.fixture(scope="module")
def truth(lm, rm):
    config = StarsConfig(**SET)
    return [sequential_decode(lm, rm, p, i, config, config.eos_token_id) for p, i in zip(PROMPTS, IDS, strict=True)]


def told(outputs):
    return [(o.token_ids, [s.attempts for s in o.segments]) for o in outputs]


@pytest.mark.parametrize("slots", [1, 2, 4, 9])
@pytest.mark.parametrize("width", [1, 3])
def test_what_is_shared_is_not_read_and_changes_no_answer(lm, rm, truth, slots, width):
    outputs = stars_kernels.decode(lm, rm, PROMPTS, request_ids=IDS, batch_size=slots, width=width, **SET)
    assert told(outputs) == truth
    shared = [output.counts.shared for output in outputs]
    assert shared[0] == shared[6] == 0
    expected = [0, 67, 64, 61, 58, 55, 0, 69, 69]  # of the longest that was read before, where all have a slot
    if slots == 9:
        assert shared == expected
    else:
        assert all(n <= most for n, most in zip(shared, expected, strict=True)) and sum(n > 0 for n in shared) > 4
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        assert output.counts.rm_scored >= len(prompt) - output.counts.shared + output.counts.judged


def test_each_token_is_read_once(rm):
    """By the language model and by the reward model: of eight prompts that share 990 of 1,000 tokens."""
    lm, rm = tiny_language_model(max_position_embeddings=2048), tiny_reward_model(max_position_embeddings=2048)
    read = {}

    def count(name):
        def hook(module, args, given):
            rows, tokens = given["input_ids"].shape
            if rows == 1 and tokens > 4:
                read[name] = read.get(name, 0) + tokens

        return hook

    prompts = [[i % 250 for i in range(990)] + [p + j for j in range(10)] for p in range(8)]
    for name, model in (("lm", lm), ("rm", rm)):
        model.base_model.register_forward_pre_hook(count(name), with_kwargs=True)
    outputs = stars_kernels.decode(lm, rm, prompts, width=2, **{**SET, "eos_token_id": ()})
    assert [output.counts.shared for output in outputs] == [0] + [990] * 7
    assert read["lm"] == read["rm"] == 1000 + 7 * 10


@pytest.mark.parametrize("slots", [1, 2])
def test_the_turns_of_a_conversation(lm, rm, slots):
    """The next turn begins with a prompt and its answer: but for the last token, all of it is there."""
    prompts, answers = [COMMON], []
    for turn in range(3):
        (answer,) = stars_kernels.decode(lm, rm, prompts[-1:], request_ids=[turn], **SET)
        answers.append(answer.token_ids)
        prompts.append([*prompts[-1], *answer.token_ids, 5, 6, turn])
    outputs = stars_kernels.decode(lm, rm, prompts[:3], request_ids=range(3), batch_size=slots, **SET)
    assert [output.token_ids for output in outputs] == answers
    if slots == 2:  # the second begins while the first is not finished
        assert outputs[1].counts.shared == len(COMMON) and outputs[2].counts.shared > len(COMMON)
        return
    assert [output.counts.shared for output in outputs] == [
        0, *(len(p) + len(a) - 1 for p, a in zip(prompts[:2], answers, strict=False)),
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen2", "mistral"])
def test_bits_are_those_of_reading(family):
    """In fp32 on a CPU: tokens and rewards, wherever a prompt's beginning comes from."""
    if backends()["fork_attention"]["cpu"] != "cpp":
        pytest.skip("fork_attention has no compiled version here")
    lm, rm = families.tiny(family).float(), tiny_reward_model(torch.float32)
    settings = {**SET, "eos_token_id": (), "max_new_tokens": 10}

    def told(outputs):
        return [(o.token_ids, o.reward, [s.rewards for s in o.segments]) for o in outputs]

    alone = [told([stars_kernels.decode(lm, rm, p, request_ids=i, **settings)])[0] for i, p in enumerate(PROMPTS)]
    for slots in (1, 3, 9):
        outputs = stars_kernels.decode(lm, rm, PROMPTS, request_ids=IDS, batch_size=slots, **settings)
        assert told(outputs) == alone and sum(output.counts.shared > 0 for output in outputs) > 4


@pytest.mark.parametrize("rule", [BestOf(2), SpeculativeRejection(4, segment_size=4)], ids=str)
def test_other_rules(lm, rm, rule):
    config = StarsConfig(rule=rule, seed=1, max_new_tokens=12)
    expected = [sequential_decode(lm, rm, p, i, config, (EOS,)) for i, p in enumerate(PROMPTS)]
    outputs = stars_kernels.decode(lm, rm, PROMPTS, request_ids=IDS, batch_size=2, config=config)
    assert [o.token_ids for o in outputs] == [tokens for tokens, _ in expected]
    assert sum(output.counts.shared > 0 for output in outputs) > 4


@pytest.mark.parametrize("kind", ["likelihood", "own head", "text"])
def test_other_reward_models(lm, rm, kind):
    torch.manual_seed(0)
    rewards = {
        "likelihood": stars_kernels.Likelihood(lm, tiny_language_model(seed=3)),
        "own head": torch.nn.Linear(lm.config.hidden_size, 1).double(),
        "text": stars_kernels.RewardModel(rm, byte_tokenizer(reverse=True)),
    }
    settings = dict(SET, tokenizer=byte_tokenizer(), beta=3.0)
    prompts = ["a" * 50 + letter * 3 for letter in "abcde"]
    alone = [stars_kernels.decode(lm, rewards[kind], p, request_ids=p, **settings) for p in prompts]
    outputs = stars_kernels.decode(lm, rewards[kind], prompts, request_ids=prompts, batch_size=2, **settings)
    for found, expected in zip(outputs, alone, strict=True):
        assert told([found]) == told([expected]) and abs(found.reward - expected.reward) < 1e-9
        assert abs(found.prompt_reward - expected.prompt_reward) < 1e-9
    assert [output.counts.shared > WORTH_COPYING for output in outputs] == [False] + [True] * 4


@pytest.mark.parametrize("family", ["falcon", "mamba", "qwen3_next"])
def test_models_that_cannot_copy_read_all(family, rm):
    lm = families.tiny(family)
    alone = [stars_kernels.decode(lm, rm, p, request_ids=i, **SET) for i, p in enumerate(PROMPTS[:4])]
    outputs = stars_kernels.decode(lm, rm, PROMPTS[:4], request_ids=range(4), batch_size=2, **SET)
    assert told(outputs) == told(alone) and [output.counts.shared for output in outputs] == [0] * 4


@pytest.mark.parametrize(("many", "spare"), [(1, 1), (1, 4096), (8, 4096)])
def test_turns_of_conversations_in_calls_of_their_own(many, spare):
    """But for the last token of an answer, and what is new, an engine's models have read all of it."""
    lm, rm = tiny_language_model(max_position_embeddings=512), tiny_reward_model(max_position_embeddings=512)
    prompts = [[*COMMON[:40], 100 + p, *COMMON[p:]] for p in range(many)]
    with Engine(lm, rm, prefix_cache=spare, **SET) as engine:
        before = [0] * many
        for turn in range(4):
            ids = [f"{turn} {p}" for p in range(many)]
            outputs = engine.decode(prompts, request_ids=ids)
            alone = [stars_kernels.decode(lm, rm, p, request_ids=i, **SET) for p, i in zip(prompts, ids, strict=True)]
            assert told(outputs) == told(alone)
            shared = [output.counts.shared for output in outputs]
            assert shared == before if turn else shared == [0] + [40] * (many - 1)
            before = [len(p) + len(o.token_ids) - 1 for p, o in zip(prompts, outputs, strict=True)]
            prompts = [[*p, *o.token_ids, 5, 6, turn] for p, o in zip(prompts, outputs, strict=True)]


def test_calibration_and_decode_read_a_prompt_once(lm, rm):
    settings = {**SET, "reward_threshold": None, "beta": None, "calibration_samples": 4}
    outputs = stars_kernels.decode(lm, rm, [COMMON, [9, *COMMON]], request_ids=range(2), **settings)
    assert [output.counts.shared for output in outputs] == [len(COMMON) - 1, len(COMMON)]
    for output, prompt, i in zip(outputs, [COMMON, [9, *COMMON]], range(2), strict=True):
        truth = stars_kernels.decode(lm, rm, prompt, request_ids=i, config=output.config)
        assert truth.counts.shared == 0 and told([truth]) == told([output])


def places(engine):
    """The places for tokens that the engine has, of each of its models."""
    with engine.open_run([[1, 2, 3]]) as run:
        sides = run.round.proposer.cache, run.round.scorer.cache
        return [group.arena.shape[2] for side in sides for group in side.groups]


@pytest.mark.parametrize("spare", [0, 100, 1000])
def test_the_memory_for_it_is_bounded(lm, rm, spare):
    with Engine(lm, rm, prefix_cache=spare, batch_size=2, **SET) as engine:
        for call in range(12):
            engine.decode([[*range(call), *COMMON], [200 + call, *COMMON]])
        needed = 12 + 70 + 71 + 2 * SET["max_new_tokens"]
        assert len(set(places(engine))) == 1 and spare < places(engine)[0] <= needed + spare


@pytest.mark.parametrize("spare", [0, 1, 4096])
def test_off(lm, rm, spare):
    with Engine(lm, rm, prefix_cache=spare, **SET) as engine:
        assert [engine.decode(COMMON).counts.shared for _ in range(3)] == [0, 69 * (spare > 0), 69 * (spare > 0)]


@pytest.mark.parametrize("value", [-1, 1.5, None, "all", 10**400])
def test_what_is_no_number_of_tokens_is_refused(lm, rm, value):
    with pytest.raises(ValueError, match=f"prefix_cache is {value!r}, expected a number of tokens, 0 to "):
        Engine(lm, rm, prefix_cache=value)


def test_a_consumer_may_do_with_the_tokens_what_it_likes(lm, rm):
    with Engine(lm, rm, **SET) as engine:
        for event in engine.stream(COMMON, request_ids=1):
            if event.output is not None:
                told_ids = event.output.token_ids
                answer = list(told_ids)
                told_ids += [5, 6, 7, 8]
        after = engine.decode([*COMMON, *answer, 5, 6, 7, 8, 9], request_ids=2)
    assert after.counts.shared == len(COMMON) + len(answer) - 1
    assert told([after]) == told([stars_kernels.decode(lm, rm, [*COMMON, *told_ids, 9], request_ids=2, **SET)])


def test_what_is_left_is_in_nobodys_way():
    """Where two prompts have no room beside what was left, it goes, and they are decoded side by side."""
    lm, rm = tiny_language_model(max_position_embeddings=512), tiny_reward_model(max_position_embeddings=512)
    with Engine(lm, rm, prefix_cache=200, **SET) as engine:
        engine.decode([[3] * 200])
        with engine.open_run([[4] * 180, [5] * 180]) as run:
            assert len(run.active) == 2


@pytest.mark.parametrize("how", ["score", "interrupt"])
def test_what_grows_may_be_larger_than_it_is_known_to_be(how):
    """After calls whose arenas are forgotten, but are there."""
    lm, rm = tiny_language_model(max_position_embeddings=512), tiny_reward_model(max_position_embeddings=512)
    many, first = [[p] * 120 for p in range(8)], [9, *COMMON]
    prompts = [[*first, 5], *([100 + p] * 140 for p in range(8))]
    alone = [stars_kernels.decode(lm, rm, prompt, request_ids=i, **SET) for i, prompt in enumerate(prompts)]

    with Engine(lm, rm, prefix_cache=100, batch_size=9, **SET) as engine:
        if how == "score":
            engine.score(many, [[1, 2, 3]] * 8)
        else:
            stream = engine.stream(many)
            next(stream)
            with pytest.raises(KeyboardInterrupt):
                stream.throw(KeyboardInterrupt)
        engine.decode(first)
        outputs = engine.decode(prompts, request_ids=range(9))
    assert outputs[0].counts.shared == len(first) and told(outputs) == told(alone)
    assert [output.prompt_reward for output in outputs] == [output.prompt_reward for output in alone]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_any_calls_of_one_engine(family):
    """Calls at random, which fail, end early and score in between: in fp32 on a CPU the bits are those of one alone."""
    if backends()["fork_attention"]["cpu"] != "cpp":
        pytest.skip("fork_attention has no compiled version here")
    lm, rm, rng = families.tiny(family).float(), tiny_reward_model(torch.float32), random.Random(family)
    settings = {**SET, "eos_token_id": (7,), "max_new_tokens": 9}
    prompts, known, shared = [COMMON, COMMON[:50], [3, *COMMON]], {}, 0

    def bits(output):
        return output.token_ids, output.reward, [s.rewards for s in output.segments]

    def alone(prompt, request_id):
        if (key := (tuple(prompt), request_id)) not in known:
            known[key] = bits(stars_kernels.decode(lm, rm, prompt, request_ids=request_id, **settings))
        return known[key]

    with Engine(lm, rm, prefix_cache=rng.choice([100, 300, 1000]), **settings) as engine:
        for call in range(40):
            chosen = rng.choices(prompts[-8:], k=rng.randint(1, 5))
            ids = [rng.randint(0, 3) * 100 + i for i in range(len(chosen))]
            how = {
                "batch_size": rng.choice([1, 2, 5]),
                "width": rng.choice([1, 3, "auto"]),
            }
            kind = rng.choice(["decode", "decode", "decode", "closed", "score", "fails"])
            if kind == "score":
                engine.score(chosen, [[1, 2, 3]] * len(chosen))
            elif kind == "closed":
                stream = engine.stream(chosen, request_ids=ids, **how)
                for _ in range(rng.randint(0, 3)):
                    next(stream, None)
                stream.close()
            elif kind == "fails":
                with pytest.raises(StarsError, match="expected at least one"):
                    engine.decode([*chosen, []], request_ids=[*ids, "empty"], **how)
            else:
                for output, prompt, i in zip(engine.decode(chosen, request_ids=ids, **how), chosen, ids, strict=True):
                    assert bits(output) == alone(prompt, i), call
                    shared += output.counts.shared
                    if len(prompt) < 120:
                        prompts.append([*prompt, *output.token_ids, rng.randint(0, 250), rng.randint(0, 250)])
    assert shared > 40 * 50
