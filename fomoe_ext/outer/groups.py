"""Owner groups: which sites meet, their connections, and who is missing when a meeting fails.

Payloads do not use the default process group, which serves the rest of a job. Every owner group has
one connection for the reduce-scatter and another for the all-gather, so that several of both can be
under way at once in any order. An interface that is named twice in GLOO_SOCKET_IFNAME (eth0,eth0)
has two of each. That does not help on a link that one connection can fill: buckets then overtake
each other, and the one needed first arrives later.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe_ext.config.outer import OuterConfig
from fomoe_ext.launch.link import CountedLink, active_link
from fomoe_ext.launch.waiting import wait_for
from fomoe_ext.placement import wire
from fomoe_ext.placement.placement import Owners

_THREADS = 16
"""Number of exchanges of one kind that a group runs at once; a slow link needs several."""
_PROBE_S = 5.0
"""Seconds that the other sites have, after a failure, to notice it and to answer."""

# Number of SiteGroups made with a default group: equal at all sites, part of connections' names.
_made: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


class Handle(Protocol):
    """An exchange under way."""

    def wait(self) -> None:
        """Returns when it is complete; RuntimeError when it failed."""
        ...


class _Exchange:
    """A collective under way. On an imitated link it completes no earlier than `sent` bytes would
    need there."""

    def __init__(self, work: Any, link: CountedLink | None, sent: int) -> None:
        self._work, self._link = work, link
        self._until = link.send(sent) if link is not None else 0.0
        self._ended: list[float] = []
        """When the work ended, which may be long before anyone waits for it."""
        if link is not None and not link.rate:
            ended, clock = self._ended, link.clock
            work.get_future().add_done_callback(lambda _: ended.append(clock()))

    def wait(self) -> None:
        wait_for(self._work)
        if self._link is not None:
            at = self._ended[0] if self._ended else None
            self._link.wait(self._link.ended(self._until, at))


class SiteGroup:
    """The sites of one owner set and their connections; none for a single site."""

    def __init__(
        self, owners: Owners, site: int, channels: Sequence[Any], link: CountedLink | None
    ) -> None:
        self.owners, self.size = owners, len(owners)
        self.rank = owners.index(site)
        """This site's index among the owners."""
        self._scatter, self._gather = channels or (None, None)
        self._link = link
        on_gpu = bool(channels) and not isinstance(self._scatter, dist.ProcessGroupGloo)
        self.device = torch.device("cuda" if on_gpu else "cpu")
        """The device on which payloads must be."""

    def release(self) -> list[Any]:
        """Gives away the connections; the group cannot exchange anything any more."""
        channels = [self._scatter, self._gather]
        self._scatter = self._gather = None
        return channels

    def _under_way(self, work: Any, sent: int) -> Handle:
        return _Exchange(work, self._link, sent)

    def scatter(self, received: Tensor, sent: Tensor) -> tuple[Handle, int]:
        """Sends row i of `sent` [size - 1, n] to the i-th other member; row i of `received` comes
        from it.

        Does not wait. Returns the exchange and the bytes that this site sends.
        """
        each = sent.numel() // (self.size - 1)
        split = [each] * self.size
        split[self.rank] = 0
        work = self._scatter.alltoall_base(received.view(-1), sent.view(-1), split, split)
        return self._under_way(work, sent.nbytes), sent.nbytes

    def send_to_each(
        self, received: Tensor, sent: Tensor, received_by: Sequence[int], sent_by: Sequence[int]
    ) -> int:
        """Sends sent_by[r] elements of `sent` to member r and receives received_by[r]; waits.

        Returns the bytes sent.
        """
        if self.size > 1:
            work = self._scatter.alltoall_base(received, sent, list(received_by), list(sent_by))
            self._under_way(work, sent.nbytes).wait()
        return sent.nbytes

    def gather(self, gathered: Tensor, own: Tensor) -> tuple[Handle, int]:
        """Gathers `own` [n] of all members in rank order into `gathered` [size * n]; returns as
        `scatter`."""
        sent = (self.size - 1) * own.nbytes
        return self._under_way(self._gather._allgather_base(gathered.view(-1), own), sent), sent

    def gather_now(self, own: Tensor) -> tuple[Tensor, int]:
        """Gathers `own` [n] of all members; waits. Returns them [size, n], on the CPU, and the
        bytes sent."""
        own = own.contiguous()
        if self.size == 1:
            return own.cpu().unsqueeze(0), 0
        sent = own.to(self.device)
        gathered = sent.new_empty(self.size, own.numel())
        handle, count = self.gather(gathered, sent)
        handle.wait()
        return gathered.cpu(), count

    def broadcast(self, tensor: Tensor, rank: int) -> int:
        """Overwrites `tensor` with that of member `rank`; returns the bytes this site sends."""
        if self.size == 1:
            return 0
        here = tensor.to(self.device).contiguous()
        options = dist.distributed_c10d.BroadcastOptions()
        options.rootRank, options.rootTensor = rank, 0
        sent = (self.size - 1) * here.nbytes if rank == self.rank else 0
        self._under_way(self._gather.broadcast([here], options), sent).wait()
        tensor.copy_(here)
        return sent


class SiteGroups:
    """The owner groups of one site, connected once per owner set.

    Site numbers are ranks of torch.distributed's default group, which must be initialised when
    there is more than one site. `link`: a slow link to imitate, where the launcher has not made one
    (`fomoe_ext.launch.link`). With `ranks` processes per site, process `rank` of a site is rank
    site * ranks + rank of the default group, and its groups are of the processes `rank` of the
    sites. Raises ValueError for a wrong site or rank, RuntimeError when the default group is
    missing or of another size or rank.
    """

    def __init__(
        self,
        num_sites: int,
        site: int,
        timeout_s: float = OuterConfig.timeout_s,
        *,
        link: wire.Link | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if num_sites < 1:
            raise ValueError(f"num_sites must be >= 1, got {num_sites}")
        if not 0 <= site < num_sites:
            raise ValueError(f"site must be in [0, {num_sites}), got {site}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be > 0, got {timeout_s}")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be in [0, ranks = {ranks}), got {rank}")
        self.num_sites, self.site, self.rank, self.ranks = num_sites, site, rank, ranks
        self.timeout_s = timeout_s
        """Seconds after which an exchange fails."""
        self._timeout = timedelta(seconds=timeout_s)
        self._groups: dict[Owners, SiteGroup | None] = {}
        self.link, self.link_words = active_link(link=link, ranks=ranks)
        self._gloo, self._probe, self._control = True, None, None
        self._bytes: dict[int, Tensor] = {}
        self._heard: dict[int, Any] = {}
        if num_sites == 1:
            self.create([self.everyone])
            return
        if not dist.is_initialized():
            raise RuntimeError(
                f"torch.distributed must be initialised before {num_sites} sites can meet "
                "(torch.distributed.init_process_group)"
            )
        found = dist.get_rank(), dist.get_world_size()
        process, processes = site * ranks + rank, num_sites * ranks
        if found != (process, processes):
            who = f"site {site} of {num_sites}"
            if ranks > 1:
                who = f"rank {rank} of {ranks} of {who}, which must have as many ranks each,"
            raise RuntimeError(
                f"{who} must be rank {process} of {processes} processes in torch.distributed, this "
                f"is rank {found[0]} of {found[1]}"
            )
        self._gloo = "gloo" in dist.get_backend()
        world = dist.group.WORLD
        _made[world] = _made.get(world, 0) + 1
        self._name = f"fomoe/{_made[world]}"
        self.create([self.everyone])
        probe, self._control = (
            self._connect(self.everyone, name, 1) for name in ("probe", "control")
        )
        self._probe = probe if self._gloo else None
        if self._probe is not None:
            self._listen()

    @property
    def everyone(self) -> Owners:
        """The set of all sites."""
        return tuple(range(self.num_sites))

    def _connect(self, owners: Owners, purpose: str, threads: int) -> Any:
        """A process group of the owners. With Gloo only they must call it, otherwise all sites."""
        if not self._gloo:
            groups = [
                dist.new_group([s * self.ranks + r for s in owners], timeout=self._timeout)
                for r in range(self.ranks)
            ]
            return groups[self.rank]
        gloo = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout, options._threads = self._timeout, threads
        names = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
        options._devices = [
            gloo.create_device(interface=name) if name else gloo.create_default_device()
            for name in names
        ]
        who = "-".join(map(str, owners))
        store = dist.PrefixStore(
            f"{self._name}/{self.rank}/{who}/{purpose}", dist.distributed_c10d._get_default_store()
        )
        return gloo(store, owners.index(self.site), len(owners), options)

    def create(self, owner_sets: Iterable[Owners]) -> None:
        """Connects the groups that do not exist yet; a collective with the same sets at all sites.

        In ascending order of the sets, so that sites in several groups cannot deadlock.
        """
        for owners in sorted(set(owner_sets) - self._groups.keys()):
            mine = self.site in owners
            channels = []
            if len(owners) > 1 and (mine or not self._gloo):
                channels = [
                    self._connect(owners, purpose, _THREADS) for purpose in ("scatter", "gather")
                ]
            self._groups[owners] = (
                SiteGroup(owners, self.site, channels, self.link) if mine else None
            )

    def close(self, wait: bool = True) -> None:
        """Frees all connections, which cannot be used any more; no collective. May be called twice.

        `wait`: until exchanges under way have ended, at most `timeout_s`; otherwise a thread waits.
        """
        channels = [self._probe, self._control]
        for group in self._groups.values():
            if group is not None:
                channels += group.release()
        self._groups.clear()
        self._heard.clear()
        self._bytes.clear()
        self._probe = self._control = None
        if wait:
            _free(channels)
        else:
            threading.Thread(target=_free, args=(channels,), daemon=True).start()

    def group(self, owners: Owners) -> SiteGroup:
        """The group of an owner set. Raises KeyError if it was not created or the site is not in
        it."""
        group = self._groups.get(owners)
        if group is None:
            raise KeyError(f"site {self.site} has no group of the sites {owners}")
        return group

    def gather_numbers(self, own: Tensor) -> tuple[Handle | None, Tensor, int]:
        """Gathers small CPU tensors [n] of all sites, also while meetings are under way.

        Returns the exchange (None for a single site), the tensor [num_sites, n] that it fills, and
        the bytes sent.
        """
        if self.num_sites == 1:
            return None, own.unsqueeze(0), 0
        gathered = own.new_empty(self.num_sites, own.numel())
        sent = (self.num_sites - 1) * own.nbytes
        if self._gloo:
            work = self._control._allgather_base(gathered.view(-1), own)
        else:
            rows = list(gathered)
            work = dist.all_gather(rows, own, async_op=True)
        return _Exchange(work, self.link, sent), gathered, sent

    def _listen(self) -> None:
        """Starts to receive a byte from every other site, so that its answer is not lost if it ends
        right afterwards."""
        self._bytes = {s: torch.zeros(1, dtype=torch.uint8) for s in self.everyone}
        self._heard = {
            site: self._probe.recv([self._bytes[site]], site, site)
            for site in self.everyone
            if site != self.site
        }

    def missing_sites(self) -> str:
        """After a failure: a text that says which sites are gone or silent; empty if all answer.

        Every site sends a byte to every other one. A closed connection fails at once. A site that
        is alive but silent may just not have noticed the failure.
        """
        if self.num_sites == 1 or self._probe is None:
            return ""
        words: dict[int, str] = {}
        here = torch.ones(1, dtype=torch.uint8)

        def hear(site: int) -> None:
            try:
                self._heard[site].wait()
                words[site] = "here"
            except RuntimeError:
                words[site] = "gone"

        def tell(site: int) -> None:
            with suppress(RuntimeError):
                self._probe.send([here], site, self.site).wait()

        threads = [
            threading.Thread(target=target, args=(site,), daemon=True)
            for site in self._heard
            for target in (tell, hear)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + _PROBE_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        gone = [site for site in self._heard if words.get(site) == "gone"]
        silent = [site for site in self._heard if site not in words]
        if gone:
            return f"{_names(gone)} {'is' if len(gone) == 1 else 'are'} gone"
        return f"no word from {_names(silent)}" if silent else ""


def _free(channels: list[Any]) -> None:
    """Destroys process groups to which there must be no other reference."""
    while channels:
        channel = channels.pop()
        if channel is not None and not isinstance(channel, dist.ProcessGroupGloo):
            dist.destroy_process_group(channel)
        del channel  # a Gloo group ends with the last reference


def _names(sites: Sequence[int]) -> str:
    return f"{'site' if len(sites) == 1 else 'sites'} {', '.join(map(str, sites))}"


def share_statuses(group: SiteGroup, message: str) -> tuple[list[str], int]:
    """Exchanges short texts; returns those of all members in rank order, and the bytes sent."""
    if group.size == 1:
        return [message], 0
    raw = message.encode()[: wire.STATUS_BYTES]
    own = torch.zeros(wire.STATUS_BYTES, dtype=torch.uint8)
    own[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else 0
    rows, sent = group.gather_now(own)
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows], sent


def sum_floats(group: SiteGroup, value: float) -> tuple[float, int]:
    """The sum over all members in fp64, in rank order (equal bits everywhere), and the bytes
    sent."""
    rows, sent = group.gather_now(torch.tensor([value], dtype=torch.float64))
    return sum(rows.view(-1).tolist()), sent
