"""The loop of the published scripts: `generate` a segment, score the whole text, repeat if it is rejected."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from stars_kernels import StarsConfig
from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.rules import Candidate, Rule
from stars_kernels.hf.loading.language_model import eos_ids
from stars_kernels.ops import segment_sample
from stars_kernels.ops.philox import accept_uniforms


@torch.inference_mode()
def naive_decode(
    model: PreTrainedModel,
    rm: PreTrainedModel | Callable[[Tensor], float],
    prompt_ids: Sequence[int],
    config: StarsConfig,
    key: int,
    seeded: bool = True,
) -> Answer:
    """Decode one prompt, one attempt at a time, with nothing kept between attempts.

    Args:
        rm: a sequence classifier on the same token ids, its first output is the reward; or a function of them, [1, N].
        config: with all that its rule needs (reward_threshold and beta); without stop strings. Its width has no use.
        key: the request's Philox key, `request_key(seed, request id)`.
        seeded: draw the tokens that the engine draws; else as transformers does, by torch's own random numbers.
    """
    if config.stop_strings:
        raise ValueError("the naive loop knows no stop strings")
    rule, eos = config.resolved_rule, eos_ids(model) if config.eos_token_id is None else config.eos_token_id
    answer = Answer(key, prompt_ids, config.max_new_tokens)
    if (plan := rule.plan(answer)).draw != "sample" or plan.entropy is not None or plan.race:
        raise ValueError(f"the naive loop knows no {type(rule).__name__}, expected a rule that samples whole segments")

    def text() -> Tensor:  # [1, N]
        return torch.tensor([[*prompt_ids, *answer.tokens]], device=model.device)

    def reward(ids: Tensor) -> float:
        return float(rm(input_ids=ids, use_cache=False).logits[0, 0]) if isinstance(rm, nn.Module) else rm(ids)

    answer.reward = answer.prompt_reward = reward(text())
    while answer.active:
        ids = text()
        how = generate_options(config)
        if seeded:
            drawn = _Drawn(config, key, len(answer.candidates), len(prompt_ids))
            how = {"do_sample": True, "top_k": 0, "logits_processor": LogitsProcessorList([drawn])}
        longer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=answer.size(rule.plan(answer)),
            eos_token_id=list(eos) or None,
            **how,
        )
        tokens = longer[0, ids.shape[1] :].tolist()
        (uniform,) = accept_uniforms([key], [len(answer.tokens)], [len(answer.candidates)])
        judge_attempt(answer, rule, Candidate(tokens, reward(longer), uniform), eos)
    return answer


def judge_attempt(answer: Answer, rule: Rule, candidate: Candidate, eos: Collection[int] = ()) -> bool:
    """Let the rule judge the next attempt at the answer's segment; say whether that one is taken, or the best so far.

    An attempt that is taken joins the answer.
    """
    attempt = len(answer.candidates)
    verdict = rule.judge(answer, [*answer.candidates, candidate])
    answer.add([candidate], [verdict], width=1)
    if verdict.outcome is not None:
        answer.take(verdict, eos)
    return verdict.chosen == attempt


def generate_options(config: StarsConfig) -> dict[str, Any]:
    """Return the config's draw as keywords of `model.generate`."""
    return {
        "do_sample": True,
        "temperature": config.temperature,
        "top_k": config.top_k or 0,
        "top_p": 1.0 if config.top_p is None else config.top_p,
        "min_p": config.min_p or None,  # 0.0 would cost transformers a pass over the vocabulary
    }


class _Drawn(LogitsProcessor):
    """Leaves one token to choose from: the one that the engine draws for this attempt at this position."""

    def __init__(self, config: StarsConfig, key: int, attempt: int, prompt_length: int) -> None:
        self.sampling, self.key, self.attempt, self.prompt_length = config.sampling, key, attempt, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_length
        numbers = (torch.tensor([n], device=scores.device) for n in (self.key, self.attempt, position))
        token, _ = segment_sample(scores, *numbers, **self.sampling)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)
