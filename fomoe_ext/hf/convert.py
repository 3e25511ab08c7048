"""MoE blocks of a transformers model become `MoELayer`s, in place, and blocks again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fomoe_ext.hf.families import PARTS, Family, families, family_of
from fomoe_ext.moe import MoELayer
from fomoe_ext.placement import Placement


@dataclass
class Origin:
    """What a converted layer was: its family, and the block without its weights."""

    family: Family
    block: nn.Module


class ConvertedMoE(MoELayer):
    """A `MoELayer` in the place of a transformers block; `origin` is what it takes to go back."""

    origin: Origin

    def forward(self, x: Tensor) -> Any:
        """As `MoELayer`; where the block returned (y, scores), which no model reads, (y, None)."""
        y = super().forward(x)
        return (y, None) if self.origin.family.returns_scores else y


class ScaledExpert(nn.Module):
    """A shared expert times the sigmoid of a linear layer, as Qwen2-MoE has it."""

    def __init__(self, expert: nn.Module, scale: nn.Module) -> None:
        super().__init__()
        self.expert, self.scale = expert, scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return torch.sigmoid(self.scale(x)) * self.expert(x)


# ---- recording of router logits ------------------------------------------------------------------


def _make_tap(router_class: type[nn.Module]) -> nn.Module:
    """A module of the router's class that returns the logits it is given.

    transformers records router logits by hooks on modules of that class.
    """
    return _tap_class(router_class)()


@cache
def _tap_class(router_class: type[nn.Module]) -> type[nn.Module]:
    class Tap(router_class):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def forward(self, logits: Tensor) -> tuple[Tensor, None, None]:
            return logits, None, None

        def __reduce__(self) -> Any:
            return _make_tap, (router_class,), self.__dict__

    return Tap


# ---- blocks to layers ----------------------------------------------------------------------------


class _Found(NamedTuple):
    """A block, where it is, and the layer that will be in its place, still without weights."""

    path: str
    parent: nn.Module
    name: str
    block: nn.Module
    layer: ConvertedMoE


def convert(
    model: nn.Module,
    *,
    placement: Placement | None = None,
    site: int = 0,
    resident: Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """Replaces the MoE blocks of a transformers model by `MoELayer`s, in place; returns the model.

    Weights move, nothing is copied: where all experts stay a stacked weight is the same Parameter
    as before (gpt-oss's is rearranged within its memory, an expert at a time), else the rows of
    absent experts are let go. Routing is computed in fp32. Make optimizers after it.

    Args:
        model: of a family that `fomoe_ext.hf` knows; on the meta device as well.
        placement, site: who holds which experts, layer by layer; or
        resident: ids of the experts to hold, in all layers. Neither = all experts.
        options: `router_scope`, `skipped_mass`, `balance`, `balance_coef`, `z_loss_coef`,
            `bias_update_rate` and `seed` of `MoELayer`.

    Raises ValueError or TypeError, with nothing changed, for a model without blocks of a known
    family, a placement of other sizes, or a block that does what a `MoELayer` cannot.
    """
    if placement is not None and resident is not None:
        raise ValueError("give placement or resident, not both")
    found = list(_find(model, placement, site, resident, options))
    if not found and converted_layers(model):
        raise ValueError("model is converted already; fomoe_ext.hf.restore undoes it")
    if not found:
        known = ", ".join(f"{family.name} ({family.block})" for family in families())
        raise ValueError(
            f"model must have MoE blocks of a known family: {known}; {type(model).__name__} has "
            "none. fomoe_ext.hf.register adds a family"
        )
    if placement is not None and placement.num_layers != len(found):
        raise ValueError(
            f"placement must be for the model's {len(found)} MoE layers, got {placement.num_layers}"
        )
    for one in found:
        _fill(one.layer, one.block)
        setattr(one.parent, one.name, one.layer)
    _held_between.clear()
    return model


def _find(
    model: nn.Module,
    placement: Placement | None,
    site: int,
    resident: Sequence[int] | None,
    options: dict[str, Any],
) -> Iterator[_Found]:
    config = getattr(model, "config", None)
    blocks = [(path, m, family_of(m)) for path, m in model.named_modules()]
    number = 0
    for path, block, family in blocks:
        if family is None:
            continue
        ids = resident
        if placement is not None:
            ids = placement.resident(min(number, placement.num_layers - 1), site)
        parent, _, name = path.rpartition(".")
        try:
            layer = _make_layer(family, block, config, ids, number, options)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None
        if placement is not None and placement.num_experts != layer.num_experts:
            raise ValueError(
                f"placement must be for the {layer.num_experts} experts of {path}, got "
                f"{placement.num_experts}"
            )
        yield _Found(path, model.get_submodule(parent), name, block, layer)
        number += 1


def _make_layer(
    family: Family,
    block: nn.Module,
    config: Any,
    resident: Sequence[int] | None,
    number: int,
    options: dict[str, Any],
) -> ConvertedMoE:
    """The layer for a block, on the meta device."""
    experts, router = block.get_submodule("experts"), block.get_submodule(family.router)
    expand = experts.get_parameter(PARTS["expand_weight"])
    num_experts = expand.shape[0]
    hidden_size = router.get_parameter("weight").shape[1]
    layer = ConvertedMoE(
        hidden_size,
        expand[0].numel() // (2 * hidden_size),
        num_experts,
        resident_experts=resident,
        layer_index=number,
        dtype=expand.dtype,
        device="meta",
        **family.options(block, config),
        **options,
    )
    layer.origin = Origin(family, block)
    return layer.train(block.training)


@torch.no_grad()
def _fill(layer: ConvertedMoE, block: nn.Module) -> None:
    """Moves the block's weights into the layer; the block keeps their shapes."""
    family, experts = layer.origin.family, block.get_submodule("experts")
    router = block.get_submodule(family.router)
    layer.make_buffers(experts.get_parameter(PARTS["expand_weight"]).device)
    for part in layer.experts.parts:
        stack = experts.get_parameter(PARTS[part])
        setattr(layer.experts, part, _resident_rows(layer, part, stack))
        setattr(experts, PARTS[part], _shape_of(stack))
    for part in layer.router.parts:
        setattr(layer.router, part, router.get_parameter(part))
        setattr(router, part, _shape_of(router.get_parameter(part)))
    if family.selection_bias:
        layer.router.selection_bias = router.get_buffer(family.selection_bias).float()
    layer.router.tap = _make_tap(type(router))
    layer.router.tap._forward_hooks.update(router._forward_hooks)
    shared = [block.get_submodule(name) for name in family.shared]
    if shared:
        layer.shared_expert = shared[0] if len(shared) == 1 else ScaledExpert(*shared)


def _shape_of(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


def _resident_rows(layer: ConvertedMoE, part: str, stack: nn.Parameter) -> nn.Parameter:
    """The resident experts of a stack of all, as `Experts` has them."""
    to_ours = partial(layer.origin.family.layout.to_ours, part)
    ids = layer.experts.resident_experts
    if len(ids) == len(stack):
        return _rearranged(layer, stack, to_ours)
    rows = stack.new_empty(len(ids), *to_ours(stack[0]).shape)
    for row, expert in zip(rows, ids, strict=True):
        row.copy_(to_ours(stack[expert]))
    return nn.Parameter(rows, stack.requires_grad)


def _rearranged(
    layer: ConvertedMoE, stack: nn.Parameter, change: Callable[[Tensor], Tensor]
) -> nn.Parameter:
    """Every expert of a stack, and of its gradient, changed to another order of its elements.

    Within their memory; the same Parameter where the orders are one.
    """
    if layer.origin.family.layout.alike:
        return stack
    new = nn.Parameter(_reorder(stack.detach(), change), stack.requires_grad)
    if stack.grad is not None:
        new.grad = _reorder(stack.grad, change)
    return new


def _reorder(stack: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    new = stack.view(len(stack), *change(stack[0]).shape)
    between = _between(new[0])
    for source, target in zip(stack, new, strict=True):
        target.copy_(between.copy_(change(source)))
    return new


def _between(like: Tensor) -> Tensor:
    """Memory for one expert on its way, whose values do not matter: the same for all layers. Pieces
    of it that come and go would leave a heap full of holes.
    """
    held = _held_between
    if not held or held[0].device != like.device or held[0].numel() < like.nbytes:
        held[:] = [torch.empty(like.nbytes, dtype=torch.uint8, device=like.device)]
    return held[0][: like.nbytes].view(like.dtype).view(like.shape)


_held_between: list[Tensor] = []


# ---- layers to blocks ----------------------------------------------------------------------------


def converted_layers(model: nn.Module) -> list[tuple[str, ConvertedMoE]]:
    """The converted layers and their paths, in order of appearance."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, ConvertedMoE)]


def layers(model: nn.Module) -> list[MoELayer]:
    """All `MoELayer`s of a model, in order of appearance."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def _require_whole(model: nn.Module, what: str) -> list[tuple[str, ConvertedMoE]]:
    found = converted_layers(model)
    if not found:
        raise ValueError(f"model must have been converted by fomoe_ext.hf, got {type(model)}")
    for path, layer in found:
        residents = layer.experts.resident_experts
        if len(residents) < layer.num_experts:
            raise ValueError(
                f"{what} needs all {layer.num_experts} experts of {path}, resident are "
                f"{residents}; fomoe_ext.hf.save_merged collects those of all sites"
            )
    return found


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
        stack = _rearranged(layer, layer.experts.part(part), to_theirs)
        setattr(experts, PARTS[part], stack)
    for part in layer.router.parts:
        setattr(router, part, layer.router.get_parameter(part))
    if family.selection_bias:
        kind = router.get_buffer(family.selection_bias).dtype  # some versions cast it
        setattr(router, family.selection_bias, layer.router.selection_bias.to(kind))
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
        _rearranged(layer, stack, partial(family.layout.to_ours, part))
        setattr(experts, PARTS[part], _shape_of(stack))
    for part in layer.router.parts:
        setattr(router, part, _shape_of(router.get_parameter(part)))


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def restore(model: nn.Module) -> nn.Module:
    """Undoes `convert`, in place: the original blocks with the weights as they are now.

    Weights move as in `convert`; the state dict has the original names, shapes and bits. Returns
    the model. Raises ValueError, with nothing changed, where experts are absent or nothing is
    converted.
    """
    for path, layer in _require_whole(model, "restore"):
        _put(model, path, share_with_block(layer))
    return model


def save_pretrained(model: nn.Module, folder: str | Path, **options: Any) -> None:
    """`model.save_pretrained(folder, **options)` in the original format; the model stays converted.

    Raises ValueError, with nothing written, where experts are absent or nothing is converted, and
    RuntimeError where torch.distributed is initialised and this is not its rank 0: transformers
    writes nothing there.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        raise RuntimeError(
            f"save_pretrained writes at rank 0 of torch.distributed only, this is {dist.get_rank()}"
        )
    whole = _require_whole(model, "save_pretrained")
    given_back: list[tuple[str, ConvertedMoE]] = []
    try:
        for path, layer in whole:
            given_back.append((path, layer))
            _put(model, path, share_with_block(layer))
        model.save_pretrained(folder, **options)  # type: ignore[operator]
    finally:
        for path, layer in given_back:
            _put(model, path, layer)
            take_back(layer)
