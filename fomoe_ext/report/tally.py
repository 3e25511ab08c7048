"""What a site counts while it trains: plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass
class Tally:
    """Counts of one site since the job began, over all its resumptions.

    Seconds, bytes, tokens of text trained on, slots that routers chose and rows that experts
    computed. `exchange_s`: from the start of exchanges to their end; `meeting_s`: what the site
    waited in meetings, for others too. `healed`: tensors restored from the majority.
    `from_round` and `from_step`: where counting began anew, with other sites than before.
    `startup_s`: from the start of the process to its first local step, of every start of the job;
    `wall_s` from there to the report.
    `agreements`: meetings after which the hashes of all that was exchanged were the same.
    `checkpoints` during the training, `checkpoints_failed`: of which it could not be written;
    `checkpoint_s`: what the site waited for them. With another the job ends, or stops.
    `recovery_s`, `recovery_bytes`: to go on with other sites after one was lost or came.
    `clipped`: meetings in which this site's delta was scaled down, `least_factor`: by how much at
    most; `left_out`: in which it was left out.
    `bytes_sent`: in meetings, for moved experts and in notes; `planned_bytes`: what
    `fomoe_ext.plan` says of the same.
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
        """The counts of `state_dict`. Raises ValueError when it is not one."""
        try:
            return cls(**state)
        except TypeError as error:
            raise ValueError(f"state is no tally: {error}") from None

    @classmethod
    def of_ranks(cls, tallies: Sequence[Tally]) -> Tally:
        """A site's tally from those of its ranks, the first of which speaks for the site."""
        sums = {name: sum(getattr(t, name) for t in tallies) for name in _OF_RANKS}
        longest = {name: max(getattr(t, name) for t in tallies) for name in _SECONDS}
        return replace(tallies[0], **sums, **longest)

    def without_counts(self) -> Tally:
        """This tally for another rank than the first: what ranks add up is zero."""
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
"""Counts of which every rank of a site has a part."""
_SECONDS = (
    "startup_s",
    "local_s",
    "meeting_s",
    "exchange_s",
    "validation_s",
    "checkpoint_s",
    "wall_s",
)
