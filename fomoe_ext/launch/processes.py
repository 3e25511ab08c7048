"""Local launch: all processes of all sites on this machine, watched until all have ended.

Each is `python -m fomoe_ext.train`, just as torchrun would start it. The launcher passes
signals on, ends all sites when one dies, and leaves no process behind. With a slow link between
them the sites run in network namespaces of their own where that is allowed. Needs no torch.
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
"""Exit code of a job that was asked to stop (as a shell reports SIGINT)."""
EXIT_PEER_LOST = 75
"""Exit code of a site that failed only because another one went away (EX_TEMPFAIL)."""

RENDEZVOUS = "FOMOE_RENDEZVOUS"
LAUNCHER_FD = "FOMOE_LAUNCHER_FD"
CONSOLE_FD = "FOMOE_CONSOLE_FD"
"""Where a site speaks to the user that was not the first when the job began."""

_POLL_S = 0.05
_LOG_LINES = 15


class Keeper(AbstractContextManager[Any], Protocol):
    """Who keeps up a job that outlives its sites, while they run."""

    restarts: int
    """How often each lost site is started again."""
    patience_s: float
    """How long sites that are left have, once the first has come to the job's end."""
    environment: Mapping[str, str]
    """Variables for every site; once it is entered."""

    def dead(self, site: int) -> None:
        """A site's process has ended."""
        ...


@dataclass
class _Site:
    """A process of a site; `name` as messages call it."""

    site: int
    name: str
    process: subprocess.Popen[bytes]
    log: Path | None


@dataclass(frozen=True)
class _Command:
    """What every site runs, and what the launcher says about it."""

    words: Sequence[str]
    on_stop: str = "stopping the sites"
    checkpoints: Path | None = None
    """The folder of the job's checkpoints."""
    unsaved: str = ""

    def on_failure(self) -> str:
        """What is left when the job has failed."""
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
    # The package that is running, not whatever lies in the current folder (a source tree, say).
    home = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(p for p in (home, base.get("PYTHONPATH")) if p)
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    if sys.platform == "linux":
        # All sites are here: do not depend on this machine's name or outer interfaces.
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return env


def _link_environment(
    env: dict[str, str], link: Link | None, network: Network | None
) -> dict[str, str]:
    """The environment of a site on a link; `network` None = all delays are counted."""
    env.pop(LINK, None)
    if link is not None:
        env[LINK] = link_variable(link, "counted" if network is None else network.mode)
    if network is not None:
        # Each entry is a set of connections; there is one interface here, whatever its name was.
        count = len(env.get("GLOO_SOCKET_IFNAME", "").split(","))
        env["GLOO_SOCKET_IFNAME"] = ",".join([INTERFACE] * count)
    return env


@dataclass
class _Start:
    """All that it takes to start a site's process, once or again."""

    command: _Command
    num_sites: int
    ranks_per_site: int
    log_dir: Path | None
    link: Link | None
    network: Network | None
    rendezvous: str
    alive: int
    """The end of a pipe that tells the processes that the launcher lives."""
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
        # The first speaks to the user; the others to their log files.
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
    """A site's log, or nothing in its place: a full disk is no reason not to start a site."""
    try:
        return path.open("ab")
    except OSError as error:
        _say(f"could not write {path}, the site goes on without: {error.strerror}")
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
    """The site that failed first: one that was killed, else one that did not just lose a peer."""

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
    """Collect signals that ask to stop in a list instead of dying of them."""
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
    """Counts a reader who has left as a signal that asks to stop."""
    if not received and has_left(sys.stdout):
        received.append(signal.SIGPIPE)


def _say_stopping(command: _Command, received: Sequence[int]) -> None:
    why = "nobody reads the output any more, " if received[0] == signal.SIGPIPE else ""
    _say(f"{why}{command.on_stop} (once more to stop at once)")


def _watch(sites: Sequence[_Site], received: list[int], command: _Command) -> int:
    """Wait for all sites; pass on the first signal, end all at the second or when one fails."""
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
            time.sleep(2 * _POLL_S)  # let a second failure show, to blame the right one
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
    """The network that shapes the link, or None where there is no link or it must be counted."""
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
            console = os.dup(sys.stdout.fileno())  # under its own number a site's is another one
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
    """Waits for all sites of a job that outlives them; starts lost ones again where it is wanted.

    Returns 0 when one has come to the end of the job, and what the last one returned when none has.
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
            _say(f"{site.name} {_describe(code)}{'; it is started again' if again else ''}")
            last = last if ended_at else code if code > 0 else 128 - code
            if again:
                restarts[site.site] -= 1
                sites.append(start.process(site.site))
        if not sites:
            if ended_at is None:
                _say(f"no site is left.{start.command.on_failure()}")
            return last
        if ended_at is not None and time.monotonic() > ended_at + keeper.patience_s:
            return last  # who is left hangs, or knows nothing of the end
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
    """Run `python -m fomoe_ext.train` with `arguments` as `num_sites` sites; returns the exit code.

    The first process writes to this one's stdout, the others to `log_dir`/site-N.log or, where a
    site has several ranks, site-N-rank-R.log. SIGINT, SIGTERM, SIGHUP
    or SIGQUIT is passed on as SIGTERM (the sites write a checkpoint; the code is 130), a second one
    but SIGHUP kills the sites. If one
    dies the others are killed, a message names it, and its exit code (128 + signal) is returned;
    with a `keeper`, which is entered and left here, the others go on, and lost ones are started
    again. `checkpoints` is the folder of the job's checkpoints: where there are any when the job
    has failed, the message says so.
    With a `link` every site has one of that bandwidth and latency to the others: shaped by the
    kernel in private network namespaces, or counted by the sites where that is not allowed or
    FOMOE_LINK_MODE is "counted" (`fomoe_ext.launch.link.active_link` tells a site which). Raises
    ValueError for numbers < 1, OSError where FOMOE_LINK_MODE is "kernel" and it cannot shape.
    Must be called in the main thread.
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
    """Run any command once per rank of each site, as `launch` runs the training job.

    Returns the exit code. The processes have the environment of sites. Without `log_dir` all write
    to this one's stdout. They are killed when this process is, where the machine has `setpriv`.
    Raises what `launch` does, and OSError for a command that cannot be started.
    """
    # A site of ours watches LAUNCHER_FD, but this may be any program.
    setpriv = shutil.which("setpriv")
    guard = [] if setpriv is None else [setpriv, "--pdeathsig", "KILL", "--"]
    return _run(_Command([*guard, *words]), num_sites, log_dir, link, ranks_per_site)
