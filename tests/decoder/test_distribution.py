"""The decoder's output distribution equals STARS' in closed form, and the test sees planted faults."""

import pytest

from stars_kernels.decoder import round as round_module
from stars_kernels.decoder.rules import Stars, Verdict, best
from tests.decoder.enumerable import BASE, P_VALUE, closed_form, p_value, run

CASES = {
    "soft": BASE,
    "soft-width-1": BASE.replace(width=1),
    "soft-width-3-topk": BASE.replace(width=3, top_k=3, temperature=0.8, alpha=0.4),
    "hard": BASE.replace(accept="hard", reward_threshold=0.6),
    "fallback-always": BASE.replace(accept="hard", reward_threshold=50.0, max_attempts=4),
}


@pytest.mark.parametrize("name", CASES)
def test_distribution_is_the_closed_form(world, name):
    config = CASES[name]
    expected = closed_form(world, config)
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-12)
    assert p_value(run(world, config, seed=1), expected) > P_VALUE


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


@pytest.mark.parametrize(
    "plant", [one_attempt_more, tau_one_segment_early, fallback_before_accept, one_u_for_all_segments]
)
def test_planted_fault_is_caught(world, monkeypatch, plant):
    config = plant(monkeypatch)
    assert p_value(run(world, config, seed=1), closed_form(world, BASE)) < P_VALUE
