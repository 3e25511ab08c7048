"""Whether what a command is to write can be written, before its work; errors name the argument.

Needs no torch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def require_folder(name: str, path: Path) -> None:
    """Raises OSError naming the argument unless files can be made in a folder, or in one that is
    yet to be made; nothing is left there."""
    _require(name, path)


def require_new(name: str, path: Path) -> None:
    """Raises OSError naming the argument unless a file or folder can be made beside which there may
    be others, its own folder made if need be; nothing is left there."""
    _require(name, path, path.absolute().parent)


def require_file(name: str, path: Path) -> None:
    """`require_new` of a file, which may be there and is then replaced."""
    if path.exists() and not path.is_file():
        raise IsADirectoryError(f"{name} {path} must be a file, or a new one")
    require_new(name, path)


def require_place(name: str, path: Path, folder: Path | None = None) -> Path:
    """The folder, or the nearest above one that is yet to be made; `folder`: where that is not the
    path itself. Raises OSError naming the argument where it can be no folder; whether anything can
    be written there is not tried."""
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
    """What there is of a path: itself, or the nearest folder above it."""
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
    """An error in words. Where it is only the system's, of a file, the argument that the file is
    from (option -> what was given) comes first."""
    if not (isinstance(error, OSError) and error.errno is not None and error.filename is not None):
        return str(error)
    file = str(error.filename) if isinstance(error.filename, int) else os.fsdecode(error.filename)
    parts = Path(file).absolute().parts
    found = ""
    for option, value in arguments.items():
        others = Path(value).absolute().parts
        shorter = min(len(parts), len(others))
        # In what was given, or above it: a folder that could not be made, say.
        near = value and shorter > 1 and parts[:shorter] == others[:shorter]
        if near and len(value) > len(arguments.get(found, "")):
            found = option
    if not found:
        return f"{file}: {error.strerror}"
    about = "" if file == arguments[found] else f"{file}: "
    return f"{found} {arguments[found]}: {about}{error.strerror}"


def options_of(arguments: list[str]) -> dict[str, str]:
    """What stands after which option on a command line; what stands alone by its place, as
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
