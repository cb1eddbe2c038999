"""Prompts in, text out: what the user may pass as a prompt, and how answer tokens become text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

PROMPT_FORMS = "a string, chat messages (a list of dicts), a flat list of token ids, or a list of these"
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Prompt:
    """One prompt as the engine takes it; text is None where token ids were given."""

    ids: list[int]
    text: str | None = None


def split_prompts(prompt: Any) -> tuple[list[Any], bool]:
    """The single prompts in `prompt`, and whether it is a list of prompts (else it is one prompt)."""
    if isinstance(prompt, torch.Tensor):
        if prompt.dim() == 1:
            return [prompt.tolist()], False
        raise TypeError(
            f"prompt is a tensor of shape {list(prompt.shape)}, expected [tokens]; pass several as a list of lists"
        )
    if isinstance(prompt, str):
        return [prompt], False
    if not isinstance(prompt, Sequence):
        raise TypeError(f"prompt is a {type(prompt).__name__}, expected {PROMPT_FORMS}")
    if len(prompt) == 0:
        return [], True
    if all(_is_id(item) for item in prompt) or all(isinstance(item, Mapping) for item in prompt):
        return [prompt], False
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
        if isinstance(prompt, torch.Tensor):
            prompt = prompt.tolist()
        if isinstance(prompt, Sequence) and not isinstance(prompt, str) and all(_is_id(item) for item in prompt):
            return Prompt([int(item) for item in prompt])
        if self.tokenizer is None:
            raise ValueError(
                f"the prompt is a {type(prompt).__name__}, and a model in memory has no tokenizer: pass tokenizer=, "
                "or token ids"
            )
        if isinstance(prompt, str):
            return Prompt(self.tokenizer(prompt)["input_ids"], prompt)
        if isinstance(prompt, Sequence) and all(isinstance(item, Mapping) for item in prompt):
            text = str(self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False))
            # The template writes its own BOS; the tokenizer must not add a second one.
            return Prompt(self.tokenizer(text, add_special_tokens=False)["input_ids"], text)
        raise TypeError(f"the prompt is a {type(prompt).__name__}, expected {PROMPT_FORMS}")

    def prompt_text(self, prompt: Prompt) -> str:
        """The prompt as a callable reward sees it: as given, or its token ids as text, special tokens included."""
        return self._text(prompt.ids, skip_special=False) if prompt.text is None else prompt.text

    def decode(self, ids: list[int]) -> str:
        """The text of an answer: no special tokens, only whole characters, up to its stop string."""
        # Half a character decodes to U+FFFD; it is not a character yet.
        text = self._text([i for i in ids if i not in self.eos]).rstrip(REPLACEMENT)
        cuts = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        return text[: min(cuts)] if cuts else text

    def find_stop(self, tokens: list[int], accepted: int) -> int | None:
        """How many of `tokens` it takes to complete a stop string, given that the first `accepted` complete none."""

        def complete(count: int) -> bool:
            text = self._text(tokens[:count])
            return any(stop in text for stop in self.stops)

        if not complete(len(tokens)):
            return None
        return next(count for count in range(accepted + 1, len(tokens) + 1) if complete(count))

    def _text(self, ids: list[int], skip_special: bool = True) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special))


def _is_id(item: Any) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)
