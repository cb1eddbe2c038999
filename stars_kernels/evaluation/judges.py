"""Judges: who says which of two answers is better, or what one is worth."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stars_kernels.decoder.checks import is_int
from stars_kernels.decoder.errors import message_of
from stars_kernels.evaluation.answers import Answer
from stars_kernels.hf.engine import Engine

WORDS = ("first", "second", "tie")
"""What a verdict on two answers may be."""
UNREADABLE = "unreadable"
"""The verdict of a judge whose reply is none of these."""
PairFunction = Callable[[list[str], list[str], list[str]], Sequence[str | float]]
"""f(prompts, first answers, second answers): a verdict each."""


class JudgeError(RuntimeError):
    """A judge failed, and what it was asked cannot be settled without it."""


@dataclass(frozen=True)
class Question:
    """What a judge is asked: of two answers which is better, or of one what it is worth.

    key: under which its verdict is kept: a hash of the judge, the prompt and the answers in their order. rule,
    prompt_id: for whose sake it is asked first. prompt: as its file has it. text: of the prompt, for people. answers:
    one or two.
    """

    key: str
    rule: str
    prompt_id: int | str
    prompt: Any
    text: str
    answers: tuple[Answer, ...]


Found = dict[str, Any]
"""Of a question: {"verdict": one of WORDS or UNREADABLE}, {"score": number} or {"error": why there is none}."""


class Judge(Protocol):
    """Anyone who can be asked.

    name: for people. identity: what its verdicts follow from; those of another identity are not reused. pairwise:
    whether it compares two answers (then it is asked in both orders), or gives one a score.
    """

    name: str
    identity: str
    pairwise: bool

    def ask(self, questions: Sequence[Question]) -> Generator[tuple[Question, Found]]:
        """Yield each question and what was found, as soon as it is there, in any order."""


def key_of(identity: str, prompt: Any, answers: Sequence[Any]) -> str:
    """Return the key of a question: a hash of the judge, the prompt, and the answers in their order."""
    text = json.dumps([identity, prompt, list(answers)], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class RewardJudge:
    """A reward model as a judge: the answer with the higher reward wins, equal rewards are a tie.

    It should be another one than that which guided the decoding.
    """

    pairwise = False

    def __init__(self, engine: Engine) -> None:
        """Judge by the reward model of an engine, which has the language model whose answers are judged."""
        self.engine = engine
        self.name = self.identity = f"reward model {engine.models.reward_fingerprint}"

    def ask(self, questions: Sequence[Question]) -> Generator[tuple[Question, Found]]:
        """Score the answers, a few at a time; those that fail, alone."""
        for start in range(0, len(questions), 8):
            some = questions[start : start + 8]
            try:
                yield from zip(some, self._scores(some), strict=True)
            except (RuntimeError, ValueError) as error:
                if len(some) == 1:
                    yield some[0], {"error": message_of(error)}
                else:
                    for question in some:
                        yield from self.ask([question])

    def _scores(self, questions: Sequence[Question]) -> list[Found]:
        tokens = [question.answers[0].token_ids for question in questions]
        rewards = self.engine.score([question.prompt for question in questions], tokens)
        return [
            {"score": reward} if math.isfinite(reward) else {"error": f"the reward is {reward}, expected a number"}
            for reward in rewards
        ]


class FunctionJudge:
    """A function of two answers as a judge: f(prompts, first_answers, second_answers) -> a verdict each.

    A verdict is "first", "second" or "tie", or a number: above 0 the first is better, below 0 the second, 0 is a tie.
    """

    pairwise = True

    def __init__(self, function: PairFunction, name: str | None = None, at_once: int = 16) -> None:
        """Judge by a function.

        Args:
            name: in the identity, beside a hash of the source of its module: an edit there asks anew. None = that of
                the function, if it has one at the top of its module.
            at_once: pairs of one call, at most.
        """
        if not callable(function):
            raise TypeError(f"the judge is of type {type(function).__name__}, expected a function")
        self.at_once = check_at_once(at_once)
        self.function = function
        module = inspect.getmodule(function)
        own = getattr(function, "__qualname__", "<no name>")
        if name is None and "<" in own:  # a lambda, or made by a function: another one may be called so too
            raise ValueError(f"the judge is {own}, which is not at the top of a module: expected name= for it")
        name = name or f"{getattr(module, '__name__', '?')}:{own}"
        self.name = self.identity = f"function {name}{_source_hash(module)}"

    @staticmethod
    def named(name: str, at_once: int = 16) -> FunctionJudge:
        """Make the judge that `module:function` names. Raises ValueError where there is none."""
        module, colon, function = name.partition(":")
        try:
            if not colon:
                raise ImportError("it has no ':'")
            return FunctionJudge(getattr(importlib.import_module(module), function), name, at_once)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"the judge's function is {name!r}, expected module:function: {error}") from error

    def ask(self, questions: Sequence[Question]) -> Generator[tuple[Question, Found]]:
        """Call the function, with at most `at_once` pairs each time. Raises JudgeError where it fails."""
        for start in range(0, len(questions), self.at_once):
            some = questions[start : start + self.at_once]
            prompts = [question.text for question in some]
            firsts, seconds = ([question.answers[i].text or "" for question in some] for i in (0, 1))
            try:
                found = list(self.function(prompts, firsts, seconds))
            except Exception as error:
                raise JudgeError(f"the judge, {self.identity}, raised {type(error).__name__}: {error}") from error
            if len(found) != len(some):
                raise JudgeError(f"the judge, {self.identity}, gave {len(found)} verdicts on {len(some)} pairs")
            yield from ((question, {"verdict": self._word(one)}) for question, one in zip(some, found, strict=True))

    def _word(self, found: Any) -> str:
        """Read a verdict."""
        if isinstance(found, str) and found in WORDS:
            return found
        try:
            number = math.nan if isinstance(found, str | bool) else float(found)
        except (TypeError, ValueError):
            number = math.nan
        if math.isnan(number):
            raise JudgeError(f"the judge, {self.identity}, gave {found!r}, expected one of {WORDS} or a number")
        return "first" if number > 0 else "second" if number < 0 else "tie"


def _source_hash(module: Any) -> str:
    """Return a hash of a module's source, in brackets; nothing where it has none."""
    try:
        source = inspect.getsource(module)
    except (TypeError, OSError):  # a builtin, or typed by hand
        return ""
    return f" ({hashlib.blake2b(source.encode(), digest_size=8).hexdigest()})"


def check_at_once(at_once: Any) -> int:
    if not (is_int(at_once) and at_once >= 1):
        raise ValueError(f"at-once is {at_once!r}, expected 1 or more")
    return int(at_once)


def text_of(prompt: Any, decode: Callable[[list[int]], str] | None) -> str:
    """Return a prompt as people read it.

    Args:
        prompt: a text, which is returned as it is; a chat: its user's message if that is all, else "role: content" of
            each; or token ids.
        decode: makes text of token ids; None = there is no tokenizer.
    """
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], Mapping):
        if len(prompt) == 1:
            return str(prompt[0].get("content"))
        return "\n\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)
    if decode is None:
        raise ValueError("a prompt is token ids, and the engine has no tokenizer: a judge of texts cannot read it")
    return decode(list(prompt))
