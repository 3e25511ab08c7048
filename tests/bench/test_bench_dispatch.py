"""What the benchmark of dispatching tokens compares gives the same results."""

from __future__ import annotations

from typing import Any

import pytest
from common import Shape
from dispatch_site import Skewed, Work
from sites import pool
from torch.distributed.device_mesh import init_device_mesh

from fomoe_ext.placement.spread import imbalance, spread_experts

pytestmark = pytest.mark.usefixtures("one_thread")


def benchmarked(rank: int, ranks: int, skipped: float) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("expert",))
    work = Work(mesh, Shape(24, 16, 8, 8, 2), skipped)
    work.check()  # padded, in plain torch, with places for all: forward and backward
    index = work.dispatches["ours"].resident_index[work.chosen.long()]
    found = {way: work.bytes_sent(way) for way in ("ours", "unskipped", "padded")}
    work.padded.capacity = 1
    work.forward("padded", "layer")
    kept = index[index >= 0].unique().numel()
    wanted = 1 - kept / (index >= 0).sum().item()
    return found | {"dropped": work.padded.dropped, "wanted": wanted}


@pytest.mark.parametrize("skipped", [0.0, 0.5, 0.75])
def test_sharded_benchmark_compares_layers_that_agree(skipped: float) -> None:
    residents = round(8 * (1 - skipped))
    for found in pool().run(2, benchmarked, skipped):
        # 1.25 times 6 slots an expert, rounded up; to one other rank, four times, in fp32.
        assert found["padded"] == 4 * (residents // 2) * 8 * 16 * 4
        assert found["dropped"] == pytest.approx(found["wanted"])
        if skipped:
            assert 0 < found["ours"] < found["unskipped"]
        else:
            assert found["ours"] == found["unskipped"] > 0


def cut_by_load(rank: int, ranks: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("expert",))
    work = Skewed(mesh, Shape(24, 16, 8, 8, 2))
    work.check()  # both cuts, forward and backward
    cuts = {cut: dispatch.rank_experts for cut, dispatch in work.dispatches.items()}
    return {"load": work.load, "sent": {cut: work.bytes_sent(cut) for cut in cuts}, **cuts}


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_benchmark_compares_cuts_of_one_load(ranks: int) -> None:
    first, *others = pool().run(ranks, cut_by_load)
    assert all(found == first for found in others)
    assert sum(first["load"]) == ranks * 24 * 2
    assert first["chunks"] == spread_experts(range(8), ranks)
    assert imbalance(first["spread"], first["load"]) < imbalance(first["chunks"], first["load"])
    assert all(sent > 0 for sent in first["sent"].values())
