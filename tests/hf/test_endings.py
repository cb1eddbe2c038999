"""Every kind of exception at every callback: a prompt's fault stays its own, and what ends a call carries the rest."""

import functools
import itertools
import warnings

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

import stars_kernels
from stars_kernels import RewardModel, StarsError, StarsOutput
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

PROMPTS = ["ab", "cd", "ef", "gh"]
FAULTY = 2
"""The prompt that goes wrong: half of the others are finished before it begins, one waits behind it."""
SET = dict(
    seed=1, reward_threshold=1.0, beta=1.0, max_new_tokens=8, segment_size=3, max_attempts=4, width=2,
    batch_size=1, eos_token_id=(), progress=False,
)  # fmt: skip


# Kinds of exceptions


def raise_plain():
    raise ValueError("plain")


def raise_from_itself():
    error = ValueError("from itself")
    raise error from error


def raise_in_a_circle():
    first, second = ValueError("first"), KeyError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


def raise_from_a_long_chain():
    error = ValueError("the first of many")
    for i in range(3000):
        last, error = error, ValueError(str(i))
        error.__cause__ = last
    raise error


KEPT_GENERATORS = []


def raise_from_a_generator():
    """Its generator is suspended in a frame of the traceback, and goes on being used."""

    def numbers():
        yield from itertools.count()

    generator = numbers()
    next(generator)
    KEPT_GENERATORS.append(generator)
    failing = (int("none") for _ in generator)
    next(failing)


def raise_the_same_again(error=RuntimeError("always this one")):  # noqa: B008 - one object is the point
    raise error


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError("it cannot be read")


class Unhashable(Exception):
    __hash__ = None

    def __eq__(self, other):
        raise RuntimeError("it cannot be compared")


def raising(error):
    def run():
        raise error

    return run


def warn():
    warnings.warn("a warning of the caller's own", UserWarning, stacklevel=1)


FAULTS = {
    "plain": raise_plain,
    "from itself": raise_from_itself,
    "in a circle": raise_in_a_circle,
    "a long chain": raise_from_a_long_chain,
    "from a generator": raise_from_a_generator,
    "one object": raise_the_same_again,
    "unreadable": raising(Unreadable()),
    "unhashable": raising(Unhashable("no hash")),
    "StopIteration": raising(StopIteration(3)),
    "StopAsyncIteration": raising(StopAsyncIteration()),
    "RecursionError": raising(RecursionError("too deep")),
    "AssertionError": raising(AssertionError()),
    "a group": raising(ExceptionGroup("two", [ValueError("a"), KeyError("b")])),
    "OSError": raising(OSError(5, "input/output error")),
}
"""Each ends its prompt alone."""
ENDS = {
    "KeyboardInterrupt": raising(KeyboardInterrupt()),
    "SystemExit": raising(SystemExit(3)),
    "GeneratorExit": raising(GeneratorExit()),
    "BaseException": raising(BaseException("base")),
    "a group of them": raising(BaseExceptionGroup("two", [KeyboardInterrupt(), ValueError("b")])),
}
"""Each ends the call."""


# Callbacks: each returns a call of the package, in which `fault` is raised wherever FAULTY's text is seen


def seen(text):
    return PROMPTS[FAULTY] in text


def reward_function(fault):
    def rm(prompts, answers):
        if any(seen(prompt) and answer for prompt, answer in zip(prompts, answers, strict=True)):
            fault()
        return [float(len(set(answer))) for answer in answers]

    return lambda **settings: decode(rm, **settings)


def on_the_empty_answer(fault):
    def rm(prompts, answers):
        if any(map(seen, prompts)):
            fault()
        return [float(len(set(answer))) for answer in answers]

    return lambda **settings: decode(rm, **settings)


def what_it_returns(fault):
    """An object that is no list of floats, and whose name cannot be read for the message that says so."""

    class Odd:
        def __repr__(self):
            fault()
            return "odd"

    def rm(prompts, answers):
        return Odd() if fault is not nothing and any(map(seen, prompts)) else plain_reward(prompts, answers)

    return lambda **settings: decode(rm, **settings)


def template(fault):
    def fill(prompt, answer):
        if seen(prompt) and answer:
            fault()
        return prompt + answer

    rm = RewardModel(reward_model(), byte_tokenizer(), fill)
    return lambda **settings: decode(rm, **settings)


def tokenizer_with(method, fault, when):
    """A tokenizer whose `method` raises where `when(its first argument)`."""
    plain = byte_tokenizer()
    kind = type(plain)

    class Faulty(kind):
        pass

    def faulty(self, first, *args, **kwargs):
        if when(first):
            fault()
        return getattr(kind, method)(self, first, *args, **kwargs)

    setattr(Faulty, method, faulty)
    plain.__class__ = Faulty
    return plain


def encoding(fault):
    tokenizer = tokenizer_with("__call__", fault, seen)
    return lambda **settings: decode(plain_reward, tokenizer=tokenizer, **settings)


def decoding_at_the_end(fault):
    """The answers' texts are only made at their ends: the reward model reads token ids."""
    calls = []

    def third(ids):
        calls.append(ids)
        return len(calls) == FAULTY + 1

    tokenizer = tokenizer_with("decode", fault, third)
    return lambda **settings: decode(reward_model(), tokenizer=tokenizer, **settings)


def decoding_for_a_stop_string(fault):
    reading = []
    tokenizer = tokenizer_with("decode", fault, lambda ids: reading[-1:] == [FAULTY])
    prompts = [byte_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]

    def note(module, args, kwargs):
        ids = kwargs["input_ids"].tolist()[0]
        reading.extend(i for i, prompt in enumerate(prompts) if ids == prompt)

    lm = tiny_language_model()
    lm.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return lambda **settings: decode(reward_model(), model=lm, tokenizer=tokenizer, stop_strings="zz", **settings)


def language_model_hook(fault):
    return hooked(tiny_language_model(), tiny_reward_model(), fault, whose=0)


def reward_model_hook(fault):
    return hooked(tiny_language_model(), tiny_reward_model(), fault, whose=1)


def hooked(lm, rm, fault, whose):
    """Raises in the forwards that read FAULTY's prompt."""
    first, second = byte_tokenizer()(PROMPTS[FAULTY])["input_ids"]

    def check(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if ids.shape[1] >= 2 and bool(((ids[:, :-1] == first) & (ids[:, 1:] == second)).any()):
            fault()

    body = (lm, rm)[whose].base_model
    body.register_forward_pre_hook(check, with_kwargs=True)
    return lambda **settings: decode(rm, model=lm, **settings)


def head(fault):
    calls = []

    class Head(torch.nn.Linear):
        def forward(self, hidden):
            calls.append(len(hidden))
            empty = hidden.shape[0] == 1 and calls.count(1) == FAULTY + 2  # the trial call comes first
            if empty:
                fault()
            return super().forward(hidden)

    lm = tiny_language_model()
    torch.manual_seed(0)
    module = Head(lm.config.hidden_size, 1).double()
    return lambda **settings: decode(module, model=lm, **settings)


def processor(fault):
    ids = torch.tensor(byte_tokenizer()(PROMPTS[FAULTY])["input_ids"])

    def process(input_ids, scores):
        if torch.equal(input_ids[0, : len(ids)], ids):
            fault()
        return scores

    return lambda **settings: generate(LogitsProcessorList([process]), StoppingCriteriaList(), **settings)


def criterion(fault):
    ids = torch.tensor(byte_tokenizer()(PROMPTS[FAULTY])["input_ids"])

    class Criterion:
        def __call__(self, input_ids, scores, **kwargs):
            if torch.equal(input_ids[0, : len(ids)], ids):
                fault()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    return lambda **settings: generate(LogitsProcessorList(), StoppingCriteriaList([Criterion()]), **settings)


CALLBACKS = [
    reward_function, on_the_empty_answer, what_it_returns, template, encoding, decoding_at_the_end,
    decoding_for_a_stop_string, language_model_hook, reward_model_hook, head, processor, criterion,
]  # fmt: skip


@functools.cache
def reward_model():
    return tiny_reward_model()


def plain_reward(prompts, answers):
    return [float(len(set(answer))) for answer in answers]


def decode(rm, model=None, tokenizer=None, **settings):
    model, tokenizer = model or tiny_language_model(), tokenizer or byte_tokenizer()
    settings = dict(SET, request_ids=range(len(PROMPTS)), tokenizer=tokenizer) | settings
    return stars_kernels.decode(model, rm, PROMPTS, **settings)


def generate(processors, criteria, **settings):
    """Through `model.generate`, whose result is the outputs in place of its tensor."""
    model, tokenizer = tiny_language_model(), byte_tokenizer()
    mine = {name: value for name, value in (SET | settings).items() if name not in ("eos_token_id", "max_new_tokens")}
    result = model.generate(
        torch.tensor([tokenizer(prompt)["input_ids"] for prompt in PROMPTS]), do_sample=True, top_k=0, pad_token_id=0,
        eos_token_id=None, max_new_tokens=SET["max_new_tokens"], logits_processor=processors,
        stopping_criteria=criteria, return_dict_in_generate=True,
        custom_generate=functools.partial(stars_kernels.generate, tokenizer=tokenizer), reward_model=plain_reward,
        request_ids=range(len(PROMPTS)), **mine,
    )  # fmt: skip
    return result.outputs


def nothing():
    pass


def told(output):
    return output.token_ids, output.reward, output.text


@functools.cache
def truth(callback):
    """What the call gives where nothing is raised."""
    return [told(output) for output in callback(nothing)()]


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
            done, results = range(FAULTY), ended.results
    assert [told(results[i]) for i in done] == [truth(callback)[i] for i in done]


@pytest.mark.parametrize("where", ["round", "batch", "reading"])
def test_our_own_warnings_made_errors(where):
    """Of memory that ran out, which nothing is lost to: the answers of the first batch are carried."""
    ids = [byte_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    settings = dict(SET, batch_size=2, request_ids=range(4))

    def run(after):
        """With memory for `after` forwards of several rows (or of a batch's prompts); how many there were."""
        lm, rm = tiny_language_model(), tiny_reward_model()
        many = 0

        def check(module, args, kwargs):
            nonlocal many
            rows, tokens = kwargs["input_ids"].shape
            many += tokens == 2 * len(ids[0]) if where == "batch" else rows > 1
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
    assert cut and min(cut) >= 2
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
