"""Prompts in, text out: what the user may pass as a prompt, and how answer tokens become text."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeGuard

import torch
from transformers import PreTrainedTokenizerBase

PROMPT_FORMS = "a string, chat messages (a list of dicts), a flat list of token ids, or a list of these"
Message = Mapping[str, Any]
OnePrompt = str | Sequence[int] | Sequence[Message]
"""A text, token ids, or the messages of a chat."""
SeveralPrompts = list[str] | tuple[str, ...] | Sequence[Sequence[int]] | Sequence[Sequence[Message]] | list[OnePrompt]
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Prompt:
    """One prompt as the engine takes it; text is None where token ids were given, messages where it was no chat."""

    ids: list[int]
    text: str | None = None
    messages: list[Mapping[str, Any]] | None = None


def split_prompts(prompt: Any) -> tuple[list[Any], bool]:
    """The single prompts in `prompt`, and whether it is a list of prompts (else it is one prompt)."""
    if _is_list(prompt) and len(prompt) == 0:
        return [], True
    if isinstance(prompt, str) or _token_ids(prompt) is not None or _is_chat(prompt):
        return [prompt], False
    if not _is_list(prompt):
        raise _unknown_form("prompt", prompt)
    return list(prompt), True


class Codec:
    """A tokenizer (or none) and the stop strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stops: tuple[str, ...], eos: tuple[int, ...]) -> None:
        if stops and tokenizer is None:
            raise ValueError(f"stop_strings {stops} need a tokenizer: pass tokenizer=")
        special = [stop for stop in stops if tokenizer is not None and stop in tokenizer.all_special_tokens]
        if special:
            raise ValueError(f"stop string {special[0]!r} is a special token, which is no text: pass eos_token_id=")
        self.tokenizer, self.stops, self.eos = tokenizer, stops, eos

    def encode(self, prompt: Any) -> Prompt:
        """Token ids and text of one prompt."""
        ids = _token_ids(prompt)
        if ids is not None:
            return Prompt(ids)
        if not isinstance(prompt, str) and not _is_chat(prompt):
            raise _unknown_form("it", prompt)
        if self.tokenizer is None:
            raise ValueError("it is text, and a model in memory has no tokenizer: pass tokenizer=, or token ids")
        if isinstance(prompt, str):
            return Prompt(text_ids(self.tokenizer, prompt), prompt)
        _check_messages(prompt)
        text = str(self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False))
        # The template writes its own BOS; the tokenizer must not add a second one.
        return Prompt(self.tokenizer(text, add_special_tokens=False)["input_ids"], text, list(prompt))

    def prompt_text(self, prompt: Prompt) -> str:
        """The prompt as a callable reward sees it: as given, or its token ids as text, special tokens included."""
        return self._text(prompt.ids, skip_special=False) if prompt.text is None else prompt.text

    def decode(self, ids: list[int]) -> str:
        """The text of an answer: no special tokens, only whole characters, up to its stop string."""
        # Half a character decodes to U+FFFD; it is not a character yet.
        text = self._text([i for i in ids if i not in self.eos]).rstrip(REPLACEMENT)
        cuts = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        return text[: min(cuts)] if cuts else text

    def settled(self, ids: list[int]) -> str:
        """The text of an answer that goes on, but for its end where that may become a stop string."""
        text = self.decode(ids)
        starts = {stop[:n] for stop in self.stops for n in range(1, len(stop))}
        return text[: -max((len(start) for start in starts if text.endswith(start)), default=0) or None]

    def find_stop(self, tokens: list[int], decided: int) -> int | None:
        """How many of `tokens` it takes to complete a stop string, given that the first `decided` complete none."""

        def complete(count: int) -> bool:
            text = self._text(tokens[:count])
            return any(stop in text for stop in self.stops)

        if not complete(len(tokens)):
            return None
        return next(count for count in range(decided + 1, len(tokens) + 1) if complete(count))

    def _text(self, ids: list[int], skip_special: bool = True) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special))


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids with the special tokens that the tokenizer adds, unless the text starts with its BOS already."""
    written = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=not written)["input_ids"])


def _is_list(prompt: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes | bytearray | memoryview)


def _token_ids(prompt: Any) -> list[int] | None:
    """The prompt as token ids; None where it is something else."""
    if isinstance(prompt, torch.Tensor) and prompt.dim() == 1:
        prompt = prompt.tolist()
    if _is_list(prompt) and all(isinstance(item, Integral) and not isinstance(item, bool) for item in prompt):
        return [int(item) for item in prompt]
    return None


def _is_chat(prompt: Any) -> bool:
    return _is_list(prompt) and all(isinstance(item, Mapping) for item in prompt)


def _check_messages(chat: Sequence[Mapping[str, Any]]) -> None:
    """What a template would print in silence, or trip over. (A message that calls tools may have no content.)"""
    for i, message in enumerate(chat):
        for key in ("role",) if "tool_calls" in message else ("role", "content"):
            if not isinstance(message.get(key), str):
                raise TypeError(f"its message {i} has {key} {reprlib.repr(message.get(key))}, expected a string")
    if chat[-1]["role"] == "assistant" and "tool_calls" not in chat[-1]:
        raise ValueError(
            "its last message is the assistant's, which the answer would not go on with; expected another's last, or "
            "the text that the template gives with continue_final_message=True"
        )


def _unknown_form(name: str, prompt: Any) -> TypeError:
    found, hint = f"of type {type(prompt).__name__}", ""
    if isinstance(prompt, torch.Tensor):
        found = f"a tensor of shape {list(prompt.shape)} and {prompt.dtype}"
        hint = "; pass its row [0], or its .tolist() for several" if prompt.dim() == 2 else ""
    elif isinstance(prompt, Mapping) and "input_ids" in prompt:
        hint = "; pass its input_ids"
    elif hasattr(prompt, "tolist"):
        hint = "; pass its .tolist()"
    return TypeError(f"{name} is {found}, expected {PROMPT_FORMS}{hint}")
