"""The handle of a checkpoint that is being written, and how all processes agree on its end.

At `poll`, which all processes call between rounds, they tell each other whether their files are
complete. Once all are, index and manifest are written and the folder gets its name (`publish`).
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
"""Seconds between two exchanges while `wait` waits for the other processes."""


class Outcome(NamedTuple):
    """How a checkpoint ended: its path, its round, and the error, or "" for success."""

    path: Path
    round: int
    error: str


def _gather_number(number: int) -> list[int]:
    """The numbers of all processes; the cheapest exchange there is."""
    count = dist.get_world_size() if dist.is_initialized() else 1
    if count == 1:
        return [number]
    rows = [torch.empty(1, dtype=torch.int64) for _ in range(count)]
    wait_for(dist.all_gather(rows, torch.tensor([number]), async_op=True))
    return [int(row) for row in rows]


class PendingCheckpoint:
    """The handle of a started checkpoint. It ends in two stages, as torch's async_save does.

    First `copied` is set: the tensors may change again. Each process knows that by itself. Later
    the checkpoint is published or has failed. All processes learn that together from `poll` or
    `wait`, which are collectives of the default group.
    """

    def __init__(
        self, files: FileWriter, final: Path, round: int, meta: Mapping[str, Any], keep: int
    ) -> None:
        """`files`: those of this process. `keep`: see `CheckpointWriter`."""
        self.path, self.round = final, round
        self._files, self._meta, self._keep = files, dict(meta), keep
        self.copied: threading.Event = files.copied
        """Set when all tensors are copied, when none is to be copied, or when it was abandoned."""
        self.under_way = True
        """The outcome is not known yet; equal on all processes."""
        self._removal: threading.Thread | None = None

    def poll(self) -> Outcome | None:
        """The outcome; None while the checkpoint is being written, and after it was returned once.

        A collective. While any process still writes, all exchange one number and do not wait.
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
        """As `poll`, but waits for the outcome. A collective."""
        while self.under_way:
            self._files.wait(_POLL_S)
            if (outcome := self.poll()) is not None:
                return outcome
        return None

    def abandon(self) -> None:
        """Abandons the checkpoint, if it is being written, and removes its files in a thread.

        No collective and no waiting: it is called when a site is lost.
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
        """Waits until the files of an abandoned checkpoint are removed."""
        if self._removal is not None:
            self._removal.join()

    def _failed(self, also: str = "") -> Outcome:
        """Removes all files after the threads have ended; a collective."""
        self.under_way = False
        texts = gather_objects(self._files.error or also, self._files.process.count)
        publishing.remove_folder(self._files.temporary)
        _gather_number(0)  # a barrier: the next checkpoint may have the same name
        return Outcome(self.path, self.round, "; ".join(filter(None, texts)))

    def _publish(self) -> Outcome:
        """Writes index and manifest and renames the folder; a collective.

        The first process of every folder does it.
        """
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
        # Process 0 publishes, then the first process of every other folder.
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
        """Removes older checkpoints. A failure is only reported: the new one is whole."""
        process = self._files.process
        try:
            publishing.keep_newest(self.path, self._keep, process.site)
        except OSError as error:
            _log.warning(
                "%s: could not remove a checkpoint older than %s: %s", process, self.path, error
            )
