"""`stars_kernels.decode` and `stream`: models, prompts and settings in; aligned answers out."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from stars_kernels.decoder.config import StarsConfig, resolve_config
from stars_kernels.decoder.output import StarsEvent, StarsOutput
from stars_kernels.hf.engine import Engine
from stars_kernels.hf.loading.language_model import ModelOrPath
from stars_kernels.hf.requests import Results, carrying, collect
from stars_kernels.hf.scoring.reward_model import Reward
from stars_kernels.hf.text.prompts import split_prompts


def decode(
    model: ModelOrPath,
    rm: Reward,
    prompt: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: StarsConfig | Mapping[str, Any] | None = None,
    request_ids: Sequence[int | str] | int | str | None = None,
    trust_remote_code: bool = False,
    **overrides: Any,
) -> StarsOutput | list[StarsOutput]:
    """Align `model`'s answer to `prompt` with reward model `rm` while it decodes (STARS, arXiv 2511.03827).

    Args:
        model: a causal language model of transformers, a path to one (a folder, or a .gguf file), or its hub name. It
            is decoded in its own dtype, whatever `torch.autocast` says around the call, and on a copy of its modules
            (`hf.view.copying.eval_copy`), so its hooks are called with that copy's.
        rm: a reward model, its folder or hub name, a `RewardModel` that says more of it, or a list of these, whose
            weighted sum is the reward; docs/reward_models.md has the kinds. Or a function rm(prompts, answers) -> one
            float each, called with texts: prompts as given (a chat as its template renders it, special tokens
            included), answers without special tokens, which begin with what the template writes into the assistant's
            turn ("<think>", say). It is called on the empty answer and on unfinished ones, several at a time; where it
            raises, it is called again for each answer alone. An answer for which it fails again has no reward, and if
            that attempt comes to be judged, its prompt fails. It runs with gradients, inference mode and autocast as
            they are at this call.
        prompt: a string (taken as it is), chat messages (the model's template is applied), a flat list of token ids, or
            a list of these. An empty list is a list of no prompts, not a prompt of no tokens: the result is [].
        tokenizer: for a model in memory that gets text, or whose answers should come as text.
        config: a `StarsConfig` or a mapping of its keys; every key is also a keyword here. Without `reward_threshold`
            or `beta`, they are calibrated once per call from plain continuations of the given prompts.
        request_ids: one int or str per prompt, distinct; the random numbers of an answer depend on (seed, request id).
            Default: a hash of the prompt's token ids and how many equal prompts came before it.
        trust_remote_code: passed on when `model` or `rm` is loaded; only tested classes of transformers are decoded,
            so it can matter to a tokenizer alone.

    Returns:
        A `StarsOutput`, or for a list of prompts a list of them ([] for []).

    Raises:
        FileNotFoundError: `model` or `rm` is a local path (it starts with /, ./, ../ or ~, or ends in .gguf) that does
            not exist.
        ValueError, TypeError: the settings, models or (for one prompt) the prompt are not usable.
        RuntimeError: one prompt failed on the way, e.g. its logits or its reward are NaN.
        StarsError: some prompts of a list failed; `.results` holds the others.
        KeyboardInterrupt, and whatever else ends a call early (SystemExit, a warning made an error): `.results` holds
            what was done: finished answers, partial ones ("interrupted"), or None.
    """
    settings = resolve_config(config, overrides)
    prompts, many = split_prompts(prompt)
    if not prompts:
        return []
    results: Results = [None] * len(prompts)
    with carrying(results):
        engine = Engine(model, rm, tokenizer, settings, trust_remote_code)
        for _ in engine.run(prompts, request_ids if many or request_ids is None else [request_ids], results):
            pass
    outputs = collect(results, many)
    return outputs if many else outputs[0]


def stream(
    model: ModelOrPath,
    rm: Reward,
    prompt: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: StarsConfig | Mapping[str, Any] | None = None,
    request_ids: Sequence[int | str] | int | str | None = None,
    trust_remote_code: bool = False,
    **overrides: Any,
) -> Generator[StarsEvent, None, None]:
    """`decode` as it goes: an event for every segment that joins an answer, and for every prompt that is finished.

    The answers are those of `decode`, whose arguments it takes. The prompts of a batch grow in lock-step, and their
    events come interleaved. Work is done only while the next event is waited for; closing the generator ends it.

    Returns:
        A generator of `StarsEvent`. A prompt that fails is an event too (its `output` is the exception), also where it
        is the only one, and the others go on.

    Raises:
        FileNotFoundError, ValueError, TypeError: at the call: the settings, models or request ids are not usable.
        KeyboardInterrupt, and whatever else ends the work early: as from `decode`; at the call, or where the
            next event is waited for.
    """
    settings = resolve_config(config, overrides)
    prompts, many = split_prompts(prompt)
    if not prompts:
        return (event for event in list[StarsEvent]())
    results: Results = [None] * len(prompts)
    with carrying(results):
        engine = Engine(model, rm, tokenizer, settings, trust_remote_code)
        ids = request_ids if many or request_ids is None else [request_ids]
        return engine.run(prompts, ids, results, texts=True)
