"""The caller's gradients and autocast: its own functions run in them, the engine does not."""

import pytest
import torch
from torch import nn
from transformers import LogitsProcessorList, StoppingCriteriaList

import stars_kernels
from stars_kernels import RewardModel
from stars_kernels.hf.modes import resumed_in, without_autocast
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

SET = dict(seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=8, segment_size=4)
AUTOCAST = dict(device_type="cpu", dtype=torch.bfloat16)


def gradient():
    weight = nn.Parameter(torch.ones(3))
    (weight * weight).sum().backward()
    return weight.grad.sum().item()


def test_a_reward_function_may_call_backward(lm):
    settings = dict(SET, tokenizer=byte_tokenizer())
    output = stars_kernels.decode(lm, lambda prompts, answers: [gradient()] * len(answers), "ab", **settings)
    assert output.reward == 6.0
    events = list(stars_kernels.stream(lm, lambda p, a: [gradient()] * len(a), "ab", **settings))
    assert events[-1].output.reward == 6.0


def test_so_may_a_template(lm):
    def template(prompt, answer):
        return f"{prompt} {gradient()} {answer}"

    described = RewardModel(tiny_reward_model(), byte_tokenizer(), template)
    assert stars_kernels.decode(lm, described, "ab", tokenizer=byte_tokenizer(), **SET).token_ids


def test_so_may_processors_and_criteria(lm, rm):
    """`model.generate` turns gradients off; they can be turned on again, and for what depends on the given tensors."""
    seen = []

    def processor(ids, scores):
        with torch.enable_grad():
            shift = nn.Parameter(torch.zeros_like(scores))
            (scores * shift).exp().sum().backward()
        seen.append(torch.equal(shift.grad, scores))
        scores[:, 5] = -torch.inf
        return scores

    def criterion(ids, scores):
        with torch.enable_grad():
            assert gradient() == 6.0
        return torch.zeros(len(ids), dtype=torch.bool)

    lm.generate(
        torch.tensor([[1, 2]]), do_sample=True, top_k=0, max_new_tokens=6, reward_model=rm, seed=0, beta=1.0,
        reward_threshold=1.0, custom_generate=stars_kernels.generate, pad_token_id=0,
        logits_processor=LogitsProcessorList([processor]), stopping_criteria=StoppingCriteriaList([criterion]),
    )  # fmt: skip
    assert seen and all(seen)


@pytest.mark.parametrize("grad", [True, False])
def test_a_reward_function_finds_gradients_and_autocast_as_its_caller_has_them(lm, grad):
    found = []

    def function(prompts, answers):
        found.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        return [0.0] * len(answers)

    with torch.set_grad_enabled(grad), torch.autocast(**AUTOCAST, enabled=not grad):
        stars_kernels.decode(lm, function, "ab", tokenizer=byte_tokenizer(), **SET)
    assert set(found) == {(grad, False, not grad)}


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("kind", ["classifier", "head", "text"])
def test_autocast_changes_no_answer(pack, kind):
    """What is decoded is the model in its own dtype."""
    lm, tokenizer = tiny_language_model(torch.float32), byte_tokenizer()
    rm = {
        "classifier": lambda: tiny_reward_model(torch.float32),
        "head": lambda: nn.Linear(24, 1),
        "text": lambda: RewardModel(tiny_reward_model(torch.float32), byte_tokenizer(reverse=True)),
    }[kind]()
    settings = dict(SET, tokenizer=tokenizer, pack=pack, temperature=2.0)
    outside = stars_kernels.decode(lm, rm, ["ab", "c"], request_ids=[0, 1], **settings)
    with torch.autocast(**AUTOCAST):
        within = stars_kernels.decode(lm, rm, ["ab", "c"], request_ids=[0, 1], **settings)
        events = []
        for event in stars_kernels.stream(lm, rm, "ab", request_ids=0, **settings):
            assert torch.is_autocast_enabled("cpu"), "the consumer is in its own mode"
            events.append(event)
    for one, other in zip(within, outside, strict=True):
        assert (one.token_ids, one.reward) == (other.token_ids, other.reward)
    assert events[-1].output.token_ids == outside[0].token_ids


def test_what_a_consumer_throws_reaches_the_generator():
    seen = []

    def events():
        for i in range(9):
            try:
                yield i
            except (KeyError, GeneratorExit) as error:
                seen.append(type(error))
                if isinstance(error, GeneratorExit):
                    raise

    wrapped = resumed_in(events(), without_autocast)
    assert next(wrapped) == 0 and wrapped.throw(KeyError()) == 1
    wrapped.close()
    assert seen == [KeyError, GeneratorExit]
