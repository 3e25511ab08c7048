"""The default size of buckets, and the memory of the buckets on their way. Needs no torch.

A site has `in_flight` buckets on their way at once in each direction. So the buckets of a meeting
travel in waves, each of which takes at least one latency of the link. Larger buckets make fewer
waves but take more memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fomoe_ext.checks import at_least
from fomoe_ext.placement import wire
from fomoe_ext.placement.wire import GroupElements

SMALLEST = 1 << 22
"""Bytes of fp32: the size of buckets for all but large models."""
LARGEST = 1 << 30
WAVES = 16
"""The whole model should take at most this many waves. A site holds a part of it and needs fewer,
so that waves add few latencies to those of the status, the first share, the last sum and the
hashes."""
_BYTES_UNDER_WAY = 1 << 25
_SHARE_UNDER_WAY = 128
"""Encoded buckets on their way in one direction may take 32 MiB, or 1/128 of the model in fp32 if
that is more, and one decoded bucket the same again. Both directions together take several times
that (`buffer_bytes`)."""


def check_bucket_bytes(bucket_bytes: int) -> None:
    """ValueError or TypeError unless it is 0 (chosen by the model's size) or at least 4 bytes."""
    at_least(0, bucket_bytes=bucket_bytes)
    if 0 < bucket_bytes < 4:
        raise ValueError(f"bucket_bytes must be 0 or at least 4, got {bucket_bytes}")


def chosen_bytes(elements: int, codecs: Iterable[str], in_flight: int, fragments: int = 1) -> int:
    """The default size of buckets in bytes of fp32: 4 MiB times a power of two.

    It is large enough for at most `WAVES` waves of `in_flight` buckets per fragment, within the
    memory limit above and `LARGEST`. A fragment of at most `WAVES * in_flight` buckets of 4 MiB (by
    default 512 MiB in fp32, 134 million elements) has buckets of 4 MiB.

    The size depends only on these arguments, not on the sites or the link: block scales and the
    errors of encoding depend on where buckets begin, so another size gives other results.

    Args:
        elements: Trained elements of the whole model, every expert once.
        codecs: All codecs in use; the one with the most bytes counts.
        in_flight: Buckets on their way at once in each direction.
        fragments: Parts of the model that are averaged at different steps.
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
    """The codecs of a job's buckets. fp32 for selection biases and for the last step of ddp is left
    out: the biases are few, and that step needs no more memory than the others."""
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
    """Bytes that the buckets of a meeting take at a rank of a site.

    While the shares of a bucket are on their way, it takes one share in fp32 and a payload to and
    from every other member. After that it takes the payload of its own sum and those of all sums.
    At most `in_flight` buckets are in each of the two stages, and one bucket is decoded.

    Args:
        elements: Of the site, by fragment.
        ranks: Ranks of the site, which transfer buckets in turn.
        whole: Whether a whole fragment is in memory at once: encoded at once (with overlap) or kept
            until all data has arrived (staged).
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
    """The sum of the `count` largest of these (size, number of times) pairs."""
    total = 0
    for size, times in sorted(sizes, reverse=True):
        taken = min(times, count)
        total, count = total + taken * size, count - taken
    return total
