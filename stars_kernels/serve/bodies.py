"""What the body of a request may hold. Whatever the engine cannot do exactly is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from stars_kernels.decoder.checks import shown
from stars_kernels.decoder.naming import near
from stars_kernels.serve.errors import ApiError

IGNORED = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Keys that say who asks, or help a cache: no answer depends on them."""
ONLY: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Keys of OpenAI's that are refused, but for null and these values, which ask for nothing."""
MESSAGE_ONLY = frozenset({"name", "refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id"})
"""Keys of OpenAI's messages that are refused, but for null and empty."""


class StreamOptions(BaseModel):
    """How a stream is told. include_obfuscation: only False."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Body(BaseModel):
    """Keys of both kinds of requests. stars: settings by the names of `StarsConfig` and of the rule."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stars: dict[str, Any] | None = None

    @property
    def length(self) -> tuple[str, int | None]:
        """The name and the value of the key that has the most tokens of an answer."""
        return "max_tokens", self.max_tokens

    def settings(self) -> dict[str, Any]:
        """Return the settings of the call by the names of `StarsConfig`, those that are given."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if stops is not None and len(stops) > 4:
            raise ApiError(400, f"stop has {len(stops)} strings, expected at most 4", param="stop")
        given = {
            "max_new_tokens": self.length[1],
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop_strings": stops,
        }
        return {name: value for name, value in given.items() if value is not None}


class Message(BaseModel):
    """A turn of a chat. content: a text, or parts that are texts, which are joined."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str | list[Any] | None = None

    def told(self, place: str) -> dict[str, str]:
        """Return it as a chat template reads it; place: in the body, for the errors."""
        for name, value in (self.model_extra or {}).items():
            if name not in MESSAGE_ONLY:
                raise ApiError(400, f"{place} has {name!r}, expected role and content", param=f"{place}.{name}")
            if value not in (None, [], {}, ""):
                raise ApiError(400, f"{place}.{name} is not supported, expected none", param=f"{place}.{name}")
        if self.content is None:
            raise ApiError(400, f"{place}.content is missing, expected a text", param=f"{place}.content")
        parts = [self.content] if isinstance(self.content, str) else list(map(_text_of, self.content))
        if None in parts or not parts:
            raise ApiError(
                400, f"{place}.content has a part that is no text, expected texts alone: the engine reads nothing else",
                param=f"{place}.content",
            )  # fmt: skip
        return {"role": self.role, "content": "".join(part for part in parts if part is not None)}


class ChatBody(Body):
    """Of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def length(self) -> tuple[str, int | None]:
        old, new = self.max_tokens, self.max_completion_tokens
        if None not in (old, new) and old != new:
            raise ApiError(
                400, f"max_tokens is {old} and max_completion_tokens is {new}, expected one of them",
                param="max_completion_tokens",
            )  # fmt: skip
        return ("max_tokens", old) if new is None else ("max_completion_tokens", new)

    def prompts(self) -> list[Any]:
        """Return the chat as the only prompt."""
        return [[message.told(f"messages.{i}") for i, message in enumerate(self.messages)]]


class TextBody(Body):
    """Of /v1/completions. prompt: a text, texts, token ids, or lists of these."""

    prompt: Any

    def prompts(self) -> list[Any]:
        """Return the prompts, a text or token ids each."""
        given = self.prompt
        if isinstance(given, str) or (isinstance(given, list) and given and all(map(_is_id, given))):
            return [given]
        if isinstance(given, list) and given and all(_is_prompt(one) for one in given):
            return list(given)
        raise ApiError(
            400, f"prompt is {shown(given)}, expected a string, token ids, or a list of strings or of token ids",
            param="prompt",
        )  # fmt: skip


def read_body(kind: type[Any], data: bytes) -> Any:
    """Read a body of a kind from JSON.

    Raises ApiError with status 400 where it is no JSON, has keys or values that are unknown, or asks for what there is
    not.
    """
    try:
        given = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(given, Mapping):
        raise ApiError(400, f"the body is {shown(given)}, expected an object")
    try:
        body: Body = kind.model_validate(given)
    except ValidationError as error:
        raise _invalid(error) from None
    for name, value in (body.model_extra or {}).items():
        _check_other(name, value, kind)
    options = body.stream_options
    if options is not None and not body.stream:
        raise ApiError(400, "stream_options is given without stream, expected stream: true", param="stream_options")
    if options is not None and options.include_obfuscation:
        raise ApiError(400, "include_obfuscation is not supported, expected false", param="stream_options")
    return body


def _check_other(name: str, value: Any, kind: type[Body]) -> None:
    """Refuse a key that no field of the body has."""
    if name in IGNORED or (value is None and name in ONLY):
        return
    if name in ONLY:
        allowed = ONLY[name]
        if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            return
        expected = " or ".join(["null", *map(shown, allowed)])
        raise ApiError(400, f"{name} is {shown(value)}, which is not supported; expected {expected}", param=name)
    known = [*kind.model_fields, *IGNORED, *ONLY]
    raise ApiError(400, f"unknown key {shown(name)}{near(name, known)}", param=name[:100])


def _invalid(error: ValidationError) -> ApiError:
    """Tell of the first thing that is wrong with a body."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("str", "list[str]", "list[any]"))
    what = "is missing" if first["type"] == "missing" else f"is {shown(first['input'])}: {first['msg']}"
    return ApiError(400, f"{place[:100]} {what}", param=place[:100])


def _text_of(part: Any) -> str | None:
    is_text = isinstance(part, Mapping) and part.get("type") == "text" and set(part) == {"type", "text"}
    return part["text"] if is_text and isinstance(part["text"], str) else None


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _is_prompt(item: Any) -> bool:
    return isinstance(item, str) or (isinstance(item, list) and bool(item) and all(map(_is_id, item)))
