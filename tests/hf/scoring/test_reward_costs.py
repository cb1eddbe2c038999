"""How many tokens each kind of reward model reads for an accepted token: the table of docs/reward_models.md."""

import re
from pathlib import Path

import pytest
from torch import nn

import stars_kernels
from stars_kernels import Likelihood, RewardModel
from tests.hf.scoring.test_encoder_rewards import encoder, pair_tokenizer
from tests.hf.scoring.test_process_rewards import process_model
from tests.hf.scoring.test_text_rewards import MERGING, OTHER_IDS, RM_TEMPLATE
from tests.tiny import byte_tokenizer, spelling_model, tiny_language_model, tiny_reward_model

ANSWER, SEGMENT = 80, 5
PROMPT = "abc " * 10
LONG = dict(max_position_embeddings=400)
POLICY = tiny_language_model(**LONG)
CLOSING = byte_tokenizer(RM_TEMPLATE, reverse=True)
KINDS = {
    "token ids": tiny_reward_model(**LONG),
    "text, tokens as the language model's": RewardModel(tiny_reward_model(vocab_size=300, **LONG), OTHER_IDS),
    "text, tokens that merge": RewardModel(tiny_reward_model(vocab_size=300, **LONG), MERGING),
    "text, a chat template that closes with 7 tokens": RewardModel(tiny_reward_model(**LONG), CLOSING),
    "steps, a separator of 2 tokens": RewardModel(process_model(vocab_size=260, **LONG), label=1),
    "steps of a causal language model, a mark of 2 tokens": RewardModel(
        POLICY, template="{prompt}{answer}", tokens=("+", "-"), mark=" #"
    ),
    "a head of yours, token ids": RewardModel(POLICY, head=nn.Linear(24, 1).double()),
    "encoder": RewardModel(encoder(**LONG), pair_tokenizer()),
    "a head on the model's own hidden states": nn.Linear(24, 1).double(),
    "likelihood, of two models": Likelihood(POLICY, POLICY),
    "function": lambda prompts, answers: [0.0] * len(answers),
}
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def read(kind, attempts):
    """RM tokens per accepted token, where each segment takes so many attempts; the empty answer's are not counted."""
    output = stars_kernels.decode(
        spelling_model("abc ", end=False, max_position_embeddings=400), KINDS[kind],
        [{"role": "user", "content": PROMPT}], tokenizer=byte_tokenizer(CHAT_TEMPLATE), seed=0, accept="hard",
        reward_threshold=1e9, max_attempts=attempts, width=attempts, max_new_tokens=ANSWER, segment_size=SEGMENT,
        progress=False,
    )  # fmt: skip
    assert [segment.attempts for segment in output.segments] == [attempts] * (ANSWER // SEGMENT)
    return (output.counts.rm_scored - empty(kind)) / ANSWER


def empty(kind):
    """Tokens of the empty answer."""
    if kind in ("function", "a head on the model's own hidden states"):
        return 0
    if kind.startswith("likelihood"):
        return 2 * len(byte_tokenizer()(PROMPT)["input_ids"])
    if kind == "encoder":
        return len(KINDS[kind].tokenizer(PROMPT, "")["input_ids"])
    tokenizer = getattr(KINDS[kind], "tokenizer", None) or byte_tokenizer()
    if tokenizer.chat_template:
        return len(tokenizer(f"(user: {PROMPT})(assistant: ) done.")["input_ids"])
    return len(tokenizer(PROMPT)["input_ids"]) + 2 * kind.startswith("steps")  # the empty step's end


def test_the_documented_costs():
    text = (Path(__file__).parents[3] / "docs/reward_models.md").read_text()
    found = {kind: (f"{read(kind, 1):.1f}", f"{read(kind, 4):.1f}") for kind in KINDS}
    print(*(f"| {kind} | {one} | {four} |" for kind, (one, four) in found.items()), sep="\n")
    documented = {
        kind: (one, four) for kind, one, four in re.findall(r"^\| (.+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    }
    assert documented == found


@pytest.mark.parametrize("attempts", [1, 4])
def test_a_prefix_is_not_read_again(attempts):
    assert read("token ids", attempts) == attempts
    assert read("text, tokens as the language model's", attempts) <= attempts  # what attempts share is read once
    whole = read("encoder", attempts)
    for kind in (
        "text, tokens that merge",
        "text, a chat template that closes with 7 tokens",
        "steps, a separator of 2 tokens",
    ):
        assert read(kind, attempts) < whole / 4
