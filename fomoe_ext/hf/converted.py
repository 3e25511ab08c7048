"""The layers of a converted model, the blocks they replace, and the weight layouts of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fomoe_ext.hf.families import Family
from fomoe_ext.hf.wrappers import uncompiled
from fomoe_ext.layer.moe import MoELayer


@dataclass
class Origin:
    """What a converted layer replaces.

    family: of the block. block: the block itself, without its weights. options: the options of
    `MoELayer` that compute what the block computes.
    """

    family: Family
    block: nn.Module
    options: dict[str, Any] = field(default_factory=dict)


class ConvertedMoE(MoELayer):
    """A `MoELayer` that replaces a transformers block; `origin` has what `restore` needs."""

    origin: Origin

    def forward(self, x: Tensor) -> Any:
        """As `MoELayer.forward`. If the block returned (y, scores), the result is (y, None): no
        model of transformers reads the scores."""
        y = super().forward(x)
        return (y, None) if self.origin.family.returns_scores else y


class ScaledExpert(nn.Module):
    """A shared expert times the sigmoid of a linear layer (Qwen2-MoE)."""

    def __init__(self, expert: nn.Module, scale: nn.Module) -> None:
        super().__init__()
        self.expert, self.scale = expert, scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return torch.sigmoid(self.scale(x)) * self.expert(x)


def converted_layers(model: nn.Module) -> list[tuple[str, ConvertedMoE]]:
    """The converted layers and their paths, in order of appearance."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, ConvertedMoE)]


def layers(model: nn.Module) -> list[MoELayer]:
    """All `MoELayer`s of a model, in order of appearance."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def shared_modules(layer: ConvertedMoE) -> dict[str, nn.Module]:
    """The shared expert's modules, by their names in the block."""
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


# ---- recording of router logits ------------------------------------------------------------------


def make_tap(router_class: type[nn.Module]) -> nn.Module:
    """A module of the router's class whose forward returns the logits that it is given.

    transformers records router logits by forward hooks on modules of that class.
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
            return make_tap, (router_class,), self.__dict__

    return Tap


# ---- weights in the layout of a block or a layer -------------------------------------------------


def shape_of(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter on the meta device, in place of one whose values were moved elsewhere."""
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


def rearranged(
    layer: ConvertedMoE, stack: nn.Parameter, change: Callable[[Tensor], Tensor]
) -> nn.Parameter:
    """A stack of experts, and its gradient, in another layout.

    change: maps one expert to the new layout. The memory is reused. Returns the same Parameter if
    both layouts are equal.
    """
    if layer.origin.family.layout.alike:
        return stack
    new = nn.Parameter(_reorder(stack.detach(), change), stack.requires_grad)
    if stack.grad is not None:
        new.grad = _reorder(stack.grad, change)
    return new


def _reorder(stack: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    new = stack.view(len(stack), *change(stack[0]).shape)
    between = _scratch(new[0])
    for source, target in zip(stack, new, strict=True):
        target.copy_(between.copy_(change(source)))
    return new


def _scratch(like: Tensor) -> Tensor:
    """Scratch memory for one expert, kept for all layers: allocating it anew for each would
    fragment the heap.
    """
    held = _held_scratch
    if not held or held[0].device != like.device or held[0].numel() < like.nbytes:
        held[:] = [torch.empty(like.nbytes, dtype=torch.uint8, device=like.device)]
    return held[0][: like.nbytes].view(like.dtype).view(like.shape)


_held_scratch: list[Tensor] = []


def free_scratch() -> None:
    """Frees the scratch memory of `rearranged`."""
    _held_scratch.clear()
