"""The expert verbs expand and contract, and the fused pass `moe_experts`, with autograd.

Rows are grouped by resident expert as `fomoe_ext.ops.compact` lays them out; a skipped slot has
no row, so it costs nothing here. Sums are fp32 whatever the storage.
"""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fomoe_ext.activations import ACTIVATIONS, activation_id, is_gated
from fomoe_ext.ops.derivatives import Gradients, refuse_derivative, register_derivative
from fomoe_ext.ops.rows import RowTable
from fomoe_ext.ops.saved import given_up
from fomoe_ext.ops.schemas import arguments_type, by_name, in_order, tensor_names
from fomoe_ext.ops.shapes import register_shapes

_GATED_IDS = frozenset(ACTIVATIONS[name] for name in ACTIVATIONS if is_gated(name))

_expand = by_name("expand")
_contract = by_name("contract")
_moe_experts = by_name("moe_experts")
_moe_experts_backward = by_name("moe_experts_backward")
_grouped_rows = by_name("grouped_rows")
_weight_grad = by_name("weight_grad")
_bias_grad = by_name("bias_grad")
_activation_backward = by_name("activation_backward")
_combine = by_name("combine")
_expand_rows_computed = by_name("expand_rows_computed")


def expand(
    x: Tensor,
    expand_weight: Tensor,
    table: RowTable,
    activation: str = "swiglu",
    *,
    expand_bias: Tensor | None = None,
) -> Tensor:
    """Gathers the rows' tokens, multiplies by their expert's first weight and activates.

    Args:
        x: tokens [T, D], float32, bfloat16 or float16.
        expand_weight: [R, G*N, D] of x's dtype; G = 2 for gated activations (gate rows first).
        table: where the rows are, from `compact`.
        activation: a name in `fomoe_ext.activations`.
        expand_bias: [R, G*N] of x's dtype, added before the activation, or None.

    Returns:
        Activations [T*K, N] of x's dtype; zero past the last row. Differentiable in x, weight and
        bias.

    Raises:
        ValueError: wrong shape, dtype, device, layout or activation, naming the argument.
    """
    act, _ = _expand(
        x=x.contiguous(),
        expand_weight=expand_weight.contiguous(),
        expand_bias=_contiguous(expand_bias),
        token_of_row=table.token_of_row,
        row_of_slot=table.row_of_slot,
        offsets=table.offsets,
        tiles=table.tiles,
        activation=activation_id(activation),
        save_preact=_needs_grad(x, expand_weight, expand_bias),
    )
    return act


def contract(
    act: Tensor,
    contract_weight: Tensor,
    table: RowTable,
    *,
    contract_bias: Tensor | None = None,
) -> Tensor:
    """Multiplies activation rows by their expert's second weight.

    Args:
        act: [T*K, N], float32, bfloat16 or float16, rows as in `table`.
        contract_weight: [R, D, N] of act's dtype.
        table: where the rows are, from `compact`.
        contract_bias: [R, D] of act's dtype, or None.

    Returns:
        Rows [T*K, D] of act's dtype; zero past the last row. Differentiable in act, weight and
        bias.

    Raises:
        ValueError: wrong shape, dtype, device or layout, naming the argument.
    """
    return _contract(
        act=act.contiguous(),
        contract_weight=contract_weight.contiguous(),
        contract_bias=_contiguous(contract_bias),
        offsets=table.offsets,
        tiles=table.tiles,
    )


def moe_experts(
    x: Tensor,
    weights: Tensor,
    table: RowTable,
    expand_weight: Tensor,
    contract_weight: Tensor,
    activation: str = "swiglu",
    *,
    expand_bias: Tensor | None = None,
    contract_bias: Tensor | None = None,
    expand_total: Tensor | None = None,
    contract_total: Tensor | None = None,
) -> Tensor:
    """expand, contract and combine in one differentiable pass that keeps only the pre-activations.

    y[t] = sum over the token's computed slots of weights[t, k] * expert(x[t]). The backward
    recomputes activations and takes the gradients of combine weights from activation rows, so that
    neither gathered tokens nor outputs of contract are kept (SonicMoE, arXiv 2512.14080); without
    `retain_graph` it overwrites the pre-activations and frees them.

    Args:
        x: tokens [T, D], float32, bfloat16 or float16.
        weights: combine weights [T, K], float32.
        table: where the rows are, from `compact`.
        expand_weight: [R, G*N, D] of x's dtype; G = 2 for gated activations (gate rows first).
        contract_weight: [R, D, N] of x's dtype.
        activation: a name in `fomoe_ext.activations`.
        expand_bias, contract_bias: [R, G*N] and [R, D] of x's dtype, or None.
        expand_total, contract_total: float32 of the weight's shape, or None. The backward pass adds
            the weight's gradient to it in fp32, unrounded, and returns none to autograd.

    Returns:
        y [T, D] of x's dtype; a token whose slots are all skipped gets zeros.

    Raises:
        ValueError: wrong shape, dtype, device, layout or activation, naming the argument.
    """
    _check_total(expand_total, "expand_total", expand_weight)
    _check_total(contract_total, "contract_total", contract_weight)
    call = _moe_experts
    if expand_total is not None or contract_total is not None:
        call = partial(_moe_experts_into_totals, expand_total, contract_total)
    y, _ = call(
        x=x.contiguous(),
        weights=weights.contiguous(),
        token_of_row=table.token_of_row,
        slot_of_row=table.slot_of_row,
        row_of_slot=table.row_of_slot,
        offsets=table.offsets,
        tiles=table.tiles,
        expand_weight=expand_weight.contiguous(),
        expand_bias=_contiguous(expand_bias),
        contract_weight=contract_weight.contiguous(),
        contract_bias=_contiguous(contract_bias),
        activation=activation_id(activation),
        save_preact=_needs_grad(
            x, weights, expand_weight, expand_bias, contract_weight, contract_bias
        ),
    )
    return y


def expand_rows_computed() -> int:
    """Rows that the expand kernel has multiplied on the CPU since the library was loaded."""
    return int(_expand_rows_computed())


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _check_total(total: Tensor | None, name: str, weight: Tensor) -> None:
    """Checked in the forward pass, so that the error appears at the call."""
    if total is None:
        return
    if total.dtype != torch.float32:
        raise ValueError(f"{name} must have dtype torch.float32, got {total.dtype}")
    if total.shape != weight.shape:
        raise ValueError(f"{name} must have shape {list(weight.shape)}, got {list(total.shape)}")
    if total.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} like its weight, got {total.device}")
    if not total.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {total.stride()}")


# ---- shapes for tracing --------------------------------------------------------------------------


@register_shapes("expand")
def _(
    x: Tensor, expand_weight: Tensor, token_of_row: Tensor, activation: int, save_preact: bool
) -> tuple[Tensor, Tensor]:
    slots, width = token_of_row.shape[0], expand_weight.shape[1]
    gates = 2 if activation in _GATED_IDS else 1
    return x.new_empty(slots, width // gates), x.new_empty(slots if save_preact else 0, width)


@register_shapes("contract")
def _(act: Tensor, contract_weight: Tensor) -> Tensor:
    return act.new_empty(act.shape[0], contract_weight.shape[1])


@register_shapes("moe_experts")
def _(
    x: Tensor, token_of_row: Tensor, expand_weight: Tensor, save_preact: bool
) -> tuple[Tensor, Tensor]:
    saved = token_of_row.shape[0] if save_preact else 0
    return torch.empty_like(x), x.new_empty(saved, expand_weight.shape[1])


@register_shapes("moe_experts_backward")
def _(
    x: Tensor,
    weights: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    contract_weight: Tensor,
    contract_bias: Tensor | None,
    need_x: bool,
    need_expand: bool,
    need_contract: bool,
    expand_total: Tensor | None,
    contract_total: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    residents, hidden, intermediate_size = contract_weight.shape
    width = expand_weight.shape[1]
    return (
        x.new_empty(x.shape[0] if need_x else 0, hidden),
        torch.empty_like(weights),
        x.new_empty(residents if need_expand and expand_total is None else 0, width, hidden),
        x.new_empty(0 if expand_bias is None else residents, width),
        x.new_empty(
            residents if need_contract and contract_total is None else 0, hidden, intermediate_size
        ),
        x.new_empty(0 if contract_bias is None else residents, hidden),
    )


@register_shapes("contract_backward")
def _(contract_weight: Tensor, preact: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scaled_act = preact.new_empty(preact.shape[0], contract_weight.shape[2])
    return torch.empty_like(preact), scaled_act, torch.empty_like(weights)


@register_shapes("grouped_rows")
def _(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@register_shapes("weight_grad")
def _(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(offsets.shape[0] - 1, left.shape[1], right.shape[1])


@register_shapes("weight_grad_add")
def _() -> None:
    return None


@register_shapes("bias_grad")
def _(rows: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(offsets.shape[0] - 1, rows.shape[1])


@register_shapes("activation_backward")
def _(preact: Tensor) -> Tensor:
    return torch.empty_like(preact)


# ---- autograd ------------------------------------------------------------------------------------


def _expand_setup(ctx: Any, given: Any, output: tuple[Tensor, Tensor]) -> None:
    _, preact = output
    ctx.activation, ctx.saved = given.activation, given.save_preact
    ctx.save_for_backward(
        given.x,
        given.expand_weight,
        given.token_of_row,
        given.row_of_slot,
        given.offsets,
        given.tiles,
        preact,
    )
    ctx.mark_non_differentiable(preact)


def _expand_grad(ctx: Any, needed: Any, grad_act: Tensor, _grad_preact: None) -> Gradients:
    x, expand_weight, token_of_row, row_of_slot, offsets, tiles, preact = ctx.saved_tensors
    _require_saved(ctx.saved)
    grad_preact = _activation_backward(
        grad_act=grad_act.contiguous(), preact=preact, offsets=offsets, activation=ctx.activation
    )
    grads: Gradients = {}
    if needed.x:
        # Row gradients, added per token in slot order.
        grad_rows = _grouped_rows(
            rows=grad_preact, weight=expand_weight, offsets=offsets, tiles=tiles
        )
        grads["x"] = _combine(rows=grad_rows, weights=None, row_of_slot=row_of_slot)
    if needed.expand_weight:
        grads["expand_weight"] = _weight_grad(
            left=grad_preact, right=x, left_index=None, right_index=token_of_row, offsets=offsets
        )
    if needed.expand_bias:
        grads["expand_bias"] = _sum_of_rows(grad_preact, offsets)
    return grads


def _contract_setup(ctx: Any, given: Any, output: Tensor) -> None:
    ctx.save_for_backward(given.act, given.contract_weight, given.offsets, given.tiles)


def _contract_grad(ctx: Any, needed: Any, grad_rows: Tensor) -> Gradients:
    act, contract_weight, offsets, tiles = ctx.saved_tensors
    grad_rows = grad_rows.contiguous()
    grads: Gradients = {}
    if needed.act:
        grad_act = _grouped_rows(
            rows=grad_rows, weight=contract_weight, offsets=offsets, tiles=tiles
        )
        grads["act"] = _zero_tail(grad_act, offsets)
    if needed.contract_weight:
        grads["contract_weight"] = _weight_grad(
            left=grad_rows, right=act, left_index=None, right_index=None, offsets=offsets
        )
    if needed.contract_bias:
        grads["contract_bias"] = _sum_of_rows(grad_rows, offsets)
    return grads


def _sum_of_rows(rows: Tensor, offsets: Tensor) -> Tensor:
    """[R, width]: the gradient of a bias of each resident expert."""
    return _bias_grad(rows=rows, index=None, weights=None, slot_of_row=None, offsets=offsets)


def _zero_tail(rows: Tensor, offsets: Tensor) -> Tensor:
    """`rows` with zeros past the last row: what autograd hands on must be defined everywhere."""
    live = torch.arange(rows.shape[0], device=rows.device) < offsets[-1]
    return torch.where(live.unsqueeze(1), rows, torch.zeros((), dtype=rows.dtype))


_MoEArguments = arguments_type("moe_experts")
_MOE_TENSORS = tensor_names("moe_experts")
_moe_tensors = attrgetter(*_MOE_TENSORS)
_moe_in_order = in_order("moe_experts")


def _tensors_of(given: Any) -> tuple[Tensor | None, ...]:
    # `_moe_tensors`, but slower: torch.compile cannot trace operator.attrgetter.
    return tuple([getattr(given, name) for name in _MOE_TENSORS])


def _moe_setup(ctx: Any, given: Any, output: tuple[Tensor, Tensor]) -> None:
    _, preact = output
    ctx.activation, ctx.saved = given.activation, given.save_preact
    ctx.save_for_backward(*_moe_tensors(given), preact)
    ctx.mark_non_differentiable(preact)


def _moe_grad(ctx: Any, needed: Any, grad_y: Tensor, _grad_preact: None) -> Gradients:
    return _moe_grads(ctx, needed, grad_y, None, None)


def _moe_grads(
    ctx: Any,
    needed: Any,
    grad_y: Tensor,
    expand_total: Tensor | None,
    contract_total: Tensor | None,
) -> Gradients:
    """The gradients of the op moe_experts by its arguments' names."""
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes at the first access
    _require_saved(ctx.saved)
    overwrites = given_up(saved)
    tensors = dict(zip(_MOE_TENSORS, saved[:-1], strict=True))
    grad_x, grad_weights, grad_expand, grad_expand_bias, grad_contract, grad_contract_bias = (
        _moe_experts_backward(
            grad_y=grad_y.contiguous(),
            preact=saved[-1],
            activation=ctx.activation,
            need_x=needed.x,
            need_expand=needed.expand_weight,
            need_contract=needed.contract_weight,
            expand_total=expand_total,
            contract_total=contract_total,
            preact_to_free=saved[-1] if overwrites else None,
            **tensors,
        )
    )
    # What the op has not computed is empty.
    grads: Gradients = {"weights": grad_weights}
    if needed.x:
        grads["x"] = grad_x
    if needed.expand_weight and expand_total is None:
        grads["expand_weight"] = grad_expand
    if tensors["expand_bias"] is not None:
        grads["expand_bias"] = grad_expand_bias
    if needed.contract_weight and contract_total is None:
        grads["contract_weight"] = grad_contract
    if tensors["contract_bias"] is not None:
        grads["contract_bias"] = grad_contract_bias
    return grads


def _moe_experts_into_totals(
    expand_total: Tensor | None, contract_total: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    given = _MoEArguments(**arguments)
    return _MoEExpertsIntoTotals.apply(expand_total, contract_total, *given), None


class _MoEExpertsIntoTotals(torch.autograd.Function):
    """moe_experts whose backward adds the gradients of the weights to totals.

    The totals are not inputs to autograd: other backward passes may have added to them since.
    """

    @staticmethod
    def forward(
        ctx: Any, expand_total: Tensor | None, contract_total: Tensor | None, *arguments: Any
    ) -> Tensor:
        given = _MoEArguments(*arguments)
        ctx.activation, ctx.saved = given.activation, given.save_preact
        ctx.totals = (expand_total, contract_total)
        y, preact = _moe_experts(**given._asdict())
        ctx.save_for_backward(*_tensors_of(given), preact)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        needed = _MoEArguments(*ctx.needs_input_grad[2:])
        return None, None, *_moe_in_order(**_moe_grads(ctx, needed, grad_y, *ctx.totals))


def _require_saved(saved: bool) -> None:
    if not saved:
        raise RuntimeError(
            "save_preact must be True in the forward pass where a gradient is taken, got False"
        )


register_derivative("expand", _expand_grad, _expand_setup)
register_derivative("contract", _contract_grad, _contract_setup)
register_derivative("moe_experts", _moe_grad, _moe_setup)
refuse_derivative(
    "moe_experts_backward",
    "contract_backward",
    "grouped_rows",
    "weight_grad",
    "weight_grad_add",
    "bias_grad",
    "activation_backward",
)
