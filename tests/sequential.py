"""`decoder/sequential.py` on models of transformers, without a cache: what the engine's answers are compared with."""

import torch

from stars_kernels.decoder import sequential
from stars_kernels.decoder.answer import Answer
from stars_kernels.ops.philox import request_key


def sequential_answer(
    lm, rm, prompt, request_id, config, eos, process=lambda ids, logits: logits, stops=None, limit=None
):
    """The `Answer` of one prompt; config with r*, beta (where the rule has them) and seed given.

    rm: a sequence classifier, or a function of (prompt ids, answer ids) to a reward.
    process([1, T] token ids, [1, V] logits) -> [1, V] logits; stops(answer) -> whether it ends with its last token.
    limit: tokens that the answer may have where the context ends sooner.
    """

    def logits(answer):
        ids = torch.tensor([prompt + answer])
        return process(ids, lm(ids).logits[:, -1])[0]

    def reward(answer):
        if not isinstance(rm, torch.nn.Module):
            return rm(prompt, answer)
        return rm(torch.tensor([prompt + answer])).logits[0, 0].item()

    limit = config.max_new_tokens if limit is None else min(limit, config.max_new_tokens)
    answer = Answer(request_key(config.seed, request_id), prompt, limit, max_new_tokens=config.max_new_tokens)
    stops = (lambda answer: False) if stops is None else stops
    return sequential.decode(logits, reward, config.resolved_rule, answer, config.sampling, eos, stops)


def sequential_decode(*args, **kwargs):
    """The answer's tokens and the number of attempts of each segment; arguments as of `sequential_answer`."""
    answer = sequential_answer(*args, **kwargs)
    return answer.tokens, [segment.attempts for segment in answer.segments]
