"""What a reward model reads as text: prompts, answers, and the template that makes one text of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from stars_kernels.decoder.prefixes import shared_length
from stars_kernels.hf.text.prompts import Codec, Prompt, text_ids

Messages = list[Mapping[str, Any]]
Template = str | Callable[[str | Messages, str], str]
"""A format string with {prompt} and {answer}, or a function (prompt: str | messages, answer) -> text."""

_ANSWERS = ("alpha", "omega")
"""Of one length, and different from the first character on."""


class TextPrompt:
    """A prompt and its answers as text.

    What the language model's template writes at the start of the assistant's turn (a "<think>", say) belongs to the
    answer: the model goes on from it as from its own words.
    """

    def __init__(self, prompt: Prompt, codec: Codec) -> None:
        self.messages = prompt.messages
        self._prompt, self._codec = prompt, codec

    @cached_property
    def opening(self) -> str:
        """The start of the answer that the template has written; "" but for such a template."""
        if self.messages is None:
            return ""
        assert self._prompt.text is not None and self._codec.tokenizer is not None
        header = turn_header(self._codec.tokenizer, self.messages)
        return self._prompt.text.removeprefix(header) if self._prompt.text.startswith(header) else ""

    @cached_property
    def text(self) -> str:
        """The prompt up to where the answer starts, special tokens included."""
        return self._codec.prompt_text(self._prompt).removesuffix(self.opening)

    def answer(self, ids: list[int]) -> str:
        """Return the answer's text: whole characters without special tokens, up to its stop string."""
        return self.opening + self._codec.decode(ids)


def turn_header(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """Return what the chat template writes before the words of an assistant's turn behind `messages`."""
    # Two texts that part where their answers do: whatever the messages and the template say, both say it.
    first, second = (_render(tokenizer, messages, answer) for answer in _ANSWERS)
    length = shared_length(first, second)
    if not all(text.startswith(answer, length) for text, answer in zip((first, second), _ANSWERS, strict=True)):
        raise ValueError(
            "the chat template does not show what an assistant's turn says, so no answer can be placed in it"
        )
    return first[:length]


def whole_ids(
    tokenizer: PreTrainedTokenizerBase, template: Template | None, prompt: TextPrompt, answer: str
) -> list[int]:
    """Return prompt and answer as one text's token ids.

    template: None = the tokenizer's own chat template where the prompt is chat messages and it has one, the answer as
    the last turn, closing tokens included; else the prompt's text and the answer's, one behind the other.
    """
    if template is None and prompt.messages is not None and tokenizer.chat_template:
        text = _render(tokenizer, prompt.messages, answer)  # writes its own special tokens
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return text_ids(tokenizer, prompt.text + answer if template is None else filled(template, prompt, answer))


def filled(template: Template, prompt: TextPrompt, answer: str) -> str:
    """Fill the template in; a function gets chat messages as such, a format string gets them as the prompt's text."""
    if isinstance(template, str):
        return template.format(prompt=prompt.text, answer=answer)
    text = template(prompt.text if prompt.messages is None else list(prompt.messages), answer)
    if not isinstance(text, str):
        raise TypeError(f"the template returned {type(text).__name__} {text!r}, expected a string")
    return text


def check_template(template: object) -> None:
    if template is None or callable(template):
        return
    if not isinstance(template, str):
        raise TypeError(f"template is of type {type(template).__name__}, expected a format string, a function or None")
    try:
        texts = {template.format(prompt="", answer=answer) for answer in _ANSWERS}
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"template is {template!r}, expected a format string with {{prompt}} and {{answer}}"
        ) from error
    if len(texts) == 1:
        raise ValueError(f"template is {template!r}, expected a format string that has {{answer}}")


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], answer: str) -> str:
    chat: list[Any] = [*messages, {"role": "assistant", "content": answer}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False))
