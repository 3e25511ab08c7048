"""One rank of the benchmark of the dispatch inside a site; bench_dispatch.py starts it.

    python -m fomoe_ext.link --sites 2 -- python bench/dispatch_site.py --out FILE

There are three ways to send rows to the ranks that hold their experts, and back:

    ours       rows of slots whose expert is resident on the site, as in MoELayer
    unskipped  rows of all slots; those of absent experts are sent but not computed
    padded     a fixed capacity per expert and rank, `CAPACITY` times the mean load; slots beyond it
               are dropped (GShard, arXiv 2006.16668); in plain torch

Each is timed twice, forward and backward: the exchange alone, with the rows as results, and with
the experts. Every round times all of them in turn; its time is that of the slowest rank. Rank 0
writes the results to FILE.

With --skewed the most popular experts have neighbouring ids, and two ways to assign experts to
ranks are compared:

    chunks     neighbouring ids on each rank, the default of MoELayer
    spread     balanced by load, measured with other tokens of the same router
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import Shape, dense_rate, normalised_error, seconds_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fomoe_ext import ops
from fomoe_ext.launch.world import find_world, joined, use_threads
from fomoe_ext.layer.dispatch import DIRECTIONS, Dispatch, ExpertAxis, make_dispatch
from fomoe_ext.layer.experts import Experts
from fomoe_ext.placement.spread import chunk_sizes, imbalance, spread_experts

WAYS = ("ours", "unskipped", "padded")
PARTS = ("exchange", "layer")
SHAPE = Shape(1024, 512, 256, 32, 4)
SKIPPED = (0.0, 0.5, 0.75)
CAPACITY = 1.25
CUTS = ("chunks", "spread")
SKEW = 1.0
"""Logits have deviation 1; those of expert e have a mean of -SKEW * log(1 + e)."""
CHECKED = 48
"""Tokens per rank with which all ways are compared before they are timed."""
DENSE = 512
"""Size of the square matmul that gives a rank's share of the machine's rate."""
LINK_BYTES = 1 << 24
"""Bytes that ranks exchange to measure their bandwidth."""
TIMEOUT_S = 120.0


class Echo(nn.Module):
    """Stands in for the experts: returns the rows unchanged."""

    def forward(
        self, x: Tensor, weights: Tensor, experts: Tensor, index: Tensor
    ) -> tuple[Tensor, ops.RowTable]:
        return x * 1.0, ops.compact(experts, index, index.shape[0])


class ResidentOnly(nn.Module):
    """A rank's experts if rows of absent ones arrive too: computes only those that are resident."""

    def __init__(self, experts: Experts, chunk: Sequence[int]) -> None:
        super().__init__()
        self.experts, self.chunk = experts, torch.tensor(chunk)

    def forward(
        self, x: Tensor, weights: Tensor, experts: Tensor, index: Tensor
    ) -> tuple[Tensor, ops.RowTable]:
        return self.experts(x, weights, experts, self.experts.resident_index[self.chunk])


# ---- the padded exchange -------------------------------------------------------------------------


class _EvenExchange(torch.autograd.Function):
    """all_to_all of equal parts; the backward pass is the same exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: ExpertAxis) -> Tensor:
        ctx.axis = axis
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x.contiguous(), group=axis.group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _EvenExchange.apply(grad, ctx.axis), None


class Padded:
    """A dispatch with a fixed capacity: `capacity` rows from each rank for each resident expert.

    In plain torch. All ranks must have equally many experts.
    """

    def __init__(self, axis: ExpertAxis, index: Tensor, residents: int, capacity: int) -> None:
        self.axis, self.index, self.residents = axis, index, residents
        self.capacity, self.dropped = capacity, 0.0
        if residents % axis.size:
            raise ValueError(f"residents must be a multiple of {axis.size} ranks, got {residents}")

    def bytes_sent(self, hidden: int) -> int:
        """Bytes of one exchange to other ranks, in fp32."""
        places = self.residents // self.axis.size * self.capacity
        return (self.axis.size - 1) * places * hidden * 4

    def places(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the slots within the capacity, and the position of each in the buffer."""
        expert = self.index[chosen.long()].flatten()
        slots = (expert >= 0).nonzero().squeeze(1)
        expert = expert[slots].long()
        position = F.one_hot(expert, self.residents).cumsum(0).gather(1, expert[:, None])[:, 0] - 1
        kept = position < self.capacity
        self.dropped = 1 - kept.float().mean().item() if len(kept) else 0.0
        return slots[kept], (expert * self.capacity + position)[kept]

    def __call__(
        self, x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts | None
    ) -> Tensor:
        slots, place = self.places(chosen)
        token, ranks, width = slots // chosen.shape[1], self.axis.size, x.shape[1]
        sent = x.new_zeros(self.residents * self.capacity, width).index_copy(0, place, x[token])
        rows = _EvenExchange.apply(sent, self.axis)
        rows = rows.view(ranks, self.residents // ranks, self.capacity, width).transpose(0, 1)
        rows = rows.reshape(self.residents // ranks, -1, width)
        rows = rows * 1.0 if experts is None else self.compute(rows, experts)
        rows = rows.view(self.residents // ranks, ranks, self.capacity, width).transpose(0, 1)
        results = _EvenExchange.apply(rows.reshape(-1, width), self.axis)[place]
        scaled = results * weights.flatten()[slots, None]
        return torch.zeros_like(x).index_add(0, token, scaled)

    @staticmethod
    def compute(rows: Tensor, experts: Experts) -> Tensor:
        gate, up = torch.bmm(rows, experts.expand_weight.transpose(1, 2)).chunk(2, dim=2)
        return torch.bmm(F.silu(gate) * up, experts.contract_weight.transpose(1, 2))


# ---- one case ------------------------------------------------------------------------------------


class Work:
    """Inputs of a rank and all ways to dispatch them; a fraction of the slots is skipped."""

    def __init__(self, mesh: DeviceMesh, shape: Shape, skipped: float, seed: int = 0) -> None:
        every = round(1 / (1 - skipped))
        residents = tuple(range(0, shape.experts, every))
        self.axis, self.shape = ExpertAxis(mesh), shape
        generator = torch.Generator().manual_seed(seed + self.axis.rank)
        draw = lambda *sizes: torch.randn(*sizes, generator=generator)
        self.x = draw(shape.tokens, shape.hidden).requires_grad_()
        self.grad = draw(shape.tokens, shape.hidden)
        weights, self.chosen = ops.route(draw(shape.tokens, shape.experts), shape.top_k)
        self.weights = weights.requires_grad_()
        dispatches = [
            make_dispatch(mesh, ids, shape.experts, shape.hidden)
            for ids in (residents, range(shape.experts))
        ]
        if None in dispatches:
            raise ValueError("mesh must have more than one rank, got 1")
        self.dispatches: dict[str, Dispatch] = dict(zip(WAYS, dispatches, strict=False))
        ours, unskipped = dispatches
        sizes = (shape.hidden, shape.expert, shape.experts)
        self.experts = Experts(*sizes, resident_experts=ours.own_experts)
        # Each chunk of all experts has the same resident ones as the chunk of residents alone.
        self.of_all = ResidentOnly(self.experts, unskipped.own_experts)
        capacity = math.ceil(CAPACITY * shape.tokens * shape.top_k / shape.experts)
        index = ours.resident_index
        self.padded = Padded(self.axis, index, len(residents), capacity)
        self.lossless = Padded(self.axis, index, len(residents), shape.tokens)
        self.rows = 0

    def forward(self, way: str, part: str) -> Tensor:
        """y [T, D]. One more way is "lossless": padded, with a capacity that drops nothing."""
        inputs = (self.x, self.weights, self.chosen)
        if way not in self.dispatches:
            padded = self.lossless if way == "lossless" else self.padded
            return padded(*inputs, self.experts if part == "layer" else None)
        experts: nn.Module = Echo()
        if part == "layer":
            experts = self.experts if way == "ours" else self.of_all
        y, _, _, computed = self.dispatches[way](*inputs, experts)
        if (way, part) == ("ours", "layer"):
            self.rows = int(computed[-1])
        return y

    def run(self, way: str, part: str) -> None:
        """One forward and backward pass."""
        self.forward(way, part).backward(self.grad)
        for leaf in self.leaves:
            leaf.grad = None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.weights, *self.experts.parameters()]

    def bytes_sent(self, way: str) -> int:
        """Bytes that this rank sends in the four exchanges of a forward and backward pass."""
        if way == "padded":
            return 4 * self.padded.bytes_sent(self.shape.hidden)
        sent = self.dispatches[way].bytes_sent
        before = sum(sent[name] for name in DIRECTIONS)
        self.run(way, "exchange")
        return sum(sent[name] for name in DIRECTIONS) - before

    def check(self) -> None:
        """Checks that all ways give the same results and gradients if nothing is dropped."""
        found: dict[str, list[Tensor]] = {}
        for way in ("ours", "unskipped", "lossless"):
            y = self.forward(way, "layer")
            grads = list(torch.autograd.grad(y, self.leaves, self.grad))
            if way == "lossless":  # the gradient of a sum of losses, not of their mean
                grads[2:] = [grad / self.axis.size for grad in grads[2:]]
            found[way] = [y, *grads]
        for way in ("unskipped", "lossless"):
            for mine, theirs in zip(found["ours"], found[way], strict=True):
                if not (error := normalised_error(theirs, mine)) < 1e-5:
                    raise AssertionError(f"{way} has another result: relative error {error:.1e}")


# ---- hot experts ---------------------------------------------------------------------------------


class Skewed:
    """Inputs of a rank whose router prefers the first experts; layers with chunks and spread."""

    def __init__(self, mesh: DeviceMesh, shape: Shape, seed: int = 0) -> None:
        self.axis, self.shape = ExpertAxis(mesh), shape
        generator = torch.Generator().manual_seed(seed + self.axis.rank)
        draw = lambda *sizes: torch.randn(*sizes, generator=generator)
        hot = -SKEW * torch.arange(1, shape.experts + 1).log()
        self.x = draw(shape.tokens, shape.hidden).requires_grad_()
        self.grad = draw(shape.tokens, shape.hidden)
        weights, self.chosen = ops.route(draw(shape.tokens, shape.experts) + hot, shape.top_k)
        self.weights = weights.requires_grad_()
        # As in a training run, the load was measured earlier, with other tokens.
        earlier = ops.route(draw(shape.tokens, shape.experts) + hot, shape.top_k)[1]
        experts = range(shape.experts)
        cuts = (None, spread_experts(experts, self.axis.size, self.load_of(earlier)))
        self.load = self.load_of(self.chosen)
        sizes = (shape.hidden, shape.expert, shape.experts)
        self.dispatches: dict[str, Dispatch] = {}
        self.experts: dict[str, Experts] = {}
        for cut, groups in zip(CUTS, cuts, strict=True):
            dispatch = make_dispatch(
                mesh, experts, shape.experts, shape.hidden, rank_experts=groups
            )
            if dispatch is None:
                raise ValueError("mesh must have more than one rank, got 1")
            self.dispatches[cut] = dispatch
            self.experts[cut] = Experts(*sizes, resident_experts=dispatch.own_experts)

    def load_of(self, chosen: Tensor) -> list[int]:
        """Number of slots of each expert, over all ranks."""
        load = chosen.flatten().bincount(minlength=self.shape.experts)
        dist.all_reduce(load)
        return load.tolist()

    def forward(self, cut: str) -> tuple[Tensor, int]:
        """y [T, D] and the number of rows computed here."""
        inputs = (self.x, self.weights, self.chosen)
        y, _, _, rows = self.dispatches[cut](*inputs, self.experts[cut])
        return y, int(rows[-1])

    def run(self, cut: str) -> None:
        """One forward and backward pass."""
        self.forward(cut)[0].backward(self.grad)
        for leaf in (self.x, self.weights, *self.experts[cut].parameters()):
            leaf.grad = None

    def bytes_sent(self, cut: str) -> int:
        """Bytes of a forward and backward pass, from the rank that sends most."""
        sent = self.dispatches[cut].bytes_sent
        before = sum(sent[name] for name in DIRECTIONS)
        self.run(cut)
        return int(largest(sum(sent[name] for name in DIRECTIONS) - before))

    def check(self) -> None:
        """Checks that both give the same results, and compute as many rows as the load says."""
        found: list[list[Tensor]] = []
        for cut in CUTS:
            y, rows = self.forward(cut)
            groups = self.dispatches[cut].rank_experts
            if rows != sum(self.load[expert] for expert in groups[self.axis.rank]):
                raise AssertionError(f"{cut}: rows must be those of {groups}, got {rows} rows")
            found.append([y, *torch.autograd.grad(y, [self.x, self.weights], self.grad)])
        for mine, theirs in zip(*found, strict=True):
            if not (error := normalised_error(theirs, mine)) < 1e-5:
                raise AssertionError(f"spread has another result: relative error {error:.1e}")


def measure_skewed(mesh: DeviceMesh, shape: Shape, rounds: int) -> dict[str, Any]:
    """Figures of chunks and spread: seconds, CPU seconds of the busiest rank, bytes, and the
    largest number of rows of a rank over the mean. The floor assumes equally many rows per rank.
    """
    Skewed(mesh, replace(shape, tokens=CHECKED)).check()
    work = Skewed(mesh, shape)
    work.check()
    seconds: dict[str, list[float]] = {cut: [] for cut in CUTS}
    busy: dict[str, list[float]] = {cut: [] for cut in CUTS}
    links, rates = [], []
    for number in range(rounds + 1):  # the first is the warm-up
        links.append(link_rate(work.axis))
        rates.append(2 * DENSE**3 / timed(lambda: dense_rate(torch.float32, DENSE)))
        for cut in CUTS:
            before = time.process_time()
            took = timed(lambda cut=cut: work.run(cut))
            used = largest(time.process_time() - before)
            if number:
                seconds[cut].append(took)
                busy[cut].append(used)
    rows = sum(work.load) / work.axis.size
    flops = 3 * rows * 6 * shape.hidden * shape.expert
    return {
        "hottest_share": max(work.load) / sum(work.load),
        "compute_floor_seconds": flops / max(rates),
        "link_bytes_per_second": max(links),
        "dense_flops_per_second": max(rates),
        "cuts": {
            cut: {
                "layer_seconds": median(seconds[cut]),
                "busiest_cpu_seconds": median(busy[cut]),
                "bytes_sent": (sent := work.bytes_sent(cut)),
                "link_floor_seconds": sent / max(links),
                "largest_rows_over_mean": imbalance(work.dispatches[cut].rank_experts, work.load),
            }
            for cut in CUTS
        },
    }


# ---- time ----------------------------------------------------------------------------------------


def largest(value: float) -> float:
    """The maximum over all ranks."""
    number = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return float(number)


def timed(run: Callable[[], Any]) -> float:
    """Seconds of the slowest rank; all start together."""
    dist.barrier()
    return largest(seconds_of(run))


def link_rate(axis: ExpertAxis) -> float:
    """Bytes per second that a rank sends to others in an all_to_all of equal parts."""
    sent = torch.zeros(LINK_BYTES // axis.size * axis.size, dtype=torch.uint8)
    received = torch.empty_like(sent)
    swap = lambda: dist.all_to_all_single(received, sent, group=axis.group)
    return LINK_BYTES * (axis.size - 1) / axis.size / timed(swap)


def measure(mesh: DeviceMesh, shape: Shape, skipped: float, rounds: int) -> dict[str, Any]:
    """Seconds of each way, for the exchange and the layer; bytes, rates, floors of this rank."""
    Work(mesh, replace(shape, tokens=CHECKED), skipped).check()
    work = Work(mesh, shape, skipped)
    runs = {
        f"{way} {part}": lambda way=way, part=part: work.run(way, part)
        for way in WAYS
        for part in PARTS
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    links, rates = [], []
    for number in range(rounds + 1):  # the first is the warm-up
        links.append(link_rate(work.axis))
        rates.append(2 * DENSE**3 / timed(lambda: dense_rate(torch.float32, DENSE)))
        for name, run in runs.items():
            took = timed(run)
            if number:
                seconds[name].append(took)
    flops = 3 * work.rows * 6 * shape.hidden * shape.expert
    link, rate = max(links), max(rates)
    ways = {
        way: {
            "bytes_sent": (sent := work.bytes_sent(way)),
            "link_floor_seconds": sent / link,
            **{f"{part}_seconds": median(seconds[f"{way} {part}"]) for part in PARTS},
        }
        for way in WAYS
    }
    load = work.dispatches["ours"].resident_index[work.chosen.long()]
    return {
        "skipped": float((load < 0).float().mean()),
        "dropped": work.padded.dropped,
        "rows": work.rows,
        "flops": flops,
        "compute_floor_seconds": flops / rate,
        "link_bytes_per_second": link,
        "dense_flops_per_second": rate,
        "ways": ways,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds to time")
    parser.add_argument("--tokens", type=int, default=SHAPE.tokens, help="tokens per rank")
    parser.add_argument("--skewed", action="store_true", help="compare chunks with spread")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    given = parser.parse_args()
    world = find_world(int(os.environ.get("WORLD_SIZE", "1")))
    use_threads(0, world)
    shape = replace(SHAPE, tokens=given.tokens)
    if world.num_sites < 2 or chunk_sizes(8, world.num_sites)[-1] * world.num_sites != 8:
        parser.error(f"the number of processes must be 2, 4 or 8, got {world.num_sites}")
    with joined(world, TIMEOUT_S):
        mesh = init_device_mesh("cpu", (world.num_sites,), mesh_dim_names=("expert",))
        if given.skewed:
            cases = [measure_skewed(mesh, shape, given.rounds)]
        else:
            cases = [measure(mesh, shape, skipped, given.rounds) for skipped in SKIPPED]
        if world.site == 0:
            facts = {
                "ranks": world.num_sites,
                "shape": str(shape),
                "threads": torch.get_num_threads(),
                "cases": cases,
            }
            given.out.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
