"""`convert`: replaces the MoE blocks of a transformers model by `MoELayer`s, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import nn

from fomoe_ext.checks import an_instance
from fomoe_ext.hf.attached import attach
from fomoe_ext.hf.converted import (
    ConvertedMoE,
    Origin,
    ScaledExpert,
    converted_layers,
    free_scratch,
    make_tap,
    rearranged,
    shape_of,
)
from fomoe_ext.hf.families import PARTS, Family, families, family_of
from fomoe_ext.hf.restore import save_pretrained, why_not_original
from fomoe_ext.hf.wrappers import plain_name, require_unwrapped, without_compiled
from fomoe_ext.placement.placement import Placement


class ConvertOptions(TypedDict, total=False):
    """Options of `MoELayer` that `convert` takes, with the meaning and the default that they have
    there. All other options of the layer follow from the block."""

    router_scope: Literal["global", "resident"]
    skipped_mass: Literal["drop", "rescale"]
    router_z_loss_coef: float
    balance: Literal["none", "switch", "entropy", "bias"]
    balance_coef: float
    balance_bias_rate: float
    seed: int


class _Found(NamedTuple):
    """A block, its place in the model, and the layer that will replace it, still without weights.

    path: of the block. parent, name: the module that gets the layer, and the attribute.
    """

    path: str
    parent: nn.Module
    name: str
    block: nn.Module
    layer: ConvertedMoE


def convert(
    model: nn.Module,
    placement: Placement | None = None,
    site: int | None = None,
    *,
    resident: Sequence[int] | None = None,
    **options: Unpack[ConvertOptions],
) -> nn.Module:
    """Replaces the MoE blocks of a transformers model by `MoELayer`s, in place; returns the model.

    Weights are moved, not copied. If all experts stay, a stacked weight is the same Parameter as
    before (gpt-oss's is rearranged within its memory, one expert at a time); else the memory of the
    absent experts is freed. Routing is computed in fp32. Create optimizers after the conversion.

    In training, `model(..., labels=...).loss` includes the losses that balance experts. If you
    compute the loss yourself, add the `aux_loss` of every layer. With `balance="bias"`, call
    `update_selection_bias` of every layer after each optimizer step. Only the files of DeepSeek-V3
    can store such a bias: models of the other families cannot be saved or restored while it is
    nonzero (a warning says so).

    `model.save_pretrained` of a model with all experts writes the original format; otherwise it
    writes a folder that plain transformers refuses to load (`attached.SaveConverted`).

    Args:
        model: of a supported family; it may be on the meta device.
        placement, site: which experts each site holds, layer by layer, and the number of this site.
        resident: instead of a placement: ids of the experts to hold, the same in all layers.
            Without placement and resident all experts are held.
        options: `ConvertOptions`.

    Raises ValueError or TypeError, and leaves the model as it is, for a placement without a site, a
    placement of other sizes, a model in a wrapper or without blocks of a supported family, or a
    block with a feature that `MoELayer` lacks.
    """
    an_instance(nn.Module, model=model)
    _check_choice(placement, site, resident)
    known = ConvertOptions.__annotations__
    for name in options.keys() - known.keys():
        raise TypeError(
            f"convert() got an unexpected keyword argument {name!r}, options are {', '.join(known)}"
        )
    inside = require_unwrapped(model, "convert")
    found = list(_find(inside, placement, site, resident, options))
    if not found:
        raise ValueError(_why_none(model))
    if placement is not None and placement.num_layers != len(found):
        raise ValueError(
            f"placement must be for the model's {len(found)} MoE layers, got {placement.num_layers}"
        )
    for one in found:
        _fill(one.layer, one.block)
        setattr(one.parent, one.name, one.layer)
    free_scratch()
    attach(inside, why_not_original, save_pretrained)
    if options.get("balance") == "bias":
        _warn_of_bias({one.layer.origin.family for one in found})
    return model


def _check_choice(
    placement: Placement | None, site: int | None, resident: Sequence[int] | None
) -> None:
    """ValueError or TypeError unless the arguments name one set of experts."""
    if placement is not None:
        an_instance(Placement, placement=placement)
    if placement is not None and resident is not None:
        raise ValueError("placement and resident must not be given together")
    if placement is not None and site is None:
        raise ValueError(
            f"site must be given with a placement: the number of this site, in "
            f"[0, {placement.num_sites})"
        )
    if placement is None and site is not None:
        raise ValueError(f"site must be given with a placement, got site = {site} without one")


def _why_none(model: nn.Module) -> str:
    """Why a model has no block to convert."""
    if converted_layers(model):
        return "model is converted already; fomoe_ext.hf.restore undoes it"
    known = ", ".join(f"{family.name} ({family.block})" for family in families())
    return (
        f"model must have MoE blocks of a supported family ({known}), got "
        f"{type(model).__name__} without one. fomoe_ext.hf.register adds a family"
    )


def _warn_of_bias(found: set[Family]) -> None:
    for family in found:
        if not family.selection_bias:
            warnings.warn(
                f'balance="bias": files of {family.name} cannot store a selection bias. '
                "save_merged, save_pretrained and restore will refuse this model once the bias is "
                'not zero. balance="switch" uses no bias',
                stacklevel=3,
            )


def _find(
    model: nn.Module,
    placement: Placement | None,
    site: int | None,
    resident: Sequence[int] | None,
    options: ConvertOptions,
) -> Iterator[_Found]:
    config = getattr(model, "config", None)
    blocks = [(path, m, family_of(m)) for path, m in model.named_modules()]
    number = 0
    for path, block, family in blocks:
        if family is None:
            continue
        ids = resident
        if placement is not None and site is not None:
            ids = placement.resident(min(number, placement.num_layers - 1), site)
        if config is None:
            raise ValueError(
                f"model must be one of transformers, with a config, got {type(model).__name__}"
            )
        # A wrapper of torch.compile around the block is replaced with it.
        parent, _, name = without_compiled(path).rpartition(".")
        count = len(_expand_weight(block))
        if placement is not None and placement.num_experts != count:
            raise ValueError(
                f"placement must be for the {count} experts of {path}, got {placement.num_experts}"
            )
        try:
            layer = _make_layer(family, block, config, ids, number, options)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None
        yield _Found(path, model.get_submodule(parent), name, block, layer)
        number += 1


def _expand_weight(block: nn.Module) -> nn.Parameter:
    """The stack of a block's first matrices, of all experts."""
    return block.get_submodule("experts").get_parameter(PARTS["expand_weight"])


def _make_layer(
    family: Family,
    block: nn.Module,
    config: Any,
    resident: Sequence[int] | None,
    number: int,
    options: ConvertOptions,
) -> ConvertedMoE:
    """The layer for a block, on the meta device."""
    expand, router = _expand_weight(block), block.get_submodule(family.router)
    num_experts = expand.shape[0]
    hidden_size = router.get_parameter("weight").shape[1]
    what_it_does = family.options(block, config)
    layer = ConvertedMoE(
        hidden_size,
        expand[0].numel() // (2 * hidden_size),
        num_experts,
        resident_experts=resident,
        layer_index=number,
        dtype=expand.dtype,
        device="meta",
        **what_it_does,
        **options,
    )
    layer.origin = Origin(family, block, what_it_does)
    _require_known(family, block, layer)
    return layer.train(block.training)


def _require_known(family: Family, block: nn.Module, layer: ConvertedMoE) -> None:
    """ValueError for a block with tensors that the layer lacks, such as adapters or scales."""
    router = (*layer.router.parts, *filter(None, [family.selection_bias]))
    known = {f"{family.router}.{part}" for part in router}
    known |= {f"experts.{PARTS[part]}" for part in layer.experts.parts}
    shared = tuple(f"{name}." for name in family.shared)
    names = (name for name in block.state_dict() if not plain_name(name).startswith(shared or "."))
    if unknown := [name for name in names if plain_name(name) not in known]:
        raise ValueError(
            f"a {family.name} block must have only the tensors that transformers gives it, got "
            f"{', '.join(unknown[:3])} in addition"
        )


@torch.no_grad()
def _fill(layer: ConvertedMoE, block: nn.Module) -> None:
    """Moves the block's weights into the layer. The block keeps parameters on the meta device."""
    family, experts = layer.origin.family, block.get_submodule("experts")
    router = block.get_submodule(family.router)
    layer.make_buffers(experts.get_parameter(PARTS["expand_weight"]).device)
    for part in layer.experts.parts:
        stack = experts.get_parameter(PARTS[part])
        setattr(layer.experts, part, _resident_rows(layer, part, stack))
        setattr(experts, PARTS[part], shape_of(stack))
    for part in layer.router.parts:
        setattr(layer.router, part, router.get_parameter(part))
        setattr(router, part, shape_of(router.get_parameter(part)))
    if family.selection_bias:
        layer.router.selection_bias = router.get_buffer(family.selection_bias).float()
    layer.router.tap = make_tap(type(router))
    layer.router.tap._forward_hooks.update(router._forward_hooks)
    shared = [block.get_submodule(name) for name in family.shared]
    if shared:
        layer.shared_expert = shared[0] if len(shared) == 1 else ScaledExpert(*shared)


def _resident_rows(layer: ConvertedMoE, part: str, stack: nn.Parameter) -> nn.Parameter:
    """The resident experts of a stack of all experts, in the layout of `Experts`."""
    to_ours = partial(layer.origin.family.layout.to_ours, part)
    ids = layer.experts.resident_experts
    if len(ids) == len(stack):
        return rearranged(layer, stack, to_ours)
    rows = stack.new_empty(len(ids), *to_ours(stack[0]).shape)
    for row, expert in zip(rows, ids, strict=True):
        row.copy_(to_ours(stack[expert]))
    return nn.Parameter(rows, stack.requires_grad)
