"""Codecs of the outer all-reduce: time of encoding, of summing, and of both in one kernel; errors.

The lower bound on time ("floor") is the bytes that must be read and written over the bandwidth of a
copy in the same rounds. Rivals have one scale per tensor or chunk; finding it is part of their
time. Where a rival has no fused operation, plain torch ops do the rest.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import common
import machine
import outer_cases
import pytest
import torch
from outer_cases import CODECS, VERBS, Work, least_bytes, mean_errors, rivals_of, site_deltas
from torch import Tensor

from fomoe_ext.ops import native
from fomoe_ext.outer.codec import Codec

DEVICE = "cuda" if native.cuda_loaded else "cpu"
NUMEL = 1 << 24
ROUNDS = 5
ERROR_SITES, ERROR_ROWS, ERROR_WIDTH = 8, 1024, 1024


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("verb", VERBS)
def test_outer_codec(benchmark: Any, verb: str, codec: str) -> None:
    """One verb of one codec with 16M values. Sums are over four members."""
    torch.cuda.empty_cache()
    work = Work.make(Codec(codec), NUMEL, DEVICE)
    rivals, absent = rivals_of(codec, DEVICE)
    source = work.given[0]
    target = torch.empty_like(source)
    ours = work.ours(verb)
    calls = {"ours": ours, "copy": common.copying(source, target, DEVICE)}
    calls |= {rival.name: work.theirs(verb, rival) for rival in rivals}
    watch = machine.Watch(DEVICE)
    seconds = common.interleaved_seconds(calls, DEVICE, ROUNDS)
    benchmark.pedantic(ours, rounds=3)
    bandwidth = 2 * source.nbytes / seconds.pop("copy")
    floor = least_bytes(verb, work.codec, NUMEL) / bandwidth
    own = seconds.pop("ours")
    result = {
        "verb": verb,
        "codec": codec,
        "seconds": own,
        "memory_floor_seconds": floor,
        "fraction_of_floor": floor / own,
        "copy_bytes_per_second": bandwidth,
        "copy_call": common.COPY_CALLS[DEVICE],
        "rivals": seconds,
        "absent": absent,
        "load": outer_cases.load(),
    }
    facts = watch.facts()
    benchmark.extra_info.update(result, machine=facts)
    outer_cases.codec_results.append({**result, **facts})


@cache
def deltas() -> Tensor:
    return site_deltas(ERROR_SITES, ERROR_ROWS, ERROR_WIDTH)


@pytest.mark.parametrize("codec", CODECS)
def test_outer_error_of_mean(benchmark: Any, codec: str) -> None:
    """Relative L2 error of the mean of 8 sites without error feedback: ours and a ring's."""
    errors = benchmark.pedantic(lambda: mean_errors(Codec(codec), deltas()), rounds=1)
    benchmark.extra_info.update(errors, sites=ERROR_SITES)
    outer_cases.error_results.append({"codec": codec, **errors})
