"""FlopCounterMode counts the expert rows that are computed, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_layer import make, tokens
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fomoe_ext import MoELayer, ops

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, SLOTS, HIDDEN, WIDE, EXPERTS = 30, 90, 24, 20, 6


def counted(run: Any) -> int:
    """FLOPs of our ops."""
    with FlopCounterMode(display=False) as mode:
        run()
    return sum(n for op, n in mode.get_flop_counts()["Global"].items() if "fomoe" in str(op))


def per_row(gates: int = 2) -> int:
    return 2 * (gates + 1) * HIDDEN * WIDE


@pytest.mark.parametrize("resident", [None, [0, 2, 5], []])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_rows_computed_are_counted(resident: list[int] | None, activation: str) -> None:
    layer = make(resident_experts=resident, activation=activation)
    x = tokens(TOKENS, HIDDEN).requires_grad_()
    kept: list[Tensor] = []
    forward = counted(lambda: kept.append(layer(x)))
    chosen = layer.router(tokens(TOKENS, HIDDEN))[1]
    rows = int(torch.isin(chosen, torch.tensor(layer.experts.resident_experts)).sum())
    assert rows == int(layer.stats.rows) and (rows > 0) == (resident != [])
    assert resident is not None or rows == SLOTS
    assert forward == rows * per_row(2 if activation == "swiglu" else 1)
    assert counted(lambda: kept[0].sum().backward()) == 2 * forward


def test_what_needs_no_gradient_is_not_counted() -> None:
    layer = make()
    x = tokens(TOKENS, HIDDEN)
    layer.experts.expand_weight.requires_grad_(False)
    y = layer(x)
    # The gradients of the activations and of the contract weight.
    assert counted(lambda: y.sum().backward()) == SLOTS * 2 * 2 * HIDDEN * WIDE


def test_the_verbs_in_a_row_count_as_the_fused_one() -> None:
    layer = make(resident_experts=[0, 2, 5])
    weights, experts = layer.router(tokens(TOKENS, HIDDEN))
    table = ops.compact(experts, layer.experts.resident_index, 3)
    expand, contract = layer.experts.expand_weight, layer.experts.contract_weight
    x = tokens(TOKENS, HIDDEN).requires_grad_()
    kept: list[Tensor] = []

    def run() -> None:
        rows = ops.contract(ops.expand(x, expand, table), contract, table)
        kept.append(ops.combine(rows, weights.detach(), table))

    assert counted(run) == int(table.offsets[-1]) * per_row()
    assert counted(lambda: kept[0].sum().backward()) == 2 * int(table.offsets[-1]) * per_row()


def test_a_total_that_is_added_to_counts_alike() -> None:
    found = []
    for total in (False, True):
        layer = make()
        if total:
            layer.experts.expand_weight.main_grad = torch.zeros_like(layer.experts.expand_weight)
        y = layer(tokens(TOKENS, HIDDEN).requires_grad_())
        found.append(counted(lambda y=y: y.sum().backward()))
    assert found[0] == found[1] > 0
    left, index = torch.ones(SLOTS, 8), torch.zeros(SLOTS, dtype=torch.int32)
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    arguments = (left, torch.ones(TOKENS, 4), None, index, offsets)
    for run in (
        lambda: torch.ops.fomoe.weight_grad(*arguments),
        lambda: torch.ops.fomoe.weight_grad_add(torch.zeros(2, 8, 4), *arguments),
    ):
        assert counted(run) == 2 * 7 * 8 * 4


def test_without_values_every_slot_counts() -> None:
    meta = make(resident_experts=[0], device="meta")
    x = torch.empty(TOKENS, HIDDEN, device="meta")
    assert counted(lambda: meta(x)) == SLOTS * per_row()
    with FakeTensorMode():
        fake = MoELayer(HIDDEN, WIDE, EXPERTS, 3, resident_experts=[0])
        x = torch.empty(TOKENS, HIDDEN)
        assert counted(lambda: fake(x)) == SLOTS * per_row()
