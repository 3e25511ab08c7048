"""What `print(module)` shows of the arguments that a module was built with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_MOST_IDS = 8


def changed_arguments(kind: type, values: Mapping[str, Any]) -> str:
    """`name=value` for each argument of `kind` that has no default or another value than that.

    `values` must have an entry for every argument: KeyError otherwise, so that a new argument
    cannot be forgotten.
    """
    shown = []
    for name, parameter in inspect.signature(kind).parameters.items():
        value = values[name]
        if parameter.default is inspect.Parameter.empty or value != parameter.default:
            shown.append(f"{name}={_text(value)}")
    return ", ".join(shown)


def placed(tensor: Tensor) -> dict[str, Any]:
    """The arguments `device` and `dtype` of a module with this weight; None where torch's default
    would be the same."""
    device, dtype = tensor.device, tensor.dtype
    same = torch.empty(0).device == device
    return {
        "device": None if same else str(device),
        "dtype": None if dtype == torch.get_default_dtype() else dtype,
    }


def ids_unless_all(ids: tuple[int, ...], num_experts: int) -> tuple[int, ...] | None:
    """The argument `resident_experts` of a module that holds these experts; None = all."""
    return None if len(ids) == num_experts else ids


def _text(value: Any) -> str:
    if not isinstance(value, tuple) or len(value) <= _MOST_IDS:
        return repr(list(value) if isinstance(value, tuple) else value)
    first = ", ".join(map(repr, value[:3]))
    return f"[{first}, ..., {value[-1]!r}] ({len(value)})"
