"""compact against its definition, exactly; every slot accounted for."""

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


def check(experts, resident_index, num_resident):
    table = ops.compact(experts, resident_index, num_resident)
    wanted = reference.compact(experts, resident_index, num_resident)
    for name, got, want in zip(table._fields, table, wanted, strict=True):
        assert got.dtype == torch.int32, name
        assert torch.equal(got, want), name


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_matches_definition(data):
    num_experts = data.draw(st.integers(1, 20), label="experts")
    tokens = data.draw(st.integers(0, 40), label="tokens")
    top_k = data.draw(st.integers(1, num_experts), label="top_k")
    resident = data.draw(
        st.lists(st.integers(0, num_experts - 1), unique=True, max_size=num_experts)
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20), label="seed"))
    hot = data.draw(st.booleans(), label="one hot expert")
    experts = torch.randint(-1, num_experts, (tokens, top_k), generator=generator)
    if hot:
        experts[torch.rand(tokens, top_k, generator=generator) < 0.8] = num_experts - 1
    check(experts.to(torch.int32), residents_of(num_experts, resident), len(resident))


@pytest.mark.parametrize("tokens, top_k", [(0, 4), (1, 1), (5, 1), (3, 0)])
def test_small(tokens, top_k):
    check(torch.zeros(tokens, top_k, dtype=torch.int32), int32([0]), 1)


def test_all_skipped():
    table = ops.compact(torch.full((6, 3), -1, dtype=torch.int32), int32([0, -1]), 1)
    assert table.offsets.tolist() == [0, 0]
    assert (table.row_of_slot == -1).all() and (table.token_of_row == -1).all()
    none = ops.compact(int32([[0, 1]] * 4), int32([-1, -1]), 0)
    assert none.offsets.tolist() == [0] and (none.row_of_slot == -1).all()


def test_many_slots_and_threads():
    """More slots than one thread handles: the table is the same for any number of threads."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(0, 33, (20011, 3), generator=generator).to(torch.int32)
    index = residents_of(33, list(range(32, 0, -2)))
    before = torch.get_num_threads()
    try:
        tables = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            tables.append(ops.compact(experts, index, 16))
    finally:
        torch.set_num_threads(before)
    flat = experts.flatten().long()
    resident = index[flat]
    order = torch.sort(torch.where(resident >= 0, resident, 99), stable=True).indices
    rows = int((resident >= 0).sum())
    for table in tables:
        assert torch.equal(table.slot_of_row[:rows].long(), order[:rows])
        assert torch.equal(table.token_of_row[:rows].long(), order[:rows] // 3)
        assert (table.slot_of_row[rows:] == -1).all() and (table.token_of_row[rows:] == -1).all()
        computed = table.row_of_slot.flatten()[table.slot_of_row[:rows].long()]
        assert torch.equal(computed, torch.arange(rows, dtype=torch.int32))
        assert int((table.row_of_slot >= 0).sum()) == rows
        counts = torch.bincount(resident[resident >= 0].long(), minlength=16)
        assert torch.equal(table.offsets.diff().long(), counts)


def test_opcheck():
    torch.library.opcheck(
        torch.ops.fomoe.compact, (int32([[0, 2], [1, 0], [-1, 2]]), int32([1, -1, 0]), 2, 4)
    )


@pytest.mark.parametrize(
    "experts, index, num_resident, message",
    [
        (int32([0, 1]), int32([0, 1]), 2, r"experts must have shape \[\*, \*\], got \[2\]"),
        (torch.zeros(2, 2), int32([0, 1]), 2, "experts must have dtype int32.*, got float32"),
        (torch.zeros(2, 2).long(), int32([0, 1]), 2, "experts must have dtype int32.*, got int64"),
        (int32([[0, 2]]), int32([0, 1]), 2, "experts must be in -1 .. 1 .*, got a number outside"),
        (int32([[0, -2]]), int32([0, 1]), 2, "experts must be in -1 .. 1 .*, got a number outside"),
        (int32([[0, 1]]), torch.tensor([0, 1]), 2, "resident_index must have dtype .*, got int64"),
        (int32([[0, 1]]), int32([[0, 1]]), 2, "resident_index must have shape"),
        (int32([[0, 1]]), int32([0, 2]), 2, "resident_index must be in -1 .. 1, got 2 at expert 1"),
        (
            int32([[0, 1]]),
            int32([0, -5]),
            2,
            "resident_index must be in -1 .. 1, got -5 at expert 1",
        ),
        (int32([[0, 1]]), int32([0, 1]), -1, "num_resident must be in 0 .. 2.*, got -1"),
        (int32([[0, 1]]), int32([0, 1]), 3, "num_resident must be in 0 .. 2.*, got 3"),
    ],
)
def test_bad_input(experts, index, num_resident, message):
    with pytest.raises(ValueError, match=message):
        ops.compact(experts, index, num_resident)
