"""Inputs of the grouped GEMMs, their results on a device, and how exact these must be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from kernel_device import Device
from torch import Tensor

from fomoe_ext import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows of each resident expert. A tile has 128.
GROUPS = {
    "balanced": (70, 70, 70, 70),
    "zipf": (139, 69, 46, 34),
    "one takes all": (0, 0, 271, 0),
    "half empty": (0, 133, 0, 90),
    "whole tiles": (128, 0, 256),
    "few rows": (1, 0, 3, 2, 1, 1),
    "no rows": (0, 0, 0),
}
# Hidden and intermediate size: multiples of 8, not of a tile's width. One is wider than a tile.
SMALL, WIDE = (72, 40), (136, 136)
CASES = {name: (groups, *SMALL) for name, groups in GROUPS.items()} | {
    "wide": (GROUPS["zipf"], *WIDE)
}
TOP_K, SKIPPED = 2, 9


def every_case(test):
    cases = pytest.mark.parametrize("groups, hidden, size", CASES.values(), ids=list(CASES))
    return pytest.mark.parametrize("dtype", DTYPES, ids=str)(cases(test))


with_and_without_bias = pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])


class Inputs(NamedTuple):
    """Inputs of the verbs: combine weights are fp32, all others of one dtype."""

    x: Tensor
    weights: Tensor
    table: ops.RowTable
    expand_weight: Tensor
    contract_weight: Tensor
    expand_bias: Tensor | None
    contract_bias: Tensor | None
    grad_y: Tensor
    act: Tensor  # NaN past the last row, as the next two
    preact: Tensor
    rows: Tensor

    @property
    def count(self) -> int:
        return int(self.table.offsets[-1])

    @property
    def groups(self) -> list[tuple[int, int]]:
        return list(pairwise(self.table.offsets.tolist()))


def make_table(groups: Sequence[int], generator: torch.Generator) -> ops.RowTable:
    """A table of groups of these sizes. Slots are in random order: a token is in several groups, or
    twice in one, and some slots are skipped.
    """
    slots = sum(groups) + SKIPPED
    slots += -slots % TOP_K
    experts = torch.full((slots,), len(groups), dtype=torch.int32)  # not resident
    place = torch.randperm(slots, generator=generator)
    for expert, (begin, end) in enumerate(pairwise(torch.tensor([0, *groups]).cumsum(0).tolist())):
        experts[place[begin:end]] = expert
    index = torch.tensor([*range(len(groups)), -1], dtype=torch.int32)
    return ops.compact(experts.view(-1, TOP_K), index, len(groups), ops.TILE_ROWS)


def make(
    groups: Sequence[int],
    hidden: int,
    size: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    gates: int = 2,
) -> Inputs:
    generator = torch.Generator().manual_seed(sum(groups) + hidden)
    table = make_table(groups, generator)
    tokens, residents, slots = table.row_of_slot.shape[0], len(groups), table.row_of_slot.numel()
    draw = lambda *shape: torch.randn(*shape, generator=generator)

    def rows(width: int) -> Tensor:
        values = draw(slots, width).to(dtype)
        values[sum(groups) :] = torch.nan
        return values

    inputs = Inputs(
        x=draw(tokens, hidden).to(dtype),
        weights=draw(tokens, TOP_K),
        table=table,
        expand_weight=(draw(residents, gates * size, hidden) * hidden**-0.5).to(dtype),
        contract_weight=(draw(residents, hidden, size) * size**-0.5).to(dtype),
        expand_bias=draw(residents, gates * size).to(dtype) if bias else None,
        contract_bias=draw(residents, hidden).to(dtype) if bias else None,
        grad_y=draw(tokens, hidden).to(dtype),
        act=rows(size),
        preact=rows(gates * size),
        rows=rows(hidden),
    )
    assert [end - begin for begin, end in inputs.groups] == list(groups)
    return inputs


def run(device: Device, verb: str, *arguments: Tensor | int | bool | None) -> list[Tensor]:
    """The op's results on the CPU, of two calls: [2, ...] each."""
    op = device.op(verb)
    on = [a.to(device.tensors) if isinstance(a, Tensor) else a for a in arguments]
    results = []
    for _ in range(2):
        poison(device)
        result = op(*on)
        results.append([t.cpu() for t in ((result,) if isinstance(result, Tensor) else result)])
    return [torch.stack(pair) for pair in zip(*results, strict=True)]


def poison(device: Device) -> None:
    """Fills freed memory with NaN, where the next outputs are likely to be allocated."""
    for size in (1 << 10, 1 << 13, 1 << 16, 1 << 18):
        _ = [torch.full((size,), torch.nan, device=device.tensors) for _ in range(3)]


def relative(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got.double() - wanted).norm() / wanted.norm())


def check(
    got: Tensor, wanted: Tensor, plain: Tensor, what: str, rows: int | None = None, floor: float = 0
) -> None:
    """Compares a result [2, ...] of `run` with float64 and plain torch; of rows only the first."""
    first, second = got[:, :rows]
    wanted, plain = wanted.detach()[:rows], plain.detach()[:rows]
    assert torch.equal(first, second), f"{what}: not the same bits twice"
    assert first.dtype == plain.dtype, what
    if not wanted.any():
        assert not first.any(), f"{what}: wanted zeros"
        return
    # The average of few rounding errors is random.
    room = 1.2 if int(wanted.count_nonzero()) >= 100 else 2.5
    error, allowed = relative(first, wanted), room * relative(plain, wanted) + floor
    # fp32 sums in another order than torch's may differ by a unit in the last place.
    allowed += 1.2e-7 if first.dtype == torch.float32 else 0
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def cleared(rows: Tensor, count: int) -> Tensor:
    """Rows with zeros past the last one, for the definitions."""
    rows = rows.clone()
    rows[count:] = 0
    return rows


# Activations are approximated, to a few roundings of fp32.
ACTIVATION_FLOOR = 2e-7


def moe_arguments(inputs: Inputs) -> tuple[Tensor | None, ...]:
    experts = (inputs.expand_weight, inputs.expand_bias)
    return (
        *(inputs.x, inputs.weights, *inputs.table, *experts),
        *(inputs.contract_weight, inputs.contract_bias),
    )
