"""A site sends a payload that no encoder makes: the error names it, and nothing is applied."""

from __future__ import annotations

import pytest
from sites import pool
from torch import Tensor
from vector_job import VectorJob, contribution

from fomoe_ext.outer.groups import SiteGroups
from fomoe_ext.outer.reduce import Damaged, run_jobs

NUMEL = 300


class HostileJob(VectorJob):
    """Its payloads begin with bytes that are NaN in every format, and have the right hash."""

    def encode(self, start: int, stop: int, payload: Tensor) -> None:
        super().encode(start, stop, payload)
        payload.view(-1)[: min(4, payload.numel())] = 255


def hostile_sum(site: int, num_sites: int, codec: str, summed: bool) -> str:
    groups = SiteGroups(num_sites, site, timeout_s=20)
    kind = HostileJob if site == 1 else VectorJob
    group = groups.group(groups.everyone)
    job = kind(group, codec, contribution(groups.everyone, site, NUMEL), summed)
    try:
        run_jobs([job], 4096)
    except Damaged as error:
        assert not bool(job.writes.any())
        return str(error)
    except RuntimeError:  # the other one has gone
        return "alone"
    return ""


@pytest.mark.parametrize(
    ("codec", "summed"),
    [*((c, True) for c in ("fp32", "bf16", "int8", "int4", "int2", "topk")), ("fp32", False)],
)
def test_a_site_that_sends_nan_is_named(codec, summed):
    told = pool().run(2, hostile_sum, codec, summed)[0]
    assert told.startswith(f"the payloads of site 1 for elements 0 .. {NUMEL - 1} of the sites")
    assert "is NaN or infinite" in told
