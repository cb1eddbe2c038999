"""Decoder classifiers of another tokenizer or template: the rewards of their own pipeline, each token read once."""

import pytest
import torch
from transformers import LlamaForTokenClassification, TextClassificationPipeline
from transformers.convert_slow_tokenizer import bytes_to_unicode

import stars_kernels
from stars_kernels import RewardModel, StarsConfig, StarsError
from stars_kernels.hf.scoring.reader import RowReader
from tests.hf import families
from tests.hf.loops import decode_as_the_sequential_loop
from tests.tiny import EOS, byte_tokenizer, scripted_model, spelling_model, text_model, tiny_config, tiny_reward_model

LETTERS = "abc é"  # é is two bytes, which a segment's end may part
MERGES = [("a", "b"), ("ab", "c"), ("c", "a"), ("b", "c"), ("a", "a"), ("Ġ", "a"), ("Ã", "©"), ("ca", "b")]
SET = dict(seed=1, reward_threshold=2.0, beta=1.0, max_new_tokens=24, segment_size=4, max_attempts=6, progress=False)
SET |= dict(wave=99)  # all in one: what is read follows from what is sampled
CHAT = [{"role": "user", "content": "bca?"}]
LM_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
RM_TEMPLATE = "{% for m in messages %}({{ m.role }}: {{ m.content }}){% endfor %} done."
THINKING = LM_TEMPLATE.replace("[assistant]{% endif", "[assistant]<think>\n{% endif")


def shouting(prompt, answer):
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return f"Q: {asked.upper()} A: {answer}!"


OTHER_IDS, MERGING = byte_tokenizer(reverse=True), byte_tokenizer(merges=MERGES)
KINDS = {  # tokenizer and template of the reward model, and the text that it should read
    "same size, other ids": (OTHER_IDS, None, lambda prompt, answer: prompt + answer),
    "re-tokenisation": (MERGING, None, lambda prompt, answer: prompt + answer),
    "format": (byte_tokenizer(), "<{prompt}|{answer}>", lambda prompt, answer: f"<{prompt}|{answer}>"),
    "function": (MERGING, shouting, shouting),
}
PROMPTS = ["ab", "cab bca é"]


@pytest.fixture(scope="module")
def lm():
    return spelling_model(LETTERS)


@pytest.fixture(scope="module")
def rm():
    return tiny_reward_model(vocab_size=300)


def text_of(ids):
    """An answer's text, by means that the package does not share."""
    byte_of = {name: byte for byte, name in bytes_to_unicode().items()}
    names = byte_tokenizer().convert_ids_to_tokens([i for i in ids if i != EOS])
    return bytes(byte_of[name] for name in names).decode(errors="replace").rstrip("\ufffd")


def reward_of(rm, tokenizer, text):
    return rm(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0].item()


@pytest.mark.parametrize("kind", KINDS)
def test_decode_is_the_sequential_algorithm(lm, rm, kind):
    tokenizer, template, whole = KINDS[kind]

    def reward(prompt, answer):
        return reward_of(rm, tokenizer, whole(text_of(prompt), text_of(answer)))

    config = StarsConfig(**SET)
    every, _ = decode_as_the_sequential_loop(lm, RewardModel(rm, tokenizer, template), reward, PROMPTS, config)
    for outputs in every:
        for output, prompt in zip(outputs, PROMPTS, strict=True):
            text = whole(prompt, output.text)
            assert output.reward == pytest.approx(reward_of(rm, tokenizer, text), abs=1e-9)
            assert output.prompt_reward == pytest.approx(reward_of(rm, tokenizer, whole(prompt, "")), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_are_the_pipelines(lm, rm, kind):
    tokenizer, template, whole = KINDS[kind]
    pipeline = TextClassificationPipeline(model=rm, tokenizer=tokenizer, function_to_apply="none")
    output = stars_kernels.decode(lm, RewardModel(rm, tokenizer, template), "cab", tokenizer=byte_tokenizer(), **SET)
    assert output.reward == pytest.approx(pipeline(whole("cab", output.text))[0]["score"], abs=1e-6)


@pytest.fixture
def texts_read(monkeypatch):
    """The rows of every `RowReader.read`, with the prompt of each."""
    seen = []
    real = RowReader.read

    def read(self, numbers):
        seen.append([(self.slots[number], self.rows[number]) for number in numbers])
        return real(self, numbers)

    monkeypatch.setattr(RowReader, "read", read)
    return seen


def test_re_tokenisation_changes_earlier_tokens_and_little_is_read_again(rm, texts_read):
    settings = dict(SET, max_new_tokens=60, width=3, seed=4)
    letters = spelling_model("abc", end=False)
    output = stars_kernels.decode(letters, RewardModel(rm, MERGING), "bc", tokenizer=byte_tokenizer(), **settings)
    changed, accepted = 0, ""
    for segment in range(len(output.segments)):
        end = sum(s.length for s in output.segments[: segment + 1])
        before, accepted = MERGING("bc" + accepted)["input_ids"], text_of(output.token_ids[:end])
        changed += MERGING("bc" + accepted)["input_ids"][: len(before)] != before
    assert changed >= 3
    whole = sum(len(ids) for rows in texts_read for _, ids in rows)
    print(f"RM tokens per accepted token: {output.counts.rm_scored / 60:.2f}, of whole texts {whole / 60:.2f}")
    assert output.counts.rm_scored < whole / 3


def test_each_accepted_token_is_read_once(rm):
    """With the same tokens under other ids, nothing but candidates is read: as on the path of shared ids."""
    settings = dict(SET, width=3, tokenizer=byte_tokenizer())
    letters = spelling_model("abc", end=False)  # no half characters
    ids = stars_kernels.decode(letters, tiny_reward_model(), "ab", **settings)
    text = stars_kernels.decode(letters, RewardModel(rm, OTHER_IDS), "ab", **settings)
    assert ids.counts.rm_scored == 2 + ids.counts.sampled
    fallbacks = sum(s.outcome == "fallback" for s in text.segments)
    read_again = text.counts.rm_scored - 2 - text.counts.sampled
    assert read_again <= SET["segment_size"] * fallbacks


def test_batch_mates_are_read_apart(rm):
    """What each prompt costs does not depend on the prompts beside it, nor on which attempt is chosen."""
    letters, settings = spelling_model("abc", end=False), dict(SET, width=4, tokenizer=byte_tokenizer(), seed=2)
    prompts, ids = ["ab", "ab", "cab"], [0, 1, 2]
    described = RewardModel(rm, OTHER_IDS)
    together = stars_kernels.decode(letters, described, prompts, request_ids=ids, **settings)
    alone = [
        stars_kernels.decode(letters, described, prompt, request_ids=i, **settings)
        for prompt, i in zip(prompts, ids, strict=True)
    ]
    assert [o.counts for o in together] == [o.counts for o in alone]
    chosen = [s.chosen % 4 for o in together for s in o.segments]
    assert len(set(chosen)) > 2


def test_the_slots_and_suffixes_grow(lm, rm):
    """A template that writes many tokens for each of the model's."""
    rm = tiny_reward_model(vocab_size=300, max_position_embeddings=4096)

    def verbose(prompt, answer):
        return prompt + "".join(c * 40 for c in answer)

    settings = dict(SET, tokenizer=byte_tokenizer(), request_ids=[0, 1])
    outputs = [
        stars_kernels.decode(lm, RewardModel(rm, MERGING, verbose), PROMPTS, width=width, **settings)
        for width in (1, 5)
    ]
    assert [o.token_ids for o in outputs[0]] == [o.token_ids for o in outputs[1]]
    for output, prompt in zip(outputs[1], PROMPTS, strict=True):
        assert output.reward == pytest.approx(reward_of(rm, MERGING, verbose(prompt, output.text)), abs=1e-9)


def test_a_chat_is_read_through_the_reward_models_own_template(lm, rm):
    """Closing tokens are scored and rolled back; the answer is the last turn."""
    tokenizer = byte_tokenizer(RM_TEMPLATE, merges=MERGES)
    settings = dict(SET, tokenizer=byte_tokenizer(LM_TEMPLATE))
    outputs = [stars_kernels.decode(lm, RewardModel(rm, tokenizer), CHAT, width=w, **settings) for w in (1, 5)]
    assert outputs[0].token_ids == outputs[1].token_ids
    text = f"(user: bca?)(assistant: {outputs[0].text}) done."
    assert outputs[0].reward == pytest.approx(reward_of(rm, tokenizer, text), abs=1e-9)
    text = "(user: bca?)(assistant: ) done."
    assert outputs[0].prompt_reward == pytest.approx(reward_of(rm, tokenizer, text), abs=1e-9)


def test_a_template_may_write_the_bos(lm, rm):
    """No second one is added to it, and the tokenizer's own is added where none is written."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(reverse=True)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    settings = dict(SET, tokenizer=byte_tokenizer())
    plain, written = (
        stars_kernels.decode(lm, RewardModel(rm, tokenizer, template), "ab", **settings)
        for template in (None, "<s>{prompt}{answer}")
    )
    assert plain.token_ids == written.token_ids and plain.reward == written.reward
    ids = tokenizer("ab" + plain.text)["input_ids"]
    assert ids[0] == bos and plain.reward == pytest.approx(rm(torch.tensor([ids])).logits.item(), abs=1e-9)


def test_what_the_template_thinks_is_part_of_the_answer(lm, rm):
    """The "<think>" that the language model's template puts into the assistant's turn reaches every reader of text."""
    plain, seen = byte_tokenizer(THINKING), []

    def function(prompts, answers):
        seen.extend(zip(prompts, answers, strict=True))
        return [0.0] * len(answers)

    output = stars_kernels.decode(lm, function, CHAT, tokenizer=plain, **SET)
    assert {prompt for prompt, _ in seen} == {"[user]bca?[assistant]"}
    assert seen[0][1] == "<think>\n" and all(answer.startswith("<think>\n") for _, answer in seen)
    assert not output.text.startswith("<think>")

    tokenizer = byte_tokenizer(RM_TEMPLATE, merges=MERGES)
    output = stars_kernels.decode(lm, RewardModel(rm, tokenizer), CHAT, tokenizer=plain, **SET)
    text = f"(user: bca?)(assistant: <think>\n{output.text}) done."
    assert output.reward == pytest.approx(reward_of(rm, tokenizer, text), abs=1e-9)

    output = stars_kernels.decode(lm, RewardModel(rm, MERGING), CHAT, tokenizer=plain, **SET)
    text = f"[user]bca?[assistant]<think>\n{output.text}"
    assert output.reward == pytest.approx(reward_of(rm, MERGING, text), abs=1e-9)


def test_half_a_character_is_not_read(rm, texts_read):
    """é is written in two tokens; the reward model reads it when it is whole."""
    tokenizer = byte_tokenizer()
    writer = text_model("xéy", tokenizer)
    settings = dict(SET, segment_size=1, max_new_tokens=4, tokenizer=tokenizer, reward_threshold=-99.0)
    output = stars_kernels.decode(writer, RewardModel(rm, MERGING), "ab", width=1, **settings)
    assert output.text == "xéy" and len(output.segments) == 4
    read = [MERGING.decode(ids) for rows in texts_read for _, ids in rows]
    assert read == ["ab", "abx", "abx", "abxé", "abxéy"]


@pytest.mark.parametrize("kind", KINDS)
def test_eos_as_the_first_token(rm, kind):
    tokenizer, template, whole = KINDS[kind]
    ending = scripted_model({(): EOS})
    output = stars_kernels.decode(ending, RewardModel(rm, tokenizer, template), "a", tokenizer=byte_tokenizer(), **SET)
    assert (output.token_ids, output.text, output.finish_reason) == ([EOS], "", "eos")
    assert output.reward == pytest.approx(reward_of(rm, tokenizer, whole("a", "")), abs=1e-9)


def test_where_the_reward_is_read_when_pad_is_eos(lm):
    """At the last token, EOS included; transformers skips what equals the pad token."""
    unpadded, padded = tiny_reward_model(), tiny_reward_model()
    padded.config.pad_token_id = EOS
    output = stars_kernels.decode(scripted_model({(): EOS}), padded, "a", tokenizer=byte_tokenizer(), **SET)
    ids = byte_tokenizer()("a")["input_ids"]
    at_eos = unpadded(torch.tensor([[*ids, EOS]])).logits.item()
    before = unpadded(torch.tensor([ids])).logits.item()
    assert output.reward == pytest.approx(at_eos, abs=1e-9) and abs(at_eos - before) > 1e-3
    assert padded(torch.tensor([[*ids, EOS]])).logits.item() == pytest.approx(before, abs=1e-9)
    # Through text there is no EOS of the language model to read.
    read = stars_kernels.decode(
        scripted_model({(): EOS}), RewardModel(padded, template="{prompt}{answer}"), "a", tokenizer=byte_tokenizer(),
        **SET,
    )  # fmt: skip
    assert read.reward == pytest.approx(before, abs=1e-9)


def test_the_reward_models_context_limit_names_the_row(lm):
    short = tiny_reward_model(vocab_size=300, max_position_embeddings=20)
    settings = dict(SET, tokenizer=byte_tokenizer(), eos_token_id=(), batch_size=2)
    with pytest.raises(StarsError) as failed:
        stars_kernels.decode(lm, RewardModel(short, OTHER_IDS), ["ab", "a" * 21], **settings)
    late, early = (str(result) for result in failed.value.results)
    assert "the reward model failed: ValueError: prompt and answer are 2" in late
    assert "of the reward model's tokens, more than its context limit of 20" in late and "segment 4" in late
    assert "failed on the empty answer: ValueError: prompt and answer are 21 of the reward model's" in early


def test_a_template_that_fails_for_one_prompt(lm, rm):
    def template(prompt, answer):
        if prompt == "b":
            raise KeyError("no such prompt")
        return 3 if prompt == "c" else prompt + answer

    with pytest.raises(StarsError) as failed:
        stars_kernels.decode(lm, RewardModel(rm, MERGING, template), ["a", "b", "c"], tokenizer=byte_tokenizer(), **SET)
    fine, *broken = failed.value.results
    assert fine.token_ids
    assert "KeyError: 'no such prompt'" in str(broken[0])
    assert "TypeError: the template returned int 3, expected a string" in str(broken[1])


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt2", "bloom", "deepseek_v3"])
def test_other_families_read_text(lm, family):
    """Windows, soft-caps, learned positions, gathered rows, latent attention."""
    rm = families.tiny_reward(family)
    settings = dict(SET, tokenizer=byte_tokenizer(), request_ids=[0, 1])
    outputs = [
        stars_kernels.decode(lm, RewardModel(rm, OTHER_IDS, label=0), PROMPTS, width=w, **settings) for w in (1, 5)
    ]
    assert [o.token_ids for o in outputs[0]] == [o.token_ids for o in outputs[1]]
    for output, prompt in zip(outputs[1], PROMPTS, strict=True):
        own = reward_of(rm, OTHER_IDS, prompt + output.text)
        assert output.reward == pytest.approx(own, abs=1e-9 + families.tolerance(family))


def test_states_cannot_be_cut_back(lm):
    rm = families.tiny_reward("qwen3_next")
    with pytest.raises(
        ValueError, match=r"has states, which cannot be cut back .* expected a model of attention alone"
    ):
        stars_kernels.decode(lm, RewardModel(rm, OTHER_IDS, label=0), "ab", tokenizer=byte_tokenizer(), **SET)


def test_same_tokens_are_read_as_ids(lm):
    """The language model's tokens under the same ids, and more of them, need no text."""
    larger, tokenizer = tiny_reward_model(vocab_size=300), byte_tokenizer()
    tokenizer.add_tokens(["<pad>"])
    settings = dict(SET, tokenizer=byte_tokenizer(), eos_token_id=())
    output = stars_kernels.decode(lm, RewardModel(larger, tokenizer), [1, 2], **settings)
    own = larger(torch.tensor([[1, 2, *output.token_ids]])).logits.item()
    assert output.reward == pytest.approx(own, abs=1e-9)
    assert output.counts.rm_scored == 2 + output.counts.sampled


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(lm, rm):
    """But for its pad token, which is not read."""
    tokenizer, settings = byte_tokenizer(reverse=True), dict(SET, tokenizer=byte_tokenizer(), max_new_tokens=4)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens([f"<{i}>" for i in range(2)])  # ids 259 and 260
    small = tiny_reward_model(vocab_size=260)
    steps = LlamaForTokenClassification(tiny_config(num_labels=2)).double()
    for described in (
        RewardModel(small, tokenizer),
        RewardModel(steps, tokenizer, label=1),
    ):
        with pytest.raises(ValueError, match="its tokenizer has ids up to 260, but it has 260 embeddings"):
            stars_kernels.decode(lm, described, "ab", **settings)
    padded = byte_tokenizer(reverse=True)
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert padded.pad_token_id == 258
    no_pad = tiny_reward_model(vocab_size=258)
    assert stars_kernels.decode(lm, RewardModel(no_pad, padded), "ab", **settings).token_ids


def test_an_answer_only_template(lm, rm):
    """The empty answer needs a token: of the template, or a special one."""
    settings = dict(SET, tokenizer=byte_tokenizer())
    with pytest.raises(RuntimeError, match=r"failed on the empty answer: .* no tokens for the reward model"):
        stars_kernels.decode(lm, RewardModel(rm, OTHER_IDS, "{answer}"), "ab", **settings)
    output = stars_kernels.decode(lm, RewardModel(rm, OTHER_IDS, "\n{answer}"), "ab", **settings)
    assert output.reward == pytest.approx(reward_of(rm, OTHER_IDS, "\n" + output.text), abs=1e-9)


def test_without_its_own_tokenizer_it_reads_text_with_the_language_models(lm):
    same_size = tiny_reward_model()
    output = stars_kernels.decode(
        lm, RewardModel(same_size, template="{prompt}|{answer}"), "ab", tokenizer=byte_tokenizer(), **SET
    )
    assert output.reward == pytest.approx(reward_of(same_size, byte_tokenizer(), f"ab|{output.text}"), abs=1e-9)


SAID = ["stars-kernels-answer", "alpha", "omega", "[assistant]", "alphaomega stars-kernels-answer [assistant]<think>"]


@pytest.mark.parametrize("where", ["user", "system", "template"])
@pytest.mark.parametrize("words", SAID)
def test_no_words_of_a_chat_are_taken_for_the_answers_place(lm, rm, where, words):
    """Whatever the messages or the template say, the answer starts where the assistant's turn does."""
    template = f"{words} {THINKING}" if where == "template" else THINKING
    chat = [
        {"role": "system", "content": f"be {words} kind" if where == "system" else "be kind"},
        {"role": "user", "content": f"why {words}, c?" if where == "user" else "why, c?"},
    ]
    asked = "".join(f"[{message['role']}]{message['content']}" for message in chat) + "[assistant]"
    asked = f"{words} {asked}" if where == "template" else asked
    seen = []

    def function(prompts, answers):
        seen.extend(zip(prompts, answers, strict=True))
        return [0.0] * len(answers)

    plain = byte_tokenizer(template)
    output = stars_kernels.decode(lm, function, chat, tokenizer=plain, **SET)
    assert {prompt for prompt, _ in seen} == {asked}
    assert seen[0][1] == "<think>\n" and all(answer.startswith("<think>\n") for _, answer in seen)

    output = stars_kernels.decode(lm, RewardModel(rm, MERGING), chat, tokenizer=plain, **SET)
    assert output.reward == pytest.approx(reward_of(rm, MERGING, f"{asked}<think>\n{output.text}"), abs=1e-9)


@pytest.mark.parametrize("shown", ["nothing", "{{ m.content | upper }}"])
def test_a_chat_template_that_does_not_show_the_answer_is_refused(lm, rm, shown):
    hiding = "{% for m in messages %}" + shown + "{% endfor %}"
    with pytest.raises(RuntimeError, match="the chat template does not show what an assistant's turn says"):
        stars_kernels.decode(lm, RewardModel(rm, MERGING), CHAT, tokenizer=byte_tokenizer(hiding), **SET)


@pytest.mark.parametrize("template", ["{prompt}", "stars-kernels-answer", "alpha omega", "{answer:.0}"])
def test_a_format_string_without_the_answer_is_refused(rm, template):
    with pytest.raises(ValueError, match=r"expected a format string that has \{answer\}"):
        RewardModel(rm, template=template)
