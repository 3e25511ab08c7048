"""The grouped GEMMs against float64: one set of tests for the CPU, emulated and CUDA kernels.

Inputs are rounded to the dtype first, so float64 gives the result of exact arithmetic. A kernel's
relative error, per tensor, may be at most a little more than that of plain torch in the same dtype,
which tests/ops/reference.py gives when it is called with tensors of that dtype.
"""

from __future__ import annotations

import pytest
import reference
import torch
from grouped_gemms import (
    ACTIVATION_FLOOR,
    DTYPES,
    GROUPS,
    SMALL,
    Inputs,
    check,
    cleared,
    double,
    every_case,
    make,
    moe_arguments,
    run,
    with_and_without_bias,
)
from kernel_device import Device
from torch import Tensor

from fomoe_ext import ops

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- rows ----------------------------------------------------------------------------------------


def check_expand(device: Device, inputs: Inputs, activation: str) -> None:
    table, number = inputs.table, ops.ACTIVATIONS[activation]
    act, preact = run(
        device,
        "expand",
        inputs.x,
        inputs.expand_weight,
        inputs.expand_bias,
        *(table.token_of_row, table.row_of_slot, table.offsets, table.tiles),
        number,
        True,
    )
    tensors = (inputs.x, inputs.expand_weight, inputs.expand_bias)
    linear = lambda x, weight, bias: torch.cat(
        [
            x[table.token_of_row[begin:end].long()] @ weight[e].T + (0 if bias is None else bias[e])
            for e, (begin, end) in enumerate(inputs.groups)
        ]
    )
    wanted, plain = linear(*double(*tensors)), linear(*tensors)
    check(preact, wanted, plain, "preact", inputs.count)
    wanted = reference.activate(wanted, activation)
    plain = reference.activate(plain, activation)
    check(act, wanted, plain, "act", inputs.count, ACTIVATION_FLOOR)


@every_case
@with_and_without_bias
def test_expand(device, groups, hidden, size, dtype, bias):
    check_expand(device, make(groups, hidden, size, dtype, bias=bias), "swiglu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expand_without_pre_activations(device, dtype):
    inputs = make(GROUPS["zipf"], *SMALL, dtype, bias=True)
    table, experts = inputs.table, (inputs.expand_weight, inputs.expand_bias)
    tables = (table.token_of_row, table.row_of_slot, table.offsets, table.tiles)
    act, _ = run(device, "expand", inputs.x, *experts, *tables, 0, True)
    alone, nothing = run(device, "expand", inputs.x, *experts, *tables, 0, False)
    assert torch.equal(alone[:, : inputs.count], act[:, : inputs.count])
    assert nothing.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("scale", [1, 8])
def test_expand_of_every_activation(device, activation, scale, dtype):
    """With larger pre-activations too, some of which clamped_swiglu clamps."""
    gates = 2 if ops.is_gated(activation) else 1
    inputs = make(GROUPS["zipf"], *SMALL, dtype, bias=True, gates=gates)
    check_expand(device, inputs._replace(x=inputs.x * scale), activation)


@every_case
@with_and_without_bias
def test_contract(device, groups, hidden, size, dtype, bias):
    inputs = make(groups, hidden, size, dtype, bias=bias)
    table = inputs.table
    (rows,) = run(
        device,
        "contract",
        inputs.act,
        inputs.contract_weight,
        inputs.contract_bias,
        table.offsets,
        table.tiles,
    )
    act = cleared(inputs.act, inputs.count)
    define = lambda act, weight, bias: reference.contract(act, weight, table, bias)
    tensors = (act, inputs.contract_weight, inputs.contract_bias)
    check(rows, define(*double(*tensors)), define(*tensors), "rows", inputs.count)


@every_case
def test_grouped_rows(device, groups, hidden, size, dtype):
    inputs = make(groups, hidden, size, dtype)
    table = inputs.table
    for rows, weight in (
        (inputs.preact, inputs.expand_weight),
        (inputs.rows, inputs.contract_weight),
    ):
        (got,) = run(device, "grouped_rows", rows, weight, table.offsets, table.tiles)
        define = lambda rows, weight: torch.cat(
            [rows[begin:end] @ weight[e] for e, (begin, end) in enumerate(inputs.groups)]
        )
        wanted = define(rows.double(), weight.double())
        check(got, wanted, define(rows, weight), "rows", inputs.count)


def check_contract_backward(device: Device, inputs: Inputs, activation: str) -> None:
    table, count = inputs.table, inputs.count
    got = run(
        device,
        "contract_backward",
        *(inputs.grad_y, inputs.contract_weight, inputs.contract_bias),
        *(inputs.preact, inputs.weights, table.token_of_row, table.slot_of_row),
        *(table.offsets, table.tiles, ops.ACTIVATIONS[activation]),
    )

    def define(preact, weights, weight, bias, grad_y):
        preact, weights = preact.requires_grad_(), weights.clone().requires_grad_()
        act = reference.activate(preact, activation)
        y = reference.combine(reference.contract(act, weight, table, bias), weights, table)
        grads = torch.autograd.grad(y, (preact, weights), grad_y.to(y.dtype))
        of_row = weights.flatten()[table.slot_of_row[:count].long(), None]
        return grads[0], (of_row * act[:count]).to(preact.dtype), grads[1]

    tensors = (
        cleared(inputs.preact, count),
        inputs.weights,
        inputs.contract_weight,
        inputs.contract_bias,
        inputs.grad_y,
    )
    names = ("grad_preact", "scaled_act", "grad_weights")
    lengths = (count, count, None)
    wanted, plain = define(*double(*tensors)), define(*tensors)
    for what, rows, *three in zip(names, lengths, got, wanted, plain, strict=True):
        check(*three, what, rows, ACTIVATION_FLOOR)
    assert (got[2][:, table.row_of_slot < 0] == 0).all()


@every_case
@with_and_without_bias
def test_contract_backward(device, groups, hidden, size, dtype, bias):
    check_contract_backward(device, make(groups, hidden, size, dtype, bias=bias), "swiglu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("scale", [1, 8])
def test_contract_backward_of_every_activation(device, activation, scale, dtype):
    gates = 2 if ops.is_gated(activation) else 1
    inputs = make(GROUPS["zipf"], *SMALL, dtype, bias=True, gates=gates)
    inputs = inputs._replace(preact=inputs.preact * scale)
    if activation == "clamped_swiglu":  # at its limits the gradient still passes
        inputs.preact[:3] = torch.tensor([7.0, -7.0] * 40, dtype=dtype)
    check_contract_backward(device, inputs, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=list(GROUPS))
def test_activation_backward(device, groups, activation, dtype):
    gates = 2 if ops.is_gated(activation) else 1
    inputs = make(groups, *SMALL, dtype, gates=gates)
    preact = 4 * inputs.preact
    (got,) = run(
        device,
        "activation_backward",
        *(inputs.act, preact, inputs.table.offsets, ops.ACTIVATIONS[activation]),
    )

    def define(preact, grad_act):
        preact = preact.requires_grad_()
        return torch.autograd.grad(reference.activate(preact, activation), preact, grad_act)[0]

    tensors = (cleared(preact, inputs.count), cleared(inputs.act, inputs.count))
    wanted, plain = define(*double(*tensors)), define(*tensors)
    check(got, wanted, plain, "grad_preact", inputs.count, ACTIVATION_FLOOR)


# ---- sums over rows ------------------------------------------------------------------------------


@every_case
def test_weight_grad(device, groups, hidden, size, dtype):
    """Each operand gathered or not."""
    inputs = make(groups, hidden, size, dtype)
    tokens = inputs.table.token_of_row
    for left, right, left_index, right_index in (
        (inputs.preact, inputs.x, None, tokens),
        (inputs.grad_y, inputs.act, tokens, None),
        (inputs.rows, inputs.act, None, None),
        (inputs.grad_y, inputs.x, tokens, tokens),
    ):
        arguments = (left, right, left_index, right_index, inputs.table.offsets)
        (got,) = run(device, "weight_grad", *arguments)
        wanted = sums_of_products(inputs, *double(left, right), left_index, right_index)
        plain = sums_of_products(inputs, left, right, left_index, right_index)
        check(got, wanted, plain, "grad_weight")
        empty = [begin == end for begin, end in inputs.groups]
        assert [not part.any() for part in got[0]] == empty
        plain = sums_of_products(inputs, left.float(), right.float(), left_index, right_index)
        check_weight_grad_add(device, arguments, wanted, plain)


def sums_of_products(
    inputs: Inputs,
    left: Tensor,
    right: Tensor,
    left_index: Tensor | None,
    right_index: Tensor | None,
) -> Tensor:
    lines = lambda side, index, begin, end: (
        side[begin:end] if index is None else side[index[begin:end].long()]
    )
    return torch.stack(
        [lines(left, left_index, *e).T @ lines(right, right_index, *e) for e in inputs.groups]
    )


def check_weight_grad_add(
    device: Device, arguments: tuple[Tensor | None, ...], sums: Tensor, plain: Tensor
) -> None:
    """The same sums added to a total, twice; experts without rows keep their bits."""
    total = torch.randn(sums.shape, generator=torch.Generator().manual_seed(1))
    total[~sums.flatten(1).any(1)] = -0.0
    ends = []
    for _ in range(2):
        end = total.to(device.tensors, copy=True)
        on = [None if a is None else a.to(device.tensors) for a in arguments]
        assert device.op("weight_grad_add")(end, *on) is None
        ends.append(end.cpu())
    check(torch.stack(ends), total.double() + sums, total + plain, "total")
    untouched = ~sums.flatten(1).any(1)
    assert torch.equal(ends[0][untouched].view(torch.int32), total[untouched].view(torch.int32))


@every_case
def test_bias_grad(device, groups, hidden, size, dtype):
    """For rows as they are, and for gathered and weighted rows."""
    inputs = make(groups, hidden, size, dtype)
    table, count = inputs.table, inputs.count
    tokens, slots = table.token_of_row[:count].long(), table.slot_of_row[:count].long()
    factors = inputs.weights.flatten()[slots, None]
    ones = torch.ones_like(factors)
    cases = [
        ((inputs.preact, None, None, None), inputs.preact[:count], ones),
        ((inputs.x, table.token_of_row, None, None), inputs.x[tokens], ones),
        (
            (inputs.grad_y, table.token_of_row, inputs.weights, table.slot_of_row),
            *(inputs.grad_y[tokens], factors),
        ),
        ((inputs.rows, None, inputs.weights, table.slot_of_row), inputs.rows[:count], factors),
    ]
    for arguments, lines, factor in cases:
        (got,) = run(device, "bias_grad", *arguments, table.offsets)
        define = lambda lines, factor: torch.stack(
            [factor[begin:end, 0] @ lines[begin:end] for begin, end in inputs.groups]
        )
        wanted = define(lines.double(), factor.double())
        check(got, wanted, define(lines, factor.to(dtype)), "grad_bias")


# ---- all of it -----------------------------------------------------------------------------------


@every_case
@with_and_without_bias
def test_moe_experts(device, groups, hidden, size, dtype, bias):
    """Forward and backward; with biases also gradients added to totals."""
    inputs = make(groups, hidden, size, dtype, bias=bias)
    arguments, number = moe_arguments(inputs), ops.ACTIVATIONS["clamped_swiglu"]
    y, preact = run(device, "moe_experts", *arguments, number, True)
    backward = (inputs.grad_y, *arguments, preact[0], number)
    got = run(device, "moe_experts_backward", *backward, True, True, True, None, None)

    leaf = lambda t: None if t is None else t.clone().requires_grad_()

    def define(x, weights, expand_weight, expand_bias, contract_weight, contract_bias, grad_y):
        mine = [
            leaf(t)
            for t in (x, weights, expand_weight, expand_bias, contract_weight, contract_bias)
        ]
        x, weights, expand_weight, expand_bias, contract_weight, contract_bias = mine
        y = reference.moe_experts(
            *(x, weights, inputs.table, expand_weight, contract_weight, "clamped_swiglu"),
            *(expand_bias, contract_bias),
        )
        grads = torch.autograd.grad(
            y, [t for t in mine if t is not None], grad_y.to(y.dtype), materialize_grads=True
        )
        return y.to(x.dtype), list(grads)

    tensors = (*arguments[:2], *arguments[7:], inputs.grad_y)
    (wanted, wanted_grads), (plain, plain_grads) = define(*double(*tensors)), define(*tensors)
    check(y, wanted, plain, "y", floor=ACTIVATION_FLOOR)
    names = ["x", "weights", "expand_weight", "expand_bias", "contract_weight", "contract_bias"]
    if not bias:
        assert got[3].shape[1] == got[5].shape[1] == 0
        names, got = ([list_[i] for i in (0, 1, 2, 4)] for list_ in (names, got))
    for what, *three in zip(names, got, wanted_grads, plain_grads, strict=True):
        check(*three, f"gradient of {what}", floor=ACTIVATION_FLOOR)
    if bias and (hidden, size) == SMALL:
        y_alone, nothing = run(device, "moe_experts", *arguments, number, False)
        assert torch.equal(y_alone, y) and nothing.numel() == 0
        check_moe_totals(device, backward, got)


def check_moe_totals(device: Device, backward: tuple, without: list[Tensor]) -> None:
    """Totals get the weight gradients added; all other gradients have the same bits as without."""
    on = lambda a: a.to(device.tensors) if isinstance(a, Tensor) else a
    op, start = device.op("moe_experts_backward"), [without[2][0], without[4][0]]
    generator = torch.Generator().manual_seed(2)
    totals = [torch.randn(t.shape, generator=generator) for t in start]
    for chosen in ((True, True), (True, False), (False, True)):
        ends = [on(t.clone()) if c else None for t, c in zip(totals, chosen, strict=True)]
        grads = op(*map(on, backward), True, True, True, *ends)
        for which, end, total, grad in zip((2, 4), ends, totals, start, strict=True):
            if end is None:
                assert torch.equal(grads[which].cpu(), without[which][0])
                continue
            assert grads[which].shape == (0, *grad.shape[1:])
            added = end.cpu().double() - total.double()
            # The gradients are rounded to their dtype, the totals are not.
            limit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
            error = (added - grad.double()).norm()
            assert error <= limit[grad.dtype] * grad.double().norm() + 1e-7 * total.norm()
        for which in (0, 1, 3, 5):
            assert torch.equal(grads[which].cpu(), without[which][0])
    untouched = [on(t.clone()) for t in totals]
    grads = op(*map(on, backward), False, False, False, *untouched)
    assert [g.shape[0] for g in (grads[0], grads[2], grads[4])] == [0, 0, 0]
    assert torch.equal(grads[1].cpu(), without[1][0])
    for end, total in zip(untouched, totals, strict=True):
        assert torch.equal(end.cpu(), total)
