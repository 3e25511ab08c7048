"""Faults made on purpose, for tests: FOMOE_FAULTS says what happens to which site, when.

A script is a list of faults, one per line or separated by commas:

    kill 2 at 3 reduce         site 2 kills itself in round 3 when it reaches the phase "reduce"
    stop 2 at 3 local for 8    it stops, connections open, for 8 seconds
    slow 2 at 3 local for 8    it sleeps for 8 seconds and goes on beating
    cut 2 at 3 gather          all its connections break
    corrupt 2 at 3 reduce      a byte of the next payload that it sends is another one
    full 2 at 3 checkpoint     its disk is full

Rounds count from 1. A process that is started anew with the same script does nothing.

It stands here and not in fault/ because meetings and checkpoints have places where a fault may
happen too (`point`), and they know nothing of fault tolerance. Needs no torch.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import stat
import subprocess
import time
from dataclasses import dataclass

_log = logging.getLogger(__name__)

VARIABLE = "FOMOE_FAULTS"
KINDS = ("kill", "stop", "slow", "cut", "corrupt", "full")
PHASES = ("local", "notes", "encode", "reduce", "gather", "apply", "reform", "checkpoint")
_FOREVER_S = 3600.0


@dataclass(frozen=True)
class Fault:
    """What happens to a site, in which round and phase; `seconds` for stop and slow."""

    kind: str
    site: int
    round: int
    phase: str
    seconds: float = _FOREVER_S

    def __str__(self) -> str:
        lasting = f" for {self.seconds:g}" if self.kind in ("stop", "slow") else ""
        return f"{self.kind} {self.site} at {self.round} {self.phase}{lasting}"


def parse(script: str) -> list[Fault]:
    """The faults of a script. Raises ValueError, with the line, for what is no fault."""
    result = []
    for line in script.replace(",", "\n").splitlines():
        words = line.split()
        if not words:
            continue
        try:
            kind, site, at, round_, phase, *more = words
            seconds = _FOREVER_S
            if more:
                lasting, number = more
                seconds = float(number)
                if lasting != "for":
                    raise ValueError("wanted 'for SECONDS'")
            if kind not in KINDS or at != "at" or phase not in PHASES:
                raise ValueError(f"kinds: {', '.join(KINDS)}; phases: {', '.join(PHASES)}")
            result.append(Fault(kind, int(site), int(round_), phase, seconds))
        except ValueError as error:
            raise ValueError(f"fault {line.strip()!r}: {error}") from None
    return result


_armed: list[Fault] = []
_round = 0
_corrupts = False


def arm(site: int) -> None:
    """From here on the script's faults of this site happen. Raises ValueError for a bad script."""
    _armed[:] = [f for f in parse(os.environ.get(VARIABLE, "")) if f.site == site]


def in_round(number: int) -> None:
    """The round, from 1, that is under way."""
    global _round
    _round = number


def point(phase: str) -> None:
    """A place where a fault may happen; it costs nothing where there is none."""
    if not _armed:
        return
    for fault in [f for f in _armed if (f.round, f.phase) == (_round, phase)]:
        _armed.remove(fault)
        _happen(fault)


def corrupted() -> bool:
    """Whether the next payload is to be damaged; True once."""
    global _corrupts
    wanted, _corrupts = _corrupts, False
    return wanted


def _happen(fault: Fault) -> None:
    global _corrupts
    _log.info("fault: %s", fault)
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        wake = f"sleep {fault.seconds:g}; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", wake], stdout=subprocess.DEVNULL, start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "slow":
        time.sleep(fault.seconds)
    elif fault.kind == "cut":
        _cut_connections()
    elif fault.kind == "corrupt":
        _corrupts = True
    else:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _cut_connections() -> None:
    """Shuts down every TCP connection of this process, as a broken link would."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                listens = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if connection.family in (socket.AF_INET, socket.AF_INET6) and not listens:
                    connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue
