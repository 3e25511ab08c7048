"""The router: scores all experts of all sites for every token and chooses among them.

Shapes use the letters of `fomoe_ext.layer.moe`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_ext import ops
from fomoe_ext.checks import a_bool, an_int, at_least, finite, one_of
from fomoe_ext.layer.arguments import changed_arguments, placed
from fomoe_ext.layer.inputs import autocasts
from fomoe_ext.layer.seeding import fill_normal_
from fomoe_ext.ops.schemas import traced
from fomoe_ext.ops.shapes import require_floats
from fomoe_ext.ops.tokens import route_gradient

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


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """In which torch.autocast is off for the device of x."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


class _Routing(torch.autograd.Function):
    """Router.logits and ops.route with one node. For the gradients autograd would make three nodes
    and four views of matrices; the operations here are those that it takes then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allowed: Tensor | None,
        options: dict[str, Any],
        with_logits: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        with _no_autocast(x):
            wide_x, wide = x.float(), weight.float()
            logits = F.linear(wide_x, wide, None if bias is None else bias.float())
        weights, experts, (sums,) = ops.route(
            logits, allowed=allowed, return_statistics=True, **options
        )
        ctx.options = options
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(experts, sums)
        ctx.save_for_backward(x, weight, wide_x, wide, logits, experts, allowed)
        return logits if with_logits else None, weights, experts, sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_weights: Tensor | None, *_: None) -> Any:
        x, weight, wide_x, wide, logits, experts, allowed = ctx.saved_tensors
        if grad_weights is not None:
            of_route = route_gradient(grad_weights, logits, experts, allowed, ctx.options)
            grad = of_route if grad is None else grad + of_route
        if grad is None:
            return (None,) * 6
        if torch.is_grad_enabled():  # create_graph: derivatives by x and weight themselves
            wide_x, wide = x.float(), weight.float()
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_x = grad.mm(wide).to(x.dtype) if need_x else None
        grad_weight = grad.t().mm(wide_x).to(weight.dtype) if need_weight else None
        grad_bias = grad.sum(0).to(ctx.bias_dtype) if need_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None


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
        parts = self._checked(x)
        with _no_autocast(x):
            bias = parts["bias"].float() if "bias" in parts else None
            logits = F.linear(x.float(), parts["weight"].float(), bias)
        if self.tap is not None:
            self.tap(logits)
        return logits

    def _checked(self, x: Tensor) -> dict[str, Tensor]:
        """The tensors that a pass reads, by name. Raises as `logits`."""
        # Read once: a parametrization computes the weight at every access.
        found = {"weight": self.weight, "selection_bias": self.selection_bias}
        if self.bias is not None:
            found["bias"] = self.bias
        require_floats(x, found)
        return found

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

    def _all_at_once(
        self, x: Tensor, allowed: Tensor | None, top_k: int | None, with_logits: bool
    ) -> tuple[Tensor | None, Tensor, Tensor, ops.RouterStatistics]:
        """`logits` and `_choose_and_measure`, with one node for autograd; the bits are the same."""
        parts = self._checked(x)
        given = self._options() | {"top_k": self.top_k if top_k is None else top_k}
        logits, weights, experts, sums = _Routing.apply(
            x, parts["weight"], parts.get("bias"), allowed, given, with_logits
        )
        return logits, weights, experts, ops.RouterStatistics(sums)

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
        with_logits: bool = True,
    ) -> Any:
        """x [T, D] -> combine weights fp32 [T, K] and chosen experts int32 [T, K], as `choose`.

        measured: return (logits [T, E], weights, experts, `ops.RouterStatistics`) instead; without
        `with_logits` the logits may be None.
        """
        if measured and self.tap is None and not traced():
            return self._all_at_once(x, allowed, top_k, with_logits)
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
