"""Signals that ask a job to stop, and the loss of its terminal."""

from __future__ import annotations

import errno
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import fomoe_ext
from fomoe_ext import cli
from fomoe_ext.launch import signals
from fomoe_ext.launch.processes import _counted_signals

HOME = str(Path(fomoe_ext.__file__).parent.parent)
ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]
each = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)


@pytest.fixture(autouse=True)
def handlers():
    """Restores the signal handlers after each test."""
    before = {kind: signal.getsignal(kind) for kind in ALL}
    for kind in ALL:
        signal.signal(kind, signal.SIG_DFL)
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


def send(kind: signal.Signals) -> None:
    os.kill(os.getpid(), kind)
    time.sleep(0.01)  # gives Python time to run the handler


@each
def test_each_signal_asks_a_site_to_stop(kind):
    from fomoe_ext.launch.world import StopRequest

    stop = StopRequest()
    stop.install()
    assert not stop.asked
    send(kind)
    assert stop.asked
    # A second signal ends the process; but a closed terminal sends SIGHUP several times.
    again = signal.getsignal(kind)
    assert (again is signal.SIG_DFL) == (kind != signal.SIGHUP)


@each
def test_the_launcher_receives_each_signal(kind):
    with _counted_signals() as received:
        for _ in range(3):
            send(kind)
        assert received == [kind] * (1 if kind == signal.SIGHUP else 3)
        send(signal.SIGHUP)
        assert received[-1] == kind
    assert signal.getsignal(kind) is signal.SIG_DFL


def test_a_closed_terminal_counts_before_a_second_signal():
    with _counted_signals() as received:
        send(signal.SIGHUP)
        send(signal.SIGTERM)
        assert received == [signal.SIGHUP, signal.SIGTERM]


def test_nohup_is_heeded():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with _counted_signals() as received:
        send(signal.SIGHUP)
        assert received == []
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@each
def test_commands_tidy_up(kind, monkeypatch, capsys):
    tidied = []

    def export(arguments):
        try:
            send(kind)
            raise AssertionError("went on")
        finally:
            tidied.append(arguments)

    monkeypatch.setitem(cli._COMMANDS, "export", export)
    assert cli.main(["export", "x"]) == 128 + kind
    assert tidied == [["x"]]
    assert capsys.readouterr().err == f"fomoe export: ended by {kind.name}\n"
    assert signal.getsignal(kind) is signal.SIG_DFL
    assert tuple(ALL) == signals.STOPPING


TALKS = """
import os, sys
from fomoe_ext.launch.console import outlive_terminal
outlive_terminal()
sys.stdin.readline()
for stream in (sys.stdout, sys.stderr):
    print("nobody hears this", file=stream, flush=True)
    print("nor this", file=stream)
gone = [os.path.samestat(os.fstat(fd), os.stat(os.devnull)) for fd in (1, 2)]
open(sys.argv[1], "w").write(f"done {gone}")
"""


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_a_job_outlives_its_terminal_or_pipe(kind, tmp_path):
    reader, writer = pty.openpty() if kind == "terminal" else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", TALKS, str(tmp_path / "file")],
        stdin=subprocess.PIPE,
        stdout=writer,
        stderr=writer,
        env={**os.environ, "PYTHONPATH": HOME},
        start_new_session=True,
    )
    os.close(writer)
    os.close(reader)
    process.communicate(b"\n", timeout=30)
    assert process.returncode == 0
    assert (tmp_path / "file").read_text() == "done [True, True]"


def test_errors_other_than_a_lost_reader_are_raised():
    from fomoe_ext.launch.console import _Output

    def write(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        print("x", file=_Output(SimpleNamespace(write=write)))  # type: ignore[arg-type]
