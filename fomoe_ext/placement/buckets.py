"""How large buckets are where the job does not say, and what memory those under way take. No torch.

A site has `in_flight` buckets under way at once in each direction. All of a meeting's buckets so
travel in waves, each of which costs at least one latency of the link. Large buckets make few waves
and take much memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fomoe_ext.checks import at_least
from fomoe_ext.placement import wire
from fomoe_ext.placement.wire import GroupElements

SMALLEST = 1 << 22
"""Bytes of fp32: the size of buckets of all but large models."""
LARGEST = 1 << 30
WAVES = 16
"""As many waves as the whole model should have at most. A site has a part of it, so that latencies
of waves are few beside the others that a meeting costs (a status, the first share, the last sum,
the hashes)."""
_BYTES_UNDER_WAY = 1 << 25
_SHARE_UNDER_WAY = 128
"""Buckets under way in one direction may take, encoded, 32 MiB, or 1/128 of the model in fp32 where
that is more; and one that is decoded as much again. Both directions take several times that
(`buffer_bytes`)."""


def check_bucket_bytes(bucket_bytes: int) -> None:
    """ValueError or TypeError unless it is a number of bytes for fp32 values, or 0 for a choice."""
    at_least(0, bucket_bytes=bucket_bytes)
    if 0 < bucket_bytes < 4:
        raise ValueError(f"bucket_bytes must be 0 or at least 4, got {bucket_bytes}")


def chosen_bytes(elements: int, codecs: Iterable[str], in_flight: int, fragments: int = 1) -> int:
    """The size of buckets, in bytes of fp32, where a job does not say: 4 MiB times a power of two.

    `elements`: trained ones of the whole model, every expert once. `codecs`: all with which values
    travel, of which the widest counts. Large enough for at most `WAVES` waves of `in_flight`
    buckets per fragment, as far as the memory that is named above and `LARGEST` allow.

    A fragment of at most `WAVES * in_flight` buckets of 4 MiB (by default 512 MiB in fp32, 134
    million elements) has 4 MiB: block scales and what encoding loses depend on where buckets begin,
    so for such models the size is part of their results. For the same reason nothing else has a
    say: with other sites, or over another link, a model has the same buckets.
    """
    size_fp32 = 4 * -(-elements // fragments)
    wanted = -(-size_fp32 // (WAVES * in_flight))
    allowed = max(_BYTES_UNDER_WAY, size_fp32 // _SHARE_UNDER_WAY)
    size = SMALLEST
    while size < wanted and 2 * size <= min(allowed, LARGEST):
        payload = max(wire.wire_bytes(codec, 2 * size // 4) for codec in codecs)
        if in_flight * payload > allowed:
            break
        size *= 2
    return size


def codecs_of(optimizer: str, codec: str, moment_codecs: Sequence[str]) -> tuple[str, ...]:
    """All codecs with which a job's values travel in buckets of their own; selection biases, which
    are few, and the last step of ddp, which sends no more than it has, are not counted."""
    return (codec, *moment_codecs) if optimizer == "local-adamw" else (codec,)


def buffer_bytes(
    elements: Sequence[GroupElements],
    codec: str,
    bucket_bytes: int,
    in_flight: int,
    *,
    ranks: int = 1,
    whole: bool = False,
) -> int:
    """Bytes that a meeting's buckets take at a rank of a site, besides what it always holds.

    `elements` of the site, by fragment; its `ranks` take turns in the buckets. As long as a
    bucket's shares are on their way it takes a share in fp32, and a payload to and from every other
    member; then the payload of a sum, and those of all sums. At most `in_flight` buckets are at
    either stage, and one is decoded. `whole`: everything that a fragment has is encoded at once
    (with overlap), or kept until all has arrived (staged).
    """
    most = 0
    for fragment in elements:
        before: list[tuple[int, int]] = []
        after: list[tuple[int, int]] = []
        decoded = 0
        for owners, numel in fragment.parameters.items():
            members = len(owners)
            for size, times in wire.bucket_counts(numel, bucket_bytes) if members > 1 else ():
                first, second = _stages(size, members, codec)
                of_rank = -(-times // ranks)
                before.append((max(first, second) if whole else first, of_rank))
                after.append((0 if whole else second, of_rank))
                decoded = max(decoded, 4 * size)
        count = sum(times for _, times in before) if whole else in_flight
        most = max(most, decoded + _largest_of(before, count) + _largest_of(after, count))
    return most


def _stages(size: int, members: int, codec: str) -> tuple[int, int]:
    """Bytes of a bucket before its shares are summed, and after."""
    if wire.is_sparse(codec):
        payload = wire.wire_bytes(codec, size) + wire.HASH_BYTES
        return payload, (1 + members) * payload
    share = wire.share_elements(size, members)
    payload = wire.wire_bytes(codec, share) + wire.HASH_BYTES
    return 4 * share + 2 * (members - 1) * payload, (1 + members) * payload


def _largest_of(sizes: Iterable[tuple[int, int]], count: int) -> int:
    """The sum of the `count` largest sizes, each of which is there so many times."""
    total = 0
    for size, times in sorted(sizes, reverse=True):
        taken = min(times, count)
        total, count = total + taken * size, count - taken
    return total
