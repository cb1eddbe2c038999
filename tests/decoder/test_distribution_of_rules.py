"""The other rules' output distributions equal their closed forms, and the tests see planted faults."""

import math
from dataclasses import replace

import pytest
import torch

from stars_kernels.decoder import round as round_module
from stars_kernels.decoder.answer import Answer
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
from tests.decoder import enumerable
from tests.decoder.enumerable import DECODES, DEPTH, EOS, P_VALUE, PLAIN, V, closed_form, p_value, run

RULES = {
    "plain": Plain(),
    "best-of-3": BestOf(3),
    "best-of-4-by-blocks": BlockBestOf(4, segment_size=2),
    "decaying-schedule": BlockBestOf((4, 2), segment_size=1),
    "cards": Cards(segment_size=3, entropy_threshold=1.1, max_attempts=4, alpha=0.0, beta=1.0, reward_threshold=1.0),
    "cards-hard": Cards(entropy_threshold=0.9, max_attempts=3, accept="hard", beta=1.0, reward_threshold=0.6),
}


@pytest.mark.parametrize("name", RULES)
def test_distribution_of_a_rule_is_the_closed_form(world, name):
    config = PLAIN.replace(rule=RULES[name])
    expected = closed_form(world, config)
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-12)
    assert p_value(run(world, config, seed=1, decodes=15_000), expected) > P_VALUE


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
    monkeypatch.setattr(enumerable, "entropy", lambda logits: right(logits / PLAIN.temperature))
    return PLAIN.replace(rule=RULES["cards"])


def ends_where_the_model_is_sure(monkeypatch):
    right = entropy
    monkeypatch.setattr(enumerable, "entropy", lambda logits: 2.2 - right(logits))
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
    decodes = {the_noise_of_rejected_attempts_again: DECODES}.get(plant, 10_000 if plant in CARDS_FAULTS else 20_000)
    found = run(world, config, seed=1, decodes=decodes)
    assert p_value(found, closed_form(world, config)) < P_VALUE


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
        patch.setattr(enumerable, "likeliest", one_rank_late)
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


def race_p_value(world, name, decodes=5_000):
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
