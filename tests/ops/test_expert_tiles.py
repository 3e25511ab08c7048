"""The grouped GEMMs with every tile, and how a tile is chosen.

FOMOE_EXPERTS_TILE forces a tile. The CPU kernels, which tests/ops/test_experts_kernel.py compares
with float64, are the reference: both round exact sums of the same inputs but for the order of
addition.
"""

from __future__ import annotations

import pytest
import torch
from grouped_gemms import Inputs, make, moe_arguments, run
from kernel_device import Device

from fomoe_ext import _C, ops

pytestmark = pytest.mark.usefixtures("one_thread")
TILES = [tile["name"] for tile in _C.expert_tiles()]
VERBS = ["expand", "contract", "contract_backward", "grouped_rows", "weight_grad"]
# Rows of each resident around products of 64 rows and tiles of 128; sizes around tiles of 64, 128
# and 256 columns and slices of 64 of the sum.
GROUPS = (65, 0, 129, 1, 64)
SIZES = [(264, 136), (56, 64)]
LIMIT = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2e-6}


@pytest.fixture
def gpu_device(device: Device) -> Device:
    if device.name == "cpu":
        pytest.skip("tiles are of the CUDA kernels")
    return device


def everything(device: Device, inputs: Inputs, activation: str) -> list[torch.Tensor]:
    """Forward and all gradients of the layer, and the gradient added to a total, on the CPU."""
    on = lambda a: a.to(device.tensors) if isinstance(a, torch.Tensor) else a
    arguments, number = tuple(map(on, moe_arguments(inputs))), ops.ACTIVATIONS[activation]
    y, preact = device.op("moe_experts")(*arguments, number, True)
    total = torch.ones(inputs.contract_weight.shape, device=device.tensors)
    results = [y, preact[: inputs.count]]
    for totals in ((None, None), (None, total)):
        results += device.op("moe_experts_backward")(
            on(inputs.grad_y), *arguments, preact, number, True, True, True, *totals, None
        )
    return [t.cpu() for t in (*results, total)]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("hidden, size", SIZES)
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_tile(gpu_device, monkeypatch, tile, hidden, size, dtype):
    monkeypatch.setenv("FOMOE_EXPERTS_TILE", tile)
    if _C.expert_tile("expand", str(dtype).removeprefix("torch."), 1024, 0, True) != tile:
        pytest.skip(f"{tile} is not for {dtype}")
    inputs = make(GROUPS, hidden, size, dtype, bias=True)
    got = everything(gpu_device, inputs, "swiglu")
    wanted = everything(Device("cpu", "cpu"), inputs, "swiglu")
    for mine, reference in zip(got, wanted, strict=True):
        assert mine.shape == reference.shape and mine.dtype == reference.dtype
        if mine.numel() == 0:
            continue
        error = (mine.double() - reference.double()).norm() / reference.double().norm()
        assert error <= LIMIT[dtype]
    for mine, again in zip(got, everything(gpu_device, inputs, "swiglu"), strict=True):
        assert torch.equal(mine, again)


PAIRED_GROUPS = {
    "one B to every pair": (256, 0, 512),
    "pairs of two residents": (1, 130, 0, 70, 129, 128),
    "one keeps the other company": (257, 64),
    "a single tile": (0, 3),
    "few rows": (1, 2, 0, 1, 5, 1, 1),
    "no rows": (0, 0),
}


@pytest.mark.parametrize("groups", PAIRED_GROUPS.values(), ids=list(PAIRED_GROUPS))
@pytest.mark.parametrize("hidden, size, activation", [(264, 136, "swiglu"), (72, 264, "relu2")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pairs_have_the_bits_of_single_blocks(
    gpu_device, monkeypatch, groups, hidden, size, activation, dtype
):
    """Blocks that share B add up the same terms in the same order."""
    gates = 2 if activation == "swiglu" else 1
    inputs = make(groups, hidden, size, dtype, bias=True, gates=gates)
    table, number = inputs.table, ops.ACTIVATIONS[activation]
    verbs = {
        "expand": (
            *(inputs.x, inputs.expand_weight, inputs.expand_bias, table.token_of_row),
            *(table.row_of_slot, table.offsets, table.tiles, number, True),
        ),
        "contract": (
            *(inputs.act, inputs.contract_weight, inputs.contract_bias),
            *(table.offsets, table.tiles),
        ),
        "contract_backward": (
            *(inputs.grad_y, inputs.contract_weight, inputs.contract_bias, inputs.preact),
            *(inputs.weights, table.token_of_row, table.slot_of_row),
            *(table.offsets, table.tiles, number),
        ),
        "grouped_rows": (inputs.preact, inputs.expand_weight, table.offsets, table.tiles),
    }
    for verb, arguments in verbs.items():
        found = []
        for tile in ("ping_pong_128", "paired_128"):
            monkeypatch.setenv("FOMOE_EXPERTS_TILE", tile)
            found.append(run(gpu_device, verb, *arguments))
        for single, pair in zip(*found, strict=True):
            # Of rows, those that there are.
            count = inputs.count if single.shape[1] == inputs.act.shape[0] else None
            bits = [t[:, :count].contiguous().view(torch.uint8) for t in (single, pair)]
            assert torch.equal(*bits), verb


def test_sizes_that_cannot_be_read_in_chunks(gpu_device):
    """A clear error instead of a wrong result, for every verb with such rows."""
    inputs = make((3, 2), 20, 12, torch.bfloat16)
    arguments = [a.to(gpu_device.tensors) if a is not None else None for a in moe_arguments(inputs)]
    with pytest.raises(
        ValueError, match=r"x \(hidden size\) must be a multiple of 8 on CUDA.*, got 20"
    ):
        gpu_device.op("moe_experts")(*arguments, 0, False)
    inputs = make((3, 2), 16, 12, torch.bfloat16)
    arguments = [a.to(gpu_device.tensors) if a is not None else None for a in moe_arguments(inputs)]
    with pytest.raises(ValueError, match=r"expand_weight \(intermediate size\) must be .*, got 12"):
        gpu_device.op("moe_experts")(*arguments, 0, False)
    inputs = make((3, 2), 20, 12, torch.float32)  # rows of whole chunks
    arguments = [a.to(gpu_device.tensors) if a is not None else None for a in moe_arguments(inputs)]
    gpu_device.op("moe_experts")(*arguments, 0, False)


def test_misaligned_tensors(gpu_device):
    inputs = make((3, 2), 16, 16, torch.bfloat16)
    shifted = torch.empty(inputs.x.numel() + 1, dtype=torch.bfloat16)[1:].view_as(inputs.x)
    arguments = [
        a.to(gpu_device.tensors) if a is not None else None for a in moe_arguments(inputs)[1:]
    ]
    if gpu_device.tensors == "cuda":
        shifted = torch.empty(inputs.x.numel() + 1, dtype=torch.bfloat16, device="cuda")[1:]
        shifted = shifted.view_as(inputs.x)
    with pytest.raises(ValueError, match="x must start at a multiple of 16 bytes"):
        gpu_device.op("moe_experts")(shifted, *arguments, 0, False)


def test_schedule_for_other_tiles(gpu_device):
    inputs = make((3, 2), 16, 16, torch.bfloat16)
    arguments = [a.to(gpu_device.tensors) if a is not None else None for a in moe_arguments(inputs)]
    arguments[6] = torch.empty(0, 2, dtype=torch.int32, device=gpu_device.tensors)
    with pytest.raises(ValueError, match=r"tiles must have shape \[2, 2\], as .*, got \[0, 2\]"):
        gpu_device.op("moe_experts")(*arguments, 0, False)


# ---- the choice ----------------------------------------------------------------------------------


def test_choice():
    choose = _C.expert_tile
    kernels = {tile["name"]: tile["kernel"] for tile in _C.expert_tiles()}
    columns = {tile["name"]: tile["columns"] for tile in _C.expert_tiles()}
    for verb in VERBS:
        for size in (8, 64, 128, 256, 4096):
            for dtype in ("float32", "bfloat16", "float16"):
                assert kernels[choose(verb, dtype, size, size, False)] == "multistage"
                on_hopper = choose(verb, dtype, size, size, True)
                assert (kernels[on_hopper] == "multistage") == (dtype == "float32")
                for tile in (on_hopper, choose(verb, dtype, size, size, False)):
                    narrowest = {"float32": 64}.get(dtype, 128 if tile == on_hopper else 64)
                    assert columns[tile] <= max(size, narrowest)


def test_short_sums_are_stored_behind_the_products_of_others():
    for verb in ("contract", "grouped_rows"):
        for terms in (128, 2048):
            assert _C.expert_tile(verb, "bfloat16", 2048, terms, True) == "ping_pong_128"
        for terms in (4096, 0):
            assert _C.expert_tile(verb, "bfloat16", 2048, terms, True) == "cooperative_256"


def test_forced_choice(monkeypatch):
    monkeypatch.setenv("FOMOE_EXPERTS_TILE", "multistage_64")
    assert _C.expert_tile("contract", "bfloat16", 4096, 0, True) == "multistage_64"
    monkeypatch.setenv("FOMOE_EXPERTS_TILE", "cooperative_256")
    assert _C.expert_tile("contract", "bfloat16", 64, 0, True) == "cooperative_256"
    # A tile that the verb, dtype or device does not support is passed over.
    monkeypatch.setenv("FOMOE_EXPERTS_TILE", "paired_128")
    for verb in VERBS:
        wanted = "cooperative_256" if verb == "weight_grad" else "paired_128"
        assert _C.expert_tile(verb, "bfloat16", 4096, 0, True) == wanted
    monkeypatch.setenv("FOMOE_EXPERTS_TILE", "cooperative_256")
    assert _C.expert_tile("contract", "float32", 4096, 0, True) == "multistage_128"
    assert _C.expert_tile("contract", "bfloat16", 4096, 0, False) == "multistage_128"
    monkeypatch.setenv("FOMOE_EXPERTS_TILE", "")
    assert _C.expert_tile("contract", "bfloat16", 4096, 0, True) == "cooperative_256"


UNKNOWN_TILE = r"FOMOE_EXPERTS_TILE must be one of multistage_64.*, got 'huge'"


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match=r"verb must be one of expand, contract.*, got 'route'"):
        _C.expert_tile("route", "bfloat16", 64, 0, True)
    with pytest.raises(ValueError, match=r"dtype must be one of float32, bfloat16.*, got 'int8'"):
        _C.expert_tile("expand", "int8", 64, 0, True)
    monkeypatch.setenv("FOMOE_EXPERTS_TILE", "huge")
    with pytest.raises(ValueError, match=UNKNOWN_TILE):
        _C.expert_tile("expand", "bfloat16", 64, 0, True)


def test_unknown_tile(gpu_device, monkeypatch):
    """The ops raise the error themselves."""
    monkeypatch.setenv("FOMOE_EXPERTS_TILE", "huge")
    inputs = make((3, 2), 16, 16, torch.bfloat16)
    arguments = [a.to(gpu_device.tensors) if a is not None else None for a in moe_arguments(inputs)]
    with pytest.raises(ValueError, match=UNKNOWN_TILE):
        gpu_device.op("moe_experts")(*arguments, 0, False)
