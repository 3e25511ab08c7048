"""What the benchmark of dispatching tokens compares gives the same results."""

from __future__ import annotations

from typing import Any

import pytest
from common import Shape
from dispatch_site import Work
from sites import pool
from torch.distributed.device_mesh import init_device_mesh

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
