"""width="auto": how many attempts to decode side by side. It changes speed only, and reads no clock."""

from __future__ import annotations

from dataclasses import dataclass

ROWS_PER_STEP_COST = 24
"""A round of R rows costs about 1 + R / 24 rounds of one row (a 135M model on a 2-core CPU, weights packed)."""
CHOICES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 32)


@dataclass
class AcceptanceHistory:
    """Judged and accepted attempts so far, of a batch of prompts; starts at a prior of 1 in 4."""

    judged: int = 4
    accepted: int = 1

    def best_width(self, prompts: int, max_attempts: int) -> int:
        """The width with the lowest expected cost of a decided segment: cost(prompts * w) / P(one of w is accepted)."""
        miss = 1 - self.accepted / self.judged

        def cost(width: int) -> float:
            return (1 + prompts * width / ROWS_PER_STEP_COST) / (1 - miss**width + 1e-9)

        return min([min(width, max_attempts) for width in CHOICES], key=cost)
