"""How many kernels an op launches: each costs a few microseconds, whatever it does. Counted where
the emulator runs them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_inputs import Sizes, chosen_experts, make, poison_memory
from kernel_device import Device

from fomoe_ext import ops


@pytest.fixture
def launches(device: Device) -> Callable[[Callable[[], Any]], tuple[int, Any]]:
    """Calls a function; returns how many kernels it launched, and what it returned."""
    if device.name != "emulated":
        pytest.skip("launches are counted by the emulator")
    (library,) = (path for path in torch.ops.loaded_libraries if "libfomoe_emulated" in path)
    counted = ctypes.CDLL(library).fomoe_emulator_launches
    counted.restype = ctypes.c_uint64

    def count(run: Callable[[], Any]) -> tuple[int, Any]:
        before = counted()
        result = run()
        return counted() - before, result

    return count


@pytest.mark.parametrize("tokens, wanted", [(1, 1), (512, 1), (513, 2), (2000, 2)])
def test_compact_of_one_tile_is_one_launch(device, launches, tokens, wanted):
    """2048 slots are one tile."""
    experts = torch.randint(-1, 9, (tokens, 4), dtype=torch.int32)
    index = torch.arange(9, dtype=torch.int32)
    number, _ = launches(lambda: device.op("compact")(experts, index, 9, 64))
    assert number == wanted


@pytest.mark.parametrize("statistics", [False, True])
def test_route_is_one_launch(device, launches, statistics):
    logits, bias = torch.randn(50, 70), torch.randn(70)
    arguments = (logits, 5, 1, bias, None, 1, 1, True, 1.0, statistics)
    number, _ = launches(lambda: device.op("route")(*arguments))
    assert number == 1


@pytest.mark.parametrize("activation", ["swiglu", "silu"])  # pre-activations are wider, or not
@pytest.mark.parametrize("save_preact", [False, True])
def test_zeros_past_the_last_row_take_one_launch(device, launches, save_preact, activation):
    """For both results of expand, of which some rows are left out, and for contract's."""
    sizes = Sizes(53, 40, 24, 5, 3, 3)
    inputs = make(sizes, activation)
    index = torch.tensor([0, 1, 2, -1, -1], dtype=torch.int32)
    table = ops.compact(chosen_experts(sizes, "even"), index, sizes.residents, 128)
    rows = int(table.offsets[-1])
    assert 0 < rows < len(table.token_of_row)
    arguments = (
        *(inputs.x, inputs.expand_weight, None, table.token_of_row, table.row_of_slot),
        *(table.offsets, table.tiles, ops.ACTIVATIONS[activation], save_preact),
    )
    poison_memory()
    number, (act, preact) = launches(lambda: device.op("expand")(*arguments))
    assert number == 2
    assert (act[rows:] == 0).all() and not (act[:rows] == 0).all(dim=1).any()
    assert len(preact) == (len(act) if save_preact else 0)
    assert (preact[rows:] == 0).all()
    poison_memory()
    number, out = launches(
        lambda: device.op("contract")(act, inputs.contract_weight, None, table.offsets, table.tiles)
    )
    assert number == 2
    assert (out[rows:] == 0).all()
