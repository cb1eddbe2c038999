"""ARGS on the engine: a search, in which nothing is random, with every kind of model and reward."""

import pytest
import torch
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

import stars_kernels
from stars_kernels import Args, StarsConfig, StarsError
from stars_kernels.decoder.rules import Candidate
from stars_kernels.hf.proposing.draws import likeliest
from tests.captured import segments_as_graphs
from tests.hf import families
from tests.hf.fork_check import check_decode
from tests.hf.test_cards import letters
from tests.hf.test_exactness import EOS_IDS, IDS, PROMPTS
from tests.hf.test_out_of_memory import limited
from tests.sequential import sequential_answer
from tests.tiny import VOCABULARY, byte_tokenizer, tiny_language_model, tiny_reward_model

RULE = Args(4, 0.7)
CONFIG = StarsConfig(seed=7, rule=RULE, max_new_tokens=9, eos_token_id=EOS_IDS, progress=False)


def decode(lm, rm, config=CONFIG, prompts=PROMPTS, **settings):
    return stars_kernels.decode(lm, rm, prompts, config=config, request_ids=IDS[: len(prompts)], **settings)


@torch.no_grad()
def by_hand(lm, reward, prompt, rule, size, eos, barred=()):
    """The answer and its reward, one forward of the whole text for each token and each reward."""
    answer = []
    while len(answer) < size and not (answer and answer[-1] in eos):
        log_p = lm(torch.tensor([prompt + answer])).logits[0, -1]
        log_p[list(barred)] = -torch.inf
        log_p = log_p.log_softmax(0)
        kept = sorted(range(len(log_p)), key=lambda token: (-log_p[token].item(), token))[: rule.k]
        answer.append(max(kept, key=lambda t: log_p[t].item() + rule.w * reward(prompt, [*answer, t])))
    return answer


def classifier(rm):
    return lambda prompt, answer: rm(torch.tensor([prompt + answer])).logits[0, 0].item()


@pytest.mark.parametrize("rule", [RULE, Args(1, 5.0), Args(VOCABULARY, 2.0), Args(3, -1.0)], ids=str)
def test_it_is_the_search_by_hand(lm, rm, rule):
    config = CONFIG.replace(rule=rule, max_new_tokens=2 if rule.k == VOCABULARY else 9)
    prompts = PROMPTS[:2] if rule.k == VOCABULARY else PROMPTS
    expected = [by_hand(lm, classifier(rm), p, rule, config.max_new_tokens, EOS_IDS) for p in prompts]
    assert [o.token_ids for o in decode(lm, rm, config, prompts)] == expected
    if rule == RULE:
        for settings in (
            dict(width=1),
            dict(width=3, batch_size=2),
            dict(seed=99, temperature=0.1, top_k=2, top_p=0.2),
        ):
            assert [o.token_ids for o in decode(lm, rm, config, **settings)] == expected


def test_what_the_output_tells(lm, rm):
    for output in decode(lm, rm, CONFIG.replace(eos_token_id=())):
        counts = output.counts
        assert [(s.attempts, s.length, s.outcome) for s in output.segments] == [(4, 1, "best")] * 9
        assert counts.sampled == counts.judged == counts.attempts == 36 and counts.rejected == counts.rejections == 27
        assert output.calibration is None and output.reward == output.segments[-1].reward
        assert (
            "the likeliest" in output.backends["lm_head_sample"] or "not on a GPU" in output.backends["lm_head_sample"]
        )


def test_no_forward_proposes(lm, rm):
    """The language model reads each token once, in a forward of one row a prompt."""
    shapes, model = [], tiny_language_model()
    model.model.layers[0].register_forward_pre_hook(lambda _, args: shapes.append([*args[0].shape[:2]]))
    decode(model, rm, CONFIG.replace(eos_token_id=()), width=4)
    steps = [shape for shape in shapes if shape[1] == 1][1:]  # the first is the layout's probe
    assert steps == [[len(PROMPTS), 1]] * 8


def test_likeliest():
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf], [0.0, torch.nan, 1.0, 2.0], [-torch.inf] * 4, [0.0] * 4])
    source, attempt = torch.tensor([0, 0, 0, 0, 1, 2, 3, 3]), torch.tensor([0, 1, 2, 3, 0, 0, 0, 3])
    token, logprob = likeliest(logits, source, attempt, 4)
    assert token.tolist() == [1, 2, 0, 3, -1, -1, 0, 3]
    assert logprob[:3].tolist() == pytest.approx(logits[0].log_softmax(0)[[1, 2, 0]].tolist())
    assert logprob[3] == -torch.inf and logprob[4:6].isnan().all()
    alone = likeliest(logits[[3]], None, torch.tensor([2]), 3)
    assert alone[0].tolist() == [2] and alone[1].item() == pytest.approx(-torch.tensor(4.0).log().item())


def test_ties_and_scores_that_are_no_numbers():
    def chosen(rule, *pairs):
        tried = [Candidate([0], reward, 0.5, logprob=logprob) for logprob, reward in pairs]
        verdicts = [rule.judge(None, tried[: i + 1]) for i in range(len(tried))]
        assert [verdict.outcome for verdict in verdicts] == [None] * (rule.k - 1) + ["best"]
        return verdicts[-1].chosen

    assert chosen(Args(3, 1.0), (-1.0, 0.0), (-2.0, 1.0), (-3.0, 2.0)) == 0
    assert chosen(Args(3, 0.0), (-3.0, float("inf")), (-2.0, 1.0), (-2.0, 2.0)) == 1
    assert chosen(Args(2, 1.0), (-float("inf"), float("inf")), (-5.0, -1e9)) == 1


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom", "qwen3_next", "mamba"])
def test_families(family):
    """Those with states too: a segment of one token leaves no row's state behind."""
    check_decode(families.tiny(family), rule=Args(3, 0.6), max_new_tokens=6)


@pytest.mark.parametrize("kind", ["likelihood", "head", "text"])
def test_every_kind_of_reward(lm, kind):
    head = torch.nn.Linear(24, 1).double()
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    plain = byte_tokenizer()
    models = {
        "likelihood": (
            stars_kernels.Likelihood(lm),
            lambda prompt, answer: (
                lm(torch.tensor([prompt + answer]))
                .logits[0, len(prompt) - 1 : -1]
                .log_softmax(-1)
                .gather(1, torch.tensor(answer)[:, None])
                .sum()
                .item()
            ),
        ),
        "head": (head, lambda p, a: head(lm.model(torch.tensor([p + a])).last_hidden_state)[0, -1, 0].item()),
        "text": (
            lambda prompts, answers: [letters(answer) for answer in answers],
            lambda prompt, answer: letters(plain.decode(answer, skip_special_tokens=True)),
        ),
    }
    model, reward = models[kind]
    outputs = decode(lm, model, prompts=PROMPTS[:3], tokenizer=plain)
    assert [o.token_ids for o in outputs] == [by_hand(lm, reward, p, RULE, 9, EOS_IDS) for p in PROMPTS[:3]]


@pytest.mark.parametrize("width", [1, 4])
def test_fp32_is_equal_to_the_bit(width):
    lm, rm = tiny_language_model(torch.float32), tiny_reward_model(torch.float32)
    expected, found = decode(lm, rm, width=2, batch_size=5), decode(lm, rm, width=width, batch_size=2)
    for mine, other in zip(found, expected, strict=True):
        assert mine.token_ids == other.token_ids
        assert [s.rewards for s in mine.segments] == [s.rewards for s in other.segments]


@pytest.mark.parametrize("reward", ["model", "head"])
def test_segments_as_graphs(lm, rm, monkeypatch, reward):
    torch.manual_seed(0)
    rm = rm if reward == "model" else torch.nn.Linear(24, 1).double()
    expected = decode(lm, rm)
    made = segments_as_graphs(monkeypatch)
    found = decode(lm, rm)
    assert [(o.token_ids, o.reward) for o in found] == [(o.token_ids, o.reward) for o in expected]
    assert sum(graphs.counts.replays for graphs in made) > 3


def test_stop_strings_and_events(lm, rm):
    plain = byte_tokenizer()
    free = decode(lm, rm, CONFIG.replace(eos_token_id=(), max_new_tokens=12), tokenizer=plain)
    stop = next(c for output in free for c in output.text if c.isascii() and c.isprintable())
    config = CONFIG.replace(stop_strings=(stop,), eos_token_id=(), max_new_tokens=12)
    events = list(stars_kernels.stream(lm, rm, PROMPTS, config=config, request_ids=IDS, tokenizer=plain))
    stops = set(plain(stop)["input_ids"])
    reasons = set()
    for index, prompt in enumerate(PROMPTS):
        mine = [event for event in events if event.index == index]
        expected = by_hand(lm, classifier(rm), prompt, RULE, 12, stops)
        assert [token for event in mine for token in event.token_ids] == mine[-1].output.token_ids == expected
        assert all(len(event.token_ids) == 1 for event in mine), "a token each"
        reasons.add(mine[-1].output.finish_reason)
    assert "stop" in reasons


@pytest.mark.filterwarnings("ignore:out of memory")
def test_out_of_memory(lm, rm):
    """A round that runs out is repeated with fewer prompts or attempts: what is likeliest does not change."""
    expected = [o.token_ids for o in decode(lm, rm)]
    outputs = decode(limited(tiny_language_model(), 2), rm, width=4)
    assert [o.token_ids for o in outputs] == expected and outputs[0].memory_limits["batch_size"] == 2


def test_faults(lm, rm):
    with pytest.raises(StarsError, match="segment 0: attempt 0: the reward is nan, expected a number"):
        decode(lm, lambda p, a: [float("nan") if x else 0.0 for x in a], tokenizer=byte_tokenizer())
    broken = tiny_language_model()
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
    with pytest.raises(StarsError, match="segment 0: attempt 0: the logits hold nan"):
        decode(broken, rm)


def test_logits_processors_come_first(lm, rm):
    barred = range(10, VOCABULARY)
    output = lm.generate(
        input_ids=torch.tensor([[1, 2]]), do_sample=True, max_new_tokens=6, pad_token_id=0, progress=False,
        custom_generate=stars_kernels.generate, reward_model=rm, rule=RULE, return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([SuppressTokensLogitsProcessor(list(barred), device="cpu")]),
    ).outputs[0]  # fmt: skip
    assert output.token_ids == by_hand(lm, classifier(rm), [1, 2], RULE, 6, (), barred)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Args(k=0), "k is 0, expected an integer >= 1"),
        (lambda: Args(k=2.5), "k is 2.5, expected an integer >= 1"),
        (lambda: Args(w=float("nan")), "w is nan, expected a finite number"),
        (lambda: Args(w=None), "w is None, expected a finite number"),
    ],
)
def test_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_more_than_the_vocabulary_is_refused(lm, rm):
    with pytest.raises(ValueError, match=r"^rule=Args\(k=261, w=1.0\) takes the 261 likeliest tokens, .* most the 260"):
        decode(lm, rm, CONFIG.replace(rule=Args(261)))


def test_the_log_probability_of_candidates(lm, rm):
    """Sampled ones under the filtered distribution: what a rule of one's own may decide by."""
    seen = []

    class Noting(stars_kernels.BlockBestOf):
        def judge(self, answer, candidates):
            seen.append((len(answer.tokens), candidates[-1].tokens, round(candidates[-1].logprob, 4)))
            return super().judge(answer, candidates)

    config = CONFIG.replace(rule=Noting(3, segment_size=4), top_k=5, temperature=0.7)
    decode(lm, rm, config, PROMPTS[:1], width=2)
    found, seen[:] = list(seen), []
    with torch.no_grad():
        sequential_answer(lm, rm, PROMPTS[0], IDS[0], config, EOS_IDS)
    assert [s[:2] for s in found] == [s[:2] for s in seen]
    assert [s[2] for s in found] == pytest.approx([s[2] for s in seen], abs=2e-3) and all(s[2] < 0 for s in found)
