"""Biases of the experts and clamped SwiGLU, from the ops to the layer, against fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import small_layer
import torch
from expert_inputs import (
    DTYPES,
    SIZES,
    TOLERANCE,
    Inputs,
    Sizes,
    assert_near,
    draw,
    exact,
    leaves,
    make,
    poison_memory,
    rows_of,
)
from new_process import OTHER_ISAS, told_with_isa
from torch import Tensor

from fomoe_ext import ops
from fomoe_ext.layer.experts import Experts
from fomoe_ext.layer.shared import SharedExpert

pytestmark = pytest.mark.usefixtures("one_thread")
fomoe = torch.ops.fomoe
NAMES = ("x", "weights", "expand_weight", "contract_weight", "expand_bias", "contract_bias")


def biases_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    dtype = inputs.x.dtype
    return (
        draw(*inputs.expand_weight.shape[:2], seed=21).to(dtype),
        draw(*inputs.contract_weight.shape[:2], seed=22).to(dtype),
    )


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """In the order of NAMES."""
    x, weights, _, expand_weight, contract_weight = inputs
    return x, weights, expand_weight, contract_weight, *biases_of(inputs)


def moe_experts(tensors: list[Tensor], table: ops.RowTable, activation: str = "swiglu") -> Tensor:
    return ops.moe_experts(
        *tensors[:2],
        table,
        *tensors[2:4],
        activation,
        expand_bias=tensors[4],
        contract_bias=tensors[5],
    )


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("routing", ["even", "one hot expert"])
@pytest.mark.parametrize("name", [name for name in SIZES if name != "one of each"])  # may cancel
def test_moe_experts_matches_fp64(
    name: str, routing: str, activation: str, dtype: torch.dtype
) -> None:
    check_moe_experts(make(SIZES[name], activation, dtype, routing), activation)


def check_moe_experts(inputs: Inputs, activation: str) -> None:
    """Value and all gradients of moe_experts with both biases."""
    dtype, table, tensors = inputs.x.dtype, inputs.table, tensors_of(inputs)
    mine, theirs = leaves(*tensors), exact(*tensors)
    grad_y = draw(*inputs.x.shape, seed=5).to(dtype)
    poison_memory()
    y = moe_experts(mine, table, activation)
    grads = torch.autograd.grad(y, mine, grad_y)
    wanted = reference.moe_experts(*theirs[:2], table, *theirs[2:4], activation, *theirs[4:])
    wanted_grads = torch.autograd.grad(wanted, theirs, grad_y.double(), materialize_grads=True)
    assert_near(y, wanted, TOLERANCE[dtype], "y")
    for what, leaf, got, exact_grad in zip(NAMES, mine, grads, wanted_grads, strict=True):
        assert got.dtype == leaf.dtype
        assert_near(got, exact_grad, 2 * TOLERANCE[dtype], what)
    skipped = table.row_of_slot < 0
    assert (grads[1][skipped] == 0).all()
    assert (y[skipped.all(1)] == 0).all() and (grads[0][skipped.all(1)] == 0).all()
    without_rows = table.offsets.diff() == 0
    for grad in grads[2:]:
        assert not grad[without_rows].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("name", SIZES)
def test_single_verbs_match_fp64(name: str, activation: str, dtype: torch.dtype) -> None:
    """expand and contract by themselves; no undefined rows in values or gradients."""
    inputs = make(SIZES[name], activation, dtype)
    table, slots = inputs.table, inputs.table.token_of_row.shape[0]
    expand_bias, contract_bias = biases_of(inputs)
    act_in = draw(slots, SIZES[name].expert, seed=6).to(dtype)
    cases: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (
            lambda x, w, b: ops.expand(x, w, table, activation, expand_bias=b),
            lambda x, w, b: reference.expand(x, w, table, activation, b),
            (inputs.x, inputs.expand_weight, expand_bias),
        ),
        (
            lambda act, w, b: ops.contract(act, w, table, contract_bias=b),
            lambda act, w, b: reference.contract(act, w, table, b),
            (act_in, inputs.contract_weight, contract_bias),
        ),
    ]
    for ours, definition, tensors in cases:
        mine, theirs = leaves(*tensors), exact(*tensors)
        poison_memory()
        got = ours(*mine)
        wanted = definition(*theirs) + 0 * theirs[1].sum()  # works without rows, too
        assert_near(got, wanted, TOLERANCE[dtype])
        assert (got[rows_of(inputs) :] == 0).all()
        grad = draw(*got.shape, seed=7).to(dtype)
        grads = torch.autograd.grad(got, mine, grad)
        exact_grads = torch.autograd.grad(wanted, theirs, grad.double(), materialize_grads=True)
        for mine_grad, exact_grad in zip(grads, exact_grads, strict=True):
            assert_near(mine_grad, exact_grad, 2 * TOLERANCE[dtype])


def test_reference_gradient() -> None:
    """The reference that gradients are compared with, against finite differences."""
    for activation in ops.ACTIVATIONS:
        inputs = make(Sizes(5, 3, 2, 4, 2, 2), activation)
        run = lambda x, w, we, wc, be, bc, a=activation, t=inputs.table: reference.moe_experts(
            x, w, t, we, wc, a, be, bc
        )
        assert torch.autograd.gradcheck(run, exact(*tensors_of(inputs)))


def test_clamped_swiglu_by_numbers() -> None:
    """Clamped from above (gate) and on both sides (up); at a limit the gradient still passes."""
    gate = torch.tensor([-40.0, -7.0, 0.0, 1.0, 7.0, 7.001, 90.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    up = torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, -7.0, -7.001, 7.0, 7.001, -90.0])
    preact = torch.stack([gate, up], 1)
    number = ops.ACTIVATIONS["clamped_swiglu"]
    grad = fomoe.activation_backward(
        torch.ones(12, 1), preact, torch.tensor([0, 12], dtype=torch.int32), number
    )
    # A hidden channel each for gate and up, passed on by the weights 1 0 and 0 1.
    table = ops.compact(torch.zeros(12, 1, dtype=torch.int32), torch.zeros(1).int(), 1)
    act = ops.expand(preact, torch.eye(2)[None], table, "clamped_swiglu")
    for i in range(12):
        g, u = min(float(gate[i]), 7.0), max(-7.0, min(float(up[i]), 7.0))
        s = 1 / (1 + math.exp(-1.702 * g))
        assert act[i] == pytest.approx(g * s * (u + 1), rel=1e-6, abs=1e-10)
        gate_slope = (s + 1.702 * g * s * (1 - s)) * (u + 1) if float(gate[i]) <= 7 else 0.0
        up_slope = g * s if abs(float(up[i])) <= 7 else 0.0
        assert grad[i].tolist() == pytest.approx([gate_slope, up_slope], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("which", ["expand_bias", "contract_bias"])
def test_one_bias_alone(which: str) -> None:
    """The same as with both and a zero for the other; the missing bias gets no gradient."""
    inputs = make(SIZES["odd"])
    x, weights, expand_weight, contract_weight, *biases = leaves(*tensors_of(inputs))
    given = dict(zip(NAMES[4:], biases, strict=True))
    zeros = {name: torch.zeros_like(bias) for name, bias in given.items() if name != which}
    run = lambda **options: ops.moe_experts(
        x, weights, inputs.table, expand_weight, contract_weight, **options
    )
    alone, both = run(**{which: given[which]}), run(**{which: given[which]} | zeros)
    assert torch.equal(alone, both)
    for tensor in (x, weights, expand_weight, contract_weight, given[which]):
        grads = [torch.autograd.grad(y.sum(), tensor, retain_graph=True)[0] for y in (alone, both)]
        assert torch.equal(*grads)


@pytest.mark.parametrize("wanted", range(6))
def test_a_gradient_to_one_argument_only(wanted: int) -> None:
    inputs = make(SIZES["odd"])
    full = leaves(*tensors_of(inputs))
    grads = torch.autograd.grad(moe_experts(full, inputs.table).sum(), full)
    alone = [t.detach().requires_grad_(at == wanted) for at, t in enumerate(full)]
    moe_experts(alone, inputs.table).sum().backward()
    for at, tensor in enumerate(alone):
        assert (tensor.grad is not None) == (at == wanted)
    assert torch.equal(alone[wanted].grad, grads[wanted])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ["even", "one hot expert"])
def test_same_bits_for_any_number_of_threads(routing: str, dtype: torch.dtype) -> None:
    inputs = make(Sizes(1500, 40, 530, 4, 3, 2), "clamped_swiglu", dtype, routing)

    def results() -> list[Tensor]:
        mine = leaves(*tensors_of(inputs))
        y = moe_experts(mine, inputs.table, "clamped_swiglu")
        poison_memory()
        return [y.detach(), *torch.autograd.grad(y, mine, draw(*y.shape, seed=14).to(dtype))]

    alone = results()
    for number in (2, 3, 1):
        torch.set_num_threads(number)
        assert all(torch.equal(a, b) for a, b in zip(results(), alone, strict=True))


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set_matches_fp64(isa: str) -> None:
    code = """
import test_expert_bias as t
t.torch.set_num_threads(1)
for name in ("odd", "vector ends", "more than one block"):
    for dtype in t.DTYPES:
        for activation in t.ops.ACTIVATIONS:
            t.check_moe_experts(t.make(t.SIZES[name], activation, dtype), activation)
print("compared")
"""
    assert told_with_isa(isa, code) == "compared"


# ---- what torch may do to the ops ----------------------------------------------------------------


def op_arguments(inputs: Inputs, activation: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Name -> op and arguments, of the ops that take a bias or give its gradient."""
    table, number = inputs.table, ops.ACTIVATIONS[activation]
    x, weights, expand_weight, contract_weight, expand_bias, contract_bias = leaves(
        *tensors_of(inputs)
    )
    slots, width = table.token_of_row.shape[0], expand_weight.shape[1]
    act, preact = (
        draw(slots, contract_weight.shape[2], seed=15).to(x.dtype).requires_grad_(),
        draw(slots, width, seed=16).to(x.dtype),
    )
    grad_y = torch.ones_like(x, requires_grad=False)
    experts = (expand_weight, expand_bias, contract_weight, contract_bias)
    constants = [t.detach() for t in (x, weights, *table, *experts)]
    ends = (table.offsets, table.tiles)
    contract = [t.detach() for t in (contract_weight, contract_bias)]
    return {
        "expand": (
            fomoe.expand,
            (x, *experts[:2], table.token_of_row, table.row_of_slot, *ends, number, True),
        ),
        "contract": (fomoe.contract, (act, *experts[2:], *ends)),
        "moe_experts": (fomoe.moe_experts, (x, weights, *table, *experts, number, True)),
        "moe_experts_backward": (
            fomoe.moe_experts_backward,
            (grad_y, *constants, preact, number, True, True, True, None, None),
        ),
        "contract_backward": (
            fomoe.contract_backward,
            (grad_y, *contract, preact, weights.detach(), *table[:2], *ends, number),
        ),
        "bias_grad": (
            fomoe.bias_grad,
            (grad_y, table.token_of_row, weights.detach(), table.slot_of_row, table.offsets),
        ),
    }


OP_NAMES = tuple(op_arguments(make(SIZES["odd"]), "swiglu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OP_NAMES)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    op, arguments = op_arguments(
        make(Sizes(12, 9, 7, 3, 3, 2), "clamped_swiglu", dtype), "clamped_swiglu"
    )[name]
    torch.library.opcheck(op, arguments)


def test_compiles_without_graph_breaks() -> None:
    inputs = make(SIZES["odd"], "clamped_swiglu")

    def run(*tensors: Tensor) -> Tensor:
        act = ops.expand(
            tensors[0], tensors[2], inputs.table, "clamped_swiglu", expand_bias=tensors[4]
        )
        rows = ops.contract(act, tensors[3], inputs.table, contract_bias=tensors[5])
        one = ops.combine(rows, tensors[1], inputs.table)
        return one + moe_experts(list(tensors), inputs.table, "clamped_swiglu")

    eager, traced = leaves(*tensors_of(inputs)), leaves(*tensors_of(inputs))
    y, z = run(*eager), torch.compile(run, fullgraph=True, backend="aot_eager")(*traced)
    assert torch.equal(y, z)
    for mine, wanted in zip(
        torch.autograd.grad(z.sum(), traced), torch.autograd.grad(y.sum(), eager), strict=True
    ):
        torch.testing.assert_close(mine, wanted)


# ---- bad input -----------------------------------------------------------------------------------

BAD = [
    ("expand_bias", lambda b: b[:, :5], r"expand_bias must have shape \[3, 42\], got \[3, 5\]"),
    ("expand_bias", lambda b: b[:2], r"expand_bias must have shape \[3, 42\], got \[2, 42\]"),
    ("expand_bias", lambda b: b[0], r"expand_bias must have shape .*, got \[42\]"),
    ("expand_bias", lambda b: b.half(), "expand_bias must have dtype float32 like x, got float16"),
    ("contract_bias", lambda b: b[:, :5], r"contract_bias must have shape \[3, 37\], got \[3, 5\]"),
    ("contract_bias", lambda b: b.double(), "contract_bias must have dtype float32.*, got float64"),
]


@pytest.mark.parametrize("argument, change, message", BAD, ids=[b[2] for b in BAD])
def test_bad_input(argument: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    inputs = make(SIZES["odd"])
    biases = dict(zip(NAMES[4:], biases_of(inputs), strict=True))
    ops.moe_experts(*inputs, **biases)
    with pytest.raises(ValueError, match=message):
        ops.moe_experts(*inputs, **biases | {argument: change(biases[argument])})
    act = torch.zeros(inputs.table.token_of_row.shape[0], 21)
    with pytest.raises(ValueError, match=argument):
        if argument == "expand_bias":
            ops.expand(
                inputs.x,
                inputs.expand_weight,
                inputs.table,
                expand_bias=change(biases["expand_bias"]),
            )
        else:
            ops.contract(
                act,
                inputs.contract_weight,
                inputs.table,
                contract_bias=change(biases["contract_bias"]),
            )


def test_bad_input_of_bias_grad() -> None:
    table = make(SIZES["odd"]).table
    rows, weights = torch.zeros(159, 4), torch.zeros(53, 3)
    call = lambda rows=rows, index=table.token_of_row, weights=weights, slots=table.slot_of_row: (
        fomoe.bias_grad(rows, index, weights, slots, table.offsets)
    )
    call()
    wrong = [
        (lambda: call(rows=rows[0]), "rows must have shape"),
        (lambda: call(rows=rows.double()), "rows must have dtype .*, got float64"),
        (lambda: call(rows=rows[:5]), "index must be in"),
        (lambda: call(rows=rows[:5], index=None), "rows must have at least .* rows, got 5"),
        (lambda: call(index=table.token_of_row.long()), "index must have dtype .*, got int64"),
        (lambda: call(weights=weights.double()), "weights must have dtype .*, got float64"),
        (
            lambda: call(weights=weights[:9]),
            r"weights must have a weight for each of .* slots, got shape \[9, 3\]",
        ),
        (
            lambda: call(weights=None),
            "slot_of_row must be given with weights, got only slot_of_row",
        ),
        (lambda: call(slots=None), "slot_of_row must be given with weights, got only weights"),
        (lambda: call(slots=table.slot_of_row[:3]), "slot_of_row must have shape"),
    ]
    for attempt, message in wrong:
        with pytest.raises(ValueError, match=message):
            attempt()


# ---- the layer -----------------------------------------------------------------------------------


def layer_with_biases(**changes: Any) -> Any:
    """A small layer with biases that are not zero."""
    layer = small_layer.make(expert_bias=True, **changes)
    with torch.no_grad():
        for at, bias in enumerate((layer.experts.expand_bias, layer.experts.contract_bias)):
            bias.copy_(draw(*bias.shape, seed=30 + at))
    return layer


@pytest.mark.parametrize("dtype", small_layer.TOLERANCE, ids=str)
@pytest.mark.parametrize("router_scope", ["global", "resident"])
@pytest.mark.parametrize("activation", ["clamped_swiglu", "gelu"])
@pytest.mark.parametrize("shared", [0, 28])
def test_layer_matches_fp64(
    shared: int, activation: str, router_scope: str, dtype: torch.dtype
) -> None:
    layer = layer_with_biases(
        activation=activation,
        router_scope=router_scope,
        resident_experts=[0, 3, 4, 5],
        shared_expert_intermediate_size=shared,
        dtype=dtype,
    )
    small_layer.check_against_dense(layer, small_layer.tokens(3, 17, 24, dtype=dtype))


def test_biases_start_at_zero_and_are_parameters() -> None:
    plain, biased = small_layer.make(), small_layer.make(expert_bias=True)
    x = small_layer.tokens(40, 24)
    assert torch.equal(plain(x), biased(x))
    added = biased.state_dict().keys() - plain.state_dict().keys()
    assert added == {"experts.expand_bias", "experts.contract_bias"}
    assert biased.experts.expand_bias.shape == (6, 40)
    assert biased.experts.contract_bias.shape == (6, 24)
    assert plain.experts.expand_bias is None and plain.experts.contract_bias is None
    assert "bias=True" in repr(biased) and "bias" not in repr(plain.experts)
    with torch.device("meta"):
        empty = small_layer.make(expert_bias=True)
    late = empty.to_empty(device="cpu")
    late.reset_parameters()
    for name, value in biased.state_dict().items():
        assert torch.equal(late.state_dict()[name], value), name
    other = layer_with_biases()
    other.load_state_dict(biased.state_dict())
    assert torch.equal(other(x), biased(x))


def test_biases_move_with_their_experts() -> None:
    full = layer_with_biases()
    layer = small_layer.make(expert_bias=True, resident_experts=[1, 3, 4])
    residents = {e: full.experts.expert_weights(e) for e in (1, 3, 4)}
    layer.set_resident_experts([1, 3, 4], residents)
    arrivals = {e: full.experts.expert_weights(e) for e in (0, 5)}
    assert layer.set_resident_experts([5, 3, 0], arrivals) == (0, 5)
    for row, expert in enumerate((0, 3, 5)):
        for name in layer.experts.parts:
            assert torch.equal(layer.experts.part(name)[row], full.experts.part(name)[expert])
    sites = [
        small_layer.make(expert_bias=True, resident_experts=ids) for ids in ([0, 4], [5, 1], [2, 3])
    ]
    for site in sites:
        ids = site.experts.resident_experts
        site.set_resident_experts(ids, {e: full.experts.expert_weights(e) for e in ids})
    x = small_layer.tokens(150, 24)
    torch.testing.assert_close(sum(site(x) for site in sites), full(x), rtol=1e-5, atol=1e-5)
    for given, error, message in (
        (arrivals[0][:2], TypeError, "must be four tensors"),
        ((*arrivals[0][:3], arrivals[0][2]), ValueError, "must have the shapes"),
    ):
        with pytest.raises(error, match=message):
            layer.set_resident_experts([0, 3, 5], {0: given})


def test_autocast_takes_biases_along() -> None:
    layer = layer_with_biases()
    low = layer_with_biases(dtype=torch.bfloat16)
    x = small_layer.tokens(40, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert layer.experts.expand_bias.grad.dtype == torch.float32
    assert layer.experts.contract_bias.grad.any()
    torch.testing.assert_close(y.float(), low(x.bfloat16()).float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("bad", ["yes", 1, None])
def test_a_bias_that_is_no_bool(bad: Any) -> None:
    with pytest.raises(TypeError, match="bias must be True or False"):
        Experts(8, 8, 2, bias=bad)


def test_shared_expert_of_clamped_swiglu() -> None:
    shared = SharedExpert(8, 6, activation="clamped_swiglu", seed=3)
    x = 30 * draw(20, 8, seed=4)
    preact = x.double() @ shared.expand.weight.double().T
    assert (preact.abs() > 7).any()
    act = reference.activate(preact, "clamped_swiglu")
    wanted = act @ shared.contract.weight.double().T
    assert_near(shared(x), wanted, 2e-6)
