"""Parts of a training site alone: no process, no model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from fomoe_ext.plan.traffic import RoundNote
from fomoe_ext.train.notes import Notes
from fomoe_ext.train.pace import Pace
from fomoe_ext.train.round_progress import RoundProgress

CPU = torch.device("cpu")


def test_a_round_of_fewer_steps_goes_as_far_along_the_schedule() -> None:
    whole, slow = RoundProgress(6, CPU), RoundProgress(6, CPU)
    slow.set_due(3)
    assert (whole.left, slow.left) == (6, 3)
    places = []
    for _ in range(3):
        slow.steps += 1
        places.append(slow.scheduled)
    assert places == [2, 4, 6] and slow.left == 0


def test_a_spoilt_round_has_no_steps_left_and_the_next_one_begins_anew() -> None:
    progress = RoundProgress(4, CPU)
    progress.steps, progress.spoilt, progress.due_next = 2, True, 3
    progress.set_counts((1.5, 20, 40))
    assert progress.left == 0 and progress.counts() == (1.5, 20, 40)
    progress.begin_next()
    assert progress.left == 3 and progress.counts() == (0.0, 0, 0)


class Wire:
    """Two sites' connections, of which the other one's note is the same but for its pace."""

    def __init__(self) -> None:
        self.told: list[RoundNote] = []
        self.waited = 0

    def gather_numbers(self, numbers: torch.Tensor) -> tuple[Any, torch.Tensor, int]:
        mine = RoundNote(*numbers.tolist())
        self.told.append(mine)
        other = mine._replace(pace=3 * mine.pace)
        return self, torch.tensor([mine, other], dtype=torch.float64), 72

    def wait(self) -> None:
        self.waited += 1


def site_with_notes(overlap: int, uneven: bool = False) -> tuple[Any, Notes, Wire]:
    wire = Wire()
    ranks = SimpleNamespace(gather=lambda value: [value], tell=lambda make: make())
    config = SimpleNamespace(
        outer=SimpleNamespace(overlap=overlap), inner=SimpleNamespace(uneven_steps=uneven)
    )
    progress = RoundProgress(6, CPU)
    site = SimpleNamespace(
        config=config,
        world=SimpleNamespace(site=1),
        sync=SimpleNamespace(ranks=ranks, groups=wire),
        tally=SimpleNamespace(note_bytes=0),
        progress=progress,
        pace=Pace(0.5),
        round=0,
        step=0,
        local_steps=6,
    )
    return site, Notes(site), wire


def test_notes_are_waited_for() -> None:
    site, notes, wire = site_with_notes(overlap=0)
    site.progress.steps = 6
    found = notes.exchange(stop=True)
    assert [note.stop for note in found] == [1.0, 1.0] and wire.waited == 1
    assert [note.taken for note in found] == [6, 6] and [note.left for note in found] == [0, 0]
    assert site.tally.note_bytes == 72 and site.progress.due_next == 6


def test_with_overlap_notes_are_those_of_the_round_before() -> None:
    site, notes, wire = site_with_notes(overlap=1)
    first = notes.exchange(stop=True)
    assert len(first) == 1 and first[0].stop == 0.0  # its own, which asks nobody to stop
    assert wire.waited == 0
    second = notes.exchange(stop=False)
    assert [note.stop for note in second] == [1.0, 1.0] and wire.waited == 1
    assert site.tally.note_bytes == 2 * 72


def test_from_the_paces_a_slower_site_takes_fewer_steps_in_the_next_round() -> None:
    site, notes, _ = site_with_notes(overlap=0, uneven=True)
    notes.exchange(stop=False)
    assert site.progress.due == 6 and site.progress.due_next == 2
