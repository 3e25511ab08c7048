"""The router: scores all experts of all sites for every token and chooses among them.

Shapes use the letters of `fomoe_ext.layer.moe`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_ext import ops
from fomoe_ext.checks import a_bool, an_int, at_least, finite, one_of
from fomoe_ext.layer.arguments import changed_arguments, placed
from fomoe_ext.layer.seeding import fill_normal_
from fomoe_ext.ops.shapes import on_one_device, plain_floats

CHOICE_OPTIONS: dict[str, Any] = {
    "scoring": "sigmoid",
    "renormalize": False,
    "scale": 1.0,
    "num_groups": 1,
    "groups_kept": 1,
}
"""Options of a router that say how it chooses and weighs experts, with their defaults."""


def check_choice(
    num_experts: int,
    top_k: int,
    *,
    scoring: str,
    renormalize: bool,
    scale: float,
    num_groups: int,
    groups_kept: int,
    prefix: str = "",
) -> None:
    """Raises ValueError or TypeError for options by which no router can choose.

    `prefix`: what the caller writes before the names of the `CHOICE_OPTIONS`, for messages.
    """
    groups, kept = f"{prefix}num_groups", f"{prefix}groups_kept"
    at_least(1, num_experts=num_experts, top_k=top_k, **{groups: num_groups, kept: groups_kept})
    one_of(tuple(ops.SCORINGS), **{f"{prefix}scoring": scoring})
    a_bool(**{f"{prefix}renormalize": renormalize})
    finite(0.0, **{f"{prefix}scale": scale})
    if top_k > num_experts:
        raise ValueError(f"top_k must be at most num_experts = {num_experts}, got {top_k}")
    if num_experts % num_groups:
        raise ValueError(f"{groups} must divide num_experts = {num_experts}, got {num_groups}")
    if groups_kept > num_groups:
        raise ValueError(f"{kept} must be at most {groups} = {num_groups}, got {groups_kept}")
    choosable = groups_kept * (num_experts // num_groups)
    if top_k > choosable:
        raise ValueError(
            f"top_k must be at most {choosable}, the experts in {kept} = {groups_kept} groups, "
            f"got {top_k}"
        )


class Router(nn.Module):
    """Scores all experts and chooses `top_k` of them per token.

    weight: [E, D]. bias: [E], added to the logits, or None. selection_bias: fp32 [E], added to the
    scores for the choice but not to the combine weights; zeros until it is loaded or moved by bias
    balancing, and fp32 also after a cast of the module. tap: a module that is called with the
    logits, for libraries that record them by hooks; or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    selection_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: Literal["sigmoid", "softmax"] = "sigmoid",
        renormalize: bool = False,
        scale: float = 1.0,
        num_groups: int = 1,
        groups_kept: int = 1,
        bias: bool = False,
        layer_index: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Sizes and options of `MoELayer`. Raises ValueError or TypeError for bad ones."""
        super().__init__()
        at_least(1, hidden_size=hidden_size)
        at_least(0, layer_index=layer_index)
        an_int(seed=seed)
        a_bool(bias=bias)
        check_choice(
            num_experts,
            top_k,
            scoring=scoring,
            renormalize=renormalize,
            scale=scale,
            num_groups=num_groups,
            groups_kept=groups_kept,
        )
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.scoring, self.renormalize, self.scale = scoring, renormalize, scale
        self.num_groups, self.groups_kept = num_groups, groups_kept
        self.layer_index, self.seed = layer_index, seed
        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
        )
        lines = torch.empty(num_experts, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(lines) if bias else None)
        self.tap: nn.Module | None = None
        self.register_buffer(
            "selection_bias", torch.zeros(num_experts, device=device, dtype=torch.float32)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights of standard deviation 1/sqrt(D) that depend only on (seed, layer_index);
        sets biases to 0.
        """
        fill_normal_(self.weight, self.hidden_size**-0.5, self.seed, "router", self.layer_index)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.selection_bias.zero_()

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parameters, each with a row per expert."""
        return ("weight",) if self.bias is None else ("weight", "bias")

    def logits(self, x: Tensor) -> Tensor:
        """x [T, D] -> logits fp32 [T, E], computed in fp32 also under autocast.

        Raises ValueError for parameters on another device or of another than a float dtype.
        """
        of_router = {name: getattr(self, name) for name in (*self.parts, "selection_bias")}
        on_one_device({"x": x} | of_router)
        plain_floats(of_router)
        plain = nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
        with plain:
            bias = None if self.bias is None else self.bias.float()
            logits = F.linear(x.float(), self.weight.float(), bias)
        if self.tap is not None:
            self.tap(logits)
        return logits

    def choose(
        self, logits: Tensor, allowed: Tensor | None = None, top_k: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [T, E] -> combine weights fp32 [T, K] and experts int32 [T, K] (`ops.route`).

        allowed: bool [E], the experts that may be chosen; None = all. top_k: instead of the
        router's own. Raises as `ops.route` does, e.g. ValueError for NaN logits.
        """
        return ops.route(
            logits, self.top_k if top_k is None else top_k, allowed=allowed, **self._options()
        )

    def _choose_and_measure(
        self, logits: Tensor, allowed: Tensor | None = None, top_k: int | None = None
    ) -> tuple[Tensor, Tensor, ops.RouterStatistics]:
        """`choose` and its `ops.RouterStatistics`, from one pass over the logits."""
        top_k = self.top_k if top_k is None else top_k
        return ops.route(logits, top_k, allowed=allowed, return_statistics=True, **self._options())

    def _options(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in CHOICE_OPTIONS}
        return own | {"selection_bias": self.selection_bias}

    def forward(
        self,
        x: Tensor,
        allowed: Tensor | None = None,
        top_k: int | None = None,
        *,
        measured: bool = False,
    ) -> Any:
        """x [T, D] -> combine weights fp32 [T, K] and chosen experts int32 [T, K], as `choose`.

        measured: return (logits [T, E], weights, experts, `ops.RouterStatistics`) instead.
        """
        logits_TE = self.logits(x)
        if measured:
            return logits_TE, *self._choose_and_measure(logits_TE, allowed, top_k)
        return self.choose(logits_TE, allowed, top_k)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if self.selection_bias.dtype != torch.float32:
            # In bf16 the steps of the bias would be rounded away.
            self.selection_bias = bias.to(self.selection_bias.device)
        return self

    def extra_repr(self) -> str:
        names = ("hidden_size", "num_experts", "top_k", *CHOICE_OPTIONS, "layer_index", "seed")
        values = {name: getattr(self, name) for name in names}
        values |= {"bias": self.bias is not None, **placed(self.weight)}
        return changed_arguments(Router, values)
