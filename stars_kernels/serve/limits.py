"""How much a server takes on."""

from __future__ import annotations

import dataclasses
import functools
import operator
from dataclasses import dataclass

from stars_kernels.decoder.checks import check, check_number, is_int


@dataclass(frozen=True)
class Limits:
    """Bounds of a server. What is over one is refused, and the refusal names it.

    waiting: answers that may wait for a slot of the engine; over it, status 429.
    choices: answers of one request, `n` for each of its prompts.
    attempts: that a request's rule may make at a segment, side by side in a race.
    max_time: seconds that a request may take, its waiting included; also what holds for one that asks for no less.
    body_bytes: of a request's body. body_time: seconds in which it has to arrive.
    grace: seconds that requests under way have to end, once the server is told to stop.
    """

    waiting: int = 128
    choices: int = 32
    attempts: int = 256
    max_time: float = 600.0
    body_bytes: int = 4 * 2**20
    body_time: float = 30.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(field.default, int):
                value = getattr(self, field.name)
                check(self, field.name, is_int(value) and value >= 1, "an integer >= 1")
            else:
                least = 0 if field.name == "grace" else 1e-3
                check_number(self, field.name, functools.partial(operator.le, least), f"seconds >= {least}")
        if self.choices > self.waiting:  # else such a request could never be taken
            object.__setattr__(self, "choices", self.waiting)
