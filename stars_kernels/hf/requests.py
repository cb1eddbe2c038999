"""The prompts of a call: their ids, and the events that tell of them."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.checks import SEED_BITS, shown
from stars_kernels.decoder.errors import StarsError
from stars_kernels.decoder.output import StarsEvent, StarsOutput
from stars_kernels.hf.text.prompts import Codec, Prompt
from stars_kernels.hf.text.templates import TextPrompt

Result = StarsOutput | Exception
"""What a prompt comes to: its output, or what ended it."""
Results = list[Result | None]
"""One entry a prompt; None until it has ended."""


@dataclass
class Request:
    """A prompt that passed its checks, at its place in the caller's list."""

    index: int
    id: int | str
    prompt: Prompt
    text: TextPrompt
    """For reward models that read text."""


def number_requests(given: Any, count: int, encoded: Mapping[int, Prompt]) -> Mapping[int, int | str]:
    """The ids by prompt index: the caller's, or a hash of the token ids plus the occurrence number."""
    if given is None:
        seen: Counter[str] = Counter()
        ids: dict[int, int | str] = {}
        for index, prompt in encoded.items():
            digest = hashlib.blake2b(repr(prompt.ids).encode(), digest_size=16).hexdigest()
            ids[index] = f"{digest}#{seen[digest]}"
            seen[digest] += 1
        return ids
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"request_ids is of type {type(given).__name__}, expected a list of int or str")
    if len(given) != count:
        raise ValueError(f"{len(given)} request_ids for {count} prompts, expected one each")
    for request_id in given:
        if not isinstance(request_id, int | str) or isinstance(request_id, bool):
            raise TypeError(f"request id {request_id!r} is of type {type(request_id).__name__}, expected int or str")
        if isinstance(request_id, int) and request_id.bit_length() > SEED_BITS:
            raise ValueError(f"request id {shown(request_id)} is too large, expected at most {SEED_BITS} bits")
    repeated = [i for i, n in Counter(given).items() if n > 1]
    if repeated:
        raise ValueError(f"request id {repeated[0]!r} is given more than once, expected distinct ones")
    return dict(enumerate(given))


def failure(codec: Codec, index: int, request_id: int | str | None, error: Exception) -> StarsEvent:
    """The event of a prompt that failed before it had an answer."""
    text = None if codec.tokenizer is None else ""
    return StarsEvent(index, request_id, token_ids=[], text=text, segment=None, output=error)


@contextmanager
def carrying(results: Results) -> Iterator[None]:
    """Give whatever ends the block the results so far, as `.results`."""
    try:
        yield
    except BaseException as error:
        error.results = results  # type: ignore[attr-defined]
        raise


def collect(results: Results, many: bool, errors: Literal["raise", "return"] = "raise") -> list[Any]:
    """Return one output per prompt.

    Where some failed, the exceptions that ended them stand in their places, or with errors="raise" a `StarsError` is
    raised; of a single prompt its own exception.
    """
    ends = [result for result in results if result is not None]
    failed = [result for result in ends if isinstance(result, Exception)]
    if failed and errors == "raise":
        raise StarsError(ends) if many else failed[0]
    return ends


@dataclass
class Told:
    """How much of a prompt's answer its events have told."""

    codec: Codec | None
    """None where their text is not wanted."""
    tokens: int = 0
    text: str = ""

    def event(self, request: Request, answer: Answer, result: Result | None) -> StarsEvent:
        """What is new; result: what the prompt has come to, None while it is on its way."""
        new = answer.tokens[self.tokens :]
        piece = self._piece(answer.tokens, result)
        self.tokens = len(answer.tokens)
        return StarsEvent(request.index, request.id, new, piece, answer.segments[-1] if new else None, result)

    def _piece(self, tokens: list[int], result: Result | None) -> str | None:
        if self.codec is None or self.codec.tokenizer is None:
            return None
        whole = result.text if isinstance(result, StarsOutput) else None
        text = self.codec.settled(tokens) if whole is None else whole
        if not text.startswith(self.text):
            warnings.warn(
                f"the tokenizer rewrote text that an event has told: {self.text!r} became {text!r}", stacklevel=2
            )
        piece, self.text = text[len(self.text) :], text
        return piece
