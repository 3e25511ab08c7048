"""`MoELayer`s of a converted model become transformers' blocks again, and files of their format."""

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
    """What a converted layer has that its family's files cannot say, or ""."""
    family = layer.origin.family
    bias = layer.router.selection_bias
    if not family.selection_bias and (bias.is_meta or bool(bias.any())):
        return (
            f"{path} has a selection bias (balance='bias'), for which files of {family.name} have "
            "no place: without it other experts would be chosen. Train on with balance='switch' "
            "after router.selection_bias.zero_(), or keep model.state_dict()"
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
                    f"{path} has {name} = {now[name]!r}, but the configuration, which is all that "
                    f"files say of it, stands for {value!r}"
                )
    known = {f"router.{part}" for part in layer.router.parts}
    known |= {f"experts.{part}" for part in layer.experts.parts}
    of_shared = ("shared_expert.",) if family.shared else ()
    names = (plain_name(name) for name, _ in layer.named_parameters())
    if added := [name for name in names if name not in known and not name.startswith(of_shared)]:
        return (
            f"{path} has parameters for which files of {family.name} have no place: "
            f"{', '.join(added[:3])}"
        )
    return ""


def why_not_original(model: nn.Module, what: str = "it") -> str:
    """Why a converted model cannot be in its original format here, or ""."""
    found = converted_layers(model)
    if not found:
        return f"model must have been converted by fomoe_ext.hf, got {type(model)}"
    for path, layer in found:
        residents = layer.experts.resident_experts
        if len(residents) < layer.num_experts:
            return (
                f"{what} needs all {layer.num_experts} experts of {path}, resident are "
                f"{residents}; fomoe_ext.hf.save_merged collects those of all sites"
            )
    config = getattr(model, "config", None)
    return next(filter(None, (why_no_place(p, layer, config) for p, layer in found)), "")


def _require_whole(model: nn.Module, what: str) -> list[tuple[str, ConvertedMoE]]:
    if reason := why_not_original(model, what):
        raise ValueError(reason)
    return converted_layers(model)


@torch.no_grad()
def share_with_block(layer: ConvertedMoE) -> nn.Module:
    """The original block with the layer's weights in it, in the block's order of elements.

    They share memory. Where the orders differ (gpt-oss) the layer is not to be used until
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
    """After `share_with_block`: the layer's weights are its own again, the same Parameters."""
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
    """Undoes `convert`, in place: the original blocks with the weights as they are now.

    Weights move as in `convert`; the state dict has the original names, shapes and bits. Returns
    the model. Raises ValueError, with nothing changed, where experts are absent, nothing is
    converted or a block cannot do what its layer does.
    """
    inside = require_unwrapped(model, "restore")
    for path, layer in _require_whole(inside, "restore"):
        _put(inside, without_compiled(path), share_with_block(layer))
    detach(inside)
    return model


def save_pretrained(model: nn.Module, folder: str | Path, **options: Any) -> None:
    """`model.save_pretrained(folder, **options)` in the original format; the model stays converted.

    Raises ValueError, with nothing written, where experts are absent, nothing is converted or the
    format has no place for what the model is, and RuntimeError where torch.distributed is
    initialised and this is not its rank 0: transformers writes nothing there.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        raise RuntimeError(
            f"save_pretrained writes at rank 0 of torch.distributed only, this is {dist.get_rank()}"
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
