"""Aligned answers in Inspect's evaluations: `inspect eval task.py --model stars/MODEL -M reward_model=RM`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from stars_kernels.decoder.calibration import is_calibrated
from stars_kernels.decoder.naming import SETTINGS, near, rule_of
from stars_kernels.decoder.output import Calibration, StarsOutput
from stars_kernels.hf.by_name import engine_by_name

try:
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessage,
        ChatMessageAssistant,
        ContentReasoning,
        ContentText,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        StopReason,
        modelapi,
    )
    from inspect_ai.solver._task_state import sample_state  # it has no public way to the epoch
    from inspect_ai.tool import ToolChoice, ToolInfo
except ImportError:
    raise ImportError("Inspect is missing: pip install 'stars-kernels[eval]'") from None

OF_CALLS = {
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
    "stop_seqs": "stop_strings",
}
"""Of Inspect's settings of a call, those that are settings here, and their names."""
REFUSED = (
    "best_of",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "num_choices",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "response_schema",
)
"""Of Inspect's settings of a call, those that would change an answer or ask for more of it, and are not there."""
STOP_REASONS: dict[str, StopReason] = {
    "eos": "stop",
    "stop": "stop",
    "length": "max_tokens",
    "context": "model_length",
}
"""What Inspect calls the ends of an answer; it knows no others."""
CONNECTIONS = {"cpu": 32, "cuda": 256}
"""Samples that ask at once, at most: some more than have slots, so that none stays empty."""


@modelapi(name="stars")
def stars() -> type[ModelAPI]:
    """Give Inspect the provider of the models `stars/MODEL`."""
    return StarsAPI


class StarsAPI(ModelAPI):
    """An engine as a model of Inspect: samples that ask at once share its slots.

    Of an answer, `metadata` has the reward, that of the empty answer, the seed, why it ended, and counts of the work.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  (Inspect's own default)
        **model_args: Any,
    ) -> None:
        """Load the models.

        Args:
            model_name: what follows `stars/`: hub name, folder, or .gguf file.
            model_args: each `-M NAME=VALUE`: reward_model, which must be there; device, dtype; calibration, a file of
                r* and beta; rule, a name as on the command line, and its settings; any setting of `StarsConfig`.

        Raises:
            ValueError: an argument is unknown or missing, or r* or beta is open: each sample would find its own.
        """
        super().__init__(model_name, base_url, api_key, [], config)
        names = {name: model_args.pop(name, None) for name in ("reward_model", "device", "dtype")}
        saved, rule = model_args.pop("calibration", None), model_args.pop("rule", None)
        if names["reward_model"] is None:
            raise ValueError(
                "reward_model is missing, expected -M reward_model=NAME: hub name, folder, module:function"
            )
        settings = _settings_of(rule, model_args)
        calibration = None if saved is None else Calibration.load(saved)
        self.engine = engine_by_name(model_name, **names, **settings)
        if calibration is None and not is_calibrated(self.engine.config):
            self.engine.close()
            raise ValueError(
                "reward_threshold or beta is missing, expected -M reward_threshold=R -M beta=B, or -M calibration=FILE"
            )
        self.engine.config = (
            self.engine.config if calibration is None else self.engine.with_calibration(self.engine.config, calibration)
        )
        self._asked = Counter[tuple[str, str]]()

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer a chat. Raises ValueError for tools, what is no text, and settings that are not there."""
        if tools:
            raise ValueError(f"the tool {tools[0].name!r} is given, expected none: answers are text alone")
        messages = [_message_of(message) for message in input]
        output = await self.engine.adecode(messages, request_id=self._id_of(messages), config=_settings_of_call(config))
        return _output_of(self.model_name, output)

    def _id_of(self, messages: list[dict[str, str]]) -> str:
        """Name a request by its sample, epoch and chat, and how many equal ones this sample had asked before.

        So the epochs of a sample differ, and a sample that is tried again later gets the answer that it would have got.
        """
        state = sample_state()
        run, sample, epoch = ("", "", 0) if state is None else (state.uuid, state.sample_id, state.epoch)
        chat = hashlib.blake2b(json.dumps(messages).encode(), digest_size=8).hexdigest()
        self._asked[run, chat] += 1
        return f"{sample}/{epoch}/{chat}/{self._asked[run, chat] - 1}"

    def max_connections(self) -> int:
        """Return how many samples may ask at once, where no --max-connections says so."""
        return CONNECTIONS[self.engine.models.lm.device.type]

    def collapse_user_messages(self) -> bool:
        """Say that messages of the user in a row become one, as most chat templates want."""
        return True

    def close(self) -> None:
        """Let go of the models."""
        self.engine.close()


def _settings_of(rule: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return an engine's settings; what is neither of `StarsConfig` nor of the rule is refused."""
    settings = dict(given)
    made = rule_of(rule, settings)
    for name in settings:
        if name not in SETTINGS:
            known = near(name, SETTINGS) or ", expected reward_model, device, dtype, calibration, rule or a setting"
            raise ValueError(f"unknown argument {name!r}{known}")
    return settings if made is None else {**settings, "rule": made}


def _settings_of_call(config: GenerateConfig) -> dict[str, Any]:
    """Return the settings of a call that Inspect's config names."""
    for name in REFUSED:
        value = getattr(config, name)
        if value not in (None, False) and not (name == "num_choices" and value == 1):
            raise ValueError(f"{name} is {value!r}, expected none: it is no setting of this decoding")
    found = {name: getattr(config, theirs) for theirs, name in OF_CALLS.items()}
    return {name: value for name, value in found.items() if value is not None}


def _message_of(message: ChatMessage) -> dict[str, str]:
    """Return a message as chat templates take it: its text; earlier reasoning is left out, as most of them do."""
    if message.role == "tool":
        raise ValueError("a message is of the role 'tool', expected system, user or assistant")
    parts: Iterable[Any] = [] if isinstance(message.content, str) else message.content
    for part in parts:
        if not isinstance(part, ContentText | ContentReasoning):
            raise ValueError(f"a message holds {part.type}, expected text alone")
    return {"role": message.role, "content": message.text}


def _output_of(model: str, output: StarsOutput) -> ModelOutput:
    message = ChatMessageAssistant(content=output.text or "", model=model, source="generate")
    reason = STOP_REASONS.get(output.finish_reason, "unknown")
    told = output.to_dict()
    names = ("reward", "prompt_reward", "finish_reason", "counts")
    read, written = output.counts.prompt, len(output.token_ids)
    return ModelOutput(
        model=model,
        choices=[ChatCompletionChoice(message=message, stop_reason=reason)],
        usage=ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written),
        metadata={name: told[name] for name in names} | {"seed": output.config.seed},
    )
