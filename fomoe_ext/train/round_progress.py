"""Progress of one rank in the current round, and its counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class RoundProgress:
    """Steps taken and due, tokens, and sums over the steps of this rank."""

    def __init__(self, local_steps: int, device: torch.device) -> None:
        """`local_steps`: of a whole round; a slower site may have fewer steps due."""
        self.local_steps = local_steps
        self.steps = 0
        """Local steps taken."""
        self.due = local_steps
        """Local steps that this site takes in the round."""
        self.due_next = local_steps
        """Local steps that this site takes in the next round."""
        self.spoilt = False
        """Parameters are NaN or infinite: this site takes no more steps in the round."""
        self.tokens = 0
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        """Sum of the steps' cross entropies, nats per token."""
        self.rows = torch.zeros((), dtype=torch.int64, device=device)
        self.slots = 0

    @property
    def left(self) -> int:
        """Local steps that this site has yet to take before the meeting."""
        return 0 if self.spoilt else self.due - self.steps

    @property
    def scheduled(self) -> int:
        """Position of the learning rate schedule within a whole round.

        A site with fewer steps advances further per step, so all sites end at the same position.
        """
        return self.steps * self.local_steps // self.due

    def counts(self) -> tuple[float, int, int]:
        """Sum of this rank's losses, rows and slots of the round so far."""
        return float(self.loss), int(self.rows), self.slots

    def set_counts(self, counts: tuple[float, int, int]) -> None:
        """Sets the counts to what `counts` returned."""
        self.loss.fill_(counts[0])
        self.rows.fill_(counts[1])
        self.slots = counts[2]

    def set_due(self, due: int) -> None:
        """Sets the steps due in this round and the next."""
        self.due = self.due_next = due

    def begin_next(self) -> None:
        """Begins the next round: all counts are zero."""
        self.steps, self.due, self.spoilt = 0, self.due_next, False
        self.slots, self.tokens = 0, 0
        self.loss.zero_()
        self.rows.zero_()


def of_site(counts: Sequence[tuple[float, int, int]]) -> tuple[float, int, int]:
    """Loss, rows and slots of a site's round, from `RoundProgress.counts` of all its ranks."""
    losses, rows, slots = zip(*counts, strict=True)
    return sum(losses) / len(losses), sum(rows), sum(slots)
