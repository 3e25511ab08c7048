"""combine against fp64: one set of tests for the CPU, the emulated and the CUDA kernel."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place of the stored result, and the fp32 sum's own error.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def make_case(tokens, hidden, top_k, dtype, *, skipped=0.4, seed=0):
    """Random rows in a random order, some slots skipped; rows past the last one are NaN."""
    generator = torch.Generator().manual_seed(seed)
    slots = tokens * top_k
    resident = torch.rand(tokens, top_k, generator=generator) >= skipped
    computed = int(resident.sum())
    row_of_slot = torch.full((tokens, top_k), -1, dtype=torch.int32)
    row_of_slot[resident] = torch.randperm(computed, generator=generator).to(torch.int32)
    rows = torch.full((slots, hidden), float("nan"), dtype=dtype)
    rows[:computed] = torch.randn(computed, hidden, generator=generator).to(dtype)
    weights = torch.randn(tokens, top_k, generator=generator)
    return rows, weights, row_of_slot


def reference(rows, weights, row_of_slot):
    """The definition in fp64, and the sum of magnitudes that scales its rounding error."""
    w = torch.ones(row_of_slot.shape) if weights is None else weights
    w = torch.where(row_of_slot >= 0, w.double(), 0.0)
    gathered = rows.double()[row_of_slot.clamp(min=0).long()]
    gathered = torch.where((row_of_slot >= 0)[..., None], gathered, 0.0)
    terms = w[..., None] * gathered
    return terms.sum(1), terms.abs().sum(1)


def run(device, rows, weights, row_of_slot):
    on = lambda t: None if t is None else t.to(device.tensors)
    return device.op("combine")(on(rows), on(weights), on(row_of_slot)).cpu()


def check(device, rows, weights, row_of_slot):
    y = run(device, rows, weights, row_of_slot)
    wanted, magnitude = reference(rows, weights, row_of_slot)
    assert y.shape == wanted.shape and y.dtype == rows.dtype
    error = (y.double() - wanted).abs()
    # float16 has subnormals: below them the step is absolute.
    limit = TOLERANCE[rows.dtype] * wanted.abs() + 1e-6 * magnitude + 2.0**-25
    worst = (error / limit).nan_to_num(float("inf")).max().item() if error.numel() else 0.0
    assert worst <= 1.0, f"error {worst:.2f} times its limit"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens, hidden, top_k",
    [
        (1, 1, 1),
        (5, 8, 1),
        (9, 31, 2),  # odd rows: one element at a time
        (33, 66, 3),  # two elements at a time
        (17, 96, 4),
        (64, 264, 5),  # more vectors than a warp has lanes, with a ragged end
        (7, 1024, 8),
        (3, 40, 16),
    ],
)
@pytest.mark.parametrize("weighted", [True, False])
def test_matches_fp64(device, tokens, hidden, top_k, dtype, weighted):
    rows, weights, row_of_slot = make_case(tokens, hidden, top_k, dtype, seed=tokens + hidden)
    check(device, rows, weights if weighted else None, row_of_slot)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, hidden, top_k", [(0, 16, 2), (4, 0, 2), (4, 16, 0)])
def test_empty(device, tokens, hidden, top_k, dtype):
    rows = torch.empty(tokens * top_k, hidden, dtype=dtype)
    row_of_slot = torch.arange(tokens * top_k, dtype=torch.int32).view(tokens, top_k)
    y = run(device, rows, torch.empty(tokens, top_k), row_of_slot)
    assert torch.equal(y, torch.zeros(tokens, hidden, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_slots_skipped_gives_zeros(device, dtype):
    rows, weights, _ = make_case(6, 48, 4, dtype, skipped=1.0)
    skipped = torch.full((6, 4), -1, dtype=torch.int32)
    assert torch.equal(run(device, rows, weights, skipped), torch.zeros(6, 48, dtype=dtype))


@pytest.mark.parametrize("top_k", [3, 4])
def test_skipped_weights_do_not_matter(device, top_k):
    rows, weights, row_of_slot = make_case(20, 64, top_k, torch.bfloat16)
    weights[row_of_slot < 0] = float("nan")
    check(device, rows, weights, row_of_slot)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_storage_that_starts_anywhere(device, dtype, offset):
    """Contiguous tensors whose first element is not aligned for the widest access."""
    shifted = lambda t: torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape)
    case = [shifted(t) for t in make_case(12, 64, 4, dtype)]
    y = device.op("combine")(*[shifted(t.to(device.tensors)) for t in case]).cpu()
    assert torch.equal(y, run(device, *make_case(12, 64, 4, dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", [1.0, 1.0 / 3.0, 1.0 + 2.0**-9])
def test_every_value_of_a_16_bit_type(device, dtype, weight):
    """One slot: the product in fp32, rounded once to nearest even, for all 65536 bit patterns."""
    rows = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1024, 64)
    weights = torch.full((1024, 1), weight)
    row_of_slot = torch.arange(1024, dtype=torch.int32).view(1024, 1)
    y = run(device, rows, weights, row_of_slot)
    wanted = (rows.float() * weights).to(dtype)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adds_in_slot_order(device, dtype):
    """Large, small, minus large: the sum shows the order it was taken in."""
    rows = torch.tensor([[2.0**12], [2.0**-13], [-(2.0**12)]], dtype=dtype)
    weights = torch.full((1, 3), 1.0)
    orders = {(0, 1, 2): 0.0, (0, 2, 1): 2.0**-13, (1, 0, 2): 0.0, (2, 0, 1): 2.0**-13}
    for order, wanted in orders.items():
        y = run(device, rows, weights, torch.tensor([order], dtype=torch.int32))
        assert y.item() == wanted, order


def test_skipped_rows_are_not_read(emulated):
    """The rows are pages without read permission: touching one would end the process."""
    size = 16 * mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    address = libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    memory = (ctypes.c_char * size).from_address(address)
    rows = torch.frombuffer(memory, dtype=torch.float32).view(8, size // 4 // 8)
    row_of_slot = torch.full((4, 2), -1, dtype=torch.int32)
    y = emulated.op("combine")(rows, None, row_of_slot)
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    assert torch.equal(y, torch.zeros(4, rows.shape[1]))


def test_same_bits_every_time(device):
    case = make_case(100, 128, 6, torch.float32)
    first = run(device, *case)
    assert all(torch.equal(first, run(device, *case)) for _ in range(3))
