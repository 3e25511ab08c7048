"""Who writes into a folder: a lock that ends with its owner, and says who that is. Needs no torch.

A file `.lock` in the folder is held by flock, which the kernel lets go when the owner dies, and
has as JSON who that is. The processes of one job hold it together (shared); another job, which asks
for all of it, is refused. Where flock does not reach (some network file systems, other machines)
what the file says decides: a process of this machine lives or not, one of another machine sets the
file's time every few seconds, and is watched for that.
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
except ImportError:  # not on this system: what the file says decides
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

LOCK = ".lock"
_BEAT_S = 4.0
"""Seconds between two signs of life."""
_BEATS = 3
"""Signs that a process of another machine may miss before it counts as dead."""
_RECORD_BYTES = 1 << 12
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class InUse(ValueError):
    """A folder that another job writes into."""


def new_job() -> str:
    """What tells a job from all others."""
    return secrets.token_hex(8)


class Held:
    """A folder that this process may write into, until `release` or its end."""

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
        """Lets go; with `remove` the file goes too, for a folder that is to be moved."""
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
    """Holds a folder that is there for `job` (None = one of this process alone), with all others of
    that job and nobody else.

    `what`: the argument that named it, for an error. Raises InUse, which names who has it; OSError
    where nothing can be written there.
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
        record = _settled_record(descriptor)
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
    # A full disk is no reason to go without: the lock is there, only not who has it.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(own).encode(), 0)
    if alone is None:
        time.sleep(0.2)  # who else has come at once has written by now
        if (found := _read(descriptor)) != own and found:
            raise InUse(_in_use(name, found))
    elif not _flock(descriptor, shared=True, wait=True):
        raise InUse(_in_use(name, {}))
    return Held(path, descriptor, job, leads=True)


def _flock(descriptor: int, shared: bool, wait: bool = False) -> bool | None:
    """Whether the lock was to be had; None where there are no locks."""
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
    """Whether this is still the file of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> dict[str, Any]:
    """What the file says; nothing where it is empty, or torn."""
    try:
        record = loads(os.pread(descriptor, _RECORD_BYTES, 0))
    except (ValueError, OSError):
        return {}
    return record if isinstance(record, dict) else {}


def _settled_record(descriptor: int) -> dict[str, Any]:
    """What the file says, when its owner has got round to it."""
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
    """Tells a process from a later one of the same number; "" where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""


def _lives(record: dict[str, Any], path: Path, name: str) -> bool:
    """Whether who has written a record is still there, though the kernel says that nobody is."""
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
    """Whether a process of another machine gives signs of life."""
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
        with path.open("rb") as file:  # a network file system asks its server then
            if os.fstat(file.fileno()).st_mtime_ns != first:
                return True
    return False
