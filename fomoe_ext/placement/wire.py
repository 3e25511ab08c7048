"""Exact bytes on the wire: how a meeting splits its data and what it sends. Needs no torch.

The N members of an owner group all-reduce their common parameters in buckets. A bucket of n
elements is split into N shares of ceil(n / N), one per member (the last ones padded). In the
reduce-scatter, a member sends each other member that member's share, encoded. In the all-gather, it
sends the encoded sum of its own share to each other member. So a member sends 2 (N - 1) encoded
shares per bucket. Sparse payloads are all-gathered instead, and every member adds them up.
`fomoe_ext.outer` counts the bytes that it sends; the functions here predict them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, NamedTuple

from fomoe_ext.checks import at_least, finite, one_of
from fomoe_ext.placement.overlap import AUTO, TIMES
from fomoe_ext.placement.placement import Owners, Placement, Transfer
from fomoe_ext.placement.turns import GroupExperts, waiting_elements

CODECS = ("fp32", "bf16", "int8", "int8-128", "int4", "int4-128", "int2", "int2-128", "topk")
"""Encodings of values: floats; 8, 4 or 2 bits with one step per block of 64 (or, "-128", of 128)
values; or only the 1/64 largest of every 4096 values. csrc/kernels.h describes the formats."""
OPTIMIZERS = ("diloco", "fedavg", "local-adamw", "ddp")
STATUS_BYTES = 128
"""Bytes of the status that each site sends to every other one before a meeting."""
NORM_BYTES = 8
"""Bytes of a site's part of the squared gradient norm, fp64."""
HASH_BYTES = 8
"""Bytes of a 64-bit hash: after every payload, and after a meeting for each owner group."""
COMMIT_BYTES = 8
"""Bytes with which a site confirms to every other one, in a staged meeting, that all data has
arrived."""
COUNT_BYTES = 8
"""Bytes of one number that a site sends before a meeting: the number of tokens that it routed to an
expert, or one of the `site_numbers`."""
IN_FLIGHT = 8
"""Number of buckets that a site transfers at the same time in each direction."""


class Link(NamedTuple):
    """A site's connection to the others: bandwidth in bits per second, latency in seconds."""

    bandwidth: float
    latency: float


class Sizes(NamedTuple):
    """Elements of a model's parts: outside of the blocks; of a block without router and experts; of
    one expert; of one router row. A block has one MoE layer."""

    outside: int
    block: int
    expert: int
    router_row: int


class GroupElements(NamedTuple):
    """Elements that a site has in common with each owner group that it belongs to.

    parameters: those that the outer optimizer updates. biases: selection biases, which are only
    averaged. experts: the part of `parameters` that belongs to experts.
    """

    parameters: dict[Owners, int]
    biases: dict[Owners, int]
    experts: Mapping[Owners, GroupExperts] = MappingProxyType({})

    def of_round(self, expert_turns: int, round_index: int) -> GroupElements:
        """The elements that travel in a round: without experts that wait for their turn. Rounds
        count from 1."""
        if expert_turns == 1:
            return self
        waiting = {
            owners: waiting_elements(experts, expert_turns, round_index)
            for owners, experts in self.experts.items()
            if len(owners) > 1
        }
        met = {owners: n - waiting.get(owners, 0) for owners, n in self.parameters.items()}
        return self._replace(parameters={owners: n for owners, n in met.items() if n})


def wire_bytes(codec: str, numel: int) -> int:
    """Bytes of a payload of `numel` values. Raises ValueError for an unknown codec."""
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {codec!r}")
    if numel < 0:
        raise ValueError(f"numel must be at least 0, got {numel}")
    if codec == "topk":
        full, rest = divmod(numel, 4096)
        return full * _topk_chunk_bytes(4096) + _topk_chunk_bytes(rest)
    name, _, block = codec.partition("-")
    if name in ("fp32", "bf16"):
        return numel * (4 if name == "fp32" else 2)
    steps = -(-numel // int(block or 64))
    return 2 * steps + _packed_bytes(numel, int(name.removeprefix("int")))


def is_sparse(codec: str) -> bool:
    """Whether a codec keeps only some values. Encoding a sum again would lose most of it."""
    return codec == "topk"


def _packed_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _topk_chunk_bytes(numel: int) -> int:
    """One unit (2 bytes), and for each value that is kept a 12-bit index and a 2-bit code."""
    kept = -(-numel // 64)
    return 2 + _packed_bytes(kept, 12) + _packed_bytes(kept, 2) if numel else 0


def bucket_elements(bucket_bytes: int) -> int:
    """Elements of a bucket of bucket_bytes in fp32. Raises ValueError for less than one element."""
    if bucket_bytes < 4:
        raise ValueError(f"bucket_bytes must be at least 4, got {bucket_bytes}")
    return bucket_bytes // 4


def bucket_sizes(numel: int, bucket_bytes: int) -> list[int]:
    """Elements of each bucket of `numel` elements: full buckets and a smaller last one."""
    size = bucket_elements(bucket_bytes)
    return [min(size, numel - start) for start in range(0, numel, size)]


def bucket_counts(numel: int, bucket_bytes: int) -> list[tuple[int, int]]:
    """Pairs of a bucket's size and the number of buckets of that size."""
    size = bucket_elements(bucket_bytes)
    full, rest = divmod(numel, size)
    return [(size, full)] * (full > 0) + [(rest, 1)] * (rest > 0)


def share_elements(numel: int, members: int) -> int:
    """Elements of a member's share of a bucket: ceil(numel / members)."""
    return -(-numel // members)


def all_gather_bytes(numel: int, members: int, codec: str, bucket_bytes: int) -> int:
    """Bytes that a member sends to give its shares of `numel` elements to all others."""
    return (members - 1) * sum(
        times * (wire_bytes(codec, share_elements(n, members)) + HASH_BYTES)
        for n, times in bucket_counts(numel, bucket_bytes)
    )


def all_reduce_bytes(numel: int, members: int, codec: str, bucket_bytes: int) -> int:
    """Bytes that a member sends to sum `numel` elements over the group; 0 in a group of one.

    With a sparse codec it sends its payload of the whole bucket to every other member.
    """
    if is_sparse(codec):
        return (members - 1) * sum(
            times * (wire_bytes(codec, n) + HASH_BYTES)
            for n, times in bucket_counts(numel, bucket_bytes)
        )
    return 2 * all_gather_bytes(numel, members, codec, bucket_bytes)


def own_elements(numel: int, members: int, codec: str, bucket_bytes: int) -> int:
    """Elements whose sum a member encodes: its shares of all buckets, including padding."""
    if is_sparse(codec):
        return 0
    return sum(
        times * share_elements(n, members) for n, times in bucket_counts(numel, bucket_bytes)
    )


@lru_cache(maxsize=64)
def owner_sets(placement: Placement) -> tuple[Owners, ...]:
    """All sets of sites that have parameters in common, ascending, including that of all sites."""
    return tuple(sorted({tuple(range(placement.num_sites)), *placement.owner_sets()}))


def lane_of(bucket: int, turn: int, ranks: int) -> int:
    """The rank of a site that transfers a bucket; ranks take turns. turn: the rank of bucket 0,
    modulo `ranks`: the index of the owner set in `owner_sets` plus the fragment."""
    return (bucket + turn) % ranks


def lane_elements(numel: int, turn: int, rank: int, ranks: int, bucket_bytes: int) -> int:
    """How many of `numel` elements a rank of a site transfers."""
    size = bucket_elements(bucket_bytes)
    full, rest = divmod(numel, size)
    first = (rank - turn) % ranks  # the rank's first bucket, as in `lane_of`
    of_full = size * max(0, -(-(full - first) // ranks))
    return of_full + (rest if lane_of(full, turn, ranks) == rank else 0)


def fragment_of_block(block: int, fragments: int) -> int:
    """The fragment of a block of the model; blocks count from 0.

    Neighbouring blocks are in different fragments (the strided pattern of Streaming DiLoCo, arXiv
    2501.18512). Parameters outside of the blocks belong to fragment 0.
    """
    return block % fragments


@lru_cache(maxsize=64)
def _blocks_of_fragments(blocks: int, fragments: int) -> tuple[tuple[int, ...], ...]:
    result: list[list[int]] = [[] for _ in range(fragments)]
    for block in range(blocks):
        result[fragment_of_block(block, fragments)].append(block)
    return tuple(map(tuple, result))


def fragment_steps(fragments: int, local_steps: int) -> list[int]:
    """For each fragment the local step of a round, from 1, after which it is averaged: evenly
    spread, with the last fragment at the end. Raises ValueError unless
    1 <= fragments <= local_steps."""
    if not 1 <= fragments <= local_steps:
        raise ValueError(f"fragments must be in [1, local_steps = {local_steps}], got {fragments}")
    return [(index + 1) * local_steps // fragments for index in range(fragments)]


def group_elements(
    placement: Placement,
    site: int,
    sizes: Sizes,
    *,
    router_scope: Literal["global", "resident"] = "global",
    selection_bias: bool = False,
    fragments: int = 1,
) -> tuple[GroupElements, ...]:
    """For each fragment the elements that a site has in common with its owner groups, as in
    `OuterSync`.

    With router_scope "global" router rows travel with the dense parameters, with "resident" each
    row travels with its expert. selection_bias: whether routers have selection biases (one fp32 per
    expert).
    """
    everyone = tuple(range(placement.num_sites))
    parameters = [Counter[Owners]() for _ in range(fragments)]
    biases = [Counter[Owners]() for _ in range(fragments)]
    of_experts: list[dict[Owners, GroupExperts]] = [{} for _ in range(fragments)]
    own_row = sizes.router_row if router_scope == "resident" else 0
    parameters[0][everyone] += sizes.outside
    for fragment, layers in enumerate(_blocks_of_fragments(placement.num_layers, fragments)):
        parameters[fragment][everyone] += len(layers) * sizes.block
        for owners, experts in placement.num_by_owners(layers).items():
            router_owners = everyone if router_scope == "global" else owners
            if site in owners:
                of_experts[fragment][owners] = GroupExperts(experts, sizes.expert + own_row)
            for group, counter, elements in (
                (owners, parameters[fragment], sizes.expert),
                (router_owners, parameters[fragment], sizes.router_row),
                (router_owners, biases[fragment], int(selection_bias)),
            ):
                if site in group and elements:
                    counter[group] += experts * elements
    return tuple(
        GroupElements({g: n for g, n in of_parameters.items() if n}, dict(of_biases), experts_)
        for of_parameters, of_biases, experts_ in zip(parameters, biases, of_experts, strict=True)
    )


def moments_due(round_index: int, moment_periods: Sequence[int]) -> tuple[bool, ...]:
    """Whether each of the two AdamW moments is averaged in a round; rounds count from 1."""
    return tuple(round_index % period == 0 for period in moment_periods)


def moment_codecs_of(codec: str, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """Codecs of the two AdamW moments: as given, else fp32 with codec fp32 and bf16 otherwise."""
    if given:
        return tuple(given)
    return ("fp32", "fp32") if codec == "fp32" else ("bf16", "bf16")


def check_moments(moment_periods: Sequence[int], moment_codecs: Sequence[str]) -> None:
    """Raises ValueError or TypeError, naming the argument, unless moments can be averaged this way.

    Moments have no error feedback, so sparse codecs would lose values. The second moment is a
    divisor, which coarse codecs could round to zero.
    """
    if not isinstance(moment_periods, Sequence) or isinstance(moment_periods, str):
        raise TypeError(f"moment_periods must be two numbers of rounds, got {moment_periods!r}")
    if len(moment_periods) != 2:
        raise ValueError(f"moment_periods must be two numbers of rounds, got {moment_periods!r}")
    for name, period in zip(("first", "second"), moment_periods, strict=True):
        at_least(1, **{f"moment_periods: {name}": period})
    if len(moment_codecs) != 2:
        raise ValueError(f"moment_codecs must be two codecs, got {moment_codecs!r}")
    first, second = moment_codecs
    one_of([n for n in CODECS if not is_sparse(n)], **{"moment_codecs: first": first})
    one_of(("fp32", "bf16"), **{"moment_codecs: second": second})


def is_staggered(fragments: int, overlap: int | str) -> bool:
    """Whether meetings are spread over a round or overlap with its steps."""
    return fragments > 1 or overlap != 0


def check_staggering(
    optimizer: str,
    fragments: int,
    overlap: int | str,
    overlap_alpha: float,
    local_steps: int | None = None,
) -> None:
    """Raises ValueError or TypeError, naming the argument, unless meetings can be spread over a
    round in this way. `overlap`: a number of steps or "auto"; `local_steps`: None = not known."""
    at_least(1, fragments=fragments)
    if isinstance(overlap, str) and overlap != AUTO:
        raise ValueError(f"overlap must be a number of steps or {AUTO!r}, got {overlap!r}")
    if not isinstance(overlap, str):
        at_least(0, overlap=overlap)
    finite(0.0, overlap_alpha=overlap_alpha)
    if overlap_alpha >= 1:
        raise ValueError(f"overlap_alpha must be in [0, 1), got {overlap_alpha}")
    if not is_staggered(fragments, overlap):
        return
    if optimizer not in ("diloco", "fedavg"):
        raise ValueError(
            f"optimizer must be diloco or fedavg with fragments or overlap, got {optimizer!r}"
        )
    if local_steps is None:
        return
    fragment_steps(fragments, local_steps)
    if isinstance(overlap, str):
        if local_steps < 2:
            raise ValueError(f"overlap = {AUTO} needs local_steps of at least 2, got {local_steps}")
    elif overlap >= local_steps:
        raise ValueError(f"overlap must be less than local_steps = {local_steps}, got {overlap}")


def check_clip_delta(clip_delta: float) -> None:
    """Raises ValueError or TypeError unless `clip_delta` is 0 or finite and at least 1."""
    finite(0.0, clip_delta=clip_delta)
    if clip_delta and clip_delta < 1:
        raise ValueError(f"clip_delta must be 0 or at least 1, got {clip_delta}")


def site_numbers(by_tokens: bool, clip_delta: float, overlap: int | str = 0) -> int:
    """How many numbers a site sends about itself before a meeting: its tokens, if they weight the
    means; the norm of its delta, if deltas are clipped; `TIMES` times for overlap "auto"."""
    return int(by_tokens) + int(clip_delta > 0) + (TIMES if overlap == AUTO else 0)


def _reduced(groups: Mapping[Owners, int], codec: str, bucket_bytes: int) -> int:
    return sum(all_reduce_bytes(n, len(g), codec, bucket_bytes) for g, n in groups.items())


def round_bytes(
    elements: Sequence[GroupElements],
    num_sites: int,
    *,
    optimizer: str,
    codec: str = "fp32",
    bucket_bytes: int = 1 << 22,
    local_steps: int = 1,
    clip: bool = False,
    round_index: int = 1,
    moment_periods: Sequence[int] = (1, 1),
    moment_codecs: Sequence[str] = ("fp32", "fp32"),
    counted_experts: int = 0,
    numbers: int = 0,
    staged: bool = False,
    expert_turns: int = 1,
) -> int:
    """Bytes that a site sends in a round without reshuffles; equal to what `OuterSync` counts.

    Args:
        elements: by fragment.
        local_steps, clip: only for "ddp", which sends at every step; clip: with gradient clipping.
        round_index: from 1; for "local-adamw" and `expert_turns`.
        moment_periods, moment_codecs: only for "local-adamw".
        counted_experts: experts of all layers if sites exchange how many tokens they routed to
            each, else 0.
        numbers: from `site_numbers`.
        staged: whether sites confirm that all data has arrived before they apply it.
        expert_turns: see `fomoe_ext.placement.turns`.

    Raises ValueError for an unknown optimizer or codec.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    peers = num_sites - 1
    total = peers * COMMIT_BYTES if staged else 0
    for fragment in (of_fragment.of_round(expert_turns, round_index) for of_fragment in elements):
        total += peers * (STATUS_BYTES + COUNT_BYTES * (counted_experts + numbers))
        total += _reduced(fragment.biases, "fp32", bucket_bytes)
        groups = fragment.parameters.keys() | fragment.biases.keys()
        total += sum((len(owners) - 1) * HASH_BYTES for owners in groups)
        if optimizer == "ddp":
            step = peers * (STATUS_BYTES + (NORM_BYTES if clip else 0))
            step += _reduced(fragment.parameters, codec, bucket_bytes)
            equalised = sum(
                all_gather_bytes(n, len(g), "fp32", bucket_bytes)
                for g, n in fragment.parameters.items()
            )
            total += local_steps * step + equalised
            continue
        total += _reduced(fragment.parameters, codec, bucket_bytes)
        if optimizer == "local-adamw":
            due = moments_due(round_index, moment_periods)
            for wanted, moment_codec in zip(due, moment_codecs, strict=True):
                if wanted:
                    total += _reduced(fragment.parameters, moment_codec, bucket_bytes)
    return total


def reshuffle_bytes(
    placement: Placement,
    new: Placement,
    site: int,
    sizes: Sizes,
    *,
    optimizer: str,
    router_scope: Literal["global", "resident"] = "global",
    selection_bias: bool = False,
    outer_momentum: bool | None = None,
    inner_moments: int = 0,
) -> int:
    """Bytes that a site sends to change to the placement `new`: plain fp32, and a status.

    For each expert it sends the anchor, the outer momentum (outer_momentum None = with "diloco"
    only) and `inner_moments` moments of the inner optimizer (2 if moments are sent along). With
    router_scope "resident" it also sends the expert's router row and bias.
    """
    if outer_momentum is None:
        outer_momentum = optimizer == "diloco"
    copies = (2 if outer_momentum and optimizer != "ddp" else 1) + inner_moments
    elements = sizes.expert
    bias = 0
    if router_scope == "resident":
        elements += sizes.router_row
        bias = int(selection_bias)
    moved = sum(t.source == site for t in placement.transfers(new))
    return (placement.num_sites - 1) * STATUS_BYTES + 4 * moved * (copies * elements + bias)


def shadow_site(placement: Placement, layer: int, expert: int) -> int | None:
    """The site that keeps an expert's shadow copy: the next site after the expert's first holder
    that does not hold the expert. None if all sites hold it."""
    owners, count = placement.owners(layer, expert), placement.num_sites
    others = (site % count for site in range(owners[0] + 1, owners[0] + count))
    return next((site for site in others if site not in owners), None)


def shadow_parcels(placement: Placement) -> list[Transfer]:
    """The transfers of all shadow copies at the end of a meeting; the holders send in turn."""
    result = []
    for layer in range(placement.num_layers):
        for expert in range(placement.num_experts):
            target = shadow_site(placement, layer, expert)
            if target is not None:
                owners = placement.owners(layer, expert)
                source = owners[(expert + layer) % len(owners)]
                result.append(Transfer(layer, expert, source, target))
    return result


def shadow_elements(
    sizes: Sizes,
    *,
    router_scope: Literal["global", "resident"] = "global",
    selection_bias: bool = False,
    outer_momentum: bool = False,
) -> int:
    """Elements (fp32) of an expert's shadow copy: anchor and outer momentum, with router_scope
    "resident" also router row and bias."""
    elements, bias = sizes.expert, 0
    if router_scope == "resident":
        elements += sizes.router_row
        bias = int(selection_bias)
    return (2 if outer_momentum else 1) * elements + bias


def shadow_bytes(placement: Placement, site: int, elements: int) -> int:
    """Bytes that a site sends to refresh shadow copies. elements: from `shadow_elements`. There is
    one hash per layer and receiving site."""
    mine = [t for t in shadow_parcels(placement) if t.source == site]
    messages = len({(t.layer, t.target) for t in mine})
    return len(mine) * 4 * elements + messages * HASH_BYTES


def shadow_memory(placement: Placement, site: int, elements: int) -> int:
    """Bytes of the shadow copies that a site keeps."""
    return 4 * elements * sum(t.target == site for t in shadow_parcels(placement))
