"""What the native ops give on tensors without memory: for tracing, fake tensors, the meta device.

Torch takes such a kernel as soon as any one argument is on the meta device. What it would then give
for the others' device is memory that nobody has written, so arguments on several devices are
refused here, as the kernels of real devices do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

import fomoe_ext.ops.native  # noqa: F401  (defines the ops)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def register_shapes(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates what makes the results of fomoe::`name` from its arguments, as
    `torch.library.register_fake`. ValueError, naming the argument, for tensors on several devices.
    """
    op = getattr(torch.ops.fomoe, name).default
    names = tuple(argument.name for argument in op._schema.arguments)

    def decorate(shapes: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(shapes)
        def checked(*arguments: Any) -> Any:
            on_one_device(dict(zip(names, arguments, strict=False)))
            return shapes(*arguments)

        torch.library.register_fake(f"fomoe::{name}", checked)
        return shapes

    return decorate


def on_one_device(arguments: dict[str, Any]) -> None:
    """ValueError unless all tensors, also those in lists, are on the device of the first."""
    first: tuple[str, torch.device] | None = None
    for name, value in arguments.items():
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(tensor, Tensor):
                continue
            if first is None:
                first = name, tensor.device
            elif tensor.device != first[1]:
                raise ValueError(
                    f"{name}: is on {tensor.device}, wanted {first[1]} as {first[0]}"
                    + (" (meta tensors have no values)" if tensor.is_meta else "")
                )


def plain_floats(tensors: dict[str, Tensor]) -> None:
    """ValueError, naming it, for one that is not of a dtype whose values are what it stands for:
    integers and 8-bit floats need scales, which nobody here knows of.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in _FLOATS)
            raise ValueError(f"{name}: has dtype {tensor.dtype}, wanted one of {kinds}")
