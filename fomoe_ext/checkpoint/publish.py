"""The last steps of a checkpoint: its files' final names, index, manifest, and its own name.

Also what is done to folders of checkpoints besides: older ones are removed, and what a job that was
killed has left behind is completed or cleared away.
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
    """What one process has written, as it tells the others.

    files: fields of a `FileEntry` by name. weights: the tensors of the global model in each of its
    files. place: which folder they are in (`place_of`).
    """

    files: dict[str, dict[str, Any]]
    weights: dict[str, list[str]]
    place: list[Any] | None


def place_of(folder: Path) -> list[Any]:
    """Which folder this is: the same for two processes only if they see the same one."""
    found = folder.stat()
    return [socket.gethostname(), found.st_dev, found.st_ino]


def size_and_hash(path: Path) -> tuple[int, str]:
    """A file's size in bytes and its SHA-256."""
    return path.stat().st_size, sha256(path)


def turns(parts: Sequence[Part]) -> Iterator[set[int]]:
    """Who publishes, one set of processes after the other: process 0, then one of every place."""
    yield {0}
    first: dict[str, int] = {}
    for number, part in enumerate(parts):
        first.setdefault(repr(part.place), number)
    yield set(first.values()) - {0}


def numbered(
    parts: Sequence[Part],
) -> tuple[dict[str, dict[str, Any]], dict[str, str], dict[str, str]]:
    """All files by their final names, which tensor is in which, and the final names by the first.

    The global model's files are numbered through, as transformers has them.
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
    """Completes a temporary folder and gives it its name, in place of an older one if there is.

    What is left of checkpoints that were given up goes away. Does nothing where the folder is gone,
    published by a process that shares it. Raises OSError.
    """
    if not temporary.exists():
        return
    for partial in temporary.parent.glob(f".step-*{_PARTIAL}"):
        if partial != temporary:  # nobody writes there: a checkpoint begins after the one before
            remove_folder(partial)
    for before, after in renamed.items():
        if (temporary / before).exists():
            os.rename(temporary / before, temporary / after)
    for path in temporary.rglob("*"):  # of an earlier job that was killed, say
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
    """Writes a file whose folder nobody reads yet; its content is synced, its name is not."""
    with naming(path), path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def remove_folder(path: Path) -> None:
    """Removes a folder and all in it, as far as that goes."""
    shutil.rmtree(path, ignore_errors=True)


def reading(path: Path) -> Any:
    """While what this returns is kept, a job that writes beside a checkpoint does not remove it."""
    file = (path / MANIFEST).open("rb")
    if fcntl is not None:
        with suppress(OSError):  # no locks here
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return file


def is_read(path: Path) -> bool:
    """Whether somebody has asked for the checkpoint to stay (`reading`)."""
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

    keep 0: none is removed. `site`: whose files must be there; others may be on other machines.
    One that is being read (`reading`) stays for now.
    """
    if not keep:
        return
    older = [p for p in list_checkpoints(newest.parent) if p.name < newest.name]
    whole = [path for path in older if is_whole(path, site)]
    for path in whole[: max(0, len(whole) - (keep - 1))]:
        if is_read(path):
            continue  # another time
        going = path.with_name(f".{path.name}{_GOING}")
        remove_folder(going)
        os.rename(path, going)  # never half removed under its own name
        remove_folder(going)


def clear_leftovers(folder: Path) -> None:
    """Clears away what a killed job has left in a folder of checkpoints; nobody may write there.

    A checkpoint that lacked nothing but its name gets it; one that was being replaced comes back.
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
