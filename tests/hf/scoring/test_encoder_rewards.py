"""Encoder classifiers: the rewards of transformers' own pipeline on (prompt, answer), batched."""

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, TextClassificationPipeline

import stars_kernels
from stars_kernels import RewardModel, StarsConfig, StarsError
from stars_kernels.hf.loading.reward_model import ENCODERS
from tests.hf.loops import decode_as_the_sequential_loop
from tests.hf.scoring.test_text_rewards import text_of
from tests.tiny import EOS, byte_tokenizer, scripted_model, spelling_model

SET = dict(seed=1, reward_threshold=0.5, beta=0.5, max_new_tokens=16, segment_size=4, max_attempts=6, progress=False)
PROMPTS = ["ab", "cab bca é"]


def pair_tokenizer():
    """Other ids than the language model's, and <s> prompt </s> answer </s> with types 0 and 1; no pad token."""
    tokenizer = byte_tokenizer(reverse=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def encoder(name="BertForSequenceClassification", dtype=torch.float64, **changes):
    """A tiny random encoder with rewards that are not all alike."""
    kind = getattr(transformers, name)
    sizes = dict(
        vocab_size=260, hidden_size=24, dim=24, intermediate_size=48, hidden_dim=48, num_hidden_layers=2, n_layers=2,
        num_attention_heads=4, n_heads=4, max_position_embeddings=96, type_vocab_size=2, num_labels=1, pad_token_id=1,
        initializer_range=0.4, embedding_size=24, bos_token_id=256, eos_token_id=257, cls_token_id=256,
        sep_token_id=257, relative_attention=True, pos_att_type=["p2c", "c2p"],
    )  # fmt: skip
    torch.manual_seed(2)
    return kind(kind.config_class(**{**sizes, **changes})).to(dtype).eval()


@pytest.fixture(scope="module")
def lm():
    return spelling_model("abc é")


@pytest.fixture(scope="module")
def tokenizer():
    return pair_tokenizer()


def inputs_for(rm, tokenizer):
    """The tokenizer, with types of tokens only where the model takes them."""
    if "token_type_ids" not in rm.forward.__code__.co_varnames or rm.config.model_type.endswith("roberta"):
        tokenizer = pair_tokenizer()
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


@pytest.mark.parametrize("name", ENCODERS)
def test_rewards_are_the_pipelines(lm, tokenizer, name):
    rm = encoder(name)
    tokenizer = inputs_for(rm, tokenizer)
    pipeline = TextClassificationPipeline(model=rm, tokenizer=tokenizer, function_to_apply="none")
    settings = dict(SET, tokenizer=byte_tokenizer(), width=5, request_ids=[0, 1])
    outputs = stars_kernels.decode(lm, RewardModel(rm, tokenizer), PROMPTS, **settings)
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        for reward, answer in ((output.prompt_reward, ""), (output.reward, output.text)):
            own = pipeline({"text": prompt, "text_pair": answer})["score"]
            assert reward == pytest.approx(own, abs=1e-5)
    assert len({round(reward, 6) for s in outputs[0].segments for reward in s.rewards}) > 1
    single = encoder(name, torch.float32)  # packed
    output = stars_kernels.decode(lm, RewardModel(single, tokenizer), "ab", **dict(settings, request_ids=None))
    pipeline = TextClassificationPipeline(model=single, tokenizer=tokenizer, function_to_apply="none")
    own = pipeline({"text": "ab", "text_pair": output.text})["score"]
    assert output.reward == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize("template", [None, "{answer} to {prompt}"])
def test_decode_is_the_sequential_algorithm(lm, tokenizer, template):
    rm = encoder()

    def reward(prompt, answer):
        prompt, answer = text_of(prompt), text_of(answer)
        encoded = tokenizer(prompt, answer) if template is None else tokenizer(f"{answer} to {prompt}")
        return rm(**{name: torch.tensor([ids]) for name, ids in encoded.items()}).logits[0, 0].item()

    config = StarsConfig(**dict(SET, reward_threshold=4.0))
    described = RewardModel(rm, tokenizer, template)
    _, attempts = decode_as_the_sequential_loop(lm, described, reward, PROMPTS, config)
    assert max(map(max, attempts)) > 1


def test_whole_texts_are_counted(tokenizer):
    settings = dict(SET, tokenizer=byte_tokenizer(), width=1)
    output = stars_kernels.decode(spelling_model("abc", end=False), RewardModel(encoder(), tokenizer), "ab", **settings)
    around, before = len("ab") + 3, 0  # prompt and special tokens
    read = around - 1  # an empty text is no second one to a tokenizer
    for segment in output.segments:
        read += sum(around + before + length for length in segment.lengths)
        before += segment.length
    assert output.counts.rm_scored == read
    print(f"RM tokens per accepted token: {output.counts.rm_scored / len(output.token_ids):.1f}")


def test_eos_as_the_first_token(tokenizer):
    rm = encoder()
    output = stars_kernels.decode(
        scripted_model({(): EOS}), RewardModel(rm, tokenizer), "a", tokenizer=byte_tokenizer(), **SET
    )
    own = rm(**tokenizer("a", "", return_tensors="pt")).logits.item()
    assert (output.text, output.finish_reason) == ("", "eos") and output.reward == pytest.approx(own, abs=1e-9)


def test_one_of_several_labels(lm, tokenizer):
    rm = encoder(num_labels=3)
    output = stars_kernels.decode(lm, RewardModel(rm, tokenizer, label=2), "ab", tokenizer=byte_tokenizer(), **SET)
    own = rm(**tokenizer("ab", output.text, return_tensors="pt")).logits[0, 2].item()
    assert output.reward == pytest.approx(own, abs=1e-9)
    with pytest.raises(ValueError, match="has 3 labels, expected 1; say which one is the reward"):
        stars_kernels.decode(lm, RewardModel(rm, tokenizer), "ab", tokenizer=byte_tokenizer(), **SET)


@pytest.mark.parametrize(("name", "limit"), [("Bert", 30), ("Roberta", 28)])
def test_the_limit_names_the_row(tokenizer, name, limit):
    """RoBERTa's positions start behind its padding index."""
    lm = spelling_model("abc", end=False)
    rm = encoder(f"{name}ForSequenceClassification", max_position_embeddings=30)
    settings = dict(SET, tokenizer=byte_tokenizer())
    tokenizer = inputs_for(rm, tokenizer)
    fits, too_long = "a" * (limit - 3 - 16), "a" * (limit - 1)
    assert stars_kernels.decode(lm, RewardModel(rm, tokenizer), fits, **settings).finish_reason == "length"
    with pytest.raises(StarsError, match=f"are {limit + 1} of the reward model's tokens, .* context limit of {limit}"):
        stars_kernels.decode(lm, RewardModel(rm, tokenizer), [too_long], **settings)


def test_it_needs_both_tokenizers_and_no_steps(lm, tokenizer):
    rm = encoder()
    with pytest.raises(ValueError, match=r"has no tokenizer, without which it reads no text: pass RewardModel"):
        stars_kernels.decode(lm, rm, "ab", tokenizer=byte_tokenizer(), **SET)
    with pytest.raises(ValueError, match="reads text, which needs the language model's tokenizer: pass tokenizer="):
        stars_kernels.decode(lm, RewardModel(rm, tokenizer), [1], **SET)
    with pytest.raises(ValueError, match="reduce is given, but reward_model is an encoder, which takes none"):
        stars_kernels.decode(lm, RewardModel(rm, tokenizer, reduce="mean"), [1], tokenizer=tokenizer, **SET)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(lm, tokenizer):
    """Ids up to 257."""
    with pytest.raises(ValueError, match=r"BertForSequenceClassification: its tokenizer has ids up to 257, .* 200 emb"):
        stars_kernels.decode(
            lm, RewardModel(encoder(vocab_size=200), tokenizer), "ab", tokenizer=byte_tokenizer(), **SET
        )


def test_from_a_folder(tmp_path, lm, tokenizer):
    rm = encoder()
    rm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = dict(SET, tokenizer=byte_tokenizer())
    output = stars_kernels.decode(lm, tmp_path, "ab", **settings)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)  # without types of tokens, which are not saved
    assert output.token_ids == stars_kernels.decode(lm, RewardModel(rm, tokenizer), "ab", **settings).token_ids
    headless = {name: weight for name, weight in rm.state_dict().items() if not name.startswith("classifier")}
    rm.save_pretrained(tmp_path, state_dict=headless)
    with pytest.raises(ValueError, match=r"its head classifier\.bias is not in the checkpoint"):
        stars_kernels.decode(lm, tmp_path, "ab", **settings)


def test_the_model_is_left_alone(lm, tokenizer):
    rm = encoder().train()
    settings = dict(SET, tokenizer=byte_tokenizer())
    output = stars_kernels.decode(lm, RewardModel(rm, tokenizer), "ab", **settings)
    assert rm.training
    own = rm.eval()(**tokenizer("ab", output.text, return_tensors="pt")).logits.item()
    assert output.reward == pytest.approx(own, abs=1e-9)
