"""CARDS on the engine: what it has of its own, segments that end by entropy, with every kind of model and reward."""

import pytest
import torch

import stars_kernels
from stars_kernels import Cards, StarsConfig, StarsError
from stars_kernels.hf.proposing.draws import entropy
from tests.captured import segments_as_graphs
from tests.hf import families
from tests.hf.fork_check import check_decode
from tests.hf.test_exactness import EOS_IDS, IDS, PROMPTS
from tests.hf.test_out_of_memory import limited
from tests.sequential import sequential_answer
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

RULE = Cards(segment_size=6, entropy_threshold=4.2, max_attempts=5, reward_threshold=2.0, beta=1.0)
CONFIG = StarsConfig(seed=7, rule=RULE, max_new_tokens=20, temperature=0.9, eos_token_id=EOS_IDS, progress=False)


def traced(outputs):
    return [
        (o.token_ids, [(s.lengths, s.chosen, s.outcome, [round(t, 9) for t in s.thresholds]) for s in o.segments])
        for o in outputs
    ]


def letters(text):
    """A reward of texts; half a character, which bytes may be, does not count."""
    return float(len({letter for letter in text if letter.isascii()}))


def decode(lm, rm, config=CONFIG, prompts=PROMPTS, **settings):
    return stars_kernels.decode(lm, rm, prompts, config=config, request_ids=IDS[: len(prompts)], **settings)


@pytest.fixture(scope="module")
def truth(lm, rm):
    with torch.no_grad():
        pairs = zip(PROMPTS, IDS, strict=True)
        return [sequential_answer(lm, rm, prompt, id_, CONFIG, EOS_IDS) for prompt, id_ in pairs]


def test_the_trace_is_the_definitions(lm, rm, truth):
    """Attempts, their lengths, thresholds and outcomes; and what the counts say."""
    lengths = {length for answer in truth for segment in answer.segments for length in segment.lengths}
    assert len(lengths) > 3 and min(lengths) == 1, "segments of many lengths"
    for width in (1, 3, "auto"):
        outputs = decode(lm, rm, width=width)
        for output, answer in zip(outputs, truth, strict=True):
            expected, counts = answer.counts, output.counts
            assert output.token_ids == answer.tokens and output.finish_reason == answer.finish_reason
            assert traced([output])[0][1] == [
                (s.lengths, s.chosen, s.outcome, [round(t, 9) for t in s.thresholds]) for s in answer.segments
            ]
            assert (counts.judged, counts.rejected, counts.attempts) == (
                expected.judged, expected.rejected, expected.attempts
            )  # fmt: skip
            assert counts.sampled >= counts.judged
            assert output.backends["lm_head_sample"].startswith("not used: ")


def test_where_segments_end_is_the_entropy(lm, rm, truth):
    """By a second hand: each segment is followed by an unsure token, and holds none behind its first."""
    for prompt, answer in zip(PROMPTS, truth, strict=True):
        with torch.no_grad():
            p = lm(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 :].softmax(-1)
        unsure = (-(p * p.log()).sum(-1) >= RULE.entropy_threshold).tolist()
        start = 0
        for segment in answer.segments:
            end = start + segment.length
            assert not any(unsure[start + 1 : end])
            assert unsure[end] or segment.length == RULE.segment_size or end == len(answer.tokens)
            start = end


def test_the_entropy_of_logits():
    logits = torch.tensor([[0.0, 0.0, 0.0, -torch.inf], [1e4, 0.0, -1e4, 0.0], [0.0, torch.nan, 0.0, 0.0]])
    found = entropy(logits)
    assert found[:2].tolist() == pytest.approx([torch.tensor(3.0).log().item(), 0.0], abs=1e-6)
    assert found.dtype == torch.float64 and found[2].isnan()
    wide = torch.randn(7, 70_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(entropy(wide), torch.cat([entropy(row[None]) for row in wide])), "a row's own to the bit"


def test_it_is_calibrated_as_stars_is(lm, rm):
    rule = Cards(segment_size=6, entropy_threshold=4.2)
    found = decode(lm, rm, CONFIG.replace(rule=rule))
    stars = decode(lm, rm, CONFIG.replace(rule=stars_kernels.Stars(segment_size=6)))
    used = found[0].config.rule
    assert isinstance(used, Cards) and found[0].calibration.rewards == stars[0].calibration.rewards
    assert (used.reward_threshold, used.beta) == (stars[0].config.rule.reward_threshold, stars[0].config.rule.beta)
    again = decode(lm, rm, CONFIG.replace(rule=used))
    assert [o.token_ids for o in found] == [o.token_ids for o in again]


@pytest.mark.parametrize("bound", [1e-9, 50.0], ids=["one token each", "by size alone"])
def test_bounds_that_are_always_or_never_reached(lm, rm, bound):
    rule = Cards(segment_size=6, entropy_threshold=bound, max_attempts=5, reward_threshold=2.0, beta=1.0)
    for output in decode(lm, rm, CONFIG.replace(rule=rule, eos_token_id=())):
        assert {n for s in output.segments for n in s.lengths} == ({1} if bound < 1 else {6, 2})


@pytest.mark.parametrize("width", [1, 4])
def test_fp32_is_equal_to_the_bit(width):
    lm, rm = tiny_language_model(torch.float32), tiny_reward_model(torch.float32)
    expected = decode(lm, rm, width=2, batch_size=5)
    found = decode(lm, rm, width=width, batch_size=2)
    assert [(o.token_ids, [s.rewards for s in o.segments]) for o in found] == [
        (o.token_ids, [s.rewards[: len(f.rewards)] for s, f in zip(o.segments, m.segments, strict=True)])
        for o, m in zip(expected, found, strict=True)
    ]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "deepseek_v3", "bloom"])
def test_families(family):
    check_decode(families.tiny(family), rule=Cards(6, 3, reward_threshold=2.0, beta=1.0, entropy_threshold=4.0))


def test_states_are_refused_by_name(lm):
    hybrid = families.tiny("qwen3_next")
    with pytest.raises(ValueError, match=r"^rule=Cards\(.* ends segments by entropy, and Qwen3Next\w+ has states"):
        stars_kernels.decode(hybrid, lambda p, a: [0.0] * len(a), [1], rule=RULE, tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match=r"and reward_model Qwen3Next\w+ has states, .*expected models of attention"):
        stars_kernels.decode(lm, stars_kernels.Likelihood(families.tiny("qwen3_next", vocab_size=260)), [1], rule=RULE)


@pytest.mark.parametrize("kind", ["likelihood", "head", "text"])
@pytest.mark.parametrize("width", [1, 3])
def test_every_kind_of_reward(lm, rm, kind, width):
    head = torch.nn.Linear(24, 1).double()
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    plain = byte_tokenizer()

    def likelihood(prompt, answer):
        logits = lm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logits.gather(1, torch.tensor(answer)[:, None]).sum().item() if answer else 0.0

    def own(prompt, answer):
        return head(lm.model(torch.tensor([prompt + answer])).last_hidden_state)[0, -1, 0].item()

    def text(prompt, answer):
        return letters(plain.decode(answer, skip_special_tokens=True))

    models = {
        "likelihood": (stars_kernels.Likelihood(lm), likelihood, -3.0),
        "head": (head, own, 0.5),
        "text": (lambda prompts, answers: [letters(answer) for answer in answers], text, 5.0),
    }
    model, reward, target = models[kind]
    config = CONFIG.replace(rule=Cards(6, 4, reward_threshold=target, beta=1.0, entropy_threshold=4.2), width=width)
    with torch.no_grad():
        outputs = decode(lm, model, config, PROMPTS[:3], tokenizer=plain)
        for prompt, id_, output in zip(PROMPTS, IDS, outputs, strict=False):
            expected = sequential_answer(lm, reward, prompt, id_, config, EOS_IDS)
            assert output.token_ids == expected.tokens
            assert [s.lengths for s in output.segments] == [s.lengths for s in expected.segments]


@pytest.mark.parametrize("reward", ["model", "head"])
def test_segments_as_graphs(lm, rm, monkeypatch, reward):
    torch.manual_seed(0)
    rm = rm if reward == "model" else torch.nn.Linear(24, 1).double()
    expected = decode(lm, rm, width=4)
    made = segments_as_graphs(monkeypatch)
    assert traced(decode(lm, rm, width=4)) == traced(expected) and sum(graphs.counts.replays for graphs in made) > 3


def test_stop_strings_and_events(lm, rm):
    plain, config = byte_tokenizer(), CONFIG.replace(stop_strings=("e", "\n"), eos_token_id=(), max_new_tokens=40)
    events = list(stars_kernels.stream(lm, rm, PROMPTS, config=config, request_ids=IDS, tokenizer=plain, width=4))
    outputs = [next(e.output for e in events if e.index == i and e.output is not None) for i in range(len(PROMPTS))]
    assert any(output.finish_reason == "stop" for output in outputs)
    stops = {*plain("e")["input_ids"], *plain("\n")["input_ids"]}
    for index, output in enumerate(outputs):
        mine = [event for event in events if event.index == index]
        assert [token for event in mine for token in event.token_ids] == output.token_ids
        with torch.no_grad():
            expected = sequential_answer(
                lm, rm, PROMPTS[index], IDS[index], config, (), stops=lambda answer: answer[-1] in stops
            )
        assert output.token_ids == expected.tokens


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("rows", [1, 3])
def test_out_of_memory(rm, truth, rows):
    outputs = decode(limited(tiny_language_model(), rows), rm, width=4, prompts=PROMPTS)
    assert [o.token_ids for o in outputs] == [answer.tokens for answer in truth]
    assert outputs[0].memory_limits["width"] == 1


def test_a_reward_that_is_nan_ends_its_answer_alone(lm):
    def reward(prompts, answers):
        return [float("nan") if prompt and answer else 0.0 for prompt, answer in zip(prompts, answers, strict=True)]

    prompts = [byte_tokenizer().encode("x"), byte_tokenizer().encode("yz")]
    with pytest.raises(StarsError, match="segment 0: attempt 0: the reward is nan, expected a number") as failed:
        decode(lm, reward, CONFIG, prompts, tokenizer=byte_tokenizer())
    assert sorted(failed.value.errors) == [0, 1]


def test_logits_processors_change_the_entropy(lm, rm):
    """Of ten tokens left, no distribution has more than ln 10 nats: no segment ends by a bound above."""
    from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

    processors = LogitsProcessorList([SuppressTokensLogitsProcessor(list(range(10, 260)), device="cpu")])
    inputs = dict(
        input_ids=torch.tensor([[1, 2]]), do_sample=True, max_new_tokens=12, eos_token_id=None, pad_token_id=0
    )
    for bound, lengths in ((2.5, {6}), (1e-9, {1})):
        output = lm.generate(
            **inputs, custom_generate=stars_kernels.generate, reward_model=rm, seed=0, progress=False,
            logits_processor=processors, return_dict_in_generate=True,
            rule=Cards(6, 2, reward_threshold=0.0, beta=1.0, entropy_threshold=bound),
        ).outputs[0]  # fmt: skip
        assert {n for segment in output.segments for n in segment.lengths} == lengths
        assert set(output.token_ids) <= set(range(10))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cards(entropy_threshold=0.0), "entropy_threshold is 0.0, expected a finite number > 0, in nats"),
        (lambda: Cards(entropy_threshold=float("inf")), "entropy_threshold is inf, expected a finite number > 0"),
        (lambda: Cards(entropy_threshold=None), "entropy_threshold is None, expected a finite number > 0"),
        (lambda: Cards(segment_size=0), "segment_size is 0, expected an integer >= 1"),
        (lambda: Cards(beta=-1), "beta is -1, expected a finite number > 0"),
    ],
)
def test_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_attempts_beyond_the_noise_are_refused(lm, rm):
    with pytest.raises(ValueError, match=r"1000000 attempts at each of 20 tokens, expected less than 16777216"):
        decode(lm, rm, CONFIG.replace(rule=Cards(max_attempts=10**6)))
