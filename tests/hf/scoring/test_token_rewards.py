"""Causal language models as reward models: logits of chosen tokens, at the text's end or at the mark of each step."""

import math

import pytest
import torch
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

import stars_kernels
from stars_kernels import RewardModel, StarsConfig
from tests.hf.loops import decode_as_the_sequential_loop
from tests.hf.scoring.test_text_rewards import CHAT, LM_TEMPLATE, MERGES, MERGING, RM_TEMPLATE, text_of
from tests.tiny import byte_tokenizer, spelling_model, tiny_language_model, tiny_reward_model

SET = dict(seed=1, reward_threshold=0.7, beta=0.1, max_new_tokens=16, segment_size=4, max_attempts=6, progress=False)
RM = tiny_language_model(vocab_size=300, seed=1)
SHEPHERD = dict(template="{prompt} {answer}", step="\n", mark=" ки", between="\n", tokens=("+", "-"))


@pytest.fixture(scope="module")
def lm():
    return spelling_model("ac\n", end=False)


@torch.no_grad()
def logits_of(text, tokenizer, rm=RM):
    return rm(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]


def plus(logits, tokenizer):
    """The softmax over "+" and "-" alone."""
    plus, minus = (tokenizer(sign)["input_ids"][0] for sign in "+-")
    return logits[..., [plus, minus]].softmax(-1)[..., 0]


@torch.no_grad()
def by_steps(prompt, answer, value, tokenizer=MERGING):
    """The values at the last token of each mark, of texts that end there."""
    text, values = prompt + " ", []
    for i, step in enumerate([step for step in answer.split("\n") if step] or [""]):
        text += "\n" * (i > 0) + step + " ки"
        values.append(value(text))
    return values


def test_a_judges_verdict_is_the_sequential_algorithm(lm):
    template = "Q: {prompt}\nA: {answer}\nGood (+) or bad (-)? "

    def reward(prompt, answer):
        text = template.format(prompt=text_of(prompt), answer=text_of(answer))
        return plus(logits_of(text, MERGING)[-1], MERGING).item()

    described = RewardModel(RM, MERGING, template, tokens=("+", "-"))
    decode_as_the_sequential_loop(lm, described, reward, ["ab", "ca\nb"], StarsConfig(**SET))


def test_one_tokens_logit_behind_a_chat_whose_end_is_rolled_back(lm):
    """As Nemotron's: the logit of token 0 behind the closed turn."""
    tokenizer = byte_tokenizer(RM_TEMPLATE, merges=MERGES)
    settings = dict(SET, tokenizer=byte_tokenizer(LM_TEMPLATE), max_new_tokens=40)
    output = stars_kernels.decode(lm, RewardModel(RM, tokenizer, tokens=(0,)), CHAT, **settings)
    text = f"(user: bca?)(assistant: {output.text}) done."
    assert output.reward == pytest.approx(logits_of(text, tokenizer)[-1, 0].item(), abs=1e-9)
    whole = len(tokenizer(text)["input_ids"]) * sum(sum(segment.widths) for segment in output.segments)
    assert output.counts.rm_scored < whole / 2


def test_tokens_at_each_steps_mark_are_the_sequential_algorithm(lm):
    """As Math-Shepherd's: "question step ки\\nstep ки", the probability of "+" at each mark."""

    def steps(prompt, answer):
        return by_steps(prompt, answer, lambda text: plus(logits_of(text, MERGING)[-1], MERGING).item())

    described = RewardModel(RM, MERGING, **SHEPHERD, reduce="prod")
    every, _ = decode_as_the_sequential_loop(
        lm, described, lambda prompt, answer: math.prod(steps(text_of(prompt), text_of(answer))), ["ab", "ca\nb"],
        StarsConfig(**SET),
    )  # fmt: skip
    assert max(output.text.count("\n") for outputs in every for output in outputs) > 1


def test_a_head_at_each_steps_mark(lm):
    """As Qwen2.5-Math-PRM's: two outputs behind a Linear-ReLU-Linear, the probability of the second."""
    torch.manual_seed(5)
    head = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2)).double()
    keys = dict(SHEPHERD, tokens=None, head=head, label=1)
    output = stars_kernels.decode(lm, RewardModel(RM, MERGING, **keys), "ab", tokenizer=byte_tokenizer(), **SET)

    def value(text):
        states = RM.model(torch.tensor([MERGING(text)["input_ids"]])).last_hidden_state[0, -1]
        return head(states).softmax(-1)[1].item()

    assert output.reward == pytest.approx(min(by_steps("ab", output.text, value)), abs=1e-9)


def test_all_steps_are_scored_in_one_forward_and_each_once(lm):
    """Of a candidate only what is new is read, in as few forwards as there are rounds."""
    shapes, rm = [], tiny_language_model(vocab_size=300, seed=1, max_position_embeddings=400)
    rm.model.layers[0].mlp.register_forward_hook(lambda _, given, out: shapes.append(tuple(out.shape[:-1])))
    settings = dict(SET, tokenizer=byte_tokenizer(), max_new_tokens=60, max_attempts=1, width=1)
    output = stars_kernels.decode(lm, RewardModel(rm, MERGING, **SHEPHERD), "ab", **settings)
    marks = output.text.count("\n")
    assert marks > 5 and len(output.segments) == 15
    calls = shapes[1:]  # after the probe of the output layer
    assert len(calls) <= 2 * len(output.segments) + 8  # a segment's prefix and its candidates: not one a step
    assert output.counts.rm_scored < 60 + (marks + 2 * len(output.segments) + 3) * len(MERGING(" ки\n")["input_ids"])


def test_what_cannot_be_is_refused(lm):
    settings, rm = dict(SET, tokenizer=byte_tokenizer()), tiny_language_model(seed=1)
    sizes = dict(vocab_size=260, hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=2, head_dim=12)  # fmt: skip
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=30.0))
    scaled = CohereForCausalLM(CohereConfig(**{k: v for k, v in sizes.items() if k != "head_dim"}, logit_scale=0.06))
    one, two = nn.Linear(24, 1).double(), nn.Linear(24, 2).double()
    for described, message in (
        (RewardModel(rm, tokens=("yes", "no")), r"'yes' of tokens is 3 tokens \[.*\] of reward_model .*, expected one"),
        (RewardModel(rm, tokens=(260,)), "260 of tokens is outside the vocabulary of .*, expected 0 to 259"),
        (RewardModel(capped, tokens=("+",)), "Gemma2ForCausalLM changes its logits or its states at the output layer"),
        (RewardModel(scaled, tokens=("+",)), "CohereForCausalLM changes its logits or its states at the output layer"),
        (RewardModel(tiny_reward_model(), tokens=("+",)), "is a LlamaForSequenceClassification"),
        (
            RewardModel(rm, tokens=("+",), label=1),
            "label is given, but reward_model is a causal language model of tokens",
        ),
        (RewardModel(rm, tokens=("+",), reduce="last"), "reduce is given, but .* a causal language model of tokens"),
        (RewardModel(rm, tokens=("+",), head=one), "tokens is given, but reward_model is a backbone with a head"),
        (RewardModel(rm, head=one, mark="#"), "has 1 label, whose probability is always 1"),
        (RewardModel(rm, head=two, mark="#"), "has 2 labels, expected 1; say which one"),
        (RewardModel(tiny_reward_model(), mark="#"), "mark is given, but reward_model is a sequence classifier"),
    ):
        with pytest.raises(ValueError, match=message):
            stars_kernels.decode(lm, described, "a", **settings)
    with pytest.raises(ValueError, match="reads text, which needs the language model's tokenizer"):
        stars_kernels.decode(lm, RewardModel(rm, tokens=("+",)), [97], **SET)
    for tokens in ((), "+", ("",), (1.5,), (True,)):
        with pytest.raises(TypeError, match=r"tokens is .*, expected a tuple of tokens, each its text or its id"):
            RewardModel(rm, tokens=tokens)
    with pytest.raises(TypeError, match="mark is '', expected a non-empty string or None"):
        RewardModel(rm, head=two, mark="")
    with pytest.raises(ValueError, match="between is 'x' without a mark"):
        RewardModel(rm, head=two, between="x")
    rm = tiny_language_model(vocab_size=261)
    merging = byte_tokenizer(merges=[("#", "#")])
    described = RewardModel(rm, merging, tokens=("+",), mark="#", step="\n", between="#")
    with pytest.raises(stars_kernels.DecodeError, match="no token ends where the mark '#' does"):
        stars_kernels.decode(lm, described, "a", **dict(settings, max_new_tokens=40))
