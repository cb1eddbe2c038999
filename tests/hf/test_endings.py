"""Every kind of exception at every callback: a prompt's fault stays its own, and what ends a call carries the rest."""

import functools
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import stars_kernels
from stars_kernels import StarsError, StarsOutput
from tests.hf.faults import (
    CALLBACKS,
    ENDS,
    FAULTS,
    FAULTY,
    KEPT_GENERATORS,
    PROMPTS,
    SET,
    decode,
    decoding_at_the_end,
    encoding,
    head,
    language_model_hook,
    plain_reward,
    reward_model,
    reward_model_hook,
    seen,
    tokenizer_with,
    told,
    truth,
    warn,
)
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda callback: callback.__name__)
def test_one_prompts_fault_is_its_own(callback, fault):
    with pytest.raises(StarsError) as failed:
        callback(FAULTS[fault])()
    results = failed.value.results
    assert list(failed.value.errors) == [FAULTY]
    assert [told(r) for i, r in enumerate(results) if i != FAULTY] == [
        t for i, t in enumerate(truth(callback)) if i != FAULTY
    ]
    assert f"prompt {FAULTY}" in str(results[FAULTY])
    for generator in KEPT_GENERATORS:
        next(generator)  # raises StopIteration where its frame was cleared
    KEPT_GENERATORS.clear()


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda callback: callback.__name__)
def test_what_ends_a_call_carries_what_was_finished(callback, end):
    with pytest.raises(BaseException) as ended:
        callback(ENDS[end])()
    assert not isinstance(ended.value, StarsError)
    results, expected = ended.value.results, truth(callback)
    assert len(results) == len(PROMPTS)
    if callback is encoding:  # nothing had begun
        assert results == [None] * len(PROMPTS)
        return
    assert [told(result) for result in results[:FAULTY]] == expected[:FAULTY]
    partial = results[FAULTY]
    if callback is decoding_at_the_end:  # it was finished, and its text is made again
        assert told(partial) == expected[FAULTY]
    elif isinstance(partial, StarsOutput):
        assert partial.finish_reason == "interrupted"
        assert expected[FAULTY][0][: len(partial.token_ids)] == partial.token_ids
    assert results[FAULTY + 1] is None


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda callback: callback.__name__)
def test_warnings_made_errors(callback):
    """The caller's own warning is its prompt's fault, or, where a model's forward gives it, the call's end."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            callback(warn)()
        except StarsError as failed:
            assert list(failed.errors) == [FAULTY]
            done = [i for i in range(len(PROMPTS)) if i != FAULTY]
            results = failed.results
        except UserWarning as ended:
            assert callback in (language_model_hook, reward_model_hook, head)
            done, results = range(FAULTY), ended.results
    assert [told(results[i]) for i in done] == [truth(callback)[i] for i in done]


@pytest.mark.parametrize("where", ["round", "admission", "reading"])
def test_our_own_warnings_made_errors(where):
    """Of memory that ran out, which nothing is lost to: the answers that were finished are carried."""
    ids = [byte_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    settings = dict(SET, batch_size=2, request_ids=range(4))

    def run(after):
        """With memory for `after` forwards of several rows (or of prompts); how many there were."""
        lm, rm = tiny_language_model(), tiny_reward_model()
        many = 0

        def check(module, args, kwargs):
            nonlocal many
            rows, tokens = kwargs["input_ids"].shape
            many += tokens % len(ids[0]) == 0 and rows == 1 if where == "admission" else rows > 1
            if many > after:
                raise torch.OutOfMemoryError("CUDA out of memory")

        (rm if where == "reading" else lm).base_model.register_forward_pre_hook(check, with_kwargs=True)
        return [told(output) for output in stars_kernels.decode(lm, rm, ids, **settings)], many

    expected, total = run(after=10**9)
    with warnings.catch_warnings(), pytest.raises(RuntimeWarning, match="out of memory") as ended:
        warnings.simplefilter("error")
        run(after=total - 1)
    results = ended.value.results
    cut = [i for i, result in enumerate(results) if result is None or result.finish_reason == "interrupted"]
    assert cut and min(cut) >= (1 if where == "admission" else 2)
    assert [told(r) for i, r in enumerate(results) if i not in cut] == [
        t for i, t in enumerate(expected) if i not in cut
    ]


def test_a_streams_consumer_and_streamer():
    """What raises outside of the engine finds the answers too."""
    model, tokenizer = tiny_language_model(), byte_tokenizer()

    class Streamer:
        calls = 0

        def put(self, value):
            self.calls += 1
            if self.calls == 3:
                raise OSError("the reader has gone")

        def end(self):
            self.ended = True

    streamer = Streamer()
    with pytest.raises(OSError, match="the reader has gone") as ended:
        model.generate(
            torch.tensor([tokenizer("ab")["input_ids"]]), do_sample=True, eos_token_id=None, max_new_tokens=12,
            custom_generate=functools.partial(stars_kernels.generate, tokenizer=tokenizer, streamer=streamer),
            reward_model=plain_reward, seed=0, reward_threshold=1.0, beta=1.0, segment_size=3,
        )  # fmt: skip
    (partial,) = ended.value.results
    assert streamer.ended and partial.finish_reason == "interrupted" and len(partial.token_ids) == 6
    events = stars_kernels.stream(model, plain_reward, PROMPTS, tokenizer=tokenizer, **SET)
    next(events)
    with pytest.raises(KeyError) as ended:
        events.throw(KeyError("the consumer's"))
    assert [r and r.finish_reason for r in ended.value.results] == ["interrupted", None, None, None]


def test_a_text_that_cannot_be_told_ends_its_prompt():
    calls = []

    def fourth(ids):
        calls.append(ids)
        return len(calls) == 4

    def fault():
        raise ValueError("no text")

    tokenizer = tokenizer_with("decode", fault, fourth)
    events = list(stars_kernels.stream(tiny_language_model(), reward_model(), PROMPTS, tokenizer=tokenizer, **SET))
    outputs = {event.index: event.output for event in events if event.output is not None}
    assert sorted(outputs) == [0, 1, 2, 3]
    failed = [index for index, output in outputs.items() if isinstance(output, Exception)]
    assert len(failed) == 1 and "its text could not be made: ValueError: no text" in str(outputs[failed[0]])


def test_half_a_character_as_request_id():
    outputs = stars_kernels.decode(
        tiny_language_model(), reward_model(), [[1, 2], [3]], **dict(SET, request_ids=["\ud800", "b"])
    )
    assert [output.request_id for output in outputs] == ["\ud800", "b"]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError, KeyError])
def test_within_the_handling_of_another_error(kind):
    """An error that the caller handles is no cause of ours: width stays, and its frames keep their locals."""

    def caller():
        local = [1, 2, 3]
        raise kind("the caller's", local)

    def rm(prompts, answers):
        if any(map(seen, prompts)):
            raise ValueError("no reward")
        return plain_reward(prompts, answers)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            caller()
        except kind as handled:
            with pytest.raises(StarsError) as failed:
                decode(rm)
            frame = handled.__traceback__.tb_next.tb_frame
    assert frame.f_locals["local"] == [1, 2, 3]
    assert list(failed.value.errors) == [FAULTY]
    assert all(r.memory_limits == {} for i, r in enumerate(failed.value.results) if i != FAULTY)


@pytest.mark.parametrize("call", [stars_kernels.decode, stars_kernels.stream])
def test_an_interrupt_while_models_are_prepared(call):
    class Interrupted(torch.nn.Linear):
        def forward(self, hidden):
            raise KeyboardInterrupt

    lm = tiny_language_model()
    head = Interrupted(lm.config.hidden_size, 1).double()
    with pytest.raises(KeyboardInterrupt) as interrupted:
        call(lm, head, [[1], [2]], **SET)
    assert interrupted.value.results == [None, None]


class NoStream:
    """A stderr that nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError("nobody reads")

    flush = write


@pytest.mark.parametrize("stderr", [NoStream(), None])
def test_a_display_that_breaks_ends_the_display_alone(stderr, monkeypatch):
    lm, rm = tiny_language_model(), tiny_reward_model()
    settings = dict(SET, progress=True, reward_threshold=None, beta=None)
    monkeypatch.setattr("stars_kernels.hf.progress.DELAY", 0)
    expected = [told(o) for o in stars_kernels.decode(lm, rm, [[1], [2, 3]], **settings)]
    monkeypatch.setattr("sys.stderr", stderr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [told(o) for o in stars_kernels.decode(lm, rm, [[1], [2, 3]], **settings)]
    assert found == expected
    assert caught and all("the progress bar ends, the work goes on" in str(w.message) for w in caught)
    with ThreadPoolExecutor(1) as other:  # no lock of tqdm's is left taken
        again = other.submit(stars_kernels.decode, lm, rm, [[1], [2, 3]], **dict(settings, progress=False)).result(60)
        other.submit(stars_kernels.decode, lm, rm, [[1], [2, 3]], **settings).result(60)
    assert [told(o) for o in again] == expected


def test_without_a_bar_nothing_of_tqdm_is_touched(monkeypatch):
    """An interrupt in a bar may leave tqdm's lock taken, for which another thread's call would wait for ever."""

    def touched(*args, **kwargs):
        raise AssertionError("tqdm was touched")

    monkeypatch.setattr("stars_kernels.hf.progress.Bar", touched)
    stars_kernels.decode(tiny_language_model(), tiny_reward_model(), [[1]], **dict(SET, reward_threshold=None))


def test_calibration_tells_what_it_goes_on_without():
    def rm(prompts, answers):
        if any(seen(prompt) and answer for prompt, answer in zip(prompts, answers, strict=True)):
            raise ValueError("no reward")
        return [float(len(set(answer))) for answer in answers]

    told_of = "calibration goes on without 1 of 4 prompts, .*; the first, prompt 2: .*no reward"
    with pytest.warns(RuntimeWarning, match=told_of), pytest.raises(StarsError) as failed:
        decode(rm, reward_threshold=None, beta=None)
    assert list(failed.value.errors) == [FAULTY]
