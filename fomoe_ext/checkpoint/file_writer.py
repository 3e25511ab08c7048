"""What a process writes for a checkpoint, behind its training: a thread, and the files it writes.

The thread speaks to nobody, so the death of a site cannot hang it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fomoe_ext.checkpoint.manifest import TRAINING, FileEntry, Process, state_name
from fomoe_ext.checkpoint.publish import Part, place_of, size_and_hash
from fomoe_ext.checkpoint.shards import FILE_BYTES, write_shards
from fomoe_ext.checkpoint.staging import Content, Gpu, Source, beside, stage
from fomoe_ext.files.atomic import sync_folder, write_text
from fomoe_ext.files.tensors import WrittenFile, write_synced

_NICENESS = 10
"""How much the writing threads step back behind the training, where the system can do that."""


def _step_back() -> None:
    """Lets this thread have a processor only where the training leaves one."""
    with suppress(OSError, AttributeError):
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + _NICENESS)


class _Cancelled(Exception):
    pass


class FileWriter:
    """Writes the files of one process for one checkpoint, in a thread of its own."""

    def __init__(self, temporary: Path, process: Process, limit: int) -> None:
        """`limit`: bytes of the global model in a file."""
        self.temporary, self.process, self._limit = temporary, process, limit
        self.error = ""
        """Why the files could not be written, with the process's name."""
        self.part = Part({}, {}, None)
        """What has been written."""
        self.copied = threading.Event()
        """Set when nothing more that matters is read of what the training has."""
        self._cancelled = threading.Event()
        self._written: list[str] = []
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether the thread copies or writes."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, source: Source, in_thread: bool) -> None:
        """Copies the content, here or with `in_thread` in the thread, and begins to write it."""
        if in_thread:
            self._begin_thread(self._copy_and_write, source, Gpu.now())
            return
        content = self._stage(source)
        self.copied.set()
        if not self.error:
            self._begin_thread(self._write, content)

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits for the end of the thread."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def cancel(self) -> None:
        """Ends the thread, after the file that it is writing."""
        self._cancelled.set()
        self.copied.set()

    def remove(self) -> None:
        """Removes what this process has written.

        Not the folders: others may be at the next checkpoint of this name, which, or a later one,
        will clear them away.
        """
        for name in self._written:
            with suppress(OSError):
                (self.temporary / name).unlink(missing_ok=True)

    # ------------------------------------------------------------------------------ in the thread

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

    def _copy_and_write(self, source: Source, gpu: Gpu | None) -> None:
        with beside(gpu):
            content = self._stage(source)
        self.copied.set()
        if not self.error:
            self._write(content)

    def _stage(self, source: Source) -> Content:
        content, problem = stage(source, self._cancelled)
        if problem is not None and not self.error:
            self.error = f"{self.process}: {problem}"
        return content

    def _write(self, content: Content) -> None:
        _step_back()  # only now: training may wait for the copies
        folder = self.temporary
        (folder / TRAINING).mkdir(parents=True, exist_ok=True)
        self.part = Part({}, {}, place_of(folder))
        self._write_model(content)
        self._write_training_state(content)
        # Their names must last too; the first of all is not there yet.
        sync_folder(folder / TRAINING)
        sync_folder(folder.parent)

    def _write_model(self, content: Content) -> None:
        for number, held in enumerate(_in_files(content.model, self._limit), 1):
            name = f"model-of-{self.process.number:05d}-{number:05d}.safetensors"
            self._begin(name)
            self._note(name, write_synced(self.temporary / name, held, {"format": "pt"}))
            self.part.weights[name] = list(held)

    def _write_training_state(self, content: Content) -> None:
        folder = self.temporary
        limit = min(self._limit, FILE_BYTES)
        files = write_shards(
            folder / TRAINING, content.shards, process=self.process.number, limit=limit
        )
        for name, written in files:
            self._begin(f"{TRAINING}/{name}")
            self._note(f"{TRAINING}/{name}", written)
        if content.state is not None:
            name = state_name(self.process.site)
            self._begin(name)
            write_text(folder / name, json.dumps(content.state, allow_nan=False) + "\n")
            size, digest = size_and_hash(folder / name)
            self._note(name, WrittenFile(size, digest, ""))

    def _begin(self, name: str) -> None:
        self._written.append(name)
        if self._cancelled.is_set():
            raise _Cancelled

    def _note(self, name: str, written: WrittenFile) -> None:
        header = written.header_sha256 if name.startswith(f"{TRAINING}/") else ""
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
