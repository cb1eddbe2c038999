"""Files of prompts: JSON lines, or one text a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stars_kernels.decoder.checks import SEED_BITS
from stars_kernels.decoder.config import Settings

KEYS = ("prompt", "messages", "prompt_token_ids")
"""Of a line's object, where its prompt is."""
IGNORED = frozenset({"model"})
"""Keys of a batch line's body that are of no matter here."""
OF_CALLS = frozenset({*Settings.__annotations__, "max_tokens", "max_completion_tokens", "n", "stop", "logit_bias"})
"""Settings of a call, here and elsewhere; a line has none of its own."""


@dataclass(frozen=True)
class PromptLine:
    """A prompt of a file.

    id: its custom_id, else its line. prompt: text, chat messages or token ids. line: from 1 on.
    """

    id: int | str
    prompt: Any
    line: int

    @property
    def hash(self) -> str:
        """Of the prompt: by it a changed one is known."""
        text = json.dumps(self.prompt, sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@dataclass(frozen=True)
class BadLine:
    """A line that holds no prompt, and why."""

    id: int | str
    error: str
    line: int
    hash: str


def read_prompts(path: Path, limit: int | None = None) -> list[PromptLine | BadLine]:
    """Read a file of prompts: of `.txt` each line that is not empty is one, else each is JSON.

    It is a string, or an object with "prompt" (a text, or token ids), "messages" (a chat) or "prompt_token_ids", and
    perhaps "custom_id" (or "id"), an int or a string. A line of vLLM's and OpenAI's batch files has these in its
    "body", and nothing beside them there but "model". Settings are the call's, so a line with some of its own is a bad
    one; other keys are ignored.

    Args:
        limit: lines to read, at most, but for empty ones.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or an id comes twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other line ends, unescaped
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    parse = _text if path.suffix == ".txt" else _json
    found: list[PromptLine | BadLine] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and (limit is None or len(found) < limit):
            found.append(parse(line, number))
    _check_ids(path, found)
    return found


def _text(line: str, number: int) -> PromptLine:
    return PromptLine(number, line, number)


def _json(line: str, number: int) -> PromptLine | BadLine:
    line_id: int | str = number
    try:
        data = json.loads(line)
        if isinstance(data, str):
            return PromptLine(number, data, number)
        if not isinstance(data, Mapping):
            raise ValueError(f"it is {_kind(data)}, expected a string or an object")
        line_id = id_of(data, number)
        return PromptLine(line_id, prompt_of(data), number)
    except (ValueError, RecursionError) as error:  # JSON's own too
        digest = hashlib.blake2b(line.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        return BadLine(line_id, f"line {number}: {error}", number, digest)


def id_of(data: Mapping[str, Any], number: int) -> int | str:
    """Return the id of an object with a prompt: its custom_id or id, else its number; ValueError where it cannot be."""
    found = next((data[key] for key in ("custom_id", "id") if data.get(key) is not None), number)
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise ValueError(f"custom_id is {_kind(found)}, expected an integer or a string")
    if isinstance(found, int) and found.bit_length() > SEED_BITS:
        raise ValueError(f"custom_id is an integer of {found.bit_length()} bits, expected at most {SEED_BITS}")
    return found


def prompt_of(data: Mapping[str, Any]) -> Any:
    """Return the prompt of an object, which is under one of KEYS; ValueError where it is none."""
    body = data.get("body", data)
    if not isinstance(body, Mapping):
        raise ValueError(f"body is {_kind(body)}, expected an object")
    given = [key for key in KEYS if body.get(key) is not None]
    if len(given) != 1:
        found = " and ".join(given) or f"{', '.join(map(str, body)) or 'nothing'}"
        raise ValueError(f"found {found}, expected one of {', '.join(KEYS)}")
    others = set(body) - {given[0]} - IGNORED if body is not data else set(body) & OF_CALLS
    if others:
        raise ValueError(f"it has {', '.join(sorted(others))}: settings are the call's, expected {given[0]} alone")
    _check(given[0], body[given[0]])
    return body[given[0]]


def _check(key: str, prompt: Any) -> None:
    """Refuse what cannot be a prompt under this key."""
    if isinstance(prompt, str) and key == "prompt":
        return
    if not isinstance(prompt, list):
        raise ValueError(f"{key} is {_kind(prompt)}, expected {'a string or ' if key == 'prompt' else ''}a list")
    kind, items = (Mapping, "objects") if key == "messages" else (int, "token ids")
    wrong = next((item for item in prompt if not isinstance(item, kind) or isinstance(item, bool)), None)
    if wrong is not None:
        raise ValueError(f"{key} is a list with {_kind(wrong)} in it, expected one of {items}")


def _kind(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    names = {"str": "a string", "list": "a list", "dict": "an object"}
    return names.get(type(value).__name__, f"the number {value}")


def _check_ids(path: Path, lines: Iterable[PromptLine | BadLine]) -> None:
    seen: dict[int | str, int] = {}
    for line in lines:
        if (first := seen.setdefault(line.id, line.line)) != line.line:
            raise ValueError(f"{path}: custom_id {line.id!r} is in lines {first} and {line.line}, expected it once")
