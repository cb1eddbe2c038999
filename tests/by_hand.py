"""STARS as the paper writes it, by a second hand: `decoder/sequential.py` is compared with it."""

import math

import torch

from stars_kernels.ops.philox import accept_uniform, request_key
from stars_kernels.ops.segment_sample import segment_sample_ref


def decode_by_hand(lm, rm, prompt, request_id, config, eos, process=lambda ids, logits: logits, stops=None):
    """The answer's tokens and the number of attempts of each segment; config with r*, beta and seed given.

    rm: a sequence classifier, or a function of (prompt ids, answer ids) to a reward.
    process([1, T] token ids, [1, V] logits) -> [1, V] logits; stops(answer) -> whether it ends with its last token.
    """
    key = torch.tensor([request_key(config.seed, request_id)])
    filters = config.sampling
    filters = (filters["temperature"], filters["top_k"], filters["top_p"], filters["min_p"], 0)

    def reward(answer):
        if not isinstance(rm, torch.nn.Module):
            return rm(prompt, answer)
        return rm(torch.tensor([prompt + answer])).logits[0, 0].item()

    def candidate(answer, attempt):
        tokens = []
        for position in range(len(answer), min(len(answer) + config.segment_size, config.max_new_tokens)):
            ids = torch.tensor([prompt + answer + tokens])
            logits = process(ids, lm(ids).logits[:, -1])
            token, _ = segment_sample_ref(
                logits, key, torch.tensor([attempt]), torch.tensor([position]), None, *filters
            )
            tokens.append(token.item())
            if ended(answer + tokens):
                break
        return tokens

    def ended(answer):
        return bool(answer) and (answer[-1] in eos or (stops is not None and stops(answer)))

    answer, attempts, target = [], [], config.reward_threshold
    r0 = (1 - config.alpha) * reward([]) + config.alpha * target
    while len(answer) < config.max_new_tokens and not ended(answer):
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
