"""gather and the backward of combine on every device: copies exactly, sums against fp64."""

from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_case(tokens, hidden, top_k, dtype, skipped, seed):
    """Tokens, NaN beyond the last row, random weights, rows in a random order."""
    generator = torch.Generator().manual_seed(seed)
    slots = tokens * top_k
    computed = torch.rand(tokens, top_k, generator=generator) >= skipped
    count = int(computed.sum())
    row_of_slot = torch.full((tokens, top_k), -1, dtype=torch.int32)
    row_of_slot[computed] = torch.randperm(count, generator=generator).to(torch.int32)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    rows = torch.full((slots, hidden), float("nan"), dtype=dtype)
    rows[:count] = torch.randn(count, hidden, generator=generator).to(dtype)
    weights = torch.randn(tokens, top_k, generator=generator)
    weights[~computed] = float("nan")
    return x, rows, weights, row_of_slot, count


def spread(values, row_of_slot):
    """rows[row_of_slot[t, k]] = values[t, k], zeros elsewhere."""
    tokens, top_k, hidden = values.shape
    rows = torch.zeros(tokens * top_k, hidden, dtype=values.dtype)
    computed = row_of_slot.flatten() >= 0
    flat = values.reshape(tokens * top_k, hidden)
    rows[row_of_slot.flatten()[computed].long()] = flat[computed]
    return rows


def check(device, x, rows, weights, row_of_slot, count, with_weights=True):
    on = lambda t: None if t is None else t.to(device.tensors)
    tokens, top_k = row_of_slot.shape
    offsets = torch.tensor([0, count], dtype=torch.int32)
    gathered = device.op("gather")(on(x), on(row_of_slot), on(offsets)).cpu()
    each = x[:, None].expand(tokens, top_k, x.shape[1])
    assert torch.equal(gathered, spread(each, row_of_slot))

    grad_rows, grad_weights = device.op("combine_backward")(
        on(x), on(rows if with_weights else None), on(weights), on(row_of_slot)
    )
    wanted = (weights[..., None] * each.float()).to(x.dtype)
    assert torch.equal(grad_rows.cpu(), spread(wanted, row_of_slot))
    if not with_weights:
        assert grad_weights.shape == (0, top_k)
        return
    picked = rows[row_of_slot.clamp(min=0).long()].double().nan_to_num()
    terms = torch.where((row_of_slot >= 0)[..., None], picked * each.double(), 0.0)
    error = (grad_weights.cpu().double() - terms.sum(-1)).abs()
    assert (error <= 1e-6 * terms.abs().sum(-1) + 1e-12).all()
    assert (grad_weights.cpu()[row_of_slot < 0] == 0).all()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_matches_definition(device, data):
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    tokens = data.draw(st.sampled_from([0, 1, 2, 7, 13, 31]), label="tokens")
    hidden = data.draw(
        st.one_of(st.integers(0, 70), st.sampled_from([128, 264, 1032])), label="hidden"
    )
    top_k = data.draw(st.integers(1, 9), label="top_k")
    skipped = data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]), label="skipped")
    seed = data.draw(st.integers(0, 1 << 20), label="seed")
    check(
        device,
        *make_case(tokens, hidden, top_k, dtype, skipped, seed),
        with_weights=data.draw(st.booleans(), label="with weights"),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_storage_that_starts_anywhere(device, dtype, offset):
    """Contiguous tensors whose first element is not aligned for the widest access."""
    x, rows, weights, row_of_slot, count = make_case(11, 64, 3, dtype, 0.3, offset)
    shifted = lambda t: torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape)
    check(device, shifted(x), shifted(rows), shifted(weights), shifted(row_of_slot), count)


@pytest.mark.parametrize("hidden, top_k", [(2048, 8), (7168, 2)])
def test_shapes_of_models(device, hidden, top_k):
    check(device, *make_case(5, hidden, top_k, torch.bfloat16, 0.5, hidden))


def test_same_bits_every_time(device):
    x, rows, weights, row_of_slot, _ = make_case(40, 200, 4, torch.bfloat16, 0.2, 3)
    arguments = [t.to(device.tensors) for t in (x, rows, weights, row_of_slot)]
    first = device.op("combine_backward")(*arguments)
    for _ in range(3):
        again = device.op("combine_backward")(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("verb, hidden", [("gather", (32 << 20) + 1), ("combine", 32 << 20)])
def test_emulated_rows_beyond_32_bits(emulated, verb, hidden):
    """Elements past number 2^31 of the rows, in memory of which only two rows are touched. With an
    odd width every element is accessed by itself.
    """
    tokens, top_k = 2, 36
    slots = tokens * top_k
    assert (slots - 2) * hidden > 2**31
    x = torch.arange(tokens * hidden, dtype=torch.int32).view(tokens, hidden)
    x = (x % 251).bfloat16()
    row_of_slot = torch.full((tokens, top_k), -1, dtype=torch.int32)
    row_of_slot[0, 3], row_of_slot[1, 30] = slots - 1, slots - 2
    if verb == "gather":
        offsets = torch.tensor([0, slots], dtype=torch.int32)  # no row to clear
        rows = emulated.op("gather")(x, row_of_slot, offsets)
        assert torch.equal(rows[slots - 1], x[0]) and torch.equal(rows[slots - 2], x[1])
        return
    memory = mmap.mmap(-1, 2 * slots * hidden, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    rows = torch.frombuffer(memory, dtype=torch.bfloat16).view(slots, hidden)
    rows[slots - 1], rows[slots - 2] = x[0], x[1]
    assert torch.equal(emulated.op("combine")(rows, None, row_of_slot), x)
