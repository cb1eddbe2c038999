"""The texts of attempts, from their tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

BEFORE = 8
"""Tokens of the answer that are decoded before an attempt: what a token means as text depends on those before it."""
HALF = "\ufffd"
"""What half a character decodes to."""


def attempt_texts(tokenizer: PreTrainedTokenizerBase, segments: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return what each judged attempt adds to its answer as text, a list per segment.

    The texts of the attempts that were taken, joined, are the answer. A character that an attempt leaves half done is
    in the text of the segment that ends it.

    Args:
        tokenizer: the language model's; its special tokens are left out.
        segments: of one answer, as dictionaries, each with the "tokens" of its attempts and the "chosen" one.
    """

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    answer, texts = list[int](), list[list[str]]()
    for segment in segments:
        tail = answer[-BEFORE:]
        before = decode(tail).rstrip(HALF)
        texts.append([_added(decode, before, tail, tokens) for tokens in segment["tokens"]])
        answer += segment["tokens"][segment["chosen"]]
    return texts


def _added(decode: Callable[[list[int]], str], before: str, tail: list[int], tokens: Sequence[int]) -> str:
    whole = decode([*tail, *tokens]).rstrip(HALF)
    if whole.startswith(before):
        return whole[len(before) :]
    return decode([*tokens])  # a tokenizer that tidies spaces up writes the end of `before` otherwise here
