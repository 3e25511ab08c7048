"""The expert verbs against their fp64 definitions: expand, contract, moe_experts and gradients."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import reference
import torch
from expert_inputs import (
    DTYPES,
    OP_NAMES,
    SIZES,
    TOLERANCE,
    Inputs,
    Sizes,
    assert_near,
    chosen_experts,
    draw,
    exact,
    leaves,
    make,
    op_arguments,
    poison_memory,
    rows_of,
)
from new_process import OTHER_ISAS, told_with_isa
from torch import Tensor

from fomoe_ext import ops

pytestmark = pytest.mark.usefixtures("one_thread")
fomoe = torch.ops.fomoe


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("routing", ["even", "one hot expert"])
@pytest.mark.parametrize("name", SIZES)
def test_moe_experts_matches_fp64(
    name: str, routing: str, activation: str, dtype: torch.dtype
) -> None:
    inputs = make(SIZES[name], activation, dtype, routing)
    check_moe_experts(inputs, activation)


def check_moe_experts(inputs: Inputs, activation: str) -> None:
    """Value and all gradients of moe_experts."""
    dtype, table = inputs.x.dtype, inputs.table
    tensors = (inputs.x, inputs.weights, inputs.expand_weight, inputs.contract_weight)
    mine, theirs = leaves(*tensors), exact(*tensors)
    grad_y = draw(*inputs.x.shape, seed=5).to(dtype)
    poison_memory()
    y = ops.moe_experts(*mine[:2], table, *mine[2:], activation)
    grads = torch.autograd.grad(y, mine, grad_y)
    wanted = reference.moe_experts(*theirs[:2], table, *theirs[2:], activation)
    wanted_grads = torch.autograd.grad(wanted, theirs, grad_y.double(), materialize_grads=True)
    assert y.dtype == dtype
    assert_near(y, wanted, TOLERANCE[dtype], "y")
    names = ("x", "weights", "expand_weight", "contract_weight")
    for what, leaf, got, exact_grad in zip(names, mine, grads, wanted_grads, strict=True):
        assert got.dtype == leaf.dtype
        assert_near(got, exact_grad, 2 * TOLERANCE[dtype], what)
    skipped = table.row_of_slot < 0
    assert (grads[1][skipped] == 0).all()
    assert (y[skipped.all(1)] == 0).all() and (grads[0][skipped.all(1)] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("name", SIZES)
def test_single_verbs_match_fp64(name: str, activation: str, dtype: torch.dtype) -> None:
    """expand and contract by themselves; no undefined rows in values or gradients."""
    inputs = make(SIZES[name], activation, dtype)
    table, slots = inputs.table, inputs.table.token_of_row.shape[0]
    act_in = draw(slots, SIZES[name].expert, seed=6).to(dtype)
    cases: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, Tensor]]] = [
        (
            lambda x, w: ops.expand(x, w, table, activation),
            lambda x, w: reference.expand(x, w, table, activation),
            (inputs.x, inputs.expand_weight),
        ),
        (
            lambda act, w: ops.contract(act, w, table),
            lambda act, w: reference.contract(act, w, table),
            (act_in, inputs.contract_weight),
        ),
    ]
    for ours, definition, tensors in cases:
        mine, theirs = leaves(*tensors), exact(*tensors)
        poison_memory()
        got = ours(*mine)
        wanted = definition(*theirs) + 0 * theirs[1].sum()  # works without rows, too
        assert got.dtype == dtype
        assert_near(got, wanted, TOLERANCE[dtype])
        assert (got[rows_of(inputs) :] == 0).all()
        grad = draw(*got.shape, seed=7).to(dtype)
        grads = torch.autograd.grad(got, mine, grad)
        exact_grads = torch.autograd.grad(wanted, theirs, grad.double(), materialize_grads=True)
        for mine_grad, exact_grad in zip(grads, exact_grads, strict=True):
            assert_near(mine_grad, exact_grad, 2 * TOLERANCE[dtype])


def test_the_three_verbs_in_a_row_equal_the_fused_one() -> None:
    inputs = make(SIZES["odd"])
    act = ops.expand(inputs.x, inputs.expand_weight, inputs.table)
    rows = ops.contract(act, inputs.contract_weight, inputs.table)
    y = ops.combine(rows, inputs.weights, inputs.table)
    assert torch.equal(y, ops.moe_experts(*inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_rows_and_weight_grad_match_fp64(dtype: torch.dtype) -> None:
    inputs = make(SIZES["odd"], dtype=dtype, routing="one hot expert")
    table, rows = inputs.table, rows_of(inputs)
    offsets, slots = table.offsets.tolist(), table.token_of_row.shape[0]
    left, right = draw(slots, 37, seed=8).to(dtype), draw(slots, 21, seed=9).to(dtype)
    left[rows:], right[rows:] = torch.nan, torch.nan  # rows that do not exist
    weight = draw(3, 37, 19, seed=10).to(dtype)

    got = fomoe.grouped_rows(left, weight, table.offsets, table.tiles)[:rows]
    parts = [
        left[begin:end].double() @ weight[e].double()
        for e, (begin, end) in enumerate(pairwise(offsets))
    ]
    assert_near(got, torch.cat(parts), TOLERANCE[dtype])

    tokens = table.token_of_row[:rows].long()
    for left_index, right_index in ((False, False), (True, False), (False, True), (True, True)):
        lines = [
            side[tokens] if gathered else side[:rows]
            for side, gathered in ((left, left_index), (right, right_index))
        ]
        parts = [
            lines[0][begin:end].double().T @ lines[1][begin:end].double()
            for begin, end in pairwise(offsets)
        ]
        poison_memory()
        got = fomoe.weight_grad(
            left,
            right,
            table.token_of_row if left_index else None,
            table.token_of_row if right_index else None,
            table.offsets,
        )
        assert_near(got, torch.stack(parts), TOLERANCE[dtype])
        assert [begin == end for begin, end in pairwise(offsets)] == [
            bool((part == 0).all()) for part in got
        ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("name", ["odd", "more than one block"])
def test_contract_backward_matches_fp64(name: str, activation: str, dtype: torch.dtype) -> None:
    inputs = make(SIZES[name], activation, dtype)
    table, rows = inputs.table, rows_of(inputs)
    grad_y = draw(*inputs.x.shape, seed=11).to(dtype)
    _, preact = fomoe.expand(
        inputs.x,
        inputs.expand_weight,
        None,
        table.token_of_row,
        table.row_of_slot,
        table.offsets,
        table.tiles,
        ops.ACTIVATIONS[activation],
        True,
    )
    grad_preact, scaled_act, grad_weights = fomoe.contract_backward(
        grad_y,
        inputs.contract_weight,
        None,
        preact,
        inputs.weights,
        table.token_of_row,
        table.slot_of_row,
        table.offsets,
        table.tiles,
        ops.ACTIVATIONS[activation],
    )
    exact_preact, exact_weights = exact(preact, inputs.weights)
    act = reference.activate(exact_preact, activation)
    y = reference.combine(
        reference.contract(act, inputs.contract_weight.double(), table), exact_weights, table
    )
    wanted = torch.autograd.grad(y, (exact_preact, exact_weights), grad_y.double())
    of_row = exact_weights.flatten()[table.slot_of_row[:rows].long(), None]
    assert_near(grad_preact[:rows], wanted[0][:rows], 2 * TOLERANCE[dtype])
    assert_near(grad_weights, wanted[1], 2 * TOLERANCE[dtype])
    assert_near(scaled_act[:rows], of_row * act[:rows], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activation_backward_matches_fp64(activation: str, dtype: torch.dtype) -> None:
    width = 19 * (2 if ops.is_gated(activation) else 1)
    preact = (4 * draw(70, width, seed=12)).to(dtype)
    grad_act = draw(70, 19, seed=13).to(dtype)
    offsets = torch.tensor([0, 20, 20, 61], dtype=torch.int32)
    number = ops.ACTIVATIONS[activation]
    got = fomoe.activation_backward(grad_act, preact, offsets, number)[:61]
    (exact_preact,) = exact(preact)
    act = reference.activate(exact_preact, activation)
    (wanted,) = torch.autograd.grad(act, exact_preact, grad_act.double())
    assert_near(got, wanted[:61], TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations_at_their_ends(activation: str) -> None:
    """Large pre-activations neither overflow nor lose the slope."""
    values = torch.tensor([-1e4, -120.0, -88.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 88.0, 120.0, 1e4])
    preact = values[:, None]
    if ops.is_gated(activation):
        preact = torch.cat([preact, torch.full_like(preact, 0.5)], 1)
    rows = preact.shape[0]
    weight = torch.ones(1, 1, 1)
    table = ops.compact(
        torch.zeros(rows, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 1
    )
    got = fomoe.activation_backward(
        torch.ones(rows, 1), preact, table.offsets, ops.ACTIVATIONS[activation]
    )
    (exact_preact,) = exact(preact)
    act = reference.activate(exact_preact, activation)
    wanted = torch.autograd.grad(act.sum(), exact_preact)[0]
    torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=1e-7)
    if not ops.is_gated(activation):
        value = ops.expand(values[:, None], weight, table, activation)
        torch.testing.assert_close(value.double(), act.detach(), rtol=2e-6, atol=1e-7)


def test_reference_gradient() -> None:
    """The reference that gradients are compared with, against finite differences."""
    for activation in ops.ACTIVATIONS:
        inputs = make(Sizes(5, 3, 2, 4, 2, 2), activation)
        tensors = exact(inputs.x, inputs.weights, inputs.expand_weight, inputs.contract_weight)
        run = lambda x, w, we, wc, a=activation, t=inputs.table: reference.moe_experts(
            x, w, t, we, wc, a
        )
        assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("wanted", range(4))
def test_a_gradient_to_one_argument_only(wanted: int) -> None:
    inputs = make(SIZES["odd"])
    tensors = [inputs.x, inputs.weights, inputs.expand_weight, inputs.contract_weight]
    full = leaves(*tensors)
    y = ops.moe_experts(*full[:2], inputs.table, *full[2:])
    grads = torch.autograd.grad(y, full, torch.ones_like(y))
    alone = [t.clone().requires_grad_(at == wanted) for at, t in enumerate(tensors)]
    y = ops.moe_experts(*alone[:2], inputs.table, *alone[2:])
    y.backward(torch.ones_like(y))
    for at, tensor in enumerate(alone):
        assert (tensor.grad is not None) == (at == wanted)
    assert torch.equal(alone[wanted].grad, grads[wanted])


def test_what_autograd_keeps_is_the_pre_activations() -> None:
    """Only inputs, row tables and [S, G*N] are saved: no gathered x, no output rows."""
    inputs = make(SIZES["more than one block"])
    mine = leaves(inputs.x, inputs.weights, inputs.expand_weight, inputs.contract_weight)
    known = {t.data_ptr() for t in (*mine, *inputs.table)}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.moe_experts(*mine[:2], inputs.table, *mine[2:])
    extra = {tuple(t.shape) for t in saved if t.data_ptr() not in known}
    slots, size = inputs.table.token_of_row.shape[0], SIZES["more than one block"]
    assert extra == {(slots, 2 * size.expert)}


# ---- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_a_skipped_slot_costs_no_row(name: str) -> None:
    """The kernel's count of computed rows is the number of slots on resident experts."""
    sizes = SIZES[name]
    inputs = make(sizes)
    on_residents = int((chosen_experts(sizes, "even") < sizes.residents).sum())
    for run in (
        lambda: ops.expand(inputs.x, inputs.expand_weight, inputs.table),
        lambda: ops.moe_experts(*inputs),
    ):
        before = ops.expand_rows_computed()
        run()
        assert ops.expand_rows_computed() - before == on_residents == rows_of(inputs)


# ---- the same bits -------------------------------------------------------------------------------


def all_results(inputs: Inputs, activation: str) -> list[Tensor]:
    """Of moe_experts and of expand and contract, forward and backward."""
    mine = leaves(inputs.x, inputs.weights, inputs.expand_weight, inputs.contract_weight)
    y = ops.moe_experts(*mine[:2], inputs.table, *mine[2:], activation)
    act = ops.expand(mine[0], mine[2], inputs.table, activation)
    rows = ops.contract(act, mine[3], inputs.table)
    poison_memory()
    return [
        y.detach(),
        rows.detach(),
        *torch.autograd.grad(y, mine, draw(*y.shape, seed=14).to(y.dtype)),
        *torch.autograd.grad(rows, (mine[0], mine[2], mine[3]), torch.ones_like(rows)),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ["even", "one hot expert"])
def test_same_bits_for_any_number_of_threads(routing: str, dtype: torch.dtype) -> None:
    # The split of rows depends on the number of threads, and columns are in several ranges.
    inputs = make(Sizes(1500, 40, 530, 4, 3, 2), dtype=dtype, routing=routing)
    alone = all_results(inputs, "swiglu")
    for number in (2, 3, 1):
        torch.set_num_threads(number)
        for mine, wanted in zip(all_results(inputs, "swiglu"), alone, strict=True):
            assert torch.equal(mine, wanted)


def test_calls_at_the_same_time_do_not_share_temporaries() -> None:
    """Python threads that run the layer at once each get their own result."""
    from concurrent.futures import ThreadPoolExecutor

    many = [make(Sizes(200 + 40 * i, 48, 40, 4, 3, 2)) for i in range(4)]
    wanted = [ops.moe_experts(*inputs) for inputs in many]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, right in zip(
                pool.map(lambda i: ops.moe_experts(*i), many), wanted, strict=True
            ):
                assert torch.equal(got, right)


# ---- instruction sets ----------------------------------------------------------------------------


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set_matches_fp64(isa: str) -> None:
    """Runs this file's comparison in a process that uses `isa`."""
    code = """
import test_experts as t
t.torch.set_num_threads(1)
for name in ("odd", "vector ends", "more than one block"):
    for dtype in t.DTYPES:
        for activation in t.ops.ACTIVATIONS:
            t.check_moe_experts(t.make(t.SIZES[name], activation, dtype), activation)
print("compared")
"""
    assert told_with_isa(isa, code) == "compared"


# ---- what torch may do to the ops ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["clamped_swiglu", "relu2"])
@pytest.mark.parametrize("name", OP_NAMES)
def test_opcheck(name: str, activation: str, dtype: torch.dtype) -> None:
    # Rows past the last one may be undefined, which opcheck's comparisons would trip over.
    inputs = make(Sizes(12, 9, 7, 3, 3, 2), activation, dtype)
    op, arguments = op_arguments(inputs, activation, grad=True)[name]
    torch.library.opcheck(op, arguments)


def test_compiles_without_graph_breaks() -> None:
    inputs = make(SIZES["odd"])

    def run(x: Tensor, weights: Tensor, expand_weight: Tensor, contract_weight: Tensor) -> Tensor:
        act = ops.expand(x, expand_weight, inputs.table, "geglu")
        rows = ops.contract(act, contract_weight, inputs.table)
        one = ops.combine(rows, weights, inputs.table)
        return one + ops.moe_experts(x, weights, inputs.table, expand_weight, contract_weight)

    tensors = (inputs.x, inputs.weights, inputs.expand_weight, inputs.contract_weight)
    eager, traced = leaves(*tensors), leaves(*tensors)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    y, z = run(*eager), compiled(*traced)
    torch.testing.assert_close(z, y, rtol=0, atol=0)
    for mine, wanted in zip(
        torch.autograd.grad(z.sum(), traced), torch.autograd.grad(y.sum(), eager), strict=True
    ):
        torch.testing.assert_close(mine, wanted)
