"""Process reward models: each step's score as the model gives it on the same closed text."""

import math

import pytest
import torch
import transformers
from transformers import LlamaForTokenClassification

import stars_kernels
from stars_kernels import RewardModel, StarsConfig
from stars_kernels.hf.loading.reward_model import PROCESS_MODELS
from tests.hf import families
from tests.hf.loops import decode_as_the_sequential_loop
from tests.hf.scoring.test_text_rewards import CHAT, LM_TEMPLATE, MERGES, RM_TEMPLATE, THINKING, text_of
from tests.tiny import EOS, byte_tokenizer, scripted_model, spelling_model, tiny_config

SET = dict(seed=1, reward_threshold=0.7, beta=0.1, max_new_tokens=24, segment_size=4, max_attempts=6, progress=False)
MERGING = byte_tokenizer(merges=[*MERGES, ("Ċ", "Ċ")])
REDUCED = {"min": min, "mean": lambda s: sum(s) / len(s), "prod": math.prod, "last": lambda s: s[-1]}
PROMPTS = ["ab", "ca\nb"]


@pytest.fixture(scope="module")
def lm():
    return spelling_model("ac\n", end=False)


@pytest.fixture(scope="module")
def rm():
    return process_model()


def process_model(**changes):
    torch.manual_seed(3)
    settings = dict(vocab_size=300, num_labels=2, initializer_range=0.3)
    return LlamaForTokenClassification(tiny_config(**{**settings, **changes})).double().eval()


def closed(tokenizer, prompt, answer, step):
    """Token ids of prompt, step, separator, step, separator ...; and where the separators end."""
    ids, ends = tokenizer(prompt)["input_ids"], []
    for part in [part for part in answer.split(step) if part] or [""]:
        ids = ids + tokenizer(part)["input_ids"] + tokenizer(step)["input_ids"]
        ends.append(len(ids) - 1)
    return ids, ends


def steps_of(rm, tokenizer, prompt, answer, step, label=1):
    ids, ends = closed(tokenizer, prompt, answer, step)
    return rm(torch.tensor([ids])).logits[0, ends].softmax(-1)[:, label].tolist()


@pytest.mark.parametrize("reduce", REDUCED)
@pytest.mark.parametrize("step", ["\n", "\n\n"], ids=repr)
def test_decode_is_the_sequential_algorithm(lm, rm, reduce, step):
    counts = []

    def reward(prompt, answer):
        steps = steps_of(rm, MERGING, text_of(prompt), text_of(answer), step)
        counts.append(len(steps))
        return REDUCED[reduce](steps)

    config = StarsConfig(**dict(SET, reward_threshold=0.9))
    described = RewardModel(rm, MERGING, label=1, step=step, reduce=reduce)
    every, attempts = decode_as_the_sequential_loop(lm, described, reward, PROMPTS, config)
    assert max(counts) > 1 and max(map(max, attempts)) > 1
    for outputs in every:
        for output, prompt in zip(outputs, PROMPTS, strict=True):
            own = REDUCED[reduce](steps_of(rm, MERGING, prompt, output.text, step))
            assert output.reward == pytest.approx(own, abs=1e-9)


@pytest.mark.parametrize("kind", PROCESS_MODELS)
def test_every_family(lm, kind):
    torch.manual_seed(3)
    kind = getattr(transformers, kind)
    rm = families.finished(kind(families.tiny_config(kind.config_class.model_type, num_labels=2)))
    tokenizer = byte_tokenizer()
    described = RewardModel(rm, tokenizer, label=1, step="\n", reduce="prod")
    output = stars_kernels.decode(lm, described, "ab", tokenizer=tokenizer, **dict(SET, max_new_tokens=12))
    own = math.prod(steps_of(rm, tokenizer, "ab", output.text, "\n"))
    assert output.reward == pytest.approx(own, abs=families.tolerance(kind.config_class.model_type))


def test_the_separator_is_rolled_back_and_no_step_read_twice(lm, rm):
    settings = dict(SET, max_new_tokens=60, width=3, tokenizer=byte_tokenizer(), max_attempts=20)
    output = stars_kernels.decode(lm, RewardModel(rm, MERGING, label=1, step="\n"), "ab", **settings)
    assert output.text.count("\n") > 5
    whole, before = 0, ""
    for i, segment in enumerate(output.segments):
        before = output.text[: sum(s.length for s in output.segments[: i + 1])]
        whole += sum(segment.widths) * len(closed(MERGING, "ab", before, "\n")[0])
    print(f"RM tokens per accepted token: {output.counts.rm_scored / 60:.2f}, of whole texts {whole / 60:.2f}")
    assert output.counts.rm_scored < whole / 3


def test_the_language_models_tokenizer_serves_where_its_ids_do(lm):
    """With a separator of three tokens, read at the last."""
    rm = process_model(vocab_size=260)
    output = stars_kernels.decode(lm, RewardModel(rm, label=0, step="\na\n"), "ab", tokenizer=byte_tokenizer(), **SET)
    own = min(steps_of(rm, byte_tokenizer(), "ab", output.text, "\na\n", label=0))
    assert output.reward == pytest.approx(own, abs=1e-9)


def test_a_chat_and_what_its_template_thinks(lm, rm):
    tokenizer = byte_tokenizer(
        "{% for m in messages %}({{ m.role }}: {{ m.content }}){% endfor %} done.", merges=[*MERGES, ("Ċ", "Ċ")]
    )
    described = RewardModel(rm, tokenizer, label=1, step="\n\n", reduce="mean")
    output = stars_kernels.decode(lm, described, CHAT, tokenizer=byte_tokenizer(THINKING), **SET)
    steps = steps_of(rm, tokenizer, "(user: bca?)(assistant: ", "<think>\n" + output.text, "\n\n")
    assert output.reward == pytest.approx(sum(steps) / len(steps), abs=1e-9)


def test_eos_as_the_first_token(rm):
    described = RewardModel(rm, MERGING, label=1)
    output = stars_kernels.decode(scripted_model({(): EOS}), described, "a", tokenizer=byte_tokenizer(), **SET)
    (own,) = steps_of(rm, MERGING, "a", "", "\n\n")
    assert (output.text, output.finish_reason) == ("", "eos") and output.reward == pytest.approx(own, abs=1e-9)
    assert output.prompt_reward == output.reward  # the empty answer is one empty step


def test_from_a_folder(tmp_path, lm, rm):
    rm.save_pretrained(tmp_path)
    MERGING.save_pretrained(tmp_path)
    settings = dict(SET, tokenizer=byte_tokenizer())
    output = stars_kernels.decode(lm, RewardModel(tmp_path, label=1), "ab", **settings)
    assert output.token_ids == stars_kernels.decode(lm, RewardModel(rm, MERGING, label=1), "ab", **settings).token_ids


def test_what_it_cannot_do_is_refused(lm, rm):
    settings = dict(SET, tokenizer=byte_tokenizer())
    for described, message in (
        (RewardModel(rm, MERGING), "has 2 labels, expected 1; say which one is the reward"),
        (RewardModel(rm, MERGING, label=2), "label is 2, but reward_model LlamaForTokenClassification has 2 labels"),
        (RewardModel(process_model(num_labels=1), MERGING), "has 1 label, whose probability is always 1"),
        (RewardModel(rm, MERGING, "{answer}", label=1), "template is given, but reward_model is a token classifier"),
        (RewardModel(rm, label=1), "has a vocabulary of 300 tokens and the language model one of 260"),
    ):
        with pytest.raises(ValueError, match=message):
            stars_kernels.decode(lm, described, "a", **settings)
    with pytest.raises(ValueError, match="reduce is 'max', expected one of min, mean, prod, last"):
        RewardModel(rm, reduce="max")
    with pytest.raises(TypeError, match="step is '', expected a non-empty string"):
        RewardModel(rm, step="")


@pytest.mark.parametrize("words", ["stars-kernels-answer", "alpha", "omega"])
def test_no_words_of_a_chat_are_taken_for_the_answers_place(lm, rm, words):
    tokenizer = byte_tokenizer(RM_TEMPLATE, merges=MERGES)
    chat = [{"role": "user", "content": f"bc {words} a?"}]
    described = RewardModel(rm, tokenizer, label=1, step="\n")
    output = stars_kernels.decode(lm, described, chat, tokenizer=byte_tokenizer(LM_TEMPLATE), **SET)
    prompt = f"(user: bc {words} a?)(assistant: "
    assert output.reward == pytest.approx(min(steps_of(rm, tokenizer, prompt, output.text, "\n")), abs=1e-9)
