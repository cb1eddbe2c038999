"""What a server counts, in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from stars_kernels.decoder.output import Counts

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)
"""Of the seconds that requests take."""


class Metrics:
    """Counters of one server."""

    def __init__(self, waiting: Callable[[], int], active: Callable[[], int]) -> None:
        """waiting, active: answers that wait for a slot and that have one, at any time."""
        own = self.registry = CollectorRegistry()
        self.requests = Counter("stars_requests", "Requests for answers, by HTTP status.", ["status"], registry=own)
        self.seconds = Histogram("stars_request_seconds", "Of such requests.", buckets=BUCKETS, registry=own)
        self.answers = Counter("stars_answers", "Answers by finish_reason.", ["finish_reason"], registry=own)
        self.tokens = Counter(
            "stars_tokens", "prompt, answer, sampled (in all attempts), scored (by the reward model).", ["kind"],
            registry=own,
        )  # fmt: skip
        self.attempts = Counter("stars_attempts", "Judged attempts at segments.", registry=own)
        self.accepted = Counter("stars_attempts_accepted", "Attempts that passed their test.", registry=own)
        rate = Gauge("stars_acceptance_rate", "Accepted attempts / judged attempts, of all answers.", registry=own)
        rate.set_function(self._rate)
        Gauge("stars_waiting", "Answers that wait for a slot.", registry=own).set_function(waiting)
        Gauge("stars_slots_active", "Slots in which an answer is decoded.", registry=own).set_function(active)
        self._judged, self._accepted, self._count, self._sum = 0, 0, 0, 0.0

    def ended(self, status: int, seconds: float) -> None:
        """Count a request for answers."""
        self.requests.labels(str(status)).inc()
        self.seconds.observe(seconds)
        if status == 200:
            self._count, self._sum = self._count + 1, self._sum + seconds

    def answered(self, reason: str, tokens: int, counts: Counts) -> None:
        """Count an answer of so many tokens."""
        self.answers.labels(reason).inc()
        kinds = {"prompt": counts.prompt, "answer": tokens, "sampled": counts.sampled, "scored": counts.rm_scored}
        for kind, number in kinds.items():
            self.tokens.labels(kind).inc(number)
        self.attempts.inc(counts.attempts)
        self.accepted.inc(counts.accepted)
        self._judged, self._accepted = self._judged + counts.attempts, self._accepted + counts.accepted

    @property
    def typical_seconds(self) -> float:
        """What a request has taken that was answered, on average; 1 where none was."""
        return self._sum / self._count if self._count else 1.0

    def text(self) -> bytes:
        """Return all of them as Prometheus reads them."""
        return generate_latest(self.registry)

    def _rate(self) -> float:
        return self._accepted / self._judged if self._judged else 0.0
