"""Loops on tiny models with any scorer, and what they decided."""

import stars_kernels
from stars_kernels.decoder.answer import Answer
from stars_kernels.ops.philox import request_key
from tests.runs import run_of
from tests.sequential import sequential_decode
from tests.tiny import EOS, byte_tokenizer


def loop_of(proposer, scorer, config, prompts, ids, eos=(), find_stop=None):
    answers = [
        Answer(request_key(config.seed, id_), prompt, config.max_new_tokens, find_stop=find_stop)
        for prompt, id_ in zip(prompts, ids, strict=True)
    ]
    return run_of(proposer, scorer, config, answers, eos)


def decided(loop):
    """Each answer's tokens and attempts, after a run without errors."""
    loop.run()
    assert [answer.error for answer in loop.answers] == [None] * len(loop.answers)
    return [
        (answer.tokens, [segment.attempts for segment in answer.segments if segment.attempts])
        for answer in loop.answers
    ]


def check_rewards(loop, reward, tolerance=1e-6):
    """Every accepted segment's reward is that of the plain `reward(prompt ids, answer ids)`, and so is r(x)."""
    for answer in loop.answers:
        assert abs(answer.prompt_reward - reward(answer.prompt, [])) < tolerance
        length = 0
        for segment in answer.segments:
            length += segment.length
            assert abs(segment.reward - reward(answer.prompt, answer.tokens[:length])) < tolerance
        assert length == len(answer.tokens)


def stop_at(stops):
    """A `find_stop` for stop strings that are single tokens."""

    def find_stop(tokens, accepted):
        return next((i + 1 for i in range(accepted, len(tokens)) if tokens[i] in stops), None)

    return find_stop


def count_forwards(model):
    """A list that gets the shape [B, S] of the token ids of each forward of `model`."""
    shapes = []
    body = model.base_model
    body.register_forward_pre_hook(lambda _, args, given: shapes.append([*given["input_ids"].shape]), with_kwargs=True)
    return shapes


def decode_as_the_sequential_loop(lm, rm, reward, prompts, config):
    """Outputs for texts at several shapes, whose tokens and attempts are the sequential loop's; and these attempts.

    reward: what `rm` is to give for (prompt ids, answer ids).
    """
    plain, ids = byte_tokenizer(), range(len(prompts))
    expected = [sequential_decode(lm, reward, plain(prompts[i])["input_ids"], i, config, (EOS,)) for i in ids]
    every = []
    for width, wave in ((1, 1), (5, 5), (5, 2)):
        shaped = config.replace(width=width, wave=wave)
        outputs = stars_kernels.decode(lm, rm, prompts, tokenizer=plain, request_ids=ids, config=shaped)
        assert [(o.token_ids, [s.attempts for s in o.segments]) for o in outputs] == expected
        every.append(outputs)
    return every, [attempts for _, attempts in expected]
