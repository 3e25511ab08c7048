"""`restore` and `save_pretrained`: a converted model as transformers' blocks and files again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fomoe_ext.hf.attached import attach, detach
from fomoe_ext.hf.converted import (
    ConvertedMoE,
    converted_layers,
    rearranged,
    shape_of,
    shared_modules,
)
from fomoe_ext.hf.families import PARTS
from fomoe_ext.hf.wrappers import (
    plain_name,
    require_names,
    require_unwrapped,
    skeleton,
    unwrapped,
    without_compiled,
)
from fomoe_ext.layer.router import CHOICE_OPTIONS


def why_no_place(path: str, layer: ConvertedMoE, config: Any) -> str:
    """Why the files of its family cannot store a converted layer, or ""."""
    family = layer.origin.family
    bias = layer.router.selection_bias
    if not family.selection_bias and (bias.is_meta or bool(bias.any())):
        return (
            f"{path} has a selection bias (balance='bias'), which files of {family.name} cannot "
            "store; without it other experts would be chosen. Call router.selection_bias.zero_() "
            "and continue to train with balance='switch', or save model.state_dict()"
        )
    now = {
        "top_k": layer.top_k,
        "activation": layer.experts.activation,
        **{f"router_{name}": getattr(layer.router, name) for name in CHOICE_OPTIONS},
    }
    unless_told = {f"router_{name}": value for name, value in CHOICE_OPTIONS.items()}
    for wanted in (layer.origin.options, family.options(layer.origin.block, config)):
        for name, value in (unless_told | wanted).items():
            if name in now and now[name] != value:
                return (
                    f"{name} of {path} must be {value!r}, as the model's configuration says (files "
                    f"store only that), got {now[name]!r}"
                )
    known = {f"router.{part}" for part in layer.router.parts}
    known |= {f"experts.{part}" for part in layer.experts.parts}
    of_shared = ("shared_expert.",) if family.shared else ()
    names = (plain_name(name) for name, _ in layer.named_parameters())
    if added := [name for name in names if name not in known and not name.startswith(of_shared)]:
        return (
            f"{path} has parameters that files of {family.name} cannot store: "
            f"{', '.join(added[:3])}"
        )
    return ""


def why_not_original(model: nn.Module, what: str = "it") -> str:
    """Why a converted model cannot be written in its original format here, or ""."""
    found = converted_layers(model)
    if not found:
        return f"model must have been converted by fomoe_ext.hf, got {type(model).__name__}"
    for path, layer in found:
        residents = layer.experts.resident_experts
        if len(residents) < layer.num_experts:
            return (
                f"{what} needs all {layer.num_experts} experts of {path}, got {residents}; "
                "fomoe_ext.hf.save_merged collects the experts of all sites"
            )
    config = getattr(model, "config", None)
    return next(filter(None, (why_no_place(p, layer, config) for p, layer in found)), "")


def _require_whole(model: nn.Module, what: str) -> list[tuple[str, ConvertedMoE]]:
    if reason := why_not_original(model, what):
        raise ValueError(reason)
    return converted_layers(model)


@torch.no_grad()
def share_with_block(layer: ConvertedMoE) -> nn.Module:
    """The original block with the layer's weights, in the layout of the block.

    Block and layer share memory. If the layouts differ (gpt-oss), the layer must not be used before
    `take_back`.
    """
    family, block = layer.origin.family, layer.origin.block
    experts, router = block.get_submodule("experts"), block.get_submodule(family.router)
    for part in layer.experts.parts:
        to_theirs = partial(family.layout.to_theirs, part)
        stack = rearranged(layer, layer.experts.part(part), to_theirs)
        setattr(experts, PARTS[part], stack)
    for part in layer.router.parts:
        setattr(router, part, layer.router.get_parameter(part))
    if family.selection_bias:
        bias = layer.router.selection_bias
        cast = bias.to(router.get_buffer(family.selection_bias).dtype)  # some versions cast it
        setattr(router, family.selection_bias, cast if torch.equal(cast.float(), bias) else bias)
    for name, module in shared_modules(layer).items():
        setattr(block, name, module)
    if layer.router.tap is not None:
        router._forward_hooks.update(layer.router.tap._forward_hooks)
    return block.train(layer.training)


@torch.no_grad()
def take_back(layer: ConvertedMoE) -> None:
    """Undoes `share_with_block`: the layer has its weights again, in the same Parameters."""
    family, block = layer.origin.family, layer.origin.block
    experts, router = block.get_submodule("experts"), block.get_submodule(family.router)
    for part in layer.experts.parts:
        stack = experts.get_parameter(PARTS[part])
        rearranged(layer, stack, partial(family.layout.to_ours, part))
        setattr(experts, PARTS[part], shape_of(stack))
    for part in layer.router.parts:
        setattr(router, part, shape_of(router.get_parameter(part)))


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def restore(model: nn.Module) -> nn.Module:
    """Undoes `convert`, in place: puts the original blocks back, with the current weights.

    Weights are moved as in `convert`. An untrained model has the same state dict as before the
    conversion: names, shapes and bits. Returns the model. Raises ValueError, and leaves the model
    as it is, if experts are absent, if nothing is converted, or if a block cannot compute what its
    layer computes.
    """
    inside = require_unwrapped(model, "restore")
    for path, layer in _require_whole(inside, "restore"):
        _put(inside, without_compiled(path), share_with_block(layer))
    detach(inside)
    return model


def save_pretrained(model: nn.Module, folder: str | Path, **options: Any) -> None:
    """`model.save_pretrained(folder, **options)` in the original format; the model stays converted.

    Raises ValueError, and writes nothing, if experts are absent, if nothing is converted, or if the
    format cannot store the model. Raises RuntimeError at ranks of torch.distributed other than 0,
    where transformers writes nothing.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        raise RuntimeError(
            "save_pretrained must be called at rank 0 of torch.distributed, got rank "
            f"{dist.get_rank()}"
        )
    inside: Any = unwrapped(model)
    whole = _require_whole(inside, "save_pretrained")
    tensors = {plain_name(name): value for name, value in inside.state_dict().items()}
    if wanted := skeleton(inside, "save_pretrained"):
        require_names(tensors, wanted, [plain_name(path) for path, _ in whole], "save_pretrained")
    given_back: list[tuple[str, ConvertedMoE]] = []
    try:
        for path, layer in whole:
            given_back.append((path, layer))
            _put(inside, path, share_with_block(layer))
        of_blocks = inside.state_dict()
        if any(plain_name(name) != name for name in of_blocks) and not options.get("state_dict"):
            options["state_dict"] = {plain_name(n): value for n, value in of_blocks.items()}
        detach(inside)
        inside.save_pretrained(folder, **options)
    finally:
        for path, layer in given_back:
            _put(inside, path, layer)
            take_back(layer)
        attach(inside, why_not_original, save_pretrained)
