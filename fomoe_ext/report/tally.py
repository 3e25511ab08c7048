"""The counts of a site during training: plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass
class Tally:
    """Counts of one site since the job began, including all resumed parts.

    steps, tokens, slots, rows: local steps, training tokens, slots that routers chose, rows that
    experts computed. local_s: seconds of local steps. meeting_s: seconds that the site waited in
    meetings, also for other sites. exchange_s: seconds from the start of exchanges to their end.
    startup_s: seconds from the start of the process to its first local step, for all starts of the
    job. wall_s: seconds from the start of the process to the report.

    healed: tensors restored from the majority. agreements: meetings after which the hashes of all
    exchanged tensors were equal. clipped: meetings in which the site's delta was scaled down;
    least_factor: the smallest factor. left_out: meetings in which the delta was left out.

    checkpoints: those written during training; the job writes one more when it ends or stops.
    checkpoints_failed: those that could not be written. checkpoint_s: seconds that training waited
    for checkpoints. recovery_s, recovery_bytes: spent to continue after a site was lost or joined.

    bytes_sent: in meetings, for moved experts and in notes. planned_bytes: the prediction of
    `fomoe_ext.plan` for the same. from_round, from_step: where counting began again, with other
    sites than before.
    """

    steps: int = 0
    tokens: int = 0
    slots: int = 0
    rows: int = 0
    local_s: float = 0.0
    meeting_s: float = 0.0
    exchange_s: float = 0.0
    healed: int = 0
    agreements: int = 0
    validation_s: float = 0.0
    checkpoints: int = 0
    checkpoints_failed: int = 0
    checkpoint_s: float = 0.0
    recovery_s: float = 0.0
    recovery_bytes: int = 0
    startup_s: float = 0.0
    wall_s: float = 0.0
    bytes_sent: int = 0
    moved_bytes: int = 0
    planned_bytes: int = 0
    note_bytes: int = 0
    validation_bytes: int = 0
    gradient_bytes: int = 0
    clipped: int = 0
    least_factor: float = 1.0
    left_out: int = 0
    first_validation: dict[str, Any] | None = None
    from_round: int = 0
    from_step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """The counts as plain numbers."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Tally:
        """The counts from a `state_dict`. Raises ValueError for any other dict."""
        try:
            return cls(**state)
        except TypeError as error:
            raise ValueError(f"state must be a dict of Tally.state_dict: {error}") from None

    @classmethod
    def of_ranks(cls, tallies: Sequence[Tally]) -> Tally:
        """A site's tally from those of its ranks: sums, maxima, and else the values of rank 0."""
        sums = {name: sum(getattr(t, name) for t in tallies) for name in _OF_RANKS}
        longest = {name: max(getattr(t, name) for t in tallies) for name in _SECONDS}
        return replace(tallies[0], **sums, **longest)

    def without_counts(self) -> Tally:
        """This tally for a rank other than the first: counts that ranks add up are zero."""
        return replace(self, **dict.fromkeys(_OF_RANKS, 0))

    @property
    def skipped_share(self) -> float:
        """Share of slots that were skipped, 0..1."""
        return 1 - self.rows / self.slots if self.slots else 0.0


_OF_RANKS = (
    "tokens",
    "slots",
    "rows",
    "bytes_sent",
    "moved_bytes",
    "note_bytes",
    "validation_bytes",
    "gradient_bytes",
    "planned_bytes",
)
"""Counts that the ranks of a site add up."""
_SECONDS = (
    "startup_s",
    "local_s",
    "meeting_s",
    "exchange_s",
    "validation_s",
    "checkpoint_s",
    "wall_s",
)
