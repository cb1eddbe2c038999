"""Bad input gets a clear error that names the value found, what was expected, the prompt and the segment."""

import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BatchEncoding, BertConfig, BertModel

import stars_kernels
from stars_kernels import RewardModel, StarsConfig, StarsError
from tests.hf import families
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

SET = dict(seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=8, segment_size=4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("reward_threshold", float("nan"), "reward_threshold is nan, expected a finite number"),
        ("reward_threshold", float("inf"), "reward_threshold is inf, expected a finite number"),
        ("beta", 0, "beta is 0, expected a finite number > 0"),
        ("beta", -1.0, "beta is -1.0, expected a finite number > 0"),
        ("alpha", 1.5, r"alpha is 1.5, expected a number in \[0, 1\]"),
        ("alpha", -0.1, r"alpha is -0.1, expected a number in \[0, 1\]"),
        ("max_attempts", 0, "max_attempts is 0, expected an integer >= 1"),
        ("segment_size", 0, "segment_size is 0, expected an integer >= 1"),
        ("max_new_tokens", 0, "max_new_tokens is 0, expected an integer >= 1"),
        ("batch_size", 0, "batch_size is 0, expected an integer >= 1"),
        ("temperature", 0, "temperature is 0, expected 1e-30 to 1e30: at 0 all attempts"),
        ("do_sample", False, "do_sample is False, expected True: without sampling all attempts"),
        ("top_k", 1, "top_k is 1, expected an integer >= 2, or None or 0 for off: with 1 all attempts"),
        ("top_k", 2.5, "top_k is 2.5, expected an integer"),
        ("top_p", 0.0, r"top_p is 0.0, expected in \(0, 1\]"),
        ("min_p", 1.0, r"min_p is 1.0, expected in \[0, 1\)"),
        ("accept", "softly", 'accept is \'softly\', expected "soft" or "hard"'),
        ("width", 0, 'width is 0, expected an integer >= 1 or "auto"'),
        ("seed", 1.5, "seed is 1.5, expected an integer or None"),
        ("eos_token_id", "x", r"eos_token_id is \('x',\), expected an id"),
        ("eos_token_id", -5, "eos_token_id -5 is outside the vocabulary, expected 0 to 259"),
        ("eos_token_id", [3, 260], "eos_token_id 260 is outside the vocabulary, expected 0 to 259"),
        ("progress", "x", "progress is 'x', expected True or False"),
        ("stop_strings", [""], r"stop_strings is \('',\), expected non-empty strings"),
        ("calibration_quantile", 1.0, r"calibration_quantile is 1.0, expected in \(0, 1\)"),
    ],
)
def test_settings(lm, rm, name, value, message):
    with pytest.raises(ValueError, match=message):
        stars_kernels.decode(lm, rm, [1, 2], **{**SET, name: value})


def test_unknown_setting(lm, rm):
    with pytest.raises(TypeError, match="unknown setting 'segment_sise'; did you mean 'segment_size'"):
        stars_kernels.decode(lm, rm, [1, 2], segment_sise=3)
    with pytest.raises(TypeError, match="config is of type list, expected a StarsConfig, a mapping or None"):
        stars_kernels.decode(lm, rm, [1, 2], config=[1])


def test_request_ids(lm, rm):
    with pytest.raises(ValueError, match="request id 'a' is given more than once"):
        stars_kernels.decode(lm, rm, [[1], [2]], request_ids=["a", "a"], **SET)
    with pytest.raises(ValueError, match="1 request_ids for 2 prompts"):
        stars_kernels.decode(lm, rm, [[1], [2]], request_ids=["a"], **SET)
    with pytest.raises(TypeError, match=r"request id 1.5 is of type float, expected int or str"):
        stars_kernels.decode(lm, rm, [[1]], request_ids=[1.5], **SET)
    with pytest.raises(ValueError, match="request id <an integer of 33220 bits> is too large, expected at most"):
        stars_kernels.decode(lm, rm, [[1]], request_ids=[10**10_000], **SET)
    with pytest.raises(TypeError, match="request_ids is of type int, expected a list"):
        stars_kernels.decode(lm, rm, [[1], [2]], request_ids=1, **SET)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[]], "prompt 0: it has no tokens, expected at least one"),
        ([1, 260], "prompt 0: token id 260 is outside the vocabulary, expected 0 to 259"),
        ([-1], "prompt 0: token id -1 is outside the vocabulary"),
        (list(range(160)), "prompt 0: it has 160 tokens, expected less than the context limit of 160"),
        (b"text", "prompt is of type bytes, expected a string"),
        ([b"text"], "prompt 0: it is of type bytes, expected a string"),
        (torch.tensor([[1, 2]]), r"prompt is a tensor of shape \[1, 2\] .*; pass its row \[0\], or its .tolist"),
        ([torch.tensor([[1, 2]])], r"prompt 0: it is a tensor of shape \[1, 2\] .*; pass its row \[0\]"),
        (torch.tensor([1.0]), r"prompt is a tensor of shape \[1\] and torch.float32, expected a string"),
        (np.array([1, 2]), "prompt is of type ndarray, .*; pass its .tolist"),
        ([np.array([1, 2])], "prompt 0: it is of type ndarray, .*; pass its .tolist"),
        (BatchEncoding({"input_ids": [1, 2]}), "prompt is of type BatchEncoding, .*; pass its input_ids"),
        ("text", "prompt 0: it is text, and a model in memory has no tokenizer: pass tokenizer="),
        ([{"role": "user", "content": "hi"}], "and a model in memory has no tokenizer: pass tokenizer="),
    ],
)
def test_prompts(lm, rm, prompt, message):
    with pytest.raises((ValueError, TypeError, StarsError), match=message):
        stars_kernels.decode(lm, rm, prompt, **SET)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"content": "hi"}, "message 1 has role None, expected a string"),
        ({"role": "user"}, "message 1 has content None, expected a string"),
        (
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            r"message 1 has content \[\{.*, expected",
        ),
    ],
)
def test_messages(lm, rm, message, error):
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m['role'] }}{{ m['content'] }}{% endfor %}")
    with pytest.raises(TypeError, match=error):
        stars_kernels.decode(lm, rm, [{"role": "user", "content": "a"}, message], tokenizer=tokenizer, **SET)
    call = {"role": "assistant", "tool_calls": []}
    assert stars_kernels.decode(lm, rm, [call], tokenizer=tokenizer, **SET).token_ids


def test_over_long_for_the_reward_model_alone(lm):
    with pytest.raises(ValueError, match="it has 30 tokens, expected less than the context limit of 30"):
        stars_kernels.decode(lm, tiny_reward_model(max_position_embeddings=30), list(range(30)), **SET)


def test_models_that_are_not_tested_are_refused_by_name(lm, rm):
    bert = BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=260)
    with pytest.raises(ValueError, match="model is a BertModel, not tested with STARS decoding; expected"):
        stars_kernels.decode(BertModel(bert), rm, [1], **SET)
    with pytest.raises(ValueError, match=r"reward_model is a BertModel, .*, or a function of texts"):
        stars_kernels.decode(lm, BertModel(bert), [1], **SET)
    with pytest.raises(TypeError, match="model is of type int, expected a transformers model or a path"):
        stars_kernels.decode(3, rm, [1], **SET)
    with pytest.raises(TypeError, match="reward_model is of type int, expected a reward model or a path"):
        stars_kernels.decode(lm, 3, [1], **SET)
    with pytest.raises(TypeError, match="reward_model is of type int, expected a transformers model or a path"):
        stars_kernels.decode(lm, RewardModel(3), [1], **SET)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_batch_is_refused(lm, rm, kind):
    """Also where it lies in a part of the config, for one type of layers."""
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    said = f"rope_type '{kind}', whose frequencies depend on the longest row"
    with pytest.raises(ValueError, match=said):
        stars_kernels.decode(tiny_language_model(rope_parameters=rope), rm, [1], **SET)
    with pytest.raises(ValueError, match=said):
        stars_kernels.decode(lm, tiny_reward_model(rope_parameters=rope), [1], **SET)
    composed = families.tiny("gemma3")
    composed.config.text_config.rope_parameters = {"full_attention": rope}
    with pytest.raises(ValueError, match=said):
        stars_kernels.decode(composed, rm, [1], **SET)


def test_a_checkpoint_without_its_output_layer_is_refused(tmp_path, rm):
    rm.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model '.*' has no lm_head.weight in its checkpoint, which would be random"):
        stars_kernels.decode(tmp_path, rm, "a", **SET)


def test_a_chat_that_the_assistant_has_begun_to_answer_is_refused(lm, rm):
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="its last message is the assistant's"):
        stars_kernels.decode(lm, rm, chat, tokenizer=tokenizer, **SET)


def test_reward_models(tmp_path, lm, rm):
    with pytest.raises(ValueError, match="has 3 labels, expected 1; say which one is the reward with RewardModel"):
        stars_kernels.decode(lm, tiny_reward_model(num_labels=3), [1], **SET)
    with pytest.raises(ValueError, match=r"label is 1, but reward_model .* has 1 labels, expected 0 to 0"):
        stars_kernels.decode(lm, RewardModel(rm, label=1), [1], **SET)
    with pytest.raises(ValueError, match="has a vocabulary of 300 tokens and the language model one of 260"):
        stars_kernels.decode(lm, tiny_reward_model(vocab_size=300), [1], **SET)
    headless = {name: weight for name, weight in rm.state_dict().items() if not name.startswith("score")}
    rm.save_pretrained(tmp_path / "rm", state_dict=headless)
    newly = "head score.weight is not in the checkpoint and was newly initialised"
    with pytest.raises(ValueError, match=newly):  # by path ...
        stars_kernels.decode(lm, tmp_path / "rm", [1], **SET)
    lm.save_pretrained(tmp_path / "lm")
    loaded = type(rm).from_pretrained(tmp_path / "lm", num_labels=1)
    with pytest.raises(ValueError, match=newly):  # ... and in memory
        stars_kernels.decode(lm, loaded, [1], **SET)


@pytest.mark.parametrize("path", ["/no/such", "./no/such", "../no/such", "~/no/such", "no/such.gguf", Path("no/such")])
def test_a_missing_path_is_named_before_anything_is_loaded(lm, rm, path):
    with pytest.raises(FileNotFoundError, match=f"model is '{path}', which does not exist"):
        stars_kernels.decode(path, rm, "hi", **SET)
    error, known = (
        (ValueError, "a .gguf") if str(path).endswith("gguf") else (FileNotFoundError, "which does not exist")
    )
    for given in (path, RewardModel(path)):
        with pytest.raises(error, match=f"reward_model is '{path}', .*{known}"):
            stars_kernels.decode("some/hub-name", given, "hi", **SET)


def test_a_home_folder_is_found(tmp_path, monkeypatch, lm, rm):
    lm.save_pretrained(tmp_path / "lm")
    monkeypatch.setenv("HOME", str(tmp_path))
    output = stars_kernels.decode("~/lm", rm, [1], tokenizer=byte_tokenizer(), **SET)
    assert output.token_ids == stars_kernels.decode(lm, rm, [1], **SET).token_ids


def test_no_tokenizer_and_no_label(lm, rm):
    with pytest.raises(TypeError, match="tokenizer is of type str, expected a transformers tokenizer or None"):
        stars_kernels.decode(lm, rm, "hi", tokenizer="x", **SET)
    with pytest.raises(TypeError, match="tokenizer is of type str, expected"):
        RewardModel(rm, "x")
    for label in ("x", 1.5, True):
        with pytest.raises(TypeError, match=f"label is {label!r}, expected an integer or None"):
            RewardModel(rm, label=label)


def test_a_reward_model_with_another_tokenizer_needs_both(lm, rm):
    larger = tiny_reward_model(vocab_size=300)
    with pytest.raises(ValueError, match=r"both tokenizers: pass RewardModel\(model, tokenizer\)"):
        stars_kernels.decode(lm, larger, "hi", tokenizer=byte_tokenizer(), **SET)
    with pytest.raises(ValueError, match="needs the language model's tokenizer as well: pass tokenizer="):
        stars_kernels.decode(lm, RewardModel(larger, byte_tokenizer()), [1], **SET)
    with pytest.raises(ValueError, match="reads text, which needs the language model's tokenizer: pass tokenizer="):
        stars_kernels.decode(lm, RewardModel(rm, template="{prompt}{answer}"), [1], **SET)


def test_needs_a_tokenizer(lm, rm):
    with pytest.raises(ValueError, match="a function of texts, which needs a tokenizer: pass tokenizer="):
        stars_kernels.decode(lm, lambda prompts, answers: [0.0] * len(answers), [1], **SET)
    with pytest.raises(ValueError, match=r"stop_strings .* need a tokenizer: pass tokenizer="):
        stars_kernels.decode(lm, rm, [1], stop_strings="x", **SET)


def broken_at(value):
    """A language model whose logits hold `value` after token 7 and nowhere else."""
    model = tiny_language_model()

    def spoil(module, args, kwargs, output):
        ids = kwargs["input_ids"][0]
        if ids.shape[-1] > 1:  # prefill, packed: logits [1, prompts, V], one row for the last token of each
            return output
        output.logits[kwargs["input_ids"][:, -1] == 7] = value
        return output

    model.register_forward_hook(spoil, with_kwargs=True)
    return model


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_unusable_logits(lm, rm, value):
    settings = dict(SET, top_k=None, max_new_tokens=40, eos_token_id=(), temperature=5.0)

    def answers(model, seed):
        return stars_kernels.decode(model, rm, [[1, 2], [3]], request_ids=[1, 2], **{**settings, "seed": seed})

    for seed in range(100):  # until only the first answer goes on after a token 7
        first, second = answers(lm, seed)
        if 7 in first.token_ids[:-1] and 7 not in second.token_ids:
            break
    with pytest.raises(StarsError) as failed:
        answers(broken_at(value), seed)
    message = str(failed.value.results[0])
    assert "prompt 0 (request 1), segment " in message
    assert "the logits hold nan or +inf, or are all -inf, expected finite numbers" in message
    assert failed.value.results[1].token_ids == second.token_ids


def test_nan_reward_names_prompt_segment_and_attempt(lm):
    tokenizer = byte_tokenizer()

    def rm(prompts, answers):
        return [float("nan") if p == "b" and len(a) > 3 else 5.0 for p, a in zip(prompts, answers, strict=True)]

    settings = dict(SET, tokenizer=tokenizer, eos_token_id=(), max_new_tokens=24)
    with pytest.raises(StarsError) as failed:
        stars_kernels.decode(lm, rm, ["a", "b"], request_ids=["A", "B"], **settings)
    assert isinstance(failed.value.results[0], stars_kernels.StarsOutput)
    message = str(failed.value.results[1])
    assert "prompt 1 (request B), segment " in message and "the reward is nan, expected a number" in message
    with pytest.raises(RuntimeError, match=r"prompt 0 .* the reward of the empty answer is nan, expected a finite"):
        stars_kernels.decode(lm, lambda p, a: [float("nan")] * len(a), "a", **settings)


def test_nan_beyond_the_winner_is_never_seen(lm):
    """An attempt that the sequential algorithm would not have judged cannot fail a prompt."""
    tokenizer = byte_tokenizer()

    def rm(prompts, answers):
        return [9.0, *[float("nan")] * (len(answers) - 1)]

    output = stars_kernels.decode(lm, rm, "a", tokenizer=tokenizer, width=5, **SET)
    assert output.counts.attempts == len(output.segments)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: [0.0] * (n + 1), r"returned shape \[2\], expected floats of shape \[1\], one for each"),
        (lambda n: torch.zeros(n, 1), r"returned shape \[1, 1\], expected floats of shape \[1\], one for each"),
        (lambda n: 0.0, r"returned shape \[\], expected floats of shape \[1\], one for each"),
        (lambda n: ["x"] * n, r"returned list \['x'\], expected floats of shape \[1\], one for each"),
        (lambda n: None, r"returned NoneType None, expected floats of shape \[1\], one for each"),
    ],
)
def test_a_callable_that_returns_something_else(lm, returned, message):
    with pytest.raises(RuntimeError, match="the reward model failed on the empty answer") as failed:
        stars_kernels.decode(lm, lambda p, a: returned(len(a)), "a", tokenizer=byte_tokenizer(), **SET)
    with pytest.raises(ValueError, match=message):
        raise failed.value.__cause__


@pytest.mark.parametrize("returned", [[0.0], [[0.0]], None])
def test_wrong_rewards_for_several_answers_are_no_reason_to_ask_again(lm, returned):
    calls = []

    def rm(prompts, answers):
        calls.append(answers)
        return returned

    with pytest.raises(StarsError, match=r"WrongRewards: .*, expected floats of shape \[2\], one for each answer"):
        stars_kernels.decode(lm, rm, ["a", "b"], tokenizer=byte_tokenizer(), **SET)
    assert calls == [["", ""]]


def test_a_callable_that_raises_fails_only_its_prompt(lm):
    def rm(prompts, answers):
        if "bad" in prompts:
            raise OSError("the reward server is gone")
        return [5.0] * len(answers)

    with pytest.raises(StarsError) as failed:
        stars_kernels.decode(lm, rm, ["a", "bad", "c"], tokenizer=byte_tokenizer(), **SET)
    results = failed.value.results
    assert [type(r).__name__ for r in results] == ["StarsOutput", "DecodeError", "StarsOutput"]
    assert isinstance(results[1].__cause__, OSError)
    assert "the reward server is gone" in str(results[1])


def test_a_callable_that_raises_beyond_the_winner_changes_nothing(lm):
    """What width 1 would never have asked for cannot fail a prompt at width 5; what it asks for does at both."""
    calls = []

    def rm(prompts, answers):
        calls.append(answers)
        if len(answers) > 1:
            raise OSError("one at a time, please")
        return [9.0]

    settings = dict(SET, tokenizer=byte_tokenizer(), eos_token_id=())
    wide = stars_kernels.decode(lm, rm, "a", width=5, **settings)
    assert wide.token_ids == stars_kernels.decode(lm, rm, "a", width=1, **settings).token_ids

    def later(prompts, answers):
        if any(len(answer) > 4 for answer in answers):
            return []
        return [9.0] * len(answers)

    for width in (1, 5):
        with pytest.raises(
            RuntimeError, match=r"segment \d+: attempt 0: the reward model failed: WrongRewards: .* \[0\]"
        ):
            stars_kernels.decode(lm, later, "a", width=width, **dict(settings, max_new_tokens=40))


@pytest.mark.parametrize("reward", [float("inf"), float("-inf")])
def test_infinite_reward_of_the_empty_answer(lm, reward):
    with pytest.raises(RuntimeError, match=f"the reward of the empty answer is {reward}, expected a finite number"):
        stars_kernels.decode(lm, lambda p, a: [reward] * len(a), "a", tokenizer=byte_tokenizer(), **SET)


def test_vetoed_continuations_do_not_spoil_calibration(lm):
    def rm(prompts, answers):
        return [float("-inf") if len(a) % 3 == 1 else float(len(a)) for a in answers]

    output = stars_kernels.decode(lm, rm, "a", tokenizer=byte_tokenizer(), seed=0, max_new_tokens=20)
    assert all(map(math.isfinite, (output.config.reward_threshold, output.config.beta, output.reward)))


def test_prompts_that_a_tokenizer_or_template_refuses_fail_alone(lm, rm):
    tokenizer = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    prompts = [[1], [-1], [2**40], [{"role": "user", "content": "hi"}], "", 3.5]
    with pytest.raises(StarsError) as failed:
        stars_kernels.decode(lm, rm, prompts, tokenizer=tokenizer, **SET)
    results = failed.value.results
    assert isinstance(results[0], stars_kernels.StarsOutput)
    for result, message in zip(
        results[1:],
        [
            "token id -1 is outside",
            "is outside the vocabulary",
            "roles must alternate",
            "no tokens",
            "of type float",
        ],
        strict=True,
    ):
        assert message in str(result)


def test_a_failing_forward_fails_its_batch_alone(rm):
    model = tiny_language_model()

    def fail(module, args, kwargs):
        if (kwargs["input_ids"] == 99).any():
            raise MemoryError("no memory for this one")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    settings = dict(SET, batch_size=1, top_k=2, request_ids=[1, 2, 3])
    with pytest.raises(StarsError) as failed:
        stars_kernels.decode(model, rm, [[1], [99], [2]], **settings)
    assert list(failed.value.errors) == [1]
    assert "the batch failed: MemoryError: no memory for this one" in str(failed.value.results[1])


def test_special_tokens_are_no_stop_strings(lm, rm):
    with pytest.raises(ValueError, match="stop string '</s>' is a special token, which is no text: pass eos_token_id="):
        stars_kernels.decode(lm, rm, "a", tokenizer=byte_tokenizer(), stop_strings=["</s>"], **SET)


def test_nan_logits_after_the_prompt(rm):
    model = tiny_language_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = torch.nan
    with pytest.raises(StarsError) as failed:
        stars_kernels.decode(model, rm, [[50], [1]], **dict(SET, eos_token_id=(), top_k=2, request_ids=[1, 2]))
    assert "prompt 0 (request 1), segment 0: attempt 0: the logits hold nan" in str(failed.value.results[0])
    assert list(failed.value.errors) == [0]


def test_calibration_that_finds_no_reward(lm):
    def rm(prompts, answers):
        raise OSError("the reward server is gone")

    with pytest.raises(RuntimeError, match=r"calibration found no finite reward .*the reward server is gone") as failed:
        stars_kernels.decode(lm, rm, "a", tokenizer=byte_tokenizer(), seed=0)
    assert isinstance(failed.value.__cause__, OSError)
    assert 'raise OSError("the reward server is gone")' in failed.value.__notes__[0]


def test_a_config_object_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match="segment_size is True"):
        StarsConfig(segment_size=True)
    with pytest.raises(ValueError, match="alpha is 2"):
        StarsConfig().replace(alpha=2)


def test_no_pickle_is_loaded(tmp_path, lm, rm):
    """A checkpoint that is only there as a pickle is not read."""
    lm.config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    torch.save(lm.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        stars_kernels.decode(tmp_path, rm, "hi", **SET)
    rm.config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        stars_kernels.decode(lm, tmp_path, "hi", tokenizer=byte_tokenizer(), **SET)


def test_remote_code_runs_only_when_asked(monkeypatch, lm, rm):
    from stars_kernels.hf.loading import language_model as models

    asked = []

    class Loader:
        def from_pretrained(self, path, **options):
            asked.append(options["trust_remote_code"])
            return lm

    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(models, name, Loader())
    for trust in (False, True):
        with pytest.raises(TypeError):  # the stand-in is no tokenizer
            stars_kernels.decode("somewhere", rm, "hi", **SET, **({"trust_remote_code": True} if trust else {}))
    assert asked == [False, False, True, True]


def test_the_vocabulary_is_what_the_embeddings_hold(rm):
    """And not what the config says, which stays where a weight is cut."""
    model = tiny_language_model()
    model.model.embed_tokens.weight = torch.nn.Parameter(model.model.embed_tokens.weight[:250].detach().clone())
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:250].detach().clone())
    with pytest.raises(ValueError, match="prompt 0: token id 255 is outside the vocabulary, expected 0 to 249"):
        stars_kernels.decode(model, lambda p, a: [0.0] * len(a), [1, 255], tokenizer=byte_tokenizer(), **SET)
    with pytest.raises(ValueError, match="a vocabulary of 260 tokens and the language model one of 250"):
        stars_kernels.decode(model, rm, [1], **SET)


def test_labels_and_hidden_sizes_are_those_of_the_weights(lm):
    rm, one = tiny_reward_model(num_labels=3), tiny_reward_model()
    rm.score.weight = torch.nn.Parameter(one.score.weight.detach().clone())
    one.model = rm.model
    assert stars_kernels.decode(lm, rm, [1], **SET).reward == stars_kernels.decode(lm, one, [1], **SET).reward
    model = tiny_language_model()
    model.lm_head.in_features = 7
    assert stars_kernels.decode(model, torch.nn.Linear(24, 1).double(), [1], **SET).token_ids


def test_weights_beyond_floats(rm):
    for weight in (10**400, -(10**400), 10**5000, Fraction(10**400, 3), Decimal("1e400")):
        with pytest.raises(TypeError, match=r"^weight is .*\d.*, expected a finite number$"):
            RewardModel(rm, weight=weight)
