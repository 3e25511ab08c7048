"""Verbs that carry a token to its experts and back: route, compact, gather, combine.

Between them stand expand and contract (`ops.experts`). Each is a torch op (`torch.ops.fomoe.*`)
with gradients, traceable by `torch.compile`. T tokens, K slots per token, E experts, R resident
experts, D hidden size, N intermediate size. A slot whose expert is not resident is
*skipped*: it has no row, costs nothing and adds nothing.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

import fomoe_ext.ops.flops  # noqa: F401  (registers formulas)
from fomoe_ext.checks import an_instance
from fomoe_ext.ops.derivatives import Gradients, refuse_derivative, register_derivative
from fomoe_ext.ops.rows import RowTable
from fomoe_ext.ops.schemas import arguments_type, by_name
from fomoe_ext.ops.shapes import register_shapes

TILE_ROWS = 128
"""Rows to a tile of the grouped GEMMs on CUDA."""

SCORINGS: dict[str, int] = {"softmax": 0, "sigmoid": 1}
"""How logits become scores: softmax over the allowed experts, or each one's sigmoid."""

_route = by_name("route")
_route_backward = by_name("route_backward")
_compact = by_name("compact")
_gather = by_name("gather")
_combine = by_name("combine")
_combine_backward = by_name("combine_backward")


class RouterStatistics(NamedTuple):
    """Sums over all tokens that `route` counts while it chooses, on the logits' device.

    They are added as integers, exactly, so the order of the tokens does not change a bit.
    """

    sums: Tensor  # int64 [2 E + 1]: slots; scores in 2^-24; entropies in 2^-32

    @property
    def load(self) -> Tensor:
        """int64 [E], slots that chose each expert."""
        return self.sums[: self.sums.shape[0] // 2]

    @property
    def score_sum(self) -> Tensor:
        """fp64 [E], sum over tokens of an expert's score, 0 where not allowed."""
        return self.sums[self.sums.shape[0] // 2 : -1].double() * 2.0**-24

    @property
    def entropy_sum(self) -> Tensor:
        """fp64 [], nats, sum over tokens of the entropy of the allowed experts' scores, normalised
        to sum 1.
        """
        return self.sums[-1].double() * 2.0**-32


@overload
def route(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = ...,
    selection_bias: Tensor | None = ...,
    allowed: Tensor | None = ...,
    num_groups: int = ...,
    groups_kept: int = ...,
    renormalize: bool = ...,
    scale: float = ...,
    return_statistics: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def route(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = ...,
    selection_bias: Tensor | None = ...,
    allowed: Tensor | None = ...,
    num_groups: int = ...,
    groups_kept: int = ...,
    renormalize: bool = ...,
    scale: float = ...,
    return_statistics: Literal[True],
) -> tuple[Tensor, Tensor, RouterStatistics]: ...
def route(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "sigmoid",
    selection_bias: Tensor | None = None,
    allowed: Tensor | None = None,
    num_groups: int = 1,
    groups_kept: int = 1,
    renormalize: bool = False,
    scale: float = 1.0,
    return_statistics: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, RouterStatistics]:
    """Chooses each token's experts and their combine weights.

    An expert is chosen by score + selection_bias, ties going to the lower index; its weight is the
    score without the bias. With groups, the num_groups equal ranges of experts are ranked by the
    sum of their two best choice scores, and only experts of the best groups_kept groups can be
    chosen (DeepSeek-V3, arXiv 2412.19437). All arithmetic is fp32; CPU and CUDA choose the same
    experts. Without a bias and groups the logits themselves are compared: the same order, except
    that logits whose scores round to the same number do not tie.

    On CUDA values are not checked, as that would wait for the device: a token with NaN logits gets
    experts 0 .. top_k - 1 with NaN weights. E is at most 1024, top_k at most 64 there.

    Args:
        logits: [T, E], float32, bfloat16 or float16.
        top_k: experts per token, 1 .. E.
        scoring: "sigmoid" or "softmax".
        selection_bias: [E] float32, finite, or None.
        allowed: [E] bool, the experts that may be chosen (softmax is over these); None = all.
        num_groups: a divisor of E.
        groups_kept: 1 .. num_groups.
        renormalize: divide a token's weights by their sum.
        scale: factor on the weights, after renormalisation.
        return_statistics: also return `RouterStatistics`, counted in the same pass over the logits.

    Returns:
        weights [T, K] float32, differentiable in logits, and experts [T, K] int32, in descending
        order of choice score; slots beyond the experts that may be chosen have expert -1 and weight
        0. With return_statistics also the statistics, without gradient.

    Raises:
        ValueError, TypeError: wrong tensors or numbers, or (CPU) NaN logits, naming the argument.
    """
    an_instance(Tensor, logits=logits)
    weights, experts, sums = _route(
        logits=logits.contiguous(),
        top_k=top_k,
        scoring=_scoring_id(scoring),
        selection_bias=selection_bias,
        allowed=allowed,
        num_groups=num_groups,
        groups_kept=groups_kept,
        renormalize=renormalize,
        scale=scale,
        statistics=return_statistics,
    )
    chosen = (weights, experts)
    return (*chosen, RouterStatistics(sums)) if return_statistics else chosen


def _scoring_id(scoring: str) -> int:
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
    return SCORINGS[scoring]


def compact(
    experts: Tensor, resident_index: Tensor, num_resident: int, tile_rows: int | None = None
) -> RowTable:
    """Gives every slot whose expert is resident a row, grouped by expert, without gaps.

    Histogram, scan and stable scatter; no sort. On CUDA nothing waits for the device: ids out of
    range count as skipped, and num_resident is at most 1024.

    Args:
        experts: [T, K] int32, from `route`; -1 = no expert.
        resident_index: [E] int32, an expert's position among the resident ones, -1 = not resident.
        num_resident: R.
        tile_rows: rows to a tile of the grouped GEMM that will use the table; 0 = no schedule.
            Tiles of one resident stand together, residents with more rows come first. None = what
            `expand` and `contract` need: `TILE_ROWS` on CUDA, no schedule on the CPU.

    Returns:
        The row table, sized for the worst case of T * K rows.

    Raises:
        ValueError: wrong shape, dtype or device, or (CPU) an expert or index out of range.
    """
    if tile_rows is None:
        tile_rows = TILE_ROWS if experts.is_cuda else 0
    return RowTable(
        *_compact(
            experts=experts.contiguous(),
            resident_index=resident_index,
            num_resident=num_resident,
            tile_rows=tile_rows,
        )
    )


def gather(x: Tensor, table: RowTable) -> Tensor:
    """Copies each row's token: rows[row_of_slot[t, k]] = x[t]. For GEMMs that cannot gather.

    Args:
        x: tokens [T, D], float32, bfloat16 or float16.
        table: where the rows are, from `compact`.

    Returns:
        Rows [T*K, D] of x's dtype; zeros past the last row. Differentiable in x: a token's gradient
        is the sum of its rows' gradients, in slot order.

    Raises:
        ValueError: wrong shape, dtype, device or layout, naming the argument.
    """
    return _gather(x=x.contiguous(), row_of_slot=table.row_of_slot, offsets=table.offsets)


def combine(rows: Tensor, weights: Tensor | None, table: RowTable) -> Tensor:
    """Adds up each token's rows: y[t] = sum over k of weights[t, k] * rows[row_of_slot[t, k]].

    The sum is taken in slot order in fp32 and rounded once; skipped slots are not read.

    Args:
        rows: [T * K, D], float32, bfloat16 or float16, as `contract` returns them.
        weights: [T, K] float32, or None for all ones.
        table: where the rows are, from `compact`.

    Returns:
        y [T, D] of the dtype of rows. Differentiable in rows and weights.

    Raises:
        ValueError: wrong shape, dtype, device or layout, naming the argument.
    """
    weights = None if weights is None else weights.contiguous()
    return _combine(rows=rows.contiguous(), weights=weights, row_of_slot=table.row_of_slot)


# ---- shapes for tracing --------------------------------------------------------------------------


@register_shapes("route")
def _(logits: Tensor, top_k: int, statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.int32),
        logits.new_empty(2 * logits.shape[1] + 1 if statistics else 0, dtype=torch.int64),
    )


@register_shapes("route_backward")
def _(logits: Tensor) -> Tensor:
    return torch.empty_like(logits)


@register_shapes("compact")
def _(
    experts: Tensor, num_resident: int, tile_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    slots = experts.shape[0] * experts.shape[1]
    return (
        experts.new_empty(slots),
        experts.new_empty(slots),
        torch.empty_like(experts),
        experts.new_empty(num_resident + 1),
        experts.new_empty(slots // tile_rows + num_resident if tile_rows else 0, 2),
    )


@register_shapes("gather")
def _(x: Tensor, row_of_slot: Tensor) -> Tensor:
    return x.new_empty(row_of_slot.shape[0] * row_of_slot.shape[1], x.shape[1])


@register_shapes("combine")
def _(rows: Tensor, row_of_slot: Tensor) -> Tensor:
    return rows.new_empty(row_of_slot.shape[0], rows.shape[1])


@register_shapes("combine_backward")
def _(
    grad_y: Tensor, rows: Tensor | None, weights: Tensor, row_of_slot: Tensor
) -> tuple[Tensor, Tensor]:
    tokens, top_k = row_of_slot.shape
    grad_rows = grad_y.new_empty(tokens * top_k, grad_y.shape[1])
    return grad_rows, weights.new_empty(0 if rows is None else tokens, top_k)


# ---- autograd ------------------------------------------------------------------------------------


def _route_setup(ctx: Any, given: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, experts, statistics = output
    ctx.scoring, ctx.renormalize, ctx.scale = given.scoring, given.renormalize, given.scale
    ctx.save_for_backward(given.logits, experts, given.allowed)
    ctx.mark_non_differentiable(experts, statistics)


def route_gradient(
    grad_weights: Tensor,
    logits: Tensor,
    experts: Tensor,
    allowed: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """The gradient of logits [T, E] by that of weights [T, K], for an autograd node that calls
    `route` with these arguments (`options`: scoring, renormalize, scale, and others unused)."""
    return _route_backward(
        grad_weights=grad_weights.contiguous(),
        logits=logits,
        experts=experts,
        allowed=allowed,
        scoring=_scoring_id(options["scoring"]),
        renormalize=options["renormalize"],
        scale=options["scale"],
    )


def _route_grad(ctx: Any, needed: Any, grad_weights: Tensor, *_no_grads: None) -> Gradients:
    logits, experts, allowed = ctx.saved_tensors
    grad_logits = _route_backward(
        grad_weights=grad_weights.contiguous(),
        logits=logits,
        experts=experts,
        allowed=allowed,
        scoring=ctx.scoring,
        renormalize=ctx.renormalize,
        scale=ctx.scale,
    )
    return {"logits": grad_logits}


def _combine_setup(ctx: Any, given: Any, output: Tensor) -> None:
    # Rows are kept only where the gradient of the weights will read them.
    needed = arguments_type("combine")._make(ctx.needs_input_grad)
    kept = given.rows if given.weights is not None and needed.weights else None
    ctx.save_for_backward(kept, given.weights, given.row_of_slot)


def _combine_grad(ctx: Any, needed: Any, grad_y: Tensor) -> Gradients:
    rows, weights, row_of_slot = ctx.saved_tensors
    if weights is None:
        weights = torch.ones(row_of_slot.shape, dtype=torch.float32, device=grad_y.device)
    grad_rows, grad_weights = _combine_backward(
        grad_y=grad_y.contiguous(), rows=rows, weights=weights, row_of_slot=row_of_slot
    )
    return {"rows": grad_rows, "weights": None if rows is None else grad_weights}


def _gather_setup(ctx: Any, given: Any, output: Tensor) -> None:
    ctx.save_for_backward(given.row_of_slot)


def _gather_grad(ctx: Any, needed: Any, grad_rows: Tensor) -> Gradients:
    (row_of_slot,) = ctx.saved_tensors
    grad_x = _combine(rows=grad_rows.contiguous(), weights=None, row_of_slot=row_of_slot)
    return {"x": grad_x}


register_derivative("gather", _gather_grad, _gather_setup)
register_derivative("route", _route_grad, _route_setup)
register_derivative("combine", _combine_grad, _combine_setup)
refuse_derivative("route_backward", "combine_backward")
