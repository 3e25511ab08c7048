"""combine as an op with gradients; the kernel itself is in test_combine_kernel.py."""

from __future__ import annotations

import pytest
import reference
import torch

from fomoe_ext import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_case(tokens, hidden, top_k, dtype, seed=0, skipped=0.4):
    """Tables from `compact` with some slots skipped, random rows and weights."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(0, 10, (tokens, top_k), generator=generator).to(torch.int32)
    resident = int(10 * (1 - skipped))
    index = torch.full((10,), -1, dtype=torch.int32)
    index[:resident] = torch.arange(resident, dtype=torch.int32)
    table = ops.compact(experts, index, resident)
    rows = torch.randn(tokens * top_k, hidden, generator=generator).to(dtype)
    weights = torch.randn(tokens, top_k, generator=generator)
    grad = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return rows, weights, table, grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, hidden, top_k", [(1, 1, 1), (23, 19, 3), (40, 136, 6), (0, 8, 2)])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients(dtype, tokens, hidden, top_k, weighted):
    rows, weights, table, grad = make_case(tokens, hidden, top_k, dtype, seed=tokens)
    rows.requires_grad_()
    weights = weights.requires_grad_() if weighted else None
    y = ops.combine(rows, weights, table)
    y.backward(grad)

    rows64 = rows.detach().double().requires_grad_()
    weights64 = weights.detach().double().requires_grad_() if weighted else None
    reference.combine(rows64, weights64, table).backward(grad.double())
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert rows.grad.dtype == dtype
    torch.testing.assert_close(rows.grad.double(), rows64.grad, rtol=rtol, atol=1e-7)
    if weighted:
        torch.testing.assert_close(weights.grad.double(), weights64.grad, rtol=1e-5, atol=1e-5)


def test_reference_gradient():
    """The reference that gradients are compared with, against finite differences."""
    _, _, table, _ = make_case(4, 3, 2, torch.float32, seed=2)
    rows = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: reference.combine(r, w, table), (rows, weights))


def test_gradient_of_weights_keeps_no_rows_when_not_wanted():
    rows, weights, table, grad = make_case(6, 8, 2, torch.float32, seed=3)
    rows.requires_grad_()
    y = ops.combine(rows, weights, table)
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert not any(t.shape == rows.shape for t in saved)
    y.backward(grad)
    computed = table.row_of_slot[table.row_of_slot >= 0].long()
    assert (rows.grad[computed] != 0).any()
    assert (rows.grad[int(table.offsets[-1]) :] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    rows, weights, table, grad = make_case(501, 200, 4, dtype, seed=4)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = rows.clone().requires_grad_(), weights.clone().requires_grad_()
            y = ops.combine(*leaves, table)
            y.backward(grad)
            results.append((y.detach(), leaves[0].grad, leaves[1].grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    rows, weights, table, grad = make_case(5, 12, 3, dtype, seed=5)
    op, op_backward = torch.ops.fomoe.combine, torch.ops.fomoe.combine_backward
    leaves = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    torch.library.opcheck(op, (*leaves, table.row_of_slot))
    torch.library.opcheck(op, (leaves[0], None, table.row_of_slot))
    torch.library.opcheck(op, (leaves[0], weights, table.row_of_slot))
    torch.library.opcheck(op_backward, (grad, rows, weights, table.row_of_slot))
    torch.library.opcheck(op_backward, (grad, None, weights, table.row_of_slot))


def test_bad_input():
    rows, weights, table, grad = make_case(4, 8, 2, torch.float32, seed=6)
    op, op_backward = torch.ops.fomoe.combine, torch.ops.fomoe.combine_backward
    row_of_slot = table.row_of_slot
    beyond = row_of_slot.clone()
    beyond[1, 1] = 8
    twice = torch.tensor([[0, 1], [1, 2], [-1, -1], [3, 4]], dtype=torch.int32)
    cases = [
        (op, (rows[:7], weights, row_of_slot), r"rows must have shape \[8, \*\], got \[7, 8\]"),
        (op, (rows.double(), weights, row_of_slot), "rows must have dtype .*, got float64"),
        (op, (rows.T.contiguous().T, weights, row_of_slot), "rows must be contiguous"),
        (op, (rows, weights[:3], row_of_slot), r"weights must have shape \[4, 2\], got \[3, 2\]"),
        (op, (rows, weights.bfloat16(), row_of_slot), "weights must have dtype .*, got bfloat16"),
        (op, (rows, weights, row_of_slot.long()), "row_of_slot must have dtype .*, got int64"),
        (op, (rows, weights, row_of_slot.flatten()), "row_of_slot must have shape"),
        (op, (rows, weights, beyond), "row_of_slot must be in -1 .. 7, got 8 at slot 3"),
        (op_backward, (grad[:3], rows, weights, row_of_slot), "grad_y must have shape"),
        (
            op_backward,
            (grad, rows.bfloat16(), weights, row_of_slot),
            "rows must have dtype .*, got bfloat16",
        ),
        (
            op_backward,
            (grad, rows, weights, twice),
            "row_of_slot must have each row once, got row 1 in two slots",
        ),
        (op_backward, (grad, rows, weights, beyond), "row_of_slot must .*, got 8 at slot 3"),
    ]
    for function, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            function(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather(dtype):
    """Rows are their tokens' copies, zeros past the last; a token's gradient sums its rows'."""
    _, _, table, _ = make_case(17, 24, 3, dtype, seed=7)
    x = torch.randn(17, 24, generator=torch.Generator().manual_seed(8)).to(dtype).requires_grad_()
    rows = ops.gather(x, table)
    count = int(table.offsets[-1])
    assert torch.equal(rows[:count], x[table.token_of_row[:count].long()])
    assert (rows[count:] == 0).all()
    grad = torch.randn(rows.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    rows.backward(grad)
    assert torch.equal(x.grad, ops.combine(grad, None, table))
    wanted = reference.combine(grad.double(), None, table)
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(x.grad.double(), wanted, rtol=rtol, atol=1e-6)
    torch.library.opcheck(torch.ops.fomoe.gather, (x, table.row_of_slot, table.offsets))
