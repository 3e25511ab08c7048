"""Derivatives of the layer and the ops: the first, backward, is right; every other is refused.

For an op without a formula torch would return zeros or None, at most with a warning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from expert_inputs import OP_NAMES, SIZES, Sizes, op_arguments
from expert_inputs import make as make_inputs
from small_layer import make, tokens
from torch import Tensor

from fomoe_ext import ops

pytestmark = pytest.mark.usefixtures("one_thread")

fomoe = torch.ops.fomoe
RESIDENT = {"resident_experts": [0, 2, 5]}


def loss_of(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x).square().sum()


def route_loss(logits: Tensor) -> Tensor:
    return ops.route(logits, 2)[0].square().sum()


# ---- of second order -----------------------------------------------------------------------------

SECOND: dict[str, Callable[[Any, Tensor], Any]] = {
    "hvp": lambda f, x: torch.autograd.functional.hvp(f, x, x),
    "vhp": lambda f, x: torch.autograd.functional.vhp(f, x, x),
    "hessian": torch.autograd.functional.hessian,
    "penalty": lambda f, x: penalty(f, x).backward(),
}


def penalty(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(x), x, create_graph=True)
    return grad.square().sum()


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize(
    "options", [{}, RESIDENT, {"router_scope": "resident"} | RESIDENT], ids=str
)
def test_second_derivatives_of_a_layer_are_refused(way: str, options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=r"fomoe::\w+ has no derivative"):
        SECOND[way](loss_of(make(**options)), tokens(5, 24))


@pytest.mark.parametrize("way", SECOND)
def test_second_derivatives_of_routing_are_refused(way: str) -> None:
    with pytest.raises(NotImplementedError, match=r"fomoe::route_backward has no derivative"):
        SECOND[way](route_loss, tokens(5, 6))


def test_second_derivatives_by_weights_are_refused() -> None:
    layer = make(**RESIDENT)
    weights = list(layer.parameters())
    grads = torch.autograd.grad(loss_of(layer)(tokens(5, 24)), weights, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"fomoe::\w+ has no derivative"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), weights, allow_unused=True)


def test_second_derivatives_of_the_verbs_are_refused() -> None:
    """All except gather, which is linear: its backward is an op that has a formula."""
    inputs = make_inputs(SIZES["odd"])
    table, rows = inputs.table, inputs.table.token_of_row.shape[0]
    act = torch.ones(rows, inputs.contract_weight.shape[2])
    calls: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "expand": (lambda t: ops.expand(t, inputs.expand_weight, table), inputs.x),
        "contract": (lambda t: ops.contract(t, inputs.contract_weight, table), act),
        "combine": (lambda t: ops.combine(torch.tanh(t), inputs.weights, table), inputs.x[:1]),
    }
    calls["combine"] = (calls["combine"][0], tokens(rows, 3))
    for run, x in calls.values():
        with pytest.raises(NotImplementedError, match=r"fomoe::\w+ has no derivative"):
            penalty(loss_of(run), x).backward()
    x = inputs.x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(lambda t: ops.gather(t, table))(x), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    counts = (table.row_of_slot >= 0).sum(1, keepdim=True)
    torch.testing.assert_close(second, (2.0 * counts).expand_as(second))


@pytest.mark.parametrize(
    "name", [n for n in OP_NAMES if n not in ("expand", "contract", "moe_experts")]
)
def test_backward_ops_have_no_derivative(name: str) -> None:
    op, arguments = op_arguments(make_inputs(Sizes(12, 9, 7, 3, 3, 2)), "swiglu", grad=False)[name]
    given = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    output = op(*given)
    first = output if isinstance(output, Tensor) else output[0]
    with pytest.raises(NotImplementedError, match=f"fomoe::{name} has no derivative"):
        first.sum().backward()


def test_adding_to_a_total_has_no_derivative() -> None:
    inputs = make_inputs(SIZES["odd"])
    table = inputs.table
    left = torch.ones(table.token_of_row.shape[0], 4, requires_grad=True)
    total = torch.zeros(table.offsets.shape[0] - 1, 4, inputs.x.shape[1])
    arguments = (inputs.x, None, table.token_of_row, table.offsets)
    with pytest.raises(NotImplementedError, match="fomoe::weight_grad_add has no derivative"):
        fomoe.weight_grad_add(total, left, *arguments)
    assert not total.any()
    with torch.no_grad():
        fomoe.weight_grad_add(total, left, *arguments)
    assert total.any()


# ---- in forward mode and by torch.func -----------------------------------------------------------


def dual(f: Callable[[Tensor], Any], x: Tensor) -> None:
    with forward_ad.dual_level():
        f(forward_ad.make_dual(x, torch.ones_like(x)))


OTHER: dict[str, Callable[[Any, Tensor], Any]] = {
    "forward_ad": dual,
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x),
    "forward-mode": lambda f, x: torch.autograd.functional.jacobian(
        f, x, strategy="forward-mode", vectorize=True
    ),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(())),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(x[None]),
}


@pytest.mark.parametrize("way", OTHER)
@pytest.mark.parametrize("frozen", [False, True])
def test_other_derivatives_of_a_layer_are_refused(way: str, frozen: bool) -> None:
    """`frozen`: no parameter requires gradients, so autograd records nothing."""
    layer = make(**RESIDENT).requires_grad_(not frozen)
    with pytest.raises(NotImplementedError, match=r"fomoe::route has no derivative"):
        OTHER[way](loss_of(layer), tokens(5, 24))


@pytest.mark.parametrize("way", OTHER)
def test_other_derivatives_of_routing_are_refused(way: str) -> None:
    with pytest.raises(NotImplementedError, match=r"fomoe::route has no derivative"):
        OTHER[way](route_loss, tokens(5, 6))


def test_tangents_of_weights_are_refused() -> None:
    layer = make(**RESIDENT)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"fomoe::moe_experts has no derivative"),
    ):
        weights = {name: p.detach() for name, p in layer.named_parameters()}
        name = "experts.contract_weight"
        weights[name] = forward_ad.make_dual(weights[name], torch.ones_like(weights[name]))
        torch.func.functional_call(layer, weights, (tokens(5, 24),))


def test_vmap_computes_what_a_loop_does() -> None:
    layer = make(**RESIDENT)
    grads, outputs = [], []
    for run in (torch.func.vmap(layer), lambda x: torch.stack([layer(part) for part in x])):
        x = tokens(2, 5, 24).requires_grad_()
        layer.zero_grad()
        outputs.append(run(x))
        outputs[-1].square().sum().backward()
        grads.append([x.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(grads[0], grads[1])


def test_many_layers_at_once_by_vmap() -> None:
    layers = [make(**RESIDENT, seed=seed) for seed in range(3)]
    x = tokens(5, 24)
    states = torch.func.stack_module_state(layers)
    found = torch.func.vmap(lambda *s: torch.func.functional_call(layers[0], s, (x,)))(*states)
    torch.testing.assert_close(found, torch.stack([layer(x) for layer in layers]))
