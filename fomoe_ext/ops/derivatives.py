"""Which derivatives the native ops have: the first, in backward mode. Every other is refused.

Torch gives an op without a formula zeros for a derivative, or none, and says at most a warning.
Here each op gets a kernel for autograd, which knows a formula for the first derivative or none at
all, and raises NotImplementedError with the op's name where any other is asked for: of second
order (`create_graph=True` and what builds on it), in forward mode, or by torch.func.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import fomoe_ext.ops.native  # noqa: F401  (defines the ops)

_ops = torch.ops.fomoe
_library = torch.library.Library("fomoe", "FRAGMENT")

SetUp = Callable[[Any, tuple, Any], None]
Formula = Callable[..., tuple]


def register_derivative(name: str, formula: Formula, set_up: SetUp) -> None:
    """The op fomoe::`name` has a first derivative.

    `set_up(ctx, inputs, output)` keeps what `formula(ctx, *grads)` needs; that returns a gradient
    or None per argument. Both as of `torch.library.register_autograd`.
    """
    _register(name, formula, set_up)


def refuse_derivative(*names: str) -> None:
    """The ops fomoe::`name` have none: those that compute a first derivative, or change tensors."""
    for name in names:
        _register(name, None, None)


def _register(name: str, formula: Formula | None, set_up: SetUp | None) -> None:
    op = getattr(_ops, name).default
    written = [
        at
        for at, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*arguments)
        if set_up is not None:
            set_up(ctx, arguments, output)
        return output

    def backward(ctx: Any, *grads: Tensor) -> tuple:
        if formula is None:
            raise _refusal(name)
        return formula(ctx, *grads)

    function: Any = type(
        f"Derivative_of_{name}",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def kernel(*arguments: Any) -> Any:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
            raise NotImplementedError(
                f"fomoe::{name} has no derivative in forward mode (torch.autograd.forward_ad, "
                "torch.func.jvp, jacfwd and hessian); torch.autograd.grad and backward are "
                "implemented"
            )
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*arguments)
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"fomoe::{name} has no derivative by torch.func (grad, vjp, jacrev, hessian); "
                "torch.autograd.grad and backward are "
                "implemented, also with torch.func.functional_call"
            )
        if any(arguments[at] is not None for at in written):
            raise _refusal(name)  # what is written would not know of it
        return function.apply(*arguments)

    _library.impl(name, kernel, "Autograd")


def _refusal(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"fomoe::{name} has no derivative: second derivatives (create_graph=True, "
        "torch.autograd.functional.hvp, hessian, gradient penalties) are not implemented"
    )


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None
