"""Checks of the input of an MoE layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn


def autocasts(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of x."""
    return not x.is_meta and torch.is_autocast_enabled(
        x.device.type
    )  # there is no autocast for meta


def check_shape(x: Tensor, hidden_size: int) -> None:
    """Raises TypeError unless x is a tensor, ValueError unless its shape is [..., hidden_size]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.shape[-1] != hidden_size:
        raise ValueError(f"x must have shape [..., {hidden_size}], got {list(x.shape)}")


def check_kind(x: Tensor, weight: Tensor, read: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
    """Checks x against the layer's `weight` and the tensors that a pass will `read`, with names.

    Raises ValueError unless x has the dtype and device of `weight`, and if one of the tensors to
    read is on the meta device but x is not.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must have a float dtype, got {x.dtype}")
    # With weights on meta torch's linear layers would return uninitialised memory.
    if not x.is_meta and (missing := [name for name, tensor in read() if tensor.is_meta]):
        raise ValueError(
            f"{missing[0]} must be on the device of x, {x.device}, got meta; after building "
            "on meta call to_empty(device=...), then reset_parameters() or "
            "load_state_dict(...)"
        )
    if x.device != weight.device:
        raise ValueError(f"x must be on the layer's device {weight.device}, got {x.device}")
    if x.dtype != weight.dtype and not autocasts(x):
        raise ValueError(f"x must have the layer's dtype {weight.dtype}, got {x.dtype}")


def tensors_of(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module itself, by names that begin with its path."""
    for name, tensor in chain(module._parameters.items(), module._buffers.items()):
        if tensor is not None:
            yield f"{path}.{name}", tensor


def all_tensors_of(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Also those of submodules, except where accelerate moves the weights in at run time."""
    for inner_path, inner in module.named_modules(prefix=path):
        if not hasattr(inner, "_hf_hook"):
            yield from tensors_of(inner_path, inner)
