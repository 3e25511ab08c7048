"""Network namespaces for the sites, with links that the kernel shapes. Linux only.

    site 0: uplink --- site0 \\
                              bridge `switch`, in a namespace without sites
    site 1: uplink --- site1 /

Both ends of a veth pair are shaped where packets enter it: `uplink` shapes what a site sends, the
other end what it receives. Nothing of this is visible outside. No privileges are needed if users
may create user namespaces. The namespaces have no names: this process holds their file descriptors
and the sites enter them with `nsenter`. The kernel removes them when the last of these processes
has ended, however it ended. Needs util-linux and iproute2, but no torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from fomoe_ext.launch.link import LinkMode
from fomoe_ext.placement.wire import Link

INTERFACE = "uplink"
"""The interface of a site's link, in its namespace."""

_SWITCH = "switch"
_TIMEOUT_S = 30
# The queue is so long that no packet is dropped. TCP's own limits on queued data slow it down.
_QUEUE_BYTES = 32 << 20
_PACKET_BYTES = 1514
# Burst sizes, in seconds of the rate. A site receives from all others through one queue, in which
# flows block each other more than in routers with fair queueing. A large burst lets a flow catch
# up; the average rate is still that of the link.
_SENT_BURST_S = 0.002
_RECEIVED_BURST_S = 0.25
_LARGEST_BURST = 10**9


class NamespaceError(OSError):
    """Network namespaces cannot be created or configured here; the message has the reason."""


def _tool(name: str) -> str:
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    found = shutil.which(name, path=path)
    if found is None:
        raise NamespaceError(f"the program {name} is not installed")
    return found


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def address(site: int) -> str:
    """The IPv4 address of a site."""
    return f"10.77.{site // 250}.{site % 250 + 1}"


class _Holder:
    """A process in new namespaces. It keeps them alive until `release` or the end of this one."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [*command, "--", _tool("cat")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # a terminal's Ctrl+C is for the launcher
        )
        self.pid = self._process.pid
        try:
            self._await_start(command[0])
        except BaseException:
            self.release()
            raise

    def _await_start(self, tool: str) -> None:
        assert self._process.stdin and self._process.stdout and self._process.stderr
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
            answered = self._process.stdout.read(1) == b"\n"  # cat answers: it is inside
        except BrokenPipeError:
            answered = False
        if not answered:
            reason = _last_line(self._process.stderr.read())
            raise NamespaceError(reason or f"{os.path.basename(tool)} failed")

    def open(self, kind: str) -> int:
        """A descriptor of its namespace of a kind, which keeps that namespace alive."""
        return os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)

    def release(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


class Network:
    """A switch with `num_sites` links, which the kernel shapes in both directions.

    `mode`: "kernel" = the kernel shapes rate and latency, "rate" = only the rate, because it has no
    netem. Raises NamespaceError if it cannot be made. Close it after the sites have ended.
    """

    def __init__(self, link: Link, num_sites: int) -> None:
        self._link = link
        self._descriptors: list[int] = []
        holders: list[_Holder] = []
        try:
            self._user, switch = self._first_namespace()
            holders.append(switch)
            inside = self._enter(switch.pid)
            for _ in range(num_sites):
                holders.append(_Holder([*inside, "--", _tool("unshare"), "--net"]))
            self.mode = self._connect(switch, holders[1:])
            self._open(switch, holders[1:])
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, NamespaceError):
                raise NamespaceError(str(error)) from error
            raise
        finally:
            for holder in holders:
                holder.release()

    def _first_namespace(self) -> tuple[bool, _Holder]:
        """The switch's namespace, and whether a user namespace had to be created for it."""
        unshare = _tool("unshare")
        if os.geteuid() == 0:
            # Without a user namespace, root keeps access to files of other users.
            try:
                return False, _Holder([unshare, "--net"])
            except NamespaceError:
                pass  # root in a container may lack the capability
        return True, _Holder([unshare, "--user", "--map-root-user", "--net"])

    def _enter(self, pid: int) -> list[str]:
        """The command prefix that enters the namespaces of a process."""
        user = ["--user", "--preserve-credentials"] if self._user else []
        return [_tool("nsenter"), "--target", str(pid), *user, "--net"]

    def _batch(self, holder: _Holder, tool: str, lines: Sequence[str]) -> None:
        """Runs lines of `ip` or `tc` in a namespace. Raises NamespaceError at the first failure."""
        try:
            result = subprocess.run(
                [*self._enter(holder.pid), "--", _tool(tool), "-batch", "-"],
                input="".join(line + "\n" for line in lines).encode(),
                capture_output=True,
                timeout=_TIMEOUT_S,
                process_group=0,
            )
        except subprocess.TimeoutExpired:
            raise NamespaceError(f"{tool} did not end in {_TIMEOUT_S} s") from None
        if result.returncode:
            words = result.stderr.decode(errors="replace").strip().split("\n")
            raise NamespaceError(f"{tool}: {words[0]}")

    def _connect(self, switch: _Holder, sites: Sequence[_Holder]) -> LinkMode:
        lines = [f"link add name {_SWITCH} type bridge", f"link set dev {_SWITCH} up"]
        for i, site in enumerate(sites):
            peer = f"peer name {INTERFACE} netns {site.pid}"
            lines.append(f"link add name site{i} type veth {peer}")
            lines.append(f"link set dev site{i} master {_SWITCH} up")
        self._batch(switch, "ip", lines)
        for i, site in enumerate(sites):
            lines = [
                "link set dev lo up",
                f"address add {address(i)}/16 dev {INTERFACE}",
                f"link set dev {INTERFACE} up",
            ]
            self._batch(site, "ip", lines)
            sent = self._rate_shaper(_SENT_BURST_S)
            self._batch(site, "tc", [f"qdisc add dev {INTERFACE} root {sent}"])
        return self._shape_received(switch, len(sites))

    def _rate_shaper(self, burst_s: float) -> str:
        bandwidth = self._link.bandwidth
        burst = min(max(burst_s * bandwidth / 8, 2 * _PACKET_BYTES), _LARGEST_BURST)
        return f"tbf rate {bandwidth:.0f}bit burst {burst:.0f} limit {_QUEUE_BYTES}"

    def _shape_received(self, switch: _Holder, num_sites: int) -> LinkMode:
        """Shapes what sites receive, and delays it if the kernel has netem.

        The delay is not at the sender: there TCP counts delayed packets as queued and stops
        sending.
        """
        rate = self._rate_shaper(_RECEIVED_BURST_S)
        if self._link.latency:
            waiting = self._link.bandwidth * self._link.latency / 8 + _QUEUE_BYTES
            delay = f"netem delay {1e6 * self._link.latency:.0f}us"
            lines = []
            for i in range(num_sites):
                packets = f"limit {waiting / _PACKET_BYTES:.0f}"
                lines.append(f"qdisc add dev site{i} root handle 1: {delay} {packets}")
                lines.append(f"qdisc add dev site{i} parent 1:1 {rate}")
            try:
                self._batch(switch, "tc", lines)
                return "kernel"
            except NamespaceError:
                pass
        self._batch(
            switch, "tc", [f"qdisc replace dev site{i} root {rate}" for i in range(num_sites)]
        )
        return "rate" if self._link.latency else "kernel"

    def _open(self, switch: _Holder, sites: Sequence[_Holder]) -> None:
        """Opens descriptors of all namespaces, so that they outlive their holders."""
        self._descriptors.append(switch.open("net"))
        for site in sites:
            self._descriptors.append(site.open("net"))
        if self._user:
            self._descriptors.append(switch.open("user"))

    def prefix(self, site: int) -> list[str]:
        """The words to put before a command to run it in the namespace of `site`.

        nsenter replaces itself with the command (exec): same process, same descriptors.
        """
        mine = f"/proc/{os.getpid()}/fd"
        user = []
        if self._user:
            user = [f"--user={mine}/{self._descriptors[-1]}", "--preserve-credentials"]
        return [_tool("nsenter"), *user, f"--net={mine}/{self._descriptors[1 + site]}", "--"]

    def close(self) -> None:
        """Closes the descriptors; namespaces of processes that still run stay, without a link."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
