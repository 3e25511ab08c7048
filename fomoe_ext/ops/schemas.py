"""The native ops by the names of their arguments, which only csrc/ops/schemas.h puts in order.

Torch calls a native op with its arguments in the order of its schema, and wants gradients in that
order too. What is here reads the order from the schema, so that Python names arguments only.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

import fomoe_ext.ops.native  # noqa: F401  (defines the ops)


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

    Torch could look names up itself, but takes about 0.1 us for each; this costs nothing.
    """
    names = ", ".join(argument_names(op))
    made: dict[str, Any] = {}
    taken = f"*, {names}" if names else ""
    source = f"def bind(native):\n    def {op}({taken}):\n        return native({names})\n"
    exec(source + f"    return {op}", {"__name__": __name__}, made)
    call: Callable[..., Any] = made["bind"](getattr(torch.ops.fomoe, op).default)
    return call


def in_order(op: str) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """What puts values by name into the order of the arguments of fomoe::`op`.

    An argument without a value gets None; a name that is no argument is a TypeError.
    """
    places = {name: place for place, name in enumerate(argument_names(op))}

    def ordered(values: dict[str, Any]) -> tuple[Any, ...]:
        result: list[Any] = [None] * len(places)
        for name, value in values.items():
            if name not in places:
                raise TypeError(f"fomoe::{op} has no argument {name}")
            result[places[name]] = value
        return tuple(result)

    return ordered


def _schema(op: str) -> Any:
    return getattr(torch.ops.fomoe, op).default._schema
