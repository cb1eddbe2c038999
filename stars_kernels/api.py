"""`stars_kernels.decode`, `stream` and `calibrate`: an engine for one call."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, Literal, Unpack, overload

from transformers import PreTrainedTokenizerBase

from stars_kernels.decoder.config import Settings, StarsConfig, resolve_config
from stars_kernels.decoder.output import Calibration, StarsEvent, StarsOutput
from stars_kernels.hf.engine import Config, Engine, Errors
from stars_kernels.hf.loading.language_model import ModelOrPath
from stars_kernels.hf.requests import carrying
from stars_kernels.hf.scoring.reward_model import Reward
from stars_kernels.hf.stream import Stream
from stars_kernels.hf.text.prompts import OnePrompt, SeveralPrompts, split_prompts


@overload
def decode(
    model: ModelOrPath,
    reward_model: Reward,
    prompt: OnePrompt,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: Config = None,
    request_ids: int | str | None = None,
    calibration: Calibration | None = None,
    cancel: threading.Event | None = None,
    errors: Literal["raise"] = "raise",
    trust_remote_code: bool = False,
    **settings: Unpack[Settings],
) -> StarsOutput: ...


@overload
def decode(
    model: ModelOrPath,
    reward_model: Reward,
    prompt: OnePrompt,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: Config = None,
    request_ids: int | str | None = None,
    calibration: Calibration | None = None,
    cancel: threading.Event | None = None,
    errors: Literal["return"],
    trust_remote_code: bool = False,
    **settings: Unpack[Settings],
) -> StarsOutput | Exception: ...


@overload
def decode(
    model: ModelOrPath,
    reward_model: Reward,
    prompt: SeveralPrompts,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: Config = None,
    request_ids: Sequence[int | str] | None = None,
    calibration: Calibration | None = None,
    cancel: threading.Event | None = None,
    errors: Literal["raise"] = "raise",
    trust_remote_code: bool = False,
    **settings: Unpack[Settings],
) -> list[StarsOutput]: ...


@overload
def decode(
    model: ModelOrPath,
    reward_model: Reward,
    prompt: SeveralPrompts,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: Config = None,
    request_ids: Sequence[int | str] | None = None,
    calibration: Calibration | None = None,
    cancel: threading.Event | None = None,
    errors: Literal["return"],
    trust_remote_code: bool = False,
    **settings: Unpack[Settings],
) -> list[StarsOutput | Exception]: ...


def decode(
    model: ModelOrPath,
    reward_model: Reward,
    prompt: OnePrompt | SeveralPrompts,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: Config = None,
    request_ids: Sequence[int | str] | int | str | None = None,
    calibration: Calibration | None = None,
    cancel: threading.Event | None = None,
    errors: Errors = "raise",
    trust_remote_code: bool = False,
    **settings: Unpack[Settings],
) -> StarsOutput | Exception | list[StarsOutput] | list[StarsOutput | Exception]:
    """Align `model`'s answer to `prompt` with a reward model while it decodes (STARS, arXiv 2511.03827).

    It makes an `Engine` for this call; for many calls, make one of your own: its second call loads and packs nothing.

    Args:
        model: a causal language model of transformers, a path to one (a folder, or a .gguf file), or its hub name. It
            is decoded in its own dtype, whatever `torch.autocast` says around the call, and on a copy of its modules
            (`hf.view.copying.eval_copy`), so its hooks are called with that copy's.
        reward_model: a reward model, its folder or hub name, a `RewardModel` that says more of it, or a list of these,
            whose weighted sum is the reward; docs/reward_models.md has the kinds. Or a function
            reward_model(prompts, answers) -> one float each, called with texts: prompts as given (a chat as its
            template renders it, special tokens included), answers without special tokens, which begin with what the
            template writes into the assistant's turn ("<think>", say). It is called on the empty answer and on
            unfinished ones, several at a time; where it raises, it is called again for each answer alone. An answer for
            which it fails again has no reward, and if that attempt comes to be judged, its prompt fails. It runs with
            gradients, inference mode and autocast as they are at this call.
        prompt: a string (taken as it is), chat messages (the model's template is applied), a flat list of token ids, or
            a list of these. An empty list is a list of no prompts, not a prompt of no tokens: the result is [].
        tokenizer: for a model in memory that gets text, or whose answers should come as text.
        config: a `StarsConfig` or a mapping of its keys; every key is also a keyword here (`settings`).
        request_ids: one int or str per prompt, distinct; the random numbers of an answer depend on (seed, request id).
            Default: a hash of the prompt's token ids and how many equal prompts came before it.
        calibration: gives `reward_threshold` and `beta` where the settings do not. Without it, they are calibrated once
            per call from plain continuations of the given prompts.
        cancel: an event; once it is set, by any thread, all answers end as they are, with the reason "cancelled". As
            with `max_time`, it is looked at before each token is drawn or, on a GPU, enqueued.
        errors: "raise", or "return": a prompt that fails has the exception that ended it in place of its output.
        trust_remote_code: passed on when a model is loaded; only tested classes of transformers are decoded, so it can
            matter to a tokenizer alone.

    Returns:
        A `StarsOutput`, or for a list of prompts a list of them ([] for []).

    Raises:
        FileNotFoundError: a model is a local path (it starts with /, ./, ../ or ~, or ends in .gguf) that does not
            exist.
        ValueError, TypeError: the settings, models, calibration or (for one prompt) the prompt are not usable.
        DecodeError: one prompt failed on the way, e.g. its logits or its reward are NaN.
        StarsError: some prompts of a list failed; `.results` holds the others.
        KeyboardInterrupt, and whatever else ends a call early (SystemExit, a warning made an error): `.results` holds
            what was done: finished answers, partial ones ("interrupted"), or None.
    """
    engine = _engine_for(prompt, model, reward_model, tokenizer, trust_remote_code, resolve_config(config, settings))
    if engine is None:
        return []
    ids: Any = request_ids
    given: Any = prompt
    with engine:
        return engine.decode(given, request_ids=ids, calibration=calibration, cancel=cancel, errors=errors)


def stream(
    model: ModelOrPath,
    reward_model: Reward,
    prompt: OnePrompt | SeveralPrompts,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: Config = None,
    request_ids: Sequence[int | str] | int | str | None = None,
    calibration: Calibration | None = None,
    cancel: threading.Event | None = None,
    trust_remote_code: bool = False,
    **settings: Unpack[Settings],
) -> Stream:
    """Decode as it goes: an event for every segment that joins an answer, and for every prompt that is finished.

    The answers are those of `decode`, whose arguments it takes. The prompts that have a slot grow side by side, and
    their events come interleaved: of each round in the order of the prompts. Work is done only while the next event is
    waited for; closing the stream ends it, also from another thread.

    Returns:
        A generator of `StarsEvent`. A prompt that fails is an event too (its `output` is the exception), also where it
        is the only one, and the others go on.

    Raises:
        FileNotFoundError, ValueError, TypeError: at the call: the settings, models or request ids are not usable.
        KeyboardInterrupt, and whatever else ends the work early: as from `decode`; at the call, or where the
            next event is waited for.
    """
    engine = _engine_for(prompt, model, reward_model, tokenizer, trust_remote_code, resolve_config(config, settings))
    if engine is None:
        return Stream((event for event in list[StarsEvent]()), threading.Event())
    events = engine.stream(prompt, request_ids=request_ids, calibration=calibration, cancel=cancel)

    def until_closed() -> Generator[StarsEvent, None, None]:
        with engine, closing(events):
            yield from events

    return Stream(until_closed(), events.closing)


def calibrate(
    model: ModelOrPath,
    reward_model: Reward,
    prompts: OnePrompt | SeveralPrompts,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: Config = None,
    trust_remote_code: bool = False,
    **settings: Unpack[Settings],
) -> Calibration:
    """Find r* and beta from the rewards of plain continuations of prompts like those that are to be decoded.

    About `calibration_samples` continuations are sampled in all, as many of each prompt and at least one. r* is the
    `calibration_quantile` of their rewards, and beta such that the share `calibration_acceptance` of them would be
    accepted at r*. More samples make both steadier.

    Returns:
        A `Calibration`: `save` it, and pass it to any call with the same models.

    Raises:
        ValueError, TypeError: the settings, the models or a prompt are not usable.
        DecodeError: no continuation has a finite reward.
        TimeoutError: it took longer than `max_time`.
    """
    engine = _engine_for_one_call(model, reward_model, tokenizer, trust_remote_code, resolve_config(config, settings))
    with engine:
        return engine.calibrate(prompts)


def _engine_for(
    prompt: OnePrompt | SeveralPrompts,
    model: ModelOrPath,
    reward_model: Reward,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
    config: StarsConfig,
) -> Engine | None:
    """Make the engine of one call; None for an empty list of prompts. What ends it early carries `.results`, too."""
    prompts, _ = split_prompts(prompt)
    if not prompts:
        return None
    with carrying([None] * len(prompts)):
        return _engine_for_one_call(model, reward_model, tokenizer, trust_remote_code, config)


def _engine_for_one_call(
    model: ModelOrPath,
    reward_model: Reward,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
    config: StarsConfig,
) -> Engine:
    return Engine(
        model, reward_model, tokenizer=tokenizer, config=config, trust_remote_code=trust_remote_code, prefix_cache=0
    )
