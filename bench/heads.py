"""Real rewards without a second language model: a head on the model's own hidden states, and a small encoder's."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerBase

from bench import models
from bench.report import CheckError, Row
from demo.naive import generate_options, naive_decode
from stars_kernels import RewardModel, StarsConfig, StarsOutput, decode
from stars_kernels.ops.philox import request_key

PlainReward = Callable[[Tensor], float]
"""Token ids [1, N] of prompt and answer -> the reward, by the models' own forwards."""
CHECK = StarsConfig(
    segment_size=5, max_new_tokens=10, max_attempts=4, reward_threshold=0.5, beta=0.2, seed=0, progress=False
)
PROMPTS, QUICK_PROMPTS = 4, 2
TOKENS, QUICK_TOKENS = 120, 60


@dataclass
class Setup:
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase | None
    prompts: list[list[int]]
    rewards: dict[str, tuple[RewardModel, Callable[[int], PlainReward]]]
    """By name: the reward model, and from a prompt's length the same reward by hand."""


def load(name: str, prompts: int, dtype: torch.dtype = torch.float32) -> Setup:
    """Load `smol`, the demo's models and unseen prompts, or `tiny`, a random model and head without text to read."""
    if name == "tiny":
        loaded = models.load("tiny", prompts, dtype)
        torch.manual_seed(0)
        head = nn.Linear(loaded.model.config.hidden_size, 1, dtype=dtype).eval()
        return Setup(loaded.model, None, loaded.prompts, {"own head": _own(loaded.model, head)})
    from demo.models import load_encoder_reward_model, load_language_model, load_own_head  # what `tiny` does not need
    from demo.prompts import UNSEEN_PROMPTS, messages

    model, tokenizer = load_language_model(dtype)
    encoder, encoder_tokenizer = load_encoder_reward_model()
    ids = [
        tokenizer.apply_chat_template(messages(prompt), add_generation_prompt=True)["input_ids"]
        for prompt in UNSEEN_PROMPTS[:prompts]
    ]
    rewards = {
        "own head": _own(model, load_own_head().to(dtype)),
        "encoder": _encoder(encoder.to(dtype), encoder_tokenizer, tokenizer),
    }
    return Setup(model, tokenizer, ids, rewards)


def _own(model: LlamaForCausalLM, head: nn.Linear) -> tuple[RewardModel, Callable[[int], PlainReward]]:
    def reward(ids: Tensor) -> float:
        return float(head(model.model(ids, use_cache=False).last_hidden_state[0, -1]))

    return RewardModel(head), lambda prompt_length: reward


def _encoder(
    model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerBase, lm_tokenizer: PreTrainedTokenizerBase
) -> tuple[RewardModel, Callable[[int], PlainReward]]:
    from demo.models import ENCODER_TEMPLATE

    def of_prompt(prompt_length: int) -> PlainReward:
        def reward(ids: Tensor) -> float:
            answer = lm_tokenizer.decode(ids[0, prompt_length:], skip_special_tokens=True).rstrip("\ufffd")
            inputs = tokenizer(ENCODER_TEMPLATE.format(answer=answer), return_tensors="pt")
            return float(model(**inputs).logits)

        return reward

    return RewardModel(model, tokenizer, template=ENCODER_TEMPLATE), of_prompt


def answer(setup: Setup, rm: RewardModel, prompt: int, config: StarsConfig) -> StarsOutput:
    """Ours, on one prompt alone."""
    output = decode(
        setup.model, rm, setup.prompts[prompt], tokenizer=setup.tokenizer, config=config, request_ids=prompt
    )
    assert isinstance(output, StarsOutput)
    return output


def check_exact(model_name: str) -> None:
    """Check in float64, on the models to be timed, that the naive loop gives the same answers by rewards of its own."""
    setup = load(model_name, 1, torch.float64)
    assert CHECK.seed is not None
    for name, (rm, of_prompt) in setup.rewards.items():
        for p, prompt in enumerate(setup.prompts):
            output = answer(setup, rm, p, CHECK)
            with torch.inference_mode():
                reward = of_prompt(len(prompt))
                expected = naive_decode(setup.model, reward, prompt, CHECK, request_key(CHECK.seed, p))
            attempts, theirs = ([segment.attempts for segment in given.segments] for given in (output, expected))
            if (output.token_ids, attempts) != (expected.tokens, theirs):
                raise CheckError(f"{name} and the naive loop differ in float64 at prompt {p}:\n{output}\n{expected}")
            if abs(output.reward - expected.reward) > 1e-5:
                raise CheckError(f"{name}: reward {output.reward} in float64, by hand {expected.reward}")


def plain(setup: Setup, config: StarsConfig) -> Iterator[int]:
    """Decode by `generate` alone, one prompt at a time; yields how many tokens each answer has."""
    for prompt in setup.prompts:
        ids = torch.tensor([prompt])
        options: dict[str, Any] = generate_options(config)
        with torch.inference_mode():
            output = setup.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=config.max_new_tokens, **options
            )
        yield output.shape[1] - len(prompt)


def seconds_a_token(name: str, tokens: Callable[[], int]) -> float:
    began = time.perf_counter()
    count = tokens()
    seconds = time.perf_counter() - began
    print(f"  {name}: {count} tokens in {seconds:.2f} s", flush=True)
    return seconds / count


def run(args: argparse.Namespace) -> list[Row]:
    """Answers end where the model ends them, so what is compared is the seconds of a token."""
    setup = load(args.model, QUICK_PROMPTS if args.quick else PROMPTS)
    found = []
    for name, (rm, _) in setup.rewards.items():
        print(f"time, {name} ...", flush=True)
        config = StarsConfig(max_new_tokens=QUICK_TOKENS if args.quick else TOKENS, seed=0, progress=False)
        calibrated = decode(setup.model, rm, setup.prompts, tokenizer=setup.tokenizer, config=config)  # warms up
        config = calibrated[0].config
        attempts: list[int] = []

        def ours(rm: RewardModel = rm, config: StarsConfig = config, attempts: list[int] = attempts) -> int:
            outputs = [answer(setup, rm, p, config) for p in range(len(setup.prompts))]
            attempts += [segment.attempts for output in outputs for segment in output.segments]
            return sum(len(output.token_ids) for output in outputs)

        first = seconds_a_token("ours", ours)
        theirs = seconds_a_token("plain", lambda config=config: sum(plain(setup, config)))
        mine = statistics.mean((first, seconds_a_token("ours", ours)))
        note = (
            f"generate, no reward: {1 / theirs:.1f} tokens/s; ours {1 / mine:.1f} aligned, "
            f"{statistics.mean(attempts):.1f} attempts a segment"
        )
        size = config.segment_size
        found.append(Row(f"{name}, one prompt", "plain", theirs / mine, None, None, mine * size, theirs * size, note))
    return found
