"""MoE blocks of a transformers model become `MoELayer`s, in place, and blocks again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fomoe_ext.hf.attached import attach, detach
from fomoe_ext.hf.families import PARTS, Family, families, family_of
from fomoe_ext.hf.wrappers import (
    plain_name,
    require_names,
    require_unwrapped,
    skeleton,
    uncompiled,
    unwrapped,
    without_compiled,
)
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.placement.placement import Placement

_OF_ROUTER = {
    "scoring": "sigmoid",
    "renormalize": False,
    "scale": 1.0,
    "num_groups": 1,
    "groups_kept": 1,
}
"""What a router does unless a family says otherwise."""
_OPTIONS = (
    "router_scope",
    "skipped_mass",
    "balance",
    "balance_coef",
    "z_loss_coef",
    "bias_update_rate",
    "seed",
)
"""Of `MoELayer`, those that matter while it trains; what it computes is the block's."""


@dataclass
class Origin:
    """What a converted layer was: its family, the block without its weights, and what the block
    does in terms of a `MoELayer`."""

    family: Family
    block: nn.Module
    options: dict[str, Any] = field(default_factory=dict)


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

    Losses that balance experts are added to `model(..., labels=...).loss` in training; a loss of
    one's own is to add every layer's `aux_loss`. `balance="bias"` wants `update_selection_bias` of
    every layer after an optimizer step; families whose files have no place for such a bias, all but
    DeepSeek-V3, can then not be written or restored unless it is zero (a warning says so).

    `model.save_pretrained` of a model with all experts writes the original format; else a folder
    that plain transformers refuses (`attached.SaveConverted`).

    Args:
        model: of a family that `fomoe_ext.hf` knows; on the meta device as well.
        placement, site: who holds which experts, layer by layer; or
        resident: ids of the experts to hold, in all layers. Neither = all experts.
        options: `router_scope`, `skipped_mass`, `balance`, `balance_coef`, `z_loss_coef`,
            `bias_update_rate` and `seed` of `MoELayer`.

    Raises ValueError or TypeError, with nothing changed, for a model without blocks of a known
    family or inside of a wrapper, a placement of other sizes, or a block that does what a
    `MoELayer` cannot.
    """
    if placement is not None and resident is not None:
        raise ValueError("give placement or resident, not both")
    for name in options.keys() - {*_OPTIONS}:
        raise TypeError(
            f"convert() got an unexpected keyword argument {name!r}, options are "
            f"{', '.join(_OPTIONS)}"
        )
    inside = require_unwrapped(model, "convert")
    found = list(_find(inside, placement, site, resident, options))
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
    attach(inside, why_not_original, save_pretrained)
    if options.get("balance") == "bias":
        _warn_of_bias({one.layer.origin.family for one in found})
    return model


def _warn_of_bias(found: set[Family]) -> None:
    for family in found:
        if not family.selection_bias:
            warnings.warn(
                f'balance="bias": files of {family.name} have no place for a selection bias, so '
                "that save_merged, save_pretrained and restore will refuse this model once it has "
                'one; balance="switch" needs none',
                stacklevel=3,
            )


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
        if config is None:
            raise ValueError(
                f"model must be one of transformers, with a config, got {type(model).__name__}"
            )
        # What torch.compile has made of a block goes with the block.
        parent, _, name = without_compiled(path).rpartition(".")
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
    """ValueError for a block with tensors that the layer would not have: adapters, scales."""
    router = (*layer.router.parts, *filter(None, [family.selection_bias]))
    known = {f"{family.router}.{part}" for part in router}
    known |= {f"experts.{PARTS[part]}" for part in layer.experts.parts}
    shared = tuple(f"{name}." for name in family.shared)
    names = (name for name in block.state_dict() if not plain_name(name).startswith(shared or "."))
    if unknown := [name for name in names if plain_name(name) not in known]:
        raise ValueError(
            f"a {family.name} block must have no other tensors than transformers gives it, this "
            f"has {', '.join(unknown[:3])}"
        )


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


def shared_modules(layer: ConvertedMoE) -> dict[str, nn.Module]:
    """The shared expert's modules by the names that the block has for them."""
    names = layer.origin.family.shared
    shared: Any = layer.shared_expert
    if not names:
        return {}
    if len(names) == 1:
        return {names[0]: uncompiled(shared)}
    scaled: Any = uncompiled(shared)
    return {
        name: uncompiled(m) for name, m in zip(names, (scaled.expert, scaled.scale), strict=True)
    }


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
        **{name: getattr(layer.router, name) for name in _OF_ROUTER},
    }
    for wanted in (layer.origin.options, family.options(layer.origin.block, config)):
        for name, value in (_OF_ROUTER | wanted).items():
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
        stack = _rearranged(layer, layer.experts.part(part), to_theirs)
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
