"""Rounds that the device judges, a step ahead of the host: the sequential answers, and nothing lost or done twice.

Graphs are replayed by the stand-in of `tests.captured`, in which a number of the host's stays what it was at capture.
"""

import asyncio
import itertools
import threading
import warnings

import pytest
import torch

import stars_kernels
from stars_kernels import DecodeError, Engine, StarsConfig
from stars_kernels.decoder.device_rounds import DeviceRounds
from stars_kernels.decoder.rules import Stars
from stars_kernels.decoder.scheduler import Run
from stars_kernels.hf.models import Models
from stars_kernels.hf.proposing.processors import TokenHooks
from stars_kernels.hf.proposing.proposer import ModelProposer
from stars_kernels.hf.scoring.classifier import ClassifierScorer
from stars_kernels.hf.serving import Serving
from tests.captured import segments_as_graphs
from tests.hf.proposing.test_segment_waits import Watch
from tests.sequential import sequential_decode
from tests.tiny import EOS, byte_tokenizer, tiny_language_model, tiny_reward_model

PROMPTS = [[1, 2, 3], [40], [7, 8, 9, 10, 11, 12, 13, 200], [40], [90, 91, 92, 93, 94]]
EOS_IDS = (EOS, 3, 77, 130, *range(60, 64))
CONFIGS = {
    "soft": StarsConfig(seed=3, reward_threshold=2.0, beta=0.5, max_attempts=6),
    "hard": StarsConfig(seed=4, reward_threshold=1.0, accept="hard", beta=1.0, max_attempts=5, alpha=0.2),
    "fallback": StarsConfig(seed=6, reward_threshold=100.0, beta=0.1, max_attempts=5, top_k=20, temperature=0.7),
}
CONFIGS = {
    name: config.replace(max_new_tokens=14, segment_size=4, eos_token_id=EOS_IDS) for name, config in CONFIGS.items()
}
SHAPES = [(1, 5), (2, 2), (4, 3), (5, 1), (7, 5)]  # (width, slots)


def own_head():
    torch.manual_seed(2)
    return torch.nn.Linear(24, 1).double()


REWARDS = {
    "classifier": lambda: tiny_reward_model(),
    "own head": own_head,
    "sum": lambda: [tiny_reward_model(), stars_kernels.RewardModel(own_head(), weight=0.5)],
}


@pytest.fixture
def graphs(monkeypatch):
    """All Graphs of a decode, which then takes the path of a GPU."""
    return segments_as_graphs(monkeypatch)


def decode(lm, rm, config, width, slots, prompts=PROMPTS, **settings):
    shaped = config.replace(width=width, wave=width, batch_size=slots)
    return stars_kernels.decode(lm, rm, prompts, request_ids=range(len(prompts)), config=shaped, **settings)


def told(output):
    """All that an output says but for how it was reached."""
    segments = [(s.rewards, s.thresholds, s.lengths, s.chosen, s.outcome) for s in output.segments]
    counts = output.counts
    return (
        output.token_ids, output.reward, output.finish_reason, segments, output.prompt_reward,
        (counts.judged, counts.accepted, counts.attempts, counts.rejected, counts.prompt),
    )  # fmt: skip


def on_device(output):
    """How many of the call's rounds the device judged, and how many the host."""
    device, host = (int(word) for word in output.backends["rounds"].split() if word.isdecimal())
    return device, host


@pytest.fixture(scope="module")
def by_host(lm):
    """What the host's rounds give, without graphs: by configuration and kind of reward model."""
    return {
        (config, rewards): [told(output) for output in decode(lm, make(), CONFIGS[config], 3, 5)]
        for config in ("soft", "fallback")
        for rewards, make in REWARDS.items()
    }


@pytest.mark.parametrize("config", CONFIGS)
def test_answers_are_the_sequential_loops(lm, rm, graphs, config):
    """At every width and number of slots."""
    settings = CONFIGS[config]
    expected = [sequential_decode(lm, rm, prompt, i, settings, EOS_IDS) for i, prompt in enumerate(PROMPTS)]
    assert max(n for _, attempts in expected for n in attempts) > 3
    assert {tokens[-1] in EOS_IDS for tokens, _ in expected} == {True, False}
    rounds = 0
    for width, slots in SHAPES:
        outputs = decode(lm, rm, settings, width, slots)
        assert [(o.token_ids, [s.attempts for s in o.segments]) for o in outputs] == expected
        device, host = on_device(outputs[-1])
        rounds += device
        assert host == 0
    assert rounds > 25


@pytest.mark.parametrize("rewards", REWARDS)
@pytest.mark.parametrize("config", ["soft", "fallback"])
def test_all_that_is_told_is_what_the_host_would_tell(lm, by_host, monkeypatch, config, rewards):
    expected = by_host[config, rewards]
    segments_as_graphs(monkeypatch)
    for width, slots in ((2, 5), (5, 2)):
        outputs = decode(lm, REWARDS[rewards](), CONFIGS[config], width, slots)
        assert [told(output) for output in outputs] == expected
        assert on_device(outputs[-1])[1] == 0


def test_the_host_hears_of_a_round_once_the_next_is_queued(lm, rm, graphs, monkeypatch):
    """And queues it without waiting for anything."""
    log, watch = [], Watch()

    def logged(name, watched):
        real = getattr(DeviceRounds, name)

        def call(self, *args):
            log.append(name)
            if not watched:
                return real(self, *args)
            watch.waits = []
            with watch:
                result = real(self, *args)
            # An upload is none. What is compared on a CPU alone: the checks of the definitions' arguments.
            assert set(watch.waits) <= {"lift_fresh"}, watch.waits
            return result

        monkeypatch.setattr(DeviceRounds, name, call)

    logged("prepare", True)
    logged("collect", False)
    decode(lm, rm, CONFIGS["fallback"].replace(eos_token_id=()), 5, 5)
    # Four segments of one round each; the last begins once the one before it is known to have left room for it.
    assert log == ["prepare", *["prepare", "collect"] * 3, "collect"]


def test_a_later_call_finds_its_graphs(lm, rm, graphs):
    with Engine(lm, rm, config=CONFIGS["soft"].replace(width=3, wave=3, batch_size=5)) as engine:
        first, second, third = (engine.decode(PROMPTS, request_ids=range(5)) for _ in range(3))
        (made,) = graphs
        assert len(made.part("rounds").holds) >= 3, "one for each number of slots, and of tokens"
        assert third[-1].backends["graphs"].startswith("0 captured")
    assert [told(output) for output in first] == [told(output) for output in second]
    assert [told(output) for output in first] == [told(output) for output in third]


def test_going_over_between_device_and_host(lm, by_host, monkeypatch):
    """In the middle of a segment, and with a round in flight."""
    expected = by_host["fallback", "classifier"]
    segments_as_graphs(monkeypatch)
    shape, turn = Run._shape, itertools.count()

    def changing(self, slots):
        widths, _ = shape(self, slots)
        return widths, (1 if next(turn) % 5 in (2, 3) else max(widths))

    monkeypatch.setattr(Run, "_shape", changing)
    for rewards in ("classifier", "own head"):
        outputs = decode(lm, REWARDS[rewards](), CONFIGS["fallback"], 2, 3)
        device, host = on_device(outputs[-1])
        assert device > 3 and host > 3
        if rewards == "classifier":
            assert [told(output) for output in outputs] == expected
        else:
            monkeypatch.setattr(Run, "_shape", shape)
            again = decode(lm, REWARDS[rewards](), CONFIGS["fallback"], 3, 5)
            assert [told(output) for output in outputs] == [told(output) for output in again]


def test_a_context_that_ends_first(graphs, monkeypatch):
    """Longer prompts end with the context, and others begin in their slots."""
    models = tiny_language_model(max_position_embeddings=32), tiny_reward_model()
    prompts = [[1] * 25, [2] * 3, [3] * 30, [4] * 21, [5] * 31]
    config = CONFIGS["soft"].replace(eos_token_id=())
    outputs = decode(*models, config, 3, 2, prompts)
    assert [len(o.token_ids) for o in outputs] == [7, 14, 2, 11, 1]
    assert [o.finish_reason for o in outputs] == ["context", "length", "context", "context", "context"]
    assert on_device(outputs[-1])[1] == 0
    monkeypatch.undo()
    expected = decode(*models, config, 1, 5, prompts)
    assert [told(output) for output in outputs] == [told(output) for output in expected]


def test_every_end_that_comes_from_outside(lm, rm, by_host, graphs):
    """After each event of a stream: what was decided is told, once, and goes no further."""
    whole = [tokens for tokens, *_ in by_host["soft", "classifier"]]
    config = CONFIGS["soft"].replace(width=2, wave=2, batch_size=2)
    lengths = set()
    for events in range(1, 12, 2):
        cancel, seen = threading.Event(), {}
        stream = stars_kernels.stream(lm, rm, PROMPTS, request_ids=range(5), config=config, cancel=cancel)
        for number, event in enumerate(stream, start=1):
            seen.setdefault(event.index, []).append(event)
            if number == events:
                cancel.set()
        for index, of_one in seen.items():
            output = of_one[-1].output
            assert [event.output is None for event in of_one] == [True] * (len(of_one) - 1) + [False]
            assert [token for event in of_one for token in event.token_ids] == output.token_ids
            assert output.token_ids == whole[index][: len(output.token_ids)]
            assert (output.finish_reason == "cancelled") or output.token_ids == whole[index]
            assert sum(s.length for s in output.segments if s.outcome in ("accepted", "fallback")) == len(
                output.token_ids
            )
            lengths.add(len(output.token_ids))
        assert len(seen) == 5
    assert len(lengths) > 3


def exhausted():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("where", ["read_last", "propose", "open", "score", "prepare"])
def test_memory_that_runs_out_anywhere_before_the_judgement(lm, rm, by_host, graphs, monkeypatch, where):
    """Twice: with a round in flight, which is booked, and again without one; then the round is repeated, smaller."""
    expected = by_host["soft", "classifier"]
    owner = {"prepare": DeviceRounds, "open": ClassifierScorer, "score": ClassifierScorer}.get(where, ModelProposer)
    real = getattr(owner, where)
    for when in (1, 2, 4):
        calls = itertools.count(1)

        def failing(*args, calls=calls, when=when):
            if next(calls) in (when, when + 1):
                raise exhausted()
            return real(*args)

        monkeypatch.setattr(owner, where, failing)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outputs = decode(lm, rm, CONFIGS["soft"], 3, 3)
        assert [told(output) for output in outputs] == expected
        assert all("out of memory in a round" in str(warning.message) for warning in caught)
        assert caught and on_device(outputs[-1])[1] == 0


@pytest.mark.parametrize("when", [1, 3])
def test_what_fails_in_the_judgement_ends_the_answers_in_the_round(lm, rm, by_host, graphs, monkeypatch, when):
    """What it wrote cannot be taken back. The others begin and end as ever."""
    whole = [tokens for tokens, *_ in by_host["soft", "classifier"]]
    real, calls = DeviceRounds._judge, itertools.count(1)

    def failing(*args):
        if next(calls) == when:
            raise exhausted()
        return real(*args)

    monkeypatch.setattr(DeviceRounds, "_judge", failing)
    outputs = decode(lm, rm, CONFIGS["soft"], 3, 2, errors="return")
    errors = [output for output in outputs if isinstance(output, DecodeError)]
    assert 1 <= len(errors) <= 2 and all("out of memory" in str(error) for error in errors)
    assert all(o.token_ids == tokens for o, tokens in zip(outputs, whole, strict=True) if o not in errors)


def test_a_reward_that_is_none_ends_its_answer_alone(lm, by_host, graphs, monkeypatch):
    """In the order of judgement: behind an attempt that is taken it is never met."""
    expected = by_host["soft", "classifier"]
    real, calls = ClassifierScorer.score, itertools.count()

    def broken(self, wave):
        scores = real(self, wave)
        rows = next(calls)
        if rows == 2:  # of the third round, the second attempt of the first slot and the third of the second
            scores.rewards[[1, 5]] = torch.nan
        return scores

    monkeypatch.setattr(ClassifierScorer, "score", broken)
    outputs = decode(lm, REWARDS["classifier"](), CONFIGS["soft"], 3, 5, errors="return")
    failed = [output for output in outputs if isinstance(output, DecodeError)]
    assert 0 < len(failed) < 3 and all("the reward is nan" in str(error) and error.attempt for error in failed)
    assert all(o in failed or told(o) == e for o, e in zip(outputs, expected, strict=True))


def test_logits_that_are_none_end_their_answer_alone(rm, graphs):
    """An answer's last tokens are known when the round before it has failed."""
    lm = tiny_language_model()
    head, calls = lm.get_output_embeddings(), itertools.count()
    config = CONFIGS["fallback"].replace(eos_token_id=())

    def spoil(module, args, logits):
        if logits.shape[0] > 1 and next(calls) == 7:
            logits[1] = torch.nan  # the first slot's second attempt
        return logits

    head.register_forward_hook(spoil)
    outputs = decode(lm, rm, config, 3, 2, errors="return")
    failed = [output for output in outputs if isinstance(output, DecodeError)]
    assert len(failed) == 1 and "the logits hold nan" in str(failed[0]) and failed[0].attempt == 1


def test_requests_that_come_and_go(lm, rm, by_host, graphs):
    """In asyncio, where answers are admitted while a round is in flight, and one is dropped."""
    whole = [tokens for tokens, *_ in by_host["soft", "classifier"]]

    async def run(engine):
        async def drop():
            async for _ in engine.astream(PROMPTS[0], request_id=0):
                return

        tasks = [engine.adecode(prompt, request_id=i) for i, prompt in enumerate(PROMPTS[1:], start=1)]
        return (await asyncio.gather(drop(), *tasks))[1:]

    with Engine(lm, rm, config=CONFIGS["soft"].replace(width=2, wave=2, batch_size=2)) as engine:
        outputs = asyncio.run(run(engine))
    assert [output.token_ids for output in outputs] == whole[1:]
    assert on_device(outputs[-1])[0] > 3


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (dict(stop_strings="zz"), "stops"),
        (dict(rule=stars_kernels.BestOf(2)), "the rule is BestOf"),
        (dict(rule=stars_kernels.Cards(reward_threshold=2.0, beta=1.0)), "the rule is Cards"),
        (dict(wave=1, width=3), None),
    ],
    ids=str,
)
def test_other_rounds_are_judged_by_the_host(lm, rm, graphs, settings, why):
    own = {} if "rule" in settings else dict(segment_size=3, max_attempts=3, reward_threshold=2.0, beta=1.0)
    given = dict(seed=1, max_new_tokens=6, tokenizer=byte_tokenizer())
    (output,) = stars_kernels.decode(lm, rm, ["ab"], **given, **own, **settings)
    assert "rounds" not in output.backends
    config, hooks = StarsConfig(**own, **settings), TokenHooks()
    told = Serving(Models(lm, rm, given["tokenizer"], False, False), config, hooks).why_by_host(config.resolved_rule)
    assert (told is None) if why is None else (why in told)


def test_a_rule_of_the_callers_own_is_the_hosts(lm, rm, graphs):
    class Mine(Stars):
        pass

    rule = Mine(3, 3, reward_threshold=2.0, beta=1.0)
    output = stars_kernels.decode(lm, rm, PROMPTS[0], rule=rule, seed=1, max_new_tokens=6)
    assert "rounds" not in output.backends
