"""How large buckets are chosen, and what memory those under way take."""

from __future__ import annotations

import itertools

import pytest

from fomoe_ext.config.job import preset_config
from fomoe_ext.config.presets import PRESETS
from fomoe_ext.placement import buckets, wire
from fomoe_ext.placement.wire import GroupElements
from fomoe_ext.plan.sizes import sizes_of

MIB = 1 << 20


@pytest.mark.parametrize("codec", wire.CODECS)
def test_small_models_keep_the_size_that_their_results_depend_on(codec):
    """Up to 16 waves of 8 buckets of 4 MiB of fp32, and one element more has larger ones."""
    most = 16 * 8 * 4 * MIB // 4
    for elements in (0, 1, 10**6, most):
        assert buckets.chosen_bytes(elements, [codec], 8) == 4 * MIB
        assert buckets.chosen_bytes(3 * elements, [codec], 8, fragments=3) == 4 * MIB
    larger = buckets.chosen_bytes(most + 1, [codec], 8)
    assert larger == (4 if codec == "fp32" else 8) * MIB  # fp32: memory does not allow more
    for name in ("tiny", "54m"):
        trained = sizes_of(preset_config(name).model).counts.total
        assert buckets.chosen_bytes(trained, [codec], 8) == 4 * MIB


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("in_flight", [1, 8])
def test_few_waves_as_far_as_memory_allows(preset, in_flight):
    trained = sizes_of(preset_config(preset).model).counts.total
    sizes = [buckets.chosen_bytes(trained, [codec], in_flight) for codec in wire.CODECS]
    for codec, size in zip(wire.CODECS, sizes, strict=True):
        assert size % (4 * MIB) == 0 and (size & (size - 1)) == 0
        allowed = max(32 * MIB, 4 * trained // 128)
        payload = wire.wire_bytes(codec, size // 4)
        assert size == 4 * MIB or (in_flight * payload <= allowed and size <= min(allowed, 1 << 30))
        waves = -(-4 * trained // (size * in_flight))
        larger = in_flight * wire.wire_bytes(codec, 2 * size // 4) > allowed
        assert waves <= 16 or larger or 2 * size > min(allowed, 1 << 30)
        # Half of it would be too many waves.
        assert size == 4 * MIB or -(-4 * trained // (size // 2 * in_flight)) > 16
    # The widest codec of all that travel decides.
    for (one, first), (other, second) in itertools.combinations(
        zip(wire.CODECS, sizes, strict=True), 2
    ):
        assert buckets.chosen_bytes(trained, [one, other], in_flight) == min(first, second)


def test_moments_travel_in_the_same_buckets():
    assert buckets.codecs_of("diloco", "int4", ("bf16", "bf16")) == ("int4",)
    assert buckets.codecs_of("local-adamw", "int4", ("int8", "bf16")) == ("int4", "int8", "bf16")


def of(**groups: int) -> GroupElements:
    """Elements by owner set: s012=5 is 5 of the sites 0, 1 and 2."""
    return GroupElements({tuple(map(int, name[1:])): n for name, n in groups.items()}, {})


def test_memory_of_buckets_under_way():
    """By hand: buckets of 100 elements of 2 sites in fp32 have shares of 50 elements."""
    share, payload = 4 * 50, 4 * 50 + 8
    before, after = share + 2 * payload, 3 * payload
    get = buckets.buffer_bytes
    assert get([of(s01=0)], "fp32", 400, 2) == 0
    assert get([of(s0=1000)], "fp32", 400, 2) == 0  # nobody to meet
    assert get([of(s01=100)], "fp32", 400, 2) == 400 + before + after
    assert get([of(s01=1000)], "fp32", 400, 2) == 400 + 2 * (before + after)
    assert get([of(s01=1000)], "fp32", 400, 3, ranks=5) == 400 + 2 * (before + after)
    assert get([of(s01=1000)], "fp32", 400, 2, whole=True) == 400 + 10 * max(before, after)
    assert get([of(s01=100), of(s01=1000)], "fp32", 400, 2) == 400 + 2 * (before + after)
    kept = 2 + -(-2 * 12 // 8) + -(-2 * 2 // 8) + 8  # 2 of 100 values, and a hash
    assert get([of(s01=1000)], "topk", 400, 2) == 400 + 2 * (kept + 3 * kept)
