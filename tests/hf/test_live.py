"""Requests that join the slots of a running engine by asyncio: each gets the answer that it gets alone."""

import asyncio
import gc
import random
import threading
import warnings

import pytest

import stars_kernels
from stars_kernels import BestOf, DecodeError, Engine
from stars_kernels.hf.live import MAX_TABLES
from tests.hf.test_time_and_cancel import Watched
from tests.tiny import byte_tokenizer

SET = dict(
    seed=3, reward_threshold=3.0, beta=1.0, max_new_tokens=12, segment_size=4, max_attempts=3, eos_token_id=(),
    progress=False,
)  # fmt: skip
PROMPTS = [[1 + p, *range(2, 2 + p % 5)] for p in range(16)]


def told(output):
    return output.token_ids, output.reward, output.finish_reason, output.request_id


@pytest.fixture(scope="module")
def alone(lm, rm):
    outputs = [stars_kernels.decode(lm, rm, p, request_ids=i, **SET) for i, p in enumerate(PROMPTS)]
    return list(map(told, outputs))


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = threading.active_count()
    yield
    gc.collect()
    assert threading.active_count() == before


def is_empty(engine):
    """No request, no thread, no run of an engine is left."""
    live = engine._live
    live.wait()
    return live._thread is None and not live._arrived and not live._named


@pytest.mark.parametrize("slots", [1, 3, "auto"])
def test_all_at_once_and_half_of_them_cancelled(lm, rm, alone, slots):
    async def main(engine, rng):
        tasks = [asyncio.create_task(engine.adecode(p, request_id=i)) for i, p in enumerate(PROMPTS)]
        gone = rng.sample(range(16), 8)
        for i in gone:
            await asyncio.sleep(rng.random() * 0.05)
            tasks[i].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert len(asyncio.all_tasks()) == 1
        return results, gone

    finished = 0
    with Engine(lm, rm, batch_size=slots, **SET) as engine:
        for seed in range(4):
            results, gone = asyncio.run(main(engine, random.Random(seed)))
            for i, result in enumerate(results):
                if isinstance(result, asyncio.CancelledError):
                    assert i in gone
                else:
                    assert told(result) == alone[i]
                    finished += 1
            assert is_empty(engine)
    assert finished >= 32


def test_events_of_a_stream_and_one_that_is_left(lm, rm):
    tokenizer = byte_tokenizer()

    async def main(engine):
        events = [event async for event in engine.astream("abc", request_id=7)]
        left = engine.astream("abcd")
        first = await anext(left)
        await left.aclose()
        return events, first

    with Engine(lm, rm, tokenizer=tokenizer, **SET) as engine:
        events, first = asyncio.run(main(engine))
        expected = engine.decode("abc", request_ids=7)
        assert is_empty(engine)
    assert [token for event in events for token in event.token_ids] == expected.token_ids
    assert "".join(event.text for event in events) == expected.text == events[-1].output.text
    assert [event.segment for event in events] == expected.segments
    assert all(event.output is None for event in events[:-1]) and first.output is None


def test_other_settings_and_calls_of_other_threads_side_by_side(lm, rm):
    kinds = [{}, {"seed": 5}, {"rule": BestOf(2)}, {"max_new_tokens": 7, "trace": "full"}, {"temperature": 0.7}]
    plain = {name: SET[name] for name in ("seed", "max_new_tokens", "eos_token_id", "progress")}

    def settings(kind):
        return {**(plain if "rule" in kind else SET), **kind}

    async def main(engine):
        some = [engine.adecode(p, request_id=i, **settings(kinds[i % 5])) for i, p in enumerate(PROMPTS)]
        other = asyncio.to_thread(engine.decode, PROMPTS[:3], request_ids=range(3), **SET)
        return await asyncio.gather(*some, other)

    with Engine(lm, rm) as engine:
        *outputs, listed = asyncio.run(main(engine))
        assert is_empty(engine)
    for i, output in enumerate(outputs):
        expected = stars_kernels.decode(lm, rm, PROMPTS[i], request_ids=i, **settings(kinds[i % 5]))
        assert told(output) == told(expected) and output.config == expected.config
    expected = stars_kernels.decode(lm, rm, PROMPTS[:3], request_ids=range(3), **SET)
    assert list(map(told, listed)) == list(map(told, expected))


def test_more_kinds_of_settings_than_have_memory_at_once(lm, rm):
    """They wait for one another in the order in which they came: none for ever, however many more of others come."""
    order = []

    async def ask(engine, name, temperature):
        output = await engine.adecode([1, 2], request_id=name, temperature=temperature)
        order.append(name)
        return output

    async def main(engine):
        tasks = [asyncio.create_task(ask(engine, f"kind {i}", 1 + i / 10)) for i in range(MAX_TABLES)]
        await asyncio.sleep(0.02)
        tasks.append(asyncio.create_task(ask(engine, "other", 9.0)))
        gone = asyncio.create_task(ask(engine, "gone", 10.0))
        late = asyncio.create_task(engine.adecode([1, 2], temperature=11.0, max_time=0.01))
        for i in range(60):  # all the while others come, of settings that are under way
            await asyncio.sleep(0.002)
            tasks.append(asyncio.create_task(ask(engine, i, 1 + i % MAX_TABLES / 10)))
            if i == 5:
                gone.cancel()
            assert len(engine._live._tables) <= MAX_TABLES
        return await asyncio.gather(*tasks), await late

    with Engine(lm, rm, batch_size=2, **SET) as engine:
        outputs, late = asyncio.run(main(engine))
        assert is_empty(engine) and engine.load() == (0, 0)
    other = next(output for output in outputs if output.request_id == "other")
    assert told(other) == told(stars_kernels.decode(lm, rm, [1, 2], request_ids="other", **SET, temperature=9.0))
    assert late.finish_reason == "time" and "gone" not in order
    assert order.index("other") < 30


def test_load_counts_who_waits_and_who_has_a_slot(lm):
    asked, free = threading.Event(), threading.Event()

    def reward(prompts, answers):
        if any(answers):
            asked.set()
            assert free.wait(60)
        return [0.0] * len(answers)

    async def main(engine):
        tasks = [asyncio.create_task(engine.adecode(text)) for text in ("ab", "cd")]
        await asyncio.to_thread(asked.wait, 60)
        found = engine.load()
        free.set()
        await asyncio.gather(*tasks)
        return found

    with Engine(lm, reward, tokenizer=byte_tokenizer(), batch_size=1, **SET) as engine:
        assert engine.load() == (0, 0)
        waiting, active = asyncio.run(main(engine))
        assert active == 1 and waiting <= 1  # the second may be on its way to the engine
        assert is_empty(engine) and engine.load() == (0, 0)


def test_a_larger_one_waits_until_there_is_room(lm, rm):
    """Memory is taken for prompts like the first; one that is larger has its turn when the others have ended."""

    async def main(engine):
        small = [asyncio.create_task(engine.adecode([5, i], request_id=i)) for i in range(3)]
        await asyncio.sleep(0.05)
        large = engine.adecode(list(range(1, 100)), request_id="large")
        return await asyncio.gather(*small, large)

    with Engine(lm, rm, batch_size=2, **SET) as engine:
        outputs = asyncio.run(main(engine))
    assert told(outputs[-1]) == told(stars_kernels.decode(lm, rm, list(range(1, 100)), request_ids="large", **SET))


def test_one_that_fails_and_one_that_has_no_time(lm, alone):
    def reward(prompts, answers):
        if any("!" in prompt and answer for prompt, answer in zip(prompts, answers, strict=True)):
            raise ValueError("no reward")
        return [float(len(set(answer))) for answer in answers]

    async def main(engine):
        some = [engine.adecode(text, request_id=text) for text in ("ab", "c!", "de")]
        late = engine.adecode("fg", request_id="late", max_time=1e-6)
        return await asyncio.gather(*some, late, return_exceptions=True)

    with Engine(lm, reward, tokenizer=byte_tokenizer(), **SET) as engine:
        first, failed, last, late = asyncio.run(main(engine))
        for output in (first, last):
            assert told(output) == told(engine.decode(output.request_id, request_ids=output.request_id))
    assert isinstance(failed, DecodeError) and failed.request_id == "c!" and "no reward" in str(failed)
    assert (late.token_ids, late.finish_reason) == ([], "time")


def test_calibration_of_one(lm, rm):
    free = dict(SET, reward_threshold=None, beta=None, calibration_samples=4)

    async def main(engine):
        return await engine.adecode([1, 2], request_id=1, **free)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with Engine(lm, rm) as engine:
            output = asyncio.run(main(engine))
        assert told(output) == told(stars_kernels.decode(lm, rm, [1, 2], request_ids=1, **free))


def test_an_engine_that_is_closed_meanwhile(lm, rm):
    async def main(engine):
        task = asyncio.create_task(engine.adecode([1, 2, 3], max_new_tokens=200))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(engine.close)
        with pytest.raises(RuntimeError, match="the engine is closed"):
            await task
        with pytest.raises(RuntimeError, match="the engine is closed"):
            await engine.adecode([1])

    engine = Engine(lm, rm, **SET)
    asyncio.run(main(engine))
    assert is_empty(engine)


def test_a_cancelled_request_ends_inside_its_segment():
    begun, models = threading.Event(), Watched(9, lambda: None)
    models.act = begun.set

    async def main(engine):
        task = asyncio.create_task(engine.adecode([1, 2, 3], rule=BestOf(2), max_new_tokens=200, seed=0))
        await asyncio.to_thread(begun.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with Engine(models.lm, models.rm) as engine:
        asyncio.run(main(engine))
        assert is_empty(engine)
    assert models.count < 150  # of the 200 or more that the answer would have taken


def test_bad_input(lm, rm):
    async def main(engine):
        first = asyncio.create_task(engine.adecode([1, 2], request_id="a"))
        await asyncio.sleep(0.02)
        with pytest.raises(ValueError, match="request id 'a' is given again while its first request is on its way"):
            await engine.adecode([3], request_id="a")
        await first
        await engine.adecode([3], request_id="a")
        with pytest.raises(ValueError, match="token id 9999"):
            await engine.adecode([9999])
        with pytest.raises(TypeError, match="unknown setting 'beat'"):
            await engine.adecode([1], beat=1.0)

    with Engine(lm, rm, **{**SET, "max_new_tokens": 60}) as engine:
        asyncio.run(main(engine))


def test_a_reward_that_ends_the_thread_ends_no_other_request(lm):
    """SystemExit, which a thread swallows: the request fails, and the engine serves the next."""
    ends = [True]

    def reward(prompts, answers):
        if any(answers) and ends:
            raise SystemExit(ends.pop())
        return [float(len(answer)) for answer in answers]

    async def main(engine):
        with pytest.raises(RuntimeError, match="the engine's thread met SystemExit"):
            await engine.adecode("ab")
        return await engine.adecode("cd", request_id=1)

    with Engine(lm, reward, tokenizer=byte_tokenizer(), **SET) as engine:
        output = asyncio.run(main(engine))
        assert told(output) == told(engine.decode("cd", request_ids=1))
        assert is_empty(engine)


def test_a_reward_function_that_awaits_its_own_engine(lm):
    """It would wait for itself."""

    def reward(prompts, answers):
        if any(answers):
            asyncio.run(engine.adecode("ef"))
        return [0.0] * len(answers)

    with Engine(lm, reward, tokenizer=byte_tokenizer(), **SET) as engine, pytest.raises(DecodeError) as failed:
        engine.decode("ab")
    assert "the engine is decoding in this very thread" in str(failed.value)


def test_an_engine_closed_by_a_reward_function(lm):
    """While requests of asyncio are on their way, whose thread waits for the engine."""

    def reward(prompts, answers):
        if any(answers) and any("!" in prompt for prompt in prompts):
            engine.close()
        return [float(len(answer)) for answer in answers]

    async def main():
        tasks = [asyncio.create_task(engine.adecode(text)) for text in ("ab", "cd")]
        await asyncio.sleep(0.05)
        with pytest.raises(RuntimeError, match="the engine is closed"):
            await asyncio.to_thread(engine.decode, "ef!", request_ids=3)
        return await asyncio.gather(*tasks, return_exceptions=True)

    engine = Engine(lm, reward, tokenizer=byte_tokenizer(), **SET)
    for result in asyncio.run(asyncio.wait_for(main(), 60)):
        assert not isinstance(result, Exception) or "the engine is closed" in str(result)
