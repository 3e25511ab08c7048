"""Faults on purpose, for tests. FOMOE_FAULTS lists what happens to which site at which time.

It is a list of faults, one per line or separated by commas:

    kill 2 at 3 reduce         site 2 kills itself in round 3 when it reaches the phase "reduce"
    stop 2 at 3 local for 8    it stops, connections open, for 8 seconds
    slow 2 at 3 local for 8    it sleeps for 8 seconds; its heartbeat continues
    cut 2 at 3 gather          all its connections break
    corrupt 2 at 3 reduce      one byte of the next payload that it sends is changed
    full 2 at 3 checkpoint     its disk is full

Rounds count from 1. A restarted process ignores the list.

This module is not in fault/, because meetings and checkpoints, which know nothing of fault
tolerance, call `point` too. Needs no torch.
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
    """One fault of a site, in a round and a phase; `seconds` for stop and slow."""

    kind: str
    site: int
    round: int
    phase: str
    seconds: float = _FOREVER_S

    def __str__(self) -> str:
        lasting = f" for {self.seconds:g}" if self.kind in ("stop", "slow") else ""
        return f"{self.kind} {self.site} at {self.round} {self.phase}{lasting}"


def parse(script: str) -> list[Fault]:
    """The faults in a list as above. Raises ValueError with the line that is no fault."""
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
                    raise ValueError(f"the duration must be 'for SECONDS', got {lasting!r}")
            if kind not in KINDS or at != "at" or phase not in PHASES:
                raise ValueError(
                    f"it must be KIND SITE at ROUND PHASE, with a kind of {', '.join(KINDS)} and "
                    f"a phase of {', '.join(PHASES)}"
                )
            result.append(Fault(kind, int(site), int(round_), phase, seconds))
        except ValueError as error:
            raise ValueError(f"fault {line.strip()!r}: {error}") from None
    return result


_armed: list[Fault] = []
_round = 0
_corrupts = False


def arm(site: int) -> None:
    """Makes the listed faults of this site happen. Raises ValueError for a malformed list."""
    _armed[:] = [f for f in parse(os.environ.get(VARIABLE, "")) if f.site == site]


def in_round(number: int) -> None:
    """Sets the current round, counted from 1."""
    global _round
    _round = number


def point(phase: str) -> None:
    """Lets a fault of this phase happen, if one is due; costs nothing otherwise."""
    if not _armed:
        return
    for fault in [f for f in _armed if (f.round, f.phase) == (_round, phase)]:
        _armed.remove(fault)
        _happen(fault)


def corrupted() -> bool:
    """Whether the next payload is to be damaged. True only once per fault."""
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
