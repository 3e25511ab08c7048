"""Sums over owner groups: encoded shares, added in fp32 in rank order, the same bits for all.

Per bucket: all_to_all_single (reduce-scatter of encoded shares), every member adds up its own
share, encodes the sum, and all_gather_into_tensor gives it to all. What all members decode are the
same bytes. `fomoe_ext.wire` tells the number of bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe_ext import wire
from fomoe_ext.outer.codec import Codec
from fomoe_ext.placement import Owners

# The name since torch 2.13, which warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class SiteGroup:
    """The sites of one owner set and their process group (None for a single site)."""

    def __init__(self, owners: Owners, site: int, process_group: Any) -> None:
        self.owners, self.process_group = owners, process_group
        self.size = len(owners)
        self.rank = owners.index(site)
        """This site's place among the owners."""
        on_gpu = process_group is not None and dist.get_backend(process_group) == "nccl"
        self.device = torch.device("cuda" if on_gpu else "cpu")
        """Where payloads must be."""


class SiteGroups:
    """The owner groups of one site, one process group per owner set, made once.

    Site numbers are ranks of torch.distributed's default group, which must be initialised when
    there is more than one site. Raises ValueError for a wrong site, RuntimeError when the default
    group is missing or of another size or rank.
    """

    def __init__(self, num_sites: int, site: int, timeout_s: float = 600.0) -> None:
        if num_sites < 1:
            raise ValueError(f"num_sites must be >= 1, got {num_sites}")
        if not 0 <= site < num_sites:
            raise ValueError(f"site must be in [0, {num_sites}), got {site}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be > 0, got {timeout_s}")
        if num_sites > 1:
            if not dist.is_initialized():
                raise RuntimeError(
                    f"torch.distributed must be initialised before {num_sites} sites can meet "
                    "(torch.distributed.init_process_group)"
                )
            found = dist.get_rank(), dist.get_world_size()
            if found != (site, num_sites):
                raise RuntimeError(
                    f"site {site} of {num_sites} must be rank {site} of {num_sites} processes in "
                    f"torch.distributed, this is rank {found[0]} of {found[1]}"
                )
        self.num_sites, self.site = num_sites, site
        self._timeout = timedelta(seconds=timeout_s)
        self._groups: dict[Owners, SiteGroup | None] = {}
        self.create([self.everyone])

    @property
    def everyone(self) -> Owners:
        """The set of all sites."""
        return tuple(range(self.num_sites))

    def create(self, owner_sets: Iterable[Owners]) -> None:
        """Makes the groups that are not there yet; a collective call with the same sets everywhere.

        torch.distributed.new_group wants all processes, members or not, to make the same groups in
        the same order: hence the sorting.
        """
        for owners in sorted(set(owner_sets) - self._groups.keys()):
            process_group = None
            if len(owners) > 1:
                process_group = dist.new_group(list(owners), timeout=self._timeout)
            mine = self.site in owners
            self._groups[owners] = SiteGroup(owners, self.site, process_group) if mine else None

    def group(self, owners: Owners) -> SiteGroup:
        """This site's group of an owner set. Raises KeyError where it is no member or not made."""
        group = self._groups.get(owners)
        if group is None:
            raise KeyError(f"site {self.site} has no group of the sites {owners}")
        return group


class Job(Protocol):
    """Values that a group's members sum: bucket by bucket, read here and written back.

    With `summed` False nothing is added: every member's share of a bucket goes to all others as it
    is, so that all end with the same values.
    """

    group: SiteGroup
    codec: Codec
    numel: int
    summed: bool

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fills `out`, fp32 [stop - start], with this site's values."""
        ...

    def write(self, start: int, stop: int, total: Tensor) -> None:
        """Takes the sum (or, with `summed` False, the values), fp32 [stop - start]."""
        ...


class _Course:
    """A job on its way: one bucket in reduce-scatter, the one before it in all-gather."""

    def __init__(self, job: Job, size: int) -> None:
        self.job = job
        self.size = size
        self.bytes_sent = 0
        self._scattering: tuple[int, Tensor, Any, Any] | None = None
        self._gathering: tuple[int, Tensor, Any, Any] | None = None
        self._to_gather: tuple[int, Tensor] | None = None

    @property
    def ticks(self) -> int:
        """Calls of `launch` and `finish` that the job takes."""
        buckets = -(-self.job.numel // self.size)
        if self.job.group.size == 1 or not buckets:
            return buckets
        return buckets + 1

    def _range(self, bucket: int) -> tuple[int, int]:
        return bucket * self.size, min(self.job.numel, (bucket + 1) * self.size)

    def launch(self, tick: int) -> None:
        """Starts the all-gather of the last tick's bucket and the reduce-scatter of the next."""
        job, group = self.job, self.job.group
        start, stop = self._range(tick)
        if start < stop:
            # Padding is zeros, so that what is sent depends on the data alone.
            share = wire.share_elements(stop - start, group.size)
            values = torch.zeros(share * group.size, device=group.device)
            job.read(start, stop, values[: stop - start])
            if group.size == 1:
                job.write(start, stop, values)
                return
            shares = values.view(group.size, share)
            if job.summed:
                sent = torch.stack([job.codec.encode(s) for s in shares])
                received = torch.empty_like(sent)
                handle = dist.all_to_all_single(
                    received, sent, group=group.process_group, async_op=True
                )
                self.bytes_sent += (group.size - 1) * sent[0].nbytes
                self._scattering = tick, received, sent, handle
            else:
                self._scattering = tick, job.codec.encode(shares[group.rank]), None, None
        if self._to_gather is not None:
            bucket, own = self._to_gather
            self._to_gather = None
            gathered = own.new_empty(group.size * own.numel())
            handle = _all_gather(gathered, own, group=group.process_group, async_op=True)
            self.bytes_sent += (group.size - 1) * own.nbytes
            self._gathering = bucket, gathered, own, handle

    def finish(self) -> None:
        """Waits for what `launch` started, adds up and writes back."""
        job, group = self.job, self.job.group
        if self._scattering is not None:
            bucket, received, _, handle = self._scattering
            self._scattering = None
            if handle is not None:
                handle.wait()
                received = job.codec.encode(job.codec.decode_sum(list(received)))
            self._to_gather = bucket, received
        if self._gathering is not None:
            bucket, gathered, own, handle = self._gathering
            self._gathering = None
            handle.wait()
            payloads = gathered.view(group.size, own.numel())
            total = torch.cat([job.codec.decode(payload) for payload in payloads])
            start, stop = self._range(bucket)
            job.write(start, stop, total[: stop - start])


def run_jobs(jobs: Sequence[Job], bucket_bytes: int) -> int:
    """Runs jobs of this site's groups to their end and returns the bytes it sent.

    All members of a group must pass the same jobs of it in the same order. All jobs advance
    together, tick by tick: a tick starts the collectives of all and then waits for them, so that
    groups that overlap cannot wait for each other in a circle. Memory: about six buckets per job.
    Raises RuntimeError when a member is lost or does not come in time; then buckets may have been
    written at some members and not at others.
    """
    size = wire.bucket_elements(bucket_bytes)
    courses = [_Course(job, size) for job in jobs]
    for tick in range(max((course.ticks for course in courses), default=0)):
        for course in courses:
            if tick < course.ticks:
                course.launch(tick)
        for course in courses:
            if tick < course.ticks:
                course.finish()
    return sum(course.bytes_sent for course in courses)


def gather_objects(value: Any, num_sites: int) -> list[Any]:
    """What every site passed, in order of sites; a collective. Values must be picklable."""
    if num_sites == 1:
        return [value]
    result: list[Any] = [None] * num_sites
    dist.all_gather_object(result, value)
    return result


def share_statuses(group: SiteGroup, message: str) -> tuple[list[str], int]:
    """Tells all members a short text and returns theirs in rank order, and the bytes sent."""
    if group.size == 1:
        return [message], 0
    raw = message.encode()[: wire.STATUS_BYTES]
    own = torch.zeros(wire.STATUS_BYTES, dtype=torch.uint8)
    own[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else 0
    own = own.to(group.device)
    gathered = own.new_empty(group.size * own.numel())
    _all_gather(gathered, own, group=group.process_group)
    rows = gathered.cpu().view(group.size, -1)
    texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]
    return texts, (group.size - 1) * own.nbytes


def sum_floats(group: SiteGroup, value: float) -> tuple[float, int]:
    """Sum over the members in fp64, in rank order, the same bits for all; and the bytes sent."""
    if group.size == 1:
        return value, 0
    own = torch.tensor([value], dtype=torch.float64, device=group.device)
    gathered = own.new_empty(group.size)
    _all_gather(gathered, own, group=group.process_group)
    return sum(gathered.tolist()), (group.size - 1) * own.nbytes
