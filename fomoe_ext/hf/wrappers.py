"""Wrappers around a model or its modules, and the names of tensors without them.

torch.compile, data parallelism, averaging and activation checkpointing add parts to the names in a
state dict. Files must have exactly the names that plain transformers looks for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which torch's wrappers keep a module: torch.compile, checkpointing, FSDP."""


def plain_name(name: str) -> str:
    """A path or tensor name without the parts that torch's wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


def without_compiled(path: str) -> str:
    """The path of torch.compile's wrapper, from the path of the module in it.

    To replace a compiled module, replace its wrapper: the wrapper keeps calling the old module.
    """
    while path.endswith("._orig_mod"):
        path = path.removesuffix("._orig_mod")
    return path


def uncompiled(model: nn.Module) -> nn.Module:
    """The module in torch.compile's wrapper; a module without one is returned as it is."""
    while "_orig_mod" in model._modules:
        model = model.get_submodule("_orig_mod")
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile's wrapper and of wrappers that keep it as `module`: DDP,
    FSDP, DataParallel, AveragedModel, DeepSpeed's engine."""
    while True:
        inside = uncompiled(model)
        child = inside._modules.get("module")
        if child is not None and not hasattr(type(inside), "save_pretrained"):
            inside = child
        if inside is model:
            return model
        model = inside


def require_unwrapped(model: nn.Module, what: str) -> nn.Module:
    """The model without torch.compile's wrapper. ValueError for a model in another wrapper, which
    keeps its own list of the model's parameters."""
    inside = unwrapped(model)
    if inside is not uncompiled(model):
        raise ValueError(
            f"model of {what} must not be wrapped, got a {type(model).__name__} around a "
            f"{type(inside).__name__}: pass the inner model, then wrap it again"
        )
    return inside


class Skeleton(NamedTuple):
    """The tensors of the model that plain transformers would create: shapes, names of the
    floating-point ones, and tied names -> the names they are tied to."""

    shapes: Mapping[str, tuple[int, ...]]
    floats: frozenset[str]
    tied: Mapping[str, str]


def skeleton(model: Any, what: str) -> Skeleton | None:
    """The tensors that transformers creates for the model's class and configuration; allocates
    nothing.

    None for a class whose constructor needs more than a configuration. ValueError for a model that
    is not a `PreTrainedModel`: the expected names are unknown.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model of {what} must be one of transformers, got a {type(model).__name__}: merge "
            "adapters (merge_and_unload) and pass the inner model"
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
    """Names of tied parameters -> names of the parameters that they are tied to."""
    found = getattr(model, "all_tied_weights_keys", None)
    return dict(found) if isinstance(found, Mapping) else {}


def require_names(
    tensors: Mapping[str, Tensor], wanted: Skeleton, apart: Iterable[str], what: str
) -> None:
    """ValueError unless the tensors are those that transformers will look for.

    apart: paths of modules whose tensors are not checked.
    """
    paths = tuple(f"{path}." for path in apart)
    expected = {name for name in wanted.shapes if not name.startswith(paths)}
    found = {name for name in tensors if not name.startswith(paths)}
    if found != expected:
        only_here, missing = sorted(found - expected), sorted(expected - found)
        said = [f"unexpected {', '.join(only_here[:3])}"] if only_here else []
        said += [f"missing {', '.join(missing[:3])}"] if missing else []
        raise ValueError(
            f"{what}: the model must have the tensors that its configuration implies, got "
            f"{'; '.join(said)}. Merge adapters, and remove wrappers and parametrizations first"
        )
    for name in sorted(found):
        value, shape = tensors[name], wanted.shapes[name]
        plain_float = value.is_floating_point() and value.element_size() >= 2
        if tuple(value.shape) != shape or (name in wanted.floats) != plain_float:
            kind = "floats" if name in wanted.floats else "integers or booleans"
            raise ValueError(
                f"{what}: {name} must be {kind} of shape {list(shape)}, as the configuration "
                f"says, got {value.dtype} {list(value.shape)}"
            )
        if value.is_meta:
            raise ValueError(f"{what}: {name} must have values, got a tensor on the meta device")
        if type(value).__name__ == "DTensor":
            raise ValueError(f"{what}: {name} must not be sharded over ranks, got a DTensor")
