"""One site of the benchmark of the all-reduce; bench_outer_allreduce.py starts it.

    python -m fomoe_ext.link --sites 2 --link 200mbit -- python bench/outer_site.py --out FILE

It averages one fp32 vector over all sites: with every codec as in a meeting, with error feedback;
and with Gloo's all_reduce in fp32 and bf16. Every round times all methods in turn; the time of a
round is that of the slowest site. Site 0 writes the results to FILE.
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
    """Bytes that a site sends in Gloo's ring: all elements but its own part, twice."""
    return 2 * (sites - 1) * numel * dtype.itemsize // sites


class Ours:
    """Averages one vector in place as a meeting does; a call returns the bytes sent."""

    def __init__(self, group: SiteGroup, site: int, codec: str, values: Tensor) -> None:
        wanted = get_codec(codec)
        layout = Layout(group, [Piece("vector", values, None, group.owners, group.owners)])
        feedback = Feedback(layout, wanted, BUCKET_BYTES, wanted=True)
        for kept in (feedback.own, feedback.shares):
            if kept is not None:
                kept.zero_()  # allocates its memory, as a job does before the first meeting
        self.job = MeanJob(layout, site, wanted, lambda piece: piece.tensor, feedback=feedback)

    def __call__(self) -> int:
        return run_jobs([self.job], BUCKET_BYTES)


class Gloo:
    """Averages one vector with all_reduce over the default group, in fp32 or cast to bf16; a call
    returns the bytes sent."""

    def __init__(self, groups: SiteGroups, dtype: torch.dtype, values: Tensor) -> None:
        self.link, self.sites = groups.link, groups.num_sites
        self.dtype, self.values = dtype, values

    def __call__(self) -> int:
        sent = gloo_bytes(self.values.numel(), self.sites, self.dtype)
        # If the operating system does not shape the link, its delay is added here, as in ours.
        until = self.link.send(sent) if self.link else 0.0
        there = self.values.to(self.dtype)
        dist.all_reduce(there)
        if self.link:
            self.link.wait(self.link.ended(until))
        self.values.copy_(there.div_(self.sites))
        return sent


def make_method(name: str, groups: SiteGroups, values: Tensor) -> Callable[[], int]:
    """A call that averages `values` over all sites. ValueError if `name` is neither in GLOO nor a
    codec."""
    if name in GLOO:
        return Gloo(groups, GLOO[name], values)
    return Ours(groups.group(groups.everyone), groups.site, name, values)


def all_equal(values: Tensor) -> bool:
    """Whether all sites hold the same bits."""
    hashes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, hash_bits([values]))
    return all(one == hashes[0] for one in hashes)


def seconds_of_slowest(own: Sequence[float]) -> list[float]:
    """Seconds of the slowest site in each round; `own`: those of this site."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(own))
    return [max(times) for times in zip(*everyone, strict=True)]


def measure(
    groups: SiteGroups, names: Sequence[str], numel: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """For each method, by round: `seconds` of the slowest site and `cpu_seconds` of this site. Also
    `bytes_sent` by this site and, for the first round, the relative `error` of the mean and whether
    all sites have `equal_bits`. The error is that against Gloo in fp32.
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
            method = make_method(
                name, groups, buffer
            )  # one at a time: the error feedback needs much memory
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
    parser.add_argument("--numel", type=int, default=1 << 24, help="values in the vector")
    parser.add_argument("--rounds", type=int, default=1, help="rounds to time")
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
