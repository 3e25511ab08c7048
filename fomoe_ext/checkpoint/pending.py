"""A checkpoint under way, and how all processes agree on its end.

Whenever all processes come by anyway they tell each other whether they have finished their files;
once all have, index and manifest are written and the folder gets its name (`publish`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fomoe_ext.checkpoint import publish as publishing
from fomoe_ext.checkpoint.file_writer import FileWriter
from fomoe_ext.checkpoint.manifest import FileEntry, Manifest
from fomoe_ext.checkpoint.publish import Part
from fomoe_ext.checkpoint.staging import PROBLEMS
from fomoe_ext.launch.messages import gather_objects
from fomoe_ext.launch.waiting import wait_for

_log = logging.getLogger(__name__)

_UNDER_WAY, _DONE, _FAILED = range(3)
_POLL_S = 5.0
"""Seconds between two questions whether the others have finished, when that is waited for."""


class Outcome(NamedTuple):
    """How a checkpoint ended: where it is, its round, and why it could not be written, or ""."""

    path: Path
    round: int
    error: str


def _gather_number(number: int) -> list[int]:
    """A number of every process: the least that they can tell each other."""
    count = dist.get_world_size() if dist.is_initialized() else 1
    if count == 1:
        return [number]
    rows = [torch.empty(1, dtype=torch.int64) for _ in range(count)]
    wait_for(dist.all_gather(rows, torch.tensor([number]), async_op=True))
    return [int(row) for row in rows]


class PendingCheckpoint:
    """A handle of a checkpoint that was begun, with two ends, as torch's async_save has.

    When all is copied, `copied` is set: training may change it again. That every process knows for
    itself. When it is written and published, or could not be, all learn together by `poll` or
    `wait`, which are collectives of all processes of the default group.
    """

    def __init__(
        self, files: FileWriter, final: Path, round: int, meta: Mapping[str, Any], keep: int
    ) -> None:
        """`files`: those of this process. `keep`: see `CheckpointWriter`."""
        self.path, self.round = final, round
        self._files, self._meta, self._keep = files, dict(meta), keep
        self.copied: threading.Event = files.copied
        """Set when all is copied, or nothing is to be for want of `copy`, or it was given up."""
        self.under_way = True
        """Whether its end is not known yet; the same on all processes."""
        self._removal: threading.Thread | None = None

    def poll(self) -> Outcome | None:
        """How it has ended; None while it has not, and once that was told. A collective.

        As long as a process writes, all exchange a number and nobody waits.
        """
        if not self.under_way:
            return None
        own = _UNDER_WAY if self._files.running else _FAILED if self._files.error else _DONE
        states = _gather_number(own)
        if len(states) != self._files.process.count:
            self.abandon()
            return None
        if _UNDER_WAY in states:
            return None
        if _FAILED in states:
            return self._failed()
        return self._publish()

    def wait(self) -> Outcome | None:
        """As `poll`, but waits for the end. A collective."""
        while self.under_way:
            self._files.wait(_POLL_S)
            if (outcome := self.poll()) is not None:
                return outcome
        return None

    def abandon(self) -> None:
        """Gives it up, if it is under way: it will not be, its files are removed.

        No collective, and nothing is waited for: for when a site is lost.
        """
        if not self.under_way:
            return
        self.under_way = False
        self._files.cancel()

        def remove() -> None:
            self._files.wait()
            self._files.remove()

        self._removal = threading.Thread(target=remove, name="checkpoint-removal", daemon=True)
        self._removal.start()

    def wait_removed(self) -> None:
        """Waits until the files are gone, where it was given up."""
        if self._removal is not None:
            self._removal.join()

    def _failed(self, also: str = "") -> Outcome:
        """Removes all files, at the end of all threads; a collective."""
        self.under_way = False
        texts = gather_objects(self._files.error or also, self._files.process.count)
        publishing.remove_folder(self._files.temporary)
        _gather_number(0)  # nobody begins another one of this name before
        return Outcome(self.path, self.round, "; ".join(filter(None, texts)))

    def _publish(self) -> Outcome:
        """Index, manifest and name, by the first process of every folder; a collective."""
        process = self._files.process
        parts = [Part(*part) for part in gather_objects(list(self._files.part), process.count)]
        files, weights, renamed = publishing.numbered(parts)
        manifest = Manifest(
            self.round,
            process.num_sites,
            {name: FileEntry(**entry) for name, entry in files.items()},
            self._meta,
            process.ranks_per_site,
        )
        # Process 0 publishes; then the first of every place that does not share its folder.
        for turn in publishing.turns(parts):
            problem = ""
            if process.number in turn:
                try:
                    publishing.publish(self._files.temporary, self.path, manifest, weights, renamed)
                except PROBLEMS as error:
                    problem = f"{process}: {error}"
                else:
                    self._remove_older()
            if any(_gather_number(int(bool(problem)))):
                return self._failed(problem)
        self.under_way = False
        return Outcome(self.path, self.round, "")

    def _remove_older(self) -> None:
        """The new one is whole, also where an older one cannot be removed."""
        process = self._files.process
        try:
            publishing.keep_newest(self.path, self._keep, process.site)
        except OSError as error:
            _log.warning(
                "%s: could not remove a checkpoint older than %s: %s", process, self.path, error
            )
