"""A call that is bounded in time, cancelled, or whose stream is closed by another thread."""

import math
import threading
import time
import warnings

import pytest
import torch

import stars_kernels
from stars_kernels import BestOf, Engine, SpeculativeRejection, StarsOutput
from stars_kernels.hf import call, engine
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

PROMPTS = [[1, 2, 3], [40], [7, 8, 9, 10, 11], [90, 91]]
SET = dict(
    seed=3, reward_threshold=3.0, beta=1.0, max_new_tokens=12, segment_size=4, max_attempts=3, width=2, eos_token_id=(),
    batch_size=2, request_ids=range(4), progress=False,
)  # fmt: skip
RULES = {"stars": {}, "best of": {"rule": BestOf(3)}, "race": {"rule": SpeculativeRejection(4, segment_size=4)}}


def settings_of(rule):
    given = RULES[rule]
    left = ("reward_threshold", "beta", "segment_size", "max_attempts") if given else ()
    return {**{name: value for name, value in SET.items() if name not in left}, **given}


class Watched:
    """Models that count their forwards, and do something at one of them."""

    def __init__(self, at=None, act=None):
        self.lm, self.rm, self.count = tiny_language_model(), tiny_reward_model(), 0
        self.at, self.act, self.after = at, act, None
        for model in (self.lm, self.rm):
            model.base_model.register_forward_pre_hook(self._forward)

    def _forward(self, module, args):
        self.count += 1
        if self.count == self.at:
            self.act()

    @property
    def beyond(self):
        """Forwards after that one."""
        return self.count - self.at


def told(outputs):
    return [(o.token_ids, o.reward, o.finish_reason) for o in outputs]


def check_beginnings(outputs, whole, reason):
    for output, full in zip(outputs, whole, strict=True):
        if output.finish_reason != reason:
            assert told([output]) == told([full])
            continue
        n = len(output.token_ids)
        assert output.token_ids == full.token_ids[:n] and n < len(full.token_ids)
        decided = [segment for segment in output.segments if segment.outcome != "undecided"]
        assert sum(segment.length for segment in decided) == n
        if decided:
            assert output.reward == decided[-1].reward == full.segments[len(decided) - 1].reward
        assert StarsOutput.from_dict(output.to_dict()).token_ids == output.token_ids


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""

    class Clock:
        now = 100.0

        def __getattr__(self, name):
            return (lambda: self.now) if name == "monotonic" else getattr(time, name)

    found = Clock()
    for module in (call, engine):
        monkeypatch.setattr(module, "time", found)
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["time", "cancelled"])
def test_any_forward_may_be_the_last(rule, how, clock):
    """What was decided comes back, and at most one more forward runs, whichever it is."""
    models, settings = Watched(), settings_of(rule)
    whole = stars_kernels.decode(models.lm, models.rm, PROMPTS, **settings)
    total, seen = models.count, set()
    for at in [*range(3, 30), *range(30, total, 7), total]:
        event = threading.Event()

        def end(event=event):
            event.set()
            clock.now = 110.0

        clock.now = 100.0
        models = Watched(at, end)
        bound = {"max_time": 5.0} if how == "time" else {"cancel": event}
        outputs = stars_kernels.decode(models.lm, models.rm, PROMPTS, **settings, **bound)
        check_beginnings(outputs, whole, how)
        assert models.beyond <= 1, at
        reasons = [output.finish_reason for output in outputs]
        seen |= {len(output.token_ids) for output in outputs if output.finish_reason == how}
        assert how in reasons or at >= total - 1
        waited = [output for output in outputs if math.isnan(output.prompt_reward)]
        assert all(output.token_ids == [] and output.seconds == {} for output in waited)
    assert 0 in seen and (rule != "stars" or len(seen) > 2)


def test_every_prompt_has_its_last_event(clock):
    def end():
        clock.now = 200.0

    models, tokenizer = Watched(9, end), byte_tokenizer()
    settings = dict(SET, tokenizer=tokenizer, max_time=9.0)
    events = list(stars_kernels.stream(models.lm, models.rm, ["ab", "cd", "ef", "gh"], **settings))
    outputs = {event.index: event.output for event in events if event.output is not None}
    assert sorted(outputs) == [0, 1, 2, 3] and {o.finish_reason for o in outputs.values()} == {"time"}
    for index, output in outputs.items():
        mine = [event for event in events if event.index == index]
        assert [token for event in mine for token in event.token_ids] == output.token_ids
        assert "".join(event.text for event in mine) == output.text


def test_time_that_is_up_in_calibration(clock):
    def end():
        clock.now = 200.0

    free = dict(SET, reward_threshold=None, beta=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models = Watched(6, end)
        outputs = stars_kernels.decode(models.lm, models.rm, PROMPTS, **free, max_time=9.0)
    assert [(o.token_ids, o.finish_reason) for o in outputs] == [([], "time")] * 4 and models.beyond <= 1
    models = Watched(6, end)
    clock.now = 100.0
    with Engine(models.lm, models.rm) as engine, pytest.raises(TimeoutError, match=r"longer than max_time=9\.0"):
        engine.calibrate(PROMPTS, seed=0, max_time=9.0)


def test_time_in_generate():
    lm, rm = tiny_language_model(), tiny_reward_model()
    arguments = dict(do_sample=True, max_new_tokens=12, reward_model=rm, seed=0, reward_threshold=1.0, beta=1.0)
    given = torch.tensor([[1, 2, 3]])

    def generate(**more):
        return lm.generate(given, custom_generate=stars_kernels.generate, eos_token_id=None, **arguments, **more)

    assert generate(max_time=1e-6).tolist() == given.tolist()
    assert torch.equal(generate(max_time=1e6), generate())


@pytest.mark.parametrize("sugar", [True, False])
def test_a_stream_closed_by_another_thread(sugar):
    begun, held, events = threading.Event(), threading.Event(), []

    def wait():
        begun.set()
        assert held.wait(60)

    models = Watched(9, wait)
    with Engine(models.lm, models.rm, **{k: v for k, v in SET.items() if k != "request_ids"}) as engine:
        make = (lambda: stars_kernels.stream(models.lm, models.rm, PROMPTS, **SET)) if sugar else (
            lambda: engine.stream(PROMPTS, request_ids=range(4))
        )  # fmt: skip
        stream, threads = make(), threading.active_count()
        consumer = threading.Thread(target=lambda: events.extend(stream))
        consumer.start()
        assert begun.wait(60)
        closer = threading.Thread(target=stream.close)
        closer.start()
        while not stream.closing.is_set():
            time.sleep(0.001)
        held.set()
        for thread in (consumer, closer):
            thread.join(60)
            assert not thread.is_alive()
        assert models.beyond <= 1 and threading.active_count() == threads
        assert all(event.output is None for event in events) and list(stream) == []
        outputs = engine.decode(PROMPTS, request_ids=range(4))  # the engine goes on
        assert told(outputs) == told(stars_kernels.decode(models.lm, models.rm, PROMPTS, **SET))


def test_bad_input(lm, rm):
    for value in (0, -1, math.nan, math.inf, "3", True):
        with pytest.raises(ValueError, match=r"max_time is .*, expected a number of seconds > 0, or None"):
            stars_kernels.decode(lm, rm, [[1]], max_time=value)
    with pytest.raises(TypeError, match=r"cancel is of type bool, expected a threading\.Event"):
        stars_kernels.decode(lm, rm, [[1]], cancel=True)
    used = threading.Event()
    used.set()
    with pytest.raises(ValueError, match="cancel is set already, expected an event that is not"):
        stars_kernels.decode(lm, rm, [[1]], cancel=used)
