"""Events of `stream`: what they tell, when they come, and that nothing of the engine leaks into their consumer."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import pytest
import torch
from tqdm import tqdm

import stars_kernels
from stars_kernels import StarsError, StarsOutput
from tests.tiny import byte_tokenizer, text_model, tiny_language_model, tiny_reward_model

SET = dict(seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=14, segment_size=4, max_attempts=5)
PROMPTS = ["hello", "a", "a longer one"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def tell(events):
    """{index: (tokens, text, segments, outputs)} as the events tell it."""
    told = {}
    for event in events:
        tokens, texts, segments, outputs = told.setdefault(event.index, ([], [], [], []))
        assert not outputs, "an event of a prompt that is finished"
        tokens += event.token_ids
        texts.append(event.text)
        segments += [event.segment] * (event.segment is not None)
        outputs += [event.output] * (event.output is not None)
    return told


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("calibrated", [False, True])
def test_events_tell_what_decode_returns(lm, rm, tokenizer, batch_size, calibrated):
    settings = dict(SET, tokenizer=tokenizer, batch_size=batch_size, request_ids=["x", 7, "z"])
    if calibrated:
        del settings["reward_threshold"], settings["beta"]
    outputs = stars_kernels.decode(lm, rm, PROMPTS, **settings)
    events = list(stars_kernels.stream(lm, rm, PROMPTS, **settings))
    told = tell(events)
    for index, output in enumerate(outputs):
        tokens, texts, segments, (streamed,) = told[index]
        assert tokens == streamed.token_ids == output.token_ids
        assert "".join(texts) == streamed.text == output.text
        assert segments == streamed.segments == output.segments
        assert streamed.counts == output.counts and streamed.config == output.config
    assert {(event.index, event.request_id) for event in events} == {(0, "x"), (1, 7), (2, "z")}
    for event in events:
        assert len(event.token_ids) == event.segment.length
    if batch_size > 1:  # the answers of a batch grow side by side
        assert [event.index for event in events][:2] != [0, 0]


def test_events_come_when_they_happen(lm, tokenizer):
    """Nothing is done before the first event is asked for, and no more than a round for the next."""
    calls = []

    def reward(prompts, answers):
        calls.append(answers)
        return [9.0] * len(answers)  # every first attempt is accepted

    settings = dict(SET, tokenizer=tokenizer, eos_token_id=())
    events = stars_kernels.stream(lm, reward, "a", **settings)
    assert not calls
    for number, event in enumerate(events, start=1):
        assert len(calls) == 1 + number  # the empty answer's is the first
        assert (event.output is not None) == (number == 4)


def test_without_a_tokenizer(lm, rm):
    (tokens, texts, _, (output,)) = tell(stars_kernels.stream(lm, rm, [1, 2, 3], **SET))[0]
    assert tokens == output.token_ids and set(texts) == {None} and output.text is None


def test_no_prompts(lm, rm):
    assert list(stars_kernels.stream(lm, rm, [], **SET)) == []


@pytest.mark.parametrize("segment_size", [1, 2, 3, 5])
def test_half_characters_and_beginnings_of_stop_strings_are_held_back(rm, segment_size, tokenizer):
    settings = dict(SET, tokenizer=tokenizer, segment_size=segment_size, max_new_tokens=10, top_k=2)

    def pieces(text, **more):
        lm = text_model(text, tokenizer)
        (_, texts, _, (output,)) = tell(stars_kernels.stream(lm, rm, "!", **settings, **more))[0]
        assert "".join(texts) == output.text
        return texts, output

    texts, output = pieces("aé€x")  # of 1, 2, 3 and 1 bytes
    assert output.text.startswith("aé€x") and not any("\ufffd" in piece for piece in texts)
    texts, output = pieces("abcSTOPxyz", stop_strings=["STOP", "zz"])
    assert output.text == "abc" and not any(set(piece) & set("STOP") for piece in texts)
    if segment_size == 1:
        assert texts == ["a", "b", "c", "", "", "", ""]
    texts, output = pieces("abcSTUPxyz", stop_strings="STOP")  # held back, then told
    assert output.text == "abcSTUPxyz"
    if segment_size == 1:
        assert texts[2:6] == ["c", "", "", "STU"]
    texts, output = pieces("abcdefgSTO", stop_strings="STOP")  # what is held back at the end is told with it
    assert output.text == "abcdefgSTO" and texts[-1].endswith("STO")
    texts, output = pieces("abc€", stop_strings="€")  # a stop string that comes a byte at a time
    assert output.text == "abc" and output.finish_reason == "stop"


def test_a_tokenizer_that_rewrites_its_text_is_told_of(lm, rm, tokenizer):
    rewriting = byte_tokenizer()
    rewriting.decode = lambda ids, **options: str(len(ids))
    with pytest.warns(UserWarning, match=r"the tokenizer rewrote text that an event has told: '\d+' became '\d+'"):
        list(stars_kernels.stream(lm, rm, [1], tokenizer=rewriting, **dict(SET, eos_token_id=())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody has been told of anything
        stars_kernels.decode(lm, rm, [1], tokenizer=rewriting, **dict(SET, eos_token_id=()))


def test_failures_are_events(lm, tokenizer):
    """A bad prompt, a reward model that fails at once and one that fails on the way; the others go on."""

    def reward(prompts, answers):
        if "never" in prompts or ("later" in prompts and any(len(answer) > 4 for answer in answers)):
            raise OSError("the reward server is gone")
        return [9.0] * len(answers)

    settings = dict(SET, tokenizer=tokenizer, eos_token_id=())
    prompts = ["a", "", "never", [9999], "later", "b"]
    told = tell(stars_kernels.stream(lm, reward, prompts, **settings))
    with pytest.raises(StarsError) as failed:
        stars_kernels.decode(lm, reward, prompts, **settings)
    for index, result in enumerate(failed.value.results):
        tokens, texts, _, (output,) = told[index]
        assert type(output) is type(result)
        if isinstance(result, StarsOutput):
            assert tokens == output.token_ids == result.token_ids and "".join(texts) == output.text
        else:
            assert str(output) == str(result) and None not in texts
    assert sorted(failed.value.errors) == [1, 2, 3, 4]
    assert told[4][0] and isinstance(told[4][3][0].__cause__, OSError)  # it grew before it failed
    (_, _, _, (alone,)) = tell(stars_kernels.stream(lm, reward, "never", **settings))[0]
    assert isinstance(alone, RuntimeError) and "the reward server is gone" in str(alone)
    without_target = {key: value for key, value in settings.items() if key != "reward_threshold"}
    (_, _, _, (alone,)) = tell(stars_kernels.stream(lm, reward, "never", **without_target))[0]
    assert "prompt 0: calibration found no finite reward" in str(alone)


def test_bad_calls_raise_at_the_call(lm, rm):
    for wrong, error in [
        (dict(beta=-1.0), ValueError),
        (dict(segment_sise=3), TypeError),
        (dict(request_ids=[1, 1]), ValueError),
        (dict(stop_strings="x"), ValueError),
    ]:
        with pytest.raises(error):
            stars_kernels.stream(lm, rm, [[1], [2]], **{**SET, **wrong})
    for arguments in [(3, rm, [1]), (lm, 3, [1]), (lm, rm, 3)]:
        with pytest.raises(TypeError):
            stars_kernels.stream(*arguments, **SET)


def test_inference_mode_stays_inside(lm, rm):
    weight = torch.ones(2, requires_grad=True)
    for _ in stars_kernels.stream(lm, rm, [[1], [2]], seed=0, max_new_tokens=8, segment_size=4):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        weight.sum().backward()
    assert torch.equal(weight.grad % 1, torch.zeros(2)) and weight.grad[0] >= 4
    with torch.inference_mode():
        for _ in stars_kernels.stream(lm, rm, [1], **SET):
            assert torch.is_inference_mode_enabled()
    with pytest.raises(ZeroDivisionError):
        for _ in stars_kernels.stream(lm, rm, [1], **SET):
            1 / 0  # noqa: B018
    assert not torch.is_inference_mode_enabled()


def test_closing_early_is_clean(lm, rm, monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            bars.append(self)

    monkeypatch.setattr("stars_kernels.hf.progress.Bar", Bar)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        events = stars_kernels.stream(lm, rm, [[1], [2]], **SET)
        next(events)
        (bar,) = bars
        assert bar in tqdm._instances and bar.n > 0
        events.close()
        assert bar not in tqdm._instances
        assert list(events) == []
        stars_kernels.stream(lm, rm, [1], **SET).close()  # never begun
        dropped = stars_kernels.stream(lm, rm, [1], **SET)
        next(dropped)
        del dropped
        assert len(bars) == 2 and not any(bar in tqdm._instances for bar in bars)


def test_a_full_bar(lm, rm, monkeypatch):
    """Failed and early answers count as done, so that a bar ends at its total."""
    bars = []
    monkeypatch.setattr("stars_kernels.hf.progress.Bar", lambda **options: bars.append(tqdm(**options)) or bars[-1])
    prompts = [[1], [2], [3]]
    outputs = stars_kernels.decode(lm, rm, prompts, **dict(SET, eos_token_id=list(range(0, 260, 5)), batch_size=2))
    assert any(len(output.token_ids) < SET["max_new_tokens"] for output in outputs)
    assert bars[-1].n == bars[-1].total == 3 * SET["max_new_tokens"]


def test_an_interrupt_while_streaming_carries_what_was_done(lm, tokenizer):
    calls = 0

    def reward(prompts, answers):
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return [9.0] * len(answers)

    settings = dict(SET, batch_size=1, eos_token_id=(), tokenizer=tokenizer)
    told = []
    with pytest.raises(KeyboardInterrupt) as stopped:
        for event in stars_kernels.stream(lm, reward, ["a", "b", "c"], **settings):
            told.append(event)
    done, partial, none = stopped.value.results
    assert done is told[3].output and done.finish_reason == "length"
    assert partial.finish_reason == "interrupted" and partial.token_ids == told[4].token_ids
    assert none is None and len(told) == 5


@pytest.mark.parametrize("same_model", [True, False])
def test_two_streams_advanced_by_turns(lm, rm, tokenizer, same_model):
    other = lm if same_model else tiny_language_model(seed=5)
    rms = rm, tiny_reward_model(seed=6)
    settings = [dict(SET, tokenizer=tokenizer), dict(SET, tokenizer=tokenizer, seed=4, segment_size=3, width=2)]
    expected = [
        stars_kernels.decode(model, judge, PROMPTS, **chosen)
        for model, judge, chosen in zip((lm, other), rms, settings, strict=True)
    ]
    both = [
        stars_kernels.stream(model, judge, PROMPTS, **chosen)
        for model, judge, chosen in zip((lm, other), rms, settings, strict=True)
    ]
    turns = list(zip_longest(*both))
    for events, outputs in zip(zip(*turns, strict=True), expected, strict=True):
        told = tell(event for event in events if event is not None)
        assert [told[i][0] for i in range(3)] == [output.token_ids for output in outputs]
        assert [told[i][3][0].reward for i in range(3)] == [output.reward for output in outputs]


def test_a_stream_moves_between_threads(lm, rm):
    expected = stars_kernels.decode(lm, rm, [[1], [2]], **SET)
    events = stars_kernels.stream(lm, rm, [[1], [2]], **SET)
    told = [next(events)]
    with ThreadPoolExecutor(1) as pool:
        told += pool.submit(list, events).result()
    assert [tell(told)[i][0] for i in range(2)] == [output.token_ids for output in expected]
