"""Sums over owner groups in real Gloo processes, against fp64 and the byte formula."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from outer_model import bits
from sites import pool
from torch import Tensor
from vector_job import VectorJob, contribution

from fomoe_ext.launch.link import CountedLink
from fomoe_ext.outer.groups import SiteGroups, share_statuses, sum_floats
from fomoe_ext.outer.reduce import run_jobs
from fomoe_ext.placement import Placement, wire
from fomoe_ext.placement.wire import Link

# --------------------------------------------------------------------------------------------- sums


def sum_everything(
    site: int, num_sites: int, numel: int, codec: str, bucket_bytes: int, summed: bool
) -> tuple[dict[tuple[int, ...], Tensor], int]:
    """Sums a vector in every group of every size that the site is in, all at once."""
    groups = SiteGroups(num_sites, site, timeout_s=20)
    sets = {owners for r in range(1, num_sites + 1) for owners in owner_sets(num_sites, r)}
    groups.create(sets)
    jobs = [
        VectorJob(groups.group(o), codec, contribution(o, site, numel + len(o)), summed)
        for o in sorted(sets)
        if site in o and (summed or len(o) > 1)
    ]
    sent = run_jobs(jobs, bucket_bytes)
    for job in jobs:
        # Handed round, a site reads its own share alone; else every element, each once.
        reads = job.reads == 1
        assert bool(reads.all()) if summed else int(reads.sum()) == int(job.reads.sum())
        assert bool((job.writes == 1).all())
    return {job.group.owners: job.result for job in jobs}, sent


def owner_sets(num_sites: int, replication: int) -> set[tuple[int, ...]]:
    return set(
        Placement.cyclic(
            num_sites=num_sites, num_experts=12, num_layers=2, replication=replication
        ).owner_sets()
    )


# Relative to the largest value of the group: half a step of the value, of the sum.
ROUNDING = {"fp32": 2**-22, "bf16": 2**-8, "int8": 0.51 / 127, "int4": 0.51 / 7}


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize(("numel", "bucket_bytes"), [(0, 64), (1, 4), (61, 64), (200, 4096)])
@pytest.mark.parametrize("num_sites", [1, 2, 3, 4])
def test_sums_are_right_and_equal(
    num_sites: int, numel: int, bucket_bytes: int, codec: str
) -> None:
    answers = pool().run(num_sites, sum_everything, numel, codec, bucket_bytes, True)
    rounding = ROUNDING[codec]
    for site, (results, sent) in enumerate(answers):
        expected_bytes = 0
        for owners, result in results.items():
            values = [contribution(owners, s, numel + len(owners)) for s in owners]
            exact = torch.stack(values).double().sum(0)
            # Two roundings: of every value, and of the sum.
            largest = torch.stack(values).double().abs().sum(0).max() if result.numel() else 0
            room = 2.2 * rounding * largest
            if len(owners) > 1:
                assert bool(((result.double() - exact).abs() <= room).all())
            else:
                assert bits(result) == bits(values[0])  # nothing is encoded in a group of one
            assert bits(result) == bits(answers[owners[0]][0][owners])
            size = len(owners)
            for start in range(0, numel + size, bucket_bytes // 4):
                bucket = min(bucket_bytes // 4, numel + size - start)
                share = -(-bucket // size)
                payload = {
                    "fp32": 4 * share,
                    "bf16": 2 * share,
                    "int8": share + 2 * -(-share // 64),
                    "int4": -(-share // 2) + 2 * -(-share // 64),
                }[codec]
                expected_bytes += 2 * (size - 1) * (payload + 8)  # and a hash behind it
        assert sent == expected_bytes, site
        assert sent == sum(
            wire.all_reduce_bytes(numel + len(o), len(o), codec, bucket_bytes) for o in results
        )


@pytest.mark.parametrize("num_sites", [2, 3, 4])
def test_shares_are_handed_round(num_sites: int) -> None:
    answers = pool().run(num_sites, sum_everything, 61, "fp32", 64, False)
    for results, sent in answers:
        for owners, result in results.items():
            values = [contribution(owners, s, 61 + len(owners)) for s in owners]
            wanted = torch.empty_like(result)
            for start in range(0, result.numel(), 16):
                stop = min(start + 16, result.numel())
                share = -(-(stop - start) // len(owners))
                for rank, value in enumerate(values):
                    part = slice(start + rank * share, min(stop, start + (rank + 1) * share))
                    wanted[part] = value[part]
            assert bits(result) == bits(wanted)
        assert sent == sum(wire.all_gather_bytes(61 + len(o), len(o), "fp32", 64) for o in results)


def tell(site: int, num_sites: int) -> tuple[Any, Any]:
    group = SiteGroups(num_sites, site, timeout_s=20).group(tuple(range(num_sites)))
    text = "" if site == 0 else f"grüße von {site} " + "x" * (500 if site == 1 else 0)
    return share_statuses(group, text), sum_floats(group, 0.1 * (site + 1))


def test_statuses_and_numbers_are_shared() -> None:
    answers = pool().run(3, tell)
    for (texts, sent), (total, number_bytes) in answers:
        assert texts[0] == "" and texts[2] == "grüße von 2 "
        assert texts[1].startswith("grüße von 1 x") and len(texts[1].encode()) == wire.STATUS_BYTES
        assert sent == 2 * wire.STATUS_BYTES and number_bytes == 2 * wire.NORM_BYTES
        assert total == 0.1 + 0.2 + 0.1 * 3
    assert pool().run(1, tell) == [(([""], 0), (0.1, 0))]


def wrong_worlds(site: int, num_sites: int) -> list[str]:
    messages = []
    for wanted_sites, wanted_site in ((num_sites + 1, site), (num_sites, 1 - site)):
        try:
            SiteGroups(wanted_sites, wanted_site)
        except RuntimeError as error:
            messages.append(str(error))
    groups = SiteGroups(num_sites, site, timeout_s=20)
    groups.create([(0,), (1,)])
    try:
        groups.group((1 - site,))
    except KeyError as error:
        messages.append(str(error))
    return messages


def test_wrong_worlds_are_refused() -> None:
    for site, messages in enumerate(pool().run(2, wrong_worlds)):
        assert f"this is rank {site} of 2" in messages[0] and "must be rank" in messages[1]
        assert f"site {site} has no group of the sites ({1 - site},)" in messages[2]
    with pytest.raises(RuntimeError, match="must be initialised before 2 sites can meet"):
        SiteGroups(2, 0)
    for arguments, message in (
        ((0, 0), "num_sites must be >= 1"),
        ((2, 2), r"site must be in \[0, 2\), got 2"),
        ((1, 0, 0.0), "timeout_s must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SiteGroups(*arguments)


def side_by_side(site: int, num_sites: int) -> tuple[float, float]:
    """Seconds of a link's latency that three exchanges side by side take, and then one more."""
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    groups = SiteGroups(num_sites, site, timeout_s=20)
    groups.link = CountedLink(Link(1e9, 0.5), rate=False, clock=lambda: now[0], sleep=sleep)
    under_way = [groups.gather_numbers(torch.ones(1))[0] for _ in range(3)]
    for exchange in under_way:
        while not exchange._ended:
            time.sleep(0.001)
    for exchange in under_way:
        exchange.wait()
    together = now[0] - 100
    groups.gather_numbers(torch.ones(1))[0].wait()
    return together, now[0] - 100 - together


def test_exchanges_side_by_side_wait_for_one_latency_together() -> None:
    assert pool().run(2, side_by_side) == [(0.5, 0.5)] * 2


def test_buckets_of_no_element_are_refused() -> None:
    with pytest.raises(ValueError, match="bucket_bytes must be at least 4, got 3"):
        wire.bucket_sizes(5, 3)
    assert wire.bucket_sizes(5, 8) == [2, 2, 1] and wire.bucket_sizes(0, 8) == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_lanes_share_out_all_buckets(ranks: int) -> None:
    for numel in (0, 1, 3, 4, 5, 20, 21, 39, 40, 41):
        sizes = wire.bucket_sizes(numel, 16)
        for turn in range(7):
            wanted = [0] * ranks
            for bucket, size in enumerate(sizes):
                wanted[wire.lane_of(bucket, turn, ranks)] += size
            found = [wire.lane_elements(numel, turn, rank, ranks, 16) for rank in range(ranks)]
            assert found == wanted
