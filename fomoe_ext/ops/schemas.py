"""The native ops by the names of their arguments, which only csrc/ops/schemas.cpp puts in order.

Torch calls a native op with its arguments in the order of its schema, and wants gradients in that
order too. What is here reads the order from the schema, so that Python names arguments only.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad

import fomoe_ext.ops.native  # noqa: F401  (defines the ops)

kernels: dict[str, Callable[..., Any]] = {}
"""The autograd kernels of ops by name, in Python, of an op's arguments in order (`derivatives`).
Through torch's dispatcher a call would go from Python to C++, back to Python and to C++ again."""


@cache
def argument_names(op: str) -> tuple[str, ...]:
    """The arguments of fomoe::`op`, in the order of its schema."""
    return tuple(argument.name for argument in _schema(op).arguments)


@cache
def tensor_names(op: str) -> tuple[str, ...]:
    """The arguments of fomoe::`op` that are a tensor or None, in the order of its schema."""
    kinds = ("Tensor", "Optional[Tensor]")
    return tuple(a.name for a in _schema(op).arguments if str(a.type) in kinds)


@cache
def arguments_type(op: str) -> Any:
    """The named tuple of a call's arguments."""
    return namedtuple(f"arguments_of_{op}", argument_names(op))


def by_name(op: str) -> Callable[..., Any]:
    """fomoe::`op` as a function of keyword arguments alone, all of them required.

    Torch could look names up itself, but takes about 0.1 us for each; this costs nothing. Where the
    op has an autograd kernel (`kernels`), the call begins there.
    """
    native = getattr(torch.ops.fomoe, op).default
    return _function(op, argument_names(op), "target()({})", partial(_begin, op, native))


def traced() -> bool:
    """Whether torch.compile traces, torch.func transforms or forward-mode derivatives are taken:
    they must see each op."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _begin(op: str, native: Any) -> Callable[..., Any]:
    return native if traced() else kernels.get(op, native)


def in_order(op: str) -> Callable[..., tuple[Any, ...]]:
    """A function of keyword arguments that returns them in the order of fomoe::`op`.

    An argument that is not given is None; a name that is not an argument is a TypeError.
    """
    optional = [f"{name}=None" for name in argument_names(op)]
    return _function(f"arguments_of_{op}", optional, "({})", None)


def _function(name: str, parameters: Sequence[str], result: str, target: Any) -> Callable[..., Any]:
    """def name(*, parameters): return result, in which {} stands for the parameters in order, and
    `target` for what is given here."""
    taken = f"*, {', '.join(parameters)}" if parameters else ""
    given = "".join(parameter.partition("=")[0] + ", " for parameter in parameters)
    made: dict[str, Any] = {}
    lines = [
        "def bind(target):",
        f"    def {name}({taken}):",
        f"        return {result.format(given)}",
        f"    return {name}",
    ]
    exec("\n".join(lines), {"__name__": __name__}, made)
    function: Callable[..., Any] = made["bind"](target)
    return function


def _schema(op: str) -> Any:
    return getattr(torch.ops.fomoe, op).default._schema
