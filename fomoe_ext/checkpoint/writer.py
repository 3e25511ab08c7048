"""Writing checkpoints (`manifest` says what that is) while training goes on.

At a checkpoint's time every process copies what it is to write into host memory (`staging`), at
once or beside the forward and backward pass that follow; nothing else keeps training waiting. A
thread of each process then writes, hashes and syncs its files in a temporary folder
(`file_writer`). What `CheckpointWriter.start` returns (`pending`) tells when all is copied, and
when the checkpoint is whole.
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
    """A copy of the state, whatever it is of; ValueError where rank and state do not go together,
    TypeError for what `to_json` does not take.
    """
    if (state is None) != (process.rank != 0):
        wrong = f"state must be given by rank 0 of a site and no other, got {state!r:.60}"
        raise ValueError(wrong)
    return None if state is None else to_json(dict(state))


class CheckpointWriter:
    """Writes the checkpoints of a folder, one at a time.

    `start` is called by all processes of the default group, which may be another one at each
    checkpoint. `keep`: how many whole checkpoints to keep, 0 = all; older ones are removed once a
    newer one is whole.
    """

    def __init__(self, folder: Path, keep: int = 0) -> None:
        if keep < 0:
            raise ValueError(f"keep must be >= 0, got {keep}")
        self.folder, self.keep = folder, keep
        self._last: PendingCheckpoint | None = None
        self._buffers = Buffers()

    @property
    def pending(self) -> PendingCheckpoint | None:
        """The checkpoint whose end is not known yet; None on all processes or on none."""
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
        """Begins a checkpoint `name`: returns when all is copied; the rest happens meanwhile.

        With `beside` it returns before: the iterables, which then must be no collectives, are gone
        through and copied by a thread, and neither the tensors nor what the iterables take them
        from may change until `copied` is set. With `copy` False nothing is copied, and the tensors
        must not change until the end is known. What goes wrong is told then.

        `tensors`: this process's part of the global model (`assemble.own_global_tensors`), whole.
        `state`: what a site needs to go on and is no tensor, as `to_json` takes it, from rank 0 of
        the site; None from the others. `named`: of the training state what this process has to
        write, any tensor by one process only, but of DTensors their shards by all
        (`shards.shard_of`). Raises RuntimeError while another checkpoint is under way.
        """
        if self._last is not None:
            if self._last.under_way:
                raise RuntimeError(f"checkpoint {self._last.path.name} is still under way")
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
    """Writes a checkpoint `folder/name` together with all other processes, and returns its path.

    A collective, which waits for the end and copies nothing. Arguments as `CheckpointWriter.start`
    has them, but `named` may have plain tensors that other processes give as well, with the same
    bits. Raises ValueError for a site or rank that cannot be, CheckpointError on every process when
    any of them cannot write its files; then nothing is left.
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
