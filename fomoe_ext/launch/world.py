"""A process of a job: its site and rank, threads, device, signals and errors.

It is started by `fomoe train` (`fomoe_ext.launch.processes`) or by torchrun. Both set the same
environment variables; RANK is site * ranks_per_site + rank. Without these variables the job is this
one process.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from fomoe_ext.config.addresses import Address, require_listener, why_no_host, why_no_port
from fomoe_ext.launch import signals
from fomoe_ext.launch.processes import EXIT_PEER_LOST, LAUNCHER_FD, RENDEZVOUS, cores
from fomoe_ext.launch.waiting import GivenUp, reason_of

_log = logging.getLogger(__name__)

_PROCESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_PATIENCE_S = 15.0
VERBS = ("route", "compact", "expand", "contract", "combine")


class PeerLost(RuntimeError):
    """Another site was lost or did not answer in time."""


@dataclass(frozen=True)
class World:
    """The site, rank and local process number of this process, and how many of each there are."""

    site: int = 0
    num_sites: int = 1
    local_process: int = 0
    local_processes: int = 1
    rank: int = 0
    ranks: int = 1
    members: tuple[int, ...] = ()
    """In jobs that continue when sites are lost: the permanent numbers of the present sites,
    ascending."""

    @property
    def number(self) -> int:
        """The permanent number of this site, which does not change when others are lost."""
        return self.members[self.site] if self.members else self.site

    def of_members(self, members: tuple[int, ...]) -> World:
        """The world with other members. Raises ValueError if this site is not among them."""
        if self.number not in members:
            raise ValueError(f"members must contain site {self.number}, got {members}")
        place = members.index(self.number)
        return replace(self, site=place, num_sites=len(members), members=members)

    @property
    def process(self) -> int:
        """This process's rank in torch.distributed's default group."""
        return self.site * self.ranks + self.rank

    @property
    def processes(self) -> int:
        """All processes of the job."""
        return self.num_sites * self.ranks

    @property
    def leads_machine(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.local_process == 0


def find_world(
    num_sites: int, environment: Mapping[str, str] = os.environ, ranks_per_site: int = 1
) -> World:
    """The world that the launcher or torchrun describes by environment variables.

    With torchrun a site consists of `ranks_per_site` consecutive processes; if every machine is one
    site, --node-rank is the site. Raises ValueError unless there are num_sites * ranks_per_site
    processes.
    """
    wanted = num_sites * ranks_per_site
    words = f"sites is {num_sites}"
    if ranks_per_site > 1:
        words += f" of ranks_per_site = {ranks_per_site}"
    found = _process_numbers(environment)
    require_interfaces(environment)
    if found is None:
        if wanted == 1:
            return World()
        raise ValueError(
            f"this is one process and {words}: start with `fomoe train --sites "
            f"{num_sites}`, or with torchrun and {wanted} processes"
        )
    process, processes, *local = found
    if processes != wanted:
        raise ValueError(
            f"{words}, but there are {processes} processes: start {wanted} (torchrun --nnodes, "
            "--nproc-per-node), or give --sites or --ranks-per-site; all sites have as many ranks"
        )
    site, rank = divmod(process, ranks_per_site)
    return World(site, num_sites, *local, rank, ranks_per_site)


def _process_numbers(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """The values of torchrun's variables; None if no variable is set.

    Raises ValueError for values that cannot describe a process of a job.
    """
    missing = [name for name in _PROCESS if name not in environment]
    if len(missing) == len(_PROCESS):
        return None
    given = ", ".join(f"{name}={environment[name]}" for name in _PROCESS if name in environment)
    if missing:
        raise ValueError(
            f"{', '.join(_PROCESS)} must all be set, as torchrun does, got {given} without "
            f"{' and '.join(missing)}"
        )
    for name in _PROCESS:
        text = environment[name]
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise ValueError(f"{name} must be a whole number >= 0, got {text!r}")
    process, processes, local, locals_ = numbers = tuple(int(environment[n]) for n in _PROCESS)
    wrong = ""
    if process >= processes:
        wrong = "RANK must be less than WORLD_SIZE"
    elif local >= locals_:
        wrong = "LOCAL_RANK must be less than LOCAL_WORLD_SIZE"
    elif locals_ > processes:
        wrong = "LOCAL_WORLD_SIZE must be at most WORLD_SIZE"
    elif local > process:
        wrong = "LOCAL_RANK must be at most RANK"
    if wrong:
        raise ValueError(f"{wrong}, got {given}")
    return numbers


def require_interfaces(environment: Mapping[str, str] = os.environ) -> None:
    """Raises ValueError if GLOO_SOCKET_IFNAME names an interface that this machine lacks."""
    wanted = environment.get("GLOO_SOCKET_IFNAME", "")
    there = [name for _, name in socket.if_nameindex()]
    if unknown := [name for name in filter(None, wanted.split(",")) if name not in there]:
        raise ValueError(
            f"GLOO_SOCKET_IFNAME must name network interfaces of this machine, "
            f"{', '.join(there)}, got {', '.join(unknown)}"
        )


def meeting_point(environment: Mapping[str, str] = os.environ) -> Address:
    """MASTER_ADDR and MASTER_PORT, where processes that torchrun has started meet.

    Raises ValueError if they are not set or are no address.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} must be set to the address of the process with RANK=0; "
            "torchrun sets them from --master-addr and --master-port, or --rdzv-endpoint"
        )
    host, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    if wrong := why_no_host(host):
        raise ValueError(f"MASTER_ADDR must be a host name or an IP address, got {host!r}: {wrong}")
    if wrong := why_no_port(port):
        raise ValueError(f"MASTER_PORT must be a port, got {port!r}: {wrong}")
    return Address(host, int(port))


def use_threads(threads: int, world: World) -> None:
    """Sets torch's threads; 0 = an equal share of this machine's cores."""
    torch.set_num_threads(threads or max(1, cores() // world.local_processes))


def choose_device(wanted: str, world: World) -> torch.device:
    """The device of a process. `wanted`: "cpu", "cuda", or "auto" = cuda if there is a GPU and the
    build has CUDA kernels.

    Raises ValueError for "cuda" without a GPU or without kernels.
    """
    from fomoe_ext import ops  # noqa: F401  loads the kernels

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [verb for verb in VERBS if not has(f"fomoe::{verb}", "CUDA")]
    if wanted == "cpu" or (wanted == "auto" and (missing or not torch.cuda.is_available())):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no GPU")
    if missing:
        raise ValueError(f"device is cuda, but there are no CUDA kernels for {', '.join(missing)}")
    return torch.device("cuda", world.local_process % torch.cuda.device_count())


def end_with_launcher() -> None:
    """Ends this process when its launcher, if it has one, has ended.

    The launcher's end closes the pipe that this process watches.
    """
    if LAUNCHER_FD not in os.environ:
        return
    descriptor = int(os.environ[LAUNCHER_FD])

    def wait() -> None:
        os.read(descriptor, 1)  # returns at the end of the file: nobody writes
        os._exit(EXIT_PEER_LOST)

    threading.Thread(target=wait, name="launcher-watch", daemon=True).start()


@contextmanager
def joined(world: World, timeout_s: float, device: str = "cpu") -> Iterator[None]:
    """Inside, torch.distributed's default group holds all processes; a single process has no group.

    `device`: the device type on which the ranks of a site exchange rows and dense parameters.
    """
    end_with_launcher()
    if world.processes == 1:
        yield
        return
    inside = world.ranks > 1 and device == "cuda"
    if RENDEZVOUS not in os.environ:
        _find_others(world, timeout_s)
    with with_others("joining the other sites", world.site), _telling(world, timeout_s):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if inside else "gloo",
            init_method=os.environ.get(RENDEZVOUS, "env://"),
            rank=world.process,
            world_size=world.processes,
            timeout=timedelta(seconds=timeout_s),
        )
    yield
    with with_others("leaving the other sites", world.site):
        dist.barrier()
    dist.destroy_process_group()


def _find_others(world: World, timeout_s: float) -> None:
    """Waits until process 0, at which all meet, accepts connections."""
    address = meeting_point()
    if world.process == 0:
        return
    hint = "is the process with RANK=0 running there, and can this machine reach it?"
    say = partial(_log.warning, "fomoe train, site %d: %s", world.site)
    require_listener(address, "MASTER_ADDR:MASTER_PORT", timeout_s, hint, say)


@contextmanager
def _telling(world: World, timeout_s: float) -> Iterator[None]:
    """Logs that the other processes have not come, if that takes long."""
    text = "fomoe train, site %d: waits for the other processes of %d, for up to %g s"
    told = [text, world.site, world.processes, timeout_s]
    timer = threading.Timer(_PATIENCE_S, _log.warning, told)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def with_others(what: str, site: int) -> Iterator[None]:
    """Turns the error of a collective inside into PeerLost; `what` names the operation."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, PeerLost) or not is_peer_error(error):
            raise
        raise PeerLost(f"{what}: site {site} lost another site ({reason_of(error)})") from error


def is_peer_error(error: BaseException) -> bool:
    """Whether an error means that a collective failed because another process is gone."""
    if isinstance(error, dist.DistError | GivenUp):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("gloo", "connection", "timed out", "nccl"))


class StopRequest:
    """Whether a signal has asked this process to stop.

    A second signal other than SIGHUP has its default action, which ends the process.
    """

    def __init__(self) -> None:
        self.asked = False

    def install(self) -> None:
        """Installs the signal handlers; only in the main thread."""
        signals.listen(self._note)

    def _note(self, number: int) -> None:
        self.asked = True
        if signals.asks_again(number):
            signal.signal(number, signal.SIG_DFL)


def end_now(code: int) -> None:
    """Ends the process at once; a clean exit could wait for connections to lost processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
