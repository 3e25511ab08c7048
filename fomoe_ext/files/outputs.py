"""Checks before a command's work that its output can be written; errors name the argument.

Needs no torch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def require_folder(name: str, path: Path) -> None:
    """Raises OSError naming the argument unless files can be created in the folder, which need not
    exist yet. Leaves nothing there."""
    _require(name, path)


def require_new(name: str, path: Path) -> None:
    """Raises OSError naming the argument unless a file or folder can be created at the path, whose
    parent need not exist yet. Leaves nothing there."""
    _require(name, path, path.absolute().parent)


def require_file(name: str, path: Path) -> None:
    """As `require_new`, for a file that may exist and will be replaced."""
    if path.exists() and not path.is_file():
        raise IsADirectoryError(f"{name} {path} must be a file, or a new one")
    require_new(name, path)


def require_place(name: str, path: Path, folder: Path | None = None) -> Path:
    """The folder, or its nearest existing parent. folder: None = the path itself. Raises OSError
    naming the argument if it cannot be a folder; does not try to write there."""
    there = _nearest(name, folder or path)
    if not there.is_dir():
        kind = "is a link to nothing" if not there.exists() else "is a file"
        place = "must be in" if folder else "must be"
        raise NotADirectoryError(f"{name} {path} {place} a folder, or a new one: {there} {kind}")
    return there


def _require(name: str, path: Path, folder: Path | None = None) -> None:
    there = require_place(name, path, folder)
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".fomoe-", dir=there))
    except OSError as error:
        raise PermissionError(
            f"{name} {path}: nothing can be written in {there}: {error.strerror}"
        ) from None


def _nearest(name: str, path: Path) -> Path:
    """The path itself if it exists, else its nearest existing parent."""
    there = path.absolute()
    while True:
        try:
            there.lstat()
            return there
        except (FileNotFoundError, NotADirectoryError):
            there = there.parent
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise OSError(f"{name} {path}: {reason}") from None


def named(error: Exception, arguments: Mapping[str, str]) -> str:
    """The message of an error. For a system error about a file it begins with the argument that
    the file comes from. arguments: option -> value."""
    if not (isinstance(error, OSError) and error.errno is not None and error.filename is not None):
        return str(error)
    file = str(error.filename) if isinstance(error.filename, int) else os.fsdecode(error.filename)
    parts = Path(file).absolute().parts
    found = ""
    for option, value in arguments.items():
        others = Path(value).absolute().parts
        shorter = min(len(parts), len(others))
        # Inside the given path, or a parent of it (a folder that could not be created).
        near = value and shorter > 1 and parts[:shorter] == others[:shorter]
        if near and len(value) > len(arguments.get(found, "")):
            found = option
    if not found:
        return f"{file}: {error.strerror}"
    about = "" if file == arguments[found] else f"{file}: "
    return f"{found} {arguments[found]}: {about}{error.strerror}"


def options_of(arguments: list[str]) -> dict[str, str]:
    """Options of a command line -> their values; values without an option by position, as
    "argument 1"."""
    found: dict[str, str] = {}
    option, alone = "", 0
    for word in arguments:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            if equals:
                found[option] = value
        elif option and option not in found:
            found[option] = word
        else:
            alone += 1
            found[f"argument {alone}"] = word
    return found
