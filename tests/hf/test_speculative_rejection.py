"""Speculative Rejection on the engine: rows that go on from border to border, whatever the width and the memory."""

import pytest
import torch

import stars_kernels
from stars_kernels import SpeculativeRejection, StarsConfig, StarsError
from stars_kernels.decoder.draws import draw
from stars_kernels.decoder.rules import Plan, Verdict
from stars_kernels.hf.cache.fork import ForkCache
from stars_kernels.hf.proposing.proposer import ModelProposer
from stars_kernels.ops.philox import request_key
from tests.captured import segments_as_graphs
from tests.hf import families
from tests.hf.fork_check import check_decode
from tests.hf.test_cards import letters
from tests.hf.test_exactness import EOS_IDS, IDS, PROMPTS
from tests.hf.test_out_of_memory import exhausted, limited
from tests.sequential import sequential_answer
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

ENDS = (*EOS_IDS, *range(100, 118))
"""So many that attempts end at every border."""
RULE = SpeculativeRejection(6, keep=0.6, segment_size=4)
CONFIG = StarsConfig(seed=7, rule=RULE, max_new_tokens=18, temperature=0.9, eos_token_id=ENDS, progress=False)


def decode(lm, rm, config=CONFIG, prompts=PROMPTS, **settings):
    return stars_kernels.decode(lm, rm, prompts, config=config, request_ids=IDS[: len(prompts)], **settings)


def told(answer):
    """Of an output or an `Answer`: all but what depends on how it was computed."""
    counts = answer.counts
    tokens = getattr(answer, "token_ids", None) or answer.tokens
    trace = [(s.lengths, s.chosen, s.outcome, s.kept) for s in answer.segments]
    return tokens, trace, (counts.judged, counts.rejected, counts.attempts, counts.rejections), answer.finish_reason


@pytest.fixture(scope="module")
def truth(lm, rm):
    with torch.no_grad():
        pairs = zip(PROMPTS, IDS, strict=True)
        return [sequential_answer(lm, rm, prompt, id_, CONFIG, ENDS) for prompt, id_ in pairs]


@pytest.fixture
def went_on(monkeypatch):
    """How many tokens were still there, each time that rows went on."""
    found, real = [], ForkCache.go_on

    def noted(self, rows, held):
        there = real(self, rows, held)
        if held:
            found.append(there)
        return there

    monkeypatch.setattr(ForkCache, "go_on", noted)
    return found


@torch.no_grad()
def race_by_hand(lm, rm, prompt, id_):
    """By a second hand: n whole answers are drawn beforehand, and the race sees more and more of them.

    The winner, the attempts that stayed at each border, and how many tokens had to be drawn.
    """
    answers = []
    for attempt in range(RULE.n):
        answer = []
        while len(answer) < 18 and not (answer and answer[-1] in ENDS):
            row = lm(torch.tensor([prompt + answer])).logits[0, -1]
            answer.append(draw(row, "sample", request_key(7, id_), attempt, len(answer), CONFIG.sampling)[0])
        answers.append(answer)

    def reward(answer):
        return rm(torch.tensor([prompt + answer])).logits[0, 0].item()

    racing, stayed, drawn, seen = list(range(RULE.n)), [], 0, 0
    while True:
        drawn += sum(len(answers[a][seen : seen + 4]) for a in racing)
        seen += 4
        racing.sort(key=lambda a: (-reward(answers[a][:seen]), a))
        racing = racing[: -(-len(racing) * 6 // 10)]
        if all(len(answers[a]) <= seen for a in racing):
            return answers[racing[0]], stayed, drawn
        stayed.append(sorted(racing))


def test_the_definition_is_the_race_by_hand(lm, rm, truth):
    for prompt, id_, answer in zip(PROMPTS, IDS, truth, strict=True):
        (segment,) = answer.segments
        assert (answer.tokens, segment.kept, answer.counts.judged) == race_by_hand(lm, rm, prompt, id_)
        assert segment.length == len(answer.tokens) and segment.outcome == "best"
        assert answer.reward == segment.reward
        assert answer.counts.attempts == 6 and answer.counts.rejections == 5
        assert answer.counts.rejected == answer.counts.judged - len(answer.tokens)
    assert len({len(answer.segments[0].kept) for answer in truth}) > 1, "races of several lengths"


@pytest.mark.parametrize("width", [1, 2, 4, 6, "auto"])
def test_every_width_is_the_definition(lm, rm, truth, width, went_on):
    for batch_size in (5, 2):
        outputs = decode(lm, rm, width=width, batch_size=batch_size)
        assert [told(output) for output in outputs] == [told(answer) for answer in truth]
    if width != "auto":
        assert (0 in went_on) == (width < 6), "read again where fewer are decoded side by side than go on"
        assert any(went_on) == (width > 1)


def test_nothing_is_read_twice(lm, rm):
    """Where all that go on are decoded side by side: each sampled token once, by either model."""
    model, reward = tiny_language_model(), tiny_reward_model()
    read = {"lm": 0, "rm": 0}
    for name, body in (("lm", model.model), ("rm", reward.model)):

        def count(module, args, name=name):
            read[name] += args[0].shape[0] * args[0].shape[1]

        body.layers[0].register_forward_pre_hook(count)
    (output,) = decode(model, reward, CONFIG.replace(eos_token_id=()), PROMPTS[:1], width=6)
    prompt, counts = len(PROMPTS[0]), output.counts
    assert counts.judged == counts.sampled == 6 * 4 + 4 * 4 + 3 * 4 + 2 * 4 + 2 * 2
    assert counts.rm_scored == prompt + counts.judged
    assert read["rm"] == prompt + counts.judged + 1, "and the one of the layout's probe"
    # A row's last token is read when it goes on, so those that do not go on leave theirs unread.
    assert read["lm"] == prompt + counts.judged - (2 + 1 + 1 + 0 + 2) + 1
    assert output.segments[0].widths == [6, 4, 3, 2, 2]


def test_memory_of_a_race(lm, rm, monkeypatch):
    """Its rows need n * max_new_tokens tokens of keys and values a slot, beside the prefix, and no more."""
    held, close = [], ModelProposer.close

    def noted(self):
        if hasattr(self, "cache"):  # it is closed before it takes memory, too
            held.append(self.cache.kv_tokens)
        close(self)

    monkeypatch.setattr(ModelProposer, "close", noted)
    decode(lm, rm, CONFIG.replace(eos_token_id=()), PROMPTS[:1], width=6)
    assert held == [len(PROMPTS[0]) + 18 + 6 * 18]


@pytest.mark.parametrize("width", [1, 2, 6])
def test_fp32_is_equal_to_the_bit(width):
    lm, rm = tiny_language_model(torch.float32), tiny_reward_model(torch.float32)
    expected, found = decode(lm, rm, width=4, batch_size=5), decode(lm, rm, width=width, batch_size=2)
    for mine, other in zip(found, expected, strict=True):
        assert told(mine) == told(other)
        assert [s.rewards for s in mine.segments] == [s.rewards for s in other.segments]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "deepseek_v3", "bloom", "qwen3_next", "mamba", "bamba"])
def test_families(family):
    """Rows with states, and of models that read one token at a time behind one, are read again."""
    check_decode(families.tiny(family), rule=SpeculativeRejection(4, keep=0.6, segment_size=3))


@pytest.mark.parametrize("kind", ["likelihood", "head", "text", "reader"])
@pytest.mark.parametrize("width", [2, 6])
def test_every_kind_of_reward(lm, rm, kind, width):
    head = torch.nn.Linear(24, 1).double()
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    plain = byte_tokenizer()

    def likelihood(prompt, answer):
        logits = lm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logits.gather(1, torch.tensor(answer)[:, None]).sum().item() if answer else 0.0

    models = {
        "likelihood": (stars_kernels.Likelihood(lm), likelihood),
        "head": (head, lambda p, a: head(lm.model(torch.tensor([p + a])).last_hidden_state)[0, -1, 0].item()),
        "text": (
            lambda prompts, answers: [letters(answer) for answer in answers],
            lambda prompt, answer: letters(plain.decode(answer, skip_special_tokens=True)),
        ),
        "reader": (stars_kernels.RewardModel(rm, byte_tokenizer(reverse=True)), None),
    }
    model, reward = models[kind]
    outputs = decode(lm, model, CONFIG, PROMPTS[:3], tokenizer=plain, width=width)
    if reward is None:  # by text: halves of characters are not read, so that the definition needs the engine's text
        again = decode(lm, model, CONFIG, PROMPTS[:3], tokenizer=plain, width=3, batch_size=1)
        assert [told(output) for output in outputs] == [told(output) for output in again]
        return
    with torch.no_grad():
        for prompt, id_, output in zip(PROMPTS, IDS, outputs, strict=False):
            assert told(output) == told(sequential_answer(lm, reward, prompt, id_, CONFIG, ENDS))


@pytest.mark.parametrize("reward", ["model", "head"])
def test_the_first_turn_as_graphs(lm, rm, monkeypatch, reward):
    torch.manual_seed(0)
    rm = rm if reward == "model" else torch.nn.Linear(24, 1).double()
    config = CONFIG.replace(eos_token_id=())
    expected = decode(lm, rm, config, width=2)
    made = segments_as_graphs(monkeypatch)
    for width in (2, 6):
        assert [told(o) for o in decode(lm, rm, config, width=width)] == [told(o) for o in expected]
    assert sum(graphs.counts.replays for graphs in made) > 0


def test_stop_strings_and_events(lm, rm):
    """An answer is one event, at its end; a stop ends a row, which stays in the race by its reward."""
    plain, config = byte_tokenizer(), CONFIG.replace(stop_strings=("e", "\n", "u"), eos_token_id=(), max_new_tokens=40)
    stops = {plain(stop)["input_ids"][0] for stop in config.stop_strings}
    events = list(stars_kernels.stream(lm, rm, PROMPTS, config=config, request_ids=IDS, tokenizer=plain, width=4))
    assert sorted(event.index for event in events) == list(range(len(PROMPTS)))
    for event in events:
        with torch.no_grad():
            expected = sequential_answer(
                lm, rm, PROMPTS[event.index], IDS[event.index], config, (), stops=lambda answer: answer[-1] in stops
            )
        assert event.token_ids == event.output.token_ids == expected.tokens
        assert told(event.output) == told(expected)


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("rows", [1, 5, 12])
def test_out_of_memory(rm, truth, rows):
    outputs = decode(limited(tiny_language_model(), rows), rm, width=6)
    assert [told(output)[0] for output in outputs] == [answer.tokens for answer in truth]
    assert [told(output)[2] for output in outputs] == [told(answer)[2] for answer in truth]
    assert outputs[0].memory_limits["width"] < 6


@pytest.mark.filterwarnings("ignore:out of memory")
def test_memory_that_runs_out_on_the_way(lm, rm, truth, went_on):
    """In every forward in turn, of either model: what rows held is then read again, and nothing is counted twice."""
    outcomes = set()
    for when in range(4, 36, 2):  # the first two forwards are the layouts' probes
        calls = 0

        def fail_once(module, args, when=when):
            nonlocal calls
            calls += 1
            if calls == when:
                raise exhausted()

        models = tiny_language_model(), tiny_reward_model()
        for model in models:
            model.base_model.layers[1].register_forward_pre_hook(fail_once)
        went_on.clear()
        outputs = decode(*models, prompts=PROMPTS[:3], width=6)
        assert [told(output)[:3] for output in outputs] == [told(answer)[:3] for answer in truth[:3]]
        outcomes.add(0 in went_on)
    assert True in outcomes


def test_faults(lm, rm):
    def reward(prompts, answers):
        return [float("nan") if len(answer) > 5 else 1.0 for answer in answers]

    with pytest.raises(StarsError, match=r"segment 0: attempt \d: the reward is nan, expected a number"):
        decode(lm, reward, CONFIG.replace(eos_token_id=()), tokenizer=byte_tokenizer())


class Race:
    """A rule of a user's, in which no attempt ever ends before the third turn."""

    def plan(self, answer):
        return Plan(3, answer.racing or 3, race=True)

    def __init__(self, chosen, outcome, keep=None):
        self.verdict = Verdict(chosen, outcome, keep=keep)

    def judge(self, answer, candidates):
        return Verdict(0, None) if len(candidates) < self.plan(answer).attempts else self.verdict


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        ((0, "best"), "attempt 2: the rule took attempt 0 of a race, expected one that has ended"),
        ((0, None), r"attempt 2: the rule kept \(\) and took none, expected one at least that has not ended"),
        ((0, None, (1, 0)), r"the rule kept \(1, 0\) of 3 attempts, expected indices in rising order"),
        ((0, None, (3,)), r"the rule kept \(3,\) of 3 attempts, expected indices in rising order"),
    ],
)
def test_a_rule_of_ones_own_that_fails(lm, rm, verdict, message, width):
    with pytest.raises(StarsError, match=message):
        decode(lm, rm, CONFIG.replace(rule=Race(*verdict), eos_token_id=()), width=width)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpeculativeRejection(0), "n is 0, expected an integer >= 1"),
        (lambda: SpeculativeRejection(4, keep=1.0), r"keep is 1.0, expected a number in \(0, 1\)"),
        (lambda: SpeculativeRejection(4, keep=0), r"keep is 0, expected a number in \(0, 1\)"),
        (lambda: SpeculativeRejection(4, keep="half"), r"keep is 'half', expected a number in \(0, 1\)"),
        (lambda: SpeculativeRejection(4, segment_size=0), "segment_size is 0, expected an integer >= 1"),
    ],
)
def test_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_race_of_attempts_that_end_by_entropy_is_refused(lm, rm):
    class Both(SpeculativeRejection):
        def plan(self, answer):
            return super().plan(answer)._replace(entropy=3.0)

    with pytest.raises(ValueError, match="plans a race of attempts that end by entropy, expected a race of sampled"):
        decode(lm, rm, CONFIG.replace(rule=Both(3)))


def test_settings_of_stars_beside_it(lm, rm):
    with pytest.raises(ValueError, match=r"^segment_size is given beside rule=SpeculativeRejection\(n=6,"):
        stars_kernels.decode(lm, rm, [1, 2], rule=RULE, segment_size=4)
