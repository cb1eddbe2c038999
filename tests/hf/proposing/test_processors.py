"""Logits processors and stopping criteria of transformers: lifted, or asked at every token; applied once."""

from functools import partial

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import stars_kernels
from stars_kernels import StarsConfig, StarsError
from stars_kernels.hf.proposing.processors import lift_criteria, lift_processors
from tests.hf.test_generate import EOS_IDS, PROMPTS, generate, left_padded, padded
from tests.sequential import sequential_decode
from tests.tiny import EOS, byte_tokenizer, spelling_model

OFF = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
T, K, P, M = TemperatureLogitsWarper(0.5), TopKLogitsWarper(9), TopPLogitsWarper(0.8), MinPLogitsWarper(0.1)
PENALTY = RepetitionPenaltyLogitsProcessor(1.3)
KEPT_TWO, MASKED = TopKLogitsWarper(9, min_tokens_to_keep=2), TopKLogitsWarper(9, filter_value=-1e4)
ALL = {"temperature": 0.5, "top_k": 9, "top_p": 0.8, "min_p": 0.1}


class MyTopK(TopKLogitsWarper):
    """A subclass may do anything."""


class Ban(LogitsProcessor):
    """Bans the last token's neighbours, and writes on what it is given."""

    def __call__(self, input_ids, scores):
        for step in (-1, 1):
            scores.scatter_(1, (input_ids[:, -1:] + step).clamp(0, scores.shape[1] - 1), -torch.inf)
        return scores


MINE = MyTopK(9)


@pytest.mark.parametrize(
    ("processors", "rest", "lifted"),
    [
        ([], [], {}),
        ([T, K, P, M], [], ALL),
        ([K, M], [], {"top_k": 9, "min_p": 0.1}),
        ([PENALTY, T, P], [PENALTY], {"temperature": 0.5, "top_p": 0.8}),
        ([T, K, PENALTY], [T, K, PENALTY], {}),
        ([K, T], [K], {"temperature": 0.5}),
        ([P, T, K, M], [P], {"temperature": 0.5, "top_k": 9, "min_p": 0.1}),
        ([T, P, K], [T, P], {"top_k": 9}),
        ([K, K], [K], {"top_k": 9}),
        ([T, K, T], [T, K], {"temperature": 0.5}),
        ([T, KEPT_TWO, P], [T, KEPT_TWO], {"top_p": 0.8}),
        ([T, MASKED], [T, MASKED], {}),
        ([T, MINE, P], [T, MINE], {"top_p": 0.8}),
    ],
)
def test_the_longest_tail_in_the_ops_order_is_lifted(processors, rest, lifted):
    assert lift_processors(processors) == (rest, OFF | lifted)


@pytest.mark.parametrize("target", [2.0, 100.0], ids=["accepts", "falls back"])
@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize(
    "processors",
    [[PENALTY, Ban(), T, K], [K, T], [T, K, PENALTY], [P, T, MINE, M], [Ban()]],
    ids=lambda processors: "-".join(type(p).__name__ for p in processors),
)
def test_every_token_is_the_sequential_loops(lm, rm, processors, width, target):
    """Whatever is lifted, each processor is applied once, in the order of the list, to what the rows hold."""
    config = StarsConfig(
        seed=3, reward_threshold=target, beta=1.0, max_new_tokens=22, segment_size=4, max_attempts=6, **OFF
    )
    process = LogitsProcessorList(processors)
    result = padded(
        lm, PROMPTS, rm, pad_token_id=0, width=width, request_ids=[5, "six", 7], eos_token_id=EOS_IDS, top_k=0,
        seed=3, reward_threshold=target, max_new_tokens=22, max_attempts=6, logits_processor=process,
        return_dict_in_generate=True,
    )  # fmt: skip
    outcomes = set()
    inputs = left_padded(PROMPTS)
    for row, (prompt, id_) in enumerate(zip(PROMPTS, [5, "six", 7], strict=True)):
        pads = inputs["input_ids"][row : row + 1, : 8 - len(prompt)]

        def one(ids, logits, pads=pads):
            return process(torch.cat([pads, ids], dim=1), logits.float())

        tokens, tried = sequential_decode(lm, rm, prompt, id_, config, EOS_IDS, one)
        assert result.outputs[row].token_ids == tokens
        assert [segment.attempts for segment in result.outputs[row].segments] == tried
        outcomes |= {(segment.outcome, segment.chosen > 0) for segment in result.outputs[row].segments}
    assert ("accepted" if target == 2.0 else "fallback", True) in outcomes


def test_on_the_slower_path_the_output_says_so(lm, rm):
    def backends(**settings):
        return generate(lm, [[1, 2]], rm, return_dict_in_generate=True, **settings).outputs[0].backends

    assert "processors" not in backends(temperature=0.7, top_p=0.9, min_p=0.1)
    assert backends(temperature=0.7, repetition_penalty=1.2)["processors"] == "RepetitionPenaltyLogitsProcessor"


def test_settings_of_generate_that_become_processors(lm, rm):
    """Padded or alone, with the lengths that transformers counts; the pads themselves count for nothing."""
    settings = dict(
        repetition_penalty=1.5, no_repeat_ngram_size=2, min_new_tokens=9, suppress_tokens=[6], bad_words_ids=[[7, 8]],
        eos_token_id=EOS_IDS, pad_token_id=0, max_new_tokens=14,
    )  # fmt: skip
    free = padded(lm, PROMPTS, rm, **{**settings, "min_new_tokens": 0}, return_dict_in_generate=True)
    together = padded(lm, PROMPTS, rm, **settings, return_dict_in_generate=True)
    for prompt, output in zip(PROMPTS, together.outputs, strict=True):
        alone = generate(lm, [prompt], rm, **settings, return_dict_in_generate=True)
        assert alone.outputs[0].token_ids == output.token_ids
        assert len(output.token_ids) >= 9
    assert min(len(output.token_ids) for output in free.outputs) < 9


def test_prefix_allowed_tokens_fn_knows_which_prompt_it_is_asked_about(lm, rm):
    def allowed(prompt, ids):
        return list(range(20 * prompt + 10, 20 * prompt + 20))

    sequences = padded(
        lm, PROMPTS, rm, pad_token_id=0, num_return_sequences=2, prefix_allowed_tokens_fn=allowed, batch_size=4
    )
    for row, answer in enumerate(sequences[:, 8:].tolist()):
        assert all(20 * row + 10 <= token < 20 * row + 20 for token in answer)


def test_a_processor_that_breaks_the_shape_is_named(lm, rm):
    def halve(input_ids, scores):
        return scores[:, ::2]

    with pytest.raises(RuntimeError, match=r"function returned logits of shape \[\d, 130\], expected \[\d, 260\]"):
        generate(lm, [[1, 2]], rm, logits_processor=[halve])


class StopsAt(StoppingCriteria):
    """After two tokens of the answer that are divisible by five; reads the input too."""

    def __init__(self, length):
        self.length, self.asked = length, []

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None and input_ids.shape[0] == 1
        self.asked.append(input_ids[0].tolist())
        return (input_ids[:, self.length :] % 5 == 0).sum(dim=1) >= 2


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("segment_size", [1, 4, 22])
def test_criteria_end_an_answer_at_their_first_token(lm, rm, width, segment_size):
    settings = dict(seed=3, reward_threshold=2.0, beta=1.0, max_new_tokens=22, segment_size=segment_size)
    criterion = StopsAt(8)
    result = padded(
        lm, PROMPTS, rm, pad_token_id=0, width=width, request_ids=[5, "six", 7], return_dict_in_generate=True,
        stopping_criteria=[criterion], max_attempts=6, **settings,
    )  # fmt: skip
    config = StarsConfig(**settings, max_attempts=6, **{**OFF, "top_k": 50})

    def stops(answer):
        return sum(token % 5 == 0 for token in answer) >= 2

    reasons = []
    for prompt, id_, output in zip(PROMPTS, [5, "six", 7], result.outputs, strict=True):
        tokens, tried = sequential_decode(lm, rm, prompt, id_, config, [EOS], stops=stops)
        assert output.token_ids == tokens
        assert [segment.attempts for segment in output.segments] == tried
        assert output.finish_reason == ("stop" if stops(tokens) else "eos" if tokens[-1] == EOS else "length")
        reasons.append(output.finish_reason)
    assert "stop" in reasons
    inputs = left_padded(PROMPTS)["input_ids"].tolist()
    assert {tuple(ids[:8]) for ids in criterion.asked} == set(map(tuple, inputs))


def test_the_first_of_criteria_and_stop_strings_ends_an_answer(lm, rm):
    tokenizer = byte_tokenizer()
    free = generate(lm, [[1, 2, 3]], rm)[0, 3:].tolist()
    early, late = tokenizer.decode(free[3:5]), free[7]

    def ends(input_ids, scores):
        return input_ids[0, -1] == late

    both = partial(stars_kernels.generate, tokenizer=tokenizer, stop_strings=early)
    assert generate(lm, [[1, 2, 3]], rm, both, stopping_criteria=[ends])[0, 3:].tolist() == free[:5]
    assert generate(lm, [[1, 2, 3]], rm, stopping_criteria=[ends])[0, 3:].tolist() == free[:8]


def test_lengths_and_ends_of_criteria_are_taken_from_them(lm, rm):
    stops = lift_criteria(StoppingCriteriaList([MaxLengthCriteria(9), MaxLengthCriteria(7)]))
    assert stops.max_length == 7 and not stops.rest
    shorter = generate(lm, [[1, 2, 3]], rm, stopping_criteria=[MaxLengthCriteria(8)])
    assert torch.equal(shorter, generate(lm, [[1, 2, 3]], rm, max_new_tokens=5))


WIDTHS = [1, 5, "auto"]
MANY, IDS = PROMPTS * 4, list(range(12))


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_asked_about_a_row_that_has_ended(rm, width):
    """A grammar allows no token behind the EOS, and transformers' own processor raises on that."""
    lm, behind = spelling_model("abc"), []

    def allowed(prompt, ids):
        behind.append(EOS in ids.tolist())
        return [] if EOS in ids.tolist() else [*byte_tokenizer()("abc")["input_ids"], EOS]

    config = StarsConfig(
        seed=3, reward_threshold=3.0, beta=1.0, max_new_tokens=22, segment_size=6, max_attempts=6, **OFF
    )
    grammar = PrefixConstrainedLogitsProcessor(allowed, 1)
    result = padded(
        lm, MANY, rm, pad_token_id=0, width=width, request_ids=IDS, top_k=0, seed=3, reward_threshold=3.0,
        max_new_tokens=22, segment_size=6, max_attempts=6, prefix_allowed_tokens_fn=allowed,
        return_dict_in_generate=True,
    )  # fmt: skip
    for prompt, id_, output in zip(MANY, IDS, result.outputs, strict=True):
        tokens, tried = sequential_decode(
            lm, rm, prompt, id_, config, [EOS], lambda ids, logits: grammar(ids, logits.float())
        )
        assert output.token_ids == tokens
        assert [segment.attempts for segment in output.segments] == tried
    assert sum(output.token_ids[-1] == EOS for output in result.outputs) > 3
    assert behind and not any(behind)


DEAD = torch.arange(5, 260, 40)


class DeadEnd(LogitsProcessor):
    """No way on from some tokens, not even for the rows beside; writes on what it is given before it says so."""

    def __init__(self):
        self.raised = 0

    def __call__(self, input_ids, scores):
        scores -= 1.0 * (torch.arange(scores.shape[1]) % 3)
        return self.check(input_ids, scores)

    def check(self, input_ids, scores, **kwargs):
        if torch.isin(input_ids[:, -1], DEAD).any():
            self.raised += 1
            raise LookupError("a dead end")
        return scores


class RaisingCriterion(DeadEnd):
    def __call__(self, input_ids, scores, **kwargs):
        self.check(input_ids, scores)
        return False


@pytest.mark.parametrize("segment_size", [1, 4])
@pytest.mark.parametrize(
    ("kind", "what"), [(DeadEnd, "a logits processor failed"), (RaisingCriterion, "a stopping criterion failed")]
)
def test_only_a_judged_attempt_that_raises_fails_its_prompt(lm, rm, kind, what, segment_size):
    """As in the sequential loop, at every width: what it would not have tried fails nothing."""
    settings = dict(seed=3, reward_threshold=2.0, beta=1.0, max_new_tokens=10, segment_size=segment_size)
    config = StarsConfig(**settings, max_attempts=6, **OFF)
    given = {"logits_processor": [kind()]} if kind is DeadEnd else {"stopping_criteria": [kind()]}
    (asked,) = next(iter(given.values()))

    def process(ids, logits):
        return asked(ids, logits.float()) if kind is DeadEnd else logits

    def stops(answer):
        return kind is RaisingCriterion and asked(torch.tensor([answer]), None)

    expected = []
    for prompt, id_ in zip(MANY, IDS, strict=True):
        try:
            expected.append(sequential_decode(lm, rm, prompt, id_, config, [EOS], process, stops))
        except LookupError:
            expected.append(None)
    assert 2 < expected.count(None) < 10
    raised = []
    for width in WIDTHS:
        asked.raised = 0
        with pytest.raises(StarsError) as failed:
            padded(lm, MANY, rm, pad_token_id=0, width=width, request_ids=IDS, top_k=0, max_attempts=6, **settings,
                   **given)  # fmt: skip
        raised.append(asked.raised)
        for result, truth in zip(failed.value.results, expected, strict=True):
            if truth is None:
                assert f": {what}: LookupError: a dead end" in str(result)
                assert isinstance(result.__cause__, LookupError)
            else:
                assert (result.token_ids, [segment.attempts for segment in result.segments]) == truth
    assert raised[1] > raised[0]  # so wide rounds did meet dead ends beyond what is judged


@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria"])
def test_out_of_memory_in_what_is_asked_is_the_rounds(lm, rm, where):
    """It is no row's fault: the round is tried again with fewer attempts."""
    full = []

    def asked(input_ids, scores):
        if not full:
            full.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return scores if where == "logits_processor" else False

    expected = generate(lm, [[1, 2]], rm, width=4, max_attempts=4)
    with pytest.warns(RuntimeWarning, match="1 prompts x 4 attempts: going on with width=2"):
        again = generate(lm, [[1, 2]], rm, width=4, max_attempts=4, **{where: [asked]})
    assert torch.equal(again, expected)
