"""`stars_kernels.generate`: STARS behind `model.generate(..., custom_generate=stars_kernels.generate)`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer

from stars_kernels.decoder.config import StarsConfig, Trace
from stars_kernels.decoder.output import StarsOutput
from stars_kernels.decoder.rules import Rule
from stars_kernels.hf.engine import Engine
from stars_kernels.hf.loading.language_model import unwrapped
from stars_kernels.hf.loading.reward_model import TokenizerMissing
from stars_kernels.hf.proposing.processors import TokenHooks, lift_criteria, lift_processors
from stars_kernels.hf.requests import Results, carrying, collect, number_requests
from stars_kernels.hf.scoring.reward_model import Reward
from stars_kernels.hf.text.prompts import Prompt
from stars_kernels.versions import CACHE_ARGUMENTS

OF_TRANSFORMERS = frozenset(
    {"max_new_tokens", "max_time", "temperature", "top_k", "top_p", "min_p", "do_sample", "eos_token_id"}
)
"""Settings that `model.generate` reads itself: they come as generation_config, processors and criteria."""
OPTIONS = tuple(field.name for field in fields(StarsConfig) if field.name not in OF_TRANSFORMERS)
"""Settings that are keywords of `generate`."""
PREPARED = frozenset({"attention_mask", "position_ids", *CACHE_ARGUMENTS, "logits_to_keep", "use_cache"})
"""What `model.generate` prepares for the model's forward, and this function reads, checks or has no use for."""


@dataclass
class StarsGenerateOutput(GenerateDecoderOnlyOutput):
    """With return_dict_in_generate=True.

    sequences: [B, T + longest answer] int64, as without. rewards: [B] float64, of the answers. outputs: a `StarsOutput`
    each. (scores, logits, attentions, hidden_states and a cache, which transformers' own has, are None.)
    """

    rewards: Tensor | None = None
    outputs: list[StarsOutput] | None = None


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    reward_model: Reward | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    streamer: BaseStreamer | None = None,
    request_ids: Sequence[int | str] | None = None,
    segment_size: int = 15,
    max_attempts: int = 20,
    alpha: float = 0.5,
    beta: float | None = None,
    reward_threshold: float | None = None,
    accept: Literal["soft", "hard"] = "soft",
    seed: int | None = None,
    width: int | Literal["auto"] = "auto",
    wave: int | Literal["auto"] = "auto",
    batch_size: int | Literal["auto"] = "auto",
    pack: bool | Literal["bfloat16"] = True,
    graphs: bool = True,
    stop_strings: str | Sequence[str] = (),
    calibration_samples: int = 16,
    calibration_quantile: float = 0.9,
    calibration_acceptance: float = 0.25,
    progress: bool = True,
    rule: Rule | None = None,
    trace: Trace = "segments",
    **model_kwargs: Any,
) -> Tensor | StarsGenerateOutput:
    """STARS decoding for `model.generate(**inputs, do_sample=True, custom_generate=stars_kernels.generate, ...)`.

    transformers calls it with what it prepared (the arguments without a default, and model_kwargs) and passes on what
    is named here. It drops `tokenizer` and `streamer` on the way: bind these two with functools.partial.

    Args:
        reward_model: as in `decode`.
        tokenizer: for a reward model or function that reads text, and for stop strings.
        streamer: of transformers, for one sequence; gets the prompt, each segment as it is committed, and the end.
        request_ids: as in `decode`, one for each prompt; the k-th of several return sequences of prompt `id` is the
            request str((id, k)), the 0-th is `id` itself.
        segment_size and all that follow: see `StarsConfig`.

    Returns:
        [B, T + longest answer] int64 on the device of input_ids: the input, left padding included, then the answers,
        padded on the right with pad_token_id (or the first eos_token_id); a `StarsGenerateOutput` with
        return_dict_in_generate.

    Raises:
        ValueError, TypeError: the arguments are not usable, e.g. do_sample is False, or there are beams.
        RuntimeError, StarsError: as in `decode`.
    """
    given = locals()
    options = {name: given[name] for name in OPTIONS}
    try:
        if reward_model is None:
            raise ValueError("reward_model is missing: pass reward_model= to generate()")
        check_mode(model, generation_config)
        prompts = unpadded(input_ids, model_kwargs)
        if streamer is not None and len(prompts) != 1:
            raise ValueError(f"a streamer for {len(prompts)} sequences, expected one; use stars_kernels.stream")
        pad = pad_token(generation_config, len(prompts))
        processors, sampling = lift_processors(logits_processor)
        stops = lift_criteria(stopping_criteria)
        strings = [*([stop_strings] if isinstance(stop_strings, str) else stop_strings), *stops.strings]
        if strings and tokenizer is None:
            raise ValueError(unbound("stop strings need a tokenizer"))
        config = StarsConfig(
            **{**options, **sampling, "stop_strings": tuple(strings)},
            max_new_tokens=stops.max_length - input_ids.shape[1],
            eos_token_id=tuple(stops.eos),
        )
        hooks = TokenHooks(processors, stops.rest, input_ids)
        results: Results = [None] * len(prompts)
        with carrying(results):
            try:
                engine = Engine(model, reward_model, tokenizer=tokenizer, config=config, prefix_cache=0)
            except TokenizerMissing as error:
                raise ValueError(unbound(error.why)) from error
            ids = sequence_ids(prompts, request_ids, generation_config.num_return_sequences or 1)
            if not math.isinf(stops.deadline):  # of a clock that ran while the models were packed
                config = config.replace(max_time=max(stops.deadline - time.time(), 1e-9))
            with engine, closing(engine.events(prompts, ids, results, config, hooks=hooks)) as events:
                if streamer is not None:
                    streamer.put(input_ids.cpu())
                for event in events:
                    if streamer is not None and event.token_ids:
                        streamer.put(torch.tensor(event.token_ids))
        outputs = collect(results, many=len(prompts) > 1)
    finally:  # also after an error: somebody may be waiting for the stream's end
        if streamer is not None:
            streamer.end()
    answers = [input_ids.new_tensor(output.token_ids) for output in outputs]
    sequences: Any = torch.cat([input_ids, pad_sequence(answers, batch_first=True, padding_value=pad)], dim=1)
    if not generation_config.return_dict_in_generate:
        return sequences
    rewards = torch.tensor([output.reward for output in outputs], dtype=torch.float64)
    return StarsGenerateOutput(sequences=sequences, rewards=rewards, outputs=outputs)


def check_mode(model: PreTrainedModel, config: GenerationConfig) -> None:
    """Refuse by name what is another way of decoding, or what STARS decoding does not give."""
    owner = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    unwrapped(owner, "model")  # refuses prompt tuning, of which the model alone knows nothing else
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder, expected a decoder-only model")
    mode = config.get_generation_mode()
    if mode != GenerationMode.SAMPLE:
        raise ValueError(
            f"the settings ask for {mode.value}, expected sampling: do_sample=True, num_beams=1, no constraints, "
            "assistant, prompt lookup, contrastive search or DoLa"
        )
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ValueError(f"{name} is True, which STARS decoding has none of, expected False")
    misplaced = [name for name in OPTIONS if name != "stop_strings" and hasattr(config, name)]
    if misplaced:
        raise ValueError(f"generation_config holds {misplaced[0]}: pass it to generate(), where STARS settings go")


def unpadded(input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> list[list[int]]:
    """The prompts' token ids without their left padding, as the attention mask has it; all else is refused by name."""
    for name, value in model_kwargs.items():
        if name in OF_TRANSFORMERS:
            raise ValueError(f"{name} is bound to the callable, expected as an argument of generate()")
        if name not in PREPARED and value is not None:
            raise ValueError(f"{name} is an input that STARS decoding does not take, expected token ids alone")
    for name in CACHE_ARGUMENTS:
        cache = model_kwargs.get(name)
        if cache is not None and (held := cache.get_seq_length()) > 0:
            raise ValueError(f"{name} holds {held} tokens, expected none: STARS decoding has its own cache")
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.long()
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, expected {list(input_ids.shape)}")
    if (mask.diff(dim=1) < 0).any():
        raise ValueError(
            "attention_mask masks tokens behind a prompt's first (right padding, or gaps), expected left padding: "
            "tokenizer.padding_side = 'left'"
        )
    positions = model_kwargs.get("position_ids")
    if positions is not None and (positions != (mask.cumsum(dim=1) - 1).clamp(min=0)).any():
        raise ValueError("position_ids are not those of the prompts' tokens counted from 0, which are the ones used")
    return [ids[kept].tolist() for ids, kept in zip(input_ids, mask.bool(), strict=True)]


def unbound(why: str) -> str:
    """The message where a tokenizer is needed, with how to pass one through model.generate."""
    return (
        f"{why}, and generate() passes none on: bind it, as in "
        "custom_generate=functools.partial(stars_kernels.generate, tokenizer=tokenizer)"
    )


def pad_token(config: GenerationConfig, count: int) -> int:
    """What fills the shorter answers of `count`: pad_token_id, or the first EOS."""
    pad = config._pad_token_tensor
    if pad is None and count > 1:
        raise ValueError(
            "pad_token_id and eos_token_id are None, so nothing can fill shorter answers: pass pad_token_id="
        )
    return 0 if pad is None else int(pad)


def sequence_ids(
    prompts: Sequence[list[int]], request_ids: Sequence[int | str] | None, returned: int
) -> list[int | str]:
    """The request id of each sequence: `returned` in a row belong to a prompt."""
    first = prompts[::returned]
    ids = number_requests(request_ids, len(first), {i: Prompt(p) for i, p in enumerate(first)})
    return [ids[i] if k == 0 else str((ids[i], k)) for i in range(len(first)) for k in range(returned)]
