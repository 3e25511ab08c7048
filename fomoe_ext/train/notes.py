"""The notes that sites exchange before a meeting: steps, loss, pace, and whether to stop."""

from __future__ import annotations

import torch
from torch import Tensor

from fomoe_ext.launch.world import with_others
from fomoe_ext.outer.groups import Handle
from fomoe_ext.plan.traffic import RoundNote
from fomoe_ext.train.pace import steps_of_round
from fomoe_ext.train.round_progress import of_site
from fomoe_ext.train.state import SiteState


class Notes:
    """Exchanges the notes of a site; its first rank sends for all its ranks."""

    def __init__(self, site: SiteState) -> None:
        self._site = site
        self._under_way: tuple[Handle, Tensor] | None = None
        """With overlap: the exchange that was started before the last meeting."""

    def exchange(self, stop: bool, knocks: bool = False) -> list[RoundNote]:
        """Sends this site's note of the round to all sites and returns the notes of all.

        `stop`: this site was asked to stop. `knocks`: a late site asks to join. With overlap the
        exchange is not waited for, and the notes returned are those of the round before. After the
        first round it is this site's own note alone, with `stop` cleared.
        """
        site, ranks = self._site, self._site.sync.ranks
        with with_others(f"the notes of round {site.round + 1}", site.world.site):
            parts = ranks.gather((stop, site.progress.counts(), site.pace.seconds))
            loss, rows, slots = of_site([counts for _, counts, _ in parts])
            note = RoundNote(
                stop=float(any(asked for asked, _, _ in parts)),
                steps=site.step,
                loss=loss,
                rows=rows,
                slots=slots,
                knocks=float(knocks),
                taken=site.progress.steps,
                left=site.progress.left,
                pace=max(seconds for _, _, seconds in parts),
            )
            told = ranks.tell(lambda: self._swap(note))
        notes = [RoundNote(*numbers) for numbers in told]
        if site.config.inner.uneven_steps:
            due = steps_of_round([note.pace for note in notes], site.local_steps)
            site.progress.due_next = due[site.world.site]
        return notes

    def _swap(self, note: RoundNote) -> list[RoundNote]:
        site = self._site
        handle, notes, sent = site.sync.groups.gather_numbers(
            torch.tensor(note, dtype=torch.float64)
        )
        if site.config.outer.overlap and handle is not None:
            site.tally.note_bytes += sent
            before, self._under_way = self._under_way, (handle, notes)
            if before is None:
                return [note._replace(stop=0.0)]
            handle, notes = before
            sent = 0
        if handle is not None:
            handle.wait()
        site.tally.note_bytes += sent
        return [RoundNote(*numbers) for numbers in notes.tolist()]
