"""What users pass and what they get back."""

import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import stars_kernels
from stars_kernels import RewardModel, StarsConfig, StarsError, StarsOutput
from tests.tiny import (
    BOS,
    EOS,
    byte_tokenizer,
    scripted_model,
    text_model,
    tiny_language_model,
    tiny_reward_model,
)

SET = dict(seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=12, segment_size=4)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(TEMPLATE)


def length_reward(prompts, answers):
    return [float(len(answer)) for answer in answers]


def test_three_arguments_are_enough(lm, rm, tokenizer):
    output = stars_kernels.decode(lm, rm, "hello", tokenizer=tokenizer)
    assert isinstance(output, StarsOutput)
    assert math.isfinite(output.config.reward_threshold) and output.config.beta > 0
    assert isinstance(output.config.seed, int)
    assert output.seconds["calibrate"] == output.calibration.seconds > 0
    assert len(output.calibration.rewards) == 16
    assert output.calibration.sampled >= 16 and output.calibration.rm_scored >= 16
    again = stars_kernels.decode(lm, rm, "hello", tokenizer=tokenizer, config=output.config)
    assert again.token_ids == output.token_ids and again.reward == output.reward
    assert "calibrate" not in again.seconds and again.calibration is None


def test_calibration_is_what_it_says(lm, rm):
    """r* is the quantile, and the share of continuations accepted at r* is as asked."""
    seen = []

    def rm_text(prompts, answers):
        rewards = [sum(map(ord, answer)) % 97 / 10 for answer in answers]
        seen.append([(a, r) for a, r in zip(answers, rewards, strict=True)])
        return rewards

    tokenizer = byte_tokenizer()
    settings = dict(calibration_samples=40, max_new_tokens=6, seed=1, tokenizer=tokenizer)
    output = stars_kernels.decode(lm, rm_text, "ab", **settings)
    rewards = [r for _, r in seen[1] + seen[2]]  # after the empty answer's, in two rounds
    assert rewards == output.calibration.rewards and len(rewards) == 40
    rewards = torch.tensor(rewards, dtype=torch.float64)
    target = output.config.reward_threshold
    assert target == pytest.approx(rewards.quantile(0.9).item())
    share = ((rewards - target) / output.config.beta).exp().clamp(max=1).mean().item()
    assert share == pytest.approx(0.25, abs=1e-3)
    given = stars_kernels.decode(lm, rm_text, "ab", reward_threshold=2.5, **settings)
    assert given.config.reward_threshold == 2.5
    assert given.config.beta != output.config.beta


def test_prompt_forms(lm, rm, tokenizer):
    chat = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(rendered)["input_ids"]
    assert ids.count(BOS) == 1
    settings = dict(SET, tokenizer=tokenizer)
    forms = [rendered, chat, ids, torch.tensor(ids)]
    outputs = stars_kernels.decode(lm, rm, [rendered, chat, ids], request_ids=[1, 2, 3], **settings)
    assert [o.prompt_reward for o in outputs] == [outputs[0].prompt_reward] * 3
    alone = [stars_kernels.decode(lm, rm, form, request_ids=7, **settings) for form in forms]
    assert len({tuple(o.token_ids) for o in alone}) == 1
    assert stars_kernels.decode(lm, rm, [], **settings) == []
    with pytest.raises(TypeError, match="prompt is of type int, expected a string, chat messages"):
        stars_kernels.decode(lm, rm, 3, **settings)


def test_no_second_bos(lm, rm):
    """A tokenizer that adds BOS to text does so for raw strings, not for chats whose template writes it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    read = []

    def rm_text(prompts, answers):
        read.extend(prompts)
        return [0.0] * len(answers)

    stars_kernels.decode(lm, rm_text, [[{"role": "user", "content": "hi"}], "hi"], tokenizer=tokenizer, **SET)
    assert set(read) == {"<s>[user]hi[assistant]", "hi"}
    from stars_kernels.hf.text.prompts import Codec

    codec = Codec(tokenizer, (), (EOS,))
    assert codec.encode([{"role": "user", "content": "hi"}]).ids.count(BOS) == 1
    assert codec.encode("hi").ids[0] == BOS


def test_trace_and_counts_add_up(lm, rm):
    config = StarsConfig(**SET, width=3, max_attempts=5)
    outputs = stars_kernels.decode(lm, rm, [[1, 2, 3], [40]], config=config)
    for output, prompt in zip(outputs, ([1, 2, 3], [40]), strict=True):
        segments, counts = output.segments, output.counts
        assert sum(s.length for s in segments) == len(output.token_ids)
        assert counts.attempts == sum(s.attempts for s in segments)
        assert counts.judged == sum(sum(s.lengths) for s in segments)
        assert counts.rejections == counts.attempts - len(segments)
        assert counts.rejected == counts.judged - len(output.token_ids)
        assert counts.accepted == sum(s.outcome == "accepted" for s in segments)
        assert counts.acceptance_rate == counts.accepted / counts.attempts
        assert counts.sampled >= counts.judged and counts.speculated == counts.sampled - counts.judged
        assert counts.rm_scored >= len(prompt) + counts.judged
        assert output.reward == segments[-1].reward
        for segment in segments:
            assert segment.attempts <= config.max_attempts
            assert sum(segment.widths) >= segment.attempts
            if segment.outcome == "accepted":
                assert segment.chosen == segment.attempts - 1
            else:
                assert segment.attempts == config.max_attempts
                assert segment.reward == max(segment.rewards)
        assert set(output.seconds) == {"prefill", "propose", "score", "judge", "commit"}
        unnamed = {"content_hash", "packed_linear", "packed_swiglu", "accept"}  # packing; decisions are the host's
        assert set(output.backends) == {*stars_kernels.backends(), "linear"} - unnamed


def test_reward_is_the_plain_pipelines(lm, rm):
    """The reward of every answer equals transformers' own on the same text, in fp32 within 1e-4 whatever the batch."""
    for output, prompt in zip(stars_kernels.decode(lm, rm, [[1, 2, 3], [40]], **SET), ([1, 2, 3], [40]), strict=True):
        own = rm(torch.tensor([prompt + output.token_ids])).logits.item()
        assert output.reward == pytest.approx(own, abs=1e-6)
        assert output.prompt_reward == pytest.approx(rm(torch.tensor([prompt])).logits.item(), abs=1e-6)
    lm32, rm32 = tiny_language_model(torch.float32), tiny_reward_model(torch.float32)
    prompts = [[1, 2, 3], [40], list(range(100, 140))]
    for width in (1, 6):
        for output, prompt in zip(stars_kernels.decode(lm32, rm32, prompts, width=width, **SET), prompts, strict=True):
            own = rm32(torch.tensor([prompt + output.token_ids])).logits.item()
            assert output.reward == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize("width", [1, 3])
def test_reward_is_read_at_eos_even_if_it_is_the_pad_token(width):
    lm, rm = scripted_model({(): 10, (10,): 20, (20,): EOS}), tiny_reward_model(pad_token_id=EOS)
    output = stars_kernels.decode(lm, rm, [1, 2, 3], width=width, **dict(SET, temperature=0.1))
    assert output.token_ids == [10, 20, EOS] and output.finish_reason == "eos"
    rm.config.pad_token_id = None
    before, own = (rm(torch.tensor([[1, 2, 3, *output.token_ids[:n]]])).logits.item() for n in (2, 3))
    assert abs(own - before) > 1e-3
    assert output.reward == pytest.approx(own, abs=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("width", [1, 3])
def test_the_rm_reads_a_token_once(lm, rm, width, monkeypatch):
    """Beyond prompt and judged candidates the reward model reads nothing: no accepted token twice."""
    from stars_kernels.hf.scoring.classifier import ClassifierScorer

    read = []
    real = ClassifierScorer._hidden
    monkeypatch.setattr(
        ClassifierScorer, "_hidden", lambda self, ids, at: (read.append(ids.numel()), real(self, ids, at))[1]
    )
    output = stars_kernels.decode(lm, rm, [1, 2, 3], width=width, **SET)
    assert read[0] == 3 and sum(read) == output.counts.rm_scored
    assert sum(read) == 3 + output.counts.sampled


def test_callable_reward_sees_text(lm, tokenizer):
    calls = []

    def rm(prompts, answers):
        calls.append((prompts, answers))
        return torch.tensor(length_reward(prompts, answers))

    output = stars_kernels.decode(lm, rm, "abc", tokenizer=tokenizer, **dict(SET, reward_threshold=5.0))
    assert calls[0] == (["abc"], [""]) and output.prompt_reward == 0.0
    assert output.reward == len(output.text)
    for prompts, answers in calls:
        assert set(prompts) == {"abc"} and len(prompts) == len(answers)
        assert not any("\ufffd" in answer[-1:] or "</s>" in answer for answer in answers)


def test_half_a_character_is_judged_by_its_whole_ones(rm):
    """A model that writes the bytes of 'aé' and may stop in the middle of it."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé")["input_ids"]
    assert len(ids) == 3
    seen = []

    def reward(prompts, answers):
        seen.extend(answers)
        return [0.0] * len(answers)

    lm = scripted_model({(): ids[0], (ids[0],): ids[1], tuple(ids[:2]): ids[2]})
    settings = dict(SET, segment_size=2, max_new_tokens=2, max_attempts=1, tokenizer=tokenizer, top_k=2)
    output = stars_kernels.decode(lm, reward, "b", **settings)
    assert output.token_ids == ids[:2]
    assert seen == ["", "a"] and output.text == "a"


@pytest.mark.parametrize("segment_size", [2, 3, 4, 20])
def test_stop_strings_across_segment_borders(rm, segment_size, tokenizer):
    lm = text_model("abcSTOPxyz", tokenizer)
    settings = dict(SET, segment_size=segment_size, max_new_tokens=10, tokenizer=tokenizer)
    for stops in ("STOP", ["nope", "STOP"]):
        output = stars_kernels.decode(lm, rm, "!", stop_strings=stops, **settings)
        assert output.finish_reason == "stop"
        assert output.text == "abc"
        assert tokenizer.decode(output.token_ids) == "abcSTOP"
        own = rm(torch.tensor([tokenizer("!")["input_ids"] + output.token_ids])).logits.item()
        assert output.reward == pytest.approx(own, abs=1e-6)
    unstopped = stars_kernels.decode(lm, rm, "!", stop_strings="never", **settings)
    assert unstopped.finish_reason == "length" and unstopped.text == "abcSTOPxyz"


def test_eos_as_the_first_token(rm, tokenizer):
    lm = scripted_model({(): EOS})
    output = stars_kernels.decode(lm, rm, "a", tokenizer=tokenizer, **SET)
    assert (output.token_ids, output.text, output.finish_reason) == ([EOS], "", "eos")
    assert output.counts.judged == output.counts.attempts  # nothing past the end is counted


def test_context_limit_ends_an_answer(rm):
    lm = tiny_language_model(max_position_embeddings=20)
    prompt = list(range(1, 14))
    output = stars_kernels.decode(lm, rm, prompt, **dict(SET, eos_token_id=()))
    assert output.finish_reason == "context" and len(output.token_ids) == 7
    target, n = SET["reward_threshold"], output.segments[0].lengths[0]
    r0 = 0.5 * output.prompt_reward + 0.5 * target  # tau rises over max_new_tokens all the same
    expected = min(target, r0 + n * (target - r0) / SET["max_new_tokens"])
    assert output.segments[0].thresholds[0] == pytest.approx(expected)


def test_one_token_prompt_and_no_tokenizer(lm, rm):
    output = stars_kernels.decode(lm, rm, [5], **SET)
    assert output.text is None and output.token_ids


def test_a_model_in_train_mode_is_decoded_in_eval_mode():
    lm = tiny_language_model(attention_dropout=0.9)
    rm = tiny_reward_model()
    expected = stars_kernels.decode(lm, rm, [1, 2], **SET)
    output = stars_kernels.decode(lm.train(), rm.train(), [1, 2], **SET)
    assert output.token_ids == expected.token_ids
    assert lm.training and rm.training


def test_paths(tmp_path, lm, rm, tokenizer):
    lm.save_pretrained(tmp_path / "lm")
    rm.save_pretrained(tmp_path / "rm")
    for name in ("lm", "rm"):
        tokenizer.save_pretrained(tmp_path / name)
    output = stars_kernels.decode(str(tmp_path / "lm"), tmp_path / "rm", "hello", **SET)
    assert output.token_ids == stars_kernels.decode(lm, rm, "hello", tokenizer=tokenizer, **SET).token_ids
    assert output.text == tokenizer.decode(output.token_ids, skip_special_tokens=True).rstrip("\ufffd")


def test_several_labels_with_a_rule(lm):
    rm = tiny_reward_model(num_labels=3)
    output = stars_kernels.decode(lm, RewardModel(rm, label=2), [1, 2], **SET)
    own = rm(torch.tensor([[1, 2, *output.token_ids]])).logits[0, 2].item()
    assert output.reward == pytest.approx(own, abs=1e-6)


def test_interrupt_carries_what_was_done(lm, tokenizer):
    calls = 0

    def rm(prompts, answers):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return [9.0] * len(answers)

    settings = dict(SET, batch_size=1, eos_token_id=())
    with pytest.raises(KeyboardInterrupt) as stopped:
        stars_kernels.decode(lm, rm, ["a", "b", "c"], tokenizer=tokenizer, **settings)
    done, partial, none = stopped.value.results
    assert done.finish_reason == "length" and len(done.token_ids) == 12
    assert partial.finish_reason == "interrupted" and 0 <= len(partial.token_ids) < 12
    assert none is None


def test_a_progress_bar_on_long_runs(lm, rm, monkeypatch, capsys):
    monkeypatch.setattr("stars_kernels.hf.progress.DELAY", 0.0)
    stars_kernels.decode(lm, rm, [1, 2], **SET)
    assert "decode" in capsys.readouterr().err
    calibrated = stars_kernels.decode(lm, rm, [1, 2], seed=0, max_new_tokens=12)
    shown = capsys.readouterr().err
    assert f"calibrate: {calibrated.calibration.sampled}tok" in shown and "%" not in shown.partition("decode")[0]
    stars_kernels.decode(lm, rm, [1, 2], progress=False, **SET)
    assert capsys.readouterr().err == ""


def test_bad_prompts_fail_alone(lm, rm):
    prompts = [[1, 2], [], [9999], list(range(200)), [3]]
    with pytest.raises(StarsError, match=r"3 of 5 prompts failed; .*\n  prompt 1: it has") as failed:
        stars_kernels.decode(lm, rm, prompts, **SET)
    results = failed.value.results
    expected = stars_kernels.decode(lm, rm, [[1, 2], [3]], **SET)
    assert [results[0].token_ids, results[4].token_ids] == [o.token_ids for o in expected]
    assert sorted(failed.value.errors) == [1, 2, 3]
    assert "prompt 1: it has no tokens" in str(results[1])
    assert "token id 9999 is outside the vocabulary, expected 0 to 259" in str(results[2])
    assert "it has 200 tokens, expected less than the context limit of 160" in str(results[3])
    copied = pickle.loads(pickle.dumps(failed.value))
    assert str(copied) == str(failed.value)
    assert copied.results[0] == results[0] and sorted(copied.errors) == [1, 2, 3]


def test_hard_acceptance_with_a_target_needs_no_beta(lm, rm):
    settings = {key: value for key, value in SET.items() if key != "beta"}
    output = stars_kernels.decode(lm, rm, [1, 2], accept="hard", **settings)
    assert output.calibration is None and output.config.beta is None


def test_numpy_token_ids(lm, rm):
    import numpy as np

    output = stars_kernels.decode(lm, rm, list(np.array([1, 2, 3])), **SET)
    assert output.token_ids == stars_kernels.decode(lm, rm, [1, 2, 3], **SET).token_ids


def test_numpy_settings():
    import numpy as np

    config = StarsConfig(seed=np.int64(3), beta=np.float32(0.5), eos_token_id=[np.int32(2), 3], width=np.int64(4))
    assert config == StarsConfig(seed=3, beta=0.5, eos_token_id=(2, 3), width=4)
    plain = [type(value) for value in (config.seed, config.beta, config.eos_token_id[0], config.width)]
    assert plain == [int, float, int, int]


def test_threads_share_a_model(lm, rm):
    """Two decodes and the model's own generate at once: each result is as when it runs alone."""
    prompts = [[1, 2, 3], [40, 41]]
    expected = [stars_kernels.decode(lm, rm, prompt, **SET).token_ids for prompt in prompts]
    ids = torch.tensor([[5, 6, 7]])
    own = lm.generate(ids, max_new_tokens=10, do_sample=False)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            decodes = [pool.submit(stars_kernels.decode, lm, rm, prompt, **SET) for prompt in prompts]
            generated = pool.submit(lm.generate, ids, max_new_tokens=10, do_sample=False)
            assert [decode.result().token_ids for decode in decodes] == expected
            assert torch.equal(generated.result(), own)


def test_a_text_that_begins_with_the_bos_gets_no_second(lm, rm):
    tokenizer = byte_tokenizer("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    chat = [{"role": "user", "content": "a"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    outputs = stars_kernels.decode(lm, rm, [text, "a", chat], tokenizer=tokenizer, request_ids=[1, 2, 3], **SET)
    alike = stars_kernels.decode(lm, rm, [tokenizer("a")["input_ids"]] * 3, request_ids=[1, 2, 3], **SET)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert [output.token_ids for output in outputs] == [output.token_ids for output in alike]
