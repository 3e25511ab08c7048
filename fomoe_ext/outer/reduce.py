"""Sums over owner groups: encoded shares, added in fp32 in rank order, the same bits for all.

For each bucket: in a reduce-scatter every member sends each other member its share, encoded. Every
member then adds up its own share (its own values are not encoded) and encodes the sum, which an
all-gather sends to all. So all members decode the same bytes. Sparse payloads (topk) are not summed
on the way, as encoding the sum would drop most of it: every member gets the payloads of all and
adds them up itself, in rank order. `fomoe_ext.placement.wire` predicts the number of bytes.

Every payload is followed by a 64-bit hash of it; a payload that does not match is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from fomoe_ext.launch import inject
from fomoe_ext.outer.codec import Codec, hash_bits
from fomoe_ext.outer.groups import Handle, SiteGroup
from fomoe_ext.placement import wire


class Damaged(RuntimeError):
    """A payload was changed on its way, or contains values that are NaN or infinite."""


class Job(Protocol):
    """Values to be summed over the members of a group, read and written share by share.

    With `summed` False nothing is added: every member's share of a bucket goes to all others as it
    is, so that all end with the same values.
    """

    group: SiteGroup
    codec: Codec
    numel: int
    summed: bool
    device: torch.device
    """The device of the values."""
    seed: int
    """Of stochastic rounding; differs from round to round and site to site."""
    share_error: Tensor | None
    """Error feedback of the sums that this site encodes, fp32 [wire.own_elements(..)]."""

    def position(self, element: int) -> int:
        """Index of an element's random number for stochastic rounding."""
        ...

    def encode(self, start: int, stop: int, payload: Tensor) -> None:
        """Encodes this site's elements start..stop-1 into `payload`, uint8 [wire_bytes]."""
        ...

    def values(self, start: int, stop: int) -> Tensor:
        """The same, not encoded: fp32 [stop - start], a new tensor."""
        ...

    def write(self, start: int, stop: int, total: Tensor) -> None:
        """Takes the sum (with `summed` False the values), fp32 [stop - start]; may overwrite it."""
        ...


class Bucket:
    """One bucket of a job on its way: encode, scatter, reduce, collect, apply, in this order.

    `encode` and `apply` touch what the job reads and writes, the others only what has been encoded.
    """

    def __init__(self, job: Job, index: int, size: int) -> None:
        self.job = job
        group = job.group
        self.start, self.stop = index * size, min(job.numel, (index + 1) * size)
        self._sparse = job.summed and group.size > 1 and wire.is_sparse(job.codec.name)
        """Whether members exchange all of the bucket, and every one adds up all of it."""
        share = wire.share_elements(self.stop - self.start, group.size)
        edges = [min(self.start + r * share, self.stop) for r in range(group.size + 1)]
        self._shares = list(pairwise(edges))
        if self._sparse:
            share = self.stop - self.start
            self._shares = [(self.start, self.stop)] * group.size
        # All shares of a bucket travel in as many bytes, though the last ones may hold less.
        self._bytes = wire.wire_bytes(job.codec.name, share) + wire.HASH_BYTES
        self._error_at = index * wire.share_elements(size, group.size)
        self.bytes_sent = 0
        self._own: Tensor | None = None
        self._sent: Tensor | None = None
        self._received: Tensor | None = None
        self._handle: Handle | None = None
        buckets = -(-job.numel // size)
        self.order = ((2 * index + 1) / buckets, group.owners)
        """Sort key among all buckets, equal at all members; all groups advance in proportion."""

    def _payload_size(self, rank: int) -> int:
        start, stop = self._shares[rank]
        return self.job.codec.wire_bytes(stop - start)

    def encode(self) -> None:
        """Reads this site's values: own share as it is, the others' encoded."""
        job, group = self.job, self.job.group
        own = self._shares[group.rank]
        if group.size > 1 and (self._sparse or not job.summed):
            self._sent = self._empty(1, job.device)
            job.encode(*own, self._sent[0, : self._payload_size(group.rank)])
            return
        self._own = job.values(*own)
        if group.size == 1:
            return
        self._sent = self._empty(group.size - 1, job.device)
        others = [rank for rank in range(group.size) if rank != group.rank]
        for row, rank in zip(self._sent, others, strict=True):
            job.encode(*self._shares[rank], row[: self._payload_size(rank)])

    def _empty(self, rows: int, device: torch.device) -> Tensor:
        # What no payload fills is zero, so that what is sent depends on the data alone.
        full = self._shares[-1][1] - self._shares[-1][0] == self._shares[0][1] - self._shares[0][0]
        make = torch.empty if full else torch.zeros
        return make(rows, self._bytes, dtype=torch.uint8, device=device)

    def scatter(self) -> None:
        """Starts the reduce-scatter."""
        group = self.job.group
        if group.size == 1:
            return
        assert self._sent is not None
        self._sent = self._sent.to(group.device)
        if self._sparse or not self.job.summed:
            return
        seal(self._sent)
        inject.point("reduce")
        if inject.corrupted():
            self._sent[0, 0] ^= 1
        self._received = torch.empty_like(self._sent)
        self._handle, count = group.scatter(self._received, self._sent)
        self.bytes_sent += count

    def reduce(self) -> None:
        """Waits for the shares of the others, adds them up, starts the all-gather of the sum."""
        job, group = self.job, self.job.group
        if group.size == 1:
            return
        if job.summed and not self._sparse:
            assert self._handle is not None and self._received is not None
            self._handle.wait()
            others = [owner for owner in group.owners if owner != group.owners[group.rank]]
            self._check(list(self._received), others)
            self._sent = self._add_up(self._received)
        assert self._sent is not None
        seal(self._sent)
        self._received = self._sent.new_empty(group.size, self._bytes)
        self._handle, count = group.gather(self._received, self._sent.view(-1))
        self.bytes_sent += count

    def _add_up(self, received: Tensor) -> Tensor:
        job, group = self.job, self.job.group
        assert self._own is not None
        start, stop = self._shares[group.rank]
        size = self._payload_size(group.rank)
        total = self._empty(1, group.device)
        error = job.share_error
        if error is not None:
            error = error[self._error_at : self._error_at + stop - start]
        others = [rank for rank in range(group.size) if rank != group.rank]
        with self._blaming(received[:, :size], others, stop - start):
            job.codec.reduce(
                received[:, :size],
                stop - start,
                total[0, :size],
                own=self._own.to(group.device),
                own_rank=group.rank,
                error=error,
                seed=job.seed,
                first=job.position(start),
            )
        self._own = None
        return total

    def collect(self) -> None:
        """Waits for the sums of all shares."""
        if self.job.group.size == 1:
            return
        assert self._handle is not None and self._received is not None
        inject.point("gather")
        self._handle.wait()
        # All but this site's own, which has not travelled.
        owners, rank = self.job.group.owners, self.job.group.rank
        others = [row for member, row in enumerate(self._received) if member != rank]
        self._check(others, [*owners[:rank], *owners[rank + 1 :]])
        self._sent = self._handle = None

    def _check(self, payloads: Sequence[Tensor], senders: Sequence[int]) -> None:
        for row in broken_seals(payloads):
            raise Damaged(
                f"the payload of elements {self.start} .. {self.stop - 1} of the sites "
                f"{self.job.group.owners} that site {senders[row]} sent was damaged on the way"
            )

    @contextmanager
    def _blaming(self, payloads: Tensor, ranks: Sequence[int], numel: int) -> Iterator[None]:
        """Decoding inside refuses values that are NaN or infinite (on the CPU); names who sent such
        payloads of `numel` values, of these members."""
        try:
            yield
        except ValueError as error:
            owners, blamed = self.job.group.owners, "together"
            for rank, payload in zip(ranks, payloads, strict=True):
                try:
                    self.job.codec.decode(payload, numel)
                except ValueError:
                    blamed = f"of site {owners[rank]}"
                    break
            raise Damaged(
                f"the payloads {blamed} for elements {self.start} .. {self.stop - 1} of the sites "
                f"{owners} cannot be used: {error}"
            ) from None

    def apply(self) -> None:
        """Decodes the sum and hands it to the job."""
        job = self.job
        if job.group.size == 1:
            assert self._own is not None
            job.write(self.start, self.stop, self._own)
            self._own = None
            return
        assert self._received is not None
        total = torch.empty(self.stop - self.start, device=job.device)
        if self._sparse:
            payloads = self._received.to(job.device)[:, : self._payload_size(0)]
            with self._blaming(payloads, range(job.group.size), total.numel()):
                job.codec.decode_sum(payloads, total.numel(), out=total)
            self._received = None
            job.write(self.start, self.stop, total)
            return
        for rank, row in enumerate(self._received.to(job.device)):
            start, stop = self._shares[rank]
            payload = row[: self._payload_size(rank)]
            out = total[start - self.start : stop - self.start]
            with self._blaming(payload[None], [rank], stop - start):
                job.codec.decode(payload, stop - start, out=out)
        self._received = None
        job.write(self.start, self.stop, total)


def _hashes(payloads: Iterable[Tensor]) -> list[int]:
    """Of every row but for its last bytes, as signed numbers."""
    unsigned = hash_bits([row[: -wire.HASH_BYTES] for row in payloads])
    return [value - (1 << 64) if value >> 63 else value for value in unsigned]


def broken_seals(payloads: Sequence[Tensor]) -> list[int]:
    """The payloads, by number, that do not end with their hash."""
    if not len(payloads):
        return []
    seals = torch.stack([row[-wire.HASH_BYTES :] for row in payloads])
    stated = seals.view(torch.int64).flatten().tolist()
    pairs = zip(_hashes(payloads), stated, strict=True)
    return [row for row, (mine, sent) in enumerate(pairs) if mine != sent]


def seal(payloads: Tensor) -> None:
    """Writes the hash of every row, uint8 [rows, bytes], into its last bytes."""
    hashes = torch.tensor(_hashes(payloads), dtype=torch.int64)
    seals = hashes.view(torch.uint8).view(len(payloads), wire.HASH_BYTES)
    payloads[:, -wire.HASH_BYTES :] = seals.to(payloads.device)


def buckets_of(jobs: Sequence[Job], bucket_bytes: int) -> list[Bucket]:
    """All buckets of the jobs, in an order that is the same at all sites that share them."""
    size = wire.bucket_elements(bucket_bytes)
    buckets = [Bucket(job, index, size) for job in jobs for index in range(-(-job.numel // size))]
    return sorted(buckets, key=lambda bucket: bucket.order)


def exchange(
    buckets: Sequence[Bucket], in_flight: int, *, encode: bool = True, apply: bool = True
) -> int:
    """Sends buckets and returns the bytes sent; at most `in_flight` wait in each direction.

    Encodes and applies each bucket on the way. Without `encode` all must have been encoded before;
    without `apply` the caller applies them afterwards. All members of a group must pass the same
    buckets of it in the same order. Sites cannot deadlock: a site waits for a bucket only after it
    has started all earlier ones. Raises RuntimeError when a member is lost or does
    not come in time, Damaged for a bad payload; then buckets may have been applied at some
    members and not at others.
    """
    for i in range(len(buckets) + 2 * in_flight):
        if i < len(buckets):
            if encode:
                buckets[i].encode()
            buckets[i].scatter()
        if 0 <= i - in_flight < len(buckets):
            buckets[i - in_flight].reduce()
        if 0 <= i - 2 * in_flight < len(buckets):
            bucket = buckets[i - 2 * in_flight]
            bucket.collect()
            if apply:
                bucket.apply()
    return sum(bucket.bytes_sent for bucket in buckets)


def run_jobs(jobs: Sequence[Job], bucket_bytes: int, in_flight: int = wire.IN_FLIGHT) -> int:
    """Runs jobs of this site's groups to their end and returns the bytes it sent; see `exchange`.

    Memory: about six times the payload of `in_flight` buckets.
    """
    return exchange(buckets_of(jobs, bucket_bytes), in_flight)
