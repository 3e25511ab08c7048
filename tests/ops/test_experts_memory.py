"""moe_experts' backward overwrites the pre-activations where nobody else needs them: when it may,
and that no gradient changes by a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_inputs import SIZES, draw, leaves
from expert_inputs import make as make_layer
from grouped_gemms import GROUPS, SMALL, WIDE, Inputs, make, moe_arguments, poison
from kernel_device import Device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fomoe_ext import ops
from fomoe_ext.ops.schemas import argument_names

pytestmark = pytest.mark.usefixtures("one_thread")
fomoe = torch.ops.fomoe
NAMES = ("x", "weights", "expand_weight", "expand_bias", "contract_weight", "contract_bias")


# ---- the same bits -------------------------------------------------------------------------------


def by_verbs(device: Device, inputs: Inputs, preact: Tensor, number: int) -> list[Tensor]:
    """The gradients by one op for each kernel; in the order of NAMES."""
    on = lambda t: None if t is None else t.to(device.tensors)
    x, weights, token_of_row, slot_of_row, row_of_slot, offsets, tiles = map(
        on, (inputs.x, inputs.weights, *inputs.table)
    )
    grad_y, expand_weight, contract_weight, contract_bias = map(
        on, (inputs.grad_y, inputs.expand_weight, inputs.contract_weight, inputs.contract_bias)
    )
    tables, op = (token_of_row, slot_of_row, offsets, tiles), device.op
    grad_preact, scaled_act, grad_weights = op("contract_backward")(
        grad_y, contract_weight, contract_bias, preact, weights, *tables, number
    )
    rows = op("grouped_rows")(grad_preact, expand_weight, offsets, tiles)
    return [
        op("combine")(rows, None, row_of_slot),
        grad_weights,
        op("weight_grad")(grad_preact, x, None, token_of_row, offsets),
        op("bias_grad")(grad_preact, None, None, None, offsets),
        op("weight_grad")(grad_y, scaled_act, token_of_row, None, offsets),
        op("bias_grad")(grad_y, token_of_row, weights, slot_of_row, offsets),
    ]


CASES = {
    "uneven": (GROUPS["zipf"], *SMALL),
    "empty experts": (GROUPS["one takes all"], *SMALL),
    "whole tiles": (GROUPS["whole tiles"], *SMALL),
    "few rows": (GROUPS["few rows"], *WIDE),  # the contract weight's gradient comes last
    "no rows": (GROUPS["no rows"], *SMALL),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "relu2", "clamped_swiglu"])
@pytest.mark.parametrize("groups, hidden, size", CASES.values(), ids=list(CASES))
def test_bits_do_not_depend_on_whose_memory_it_is(
    device: Device, groups: Any, hidden: int, size: int, activation: str, dtype: torch.dtype
) -> None:
    number, gates = ops.ACTIVATIONS[activation], 2 if ops.is_gated(activation) else 1
    inputs = make(groups, hidden, size, dtype, bias=True, gates=gates)
    on = lambda a: a.to(device.tensors) if isinstance(a, Tensor) else a
    arguments = [on(a) for a in moe_arguments(inputs)]
    _, preact = device.op("moe_experts")(*arguments, number, True)
    kept = preact.clone()
    wanted = by_verbs(device, inputs, preact, number)
    backward = device.op("moe_experts_backward")

    def gradients(freed: bool, need_x: bool = True, totals: Any = (None, None)) -> list[Tensor]:
        poison(device)
        own = kept.clone()
        own[inputs.count :] = torch.nan
        free = own if freed else None
        found = backward(
            on(inputs.grad_y), *arguments, own, number, need_x, True, True, *totals, free
        )
        assert own.numel() == (0 if freed else kept.numel())
        if not freed:
            assert torch.equal(own[: inputs.count], kept[: inputs.count])
        return list(found)

    for freed in (False, True):
        for name, mine, right in zip(NAMES, gradients(freed), wanted, strict=True):
            assert torch.equal(mine, right), name
        without_x = gradients(freed, need_x=False)
        assert without_x[0].shape == (0, hidden)
        for name, mine, right in zip(NAMES[1:], without_x[1:], wanted[1:], strict=True):
            assert torch.equal(mine, right), name
        totals = [torch.ones(wanted[at].shape, device=device.tensors) for at in (2, 4)]
        both = gradients(freed, totals=totals)
        for at in (0, 1, 3, 5):
            assert torch.equal(both[at], wanted[at]), NAMES[at]
        if not freed:
            sums = totals
        assert all(map(torch.equal, totals, sums))


def test_only_the_preact_itself_is_freed(device: Device) -> None:
    inputs = make(GROUPS["few rows"], *SMALL, torch.float32)
    arguments = [
        a.to(device.tensors) if isinstance(a, Tensor) else a for a in moe_arguments(inputs)
    ]
    grad_y, preact = inputs.grad_y.to(device.tensors), inputs.preact.to(device.tensors)
    call = (grad_y, *arguments, preact, 0, True, True, True, None, None)
    backward = device.op("moe_experts_backward")
    with pytest.raises(ValueError, match="preact_to_free must be preact, got a tensor elsewhere"):
        backward(*call, preact.clone())
    with pytest.raises(ValueError, match="preact_to_free must have shape"):
        backward(*call, preact[:-1])


# ---- when it may ---------------------------------------------------------------------------------


class Backwards(TorchDispatchMode):
    """Notes of each call of moe_experts_backward whether it may free the pre-activations."""

    def __init__(self) -> None:
        super().__init__()
        self.freed: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is fomoe.moe_experts_backward.default:
            at = argument_names("moe_experts_backward").index("preact_to_free")
            self.freed.append(args[at] is not None)
        return function(*args, **(kwargs or {}))


def layer(
    at: Any, table: ops.RowTable, held: list[Tensor], hold: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """moe_experts, of whose pre-activations `hold` keeps something in `held`."""
    x, weights, expand_weight, contract_weight = at
    y, preact = fomoe.moe_experts(
        x, weights, *table, expand_weight, None, contract_weight, None, 0, True
    )
    if hold is not None:
        held.append(hold(preact))
    return y


def kept_by_a_hook(held: list[Tensor]) -> Any:
    return torch.autograd.graph.saved_tensors_hooks(
        lambda t: (held.append(t), t)[1], lambda packed: packed
    )


def copied_by_hooks(held: list[Tensor]) -> Any:
    return torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)


@pytest.mark.parametrize("totals", [False, True])
@pytest.mark.parametrize(
    "retains, hooks, hold, freed",
    [
        (False, None, None, True),
        (True, None, None, False),
        (False, kept_by_a_hook, None, False),
        (False, copied_by_hooks, None, True),
        (False, None, lambda preact: preact, False),
        (False, None, lambda preact: preact.detach(), False),
        (False, None, lambda preact: preact[1:], False),
    ],
    ids=["plain", "retain_graph", "hook", "copies", "held", "alias", "view"],
)
def test_memory_with_another_owner_is_left_alone(
    retains: bool, hooks: Any, hold: Any, freed: bool, totals: bool
) -> None:
    if totals and hold is not None:
        pytest.skip("with totals nobody is given the pre-activations")
    inputs = make_layer(SIZES["odd"])
    tensors = (inputs.x, inputs.weights, inputs.expand_weight, inputs.contract_weight)
    grad_y, held = draw(*inputs.x.shape, seed=5), []

    def forward(at: Any, hold: Any) -> Tensor:
        if not totals:
            return layer(at, inputs.table, held, hold)
        into = {f"{name}_total": torch.zeros_like(t) for name, t in
                zip(("expand", "contract"), tensors[2:], strict=True)}  # fmt: skip
        return ops.moe_experts(*at[:2], inputs.table, *at[2:], **into)

    plain, mine = leaves(*tensors), leaves(*tensors)
    wanted = torch.autograd.grad(forward(plain, None), plain, grad_y, allow_unused=totals)
    if hooks is None:
        y = forward(mine, hold)
    else:
        with hooks(held):
            y = forward(mine, hold)
    before = [t.clone() for t in held]
    with Backwards() as seen:
        for _ in range(1 + retains):
            got = torch.autograd.grad(y, mine, grad_y, retain_graph=retains, allow_unused=totals)
            for grad, right in zip(got, wanted, strict=True):
                assert grad is right or torch.equal(grad, right)
    assert seen.freed == [freed] * (1 + retains)
    assert all(map(torch.equal, held, before))
    if not retains:
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(y, mine, grad_y, allow_unused=totals)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_pre_activations_are_freed(reentrant: bool) -> None:
    inputs = make_layer(SIZES["odd"])
    tensors = (inputs.x, inputs.weights, inputs.expand_weight, inputs.contract_weight)
    forward = lambda *at: ops.moe_experts(*at[:2], inputs.table, *at[2:])
    plain, mine = leaves(*tensors), leaves(*tensors)
    forward(*plain).sum().backward()
    with Backwards() as seen:
        checkpoint(forward, *mine, use_reentrant=reentrant).sum().backward()
    assert seen.freed == [True]
    for one, other in zip(mine, plain, strict=True):
        assert torch.equal(one.grad, other.grad)


def test_compiled_calls_keep_them() -> None:
    """What a compiled graph keeps is its own to free."""
    inputs = make_layer(SIZES["odd"])
    tensors = (inputs.x, inputs.weights, inputs.expand_weight, inputs.contract_weight)
    forward = lambda *at: ops.moe_experts(*at[:2], inputs.table, *at[2:])
    plain, mine = leaves(*tensors), leaves(*tensors)
    forward(*plain).sum().backward()
    torch.compile(forward, backend="aot_eager")(*mine).sum().backward()
    for one, other in zip(mine, plain, strict=True):
        assert torch.equal(one.grad, other.grad)


def test_no_gradient_of_the_pre_activations_is_made_up() -> None:
    """Torch would fill in zeros for results without one: as many as pre-activations."""
    inputs = make_layer(SIZES["odd"])
    made: list[torch.Size] = []

    class Zeros(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "zero" in str(function):
                made.append(args[0].shape if isinstance(args[0], Tensor) else args[0])
            return function(*args, **(kwargs or {}))

    mine = leaves(inputs.x, inputs.weights, inputs.expand_weight, inputs.contract_weight)
    y = ops.moe_experts(*mine[:2], inputs.table, *mine[2:])
    act = ops.expand(mine[0], mine[2], inputs.table)
    grads = (torch.ones_like(y), torch.ones_like(act))
    with Zeros():
        torch.autograd.grad((y, act), mine, grads)
    assert not made
