"""Rewards of answers that are there already."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from stars_kernels.decoder.checks import shown
from stars_kernels.decoder.errors import DecodeError, message_of, with_cause
from stars_kernels.decoder.memory import free_memory, is_out_of_memory
from stars_kernels.decoder.protocols import Rows, Scores
from stars_kernels.decoder.transfer import to_device
from stars_kernels.hf.cache.hidden import HiddenStates
from stars_kernels.hf.call import Call
from stars_kernels.hf.proposing.proposer import ModelProposer
from stars_kernels.hf.requests import Request
from stars_kernels.hf.scoring.batch import Batch
from stars_kernels.hf.scoring.rewarder import Part
from stars_kernels.hf.text.prompts import Codec
from stars_kernels.hf.text.templates import TextPrompt


def score_answers(call: Call, prompts: list[Any], answers: Sequence[Any]) -> list[float]:
    """Return the reward of each answer; see `Engine.score`."""
    if isinstance(answers, str) or not isinstance(answers, Sequence):
        raise TypeError(f"answers is of type {type(answers).__name__}, expected a list, one answer per prompt")
    if len(answers) != len(prompts):
        raise ValueError(f"{len(answers)} answers to {len(prompts)} prompts, expected one each")
    requests = call.admit_all(prompts, None)
    tokens = [_tokens(call, request, answer) for request, answer in zip(requests, answers, strict=True)]
    rewards: list[float] = []
    size = 8 if call.config.batch_size == "auto" else call.config.batch_size
    while len(rewards) < len(requests):
        some = slice(len(rewards), len(rewards) + size)
        try:
            rewards += _score_batch(call, requests[some], tokens[some])
            continue
        except Exception as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        size //= 2  # out here nothing holds the batch's tensors any more
        call.workspace.clear()
        free_memory()
    return rewards


def _tokens(call: Call, request: Request, answer: Any) -> list[int]:
    """The tokens of an answer, which are as many as all models can read behind its prompt."""
    codec, where = call.codec, f"answer {request.index}"
    tokens = _tokenised(codec, answer, where) if isinstance(answer, str) else [int(token) for token in answer]
    call.models.check_ids(f"{where}: token id", tokens)
    room = call.models.limit - len(request.prompt.ids)
    if len(tokens) > room:
        raise ValueError(
            f"{where} has {len(tokens)} tokens, expected at most {room}: the context limit, less the prompt's tokens"
        )
    return tokens


def _tokenised(codec: Codec, answer: str, where: str) -> list[int]:
    if codec.tokenizer is None:
        raise ValueError(f"{where} is text, and a model in memory has no tokenizer: pass tokenizer=, or token ids")
    tokens = list(codec.tokenizer(answer, add_special_tokens=False)["input_ids"])
    if (found := codec.decode(tokens)) != answer:
        raise ValueError(
            f"{where} is {shown(answer)}, but its tokens mean {shown(found)}; expected a text that they keep, or token "
            "ids"
        )
    return tokens


@torch.inference_mode()
def _score_batch(call: Call, requests: list[Request], tokens: list[list[int]]) -> list[float]:
    rewarder = call.models.rewarder
    parts = [_score_part(call, i, part, requests, tokens) for i, part in enumerate(rewarder.parts)]
    weighted = [weight * part for weight, part in zip(rewarder.weights, parts, strict=True)]
    rewards = (weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum(dim=0)).tolist()
    for request, reward in zip(requests, rewards, strict=True):
        if math.isnan(reward):
            raise DecodeError(
                f"answer {request.index}: the reward is nan, expected a number", what="the reward is nan",
                index=request.index, request_id=request.id,
            )  # fmt: skip
    return rewards


def _score_part(call: Call, number: int, part: Part, requests: list[Request], tokens: list[list[int]]) -> torch.Tensor:
    """Rewards [P] float64 on the CPU by one reward model."""
    device, buffers = call.models.lm.device, call.workspace.buffers
    prompts, longest = [request.prompt.ids for request in requests], max(1, *map(len, tokens))
    texts = [TextPrompt(request.prompt, call.codec) for request in requests]
    hidden = HiddenStates(call.models.lm, buffers.part("hidden")) if part.reads_hidden else None
    scorer = part.scorer(Batch(texts, device, hidden, call.mode, buffers.part("rewards").part(number)))
    if hidden is not None:  # the state at an answer's end is that at the end of a prompt which ends in it
        prompts = [prompt + answer for prompt, answer in zip(prompts, tokens, strict=True)]
        reader = ModelProposer(call.models.lm, hidden=hidden, buffers=buffers.part("language model"))
        try:
            reader.begin(prompts, 0, 1)
            return _checked(scorer.begin(prompts, 0, 1), requests, range(len(requests)))
        finally:
            reader.close()
    try:
        rewards = _checked(scorer.begin(prompts, longest, longest), requests, range(len(requests)))
        slots = [slot for slot, answer in enumerate(tokens) if answer]
        if slots:
            padded = [tokens[slot] + [0] * (longest - len(tokens[slot])) for slot in slots]
            zeros = [0] * len(slots)
            slot, zero = to_device([slots, zeros], device)
            rows = Rows(slots, slot, zero, zero, zero)
            lengths = torch.tensor([len(tokens[slot]) for slot in slots], device=device)
            found = scorer.score(rows, torch.tensor(padded, device=device), lengths)
            rewards[slots] = _checked(found, requests, slots)
        return rewards
    finally:
        scorer.close()


def _checked(scores: Scores, requests: list[Request], slots: Sequence[int]) -> torch.Tensor:
    for row, cause in scores.errors.items():
        request = requests[slots[row]]
        error = DecodeError(
            f"answer {request.index}: the reward model failed: {type(cause).__name__}: {message_of(cause)}",
            what="the reward model failed", index=request.index, request_id=request.id,
        )  # fmt: skip
        with_cause(error, cause)
        raise error
    return scores.rewards.to("cpu", torch.float64)
