"""Runs steps, each in a process with a time limit, and leaves no process behind.

Steps of a group run concurrently, groups one after the other. A step that fails or hangs does not
stop the others. When a step ends or its time is up, every process of its session is killed. A step
with `early` starts at once and prepares itself; at its turn it gets a line on standard input.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO

OK, FAILED, TIMED_OUT, LEFT_OUT = "ok", "failed", "timed out", "left out"
LEAST_SECONDS = 5.0
"""A step is skipped if less time than this is left of the run."""
_POLL_S = 0.05
_NOTE_BYTES = 1 << 16  # of the end of an output, in which its last line is looked for


@dataclass(frozen=True)
class Step:
    """A command to run.

    `limit`: seconds that it may take from its turn on. `results`: name of the file of results that
    it appends to (--out). `absent`: why it cannot run here, or "". `needed`: whether later steps
    are skipped when it fails.
    """

    name: str
    command: Sequence[str]
    limit: float
    group: str
    results: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    early: bool = False
    absent: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a step ended. `note`: the reason or its last line of output. `log`: its output."""

    name: str
    state: str
    seconds: float = 0.0
    note: str = ""
    log: Path | None = None

    @property
    def bad(self) -> bool:
        return self.state in (FAILED, TIMED_OUT)


# ---- processes -----------------------------------------------------------------------------------


def session_of(process: int) -> int | None:
    """The session id of a process; None if it has ended or this is not Linux."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return int(
        text.rpartition(")")[2].split()[3]
    )  # the process name before it may contain any character


def kill_session(leader: int) -> None:
    """Kills every process in the session of `leader`, also those in other process groups."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
    with contextlib.suppress(OSError):
        for entry in os.scandir("/proc"):
            if entry.name.isdigit() and session_of(int(entry.name)) == leader:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(int(entry.name), signal.SIGKILL)


class _Running:
    """The process of a step."""

    def __init__(self, step: Step, log: Path) -> None:
        self.step, self.log = step, log
        self.output: IO[bytes] = log.open("wb")
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            step.command,
            env={**os.environ, **step.environment},
            stdin=subprocess.PIPE if step.early else subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def go(self) -> None:
        """Tells the process that it is its turn; the time limit counts from now on."""
        self.began = time.monotonic()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(b"go\n")
                self.process.stdin.close()

    def ended(self) -> bool:
        """Whether it has ended. It is not reaped before `end`, so that its id is not reused."""
        if self.process.returncode is not None:
            return True
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, flags) is not None

    def end(self) -> None:
        """Kills what is left of its session; returns the outcome."""
        kill_session(self.process.pid)
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.output.close()

    def outcome(self, limit: float, timed_out: bool) -> Outcome:
        seconds = time.monotonic() - self.began
        said = last_line(self.log)
        if timed_out:
            note = f"longer than {limit:.0f} s; {said}" if said else f"longer than {limit:.0f} s"
            return Outcome(self.step.name, TIMED_OUT, seconds, note, self.log)
        code = self.process.returncode
        if code == 0:
            return Outcome(self.step.name, OK, seconds, said, self.log)
        why = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        note = f"{why}; {said}" if said else why
        return Outcome(self.step.name, FAILED, seconds, note, self.log)


def last_line(log: Path) -> str:
    """The last line of an output that is not empty."""
    data = log.read_bytes()[-_NOTE_BYTES:] if log.exists() else b""
    lines = [line.strip() for line in data.decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


# ---- the run -------------------------------------------------------------------------------------


class Runner:
    """Runs steps within `seconds` in all; writes logs to `folder`."""

    def __init__(
        self, folder: Path, seconds: float, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.folder, self.say = folder, say
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self._running: dict[str, _Running] = {}

    @property
    def left(self) -> float:
        """Seconds left for the run."""
        return self.deadline - time.monotonic()

    def run(self, steps: Sequence[Step]) -> list[Outcome]:
        """Runs all steps; returns outcomes in the order of `steps`."""
        outcomes: dict[str, Outcome] = {}
        with self._all_ended():
            broken = ""
            for _, group in groupby(steps, key=lambda step: step.group):
                members = list(group)
                for step in members:
                    why = step.absent or (f"{broken} failed" if broken else "")
                    if not why and self.left < LEAST_SECONDS:
                        why = "no time was left"
                    if why:
                        outcomes[step.name] = Outcome(step.name, LEFT_OUT, note=why)
                        self._tell(outcomes[step.name])
                for outcome in self._run_group([s for s in members if s.name not in outcomes]):
                    outcomes[outcome.name] = outcome
                    self._tell(outcome)
                needed = [s.name for s in members if s.needed and outcomes[s.name].state != OK]
                broken = broken or next(iter(needed), "")
                if not broken:
                    self._start_early(steps, outcomes)
        return [outcomes[step.name] for step in steps]

    def _start(self, step: Step) -> _Running:
        running = _Running(step, self.folder / f"{step.name}.log")
        self._running[step.name] = running
        return running

    def _start_early(self, steps: Sequence[Step], outcomes: Mapping[str, Outcome]) -> None:
        """Starts the steps that prepare themselves, after the steps that all others need."""
        for step in steps:
            waits = step.early and not step.absent and step.name not in outcomes
            if waits and step.name not in self._running:
                with contextlib.suppress(OSError):  # said when its turn comes
                    self._start(step)

    def _run_group(self, steps: Sequence[Step]) -> Iterator[Outcome]:
        """Runs a group; yields outcomes as the steps end."""
        waiting: list[tuple[_Running, float]] = []
        for step in steps:
            limit = min(step.limit, max(self.left, LEAST_SECONDS))
            try:
                running = self._running.get(step.name) or self._start(step)
            except OSError as error:  # the program is not there, say
                yield Outcome(step.name, FAILED, note=str(error))
                continue
            running.go()
            waiting.append((running, limit))
        while waiting:
            for running, limit in list(waiting):
                ended = running.ended()
                if not ended and time.monotonic() - running.began <= limit:
                    continue
                running.end()
                del self._running[running.step.name]
                waiting.remove((running, limit))
                yield running.outcome(limit, timed_out=not ended)
            if waiting:
                time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _all_ended(self) -> Iterator[None]:
        """Kills all steps at the end, also if this process is terminated."""
        before = signal.getsignal(signal.SIGTERM)
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, _raise_exit)
        try:
            yield
        finally:
            for running in self._running.values():
                running.end()
            self._running.clear()
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGTERM, before)

    def _tell(self, outcome: Outcome) -> None:
        at = time.monotonic() - self.began
        self.say(f"[{at:4.0f} s] {outcome.name}: {outcome.state}, {outcome.seconds:.1f} s")


def _raise_exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
