"""Checks whether checkpoints are whole and finds the newest whole one.

A file is whole if it has the size and the SHA-256 of the manifest. Each file is read once per
process.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fomoe_ext.checkpoint.manifest import (
    CheckpointError,
    FileEntry,
    list_checkpoints,
    read_manifest,
    sha256,
)
from fomoe_ext.launch.messages import gather_objects

_checked: set[tuple[str, int, int, str]] = set()
"""Files whose SHA-256 this process has checked: path, inode, modification time, SHA-256."""


def require_file(path: Path, name: str, entry: FileEntry, content: bool) -> None:
    """Raises CheckpointError unless a file exists with its size and, if `content`, its SHA-256."""
    file = path / name
    try:
        there = file.is_file()
    except OSError as error:  # such as a name that is too long
        raise CheckpointError(f"checkpoint {path}: {name[:80]!r}: {error.strerror}") from None
    if not there:
        raise CheckpointError(f"checkpoint {path} lacks {name}")
    found = file.stat()
    if found.st_size != entry.size:
        raise CheckpointError(
            f"checkpoint {path}: {name} must have {entry.size} bytes, got {found.st_size}"
        )
    if not content or (known := _known(file, entry)) in _checked:
        return
    try:
        digest = sha256(file)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot read {name} ({error})") from None
    if digest != entry.sha256:
        raise CheckpointError(f"checkpoint {path}: the content of {name} is damaged")
    _checked.add(known)


def require_content(path: Path, names: Iterable[str]) -> None:
    """Raises CheckpointError unless the named files have the SHA-256 of the manifest."""
    files = read_manifest(path).files
    for name in names:
        require_file(path, name, files[name], content=True)


def require_whole(path: Path, site: int | None = None) -> None:
    """Raises CheckpointError unless the manifest and the files (of all sites or one) exist, with
    their sizes."""
    for name, entry in read_manifest(path).files.items():
        if site is None or entry.site == site:
            require_file(path, name, entry, content=False)


def is_whole(path: Path, site: int | None = None) -> bool:
    """Whether `require_whole` raises no error."""
    try:
        require_whole(path, site)
    except CheckpointError:
        return False
    return True


class Found(NamedTuple):
    """The newest whole checkpoint of a folder, or None, and why newer ones were skipped."""

    path: Path | None
    skipped: list[str]


def newest_whole(
    folder: Path, num_processes: int = 1, *, content: bool = True, share: tuple[int, int] = (0, 1)
) -> Found:
    """The newest checkpoint of which all files are whole for every process; a collective of all.

    Checks sizes and, with `content`, SHA-256. `share`: (i, n) for the i-th of n processes that see
    the same folder; each then reads every n-th file.
    """
    listed = gather_objects([path.name for path in list_checkpoints(folder)], num_processes)
    skipped = []
    for name in sorted(set().union(*listed), reverse=True):
        reasons = gather_objects(_what_is_wrong(folder / name, content, share), num_processes)
        reason = next(filter(None, reasons), "")
        if not reason:
            if content:
                _trust(folder / name)
            return Found(folder / name, skipped)
        skipped.append(reason)
    return Found(None, skipped)


def require_whole_everywhere(path: Path, num_processes: int, share: tuple[int, int]) -> None:
    """Raises CheckpointError on all processes unless the checkpoint is whole for every one.

    A collective. Checks sizes and SHA-256; `share` as for `newest_whole`.
    """
    reasons = gather_objects(_what_is_wrong(path, True, share), num_processes)
    if reason := next(filter(None, reasons), ""):
        raise CheckpointError(reason)
    _trust(path)


def _what_is_wrong(path: Path, content: bool, share: tuple[int, int]) -> str:
    """Why a checkpoint is not whole, or ""; with `content` reads this process's share of files."""
    try:
        require_whole(path)
        if content:
            for name, entry in sorted(read_manifest(path).files.items())[share[0] :: share[1]]:
                require_file(path, name, entry, content=True)
    except (CheckpointError, OSError) as error:
        return str(error)
    return ""


def _known(file: Path, entry: FileEntry) -> tuple[str, int, int, str]:
    found = file.stat()
    return str(file.resolve()), found.st_ino, found.st_mtime_ns, entry.sha256


def _trust(path: Path) -> None:
    """Records all files as checked: this process or others with the same folder have read them."""
    for name, entry in read_manifest(path).files.items():
        _checked.add(_known(path / name, entry))
