"""First derivatives of the native ops, in backward mode; any other derivative is refused.

For an op without a formula torch returns zeros or None as its derivative, with a warning at most.
Here each op gets an autograd kernel. It has a formula for the first derivative, or none. It raises
NotImplementedError with the op's name for second derivatives (`create_graph=True` and what builds
on it), forward mode and torch.func.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fomoe_ext.ops.schemas import argument_names, arguments_type, in_order, kernels

_ops = torch.ops.fomoe
_library = torch.library.Library("fomoe", "FRAGMENT")

Gradients: TypeAlias = dict[str, Tensor | None]
SetUp = Callable[[Any, Any, Any], None]
Formula = Callable[..., Gradients]


def register_derivative(name: str, formula: Formula, set_up: SetUp) -> None:
    """Gives the op fomoe::`name` a first derivative.

    `set_up(ctx, given, output)` keeps what the formula needs; `given` has the arguments by name.
    `formula(ctx, needed, *grads)` returns the gradients by the arguments' names; an argument that
    is not named gets None. `needed` says of each argument, by name, whether it needs a gradient.
    The op's first result alone is differentiable: the formula is asked where that has a gradient,
    and gets None for the others. The rest is as in `torch.library.register_autograd`.
    """
    _register(name, formula, set_up)


def refuse_derivative(*names: str) -> None:
    """Refuses derivatives of the ops fomoe::`name`: they compute a derivative or write tensors."""
    for name in names:
        _register(name, None, None)


def _register(name: str, formula: Formula | None, set_up: SetUp | None) -> None:
    op = getattr(_ops, name).default
    by_name, ordered = arguments_type(name)._make, in_order(name)
    nothing = (None,) * len(argument_names(name))
    written = [
        at
        for at, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*arguments)
        if set_up is not None:
            # Else torch fills zeros in for results that have no gradient, however large they are.
            ctx.set_materialize_grads(False)
            set_up(ctx, by_name(arguments), output)
        return output

    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        if formula is None:
            raise _refusal(name)
        if grads[0] is None:  # no result of an op but the first has a gradient
            return nothing
        return ordered(**formula(ctx, by_name(ctx.needs_input_grad), *grads))

    function: Any = type(
        f"Derivative_of_{name}",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )
    # `function.apply` itself only looks, before this, for what the kernel has refused already.
    apply = super(torch.autograd.Function, function).apply

    def kernel(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
            raise NotImplementedError(
                f"fomoe::{name} has no derivative in forward mode (torch.autograd.forward_ad, "
                "torch.func.jvp, jacfwd and hessian); torch.autograd.grad and backward are "
                "implemented"
            )
        if not (torch.is_grad_enabled() and any(map(_requires_grad, arguments))):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*arguments)
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"fomoe::{name} has no derivative by torch.func (grad, vjp, jacrev, hessian); "
                "torch.autograd.grad and backward are "
                "implemented, also with torch.func.functional_call"
            )
        if any(arguments[at] is not None for at in written):
            raise _refusal(name)  # a tensor that is written has no gradient formula
        return apply(*arguments)

    kernels[name] = kernel
    _library.impl(name, kernel, "Autograd")


def _refusal(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"fomoe::{name} has no derivative: second derivatives (create_graph=True, "
        "torch.autograd.functional.hvp, hessian, gradient penalties) are not implemented"
    )


def _requires_grad(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None
