"""Kinds of exceptions, and calls of the package in which a callback raises them (tests/hf/test_endings.py)."""

import functools
import itertools
import warnings

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

import stars_kernels
from stars_kernels import RewardModel
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
