"""How far one rank of a site is in the round under way, and what it has counted in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class RoundProgress:
    """Steps taken and due, tokens of text, and sums over the steps of this rank."""

    def __init__(self, local_steps: int, device: torch.device) -> None:
        """`local_steps`: of a whole round; where sites take fewer, fewer are due."""
        self.local_steps = local_steps
        self.steps = 0
        """Local steps taken."""
        self.due = local_steps
        """Local steps that this site takes in the round."""
        self.due_next = local_steps
        """The same of the next one."""
        self.spoilt = False
        """Whether no more steps can be taken in the round: parameters are not finite."""
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
        """Where in a whole round the learning rate is: who takes fewer steps goes as far along the
        schedule as the others."""
        return self.steps * self.local_steps // self.due

    def counts(self) -> tuple[float, int, int]:
        """Sum of this rank's losses, rows and slots of the round so far."""
        return float(self.loss), int(self.rows), self.slots

    def set_counts(self, counts: tuple[float, int, int]) -> None:
        """Goes on from what `counts` said."""
        self.loss.fill_(counts[0])
        self.rows.fill_(counts[1])
        self.slots = counts[2]

    def set_due(self, due: int) -> None:
        """So many steps are due, in this round and the next."""
        self.due = self.due_next = due

    def begin_next(self) -> None:
        """The next round, of which nothing is done."""
        self.steps, self.due, self.spoilt = 0, self.due_next, False
        self.slots, self.tokens = 0, 0
        self.loss.zero_()
        self.rows.zero_()


def of_site(counts: Sequence[tuple[float, int, int]]) -> tuple[float, int, int]:
    """Loss, rows and slots of a round of a site from `RoundProgress.counts` of its ranks."""
    losses, rows, slots = zip(*counts, strict=True)
    return sum(losses) / len(losses), sum(rows), sum(slots)
