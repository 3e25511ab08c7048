"""Outer optimizers, and requirements of meetings and reshuffles on the inner one.

* fedavg: parameters become their mean over the holders (McMahan et al., arXiv 1602.05629).
* diloco: Nesterov SGD on the mean delta (DiLoCo, arXiv 2311.08105).
* local-adamw: mean of the parameters and of both AdamW moments (LocalAdam, Cheng & Glasgow 2025),
  the moments optionally every few rounds only (DES-LOC, arXiv 2505.22549: every 3 and 6).
* ddp: mean of the gradients before every step; no outer step.

The first three are one rule: anchor -= lr * Nesterov(mean delta), with delta = anchor - local; with
lr 1 and momentum 0 it is the mean of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The names of AdamW's moments in torch.optim's state."""


@dataclass(frozen=True)
class OuterRule:
    """The outer step: Nesterov SGD on the anchor."""

    name: str
    """Of the outer optimizer."""
    lr: float
    momentum: float

    def apply_(self, anchor: Tensor, delta: Tensor, momentum: Tensor | None) -> None:
        """In place, flat fp32: m = mu m + d; anchor -= lr (d + mu m). `delta` is used up.

        Every operation rounds once (no fused multiply-add), so that the bits do not depend on the
        machine or on where in a tensor an element is.
        """
        if momentum is not None:
            momentum.mul_(self.momentum).add_(delta)
            delta.add_(momentum * self.momentum)
        anchor.sub_(delta.mul_(self.lr))


def check_adamw(
    optimizer: torch.optim.Optimizer | None, what: str = "optimizer 'local-adamw'"
) -> None:
    """Raises ValueError, which says that `what` needs it, unless the state of `optimizer` is
    AdamW's two moments."""
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        raise ValueError(
            f"{what} needs inner_optimizer to be torch.optim.AdamW or Adam, got "
            f"{type(optimizer).__name__}"
        )
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ValueError(f"{what} is not possible with the state of amsgrad=True")


def check_holds(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    """Raises ValueError if the optimizer holds other tensors in place of parameters of the
    model."""
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {id(parameter) for parameter in model.parameters()}
    left_out = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if left_out and held - own:
        raise ValueError(
            f"inner_optimizer must be made of the model's parameters as they are now: it lacks "
            f"{left_out[0]}, and {len(held - own)} of its {len(held)} are not, or no longer, of it"
        )


def missing_moments(optimizer: torch.optim.Optimizer, tensors: Sequence[tuple[str, Tensor]]) -> str:
    """The name of the first tensor without moments (never stepped), or an empty string."""
    for name, tensor in tensors:
        state: dict[str, Any] = optimizer.state.get(tensor, {})
        if any(moment not in state for moment in MOMENTS):
            return name
    return ""
