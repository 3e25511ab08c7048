"""Fake kernels of the native ops: shapes and dtypes for tracing, fake tensors and meta tensors.

Torch runs a fake kernel as soon as one argument is on the meta device. Results on the device of the
other arguments would then be uninitialised memory, so arguments on several devices are refused
here, as in the kernels of real devices.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fomoe_ext.ops.schemas import argument_names

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def register_shapes(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a fake kernel of fomoe::`name`, as `torch.library.register_fake`.

    The decorated function names the arguments that its results depend on, whichever these are, and
    is called with them alone. The fake kernel raises ValueError, naming the argument, for tensors
    on several devices. TypeError where the function names what is no argument.
    """
    names = argument_names(name)

    def decorate(shapes: Callable[..., Any]) -> Callable[..., Any]:
        taken = tuple(inspect.signature(shapes).parameters)
        if unknown := set(taken) - set(names):
            raise TypeError(f"fomoe::{name} has no argument {', '.join(sorted(unknown))}")

        def checked(*arguments: Any) -> Any:
            given = dict(zip(names, arguments, strict=True))
            on_one_device(given)
            return shapes(**{name: given[name] for name in taken})

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
                    f"{name} must be on {first[1]} like {first[0]}, got {tensor.device}"
                    + (" (meta tensors have no values)" if tensor.is_meta else "")
                )


def plain_floats(tensors: dict[str, Tensor]) -> None:
    """ValueError, naming the tensor, unless each is float32, bfloat16, float16 or float64.

    Integers and 8-bit floats are refused: their values mean nothing without scales.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            kinds = " or ".join(map(_dtype_name, _FLOATS))
            raise ValueError(f"{name} must have dtype {kinds}, got {_dtype_name(tensor.dtype)}")


def require_floats(x: Tensor, tensors: dict[str, Tensor]) -> None:
    """Raises as `on_one_device` of x and `tensors`, then as `plain_floats` of `tensors`; in a pass,
    where nearly always all is well, it costs the host less."""
    device = x.device
    for tensor in tensors.values():
        if tensor.device != device or tensor.dtype not in _FLOATS:
            on_one_device({"x": x} | tensors)
            plain_floats(tensors)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
