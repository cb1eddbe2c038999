"""What two sequences have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return how far two lists, or two texts, agree from their starts on."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # by halves: slices are compared faster than items
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
