"""Local launch: all processes of all sites on this machine, watched until all have ended.

Each is `python -m fomoe_ext.train`, started as torchrun would. The launcher forwards signals, ends
all sites if one dies, and leaves no process behind. With a slow link the sites run in network
namespaces of their own, if that is allowed. Needs no torch.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from fomoe_ext.config.links import describe
from fomoe_ext.files.unwritten import EXIT_UNWRITTEN
from fomoe_ext.launch import signals
from fomoe_ext.launch.link import VARIABLE as LINK
from fomoe_ext.launch.link import link_variable, wanted_mode
from fomoe_ext.launch.namespace import INTERFACE, NamespaceError, Network
from fomoe_ext.launch.reader import EXIT_UNREAD, has_left
from fomoe_ext.placement.wire import Link

_log = logging.getLogger(__name__)

EXIT_STOPPED = 130
"""Exit code of a job that was stopped by a signal (as a shell reports SIGINT)."""
EXIT_PEER_LOST = 75
"""Exit code of a site that failed only because another site was lost (EX_TEMPFAIL)."""

RENDEZVOUS = "FOMOE_RENDEZVOUS"
LAUNCHER_FD = "FOMOE_LAUNCHER_FD"
CONSOLE_FD = "FOMOE_CONSOLE_FD"
"""Descriptor of the launcher's output, for a site that takes over speaking to the user."""

_POLL_S = 0.05
_LOG_LINES = 15


class Keeper(AbstractContextManager[Any], Protocol):
    """Support for a job that continues when sites are lost, while its sites run."""

    restarts: int
    """How often each lost site is started again."""
    patience_s: float
    """Seconds that the other sites have to end, once the first has ended the job."""
    environment: Mapping[str, str]
    """Variables for every site; complete after `__enter__`."""

    def dead(self, site: int) -> None:
        """A site's process has ended."""
        ...


@dataclass
class _Site:
    """A process of a site; `name`: its name in messages."""

    site: int
    name: str
    process: subprocess.Popen[bytes]
    log: Path | None


@dataclass(frozen=True)
class _Command:
    """The command that every site runs, and the launcher's messages about it."""

    words: Sequence[str]
    on_stop: str = "stopping the sites"
    checkpoints: Path | None = None
    """The folder of the job's checkpoints."""
    unsaved: str = ""

    def on_failure(self) -> str:
        """The end of the message about a failed job: whether there may be a checkpoint."""
        if self.checkpoints is None or not any(self.checkpoints.glob("step-*")):
            return ""
        return " The last whole checkpoint, if any, is intact (--resume)."


def cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def process_environment(
    process: int, processes: int, rendezvous: str, base: Mapping[str, str]
) -> dict[str, str]:
    """The environment of one process: torchrun's names for its rank, and our rendezvous."""
    env = dict(base)
    env.update(
        RANK=str(process),
        LOCAL_RANK=str(process),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
    )
    env[RENDEZVOUS] = rendezvous
    # The running package, not another one in the current folder (such as a source tree).
    home = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(p for p in (home, base.get("PYTHONPATH")) if p)
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    if sys.platform == "linux":
        # All sites are on this machine: the loopback interface is enough.
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return env


def _link_environment(
    env: dict[str, str], link: Link | None, network: Network | None
) -> dict[str, str]:
    """The environment of a site with a link; `network` None = all delays are counted."""
    env.pop(LINK, None)
    if link is not None:
        env[LINK] = link_variable(link, "counted" if network is None else network.mode)
    if network is not None:
        # gloo opens a set of connections per entry; here all use the only interface.
        count = len(env.get("GLOO_SOCKET_IFNAME", "").split(","))
        env["GLOO_SOCKET_IFNAME"] = ",".join([INTERFACE] * count)
    return env


@dataclass
class _Start:
    """Starts a site's process, for the first time or again."""

    command: _Command
    num_sites: int
    ranks_per_site: int
    log_dir: Path | None
    link: Link | None
    network: Network | None
    rendezvous: str
    alive: int
    """The read end of a pipe that is closed when the launcher ends."""
    more: Mapping[str, str]
    """Variables besides those of every site."""

    def process(self, number: int) -> _Site:
        """Starts process `number` of all."""
        processes = self.num_sites * self.ranks_per_site
        site, rank = divmod(number, self.ranks_per_site)
        name = f"site {site}, rank {rank}" if self.ranks_per_site > 1 else f"site {site}"
        env = process_environment(number, processes, self.rendezvous, os.environ)
        env = _link_environment(env, self.link, self.network)
        env |= {LAUNCHER_FD: str(self.alive), **self.more}
        # The first process writes to the user, the others to their log files.
        file = f"{name.replace(', ', '-').replace(' ', '-')}.log"
        log = None if number == 0 or self.log_dir is None else self.log_dir / file
        output = None if log is None else _open_log(log)
        prefix = [] if self.network is None else self.network.prefix(site)
        passed = [self.alive]
        if CONSOLE_FD in env:
            passed.append(int(env[CONSOLE_FD]))
        try:
            process = subprocess.Popen(
                [*prefix, *self.command.words],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if log is None else subprocess.STDOUT,
                pass_fds=passed,
                process_group=0,  # a terminal's Ctrl+C reaches the launcher alone
            )
        finally:
            if output is not None:
                output.close()
        return _Site(site, name, process, log)


def _open_log(path: Path) -> IO[bytes]:
    """A site's log file; /dev/null if it cannot be opened, so that a full disk stops no site."""
    try:
        return path.open("ab")
    except OSError as error:
        _say(f"could not write {path}, the site runs without a log: {error.strerror}")
        return open(os.devnull, "wb")


def _start(start: _Start) -> list[_Site]:
    """Starts all processes."""
    sites: list[_Site] = []
    try:
        if start.log_dir is not None:
            start.log_dir.mkdir(parents=True, exist_ok=True)
        for number in range(start.num_sites * start.ranks_per_site):
            sites.append(start.process(number))
    except BaseException:
        _kill(sites)
        raise
    return sites


def _kill(sites: Sequence[_Site]) -> None:
    for site in sites:
        if site.process.poll() is None:
            site.process.kill()
    for site in sites:
        site.process.wait()


def _describe(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _blame(failed: Sequence[_Site]) -> _Site:
    """The site to report: one that was killed, else one with an error of its own, not one that only
    lost another site."""

    def order(site: _Site) -> tuple[bool, bool, int]:
        code = site.process.returncode
        return code >= 0, code == EXIT_PEER_LOST, site.site

    return min(failed, key=order)


def _say(message: str) -> None:
    _log.warning("fomoe: %s", message)


def _report_failure(culprit: _Site, on_failure: str) -> None:
    _say(
        f"{culprit.name} {_describe(culprit.process.returncode)}; the other sites were ended."
        f"{on_failure}"
    )
    if culprit.log is not None and culprit.log.exists():
        tail = culprit.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        if tail:
            _say(f"last lines of {culprit.log}:")
            _log.warning("%s", "\n".join("  " + line for line in tail))


@contextmanager
def _counted_signals() -> Iterator[list[int]]:
    """Collects signals that ask to stop in a list, in place of their default action."""
    received: list[int] = []

    def note(number: int) -> None:
        if not received or signals.asks_again(number):
            received.append(number)

    previous = signals.listen(note)
    try:
        yield received
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)


def _note_reader(received: list[int]) -> None:
    """Treats a reader who has left as a signal that asks to stop."""
    if not received and has_left(sys.stdout):
        received.append(signal.SIGPIPE)


def _say_stopping(command: _Command, received: Sequence[int]) -> None:
    why = "nobody reads the output any more, " if received[0] == signal.SIGPIPE else ""
    _say(f"{why}{command.on_stop} (once more to stop at once)")


def _watch(sites: Sequence[_Site], received: list[int], command: _Command) -> int:
    """Waits for all sites; forwards the first signal, kills all at the second or if one fails."""
    forwarded = False
    while True:
        _note_reader(received)
        codes = [site.process.poll() for site in sites]
        if len(received) > 1:
            _kill(sites)
            _say(f"stopped at once{command.unsaved}")
            return EXIT_STOPPED
        if received and not forwarded:
            forwarded = True
            _say_stopping(command, received)
            for site in sites:
                if site.process.poll() is None:
                    site.process.terminate()
        well = (None, 0, EXIT_STOPPED, EXIT_UNWRITTEN)
        failed = [s for s, code in zip(sites, codes, strict=True) if code not in well]
        if failed:
            time.sleep(2 * _POLL_S)  # others may have failed too; `_blame` needs all of them
            for site in sites:
                site.process.poll()
            ended = [s for s in sites if s.process.returncode not in well]
            culprit = _blame(ended)
            _kill(sites)
            if forwarded and culprit.process.returncode == -signal.SIGTERM:
                _say(f"stopped before the sites had begun{command.unsaved}")
                return EXIT_STOPPED
            _report_failure(culprit, command.on_failure())
            code = culprit.process.returncode
            return code if code > 0 else 128 - code
        if all(code is not None for code in codes):
            return next((c for c in (EXIT_UNWRITTEN, EXIT_STOPPED) if c in codes), 0)
        time.sleep(_POLL_S)


def _network(link: Link | None, num_sites: int) -> Network | None:
    """The network that shapes the link; None without a link, or if it must be counted."""
    if link is None:
        return None
    mode = wanted_mode()
    if mode == "counted":
        return None
    try:
        return Network(link, num_sites)
    except NamespaceError as error:
        if mode == "kernel":
            raise
        _say(f"link {describe(link)}: delays are counted, the kernel cannot shape it here: {error}")
        return None


def _run(
    command: _Command,
    num_sites: int,
    log_dir: Path | None,
    link: Link | None,
    ranks_per_site: int,
    keeper: Keeper | None = None,
) -> int:
    for what, count in (("num_sites", num_sites), ("ranks_per_site", ranks_per_site)):
        if count < 1:
            raise ValueError(f"{what} must be >= 1, got {count}")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fomoe-"))
        received = stack.enter_context(_counted_signals())
        network = _network(link, num_sites)
        if network is not None:
            stack.callback(network.close)
        read_end, write_end = os.pipe()
        stack.callback(os.close, read_end)
        stack.callback(os.close, write_end)
        more: Mapping[str, str] = {}
        if keeper is not None:
            stack.enter_context(keeper)
            console = os.dup(sys.stdout.fileno())  # descriptor 1 of a site is its log
            stack.callback(os.close, console)
            more = {CONSOLE_FD: str(console), **keeper.environment}
        rendezvous = f"file://{folder}/store"
        start = _Start(
            command, num_sites, ranks_per_site, log_dir, link, network, rendezvous, read_end, more
        )
        sites = _start(start)
        try:
            if keeper is not None:
                code = _watch_tolerant(sites, received, start, keeper)
            else:
                code = _watch(sites, received, command)
            unread = code == EXIT_STOPPED and received[:1] == [signal.SIGPIPE]
            return EXIT_UNREAD if unread else code
        finally:
            _kill(sites)


def _watch_tolerant(sites: list[_Site], received: list[int], start: _Start, keeper: Keeper) -> int:
    """Waits for all sites of a job that continues when sites are lost; restarts lost ones.

    Returns the exit code of a site that reached the end of the job, else that of the last site.
    """
    forwarded, ended_at = False, None
    restarts = dict.fromkeys((site.site for site in sites), keeper.restarts)
    last = 0
    while True:
        _note_reader(received)
        if len(received) > 1:
            _kill(sites)
            _say(f"stopped at once{start.command.unsaved}")
            return EXIT_STOPPED
        running = [site for site in sites if site.process.poll() is None]
        if received and not forwarded:
            forwarded = True
            _say_stopping(start.command, received)
            for site in running:
                site.process.terminate()
        for site in [s for s in sites if s not in running]:
            sites.remove(site)
            code = site.process.returncode
            if code in (0, EXIT_STOPPED, EXIT_UNWRITTEN):
                if ended_at is None or code == EXIT_UNWRITTEN:
                    last = code
                ended_at = ended_at or time.monotonic()
                continue
            keeper.dead(site.site)
            again = restarts[site.site] > 0 and ended_at is None and not forwarded
            _say(f"{site.name} {_describe(code)}{'; it is restarted' if again else ''}")
            last = last if ended_at else code if code > 0 else 128 - code
            if again:
                restarts[site.site] -= 1
                sites.append(start.process(site.site))
        if not sites:
            if ended_at is None:
                _say(f"no site is left.{start.command.on_failure()}")
            return last
        if ended_at is not None and time.monotonic() > ended_at + keeper.patience_s:
            return last  # the remaining sites hang, or have missed the end of the job
        time.sleep(_POLL_S)


def launch(
    arguments: Sequence[str],
    num_sites: int,
    log_dir: Path,
    link: Link | None = None,
    ranks_per_site: int = 1,
    *,
    checkpoints: Path | None = None,
    keeper: Keeper | None = None,
) -> int:
    """Runs `python -m fomoe_ext.train ARGUMENTS` as `num_sites` sites; returns the exit code.

    Output: the first process writes to this one's stdout, the others to `log_dir`/site-N.log, or
    site-N-rank-R.log if a site has several ranks.

    Signals: SIGINT, SIGTERM, SIGHUP or SIGQUIT is forwarded as SIGTERM; the sites write a
    checkpoint and the exit code is 130. The same happens if stdout is a pipe whose reader has left;
    the exit code is then 141. A second signal other than SIGHUP kills the sites.

    Failures: if a site dies, the others are killed, a message names it, and its exit code (128 +
    signal) is returned. With a `keeper`, which is entered and left here, the others continue and
    lost ones are restarted. `checkpoints`: the folder of the job's checkpoints; the message about a
    failed job mentions them if there are any.

    Link: with a `link` every site has that bandwidth and latency to the others. The kernel shapes
    it in private network namespaces. If that is not allowed, or FOMOE_LINK_MODE is "counted", the
    sites count the delays (`fomoe_ext.launch.link.active_link`).

    Raises ValueError for numbers < 1, and OSError if FOMOE_LINK_MODE is "kernel" and the kernel
    cannot shape the link. Must be called in the main thread.
    """
    command = _Command(
        [sys.executable, "-P", "-m", "fomoe_ext.train", *arguments],
        on_stop="stopping: the sites write a checkpoint",
        checkpoints=checkpoints,
        unsaved=", without a new checkpoint",
    )
    return _run(command, num_sites, log_dir, link, ranks_per_site, keeper)


def run_sites(
    words: Sequence[str],
    num_sites: int,
    log_dir: Path | None = None,
    link: Link | None = None,
    ranks_per_site: int = 1,
) -> int:
    """Runs any command once per rank of each site, as `launch` runs the training job.

    Returns the exit code. The processes have the environment of sites. Without `log_dir` all write
    to this one's stdout. If the machine has `setpriv`, they are killed when this process is killed.
    Raises what `launch` does, and OSError for a command that cannot be started.
    """
    # Our training processes watch LAUNCHER_FD; another program does not.
    setpriv = shutil.which("setpriv")
    guard = [] if setpriv is None else [setpriv, "--pdeathsig", "KILL", "--"]
    return _run(_Command([*guard, *words]), num_sites, log_dir, link, ranks_per_site)
