"""An enumerable world, in which the output distribution of a rule is known in closed form.

It is a tiny Llama and a tiny reward model over 5 tokens (one is EOS), segments of 2, answers of at most
4 tokens. Every logit and reward is tabulated from the real models; the loop and the ops run on the tables.
"""

import itertools
import math

import torch

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.protocols import Proposal, Scores
from stars_kernels.decoder.rules import (
    BestOf,
    Cards,
    Stars,
)
from stars_kernels.hf.proposing.draws import entropy, likeliest
from stars_kernels.ops import segment_sample
from stars_kernels.ops.philox import request_key
from tests.chi_square import chi_square
from tests.runs import run_of
from tests.tiny import tiny_language_model, tiny_reward_model

V, EOS, PROMPT, DEPTH, DECODES = 5, 4, [1, 3], 4, 50_000
P_VALUE = 1e-3


def make_world():
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

    def reserve(self, room):
        self.length = torch.zeros(room.slots, dtype=torch.int64)
        self.value = torch.zeros_like(self.length)
        self.tail = torch.zeros_like(self.length)

    def admit(self, admissions):
        slots = [admission.slot for admission in admissions]
        self.length[slots] = self.value[slots] = self.tail[slots] = 0
        return [len(admission.prompt) for admission in admissions]

    def propose(self, rows, plan, sampling, noise, eos, check_stop):
        check_stop()
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

    def open(self, rows, tokens, lengths):
        self.candidate, self.ends = self.value[rows.slot], self.length[rows.slot] + lengths
        for step in range(tokens.shape[1]):
            self.candidate = torch.where(step < lengths, self.candidate * V + tokens[:, step], self.candidate)

    def score(self, wave):
        return Scores(self.rewards[self.ends[wave], self.candidate[wave]])

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
        self.open, self.score, self.empty = table.open, table.score, table.rewards[0, 0]

    def reserve(self, room):
        """The table has."""

    def admit(self, admissions):
        return Scores(self.empty.expand(len(admissions)).clone())

    def commit(self, commit):
        return lambda: None


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
PLAIN = StarsConfig(max_new_tokens=DEPTH, top_k=None, temperature=2.0, seed=0, width=2)
