"""Writes checkpoints (their format: `manifest`) during training.

First every process copies its part into host memory (`staging`), at once or during the next forward
and backward pass. Training waits for nothing else. Then a thread of each process writes, hashes and
syncs its files in a temporary folder (`file_writer`). The handle that `CheckpointWriter.start`
returns (`pending`) tells when all is copied and when the checkpoint is whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fomoe_ext.checkpoint.file_writer import FileWriter
from fomoe_ext.checkpoint.manifest import CheckpointError, Process
from fomoe_ext.checkpoint.pending import PendingCheckpoint
from fomoe_ext.checkpoint.shards import only_once
from fomoe_ext.checkpoint.staging import PROBLEMS, Buffers, Source
from fomoe_ext.files.json_values import to_json
from fomoe_ext.launch import inject

SHARD_BYTES = 4 << 30
"""Bytes of the global model in a file."""


def _json_of(process: Process, state: Mapping[str, Any] | None) -> Any:
    """A copy of the state as JSON values.

    Raises ValueError unless rank 0, and no other, passes a state; TypeError for values that
    `to_json` does not take.
    """
    if (state is None) != (process.rank != 0):
        wrong = f"state must be given by rank 0 of a site and no other, got {state!r:.60}"
        raise ValueError(wrong)
    return None if state is None else to_json(dict(state))


class CheckpointWriter:
    """Writes the checkpoints of a folder, one at a time.

    All processes of the default group call `start`; the group may change between checkpoints.
    `keep`: how many whole checkpoints to keep, 0 = all; older ones are removed once a newer one is
    whole.
    """

    def __init__(self, folder: Path, keep: int = 0) -> None:
        if keep < 0:
            raise ValueError(f"keep must be >= 0, got {keep}")
        self.folder, self.keep = folder, keep
        self._last: PendingCheckpoint | None = None
        self._buffers = Buffers()

    @property
    def pending(self) -> PendingCheckpoint | None:
        """The checkpoint that is being written, or None; equal on all processes."""
        return self._last if self._last is not None and self._last.under_way else None

    def start(
        self,
        name: str,
        process: Process,
        tensors: Iterable[tuple[str, Tensor]],
        state: Mapping[str, Any] | None,
        *,
        round: int,
        meta: Mapping[str, Any] | None = None,
        named: Iterable[tuple[str, Tensor]] = (),
        shard_bytes: int = SHARD_BYTES,
        copy: bool = True,
        beside: bool = False,
    ) -> PendingCheckpoint:
        """Starts a checkpoint `name`; returns when everything is copied. Writing continues in a
        thread, and errors are reported in the outcome.

        With `beside` it returns at once and the thread copies too. The iterables must then be no
        collectives, and neither the tensors nor their sources may change until `copied` is set.
        With `copy` False nothing is copied, and the tensors must not change until the outcome is
        known.

        Args:
            name, process: folder name of the checkpoint, and this process.
            tensors: this process's part of the global model (`assemble.own_global_tensors`).
            state: from rank 0 of a site, its state as values that `to_json` takes; else None.
            round, meta: for the manifest.
            named: this process's part of the training state. One process passes a plain tensor; all
                processes of its mesh pass a DTensor, of which each writes its shard.
            shard_bytes: the most bytes of the global model in a file.

        Raises RuntimeError while another checkpoint is being written.
        """
        if self._last is not None:
            if self._last.under_way:
                raise RuntimeError(f"checkpoint {self._last.path.name} is still being written")
            self._last.wait_removed()
        files = FileWriter(self.folder / f".{name}.partial", process, shard_bytes)
        buffers = self._buffers if copy or beside else None
        if buffers is not None:
            buffers.next()
        numbers = None
        try:
            inject.point("checkpoint")
            numbers = _json_of(process, state)
        except PROBLEMS as error:
            files.error = f"{process}: {error}"
        self._last = PendingCheckpoint(files, self.folder / name, round, meta or {}, self.keep)
        files.begin(Source(tensors, named, numbers, buffers), beside and not files.error)
        return self._last


def save_checkpoint(
    folder: Path,
    name: str,
    tensors: Iterable[tuple[str, Tensor]],
    state: Mapping[str, Any] | None,
    *,
    site: int,
    num_sites: int,
    rank: int = 0,
    ranks_per_site: int = 1,
    round: int,
    meta: Mapping[str, Any] | None = None,
    named: Mapping[str, Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a checkpoint `folder/name` together with all other processes and returns its path.

    A collective, which waits for the end and copies nothing. Arguments as for
    `CheckpointWriter.start`, but several processes may pass the same plain tensor in `named`, with
    equal bits. Raises ValueError for an invalid site or rank, and CheckpointError on every process
    if any of them cannot write its files; then no file is left.
    """
    process = Process(site, num_sites, rank, ranks_per_site)
    final, parts = folder / name, list(tensors)
    try:
        own = only_once(named or {}, process=process.number, num_processes=process.count)
    except CheckpointError as error:
        raise CheckpointError(f"could not write checkpoint {final}: {error}") from None
    pending = CheckpointWriter(folder).start(
        name,
        process,
        parts,
        state,
        round=round,
        meta=meta,
        named=own.items(),
        shard_bytes=shard_bytes,
        copy=False,
    )
    outcome = pending.wait()
    assert outcome is not None
    if outcome.error:
        raise CheckpointError(f"could not write checkpoint {final}: {outcome.error}")
    return final
