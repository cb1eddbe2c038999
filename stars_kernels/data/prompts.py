"""Files of prompts: JSON lines, or one text a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEYS = ("prompt", "messages", "prompt_token_ids")
"""Of a row, where its prompt is; in this order."""
IGNORED = frozenset({"model"})
"""Keys of a batch row's body that are of no matter here."""


@dataclass(frozen=True)
class PromptRow:
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
class BadRow:
    """A line that holds no prompt, and why."""

    id: int | str
    error: str
    line: int
    hash: str


def read_prompts(path: Path, limit: int | None = None) -> list[PromptRow | BadRow]:
    """Read a file of prompts: of `.txt` each line that is not empty is one, else each is a row of JSON.

    A row is a string, or an object with "prompt" (a text, or token ids), "messages" (a chat) or "prompt_token_ids", and
    perhaps "custom_id" (or "id"), an int or a string. A row of vLLM's and OpenAI's batch files has these in its "body",
    and nothing beside them there but "model": settings are the command's.

    Args:
        limit: rows to read, at most.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or an id comes twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other line ends, unescaped
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    parse = _text if path.suffix == ".txt" else _row
    rows: list[PromptRow | BadRow] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and (limit is None or len(rows) < limit):
            rows.append(parse(line, number))
    _check_ids(path, rows)
    return rows


def _text(line: str, number: int) -> PromptRow:
    return PromptRow(number, line, number)


def _row(line: str, number: int) -> PromptRow | BadRow:
    row_id: int | str = number
    try:
        data = json.loads(line)
        if isinstance(data, str):
            return PromptRow(number, data, number)
        if not isinstance(data, Mapping):
            raise ValueError(f"a row is {_kind(data)}, expected a string or an object")
        row_id = _id_of(data, number)
        return PromptRow(row_id, _prompt_of(data), number)
    except (ValueError, RecursionError) as error:  # JSON's own too
        digest = hashlib.blake2b(line.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        return BadRow(row_id, f"line {number}: {error}", number, digest)


def _id_of(data: Mapping[str, Any], number: int) -> int | str:
    found = data.get("custom_id", data.get("id"))
    if found is None:
        return number
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise ValueError(f"custom_id is {_kind(found)}, expected an integer or a string")
    return found


def _prompt_of(data: Mapping[str, Any]) -> Any:
    body = data.get("body", data)
    if not isinstance(body, Mapping):
        raise ValueError(f"body is {_kind(body)}, expected an object")
    given = [key for key in KEYS if body.get(key) is not None]
    if len(given) != 1:
        found = " and ".join(given) or f"{', '.join(map(str, body)) or 'nothing'}"
        raise ValueError(f"found {found}, expected one of {', '.join(KEYS)}")
    if body is not data and (others := sorted(set(body) - IGNORED - {given[0]})):
        raise ValueError(f"body has {', '.join(others)}: settings are the command's, expected {given[0]} alone")
    prompt = body[given[0]]
    if given[0] == "messages" and not isinstance(prompt, list):
        raise ValueError(f"messages is {_kind(prompt)}, expected a list")
    return prompt


def _kind(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    names = {"str": "a string", "list": "a list", "dict": "an object"}
    return names.get(type(value).__name__, f"the number {value}")


def _check_ids(path: Path, rows: Iterable[PromptRow | BadRow]) -> None:
    seen: dict[int | str, int] = {}
    for row in rows:
        if row.id in seen:
            raise ValueError(
                f"{path}: custom_id {row.id!r} is in lines {seen[row.id]} and {row.line}, expected it once"
            )
        seen[row.id] = row.line
