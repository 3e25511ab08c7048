"""`fomoe train` for tests, by processes forked from one that has imported everything.

The launcher and the sites run as on the command line, without the seconds in which each of them
imports torch. What depends on how processes start (signals, torchrun, namespaces, restarts) is
tested with real processes (`small_job.command`, `chaos/test_launching.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from sites import forkserver

_LIMIT_S = 120.0


def train(
    *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `fomoe train` with these flags to its end; `env` is its whole environment."""
    given = dict(os.environ if env is None else env)
    with tempfile.TemporaryDirectory(prefix="fomoe-forked-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = forkserver().Process(
            target=_launch, args=(arguments, given, os.getcwd(), str(out), str(err))
        )
        process.start()
        process.join(_LIMIT_S)
        if process.exitcode is None:
            process.kill()  # its sites notice that, and end
            process.join()
        said = [path.read_text(errors="replace") if path.exists() else "" for path in (out, err)]
    assert process.exitcode is not None
    return subprocess.CompletedProcess(("fomoe train", *arguments), process.exitcode, *said)


def _launch(
    arguments: Sequence[str], env: Mapping[str, str], folder: str, out: str, err: str
) -> None:
    """The launcher, in a forked process."""
    os.chdir(folder)
    for path, descriptor in ((out, 1), (err, 2)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(env)
    from fomoe_ext import cli
    from fomoe_ext.launch import processes as launch

    launch.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=_popen, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
    )
    sys.exit(cli.main(["train", *arguments]))


def _popen(words: Sequence[str], **options: Any) -> Any:
    """A site's process: a fork if the command is a training job, else a new process."""
    if list(words[:4]) != [sys.executable, "-P", "-m", "fomoe_ext.train"]:
        return subprocess.Popen(words, **options)
    return _Site(words[4:], **options)


class _Site:
    """What the launcher needs of a `subprocess.Popen`."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: Any,
        stderr: int | None,
        pass_fds: Sequence[int],
        process_group: int,
    ) -> None:
        assert stdin == subprocess.DEVNULL and process_group == 0
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setpgid(0, 0)
                _redirect(stdout, stderr, pass_fds)
                _be_a_site(arguments, env)
            finally:
                os._exit(1)

    def poll(self) -> int | None:
        return self._collect(os.WNOHANG)

    def wait(self) -> int | None:
        return self._collect(0)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def _collect(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def _send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _redirect(stdout: Any, stderr: int | None, passed: Sequence[int]) -> None:
    """Connects a new process as `subprocess.Popen` would; all other files are closed."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if stdout is not None:
        os.dup2(stdout.fileno(), 1)
    if stderr == subprocess.STDOUT:
        os.dup2(1, 2)
    kept = sorted({2, *passed})
    for before, after in zip(kept, [*kept[1:], 1 << 12], strict=True):
        os.closerange(before + 1, after)


def _be_a_site(arguments: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    from fomoe_ext.train import process as job

    try:
        code = job.main(list(arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
