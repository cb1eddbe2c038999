"""Rewards of answers that are there already."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stars_kernels.decoder.checks import shown
from stars_kernels.decoder.errors import DecodeError, message_of, with_cause
from stars_kernels.decoder.memory import free_memory, is_out_of_memory
from stars_kernels.decoder.protocols import Room, Rows, Scores, admissions
from stars_kernels.decoder.transfer import to_device
from stars_kernels.hf.cache.hidden import HiddenStates
from stars_kernels.hf.call import Call
from stars_kernels.hf.proposing.proposer import ModelProposer
from stars_kernels.hf.requests import Request
from stars_kernels.hf.scoring.rewarder import Part
from stars_kernels.hf.scoring.workplace import Workplace
from stars_kernels.hf.text.prompts import Codec
from stars_kernels.hf.text.templates import TextPrompt


@dataclass(frozen=True)
class Scored:
    """An answer that is to be scored: its prompt's request, and its tokens."""

    request: Request
    tokens: list[int]


def score_answers(call: Call, prompts: list[Any], answers: Sequence[Any]) -> list[float]:
    """Return the reward of each answer; see `Engine.score`."""
    if isinstance(answers, str) or not isinstance(answers, Sequence):
        raise TypeError(f"answers is of type {type(answers).__name__}, expected a list, one answer per prompt")
    if len(answers) != len(prompts):
        raise ValueError(f"{len(answers)} answers to {len(prompts)} prompts, expected one each")
    requests = call.admit_all(prompts, None)
    scored = [_scored(call, request, answer) for request, answer in zip(requests, answers, strict=True)]
    rewards: list[float] = []
    size = 8 if call.config.batch_size == "auto" else call.config.batch_size
    while len(rewards) < len(scored):
        try:
            rewards += _score_batch(call, scored[len(rewards) : len(rewards) + size])
            continue
        except Exception as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        size //= 2  # out here nothing holds the batch's tensors any more
        call.workspace.clear()
        free_memory()
    return rewards


def _scored(call: Call, request: Request, answer: Any) -> Scored:
    """Check an answer, which all models must be able to read behind its prompt.

    Token ids end at a stop string as in `decode`; a text is read as it is.
    """
    codec, where = call.codec, f"answer {request.index}"
    if isinstance(answer, str):
        codec = Codec(codec.tokenizer, (), codec.eos)
        request = replace(request, text=TextPrompt(request.prompt, codec))
        tokens = _tokenised(codec, answer, where)
    else:
        tokens = [int(token) for token in answer]
    call.models.check_ids(f"{where}: token id", tokens)
    room = call.models.limit - len(request.prompt.ids)
    if len(tokens) > room:
        raise ValueError(
            f"{where} has {len(tokens)} tokens, expected at most {room}: the context limit, less the prompt's tokens"
        )
    return Scored(request, tokens)


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
def _score_batch(call: Call, batch: list[Scored]) -> list[float]:
    rewarder = call.models.rewarder
    parts = [_score_part(call, i, part, batch) for i, part in enumerate(rewarder.parts)]
    weighted = [weight * part for weight, part in zip(rewarder.weights, parts, strict=True)]
    rewards = (weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum(dim=0)).tolist()
    for scored, reward in zip(batch, rewards, strict=True):
        if math.isnan(reward):
            raise _failed(scored, "the reward is nan", "the reward is nan, expected a number")
    return rewards


def _score_part(call: Call, number: int, part: Part, batch: list[Scored]) -> torch.Tensor:
    """Return the rewards [P] float64, on the CPU, of one reward model."""
    device, buffers = call.models.lm.device, call.workspace.buffers
    if part.reads_hidden or part.decoders:  # which write over what earlier calls left
        call.workspace.arenas.forget()
    prompts, longest = [scored.request.prompt.ids for scored in batch], max(1, *(len(s.tokens) for s in batch))
    requests = [scored.request for scored in batch]
    hidden = HiddenStates(call.models.lm, buffers.part("hidden")) if part.reads_hidden else None
    scorer = part.scorer(Workplace(device, hidden, call.mode, buffers.part("rewards").part(number)))
    if hidden is not None:  # the state at an answer's end is that at the end of a prompt which ends in it
        prompts = [prompt + scored.tokens for prompt, scored in zip(prompts, batch, strict=True)]
        reader = ModelProposer(call.models.lm, hidden=hidden, buffers=buffers.part("language model"))
        try:
            reader.reserve(Room(len(prompts), sum(map(len, prompts)), 0, 1))
            reader.admit(admissions(prompts, 0))
            return _checked(scorer.admit(admissions(prompts, 0)), batch)
        finally:
            reader.close()
    try:
        tokens = sum(map(len, prompts)) + longest * len(prompts)
        scorer.reserve(Room(len(prompts), tokens, longest, longest))
        empty = scorer.admit(admissions(prompts, longest, requests))  # of which most were not asked for
        empty.errors = {slot: error for slot, error in empty.errors.items() if not batch[slot].tokens}
        rewards = _checked(empty, batch)
        slots = [slot for slot, scored in enumerate(batch) if scored.tokens]
        if slots:
            answers = [batch[slot].tokens for slot in slots]
            zeros = [0] * len(slots)
            slot, zero, lengths = to_device([slots, zeros, list(map(len, answers))], device)
            padded = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers], device=device)
            scorer.open(Rows(slots, slot, zero, zero, zero), padded, lengths)
            found = scorer.score(range(len(slots)))
            rewards[slots] = _checked(found, [batch[slot] for slot in slots])
        return rewards
    finally:
        scorer.close()


def _checked(scores: Scores, batch: Sequence[Scored]) -> torch.Tensor:
    for row, cause in scores.errors.items():
        why = f"the reward model failed: {type(cause).__name__}: {message_of(cause)}"
        error = _failed(batch[row], "the reward model failed", why)
        with_cause(error, cause)
        raise error
    return scores.rewards.to("cpu", torch.float64)


def _failed(scored: Scored, what: str, why: str) -> DecodeError:
    index, request_id = scored.request.index, scored.request.id
    return DecodeError(f"answer {index}: {why}", what=what, index=index, request_id=request_id)
