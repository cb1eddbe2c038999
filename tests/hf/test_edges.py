"""The ends of what a decode may meet: of characters, stop strings, answers, contexts and batches."""

from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BioGptForSequenceClassification,
    FalconForSequenceClassification,
    GPT2ForSequenceClassification,
    GPTJForSequenceClassification,
    GPTNeoForSequenceClassification,
    OPTForSequenceClassification,
    PreTrainedTokenizerFast,
)

import stars_kernels
from stars_kernels import Likelihood, RewardModel, StarsConfig, StarsError
from tests.hf import families
from tests.sequential import sequential_answer
from tests.tiny import EOS, byte_tokenizer, scripted_model, text_model, tiny_language_model, tiny_reward_model

CLASSIFIERS = {
    "gpt2": GPT2ForSequenceClassification,
    "opt": OPTForSequenceClassification,
    "gpt_neo": GPTNeoForSequenceClassification,
    "biogpt": BioGptForSequenceClassification,
    "falcon": FalconForSequenceClassification,
    "gptj": GPTJForSequenceClassification,
}
SET = dict(seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=12, segment_size=4, max_attempts=5)


def streamed(*arguments, **settings):
    """The pieces of text of the only prompt, and its output."""
    events = list(stars_kernels.stream(*arguments, **settings))
    return [event.text for event in events], events[-1].output


def merging_tokenizer(*words):
    """A token a letter, as `byte_tokenizer`; a model may also write each of `words` as one token, 258, 259, ..."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<s>": 256, "</s>": EOS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary | {word: 258 + i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return fast


@pytest.mark.parametrize("segment_size", [1, 2, 3, 7])
def test_a_stop_string_that_begins_and_ends_inside_tokens(rm, segment_size):
    """Tokens 'a', 'bS', 'TO', 'Px': the stop string STOP is complete within 'Px', whose x is not in the text."""
    tokenizer = merging_tokenizer("bS", "Px")
    a, t, o = tokenizer.convert_tokens_to_ids(["a", "T", "O"])
    lm = scripted_model({(): a, (a,): 258, (258,): t, (t,): o, (o,): 259, (259,): a})
    settings = dict(SET, segment_size=segment_size, tokenizer=tokenizer, stop_strings="STOP", top_k=2)
    pieces, output = streamed(lm, rm, "!", **settings)
    assert output.token_ids == [a, 258, t, o, 259] and output.finish_reason == "stop"
    assert "".join(pieces) == output.text == "ab"
    assert output.reward == pytest.approx(
        rm(torch.tensor([[*tokenizer("!")["input_ids"], *output.token_ids]])).logits.item()
    )
    assert set(output.segments[-1].lengths) == {
        (5 - 1) % segment_size + 1
    }  # the last segment ends with the stop string's last token


@pytest.mark.parametrize("segment_size", [1, 2, 3, 4, 9])
def test_characters_of_several_bytes(rm, segment_size):
    tokenizer = byte_tokenizer()
    text = "é😀ŷ"  # 2 + 4 + 2 bytes, all different
    lm = text_model(text, tokenizer)
    settings = dict(SET, segment_size=segment_size, tokenizer=tokenizer, top_k=2)
    for budget, whole in {1: "", 2: "é", 3: "é", 5: "é", 6: "é😀", 7: "é😀", 8: text}.items():
        pieces, output = streamed(lm, rm, "!", **dict(settings, max_new_tokens=budget))
        assert output.text == "".join(pieces) == whole
        assert len(output.token_ids) == budget and not any("\ufffd" in piece for piece in pieces)


def test_eos_first_while_streaming(rm):
    pieces, output = streamed(scripted_model({(): EOS}), rm, "a", tokenizer=byte_tokenizer(), **SET)
    assert (pieces, output.token_ids, output.text, output.finish_reason) == ([""], [EOS], "", "eos")
    assert output.counts.judged == output.counts.attempts


def test_an_empty_text_before_a_stop_string(rm):
    tokenizer = byte_tokenizer()
    lm = text_model("STOP", tokenizer)
    pieces, output = streamed(lm, rm, "!", tokenizer=tokenizer, stop_strings="STOP", **dict(SET, top_k=2))
    assert "".join(pieces) == output.text == "" and output.finish_reason == "stop"


@pytest.mark.parametrize("whose", ["lm", "rm"])
def test_the_context_limit(whose):
    """With one token of room the answer is one token; with none the prompt is refused, and the others go on."""
    limit = {"max_position_embeddings": 20}
    lm = tiny_language_model(**(limit if whose == "lm" else {}))
    rm = tiny_reward_model(**(limit if whose == "rm" else {}))
    prompts = [list(range(1, 20)), list(range(1, 21)), [5, 6]]
    settings = dict(SET, eos_token_id=(), request_ids=[1, 2, 3])
    with pytest.raises(StarsError) as failed:
        stars_kernels.decode(lm, rm, prompts, **settings)
    tight, refused, roomy = failed.value.results
    assert tight.finish_reason == "context" and len(tight.token_ids) == 1
    assert tight.segments[-1].lengths == [1] * tight.segments[-1].attempts and len(tight.segments) == 1
    assert str(refused) == "prompt 1: it has 20 tokens, expected less than the context limit of 20"
    assert roomy.finish_reason == "length" and len(roomy.token_ids) == 12
    alone = stars_kernels.decode(lm, rm, prompts[0], **dict(settings, request_ids=1))
    assert alone.token_ids == tight.token_ids
    ends = {event.index: event.output for event in stars_kernels.stream(lm, rm, prompts, **settings) if event.output}
    assert ends[0].token_ids == tight.token_ids and ends[2].token_ids == roomy.token_ids
    assert str(ends[1]) == str(refused)


@pytest.mark.parametrize("whose", ["lm", "rm", "head", "likelihood"])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_positions_end_where_the_context_does(whose, family):
    """A prompt near the limit does not take a batch-mate with it, whose longer segment has positions beyond.

    Nor does its own reward: a model without the attention hook gives all rows as many keys as its context has.
    """
    limit = dict(max_position_embeddings=32)
    lm = families.tiny(family, **limit) if whose in ("lm", "head") else tiny_language_model()
    rm = {
        "lm": tiny_reward_model,
        "rm": lambda: families.finished(CLASSIFIERS[family](families.tiny_config(family, num_labels=1, **limit))),
        "head": lambda: torch.nn.Linear(lm.config.hidden_size, 1).double(),
        "likelihood": lambda: Likelihood(families.tiny(family, **limit)),
    }[whose]()
    settings = dict(SET, segment_size=6, eos_token_id=(), width=3)
    prompts = [list(range(1, 31)), [5, 6]]
    alone = [stars_kernels.decode(lm, rm, p, **settings, request_ids=i) for i, p in enumerate(prompts)]
    assert [len(output.token_ids) for output in alone] == [2, 12]
    both = stars_kernels.decode(lm, rm, prompts, **settings, request_ids=[0, 1])
    rel = 1e-6 if family in ("gpt_neo", "gptj") else 1e-12  # these two attend in float32
    for output, expected in zip(both, alone, strict=True):
        assert output.token_ids == expected.token_ids
        rewards = [reward for segment in output.segments for reward in segment.rewards]
        assert rewards == pytest.approx([r for segment in expected.segments for r in segment.rewards], rel=rel)


def test_learned_positions_of_a_reader_of_text():
    """Its rows are padded to the longest, at positions that it may not have."""
    rm = families.tiny_config("gpt2", vocab_size=300, num_labels=1, max_position_embeddings=40)
    reader = RewardModel(families.finished(GPT2ForSequenceClassification(rm)), byte_tokenizer(reverse=True))
    tokenizer = byte_tokenizer()
    ids = tokenizer("abcdefghijklmnop")["input_ids"]
    line = {(first,): then for first, then in pairwise(ids[2:])}
    lm = scripted_model({(): EOS, (ids[0],): ids[1], (ids[1],): EOS, (ids[-1],): EOS, **line})
    settings = dict(SET, tokenizer=tokenizer, segment_size=12, max_new_tokens=14, width=4)
    prompts = ["x" * 36 + "a", "c"]
    alone = [stars_kernels.decode(lm, reader, p, **settings, request_ids=i).text for i, p in enumerate(prompts)]
    both = stars_kernels.decode(lm, reader, prompts, **settings, request_ids=[0, 1])
    assert [output.text for output in both] == alone and len(alone[1]) > 4


def test_a_tokenizer_without_a_pad_token(lm, rm):
    """And models without one: nothing is padded, so nothing has to be agreed on."""
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token_id is lm.config.pad_token_id is rm.config.pad_token_id is None
    prompts = ["a", "a longer prompt", "mid"]
    outputs = stars_kernels.decode(lm, rm, prompts, tokenizer=tokenizer, **SET)
    padding = byte_tokenizer()
    padding.pad_token = "</s>"
    assert [o.token_ids for o in outputs] == [
        o.token_ids for o in stars_kernels.decode(lm, rm, prompts, tokenizer=padding, **SET)
    ]
    assert tokenizer.pad_token_id is None


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_prompts_of_very_different_lengths(lm, rm, batch_size):
    """1 to 130 tokens in one batch, the longest of which has less room than the budget."""
    prompts = [[5], list(range(1, 131)), [7, 8], list(range(60, 120)), [9] * 17]
    config = StarsConfig(**dict(SET, max_new_tokens=36, segment_size=5))
    outputs = stars_kernels.decode(lm, rm, prompts, config=config, request_ids=range(5), batch_size=batch_size)
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        expected = sequential_answer(lm, rm, prompt, index, config, (EOS,), limit=160 - len(prompt))
        assert output.token_ids == expected.tokens
        assert [segment.attempts for segment in output.segments] == [s.attempts for s in expected.segments]
        assert output.finish_reason == expected.finish_reason
    assert {output.finish_reason for output in outputs} >= {"context", "length"}


@pytest.mark.parametrize("kind", ["ids", "text", "head", "likelihood"])
def test_a_segment_longer_than_an_answer_takes_no_more_room(lm, rm, kind):
    tokenizer = byte_tokenizer()
    described = {
        "ids": rm,
        "text": RewardModel(rm, byte_tokenizer(reverse=True)),
        "head": torch.nn.Linear(24, 1).double(),
        "likelihood": stars_kernels.Likelihood(lm),
    }[kind]
    settings = dict(seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=8, eos_token_id=(), tokenizer=tokenizer)
    sizes = (8, 10**9, 10**30)
    outputs = [stars_kernels.decode(lm, described, "ab", segment_size=size, **settings) for size in sizes]
    assert len({(tuple(output.token_ids), output.reward) for output in outputs}) == 1
