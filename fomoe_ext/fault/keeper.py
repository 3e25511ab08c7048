"""Runs the lighthouse of a fault-tolerant job for the launcher. Needs no torch."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from fomoe_ext.config.fault import FaultConfig

_GOODBYE_S = 15.0
_log = logging.getLogger(__name__)


class LighthouseKeeper:
    """Runs a lighthouse for a job on this machine, unless `fault.lighthouse` names another.

    Implements `launch.processes.Keeper`.
    """

    def __init__(self, fault: FaultConfig) -> None:
        self._fault = fault
        self._lighthouse: subprocess.Popen[str] | None = None
        self.restarts = fault.restarts
        self.patience_s = _GOODBYE_S + fault.silent_s
        """Seconds that the other sites have to end, once the first has ended the job."""
        self.environment: dict[str, str] = {"RUST_LOG": os.environ.get("RUST_LOG", "error")}

    def __enter__(self) -> Self:
        if self._fault.lighthouse is not None:
            return self
        from fomoe_ext.fault.lighthouse import LIGHTHOUSE

        home = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(p for p in (home, os.environ.get("PYTHONPATH")) if p)
        words = ["--bind", "127.0.0.1:0", "--quorum", str(self._fault.quorum), "--until-eof"]
        words += ["--silent-s", str(self._fault.silent_s)]
        self._lighthouse = subprocess.Popen(
            [sys.executable, "-P", "-m", "fomoe_ext.fault.lighthouse", *words],
            env={**os.environ, "PYTHONPATH": path, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        assert self._lighthouse.stdout is not None
        line = self._lighthouse.stdout.readline()
        if not line:
            code = self._lighthouse.wait()
            raise ValueError(f"the lighthouse did not start (exit code {code})")
        self.environment[LIGHTHOUSE] = str(json.loads(line)["lighthouse"])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lighthouse is not None:
            self._lighthouse.kill()
            self._lighthouse.wait()
            for stream in (self._lighthouse.stdin, self._lighthouse.stdout):
                if stream is not None:
                    stream.close()

    def dead(self, site: int) -> None:
        """Reports that a site's process has ended, so that others need not wait for a timeout."""
        if self._lighthouse is None or self._lighthouse.stdin is None:
            return
        try:
            self._lighthouse.stdin.write(f"dead {site}\n")
            self._lighthouse.stdin.flush()
        except OSError:
            _log.warning("fomoe: the lighthouse has ended")
