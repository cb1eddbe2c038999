"""Prompts by name: a small set of our own, and public data sets through the library `datasets`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stars_kernels.data.prompts import BadLine, PromptLine, read_prompts
from stars_kernels.decoder.errors import message_of
from stars_kernels.extras import require

BUILTIN = Path(__file__).with_name("builtin.jsonl")
"""Prompts that were written for this package, under its licence."""
AS_TEXT = "-text"
"""What a name ends with whose prompts are to be plain texts, for models without a chat template."""
WORDS = 10
"""Of a film review, which an answer goes on with."""
TURN = re.compile(r"\n\n(Human|Assistant): ?")
"""How HH-RLHF marks who speaks."""
ROLES = {"Human": "user", "Assistant": "assistant"}

Chat = list[dict[str, str]]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Where the prompts of a name come from.

    path, split: of the data set, on the Hugging Face hub. text, chat: make a row's prompt; None = there is no chat.
    """

    path: str
    split: str
    text: Callable[[Row], str]
    chat: Callable[[Row], Chat] | None


def hh_rlhf_text(row: Row) -> str:
    """Return the conversation up to its last "Assistant:", as HH-RLHF writes it."""
    *before, _ = row["chosen"].rpartition("\n\nAssistant:")
    return "".join(before)


def hh_rlhf_chat(row: Row) -> Chat:
    """Return the conversation up to its last human turn, as chat messages."""
    _, *parts = TURN.split(hh_rlhf_text(row))  # who, what, who, what, ..., Assistant, ""
    turns = zip(parts[:-2:2], parts[1:-2:2], strict=True)
    return [{"role": ROLES[who], "content": what.strip()} for who, what in turns]


def imdb_text(row: Row) -> str:
    """Return the first words of a film review."""
    return " ".join(row["text"].replace("<br />", " ").split()[:WORDS])


SOURCES = {
    "hh-rlhf": Source("Anthropic/hh-rlhf", "test", hh_rlhf_text, hh_rlhf_chat),
    "harmfulqa": Source(
        "declare-lab/HarmfulQA",
        "train",
        lambda row: row["question"],
        lambda row: [{"role": "user", "content": row["question"]}],
    ),
    "imdb": Source("stanfordnlp/imdb", "test", imdb_text, None),
}
NAMES = ("builtin", *SOURCES, "builtin" + AS_TEXT, *(name + AS_TEXT for name in SOURCES))
"""What may stand in place of a file of prompts."""


def load_prompts(source: Path | str, limit: int | None = None) -> list[PromptLine | BadLine]:
    """Read the prompts of a file, or of a data set by its name; where a file has that name, it is read.

    Args:
        source: a file (see `read_prompts`), or a name: "builtin" (a small set of this package's own), "hh-rlhf"
            (HH-RLHF's test conversations up to their last human turn), "harmfulqa" (HarmfulQA's questions), as chats;
            "imdb" (the first 10 words of IMDB's test reviews, to go on with), as texts. "builtin-text" and the like
            are the same prompts as plain texts, for models without a chat template.
        limit: prompts to read, at most.

    Raises:
        ConnectionError: the data set is not on this machine and cannot be fetched.
        ImportError: the library `datasets` is not installed.
        OSError, ValueError: as `read_prompts`; also where there are no prompts.
    """
    name = str(source)
    if name in NAMES and not Path(source).exists():
        lines = list(_named(name)[:limit])
    else:
        try:
            lines = read_prompts(Path(source), limit)
        except FileNotFoundError as error:
            told = f"there is no such file of prompts, and no such name: expected a file, or one of {', '.join(NAMES)}"
            raise FileNotFoundError(error.errno, told, name) from None
    if not lines:
        raise ValueError(f"{source} has no prompts, expected one at least")
    return lines


@cache
def _named(name: str) -> tuple[PromptLine | BadLine, ...]:
    stem = name.removesuffix(AS_TEXT)
    if stem == "builtin":
        lines = read_prompts(BUILTIN)
        as_text = [_as_text(line) for line in lines if isinstance(line, PromptLine)]
        return tuple(as_text if name != stem else lines)
    source = SOURCES[stem]
    make = source.text if source.chat is None or name != stem else source.chat
    return tuple(PromptLine(f"{stem}-{i}", make(row), i + 1) for i, row in enumerate(_rows(stem, source)))


def _as_text(line: PromptLine) -> PromptLine:
    """Return the prompt of a chat of one message, as text."""
    return PromptLine(line.id, line.prompt[0]["content"], line.line)


def _rows(name: str, source: Source) -> Iterator[Row]:
    """Load a data set's rows, from this machine or the hub."""
    datasets = require("datasets", "eval")
    try:
        return iter(datasets.load_dataset(source.path, split=source.split))
    except Exception as error:  # the library raises many kinds: no network, no such file, a proxy's answer
        raise ConnectionError(
            f"the data set {name!r} ({source.path} on the Hugging Face hub) cannot be loaded: {type(error).__name__}: "
            f"{message_of(error)}. It has to be fetched once with a network; without one, give a file of prompts, or "
            "'builtin'"
        ) from error
