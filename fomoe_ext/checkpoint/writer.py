"""Writing checkpoints (`fomoe_ext.checkpoint`) while training goes on.

At a checkpoint's time every process copies what it is to write into host memory, at once or beside
the forward and backward pass that follow (`CheckpointWriter.start`); nothing else keeps training
waiting. A thread of each process then writes, hashes and syncs its files in a temporary folder. The
threads speak to nobody, so the death of a site cannot hang them. Whenever all processes come by
anyway they tell each other whether they have finished (`CheckpointWriter.poll`); once all have,
index and manifest are written and the folder gets its name (`checkpoint_publish`).
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe_ext.checkpoint import publish as publishing
from fomoe_ext.checkpoint.manifest import FileEntry, Manifest, state_name
from fomoe_ext.checkpoint.publish import Part
from fomoe_ext.checkpoint.training_state import (
    FILE_BYTES,
    CheckpointError,
    TensorPart,
    only_once,
    shard_of,
    write_shards,
)
from fomoe_ext.files.atomic import sync_folder, write_text
from fomoe_ext.files.json_values import to_json
from fomoe_ext.files.tensors import WrittenFile, write_synced
from fomoe_ext.launch import inject
from fomoe_ext.launch.messages import gather_objects
from fomoe_ext.launch.waiting import wait_for

SHARD_BYTES = 4 << 30
"""Bytes of the global model in a file."""
_UNDER_WAY, _DONE, _FAILED = range(3)
_POLL_S = 5.0
"""Seconds between two questions whether the others have finished, when that is waited for."""
_NICENESS = 10
"""How much the writing threads step back behind the training, where the system can do that."""
_Problems = (OSError, TypeError, ValueError, RuntimeError)


class Outcome(NamedTuple):
    """How a checkpoint ended: where it is, its round, and why it could not be written, or ""."""

    path: Path
    round: int
    error: str


@dataclass(frozen=True)
class Process:
    """A process of the job, as it was when a checkpoint began."""

    site: int
    num_sites: int
    rank: int = 0
    ranks_per_site: int = 1

    def __post_init__(self) -> None:
        for name, value, end in (
            ("site", self.site, self.num_sites),
            ("rank", self.rank, self.ranks_per_site),
        ):
            if not 0 <= value < end:
                raise ValueError(f"{name} must be in [0, {end}), got {value}")

    @property
    def number(self) -> int:
        """Its rank among all processes."""
        return self.site * self.ranks_per_site + self.rank

    @property
    def count(self) -> int:
        """All processes."""
        return self.num_sites * self.ranks_per_site

    def __str__(self) -> str:
        return f"site {self.site}" + (f", rank {self.rank}" if self.ranks_per_site > 1 else "")


class _Content(NamedTuple):
    """What a process writes: its part of the global model, of the training state, and for JSON."""

    model: dict[str, Tensor]
    shards: dict[str, TensorPart]
    state: Any


class _Source(NamedTuple):
    """Where the content comes from; `buffers` None = it is written from where it is."""

    tensors: Iterable[tuple[str, Tensor]]
    named: Iterable[tuple[str, Tensor]]
    state: Any
    buffers: _Buffers | None


class _Buffers:
    """Host memory for copies, kept from one checkpoint for the next: new memory is slow to fill."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._used: dict[tuple[str, str], Tensor] = {}

    def copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        """A copy in host memory; of a GPU's tensor it is whole after the next synchronisation."""
        copy = self._kept.get(key)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            on_gpu = tensor.device.type == "cuda"
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        self._used[key] = copy
        if tensor.device.type == "cuda":
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return copy.copy_(tensor, non_blocking=True)

    def next(self) -> None:
        """The memory is free for another checkpoint; what the last one did not use is given up."""
        self._kept, self._used = self._used, {}


@torch.no_grad()
def _content(process: Process, source: _Source, cancelled: threading.Event) -> tuple[_Content, str]:
    """What is to be written, in buffers if there are any, and what is wrong with it, or "".

    The iterables may be collectives, so they are gone through to their ends all the same, unless
    the checkpoint is given up.
    """
    problem = ""
    content = _Content({}, {}, source.state)
    devices: set[torch.device] = set()
    for part, pairs in (("model", source.tensors), ("state", source.named)):
        for name, tensor in pairs:
            if cancelled.is_set():
                return content, f"{process}: given up"
            if problem:
                continue
            try:
                shard = shard_of(name, tensor)
                if shard is None:
                    continue
                if source.buffers is not None:
                    copied = source.buffers.copy((part, name), shard.tensor)
                    shard = TensorPart(copied, shard.offsets)
                    if tensor.device.type == "cuda":
                        devices.add(tensor.device)
                if part == "model":
                    content.model[name] = shard.tensor.view(tensor.shape)
                else:
                    content.shards[name] = shard
            except _Problems as error:
                problem = f"{process}: {error}"
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return content, problem


def _json_of(process: Process, state: Mapping[str, Any] | None) -> Any:
    """A copy of the state, whatever it is of; ValueError where rank and state do not go together,
    TypeError for what `to_json` does not take.
    """
    if (state is None) != (process.rank != 0):
        wrong = f"state must be given by rank 0 of a site and no other, got {state!r:.60}"
        raise ValueError(wrong)
    return None if state is None else to_json(dict(state))


class _Gpu(NamedTuple):
    """A GPU, and an event after which what is to be copied is there."""

    device: int
    ready: torch.cuda.Event

    @classmethod
    def now(cls) -> _Gpu | None:
        """The GPU of this thread, which a new thread does not know; None without one."""
        if not torch.cuda.is_initialized():
            return None
        ready = torch.cuda.Event()
        ready.record()
        return cls(torch.cuda.current_device(), ready)


@contextmanager
def _beside(gpu: _Gpu | None) -> Iterator[None]:
    """Inside, a GPU's copies go by a stream of their own, from what was there at an event."""
    if gpu is None:
        yield
        return
    stream = torch.cuda.Stream(gpu.device)
    stream.wait_event(gpu.ready)
    with torch.cuda.stream(stream):
        yield


def _step_back() -> None:
    """Lets this thread have a processor only where the training leaves one."""
    with suppress(OSError, AttributeError):
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + _NICENESS)


class _Cancelled(Exception):
    pass


class _Work:
    """The files of one process for one checkpoint, written by a thread of their own."""

    def __init__(self, temporary: Path, process: Process, limit: int) -> None:
        self.temporary, self.process, self._limit = temporary, process, limit
        self.error = ""
        self.part = Part({}, {}, None)
        self.copied = threading.Event()
        """Set when nothing more is read of what the training has."""
        self._cancelled = threading.Event()
        self._written: list[str] = []
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(self, source: _Source, beside: bool) -> None:
        """Copies the content, here or with `beside` in the thread, and begins to write it."""
        if beside:
            self._begin_thread(self._copy_and_write, source, _Gpu.now())
            return
        content, problem = _content(self.process, source, self._cancelled)
        self.error = self.error or problem
        self.copied.set()
        if not self.error:
            self._begin_thread(self._write, content)

    def _begin_thread(self, call: Callable[..., None], *arguments: Any) -> None:
        self._thread = threading.Thread(
            target=self._guarded, args=(call, *arguments), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _guarded(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except _Cancelled:
            self.error = f"{self.process}: given up"
        except Exception as error:  # whatever it is, the others are told
            self.error = f"{self.process}: {str(error) or type(error).__name__}"
        finally:
            self.copied.set()

    def _copy_and_write(self, source: _Source, gpu: _Gpu | None) -> None:
        with _beside(gpu):
            content, self.error = _content(self.process, source, self._cancelled)
        self.copied.set()
        if not self.error:
            self._write(content)

    def wait(self, timeout_s: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)

    def cancel(self) -> None:
        """Ends the thread, after the file that it is writing."""
        self._cancelled.set()

    def remove(self) -> None:
        """Removes what this process has written.

        Not the folders: others may be at the next checkpoint of this name, which, or a later one,
        will clear them away.
        """
        for name in self._written:
            with suppress(OSError):
                (self.temporary / name).unlink(missing_ok=True)

    def _write(self, content: _Content) -> None:
        _step_back()  # only now: training may wait for the copies
        folder = self.temporary
        (folder / publishing.TRAINING).mkdir(parents=True, exist_ok=True)
        self.part = Part({}, {}, publishing.place_of(folder))
        self._write_files(content)
        # Their names must last too; the first of all is not there yet.
        sync_folder(folder / publishing.TRAINING)
        sync_folder(folder.parent)

    def _write_files(self, content: _Content) -> None:
        folder = self.temporary
        for number, held in enumerate(_in_files(content.model, self._limit), 1):
            name = f"model-of-{self.process.number:05d}-{number:05d}.safetensors"
            self._begin(name)
            self._note(name, write_synced(folder / name, held, {"format": "pt"}))
            self.part.weights[name] = list(held)
        where = folder / publishing.TRAINING
        limit = min(self._limit, FILE_BYTES)
        files = write_shards(where, content.shards, process=self.process.number, limit=limit)
        for name, written in files:
            self._begin(f"{publishing.TRAINING}/{name}")
            self._note(f"{publishing.TRAINING}/{name}", written)
        if content.state is not None:
            name = state_name(self.process.site)
            self._begin(name)
            write_text(folder / name, json.dumps(content.state, allow_nan=False) + "\n")
            size, digest = publishing.size_and_hash(folder / name)
            self._note(name, WrittenFile(size, digest, ""))

    def _begin(self, name: str) -> None:
        self._written.append(name)
        if self._cancelled.is_set():
            raise _Cancelled

    def _note(self, name: str, written: WrittenFile) -> None:
        header = written.header_sha256 if name.startswith(f"{publishing.TRAINING}/") else ""
        process = self.process
        entry = FileEntry(process.site, written.size, written.sha256, process.rank, header)
        self.part.files[name] = asdict(entry)


def _in_files(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Tensors in files of at most `limit` bytes each (a larger tensor has a file of its own)."""
    files: list[dict[str, Tensor]] = []
    filled = limit
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > limit:
            files.append({})
            filled = 0
        files[-1][name] = tensor
        filled += tensor.nbytes
    return files


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather_number(number: int) -> list[int]:
    """A number of every process: the least that they can tell each other."""
    count = _processes()
    if count == 1:
        return [number]
    rows = [torch.empty(1, dtype=torch.int64) for _ in range(count)]
    wait_for(dist.all_gather(rows, torch.tensor([number]), async_op=True))
    return [int(row) for row in rows]


class _Pending(NamedTuple):
    work: _Work
    final: Path
    round: int
    meta: dict[str, Any]


class CheckpointWriter:
    """Writes the checkpoints of a folder, one at a time.

    `start`, `poll` and `finish` are collectives of all processes of the default group, which may be
    another one at each checkpoint. `keep`: how many whole checkpoints to keep, 0 = all; older ones
    are removed once a newer one is whole.
    """

    def __init__(self, folder: Path, keep: int = 0) -> None:
        if keep < 0:
            raise ValueError(f"keep must be >= 0, got {keep}")
        self.folder, self.keep = folder, keep
        self._pending: _Pending | None = None
        self._dropped: list[threading.Thread] = []
        self._buffers = _Buffers()

    @property
    def under_way(self) -> bool:
        """Whether a checkpoint was begun whose end is not known yet; the same on all processes."""
        return self._pending is not None

    def start(
        self,
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
        named: Iterable[tuple[str, Tensor]] = (),
        shard_bytes: int = SHARD_BYTES,
        copy: bool = True,
        beside: bool = False,
    ) -> None:
        """Begins a checkpoint `name`: returns when all is copied; the rest happens meanwhile.

        With `beside` it returns before: the iterables, which then must be no collectives, are gone
        through and copied by a thread, and neither the tensors nor what the iterables take them
        from may change until `settle` has returned.

        `tensors`: this process's part of the global model (`assemble.own_global_tensors`), whole.
        `state`: what a site needs to go on and is no tensor, as `to_json` takes it, from rank 0 of
        the site; None from the others. `named`: of the training state what this process has to
        write, any tensor by one process only, but of DTensors their shards by all
        (`training_state.shard_of`). With `copy` False nothing is copied, and the tensors must not
        change until the end is known. What goes wrong is told by `poll` or `finish`. Raises
        ValueError for a site or rank that cannot be, RuntimeError while another checkpoint is
        under way.
        """
        process = Process(site, num_sites, rank, ranks_per_site)
        if self._pending is not None:
            raise RuntimeError(f"checkpoint {self._pending.final.name} is still under way")
        while self._dropped:
            self._dropped.pop().join()
        work = _Work(self.folder / f".{name}.partial", process, shard_bytes)
        buffers = self._buffers if copy or beside else None
        if buffers is not None:
            buffers.next()
        numbers = None
        try:
            inject.point("checkpoint")
            numbers = _json_of(process, state)
        except _Problems as error:
            work.error = f"{process}: {error}"
        self._pending = _Pending(work, self.folder / name, round, dict(meta or {}))
        work.begin(_Source(tensors, named, numbers, buffers), beside and not work.error)

    def settle(self) -> None:
        """Returns when all is copied that was to be written: training may change it now.

        No collective. Returns at once where nothing is being copied, also for want of `copy`.
        """
        if self._pending is not None:
            self._pending.work.copied.wait()

    def poll(self) -> Outcome | None:
        """How the checkpoint under way has ended; None while it has not, or where there is none.

        A collective. As long as a process writes, all exchange a number and nobody waits.
        """
        if self._pending is None:
            return None
        work = self._pending.work
        own = _UNDER_WAY if work.running else _FAILED if work.error else _DONE
        states = _gather_number(own)
        if len(states) != work.process.count:
            self.abandon()
            return None
        if _UNDER_WAY in states:
            return None
        if _FAILED in states:
            return self._failed()
        return self._publish()

    def finish(self) -> Outcome | None:
        """As `poll`, but waits for the end. A collective."""
        while self._pending is not None:
            pending = self._pending
            pending.work.wait(_POLL_S)
            if (outcome := self.poll()) is not None:
                return outcome
        return None

    def abandon(self) -> None:
        """Drops the checkpoint under way, if there is one: it will not be, its files are removed.

        No collective, and nothing is waited for: for when a site is lost.
        """
        if self._pending is None:
            return
        work, self._pending = self._pending.work, None
        work.cancel()

        def remove() -> None:
            work.wait()
            work.remove()

        thread = threading.Thread(target=remove, name="checkpoint-removal", daemon=True)
        thread.start()
        self._dropped.append(thread)

    def _failed(self, also: str = "") -> Outcome:
        """Removes all files, at the end of all threads; a collective."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        texts = gather_objects(pending.work.error or also, pending.work.process.count)
        publishing.remove_folder(pending.work.temporary)
        _gather_number(0)  # nobody begins another one of this name before
        return Outcome(pending.final, pending.round, "; ".join(filter(None, texts)))

    def _publish(self) -> Outcome:
        """Index, manifest and name, by the first process of every folder; a collective."""
        assert self._pending is not None
        pending, process = self._pending, self._pending.work.process
        gathered = gather_objects(list(pending.work.part), process.count)
        parts = [Part(*part) for part in gathered]
        files, weights, renamed = publishing.numbered(parts)
        manifest = Manifest(
            pending.round,
            process.num_sites,
            {name: FileEntry(**entry) for name, entry in files.items()},
            pending.meta,
            process.ranks_per_site,
        )
        # Process 0 publishes; then the first of every place that does not share its folder.
        for turn in publishing.turns(parts):
            problem = ""
            if process.number in turn:
                try:
                    publishing.publish(
                        pending.work.temporary, pending.final, manifest, weights, renamed
                    )
                except _Problems as error:
                    problem = f"{process}: {error}"
                else:
                    self._remove_older(pending.final, process)
            if any(_gather_number(int(bool(problem)))):
                return self._failed(problem)
        self._pending = None
        return Outcome(pending.final, pending.round, "")

    def _remove_older(self, newest: Path, process: Process) -> None:
        """The new one is whole, also where an older one cannot be removed."""
        try:
            publishing.keep_newest(newest, self.keep, process.site)
        except OSError as error:
            print(
                f"{process}: could not remove a checkpoint older than {newest}: {error}",
                file=sys.stderr,
                flush=True,
            )


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
    bits. Raises CheckpointError on every process when any of them cannot write its files; then
    nothing is left.
    """
    process = Process(site, num_sites, rank, ranks_per_site)
    final, parts = folder / name, list(tensors)
    try:
        own = only_once(named or {}, process=process.number, num_processes=process.count)
    except CheckpointError as error:
        raise CheckpointError(f"could not write checkpoint {final}: {error}") from None
    writer = CheckpointWriter(folder)
    writer.start(
        name,
        parts,
        state,
        site=site,
        num_sites=num_sites,
        rank=rank,
        ranks_per_site=ranks_per_site,
        round=round,
        meta=meta,
        named=own.items(),
        shard_bytes=shard_bytes,
        copy=False,
    )
    outcome = writer.finish()
    assert outcome is not None
    if outcome.error:
        raise CheckpointError(f"could not write checkpoint {final}: {outcome.error}")
    return final
