"""A judge of the demo's answers that no rule sees: `judge: {function: demo.judges:vader_judge}`."""

from collections.abc import Sequence

from demo.models import vader


def vader_judge(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """Return how much gladder each first answer sounds than the second, by VADER's compound score."""
    return [vader(one) - vader(other) for one, other in zip(first, second, strict=True)]
