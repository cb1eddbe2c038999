"""The sequential STARS algorithm as one would write it on paper: no cache, one prompt, one candidate at a time."""

import math

import torch

from stars_kernels.ops.philox import accept_uniform, request_key
from stars_kernels.ops.segment_sample import segment_sample_ref


def sequential_decode(lm, rm, prompt, request_id, config, eos):
    """The answer's tokens and the number of attempts of each segment; config with r*, beta and seed given."""
    key = torch.tensor([request_key(config.seed, request_id)])
    filters = config.sampling
    filters = (filters["temperature"], filters["top_k"], filters["top_p"], filters["min_p"], 0)

    def reward(answer):
        return rm(torch.tensor([prompt + answer])).logits[0, 0].item()

    def candidate(answer, attempt):
        tokens = []
        for position in range(len(answer), min(len(answer) + config.segment_size, config.max_new_tokens)):
            logits = lm(torch.tensor([prompt + answer + tokens])).logits[:, -1]
            token, _ = segment_sample_ref(
                logits, key, torch.tensor([attempt]), torch.tensor([position]), None, *filters
            )
            tokens.append(token.item())
            if tokens[-1] in eos:
                break
        return tokens

    answer, attempts, target = [], [], config.reward_threshold
    r0 = (1 - config.alpha) * reward([]) + config.alpha * target
    while len(answer) < config.max_new_tokens and not (answer and answer[-1] in eos):
        best = (-math.inf, None)
        for attempt in range(config.max_attempts):
            tokens = candidate(answer, attempt)
            r, n = reward(answer + tokens), len(answer) + len(tokens)
            tau = min(target, r0 + n * (target - r0) / config.max_new_tokens)
            u = accept_uniform(key, torch.tensor([len(answer)]), torch.tensor([attempt])).item()
            accepted = r >= tau if config.accept == "hard" else u < min(1.0, math.exp(min((r - tau) / config.beta, 0)))
            best = max(best, (r, -attempt, tokens)) if best[1] is not None else (r, -attempt, tokens)
            if accepted:
                break
        answer += tokens if accepted else best[2]
        attempts.append(attempt + 1)
    return answer, attempts
