"""What others put around a model, or around its modules, and the names of tensors without it.

torch.compile, data parallelism, averaging and activation checkpointing add parts to the names of a
state dict. Files are to have the names that plain transformers looks for, and no others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Children under which torch's wrappers keep a module: torch.compile, checkpointing, FSDP."""


def plain_name(name: str) -> str:
    """A path or a tensor's name without the parts that torch's wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


def without_compiled(path: str) -> str:
    """Where torch.compile's wrapper is, given where the module in it is.

    The wrapper keeps calling what it was made of: who replaces that replaces the wrapper.
    """
    while path.endswith("._orig_mod"):
        path = path.removesuffix("._orig_mod")
    return path


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile's wrapper stands for; others are returned as they are."""
    while "_orig_mod" in model._modules:
        model = model.get_submodule("_orig_mod")
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile's wrapper and of those that keep it as `module`: DDP, FSDP,
    DataParallel, AveragedModel, engines."""
    while True:
        inside = uncompiled(model)
        child = inside._modules.get("module")
        if child is not None and not hasattr(type(inside), "save_pretrained"):
            inside = child
        if inside is model:
            return model
        model = inside


def require_unwrapped(model: nn.Module, what: str) -> nn.Module:
    """The model, without torch.compile's wrapper. ValueError for one inside of another wrapper,
    which has its own idea of the parameters that are in it."""
    inside = unwrapped(model)
    if inside is not uncompiled(model):
        raise ValueError(
            f"{what} needs the model itself, got a {type(model).__name__} around a "
            f"{type(inside).__name__}: give it what is inside, and wrap it again"
        )
    return inside


class Skeleton(NamedTuple):
    """Names of a model's tensors, and what they are, as plain transformers would make it."""

    shapes: Mapping[str, tuple[int, ...]]
    floats: frozenset[str]
    tied: Mapping[str, str]


def skeleton(model: Any, what: str) -> Skeleton | None:
    """What transformers makes of the model's class and configuration, without memory.

    None for a class that wants more than a configuration. ValueError for a model that is none of
    transformers', whose names nobody can know.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{what}: model must be one of transformers, got a {type(model).__name__}: merge "
            "adapters (merge_and_unload) and give what is inside"
        )
    try:
        with torch.device("meta"):
            plain = type(model)(copy.deepcopy(model.config))
    except (TypeError, AttributeError):
        return None
    tensors = plain.state_dict()
    return Skeleton(
        {name: tuple(value.shape) for name, value in tensors.items()},
        frozenset(name for name, value in tensors.items() if value.is_floating_point()),
        tied_names(plain),
    )


def tied_names(model: Any) -> dict[str, str]:
    """Which parameter is another one, by name, as transformers ties them."""
    found = getattr(model, "all_tied_weights_keys", None)
    return dict(found) if isinstance(found, Mapping) else {}


def require_names(
    tensors: Mapping[str, Tensor], wanted: Skeleton, apart: Iterable[str], what: str
) -> None:
    """ValueError unless tensors are those that transformers will look for.

    apart: paths of blocks, whose tensors are not looked at.
    """
    paths = tuple(f"{path}." for path in apart)
    expected = {name for name in wanted.shapes if not name.startswith(paths)}
    found = {name for name in tensors if not name.startswith(paths)}
    if found != expected:
        only_here, missing = sorted(found - expected), sorted(expected - found)
        said = [f"{', '.join(only_here[:3])} nobody would read"] if only_here else []
        said += [f"{', '.join(missing[:3])} would be missing"] if missing else []
        hint = "adapters must be merged, wrappers and parametrizations be taken off first"
        raise ValueError(
            f"{what}: the model's tensors are not those that its configuration stands for: "
            f"{'; '.join(said)} ({hint})"
        )
    for name in sorted(found):
        value, shape = tensors[name], wanted.shapes[name]
        plain_float = value.is_floating_point() and value.element_size() >= 2
        if tuple(value.shape) != shape or (name in wanted.floats) != plain_float:
            kind = "a float" if name in wanted.floats else "no float"
            raise ValueError(
                f"{what}: by its configuration {name} must be {kind} of shape {list(shape)}, it "
                f"is {value.dtype} {list(value.shape)}"
            )
        if value.is_meta:
            raise ValueError(f"{what}: {name} is on the meta device and has no values")
        if type(value).__name__ == "DTensor":
            raise ValueError(f"{what}: {name} is sharded over ranks, it must be whole on each site")
