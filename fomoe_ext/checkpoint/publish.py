"""The last steps of writing a checkpoint: final file names, index, manifest, and its own name.

Also removes older checkpoints, and completes or removes what a killed job has left behind.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from fomoe_ext.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    TRAINING,
    CheckpointError,
    FileEntry,
    Manifest,
    list_checkpoints,
    read_manifest,
    sha256,
)
from fomoe_ext.checkpoint.whole import is_whole
from fomoe_ext.files.atomic import naming, sealed, sync_folder
from fomoe_ext.files.tensors import INDEX

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

_PARTIAL, _OLD, _GOING = ".partial", ".old", ".going"


class Part(NamedTuple):
    """What one process has written, as a message to the others.

    files: the fields of a `FileEntry`, by file name. weights: the tensor names in each file of the
    global model. place: identifies the folder (`place_of`).
    """

    files: dict[str, dict[str, Any]]
    weights: dict[str, list[str]]
    place: list[Any] | None


def place_of(folder: Path) -> list[Any]:
    """Identifies a folder: equal for two processes only if they see the same folder."""
    found = folder.stat()
    return [socket.gethostname(), found.st_dev, found.st_ino]


def size_and_hash(path: Path) -> tuple[int, str]:
    """A file's size in bytes and its SHA-256."""
    return path.stat().st_size, sha256(path)


def turns(parts: Sequence[Part]) -> Iterator[set[int]]:
    """The processes that publish, in order: process 0, then one of every other folder."""
    yield {0}
    first: dict[str, int] = {}
    for number, part in enumerate(parts):
        first.setdefault(repr(part.place), number)
    yield set(first.values()) - {0}


def numbered(
    parts: Sequence[Part],
) -> tuple[dict[str, dict[str, Any]], dict[str, str], dict[str, str]]:
    """All files by final name, the file of each tensor, and the final names by temporary name.

    The files of the global model are numbered as transformers does it.
    """
    written = [name for part in parts for name in part.weights]
    renamed = {
        name: f"model-{number:05d}-of-{len(written):05d}.safetensors"
        for number, name in enumerate(written, 1)
    }
    files = {renamed.get(n, n): entry for part in parts for n, entry in part.files.items()}
    weights = {
        tensor: renamed[name]
        for part in parts
        for name, tensors in part.weights.items()
        for tensor in tensors
    }
    return files, weights, renamed


def publish(
    temporary: Path,
    final: Path,
    manifest: Manifest,
    weights: dict[str, str],
    renamed: dict[str, str],
) -> None:
    """Completes a temporary folder and renames it, replacing an older one of that name.

    Removes leftovers of abandoned checkpoints. Does nothing if the temporary folder is gone: then
    a process that shares it has published it. Raises OSError.
    """
    if not temporary.exists():
        return
    for partial in temporary.parent.glob(f".step-*{_PARTIAL}"):
        if partial != temporary:  # unused: a checkpoint starts only after the one before has ended
            remove_folder(partial)
    for before, after in renamed.items():
        if (temporary / before).exists():
            os.rename(temporary / before, temporary / after)
    for path in temporary.rglob("*"):  # such as files of an earlier job that was killed
        if not path.is_dir() and path.relative_to(temporary).as_posix() not in manifest.files:
            path.unlink()
    total = sum(manifest.files[name].size for name in set(weights.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    _write_json(temporary / INDEX, index)
    size, digest = size_and_hash(temporary / INDEX)
    files = {**manifest.files, INDEX: FileEntry(0, size, digest)}
    training = temporary / TRAINING
    if training.is_dir() and not any(training.iterdir()):
        training.rmdir()
    text = {"format": FORMAT, **asdict(replace(manifest, files=files))}
    _write_json(temporary / MANIFEST, sealed(text))
    sync_folder(temporary)
    _give_name(temporary, final)


def _give_name(temporary: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}{_OLD}")
    remove_folder(old)
    if final.exists():
        os.rename(final, old)
    os.rename(temporary, final)
    sync_folder(final.parent)
    remove_folder(old)


def _write_json(path: Path, value: Any) -> None:
    """Writes a file and syncs its content; the folder, with its name, is synced later."""
    with naming(path), path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def remove_folder(path: Path) -> None:
    """Removes a folder and everything in it; errors are ignored."""
    shutil.rmtree(path, ignore_errors=True)


def reading(path: Path) -> Any:
    """Keeps a running job from removing a checkpoint, as long as the result is referenced."""
    file = (path / MANIFEST).open("rb")
    if fcntl is not None:
        with suppress(OSError):  # no locks here
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return file


def is_read(path: Path) -> bool:
    """Whether another process reads the checkpoint (`reading`)."""
    if fcntl is None:
        return False
    try:
        with (path / MANIFEST).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def keep_newest(newest: Path, keep: int, site: int) -> None:
    """Removes checkpoints older than `newest`, which is whole, so that `keep` whole ones are left.

    keep 0: removes none. `site`: only this site's files must exist; others may be on other
    machines. A checkpoint that is being read (`reading`) is kept until a later call.
    """
    if not keep:
        return
    older = [p for p in list_checkpoints(newest.parent) if p.name < newest.name]
    whole = [path for path in older if is_whole(path, site)]
    for path in whole[: max(0, len(whole) - (keep - 1))]:
        if is_read(path):
            continue  # a later call removes it
        going = path.with_name(f".{path.name}{_GOING}")
        remove_folder(going)
        os.rename(path, going)  # never half removed under its own name
        remove_folder(going)


def clear_leftovers(folder: Path) -> None:
    """Removes what a killed job has left in a folder of checkpoints. No job may be writing there.

    A complete checkpoint under a temporary name is renamed, and one that was being replaced gets
    its name back.
    """
    for going in folder.glob(f".step-*{_GOING}"):
        remove_folder(going)
    for partial in folder.glob(f".step-*{_PARTIAL}"):
        final = folder / partial.name.removeprefix(".").removesuffix(_PARTIAL)
        try:
            read_manifest(partial)
        except CheckpointError:
            remove_folder(partial)
        else:
            _give_name(partial, final)
    for old in folder.glob(f".step-*{_OLD}"):
        final = folder / old.name.removeprefix(".").removesuffix(_OLD)
        if final.exists() or not (old / MANIFEST).is_file():
            remove_folder(old)
        else:
            os.rename(old, final)
