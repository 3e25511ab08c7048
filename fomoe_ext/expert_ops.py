"""The expert verbs, expand and contract, and the fused pass `moe_experts`, with autograd.

Rows are grouped by resident expert as `fomoe_ext.ops.compact` lays them out; a skipped slot has
no row, so it costs nothing here. Sums are fp32 whatever the storage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fomoe_ext.native  # noqa: F401  (defines the ops)

if TYPE_CHECKING:
    from fomoe_ext.ops import RowTable

ACTIVATIONS: dict[str, int] = {"swiglu": 0, "geglu": 1, "silu": 2, "relu2": 3, "gelu": 4}
"""Activation names. Gated: swiglu = silu(gate) * up, geglu = gelu(gate) * up; GELU in tanh form."""

_GATED = frozenset({"swiglu", "geglu"})
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


def expand(x: Tensor, expand_weight: Tensor, table: RowTable, activation: str = "swiglu") -> Tensor:
    """Gathers the rows' tokens, multiplies by their expert's first weight and activates.

    Args:
        x: tokens [T, D], float32, bfloat16 or float16.
        expand_weight: [R, G*N, D] of x's dtype; G = 2 for gated activations (gate rows first).
        table: where the rows are, from `compact`.
        activation: a key of `ACTIVATIONS`.

    Returns:
        Activations [T*K, N] of x's dtype; zero past the last row. Differentiable in x and the
        weight.

    Raises:
        ValueError: wrong shape, dtype, device, layout or activation, naming the argument.
    """
    act, _ = _ops.expand(
        x.contiguous(),
        expand_weight.contiguous(),
        table.token_of_row,
        table.row_of_slot,
        table.offsets,
        activation_id(activation),
        _needs_grad(x, expand_weight),
    )
    return act


def contract(act: Tensor, contract_weight: Tensor, table: RowTable) -> Tensor:
    """Multiplies activation rows by their expert's second weight.

    Args:
        act: [T*K, N], float32, bfloat16 or float16, rows as in `table`.
        contract_weight: [R, D, N] of act's dtype.
        table: where the rows are, from `compact`.

    Returns:
        Rows [T*K, D] of act's dtype; zero past the last row. Differentiable in both arguments.

    Raises:
        ValueError: wrong shape, dtype, device or layout, naming the argument.
    """
    return _ops.contract(act.contiguous(), contract_weight.contiguous(), table.offsets)


def moe_experts(
    x: Tensor,
    weights: Tensor,
    table: RowTable,
    expand_weight: Tensor,
    contract_weight: Tensor,
    activation: str = "swiglu",
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

    Returns:
        y [T, D] of x's dtype; a token whose slots are all skipped gets zeros.

    Raises:
        ValueError: wrong shape, dtype, device, layout or activation, naming the argument.
    """
    y, _ = _ops.moe_experts(
        x.contiguous(),
        weights.contiguous(),
        table.token_of_row,
        table.slot_of_row,
        table.row_of_slot,
        table.offsets,
        expand_weight.contiguous(),
        contract_weight.contiguous(),
        activation_id(activation),
        _needs_grad(x, weights, expand_weight, contract_weight),
    )
    return y


def expand_rows_computed() -> int:
    """Rows that the expand kernel has multiplied on the CPU since the library was loaded."""
    return int(_ops.expand_rows_computed())


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# ---- shapes for tracing --------------------------------------------------------------------------


@torch.library.register_fake("fomoe::expand")
def _(
    x: Tensor,
    expand_weight: Tensor,
    token_of_row: Tensor,
    row_of_slot: Tensor,
    offsets: Tensor,
    activation: int,
    save_preact: bool,
) -> tuple[Tensor, Tensor]:
    slots, width = token_of_row.shape[0], expand_weight.shape[1]
    gates = 2 if activation <= ACTIVATIONS["geglu"] else 1
    return x.new_empty(slots, width // gates), x.new_empty(slots if save_preact else 0, width)


@torch.library.register_fake("fomoe::contract")
def _(act: Tensor, contract_weight: Tensor, offsets: Tensor) -> Tensor:
    return act.new_empty(act.shape[0], contract_weight.shape[1])


@torch.library.register_fake("fomoe::moe_experts")
def _(
    x: Tensor,
    weights: Tensor,
    token_of_row: Tensor,
    slot_of_row: Tensor,
    row_of_slot: Tensor,
    offsets: Tensor,
    expand_weight: Tensor,
    contract_weight: Tensor,
    activation: int,
    save_preact: bool,
) -> tuple[Tensor, Tensor]:
    saved = token_of_row.shape[0] if save_preact else 0
    return torch.empty_like(x), x.new_empty(saved, expand_weight.shape[1])


@torch.library.register_fake("fomoe::moe_experts_backward")
def _(
    grad_y: Tensor,
    x: Tensor,
    weights: Tensor,
    token_of_row: Tensor,
    slot_of_row: Tensor,
    row_of_slot: Tensor,
    offsets: Tensor,
    expand_weight: Tensor,
    contract_weight: Tensor,
    preact: Tensor,
    activation: int,
    need_x: bool,
    need_expand: bool,
    need_contract: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residents, hidden, expert_size = contract_weight.shape
    return (
        x.new_empty(x.shape[0] if need_x else 0, hidden),
        torch.empty_like(weights),
        x.new_empty(residents if need_expand else 0, expand_weight.shape[1], hidden),
        x.new_empty(residents if need_contract else 0, hidden, expert_size),
    )


@torch.library.register_fake("fomoe::contract_backward")
def _(
    grad_y: Tensor,
    contract_weight: Tensor,
    preact: Tensor,
    weights: Tensor,
    token_of_row: Tensor,
    slot_of_row: Tensor,
    offsets: Tensor,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    scaled_act = preact.new_empty(preact.shape[0], contract_weight.shape[2])
    return torch.empty_like(preact), scaled_act, torch.empty_like(weights)


@torch.library.register_fake("fomoe::grouped_rows")
def _(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@torch.library.register_fake("fomoe::weight_grad")
def _(
    left: Tensor,
    right: Tensor,
    left_index: Tensor | None,
    right_index: Tensor | None,
    offsets: Tensor,
) -> Tensor:
    return left.new_empty(offsets.shape[0] - 1, left.shape[1], right.shape[1])


@torch.library.register_fake("fomoe::activation_backward")
def _(grad_act: Tensor, preact: Tensor, offsets: Tensor, activation: int) -> Tensor:
    return torch.empty_like(preact)


# ---- autograd ------------------------------------------------------------------------------------


def _expand_grads(
    wanted: tuple[bool, bool],
    x: Tensor,
    expand_weight: Tensor,
    grad_preact: Tensor,
    token_of_row: Tensor,
    row_of_slot: Tensor,
    offsets: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the tokens (row gradients added per token in slot order) and of the weight."""
    grad_x = grad_weight = None
    if wanted[0]:
        grad_rows = _ops.grouped_rows(grad_preact, expand_weight, offsets)
        grad_x = _ops.combine(grad_rows, None, row_of_slot)
    if wanted[1]:
        grad_weight = _ops.weight_grad(grad_preact, x, None, token_of_row, offsets)
    return grad_x, grad_weight


def _expand_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.activation, ctx.saved = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _expand_backward(ctx: Any, grad_act: Tensor, _grad_preact: Tensor) -> tuple:
    x, expand_weight, token_of_row, row_of_slot, offsets, preact = ctx.saved_tensors
    _require_saved(ctx.saved)
    grad_preact = _ops.activation_backward(grad_act.contiguous(), preact, offsets, ctx.activation)
    grads = _expand_grads(
        ctx.needs_input_grad[:2],
        x,
        expand_weight,
        grad_preact,
        token_of_row,
        row_of_slot,
        offsets,
    )
    return *grads, None, None, None, None, None


def _contract_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _contract_backward(ctx: Any, grad_rows: Tensor) -> tuple:
    act, contract_weight, offsets = ctx.saved_tensors
    grad_rows = grad_rows.contiguous()
    grad_act = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_act = _zero_tail(_ops.grouped_rows(grad_rows, contract_weight, offsets), offsets)
    if ctx.needs_input_grad[1]:
        grad_weight = _ops.weight_grad(grad_rows, act, None, None, offsets)
    return grad_act, grad_weight, None


def _zero_tail(rows: Tensor, offsets: Tensor) -> Tensor:
    """A gradient that leaves this module has no undefined rows past the last one computed."""
    live = torch.arange(rows.shape[0], device=rows.device) < offsets[-1]
    return torch.where(live.unsqueeze(1), rows, torch.zeros((), dtype=rows.dtype))


def _moe_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.activation, ctx.saved = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _moe_backward(ctx: Any, grad_y: Tensor, _grad_preact: Tensor) -> tuple:
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes at the first access
    x, weights, token_of_row, slot_of_row, row_of_slot, offsets = saved[:6]
    expand_weight, contract_weight, preact = saved[6:]
    _require_saved(ctx.saved)
    needs = [ctx.needs_input_grad[at] for at in (0, 6, 7)]
    grad_x, grad_weights, grad_expand, grad_contract = _ops.moe_experts_backward(
        grad_y.contiguous(),
        x,
        weights,
        token_of_row,
        slot_of_row,
        row_of_slot,
        offsets,
        expand_weight,
        contract_weight,
        preact,
        ctx.activation,
        *needs,
    )
    return (
        grad_x if needs[0] else None,
        grad_weights,
        *[None] * 4,
        grad_expand if needs[1] else None,
        grad_contract if needs[2] else None,
        None,
        None,
    )


def _require_saved(saved: bool) -> None:
    if not saved:
        raise RuntimeError(
            "save_preact: was False in the forward pass, wanted True where a gradient is taken"
        )


torch.library.register_autograd("fomoe::expand", _expand_backward, setup_context=_expand_setup)
torch.library.register_autograd(
    "fomoe::contract", _contract_backward, setup_context=_contract_setup
)
torch.library.register_autograd("fomoe::moe_experts", _moe_backward, setup_context=_moe_setup)
