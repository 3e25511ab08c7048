"""The thread of a process that writes its files of a checkpoint during training.

The thread does not communicate, so a lost site cannot block it.
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
"""Added to the nice value of writing threads, if the system allows it."""


def _step_back() -> None:
    """Lowers the priority of this thread below that of training."""
    with suppress(OSError, AttributeError):
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + _NICENESS)


class _Cancelled(Exception):
    pass


class FileWriter:
    """Writes the files of one process for one checkpoint, in a thread of its own."""

    def __init__(self, temporary: Path, process: Process, limit: int) -> None:
        """`limit`: the most bytes of the global model in a file."""
        self.temporary, self.process, self._limit = temporary, process, limit
        self.error = ""
        """Why the files could not be written, with the name of the process; "" = no error."""
        self.part = Part({}, {}, None)
        """What has been written."""
        self.copied = threading.Event()
        """Set when no more tensors of the training are read: they may change again."""
        self._cancelled = threading.Event()
        self._written: list[str] = []
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether the thread is running."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, source: Source, in_thread: bool) -> None:
        """Copies the content, in the thread if `in_thread`, and starts to write it."""
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
        """Ends the thread after the current file."""
        self._cancelled.set()
        self.copied.set()

    def remove(self) -> None:
        """Removes the files that this process has written.

        The folders stay, because other processes may already write the next checkpoint of this
        name. That one or a later one removes them.
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
            self.error = f"{self.process}: abandoned"
        except Exception as error:  # any error is reported to the other processes
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
        _step_back()  # not before: training may wait for the copies
        folder = self.temporary
        (folder / TRAINING).mkdir(parents=True, exist_ok=True)
        self.part = Part({}, {}, place_of(folder))
        self._write_model(content)
        self._write_training_state(content)
        # Sync the names of files and folders as well.
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
    """Splits tensors into files of at most `limit` bytes; a larger tensor has its own file."""
    files: list[dict[str, Tensor]] = []
    filled = limit
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > limit:
            files.append({})
            filled = 0
        files[-1][name] = tensor
        filled += tensor.nbytes
    return files
