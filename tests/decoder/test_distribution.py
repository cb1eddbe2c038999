"""The decoder's output distribution equals STARS' in closed form, and the test sees planted faults.

An enumerable world: a tiny Llama and a tiny reward model over 5 tokens (one is EOS), segments of 2, answers of at most
4 tokens. Every logit and reward is tabulated from the real models; the loop and the ops run on the tables.
"""

import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch

from stars_kernels.decoder import round as round_module
from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.protocols import Proposal, Scores
from stars_kernels.decoder.rules import (
    Args,
    BestOf,
    BlockBestOf,
    Cards,
    Plain,
    SpeculativeRejection,
    Stars,
    Verdict,
    best,
)
from stars_kernels.hf.proposing.draws import entropy, likeliest
from stars_kernels.ops import segment_sample
from stars_kernels.ops.philox import request_key
from tests.chi_square import chi_square
from tests.runs import run_of
from tests.tiny import tiny_language_model, tiny_reward_model

V, EOS, PROMPT, DEPTH, DECODES = 5, 4, [1, 3], 4, 50_000
P_VALUE = 1e-3


@pytest.fixture(scope="module")
def world():
    """Logits after, and reward of, every answer of 0..4 tokens, indexed by (length, base-5 value)."""
    small = dict(vocab_size=V, eos_token_id=EOS, bos_token_id=0)
    lm, rm = tiny_language_model(**small), tiny_reward_model(**small)
    logits = torch.zeros(DEPTH + 1, V**DEPTH, V, dtype=torch.float64)
    rewards = torch.zeros(DEPTH + 1, V**DEPTH, dtype=torch.float64)
    with torch.no_grad():
        for length in range(DEPTH + 1):
            answers = torch.tensor(list(itertools.product(range(V), repeat=length)), dtype=torch.int64)
            ids = torch.cat((torch.tensor([PROMPT]).expand(V**length, -1), answers.view(V**length, length)), dim=1)
            logits[length, : V**length] = lm(ids).logits[:, -1]
            hidden = rm.model(ids).last_hidden_state[:, -1]
            rewards[length, : V**length] = rm.score(hidden)[:, 0]
    known = torch.cat([rewards[n, : V**n] for n in range(DEPTH + 1)])
    return logits, (rewards - known.mean()) / known.std()  # spread 1, so that r* and beta below have a meaning


class Table:
    """Proposer and Scorer on the tables; a prompt's state is its accepted (length, value)."""

    device = torch.device("cpu")

    def __init__(self, world):
        self.logits, self.rewards = world

    def begin(self, prompts, max_new_tokens, segment_size):
        self.length = torch.zeros(len(prompts), dtype=torch.int64)
        self.value = torch.zeros_like(self.length)
        self.tail = torch.zeros_like(self.length)
        return Scores(self.rewards[0, 0].expand(len(prompts)).clone())

    def propose(self, rows, plan, sampling, noise, eos):
        value, drawn = self.value[rows.slot], []
        for held in rows.held_tokens().unbind(dim=1):
            value = value * V + held
        for step in range(plan.size):
            row = self.logits[(rows.position + step).clamp(max=DEPTH), value % V**DEPTH]  # any row, past the end
            if plan.draw == "likeliest":
                token, logprob = likeliest(row, None, rows.attempt, plan.attempts)
            else:
                draws = (rows.key, rows.attempt, rows.position + step)
                token, logprob = segment_sample(row, *draws, stream=noise, **sampling)
            drawn.append((token, logprob, entropy(row) if step else row[:, 0] * math.nan))
            value = value * V + token
        return Proposal(*(torch.stack(column, dim=1) for column in zip(*drawn, strict=True)))

    def score(self, rows, tokens, lengths):
        self.candidate = self.value[rows.slot]
        for step in range(tokens.shape[1]):
            self.candidate = torch.where(step < lengths, self.candidate * V + tokens[:, step], self.candidate)
        return Scores(self.rewards[self.length[rows.slot] + lengths, self.candidate])

    def commit(self, commit):
        def settle():
            written = commit.row >= 0
            self.tail[commit.slot[written]] = self.candidate[commit.row[written]]
            moved = commit.slot[commit.advance]
            self.value[moved] = self.tail[moved]
            self.length[moved] += commit.length[commit.advance]

        return settle


class Scorer:
    """The table's other face, so that a commit reaches it once."""

    def __init__(self, table):
        self.begin, self.score, self.commit = table.begin, table.score, lambda commit: lambda: None


def run(world, config, seed, decodes=DECODES, limit=DEPTH):
    """The answers of `decodes` requests, in batched calls."""
    answers, size = [], 5_000
    for start in range(0, decodes, size):
        table = Table(world)
        batch = [Answer(request_key(seed, i), PROMPT, limit) for i in range(start, min(start + size, decodes))]
        run_of(table, Scorer(table), config, batch, eos=(EOS,)).run()
        assert not any(answer.error for answer in batch)
        answers += [tuple(answer.tokens) for answer in batch]
    return answers


def sizes_and_attempts(config, block):
    rule = config.resolved_rule
    if isinstance(rule, Stars):
        return rule.segment_size, rule.max_attempts
    if isinstance(rule, BestOf):
        return DEPTH, rule.n
    return rule.segment_size, rule.schedule[min(block, len(rule.schedule) - 1)]


def closed_form(world, config):
    """{answer: probability} of the sequential algorithm."""
    logits, rewards = world
    rule = config.resolved_rule
    tested = isinstance(rule, Stars)
    if tested:
        target = rule.reward_threshold
        r0 = (1 - rule.alpha) * rewards[0, 0].item() + rule.alpha * target

    def index(answer):
        return sum(token * V ** (len(answer) - 1 - i) for i, token in enumerate(answer))

    def next_token(answer):
        scores = logits[len(answer), index(answer)] / config.temperature
        if config.top_k:
            scores = scores.masked_fill(scores < scores.topk(config.top_k).values[-1], -math.inf)
        return scores.softmax(0).tolist()

    def unsure(answer):
        """Whether a segment of CARDS ends here."""
        if not isinstance(rule, Cards):
            return False
        shares = logits[len(answer), index(answer)].softmax(0).tolist()
        return -sum(p * math.log(p) for p in shares) >= rule.entropy_threshold

    def candidates(answer, size):
        for first, p in enumerate(next_token(answer)):
            if first == EOS or size == 1 or unsure((*answer, first)):
                yield (first,), p
            else:
                for rest, q in candidates((*answer, first), size - 1):
                    yield (first, *rest), p * q

    def segment(answer, block):
        """[(candidate, P(it is chosen))]"""
        rows = []
        size, attempts = sizes_and_attempts(config, block)
        for candidate, p in candidates(answer, min(size, DEPTH - len(answer))):
            n = len(answer) + len(candidate)
            r = rewards[n, index(answer + candidate)].item()
            tau = min(target, r0 + n * (target - r0) / config.max_new_tokens) if tested else math.inf
            if not tested:
                a = 0.0  # the best of all is taken
            elif rule.accept == "hard":
                a = float(r >= tau)
            else:
                a = min(1.0, math.exp(min(0.0, (r - tau) / rule.beta)))
            rows.append((candidate, p, r, a))
        accept = sum(p * a for _, p, _, a in rows)
        tries = sum((1 - accept) ** i for i in range(attempts))
        for candidate, p, r, a in rows:
            below = sum(q * (1 - b) for _, q, s, b in rows if s < r)  # mass of rejected candidates of lower reward
            equal = sum(q * (1 - b) for _, q, s, b in rows if s == r)
            best = (below + equal) ** attempts - below**attempts
            share = p * (1 - a) / equal if equal else 0.0
            yield candidate, p * a * tries + best * share

    result = {}

    def walk(answer, probability, block=0):
        for candidate, p in segment(answer, block):
            longer = answer + candidate
            if longer[-1] == EOS or len(longer) == DEPTH:
                result[longer] = result.get(longer, 0.0) + probability * p
            elif p > 0:
                walk(longer, probability * p, block + 1)

    walk((), 1.0)
    return result


def p_value(answers, expected):
    """Chi-square of the answers against {answer: probability}; rare answers share a bin; 0 outside the support."""
    counts = {answer: 0 for answer in expected}
    for answer in answers:
        if expected.get(answer, 0.0) == 0.0:
            return 0.0
        counts[answer] += 1
    common = [a for a in expected if expected[a] * len(answers) >= 5]
    rare = [a for a in expected if a not in set(common)]
    observed = [counts[a] for a in common] + [sum(counts[a] for a in rare)]
    wanted = [expected[a] * len(answers) for a in common] + [sum(expected[a] for a in rare) * len(answers)]
    if wanted[-1] < 5:  # too rare even together
        observed[0] += observed.pop()
        wanted[0] += wanted.pop()
    return chi_square(observed, wanted)


BASE = StarsConfig(
    segment_size=2, max_new_tokens=DEPTH, max_attempts=4, top_k=None, temperature=2.0, reward_threshold=1.0, beta=1.0,
    alpha=0.0, seed=0,
)  # fmt: skip
CASES = {
    "soft": BASE,
    "soft-width-1": BASE.replace(width=1),
    "soft-width-3-topk": BASE.replace(width=3, top_k=3, temperature=0.8, alpha=0.4),
    "hard": BASE.replace(accept="hard", reward_threshold=0.6),
    "fallback-always": BASE.replace(accept="hard", reward_threshold=50.0, max_attempts=4),
}


RULES = {
    "plain": Plain(),
    "best-of-3": BestOf(3),
    "best-of-4-by-blocks": BlockBestOf(4, segment_size=2),
    "decaying-schedule": BlockBestOf((4, 2), segment_size=1),
    "cards": Cards(segment_size=3, entropy_threshold=1.1, max_attempts=4, alpha=0.0, beta=1.0, reward_threshold=1.0),
    "cards-hard": Cards(entropy_threshold=0.9, max_attempts=3, accept="hard", beta=1.0, reward_threshold=0.6),
}
PLAIN = StarsConfig(max_new_tokens=DEPTH, top_k=None, temperature=2.0, seed=0, width=2)
CASES |= {name: PLAIN.replace(rule=rule) for name, rule in RULES.items()}
FEWER = {"cards": 15_000, "cards-hard": 15_000}
"""Decodes of cases with many rounds."""


@pytest.mark.parametrize("name", CASES)
def test_distribution_is_the_closed_form(world, name):
    config = CASES[name]
    expected = closed_form(world, config)
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-12)
    assert p_value(run(world, config, seed=1, decodes=FEWER.get(name, DECODES)), expected) > P_VALUE


def one_attempt_more(monkeypatch):
    return BASE.replace(max_attempts=BASE.max_attempts + 1)


def tau_one_segment_early(monkeypatch):
    right = Stars.threshold
    monkeypatch.setattr(Stars, "threshold", lambda self, answer, tokens: right(self, answer, max(tokens - 2, 0)))
    return BASE


def fallback_before_accept(monkeypatch):
    right = Stars.judge

    def wrong(self, answer, candidates):
        verdict = right(self, answer, candidates)
        last = len(candidates) == self.max_attempts  # goes to the fallback without being tested
        return Verdict(best(candidates), "fallback") if last else verdict

    monkeypatch.setattr(Stars, "judge", wrong)
    return BASE


def one_u_for_all_segments(monkeypatch):
    right = round_module.accept_uniforms
    monkeypatch.setattr(
        round_module, "accept_uniforms", lambda keys, positions, attempts: right(keys, [0] * len(keys), attempts)
    )
    return BASE


def one_of_n_fewer(monkeypatch):
    def wrong(self, answer, candidates):
        return Verdict(best(candidates), "best" if len(candidates) == self.n - 1 else None)

    monkeypatch.setattr(BestOf, "judge", wrong)
    return PLAIN.replace(rule=BestOf(3))


def the_last_of_a_block(monkeypatch):
    right = BlockBestOf.judge
    monkeypatch.setattr(BlockBestOf, "judge", lambda self, *args: right(self, *args)._replace(chosen=len(args[1]) - 1))
    return PLAIN.replace(rule=RULES["decaying-schedule"])


def a_schedule_that_never_decays(monkeypatch):
    monkeypatch.setattr(Answer, "decided", 0)
    return PLAIN.replace(rule=RULES["decaying-schedule"])


def ends_behind_the_unsure_token(monkeypatch):
    right = round_module.find_ends

    def wrong(answers, rows, proposal, *rest):
        late = proposal.entropies.roll(1, dims=1)
        late[:, 0] = math.nan
        return right(answers, rows, replace(proposal, entropies=late), *rest)

    monkeypatch.setattr(round_module, "find_ends", wrong)
    return PLAIN.replace(rule=RULES["cards"])


def entropy_at_the_sampling_temperature(monkeypatch):
    right = entropy
    monkeypatch.setattr(sys.modules[__name__], "entropy", lambda logits: right(logits / PLAIN.temperature))
    return PLAIN.replace(rule=RULES["cards"])


def ends_where_the_model_is_sure(monkeypatch):
    right = entropy
    monkeypatch.setattr(sys.modules[__name__], "entropy", lambda logits: 2.2 - right(logits))
    return PLAIN.replace(rule=RULES["cards"])


def tau_of_an_empty_answer(monkeypatch):
    right = Stars.threshold
    monkeypatch.setattr(Stars, "threshold", lambda self, answer, tokens: right(self, answer, 0))
    return PLAIN.replace(rule=RULES["cards"])


def the_noise_of_rejected_attempts_again(monkeypatch):
    monkeypatch.setattr(Answer, "number", lambda self, plan, attempt: attempt)
    return PLAIN.replace(rule=RULES["cards-hard"])


CARDS_FAULTS = [
    the_noise_of_rejected_attempts_again,
    ends_behind_the_unsure_token, entropy_at_the_sampling_temperature, ends_where_the_model_is_sure,
    tau_of_an_empty_answer,
]  # fmt: skip


@pytest.mark.parametrize("plant", [one_of_n_fewer, the_last_of_a_block, a_schedule_that_never_decays, *CARDS_FAULTS])
def test_planted_fault_of_a_rule_is_caught(world, monkeypatch, plant):
    config = plant(monkeypatch)
    subtle = plant not in CARDS_FAULTS or plant is the_noise_of_rejected_attempts_again
    found = run(world, config, seed=1, decodes=DECODES if subtle else 10_000)
    assert p_value(found, closed_form(world, config)) < P_VALUE


@pytest.mark.parametrize(
    "plant", [one_attempt_more, tau_one_segment_early, fallback_before_accept, one_u_for_all_segments]
)
def test_planted_fault_is_caught(world, monkeypatch, plant):
    config = plant(monkeypatch)
    assert p_value(run(world, config, seed=1), closed_form(world, BASE)) < P_VALUE


ARGS = [Args(k, w) for k, w in [(2, 0.5), (3, 1.0), (3, 4.0), (4, 2.0), (5, 0.7), (5, 30.0), (1, 9.0), (5, -2.0)]]


def by_brute_force(world, rule):
    """The answer of ARGS: every token's score, one step after the other."""
    logits, rewards = world
    answer, value = (), 0
    while len(answer) < DEPTH and EOS not in answer:
        row = logits[len(answer), value].tolist()
        total = math.log(sum(math.exp(x) for x in row))
        kept = sorted(range(V), key=lambda token: -row[token])[: rule.k]
        token = max(
            kept, key=lambda token: row[token] - total + rule.w * rewards[len(answer) + 1, value * V + token].item()
        )
        answer, value = (*answer, token), value * V + token
    return answer


def args_are_right(world):
    """Whether every rule of ARGS gives its one answer, whatever seed, width and sampling settings."""
    for rule in ARGS:
        config = PLAIN.replace(rule=rule, width=3 if rule.k > 2 else "auto", top_k=2, temperature=0.3)
        if set(run(world, config, seed=rule.k, decodes=20)) != {by_brute_force(world, rule)}:
            return False
    return True


def test_args_is_a_search(world):
    assert args_are_right(world)
    assert len({by_brute_force(world, rule) for rule in ARGS}) > 3


def the_reward_alone(self, candidate):
    return self.w * candidate.reward


def the_log_probability_alone(self, candidate):
    return candidate.logprob


def the_probability(self, candidate):
    return math.exp(candidate.logprob) + self.w * candidate.reward


@pytest.mark.parametrize("score", [the_reward_alone, the_log_probability_alone, the_probability])
def test_planted_fault_of_args_is_caught(world, monkeypatch, score):
    monkeypatch.setattr(Args, "score", score)
    assert not args_are_right(world)


def test_args_that_leave_out_the_likeliest_or_draw_at_random_are_caught(world, monkeypatch):
    plan = Args.plan
    with monkeypatch.context() as patch:
        patch.setattr(Args, "plan", lambda self, answer: plan(self, answer)._replace(draw="sample"))
        assert not args_are_right(world)

    right = likeliest

    def one_rank_late(logits, source, attempt, count):
        return right(logits, source, (attempt + 1).clamp(max=count - 1), count)

    with monkeypatch.context() as patch:
        patch.setitem(globals(), "likeliest", one_rank_late)
        assert not args_are_right(world)


RACES = {  # and the tokens of an answer, at most
    "halves": (SpeculativeRejection(3, keep=0.5, segment_size=1), 3),
    "most": (SpeculativeRejection(3, keep=0.9, segment_size=2), 3),
    "two": (SpeculativeRejection(2, keep=0.5, segment_size=2), 4),
    "four": (SpeculativeRejection(4, keep=0.7, segment_size=1), 2),
}


def race_in_closed_form(world, config, limit):
    """{answer: probability}.

    Attempts are independent, and which of them stay does not change how one goes on. So a race is one of n whole
    answers, drawn beforehand, of which it sees more and more: its winner is found for all n-tuples of them.
    """
    (logits, rewards), rule = world, config.rule

    def value(answer):
        return sum(token * V ** (len(answer) - 1 - i) for i, token in enumerate(answer))

    drawn = {(): 1.0}
    for _ in range(limit):
        open_ones = {answer: p for answer, p in drawn.items() if EOS not in answer}
        drawn = {answer: p for answer, p in drawn.items() if EOS in answer}
        for answer, p in open_ones.items():
            shares = (logits[len(answer), value(answer)] / config.temperature).softmax(0).tolist()
            drawn |= {(*answer, token): p * share for token, share in enumerate(shares)}
    answers = list(drawn)
    rows = torch.cartesian_prod(*[torch.arange(len(answers))] * rule.n)  # [N, n]
    weight = torch.tensor(list(drawn.values()), dtype=torch.float64)[rows].prod(dim=1)
    winner, running = torch.full((len(rows),), -1), torch.ones_like(rows, dtype=torch.bool)
    count = rule.n
    for seen in range(rule.segment_size, limit + rule.segment_size, rule.segment_size):
        shown = torch.tensor([rewards[len(a[:seen]), value(a[:seen])] for a in answers])
        order = shown[rows].masked_fill(~running, -math.inf).sort(dim=1, descending=True, stable=True).indices
        count = math.ceil(rule.keep * count)
        running = torch.zeros_like(running).scatter(1, order[:, :count], True)
        ended = torch.tensor([len(a) <= seen for a in answers])[rows]
        over = (ended | ~running).all(dim=1) & (winner < 0)
        winner = torch.where(over, rows.gather(1, order[:, :1])[:, 0], winner)
    total = torch.zeros(len(answers), dtype=torch.float64).index_add(0, winner, weight)
    return dict(zip(answers, total.tolist(), strict=True))


def race_p_value(world, name, decodes=8_000):
    rule, limit = RACES[name]
    config = PLAIN.replace(rule=rule, max_new_tokens=limit)
    expected = race_in_closed_form(world, config, limit)
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-12)
    return p_value(run(world, config, seed=1, decodes=decodes, limit=limit), expected)


@pytest.mark.parametrize("name", RACES)
def test_distribution_of_a_race_is_the_closed_form(world, name):
    assert race_p_value(world, name) > P_VALUE


def fewer_stay(self, answer, candidates):
    return right_judge(replace(self, keep=self.keep / 2), answer, candidates)


def the_worst_stay(self, answer, candidates):
    turned = [replace(candidate, reward=-candidate.reward) for candidate in candidates]
    return right_judge(self, answer, turned)


def what_ended_always_stays(self, answer, candidates):
    raised = [replace(c, reward=c.reward + 100 * c.ended) for c in candidates]
    return right_judge(self, answer, raised)


def the_first_that_ended_is_taken(self, answer, candidates):
    verdict = right_judge(self, answer, candidates)
    ended = [i for i, candidate in enumerate(candidates) if candidate.ended]
    last = len(candidates) == self.plan(answer).attempts
    return Verdict(ended[0], "best") if last and ended else verdict


right_judge = SpeculativeRejection.judge


@pytest.mark.parametrize("judge", [fewer_stay, the_worst_stay, what_ended_always_stays, the_first_that_ended_is_taken])
def test_planted_fault_of_a_race_is_caught(world, monkeypatch, judge):
    monkeypatch.setattr(SpeculativeRejection, "judge", judge)
    assert race_p_value(world, "most" if judge is fewer_stay else "halves") < P_VALUE


def test_borders_a_token_late_are_caught(world, monkeypatch):
    plan = SpeculativeRejection.plan
    monkeypatch.setattr(
        SpeculativeRejection, "plan", lambda self, a: plan(self, a)._replace(size=self.segment_size + 1)
    )
    assert race_p_value(world, "halves") < P_VALUE


def test_one_noise_for_all_attempts_is_caught(world, monkeypatch):
    monkeypatch.setattr(Answer, "number", lambda self, plan, attempt: attempt // 2)
    assert race_p_value(world, "halves") < P_VALUE
