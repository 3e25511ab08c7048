"""compact on every device against its definition, exactly: tables, offsets and tile schedule."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_ext import ops

int32 = lambda values: torch.tensor(values, dtype=torch.int32)


def residents_of(num_experts, resident):
    index = torch.full((num_experts,), -1, dtype=torch.int32)
    index[torch.tensor(resident, dtype=torch.long)] = torch.arange(len(resident), dtype=torch.int32)
    return index


def run(device, experts, index, num_resident, tile_rows):
    on = lambda t: t.to(device.tensors)
    table = device.op("compact")(on(experts), on(index), num_resident, tile_rows)
    return ops.RowTable(*(t.cpu() for t in table))


def check(device, experts, index, num_resident, tile_rows, wanted=None):
    got = run(device, experts, index, num_resident, tile_rows)
    wanted = wanted or reference.compact(experts, index, num_resident, tile_rows)
    for name, mine, want in zip(got._fields, got, wanted, strict=True):
        assert mine.dtype == torch.int32, name
        assert torch.equal(mine, want), name


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_matches_definition(device, data):
    num_experts = data.draw(st.integers(1, 40), label="experts")
    tokens = data.draw(st.sampled_from([0, 1, 2, 5, 17, 41, 97]), label="tokens")
    top_k = data.draw(st.integers(1, min(num_experts, 9)), label="top_k")
    resident = data.draw(
        st.lists(st.integers(0, num_experts - 1), unique=True, max_size=num_experts),
        label="resident",
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20), label="seed"))
    experts = torch.randint(-1, num_experts, (tokens, top_k), generator=generator)
    load = data.draw(st.sampled_from(["even", "one hot", "few", "none"]), label="load")
    if load == "one hot":
        experts[torch.rand(tokens, top_k, generator=generator) < 0.8] = num_experts - 1
    elif load == "few":
        experts %= 3
        experts = experts.clamp(max=num_experts - 1)
    elif load == "none":
        experts[:] = -1
    tile_rows = data.draw(st.sampled_from([0, 1, 4, 64]), label="tile rows")
    index = residents_of(num_experts, resident)
    check(device, experts.to(torch.int32), index, len(resident), tile_rows)


@pytest.mark.parametrize(
    "tokens, top_k, num_experts, num_resident",
    [
        (2048, 1, 64, 64),  # one tile of slots to the last
        (2049, 1, 64, 32),
        (1031, 4, 128, 97),  # tiles that end within a token
        (1500, 8, 256, 130),
        (700, 6, 1024, 1024),  # as many residents as there may be
        (5000, 2, 7, 1),
    ],
)
def test_several_blocks(device, tokens, top_k, num_experts, num_resident):
    generator = torch.Generator().manual_seed(tokens)
    experts = torch.randint(-1, num_experts, (tokens, top_k), generator=generator).to(torch.int32)
    index = residents_of(num_experts, list(range(num_experts - num_resident, num_experts)))
    wanted = ops.compact(experts, index, num_resident, 128)
    check(device, experts, index, num_resident, 128, wanted)


def test_ids_out_of_range_count_as_skipped(device):
    """On CUDA nothing is read back to check them."""
    if device.name == "cpu":
        pytest.skip("the CPU op raises: test_compact.py")
    table = run(device, int32([[0, 7], [-5, 1], [2, 1]]), int32([0, 1, 9]), 2, 2)
    assert table.row_of_slot.tolist() == [[0, -1], [-1, 1], [-1, 2]]
    assert table.offsets.tolist() == [0, 1, 3]
    assert table.tiles.tolist() == [[1, 1], [0, 0], [-1, -1], [-1, -1], [-1, -1]]


def test_limit_is_named(device):
    if device.name == "cpu":
        pytest.skip("the CPU kernel has none")
    index = torch.arange(1025, dtype=torch.int32, device=device.tensors)
    experts = torch.zeros(1, 1, dtype=torch.int32, device=device.tensors)
    with pytest.raises(ValueError, match=r"num_resident must be at most 1024.*, got 1025"):
        device.op("compact")(experts, index, 1025, 0)


def test_heavy_groups_come_first(device):
    """A schedule by hand: 3, 0, 5 and 5 rows in tiles of 2."""
    experts = int32([[0]] * 3 + [[2]] * 5 + [[3]] * 5)
    table = run(device, experts, int32([0, 1, 2, 3]), 4, 2)
    rows = [[2, 3], [2, 5], [2, 7], [3, 8], [3, 10], [3, 12], [0, 0], [0, 2]]
    assert table.tiles.tolist() == [*rows, [-1, -1], [-1, -1]]
