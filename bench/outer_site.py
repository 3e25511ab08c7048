"""The process of one site in the benchmark of the whole all-reduce (bench_outer_allreduce.py).

    python -m fomoe_ext.link --sites 2 --link 200mbit -- python bench/outer_site.py --out FILE

Averages one fp32 vector over all sites: by every codec as a meeting does it, with error feedback,
and by Gloo's own all_reduce in fp32 and in bf16. All methods in turn in every round; the time of a
round is that of its slowest site. Site 0 writes what was found to FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import normalised_error
from torch import Tensor

from fomoe_ext.launch.world import find_world, joined, use_threads
from fomoe_ext.outer.codec import get_codec, hash_bits
from fomoe_ext.outer.groups import SiteGroup, SiteGroups
from fomoe_ext.outer.jobs import Feedback, MeanJob
from fomoe_ext.outer.layout import Layout, Piece
from fomoe_ext.outer.reduce import run_jobs
from fomoe_ext.placement import wire

GLOO = {"gloo fp32": torch.float32, "gloo bf16": torch.bfloat16}
METHODS = ("gloo fp32", "gloo bf16", "fp32", "bf16", "int8", "int4", "topk")
BUCKET_BYTES = 1 << 22  # as in OuterOptions
WARM_UP = 1 << 18  # elements of the run that opens connections
TIMEOUT_S = 300.0


def gloo_bytes(numel: int, sites: int, dtype: torch.dtype) -> int:
    """What a site sends in Gloo's ring: every element but its own part, twice."""
    return 2 * (sites - 1) * numel * dtype.itemsize // sites


class Ours:
    """A meeting's mean of one vector, in place; a call returns the bytes sent."""

    def __init__(self, group: SiteGroup, site: int, codec: str, values: Tensor) -> None:
        wanted = get_codec(codec)
        layout = Layout(group, [Piece("vector", values, None, group.owners, group.owners)])
        feedback = Feedback(layout, wanted, BUCKET_BYTES, wanted=True)
        for kept in (feedback.own, feedback.shares):
            if kept is not None:
                kept.zero_()  # as in a job, its memory is there before the first meeting
        self.job = MeanJob(layout, site, wanted, lambda piece: piece.tensor, feedback=feedback)

    def __call__(self) -> int:
        return run_jobs([self.job], BUCKET_BYTES)


class Gloo:
    """all_reduce of one vector over the default group, as fp32 or by way of bf16, and the division
    by the number of sites; a call returns the bytes sent."""

    def __init__(self, groups: SiteGroups, dtype: torch.dtype, values: Tensor) -> None:
        self.link, self.sites = groups.link, groups.num_sites
        self.dtype, self.values = dtype, values

    def __call__(self) -> int:
        sent = gloo_bytes(self.values.numel(), self.sites, self.dtype)
        # Where the kernel does not shape the link its delays are counted, for Gloo as for us.
        until = self.link.send(sent) if self.link else 0.0
        there = self.values.to(self.dtype)
        dist.all_reduce(there)
        if self.link:
            self.link.wait(self.link.ended(until))
        self.values.copy_(there.div_(self.sites))
        return sent


def make_method(name: str, groups: SiteGroups, values: Tensor) -> Callable[[], int]:
    """Averages `values` over all sites; ValueError for a name neither in GLOO nor a codec's."""
    if name in GLOO:
        return Gloo(groups, GLOO[name], values)
    return Ours(groups.group(groups.everyone), groups.site, name, values)


def all_equal(values: Tensor) -> bool:
    """Whether all sites hold the same bits."""
    hashes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, hash_bits([values]))
    return all(one == hashes[0] for one in hashes)


def seconds_of_slowest(own: Sequence[float]) -> list[float]:
    """By round, from this site's."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(own))
    return [max(times) for times in zip(*everyone, strict=True)]


def measure(
    groups: SiteGroups, names: Sequence[str], numel: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Of each method: `seconds` of the slowest site and `cpu_seconds` of this one by round,
    `bytes_sent` by this site, the relative `error` of the mean against Gloo's in fp32 (with two
    sites exact but for one rounding), and whether all sites had `equal_bits`; of the first round.
    """
    generator = torch.Generator().manual_seed(groups.site)
    given = torch.randn(numel, generator=generator)
    small = given[:WARM_UP].clone()
    for name in names:
        make_method(name, groups, small)()
    exact, buffer = given.clone(), given.clone()
    Gloo(groups, torch.float32, exact)()
    found: dict[str, dict[str, Any]] = {n: {"seconds": [], "cpu_seconds": []} for n in names}
    for number in range(rounds):
        for name in names:
            method = make_method(name, groups, buffer)  # one at a time: errors fill much memory
            buffer.copy_(given)
            facts = found[name]
            dist.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            facts["bytes_sent"] = method()
            facts["seconds"].append(time.perf_counter() - start)
            facts["cpu_seconds"].append(time.process_time() - cpu)
            if number == 0:
                facts["error"] = normalised_error(buffer, exact)
                facts["equal_bits"] = all_equal(buffer)
    for facts in found.values():
        facts["seconds"] = seconds_of_slowest(facts["seconds"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=1 << 24)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=(*GLOO, *wire.CODECS))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    world = find_world(int(os.environ.get("WORLD_SIZE", "1")))
    use_threads(0, world)
    with joined(world, TIMEOUT_S):
        groups = SiteGroups(world.num_sites, world.site, TIMEOUT_S)
        methods = measure(groups, given.methods, given.numel, given.rounds)
        if world.site == 0:
            facts = {
                "sites": world.num_sites,
                "numel": given.numel,
                "link": groups.link_words,
                "threads": torch.get_num_threads(),
                "methods": methods,
            }
            given.out.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
