"""model.generate(custom_generate=stars_kernels.generate): transformers' habits, and the answers of `decode`."""

import inspect
from dataclasses import fields
from functools import partial
from threading import Thread

import peft
import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForTokenClassification,
    StopStringCriteria,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

import stars_kernels
from stars_kernels import RewardModel, StarsConfig, StarsError
from stars_kernels.hf.generate import OF_TRANSFORMERS, OPTIONS
from stars_kernels.hf.view.layout import cache_argument
from tests.hf.scoring.test_encoder_rewards import encoder
from tests.hf.test_api import text_model
from tests.tiny import EOS, byte_tokenizer, tiny_config, tiny_language_model, tiny_reward_model

STARS = dict(seed=0, reward_threshold=1.0, beta=1.0, segment_size=4)
PROMPTS = [[1, 2, 3], [40], [7, 8, 9, 10, 11, 12, 13, 200]]
EOS_IDS = [EOS, 3, 77, 130]


def generate(model, ids, rm, decoding=stars_kernels.generate, **arguments):
    """model.generate with STARS; settings as in `STARS` unless given."""
    ids = ids if isinstance(ids, torch.Tensor) else torch.tensor(ids)
    settings = {"do_sample": True, "max_new_tokens": 12, **STARS, **arguments}
    return model.generate(ids, custom_generate=decoding, reward_model=rm, **settings)


def left_padded(prompts, pad=0):
    """input_ids and attention_mask, [B, longest]."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def padded(lm, prompts, rm, pad=0, **arguments):
    inputs = left_padded(prompts, pad)
    return generate(lm, inputs["input_ids"], rm, attention_mask=inputs["attention_mask"], **arguments)


def test_every_setting_is_a_keyword_here_or_of_transformers():
    """transformers passes on only what is named, so a setting that is not would be refused as a typo."""
    parameters = inspect.signature(stars_kernels.generate).parameters
    settings = {field.name: field.default for field in fields(StarsConfig)}
    of_generate = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    assert of_generate - {"reward_model", "tokenizer", "streamer", "request_ids"} == settings.keys() - OF_TRANSFORMERS
    assert all(parameters[name].default == settings[name] for name in OPTIONS)
    assert vars(GenerationConfig()).keys() >= OF_TRANSFORMERS
    assert not set(OPTIONS) & vars(GenerationConfig()).keys() - {"stop_strings"}


def test_a_typo_is_caught(lm, rm):
    with pytest.raises(ValueError, match="segment_sise"):
        generate(lm, [[1]], rm, segment_sise=3)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"top_k": 0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"top_k": 0, "top_p": 0.5},
        {"min_p": 0.05, "top_k": 0, "temperature": 1.5},
    ],
)
def test_generate_gives_what_decode_gives(lm, rm, sampling):
    settings = dict(STARS, max_attempts=5, alpha=0.2, accept="soft", width=3)
    sequences = generate(lm, [PROMPTS[0]], rm, **settings, **sampling)
    own = {"top_k": 50, **sampling}  # transformers' default
    output = stars_kernels.decode(lm, rm, PROMPTS[0], max_new_tokens=12, **settings, **own)
    assert sequences.tolist() == [PROMPTS[0] + output.token_ids]
    assert sequences.dtype == torch.int64
    result = generate(lm, [PROMPTS[0]], rm, return_dict_in_generate=True, **settings, **sampling)
    assert result.outputs[0].config.sampling == output.config.sampling


def test_calibration_and_a_drawn_seed(lm, rm):
    result = lm.generate(
        torch.tensor([[1, 2]]),
        do_sample=True,
        max_new_tokens=6,
        custom_generate=stars_kernels.generate,
        reward_model=rm,
        return_dict_in_generate=True,
    )
    (output,) = result.outputs
    assert output.calibration is not None and output.config.seed is not None
    assert stars_kernels.decode(lm, rm, [1, 2], config=output.config).token_ids == output.token_ids


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_left_padded_prompts_get_the_answers_they_get_alone(lm, rm, batch_size):
    settings = dict(eos_token_id=EOS_IDS, pad_token_id=0, max_new_tokens=22)
    sequences = padded(lm, PROMPTS, rm, batch_size=batch_size, **settings)
    alone = [generate(lm, [prompt], rm, **settings)[0, len(prompt) :].tolist() for prompt in PROMPTS]
    decoded = stars_kernels.decode(lm, rm, PROMPTS, top_k=50, max_new_tokens=22, eos_token_id=EOS_IDS, **STARS)
    assert alone == [output.token_ids for output in decoded]
    longest = max(map(len, alone))
    assert len({len(answer) for answer in alone}) > 1
    assert torch.equal(sequences[:, :8], left_padded(PROMPTS)["input_ids"])
    assert sequences[:, 8:].tolist() == [answer + [0] * (longest - len(answer)) for answer in alone]


def test_pads_are_known_by_the_mask_alone(lm, rm):
    """A prompt's own tokens may be the pad token; the model's pad token is the first EOS where none is set."""
    prompts = [[EOS, 5], [9, EOS, EOS, 4]]
    settings = dict(eos_token_id=EOS_IDS, max_new_tokens=22)
    sequences = padded(lm, prompts, rm, pad=EOS, **settings)
    decoded = stars_kernels.decode(lm, rm, prompts, top_k=50, **STARS, **settings)
    for row, output in zip(sequences[:, 4:].tolist(), decoded, strict=True):
        assert row == output.token_ids + [EOS] * (len(row) - len(output.token_ids))
    assert len({len(output.token_ids) for output in decoded}) == 2


def test_eos_as_transformers_means_it(lm, rm):
    free = generate(lm, [[1, 2, 3]], rm, eos_token_id=None)[0, 3:].tolist()
    assert len(free) == 12
    for ids in (free[5], [free[5]], [259, free[5]], torch.tensor([free[5], 259])):
        ended = generate(lm, [[1, 2, 3]], rm, eos_token_id=ids, return_dict_in_generate=True)
        assert ended.sequences[0, 3:].tolist() == free[: free.index(free[5]) + 1]
        assert ended.outputs[0].finish_reason == "eos"


def test_lengths_as_transformers_means_them(lm, rm):
    expected = generate(lm, [[1, 2, 3]], rm, max_new_tokens=7)
    assert torch.equal(generate(lm, [[1, 2, 3]], rm, max_new_tokens=None, max_length=10), expected)
    config = GenerationConfig(do_sample=True, max_new_tokens=7, eos_token_id=EOS)
    own = lm.generate(
        torch.tensor([[1, 2, 3]]), config, custom_generate=stars_kernels.generate, reward_model=rm, **STARS
    )
    assert torch.equal(own, expected)


def test_a_prompt_at_the_context_limit(rm):
    lm = tiny_language_model(max_position_embeddings=20)
    result = generate(lm, [list(range(17))], rm, return_dict_in_generate=True)
    assert result.sequences.shape == (1, 20) and result.outputs[0].finish_reason == "context"
    with pytest.raises(ValueError, match="prompt 0: it has 20 tokens, expected less than the context limit of 20"):
        generate(lm, [list(range(20))], rm)
    with pytest.raises(StarsError) as error:  # the other prompt is done
        padded(lm, [[5, 6], list(range(20))], rm, pad_token_id=0)
    assert list(error.value.errors) == [1]
    assert len(error.value.results[0].token_ids) == 12


def test_return_sequences(lm, rm):
    def run(**settings):
        return padded(lm, PROMPTS, rm, pad_token_id=0, return_dict_in_generate=True, **settings)

    one, three = run(), run(num_return_sequences=3)
    assert three.sequences.shape[0] == 9
    assert [o.token_ids for o in three.outputs[::3]] == [o.token_ids for o in one.outputs]
    assert len({tuple(o.token_ids) for o in three.outputs}) == 9
    assert three.outputs[1].request_id == str((one.outputs[0].request_id, 1))
    given = run(num_return_sequences=2, request_ids=["a", 7, "7"])
    assert [o.request_id for o in given.outputs] == ["a", "('a', 1)", 7, "(7, 1)", "7", "('7', 1)"]
    again = stars_kernels.decode(lm, rm, PROMPTS[1], request_ids="(7, 1)", top_k=50, max_new_tokens=12, **STARS)
    assert again.token_ids == given.outputs[3].token_ids
    with pytest.raises(ValueError, match="6 request_ids for 3 prompts"):
        run(num_return_sequences=2, request_ids=list("abcdef"))


def test_equal_prompts_are_different_requests(lm, rm):
    sequences = generate(lm, [[5, 6], [5, 6]], rm)
    assert sequences[0].tolist() != sequences[1].tolist()
    assert torch.equal(sequences[0], generate(lm, [[5, 6]], rm)[0])


def test_what_comes_back_as_a_dictionary(lm, rm):
    result = padded(lm, PROMPTS, rm, pad_token_id=0, return_dict_in_generate=True)
    assert isinstance(result, GenerateDecoderOnlyOutput)
    assert torch.equal(result.sequences, padded(lm, PROMPTS, rm, pad_token_id=0))
    assert result.rewards.tolist() == [output.reward for output in result.outputs]
    assert list(result) == ["sequences", "rewards", "outputs"]
    for prompt, output in zip(PROMPTS, result.outputs, strict=True):
        own = rm(torch.tensor([prompt + output.token_ids])).logits.item()
        assert output.reward == pytest.approx(own, abs=1e-6)


@pytest.mark.parametrize("segment_size", [2, 3, 4, 20])
@pytest.mark.parametrize("how", ["partial", "keyword", "criterion"])
def test_stop_strings_across_segment_borders(rm, segment_size, how):
    tokenizer = byte_tokenizer()
    lm = text_model("abcSTOPxyz", tokenizer)
    decoding, arguments = partial(stars_kernels.generate, tokenizer=tokenizer), {}
    if how == "partial":
        decoding = partial(decoding, stop_strings=["nope", "STOP"])
    elif how == "keyword":
        arguments["stop_strings"] = "STOP"
    else:
        arguments["stopping_criteria"] = [StopStringCriteria(tokenizer, ["STOP", "nope"])]
    ids = tokenizer("!", return_tensors="pt").input_ids
    settings = dict(segment_size=segment_size, max_new_tokens=10, return_dict_in_generate=True)
    result = generate(lm, ids, rm, decoding, **settings, **arguments)
    assert tokenizer.decode(result.sequences[0]) == "!abcSTOP"
    assert (result.outputs[0].text, result.outputs[0].finish_reason) == ("abc", "stop")


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value)

    def end(self):
        self.ended += 1


def test_a_streamer_gets_the_prompt_each_segment_and_the_end(lm, rm):
    streamer = Recorder()
    result = generate(
        lm, [[1, 2, 3]], rm, partial(stars_kernels.generate, streamer=streamer), return_dict_in_generate=True
    )
    prompt, *segments = streamer.puts
    assert prompt.tolist() == [[1, 2, 3]]
    assert [len(tokens) for tokens in segments] == [segment.length for segment in result.outputs[0].segments]
    assert len(segments) > 1 and all(tokens.device.type == "cpu" for tokens in segments)
    assert torch.cat(segments).tolist() == result.outputs[0].token_ids
    assert streamer.ended == 1


def test_a_streamer_hears_of_a_segment_before_the_next_is_decided(lm):
    streamer, asked = Recorder(), []

    def rm(prompts, answers):
        asked.append(len(streamer.puts))
        return [1.0] * len(answers)

    tokenizer = byte_tokenizer()
    generate(lm, [[1, 2, 3]], rm, partial(stars_kernels.generate, streamer=streamer, tokenizer=tokenizer), width=1)
    assert asked == [1, 1, 2, 3]  # the empty answer, then three segments


def test_the_consumer_of_a_streamer_never_hangs(lm, rm):
    tokenizer = byte_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    decoding = partial(stars_kernels.generate, streamer=streamer, tokenizer=tokenizer)
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    outputs = []
    thread = Thread(target=lambda: outputs.append(generate(lm, ids, rm, decoding)))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(outputs[0][0, ids.shape[1] :])
    for arguments in ({"do_sample": False}, {"reward_threshold": float("nan")}):
        failing = Recorder()
        with pytest.raises(ValueError):
            generate(lm, ids, rm, partial(stars_kernels.generate, streamer=failing), **arguments)
        assert failing.ended == 1


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_virtual_tokens_of_peft_are_refused(rm, kind):
    """The callable gets the inner model, which does not know of them."""
    model = peft.get_peft_model(tiny_language_model(), kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).double()
    with pytest.raises(ValueError, match=r"model is a PEFT model with .*, which puts virtual tokens before the prompt"):
        model.generate(
            input_ids=torch.tensor([[1, 2]]), do_sample=True, max_new_tokens=4, custom_generate=stars_kernels.generate,
            reward_model=rm, reward_threshold=1.0, beta=1.0,
        )  # fmt: skip


def test_an_adapter_of_peft(rm):
    torch.manual_seed(5)
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_language_model(), adapter).double().eval()
    for arguments in ({}, {"repetition_penalty": 1.3}):
        sequences = generate(model, torch.tensor([[1, 2, 3]]), rm, **arguments)
        merged = generate(model.get_base_model(), torch.tensor([[1, 2, 3]]), rm, **arguments)
        assert torch.equal(sequences, merged)
        with model.disable_adapter():
            assert not torch.equal(sequences, generate(model, torch.tensor([[1, 2, 3]]), rm, **arguments))


REFUSED = {
    "greedy": ({"do_sample": False}, "greedy_search"),
    "beams": ({"num_beams": 2}, "beam_sample"),
    "group beams": ({"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group_beam_search"),
    "contrastive": ({"do_sample": False, "penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
    "dola": ({"dola_layers": "low"}, "dola_generation"),
    "constraints": ({"num_beams": 2, "do_sample": False, "force_words_ids": [[5]]}, "constrained_beam_search"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
    "guidance": ({"guidance_scale": 1.5}, "guidance_scale needs a second forward"),
    "negative prompt": ({"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[5]])}, "guidance_scale"),
    "encoder penalty": ({"encoder_repetition_penalty": 1.3}, "models with an encoder"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores is True"),
    "logits": ({"output_logits": True, "return_dict_in_generate": True}, "output_logits is True"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    "no reward model": ({"reward_model": None}, "reward_model is missing"),
    "right padding": ({"attention_mask": torch.tensor([[1, 1, 0]])}, "expected left padding"),
    "gaps": ({"attention_mask": torch.tensor([[1, 0, 1]])}, "expected left padding"),
    "positions": ({"position_ids": torch.tensor([[4, 5, 6]])}, "position_ids"),
    "one token left": ({"top_k": 1}, "top_k is 1"),
    "misplaced": ({"generation_config": GenerationConfig(segment_size=3)}, "generation_config holds segment_size"),
    "stop strings": ({"stop_strings": "x"}, r"stop strings need a tokenizer.*functools.partial"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_by_name(lm, rm, case):
    arguments, message = REFUSED[case]
    arguments = {"do_sample": True, "max_new_tokens": 4, "reward_model": rm, **STARS, **arguments}
    with pytest.raises(ValueError, match=message):
        lm.generate(torch.tensor([[1, 2, 3]]), custom_generate=stars_kernels.generate, **arguments)


def test_more_that_is_refused_by_name(lm, rm):
    with pytest.raises(ValueError, match=r"temperature is bound to the callable, expected as an argument of generate"):
        generate(lm, [[1]], rm, partial(stars_kernels.generate, temperature=0.5))
    cache = DynamicCache(config=lm.config)
    lm(torch.tensor([[1, 2]]), **{cache_argument(lm): cache})
    with pytest.raises(ValueError, match=f"^{cache_argument(lm)} holds 2 tokens"):
        generate(lm, [[1, 2, 3]], rm, **{cache_argument(lm): cache})
    with pytest.raises(ValueError, match="inputs_embeds is an input"):
        lm.generate(
            inputs_embeds=lm.get_input_embeddings()(torch.tensor([[1, 2]])),
            do_sample=True, max_new_tokens=4, custom_generate=stars_kernels.generate, reward_model=rm,
        )  # fmt: skip
    other, tokenizer = tiny_reward_model(vocab_size=300), byte_tokenizer(reverse=True)
    steps = LlamaForTokenClassification(tiny_config(num_labels=2)).double()
    for reads_text in (
        lambda prompts, answers: [0.0] * len(answers),
        RewardModel(rm, template="{prompt}{answer}"),
        RewardModel(other, tokenizer),
        RewardModel(steps, label=1),
        [rm, RewardModel(encoder(), tokenizer)],
    ):
        needs = r"needs (a|the language model's) tokenizer.*, and generate\(\) passes none on.*functools\.partial"
        with pytest.raises(ValueError, match=needs):
            generate(lm, [[1]], reads_text, tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match="a streamer for 2 sequences"):
        generate(lm, [[1], [2]], rm, partial(stars_kernels.generate, streamer=Recorder()))
    with pytest.raises(ValueError, match="pass pad_token_id"):
        generate(lm, [[1], [2]], rm, eos_token_id=None)
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        generate(T5ForConditionalGeneration(config), [[1]], rm)


def test_the_model_is_left_alone(rm):
    lm = tiny_language_model()
    before = lm.generate(torch.tensor([[1, 2]]), do_sample=False, max_new_tokens=5)
    generate(lm, [[1, 2]], rm)
    assert torch.equal(lm.generate(torch.tensor([[1, 2]]), do_sample=False, max_new_tokens=5), before)


def test_both_models_in_fp32_with_packed_weights():
    lm, rm = tiny_language_model(torch.float32), tiny_reward_model(torch.float32)
    result = generate(lm, [[1, 2, 3]], rm, return_dict_in_generate=True)
    output = stars_kernels.decode(lm, rm, [1, 2, 3], top_k=50, max_new_tokens=12, **STARS)
    assert result.outputs[0].token_ids == output.token_ids
    assert result.outputs[0].backends == output.backends
