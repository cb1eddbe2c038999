"""The objects of OpenAI's protocol that answers are told in."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stars_kernels.decoder.output import Segment, StarsEvent, StarsOutput
from stars_kernels.decoder.serial import to_plain

FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", "time": "length"}
"""OpenAI's word for each finish_reason that a server's answer may have."""
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """How the answers of one request are told.

    chat: as /v1/chat/completions, else as /v1/completions. model: the served name. fingerprint: of models and versions.
    n: answers to each prompt. usage: whether each chunk of a stream has the key `usage`.
    """

    chat: bool
    model: str
    fingerprint: str
    n: int = 1
    usage: bool = False
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, outputs: Sequence[StarsOutput]) -> dict[str, Any]:
        """Return the response that has all answers."""
        choices = []
        for i, output in enumerate(outputs):
            told = {"message": {"role": "assistant", "content": output.text, "refusal": None}}
            choices.append(self._choice(i, told if self.chat else {"text": output.text}, output))
        return self._object(False, choices) | {"usage": self._usage(outputs)}

    def piece(self, index: int, event: StarsEvent, first: bool) -> dict[str, Any]:
        """Return the chunk of a segment that an answer grew by; first: of this answer."""
        role = {"role": "assistant"} if first else {}
        told = {"delta": {**role, "content": event.text}} if self.chat else {"text": event.text}
        return self._chunk([self._choice(index, told, None) | {"stars": of_segment(event.segment)}])

    def end(self, index: int, output: StarsOutput) -> dict[str, Any]:
        """Return the last chunk of an answer."""
        return self._chunk([self._choice(index, {"delta": {}} if self.chat else {"text": ""}, output)])

    def last(self, outputs: Iterable[StarsOutput]) -> dict[str, Any]:
        """Return the last chunk of a stream, which tells the tokens of all its answers."""
        return self._object(True, []) | {"usage": self._usage(outputs)}

    def _object(self, chunk: bool, choices: list[Any]) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.key}", "object": kind, "created": self.created,
            "model": self.model, "system_fingerprint": self.fingerprint, "choices": choices,
        }  # fmt: skip

    def _chunk(self, choices: list[Any]) -> dict[str, Any]:
        return self._object(True, choices) | ({"usage": None} if self.usage else {})

    def _choice(self, index: int, told: dict[str, Any], output: StarsOutput | None) -> dict[str, Any]:
        choice = {"index": index, **told, "logprobs": None, "finish_reason": None}
        if output is not None:
            choice |= {"finish_reason": FINISH[output.finish_reason], "stars": of(output)}
        return choice

    def _usage(self, outputs: Iterable[StarsOutput]) -> dict[str, int]:
        outputs = list(outputs)
        prompt = sum(output.counts.prompt for output in outputs[:: self.n])
        answer = sum(len(output.token_ids) for output in outputs)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def of(output: StarsOutput) -> dict[str, Any]:
    """Return what is told of an answer under `stars`; what is no finite number is null."""
    config = output.config
    rule = config.resolved_rule
    return {
        "reward": _number(output.reward),
        "prompt_reward": _number(output.prompt_reward),
        "finish_reason": output.finish_reason,
        "seed": config.seed,
        "request_id": output.request_id,
        "reward_threshold": getattr(rule, "reward_threshold", None),
        "beta": getattr(rule, "beta", None),
        "segments": len(output.segments),
        "counts": to_plain(output.counts),
    }


def of_segment(segment: Segment | None) -> dict[str, Any] | None:
    """Return what is told of a segment under `stars`; None where a chunk only has text that was held back."""
    if segment is None or not segment.attempts:
        return None
    return {
        "reward": _number(segment.reward),
        "threshold": _number(segment.threshold),
        "tokens": segment.length,
        "attempts": segment.attempts,
        "outcome": segment.outcome,
    }


def sent(data: Any) -> bytes:
    """Return a server-sent event. It is ASCII: some readers take more than \\n for the end of a line."""
    return f"data: {json.dumps(data, allow_nan=False)}\n\n".encode("ascii")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
