"""Gradients of the experts' weights added to fp32 totals: moe_experts and Parameter.main_grad."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import reference
import small_layer
import torch
from expert_inputs import DTYPES, SIZES, Inputs, Sizes, assert_near, draw, exact, leaves, make
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fomoe_ext import ops

pytestmark = pytest.mark.usefixtures("one_thread")
fomoe = torch.ops.fomoe
NAMES = ("x", "weights", "expand_weight", "contract_weight")


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs.x, inputs.weights, inputs.expand_weight, inputs.contract_weight


def totals_like(inputs: Inputs) -> list[Tensor]:
    return [
        draw(*weight.shape, seed=40 + at)
        for at, weight in enumerate((inputs.expand_weight, inputs.contract_weight))
    ]


def moe_experts(tensors: Any, table: ops.RowTable, totals: Any, **options: Any) -> Tensor:
    return ops.moe_experts(
        *tensors[:2],
        table,
        *tensors[2:],
        expand_total=totals[0],
        contract_total=totals[1],
        **options,
    )


def exact_grads(inputs: Inputs, grad_y: Tensor, activation: str = "swiglu") -> tuple[Tensor, ...]:
    theirs = exact(*tensors_of(inputs))
    y = reference.moe_experts(*theirs[:2], inputs.table, *theirs[2:], activation)
    return torch.autograd.grad(y, theirs, grad_y.double(), materialize_grads=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu", "relu2"])
@pytest.mark.parametrize("routing", ["even", "one hot expert"])
@pytest.mark.parametrize("name", [name for name in SIZES if name != "one of each"])  # may cancel
def test_totals_get_the_sum_of_several_passes(
    name: str, routing: str, activation: str, dtype: torch.dtype
) -> None:
    """In fp32: closer to fp64 than a gradient rounded to a smaller dtype could be."""
    inputs = make(SIZES[name], activation, dtype, routing)
    start = totals_like(inputs)
    totals, mine = [t.clone() for t in start], leaves(*tensors_of(inputs))
    wanted = [t.double() for t in start]
    for step in range(3):
        grad_y = draw(*inputs.x.shape, seed=50 + step).to(dtype)
        y = moe_experts(mine, inputs.table, totals, activation=activation)
        plain_y = ops.moe_experts(*mine[:2], inputs.table, *mine[2:], activation)
        assert torch.equal(y, plain_y)
        mine[0].grad = mine[1].grad = None
        y.backward(grad_y)
        assert mine[2].grad is None and mine[3].grad is None
        plain = torch.autograd.grad(plain_y, mine[:2], grad_y)
        assert torch.equal(mine[0].grad, plain[0]) and torch.equal(mine[1].grad, plain[1])
        grads = exact_grads(inputs, grad_y, activation)[2:]
        wanted = [total + grad for total, grad in zip(wanted, grads, strict=True)]
    # Activations and pre-activations are rounded to the dtype, sums are not.
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    without_rows = inputs.table.offsets.diff() == 0
    for total, right, before in zip(totals, wanted, start, strict=True):
        assert_near(total, right, tolerance)
        assert torch.equal(total[without_rows], before[without_rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_added_unrounded(dtype: torch.dtype) -> None:
    """weight_grad_add of exactly representable numbers equals the fp64 sum in every bit."""
    table = make(SIZES["odd"]).table
    small = lambda width, seed: draw(159, width, seed=seed).mul(32).round().div(32).to(dtype)
    left, right = small(37, 1), small(21, 2)
    total = draw(3, 37, 21, seed=3).mul(1024).round().div(1024)
    wanted = total.double()
    offsets = table.offsets.tolist()
    for r, (begin, end) in enumerate(itertools.pairwise(offsets)):
        wanted[r] += left[begin:end].double().T @ right[begin:end].double()
    assert fomoe.weight_grad_add(total, left, right, None, None, table.offsets) is None
    assert torch.equal(total.double(), wanted)
    rounded = fomoe.weight_grad(left, right, None, None, table.offsets)
    if dtype != torch.float32:  # what would have been lost
        sums = fomoe.weight_grad(left.float(), right.float(), None, None, table.offsets)
        assert not torch.equal(rounded.float(), sums)


@pytest.mark.parametrize("given", [(True, False), (False, True)])
def test_one_total_alone(given: tuple[bool, bool]) -> None:
    inputs = make(SIZES["odd"])
    totals = [t if g else None for t, g in zip(totals_like(inputs), given, strict=True)]
    before = [None if t is None else t.clone() for t in totals]
    mine, plain = leaves(*tensors_of(inputs)), leaves(*tensors_of(inputs))
    moe_experts(mine, inputs.table, totals).sum().backward()
    ops.moe_experts(*plain[:2], inputs.table, *plain[2:]).sum().backward()
    for at in range(2):
        if totals[at] is None:
            assert torch.equal(mine[2 + at].grad, plain[2 + at].grad)
        else:
            assert mine[2 + at].grad is None
            torch.testing.assert_close(totals[at] - before[at], plain[2 + at].grad)


def test_biases_keep_gradients_of_their_own() -> None:
    inputs = make(SIZES["odd"])
    biases = leaves(draw(3, 42, seed=1), draw(3, 37, seed=2))
    names = ("expand_bias", "contract_bias")
    options: dict[str, Any] = dict(zip(names, biases, strict=True))
    mine = leaves(*tensors_of(inputs))
    with_totals = moe_experts(mine, inputs.table, totals_like(inputs), **options)
    without = moe_experts(mine, inputs.table, (None, None), **options)
    got = torch.autograd.grad(with_totals.sum(), (*mine[:2], *biases))
    wanted = torch.autograd.grad(without.sum(), (*mine[:2], *biases))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_frozen_weights_add_nothing() -> None:
    inputs = make(SIZES["odd"])
    x, weights = leaves(inputs.x, inputs.weights)
    totals = totals_like(inputs)
    before = [t.clone() for t in totals]
    frozen = (inputs.expand_weight, inputs.contract_weight)
    moe_experts((x, weights, *frozen), inputs.table, totals).sum().backward()
    assert x.grad is not None and weights.grad is not None
    assert all(torch.equal(a, b) for a, b in zip(totals, before, strict=True))
    with torch.no_grad():
        y = moe_experts((x, weights, *frozen), inputs.table, totals)
    assert not y.requires_grad


def test_a_second_backward_pass_adds_again_and_checkpointing_adds_once() -> None:
    inputs = make(SIZES["odd"])
    mine = leaves(*tensors_of(inputs))
    once, twice, recomputed = ([t.zero_() for t in totals_like(inputs)] for _ in range(3))
    moe_experts(mine, inputs.table, once).sum().backward()
    y = moe_experts(mine, inputs.table, twice).sum()
    y.backward(retain_graph=True)
    y.backward()
    run = lambda *tensors: moe_experts(tensors, inputs.table, recomputed)
    checkpoint(run, *mine, use_reentrant=False).sum().backward()
    for first, second, third in zip(once, twice, recomputed, strict=True):
        assert first.any()
        assert torch.equal(2 * first, second) and torch.equal(first, third)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    inputs = make(Sizes(1500, 40, 530, 4, 3, 2), dtype=dtype, routing="one hot expert")

    def results() -> list[Tensor]:
        totals, mine = totals_like(inputs), leaves(*tensors_of(inputs))
        moe_experts(mine, inputs.table, totals).sum().backward()
        return totals

    alone = results()
    for number in (2, 3, 1):
        torch.set_num_threads(number)
        assert all(torch.equal(a, b) for a, b in zip(results(), alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    """The ops that change an argument say so in their schemas."""
    inputs = make(Sizes(12, 9, 7, 3, 3, 2), dtype=dtype)
    table = inputs.table
    preact = draw(24, 14, seed=1).to(dtype)
    totals = totals_like(inputs)
    torch.library.opcheck(
        fomoe.weight_grad_add,
        (totals[0], preact, inputs.x, None, table.token_of_row, table.offsets),
    )
    experts = (inputs.expand_weight, None, inputs.contract_weight, None)
    shared = (torch.ones_like(inputs.x), inputs.x, inputs.weights, *table, *experts, preact, 0)
    for chosen in ((totals[0], None), (None, totals[1]), totals):
        torch.library.opcheck(fomoe.moe_experts_backward, (*shared, True, True, True, *chosen))


# ---- Parameter.main_grad -------------------------------------------------------------------------


def set_main_grads(layer: Any) -> None:
    for weight in (layer.experts.expand_weight, layer.experts.contract_weight):
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_fills_main_grad(bias: bool) -> None:
    """All other gradients are as without it, after every pass; `grad` of the weights stays None."""
    plain, layer = (
        small_layer.make(expert_bias=bias, resident_experts=[0, 2, 5]) for _ in range(2)
    )
    set_main_grads(layer)
    for step in range(3):
        x = small_layer.tokens(40, 24, seed=step)
        for each in (plain, layer):
            each(x).sum().backward()
    of_plain = dict(plain.named_parameters())
    for name, parameter in layer.named_parameters():
        if name in ("experts.expand_weight", "experts.contract_weight"):
            assert parameter.grad is None
            torch.testing.assert_close(parameter.main_grad, of_plain[name].grad)
        else:
            assert torch.equal(parameter.grad, of_plain[name].grad), name
            assert not hasattr(parameter, "main_grad")


def test_many_small_passes_lose_nothing_in_bf16() -> None:
    """After 256 passes main_grad has the exact sum; bf16 gradients stop growing long before."""
    layer = small_layer.make(dtype=torch.bfloat16)
    plain = small_layer.make(dtype=torch.bfloat16)
    set_main_grads(layer)
    x = small_layer.tokens(16, 24, dtype=torch.bfloat16)
    passes = 256
    for _ in range(passes):
        for each in (layer, plain):
            each(x).sum().backward()
    for name in ("expand_weight", "contract_weight"):
        one = small_layer.make(dtype=torch.bfloat16)
        set_main_grads(one)
        one(x).sum().backward()
        wanted = passes * getattr(one.experts, name).main_grad.double()
        error = lambda got, wanted=wanted: float((got.double() - wanted).norm() / wanted.norm())
        assert error(getattr(layer.experts, name).main_grad) < 1e-5
        assert error(getattr(plain.experts, name).grad) > 1e-2


def test_main_grad_under_autocast() -> None:
    layer, plain = small_layer.make(), small_layer.make()
    set_main_grads(layer)
    x = small_layer.tokens(40, 24)
    for each in (layer, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = each(x)
        y.float().sum().backward()
    for name in ("expand_weight", "contract_weight"):
        weight = getattr(layer.experts, name)
        assert weight.grad is None
        assert_near(weight.main_grad, getattr(plain.experts, name).grad.double(), 2**-8)


def test_a_compiled_layer_fills_main_grad() -> None:
    eager, traced = small_layer.make(expert_bias=True), small_layer.make(expert_bias=True)
    compiled = torch.compile(traced, backend="aot_eager")
    for layer in (eager, traced):
        set_main_grads(layer)
    for step in range(2):
        for run in (eager, compiled):
            run(small_layer.tokens(40, 24, seed=step)).sum().backward()
    for name in ("expand_weight", "contract_weight"):
        got, wanted = getattr(traced.experts, name), getattr(eager.experts, name)
        assert got.grad is None
        torch.testing.assert_close(got.main_grad, wanted.main_grad)


# ---- bad input -----------------------------------------------------------------------------------

BAD = [
    (lambda t: t.bfloat16(), "must have dtype torch.float32, got torch.bfloat16"),
    (lambda t: t[:2], "must have shape"),
    (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "must be contiguous"),
    (lambda t: t.to("meta"), "must be on cpu like its weight, got meta"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[b[1] for b in BAD])
@pytest.mark.parametrize("at, name", [(0, "expand_total"), (1, "contract_total")])
def test_bad_totals(at: int, name: str, change: Any, message: str) -> None:
    inputs = make(SIZES["odd"])
    totals: list[Tensor] = totals_like(inputs)
    totals[at] = change(totals[at])
    with pytest.raises(ValueError, match=f"{name} {message}"):
        moe_experts(tensors_of(inputs), inputs.table, totals)


def test_bad_totals_of_the_ops() -> None:
    inputs = make(SIZES["odd"])
    table, preact = inputs.table, draw(159, 42, seed=1)
    total = totals_like(inputs)[0]
    arguments = (preact, inputs.x, None, table.token_of_row, table.offsets)
    for wrong, message in (
        (total.double(), "total must have dtype float32.*, got float64"),
        (total[:2], r"total must have shape \[3, 42, 37\], got \[2, 42, 37\]"),
        (total.transpose(1, 2).contiguous().transpose(1, 2), "total must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            fomoe.weight_grad_add(wrong, *arguments)
        experts = (inputs.expand_weight, None, inputs.contract_weight, None)
        shared = (inputs.x, inputs.x, inputs.weights, *table, *experts, preact, 0)
        with pytest.raises(ValueError, match=f"expand_{message}"):
            fomoe.moe_experts_backward(*shared, True, True, True, wrong, None)
