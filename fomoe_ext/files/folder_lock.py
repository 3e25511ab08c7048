"""A lock on a folder that ends with its owner and names it. Needs no torch.

The file `.lock` in the folder is locked with flock, which the kernel releases when the owner dies,
and contains a JSON record of the owner. The processes of one job share the lock; another job needs
it exclusively and is refused. If flock has no effect (some network file systems, other machines),
the record decides: the owner is either a process of this machine, which is alive or not, or one of
another machine, which must update the time of the file every few seconds.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fomoe_ext.files.json_values import loads

try:
    import fcntl
except ImportError:  # not on this system: the record decides
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

LOCK = ".lock"
_BEAT_S = 4.0
"""Seconds between two signs of life."""
_BEATS = 3
"""Signs of life that a process of another machine may miss before it counts as dead."""
_RECORD_BYTES = 1 << 12
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class InUse(ValueError):
    """A folder that another job writes into."""


def new_job() -> str:
    """A new random id of a job."""
    return secrets.token_hex(8)


class Held:
    """The lock on a folder: this process may write there until `release`, or until it ends."""

    def __init__(self, path: Path, descriptor: int, job: str, leads: bool) -> None:
        self.path, self.job, self._descriptor, self._leads = path, job, descriptor, leads
        self._ended = threading.Event()
        if leads:
            threading.Thread(target=self._beat, name="folder-lock", daemon=True).start()

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_S):
            with suppress(OSError):
                os.utime(self.path)

    def release(self, remove: bool = False) -> None:
        """Releases the lock. remove: also deletes the file, for a folder that will be moved."""
        if self._ended.is_set():
            return
        self._ended.set()
        with suppress(OSError):
            if remove:
                self.path.unlink()
            elif self._leads:
                os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


def hold(folder: Path, what: str, job: str | None = None) -> Held:
    """Locks an existing folder for the processes of a job.

    what: the argument that named the folder, for errors. job: id of the job; None = only this
    process. Raises InUse, naming the owner, if another job has the lock, and OSError if the folder
    cannot be written.
    """
    job, path = job or new_job(), folder / LOCK
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise type(error)(error.errno, f"{what} {folder}: {error.strerror}") from None
        try:
            held = _take(descriptor, path, f"{what} {folder}", job)
        except BaseException:
            os.close(descriptor)
            raise
        if held is not None:
            return held
        os.close(descriptor)  # the file was removed meanwhile


def _take(descriptor: int, path: Path, name: str, job: str) -> Held | None:
    alone = _flock(descriptor, shared=False)
    if alone is False:
        record = _record_of_owner(descriptor)
        if record.get("job") != job or not _flock(descriptor, shared=True):
            raise InUse(_in_use(name, record))
        return Held(path, descriptor, job, leads=False)
    if not _is(descriptor, path):
        return None
    record = _read(descriptor)
    if record.get("job", job) != job and _lives(record, path, name):
        raise InUse(_in_use(name, record))
    own = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "started": _started(os.getpid()),
        "job": job,
    }
    if record.get("job") == job and alone is None:
        return Held(path, descriptor, job, leads=False)
    # On a full disk the lock still works, only the record of the owner is missing.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(own).encode(), 0)
    if alone is None:
        time.sleep(0.2)  # a process that came at the same time has written its record by now
        if (found := _read(descriptor)) != own and found:
            raise InUse(_in_use(name, found))
    elif not _flock(descriptor, shared=True, wait=True):
        raise InUse(_in_use(name, {}))
    return Held(path, descriptor, job, leads=True)


def _flock(descriptor: int, shared: bool, wait: bool = False) -> bool | None:
    """Whether the file could be locked; None if the file system has no locks."""
    if fcntl is None:
        return None
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _is(descriptor: int, path: Path) -> bool:
    """Whether the path still names this open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> dict[str, Any]:
    """The record in the file; {} if it is empty or incomplete."""
    try:
        record = loads(os.pread(descriptor, _RECORD_BYTES, 0))
    except (ValueError, OSError):
        return {}
    return record if isinstance(record, dict) else {}


def _record_of_owner(descriptor: int) -> dict[str, Any]:
    """The record in the file; waits briefly for its owner to write it."""
    for _ in range(10):
        if record := _read(descriptor):
            return record
        time.sleep(0.02)
    return {}


def _in_use(name: str, record: dict[str, Any]) -> str:
    if not record:
        return f"{name} is in use by another process"
    return (
        f"{name} is in use by process {record.get('process')} on {record.get('host')} since "
        f"{record.get('since')}"
    )


def _started(process: int) -> str:
    """Distinguishes a process from a later one with the same number; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""


def _lives(record: dict[str, Any], path: Path, name: str) -> bool:
    """Whether the owner in a record still runs, although the kernel reports no lock."""
    process = record.get("process")
    if record.get("host") != socket.gethostname():
        return _beats(record, path, name)
    if type(process) is not int or process < 1:
        return False
    if record.get("started"):
        return _started(process) == record["started"]
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _beats(record: dict[str, Any], path: Path, name: str) -> bool:
    """Whether a process of another machine updates the time of the file."""
    first, end = path.stat().st_mtime_ns, time.monotonic() + _BEATS * _BEAT_S
    _log.warning(
        "fomoe: %s was in use by process %s on %s: waiting %.0f s for a sign of life",
        name,
        record.get("process"),
        record.get("host"),
        _BEATS * _BEAT_S,
    )
    while time.monotonic() < end:
        time.sleep(_BEAT_S / 8)
        with path.open("rb") as file:  # makes a network file system ask its server
            if os.fstat(file.fileno()).st_mtime_ns != first:
                return True
    return False
