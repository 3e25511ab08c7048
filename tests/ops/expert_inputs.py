"""Inputs of the expert verbs of many sizes, and how results are compared with fp64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomoe_ext import ops

fomoe = torch.ops.fomoe
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Normalised error allowed: a few roundings of the storage type.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class Sizes(NamedTuple):
    """Tokens, hidden size, intermediate size, experts, resident experts, slots per token."""

    tokens: int
    hidden: int
    expert: int
    experts: int
    residents: int
    top_k: int


SIZES = {
    "odd": Sizes(53, 37, 21, 5, 3, 3),
    "one of each": Sizes(1, 1, 1, 1, 1, 1),
    "vector ends": Sizes(40, 33, 17, 4, 4, 2),
    "more than one block": Sizes(110, 270, 530, 3, 2, 2),
    "more than one item": Sizes(900, 20, 9, 3, 2, 2),
    "more experts than slots": Sizes(3, 24, 16, 40, 30, 2),
    "no tokens": Sizes(0, 24, 16, 4, 4, 2),
    "no residents": Sizes(9, 24, 16, 4, 0, 2),
}


class Inputs(NamedTuple):
    x: Tensor
    weights: Tensor
    table: ops.RowTable
    expand_weight: Tensor
    contract_weight: Tensor


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chosen_experts(sizes: Sizes, routing: str, seed: int = 0) -> Tensor:
    """Experts [T, K], distinct per token: evenly drawn, or all tokens on expert 0 first."""
    scores = draw(sizes.tokens, sizes.experts, seed=seed)
    if routing == "one hot expert" and sizes.experts:
        scores[:, 0] += 100.0
        scores[:, -1] -= 100.0  # an expert without rows
    return scores.argsort(1, descending=True)[:, : sizes.top_k].int()


def make(
    sizes: Sizes,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.float32,
    routing: str = "even",
) -> Inputs:
    """Random inputs; the first resident experts of `sizes` are resident."""
    gates = 2 if ops.is_gated(activation) else 1
    index = torch.full((sizes.experts,), -1, dtype=torch.int32)
    index[: sizes.residents] = torch.arange(sizes.residents, dtype=torch.int32)
    expand = draw(sizes.residents, gates * sizes.expert, sizes.hidden, seed=1)
    contract = draw(sizes.residents, sizes.hidden, sizes.expert, seed=2)
    return Inputs(
        draw(sizes.tokens, sizes.hidden, seed=3).to(dtype),
        draw(sizes.tokens, sizes.top_k, seed=4),
        ops.compact(chosen_experts(sizes, routing), index, sizes.residents),
        (expand * sizes.hidden**-0.5).to(dtype),
        (contract * sizes.expert**-0.5).to(dtype),
    )


def rows_of(inputs: Inputs) -> int:
    return int(inputs.table.offsets[-1])


def exact(*tensors: Tensor) -> list[Tensor]:
    """The same values in fp64, as leaves."""
    return [t.detach().double().requires_grad_() for t in tensors]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def assert_near(got: Tensor, wanted: Tensor, tolerance: float, what: str = "") -> None:
    """The RMS of the difference is at most `tolerance` times the RMS of the wanted values."""
    assert got.shape == wanted.shape, what
    assert got.isfinite().all(), what
    if got.numel() == 1:  # no average over roundings
        tolerance *= 3
    difference = (got.detach().double() - wanted.detach()).norm()
    assert difference <= tolerance * wanted.detach().norm() + 1e-30, what


def poison_memory() -> None:
    """Fills freed memory with NaN, where the next outputs are likely to be allocated."""
    for size in (1 << 8, 1 << 12, 1 << 16, 1 << 20):
        _ = [torch.full((size,), torch.nan) for _ in range(4)]


def op_arguments(
    inputs: Inputs, activation: str, grad: bool
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Name -> op and arguments, of every expert op."""
    table, number = inputs.table, ops.ACTIVATIONS[activation]
    x, weights, expand_weight, contract_weight = (
        t.clone().requires_grad_(grad)
        for t in (inputs.x, inputs.weights, inputs.expand_weight, inputs.contract_weight)
    )
    slots, expert = table.token_of_row.shape[0], contract_weight.shape[2]
    width = expand_weight.shape[1]
    act = draw(slots, expert, seed=15).to(x.dtype).requires_grad_(grad)
    preact, grad_y = (
        draw(slots, width, seed=16).to(x.dtype),
        torch.ones_like(x, requires_grad=False),
    )
    constants = [t.detach() for t in (x, weights, expand_weight, contract_weight)]
    left = (preact, constants[0], None, table.token_of_row, table.offsets)
    forward = (x, weights, *table, expand_weight, None, contract_weight, None, number, True)
    backward = (*constants[:2], *table, constants[2], None, constants[3], None, preact, number)
    of_row = (table.token_of_row, table.slot_of_row)
    of_slot = (table.token_of_row, table.row_of_slot)
    ends = (table.offsets, table.tiles)
    return {
        "expand": (fomoe.expand, (x, expand_weight, None, *of_slot, *ends, number, True)),
        "contract": (fomoe.contract, (act, contract_weight, None, *ends)),
        "moe_experts": (fomoe.moe_experts, forward),
        "moe_experts_backward": (
            fomoe.moe_experts_backward,
            (grad_y, *backward, True, True, False, None, None),
        ),
        "contract_backward": (
            fomoe.contract_backward,
            (grad_y, constants[3], None, preact, constants[1], *of_row, *ends, number),
        ),
        "grouped_rows": (fomoe.grouped_rows, (preact, constants[2], *ends)),
        "weight_grad": (fomoe.weight_grad, left),
        "activation_backward": (
            fomoe.activation_backward,
            (act.detach(), preact, table.offsets, number),
        ),
    }


OP_NAMES = tuple(op_arguments(make(SIZES["odd"]), "swiglu", False))
