"""Members: the tensors of a model that take part in meetings, which must not be replaced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fomoe_ext.layer.mesh import is_sharded
from fomoe_ext.outer.layout import find_moe_layers

_THEN = "; after such a change make a new OuterSync"


class _Tensor(NamedTuple):
    """Properties of a parameter or selection bias when the pieces were laid out."""

    tensor: Tensor
    trained: bool
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Members:
    """A model's MoE layers, and its parameters by name; tied ones appear under each name."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors = {
            name: _Tensor(t, t.requires_grad, t.shape, t.dtype, t.device)
            for name, t in _tensors(model)
        }
        self._layers = dict(find_moe_layers(model))
        self._options = {path: _options(layer) for path, layer in self._layers.items()}

    def change(self) -> str:
        """Says what has changed since the pieces were laid out, by name, or is empty."""
        now = dict(_tensors(self._model))
        for name, before in self._tensors.items():
            problem = _change(before, now.get(name))
            if problem:
                return f"{name} {problem}{_THEN}"
        for name, tensor in now.items():
            if name not in self._tensors and tensor.requires_grad:
                return f"{name} is new{_THEN}"
        return self._change_of_layers()

    def _change_of_layers(self) -> str:
        layers = dict(find_moe_layers(self._model))
        if list(layers.items()) != list(self._layers.items()):
            return f"other MoE layers are there{_THEN}"
        for path, layer in layers.items():
            before, after = self._options[path], _options(layer)
            if before["experts"] != after["experts"]:
                return f"{path} holds other experts than placed; let reshuffle move them"
            for what in before:
                if before[what] != after[what]:
                    return f"{path}.{what} was {before[what]!r} and is {after[what]!r}{_THEN}"
        return ""


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that are averaged as well."""
    yield from model.named_parameters(remove_duplicate=False)
    for path, layer in find_moe_layers(model):
        if layer.balance == "bias":
            yield f"{path}.router.selection_bias".lstrip("."), layer.router.selection_bias


def _options(layer: Any) -> dict[str, Any]:
    stale = () if layer.stale is None else layer.stale.resident_experts
    return {
        "experts": layer.site_experts,
        "router_scope": layer.router_scope,
        "balance": layer.balance,
        "stale": stale,
    }


def _change(before: _Tensor, now: Tensor | None) -> str:
    """Says how a tensor has changed, or is empty. Frozen tensors may change."""
    if now is None:
        return "is gone" if before.trained else ""
    if now.requires_grad and not before.trained:
        return "is trained, and was frozen"
    if before.trained and not now.requires_grad:
        return "is frozen, and was trained"
    if isinstance(before.tensor, nn.Parameter) and not before.trained:
        return ""
    if is_sharded(before.tensor):
        return ""  # FSDP replaces it by the unsharded tensor for a while
    if now is not before.tensor:
        return "is another tensor"
    for what, old, new in (
        ("shape", list(before.shape), list(now.shape)),
        ("dtype", before.dtype, now.dtype),
        ("device", before.device, now.device),
    ):
        if old != new:
            return f"has {what} {new}, not {old}"
    return "" if now.is_contiguous() else "is not contiguous"
