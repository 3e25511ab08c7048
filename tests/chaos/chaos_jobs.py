"""Training jobs of real processes to which something happens, for tests and the soak.

A job is what `fomoe train` runs on this machine: a lighthouse, a process per site, and who starts
lost ones again; here the processes are forked from one that has everything imported.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing as mp
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from fomoe_ext.launch.inject import VARIABLE, parse
from fomoe_ext.launch.processes import process_environment

NUM_SITES = 4
SILENT_S = 3.0
_LIMIT_S = 200.0
FLAGS = shlex.split(f"""
--hidden-size 16 --num-layers 2 --num-heads 2 --num-experts 8 --intermediate-size 16 --top-k 2
--seq-len 32 --batch-size 2 --local-steps 4 --rounds 8 --eval-rounds 3 --eval-tokens 512
--threads 1 --warmup-steps 4 --sites {NUM_SITES} --no-tensorboard --device cpu
--membership torchft --silent-s {SILENT_S} --codec int4 --inner-lr 0.02
""")


@dataclass
class Outcome:
    """What has become of a job."""

    codes: dict[int, list[int]]
    """By site, the exit codes of its processes in order; 128 + signal for a killed one."""
    report: dict[str, Any] | None
    log: str
    seconds: float
    left: list[str] = field(default_factory=list)
    """Processes and ports that are still there."""

    @property
    def story(self) -> list[dict[str, Any]]:
        """What happened to the sites."""
        assert self.report is not None, self.log
        return list(self.report["story"])

    @property
    def loss(self) -> float:
        """Validation loss at the end, nats per token."""
        assert self.report is not None, self.log
        return float(self.report["validation"]["loss"])


def _site(arguments: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)  # where it hangs, if it does
    from fomoe_ext.train import process as train

    sys.exit(train.main(arguments))


def _lighthouse(pipe: Connection) -> None:
    os.environ["RUST_LOG"] = "error"
    from fomoe_ext.config.addresses import parse_address
    from fomoe_ext.fault.lighthouse import Lighthouse

    bind = parse_address("127.0.0.1:0", "--bind", any_port=True)
    lighthouse = Lighthouse(bind, 1, SILENT_S)
    pipe.send(lighthouse.address)
    while True:
        try:
            lighthouse.dead(str(pipe.recv()))
        except EOFError:
            os._exit(0)


class ChaosJob:
    """A job under way. Use as a context manager; `wait` for its outcome."""

    def __init__(
        self,
        folder: Path,
        more: Sequence[str] = (),
        faults: str = "",
        restarts: int = 0,
        run_dir: Path | None = None,
    ) -> None:
        """`more`: flags besides FLAGS. `faults`: a script of `launch.inject`. `restarts`: how often
        each lost site is started again."""
        self.folder, self.run_dir = folder, run_dir or folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        self._words = [*FLAGS, *_text(), *more, "--run-dir", str(self.run_dir)]
        self._restarts = dict.fromkeys(range(NUM_SITES), restarts)
        self.codes: dict[int, list[int]] = {site: [] for site in range(NUM_SITES)}
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["fomoe_ext.train.process", "fomoe_ext.fault.lighthouse"]
        )
        self._faults = faults
        self._start = time.monotonic()

    def __enter__(self) -> ChaosJob:
        self._pipe, there = self._context.Pipe()
        self._light = self._context.Process(target=_lighthouse, args=(there,), daemon=True)
        self._light.start()
        there.close()
        self.address = self._pipe.recv()
        self.processes = {site: self._begin(site) for site in range(NUM_SITES)}
        return self

    def _begin(self, site: int) -> ForkServerProcess:
        environment = process_environment(site, NUM_SITES, "", {"OMP_NUM_THREADS": "1"})
        environment |= {"FOMOE_LIGHTHOUSE": self.address, VARIABLE: self._faults}
        environment |= {"RUST_LOG": "error"}
        log = self.folder / f"site-{site}.log"
        process = self._context.Process(
            target=_site, args=(self._words, environment, str(log)), daemon=True
        )
        process.start()
        return process

    def wait(self, limit_s: float = _LIMIT_S) -> Outcome:
        """Until all sites have ended. Raises AssertionError, with the logs, after `limit_s`."""
        ended_at = None
        while self.processes:
            for site, process in list(self.processes.items()):
                if process.exitcode is None:
                    continue
                code = process.exitcode
                self.codes[site].append(code if code >= 0 else 128 - code)
                del self.processes[site]
                if code == 0:
                    ended_at = ended_at or time.monotonic()
                    continue
                with suppress(OSError):  # a lighthouse that is gone tells nobody
                    self._pipe.send(site)
                if self._restarts[site] and ended_at is None:
                    self._restarts[site] -= 1
                    self.processes[site] = self._begin(site)
            passed = time.monotonic() - self._start
            if passed > limit_s:
                for process in self.processes.values():
                    assert process.pid is not None
                    os.kill(process.pid, signal.SIGUSR1)
                time.sleep(1.0)
                raise AssertionError(f"not ended after {passed:.0f} s\n{self.log()}")
            time.sleep(0.02)
        path = self.run_dir / "report.json"
        report = json.loads(path.read_text()) if path.exists() else None
        return Outcome(self.codes, report, self.log(), time.monotonic() - self._start)

    def kill_lighthouse(self) -> None:
        """Ends the process that knows who is there."""
        self._light.kill()
        self._light.join()

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        self._pipe.close()
        self._light.join(5)

    def log(self) -> str:
        """What all sites have said."""
        logs = sorted(self.folder.glob("site-*.log"))
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')}" for p in logs)

    def leftovers(self) -> list[str]:
        """After the end: processes that still run, and whether the lighthouse still listens."""
        left = [f"site {s}" for s, p in self.processes.items() if p.is_alive()]
        if self._light.is_alive():
            left.append("the lighthouse")
        host, _, port = self.address.rpartition(":")
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                left.append(f"port {port}")
        return left


_texts: list[tempfile.TemporaryDirectory[str]] = []


def _text() -> list[str]:
    """Flags for a small text, encoded once per process."""
    if not _texts:
        _texts.append(tempfile.TemporaryDirectory(prefix="fomoe-chaos-"))
        for module in ("argparse", "ast", "calendar", "cmd", "copy", "csv"):
            shutil.copy(str(os.__file__).replace("os.py", f"{module}.py"), _texts[0].name)
    folder = _texts[0].name
    return ["--data", f"{folder}/*.py", "--cache-dir", f"{folder}/cache"]


def run_undisturbed(
    folder: Path,
    more: Sequence[str] = (),
    faults: str = "",
    restarts: int = 0,
    **options: Any,
) -> Outcome:
    """As `run`, but again, up to twice, where a site was lost more often than the script says.

    On a machine that is too busy a site may send no heartbeat for seconds. The others rightly
    consider it dead, but that is another fault than the one under test.
    """
    scripted = Counter(str(fault.site) for fault in parse(faults))
    for attempt in range(3):
        outcome = run(folder / f"attempt-{attempt}", more, faults, restarts, **options)
        if outcome.report is None:
            break
        lost = Counter(site for event in outcome.story for site in event["lost"])
        late = [e for e in outcome.story if "is late" in e["reason"] and not e["lost"]]
        if lost <= scripted and not late:
            break
    return outcome


def run(
    folder: Path, more: Sequence[str] = (), faults: str = "", restarts: int = 0, **options: Any
) -> Outcome:
    """A whole job; see `ChaosJob`."""
    with ChaosJob(folder, more, faults, restarts, **options) as job:
        outcome = job.wait()
    outcome.left = job.leftovers()
    return outcome
