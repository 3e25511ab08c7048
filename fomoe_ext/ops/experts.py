"""The expert verbs, expand and contract, and the fused pass `moe_experts`, with autograd.

Rows are grouped by resident expert as `fomoe_ext.ops.compact` lays them out; a skipped slot has
no row, so it costs nothing here. Sums are fp32 whatever the storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fomoe_ext.ops.native  # noqa: F401  (defines the ops)
from fomoe_ext.ops.derivatives import refuse_derivative, register_derivative
from fomoe_ext.ops.rows import RowTable
from fomoe_ext.ops.shapes import register_shapes

ACTIVATIONS: dict[str, int] = {
    "swiglu": 0,
    "geglu": 1,
    "silu": 2,
    "relu2": 3,
    "gelu": 4,
    "clamped_swiglu": 5,
}
"""Activation names; GELU in tanh form. Gated: swiglu = silu(gate) * up, geglu = gelu(gate) * up;
clamped_swiglu = gate * sigmoid(1.702 * gate) * (up + 1), gate at most 7 and up in -7 .. 7, is that
of gpt-oss (arXiv 2508.10925).
"""

_GATED = frozenset({"swiglu", "geglu", "clamped_swiglu"})
_GATED_IDS = frozenset(ACTIVATIONS[name] for name in _GATED)
_ops = torch.ops.fomoe


def is_gated(activation: str) -> bool:
    """Whether the activation takes a gate and an up projection. ValueError for an unknown name."""
    activation_id(activation)
    return activation in _GATED


def activation_id(activation: str) -> int:
    """The kernels' number of an activation. ValueError for an unknown name."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]


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
        activation: a key of `ACTIVATIONS`.
        expand_bias: [R, G*N] of x's dtype, added before the activation, or None.

    Returns:
        Activations [T*K, N] of x's dtype; zero past the last row. Differentiable in x, weight and
        bias.

    Raises:
        ValueError: wrong shape, dtype, device, layout or activation, naming the argument.
    """
    act, _ = _ops.expand(
        x.contiguous(),
        expand_weight.contiguous(),
        _contiguous(expand_bias),
        table.token_of_row,
        table.row_of_slot,
        table.offsets,
        table.tiles,
        activation_id(activation),
        _needs_grad(x, expand_weight, expand_bias),
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
    return _ops.contract(
        act.contiguous(),
        contract_weight.contiguous(),
        _contiguous(contract_bias),
        table.offsets,
        table.tiles,
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
    recomputes activations and takes the gradient of a combine weight from the activation row, so
    that neither gathered tokens nor contract outputs are kept (SonicMoE, arXiv 2512.14080).

    Args:
        x: tokens [T, D], float32, bfloat16 or float16.
        weights: combine weights [T, K], float32.
        table: where the rows are, from `compact`.
        expand_weight: [R, G*N, D] of x's dtype; G = 2 for gated activations (gate rows first).
        contract_weight: [R, D, N] of x's dtype.
        activation: a key of `ACTIVATIONS`.
        expand_bias: [R, G*N] of x's dtype, or None.
        contract_bias: [R, D] of x's dtype, or None.
        expand_total, contract_total: float32 of the weight's shape, or None. In the backward pass
            the gradient of the weight, in fp32, is added to it, and autograd gets none: for
            gradients of many passes without one rounding to the weight's dtype each.

    Returns:
        y [T, D] of x's dtype; a token whose slots are all skipped gets zeros.

    Raises:
        ValueError: wrong shape, dtype, device, layout or activation, naming the argument.
    """
    arguments = (
        x.contiguous(),
        weights.contiguous(),
        table.token_of_row,
        table.slot_of_row,
        table.row_of_slot,
        table.offsets,
        table.tiles,
        expand_weight.contiguous(),
        _contiguous(expand_bias),
        contract_weight.contiguous(),
        _contiguous(contract_bias),
        activation_id(activation),
        _needs_grad(x, weights, expand_weight, expand_bias, contract_weight, contract_bias),
    )
    _check_total(expand_total, "expand_total", expand_weight)
    _check_total(contract_total, "contract_total", contract_weight)
    if expand_total is None and contract_total is None:
        y, _ = _ops.moe_experts(*arguments)
        return y
    return _MoEExpertsIntoTotals.apply(expand_total, contract_total, *arguments)


def expand_rows_computed() -> int:
    """Rows that the expand kernel has multiplied on the CPU since the library was loaded."""
    return int(_ops.expand_rows_computed())


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _check_total(total: Tensor | None, name: str, weight: Tensor) -> None:
    """Here, as the backward pass would say it too late."""
    if total is None:
        return
    if total.dtype != torch.float32:
        raise ValueError(f"{name}: has dtype {total.dtype}, wanted torch.float32")
    if total.shape != weight.shape:
        raise ValueError(f"{name}: has shape {list(total.shape)}, wanted {list(weight.shape)}")
    if total.device != weight.device:
        raise ValueError(f"{name}: is on {total.device}, wanted {weight.device} as its weight")
    if not total.is_contiguous():
        raise ValueError(f"{name}: is not contiguous (strides {total.stride()})")


# ---- shapes for tracing --------------------------------------------------------------------------


@register_shapes("expand")
def _(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    token_of_row: Tensor,
    row_of_slot: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    activation: int,
    save_preact: bool,
) -> tuple[Tensor, Tensor]:
    slots, width = token_of_row.shape[0], expand_weight.shape[1]
    gates = 2 if activation in _GATED_IDS else 1
    return x.new_empty(slots, width // gates), x.new_empty(slots if save_preact else 0, width)


@register_shapes("contract")
def _(
    act: Tensor,
    contract_weight: Tensor,
    contract_bias: Tensor | None,
    offsets: Tensor,
    tiles: Tensor,
) -> Tensor:
    return act.new_empty(act.shape[0], contract_weight.shape[1])


@register_shapes("moe_experts")
def _(
    x: Tensor,
    weights: Tensor,
    token_of_row: Tensor,
    slot_of_row: Tensor,
    row_of_slot: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    contract_weight: Tensor,
    contract_bias: Tensor | None,
    activation: int,
    save_preact: bool,
) -> tuple[Tensor, Tensor]:
    saved = token_of_row.shape[0] if save_preact else 0
    return torch.empty_like(x), x.new_empty(saved, expand_weight.shape[1])


@register_shapes("moe_experts_backward")
def _(
    grad_y: Tensor,
    x: Tensor,
    weights: Tensor,
    token_of_row: Tensor,
    slot_of_row: Tensor,
    row_of_slot: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    contract_weight: Tensor,
    contract_bias: Tensor | None,
    preact: Tensor,
    activation: int,
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
def _(
    grad_y: Tensor,
    contract_weight: Tensor,
    contract_bias: Tensor | None,
    preact: Tensor,
    weights: Tensor,
    token_of_row: Tensor,
    slot_of_row: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    scaled_act = preact.new_empty(preact.shape[0], contract_weight.shape[2])
    return torch.empty_like(preact), scaled_act, torch.empty_like(weights)


@register_shapes("grouped_rows")
def _(rows: Tensor, weight: Tensor, offsets: Tensor, tiles: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@register_shapes("weight_grad")
def _(
    left: Tensor,
    right: Tensor,
    left_index: Tensor | None,
    right_index: Tensor | None,
    offsets: Tensor,
) -> Tensor:
    return left.new_empty(offsets.shape[0] - 1, left.shape[1], right.shape[1])


@register_shapes("weight_grad_add")
def _(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    left_index: Tensor | None,
    right_index: Tensor | None,
    offsets: Tensor,
) -> None:
    return None


@register_shapes("bias_grad")
def _(
    rows: Tensor,
    index: Tensor | None,
    weights: Tensor | None,
    slot_of_row: Tensor | None,
    offsets: Tensor,
) -> Tensor:
    return rows.new_empty(offsets.shape[0] - 1, rows.shape[1])


@register_shapes("activation_backward")
def _(grad_act: Tensor, preact: Tensor, offsets: Tensor, activation: int) -> Tensor:
    return torch.empty_like(preact)


# ---- autograd ------------------------------------------------------------------------------------


def _expand_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.activation, ctx.saved = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _expand_backward(ctx: Any, grad_act: Tensor, _grad_preact: Tensor) -> tuple:
    x, expand_weight, _, token_of_row, row_of_slot, offsets, tiles, preact = ctx.saved_tensors
    _require_saved(ctx.saved)
    grad_preact = _ops.activation_backward(grad_act.contiguous(), preact, offsets, ctx.activation)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        # Row gradients, added per token in slot order.
        grad_rows = _ops.grouped_rows(grad_preact, expand_weight, offsets, tiles)
        grad_x = _ops.combine(grad_rows, None, row_of_slot)
    if ctx.needs_input_grad[1]:
        grad_weight = _ops.weight_grad(grad_preact, x, None, token_of_row, offsets)
    if ctx.needs_input_grad[2]:
        grad_bias = _ops.bias_grad(grad_preact, None, None, None, offsets)
    return grad_x, grad_weight, grad_bias, *[None] * 6


def _contract_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    act, contract_weight, _, offsets, tiles = inputs
    ctx.save_for_backward(act, contract_weight, offsets, tiles)


def _contract_backward(ctx: Any, grad_rows: Tensor) -> tuple:
    act, contract_weight, offsets, tiles = ctx.saved_tensors
    grad_rows = grad_rows.contiguous()
    grad_act = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_act = _ops.grouped_rows(grad_rows, contract_weight, offsets, tiles)
        grad_act = _zero_tail(grad_act, offsets)
    if ctx.needs_input_grad[1]:
        grad_weight = _ops.weight_grad(grad_rows, act, None, None, offsets)
    if ctx.needs_input_grad[2]:
        grad_bias = _ops.bias_grad(grad_rows, None, None, None, offsets)
    return grad_act, grad_weight, grad_bias, None, None


def _zero_tail(rows: Tensor, offsets: Tensor) -> Tensor:
    """A gradient that leaves this module has no undefined rows past the last one computed."""
    live = torch.arange(rows.shape[0], device=rows.device) < offsets[-1]
    return torch.where(live.unsqueeze(1), rows, torch.zeros((), dtype=rows.dtype))


def _moe_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.activation, ctx.saved = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _moe_backward(ctx: Any, grad_y: Tensor, _grad_preact: Tensor) -> tuple:
    return _moe_grads(ctx, grad_y, ctx.needs_input_grad, None, None)


def _moe_grads(
    ctx: Any,
    grad_y: Tensor,
    needed: Sequence[bool],
    expand_total: Tensor | None,
    contract_total: Tensor | None,
) -> tuple:
    """A gradient or None for every argument of the op moe_experts; `needed` is of these."""
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes at the first access
    *tensors, expand_bias, contract_weight, contract_bias, preact = saved
    _require_saved(ctx.saved)
    need_x, need_expand, need_contract = needed[0], needed[7], needed[9]
    grad_x, grad_weights, *of_experts = _ops.moe_experts_backward(
        grad_y.contiguous(),
        *tensors,
        expand_bias,
        contract_weight,
        contract_bias,
        preact,
        ctx.activation,
        need_x,
        need_expand,
        need_contract,
        expand_total,
        contract_total,
    )
    returned = (
        need_expand and expand_total is None,
        expand_bias is not None,
        need_contract and contract_total is None,
        contract_bias is not None,
    )
    return (
        grad_x if need_x else None,
        grad_weights,
        *[None] * 5,
        *(grad if wanted else None for grad, wanted in zip(of_experts, returned, strict=True)),
        None,
        None,
    )


class _MoEExpertsIntoTotals(torch.autograd.Function):
    """moe_experts whose backward adds the weights' gradients to totals.

    The totals are not inputs to autograd: other backward passes may have added to them since.
    """

    @staticmethod
    def forward(
        ctx: Any, expand_total: Tensor | None, contract_total: Tensor | None, *arguments: Any
    ) -> Tensor:
        *tensors, ctx.activation, ctx.saved = arguments
        ctx.totals = (expand_total, contract_total)
        y, preact = _ops.moe_experts(*arguments)
        ctx.save_for_backward(*tensors, preact)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple:
        return None, None, *_moe_grads(ctx, grad_y, ctx.needs_input_grad[2:], *ctx.totals)


def _require_saved(saved: bool) -> None:
    if not saved:
        raise RuntimeError(
            "save_preact: was False in the forward pass, wanted True where a gradient is taken"
        )


register_derivative("expand", _expand_backward, _expand_setup)
register_derivative("contract", _contract_backward, _contract_setup)
register_derivative("moe_experts", _moe_backward, _moe_setup)
refuse_derivative(
    "moe_experts_backward",
    "contract_backward",
    "grouped_rows",
    "weight_grad",
    "weight_grad_add",
    "bias_grad",
    "activation_backward",
)
