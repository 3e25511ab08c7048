"""Which experts are resident: their ids, and tables of them on the device."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn


def resident_ids(
    resident_experts: Sequence[int] | None, num_experts: int, name: str = "resident_experts"
) -> tuple[int, ...]:
    """The ids in ascending order, checked; None = all experts. Errors call the argument `name`."""
    if resident_experts is None:
        return tuple(range(num_experts))
    try:
        ids = sorted(operator.index(e) for e in resident_experts)
    except TypeError as error:
        raise TypeError(f"{name} must be ints, got {resident_experts!r}") from error
    if len(set(ids)) < len(ids):
        raise ValueError(f"{name} must be distinct, got {ids}")
    if ids and not 0 <= ids[0] <= ids[-1] < num_experts:
        raise ValueError(
            f"{name} must be in 0..{num_experts - 1} (num_experts is {num_experts}), got {ids}"
        )
    return tuple(ids)


class _Tables(NamedTuple):
    """The properties of `Residents` as tensors: resident_index, resident_ids, resident_mask."""

    index: Tensor
    ids: Tensor
    allowed: Tensor


class Residents(nn.Module):
    """Which experts are resident, ascending by id, with tables of them on the device.

    resident_experts: the global ids. resident_index: int32 [E], the row of each expert, or -1.
    resident_ids: int64 [R], the ids as a tensor.

    The tables are not buffers. They are derived from `resident_experts` and made anew on any device
    that needs them, so that what tools do to buffers (averaging, the meta device, `to_empty`)
    cannot make them wrong.
    """

    def __init__(
        self,
        resident_experts: Sequence[int] | None,
        num_experts: int,
        device: torch.device | str | None = None,
        name: str = "resident_experts",
    ) -> None:
        """`resident_experts`: None = all. Raises ValueError or TypeError for bad ids; the message
        calls them `name`."""
        super().__init__()
        self.num_experts = num_experts
        self.resident_experts = resident_ids(resident_experts, num_experts, name)
        self._skipped: frozenset[int] = frozenset()
        self._tables = self._make_tables(device)

    @property
    def num_resident(self) -> int:
        """R, the number of resident experts."""
        return len(self.resident_experts)

    @property
    def resident_index(self) -> Tensor:
        """int32 [E], the row of each expert, or -1 if it is not resident."""
        return self._tables.index

    @property
    def resident_ids(self) -> Tensor:
        """int64 [R], the ids, ascending."""
        return self._tables.ids

    @property
    def resident_mask(self) -> Tensor:
        """bool [E], which experts are resident."""
        return self._tables.allowed

    def _in_order(self) -> Sequence[int]:
        """The resident experts in the order of their rows."""
        return self.resident_experts

    def _make_tables(self, device: torch.device | str | None) -> _Tables:
        index = [-1] * self.num_experts
        for row, expert in enumerate(self._in_order()):
            if expert not in self._skipped:
                index[expert] = row
        if device is None:
            device = torch.get_default_device()
        with torch.inference_mode(False):  # they are used after the current pass, too
            return _Tables(
                torch.tensor(index, dtype=torch.int32, device=device),
                torch.tensor(self.resident_experts, dtype=torch.int64, device=device),
                torch.tensor([row >= 0 for row in index], dtype=torch.bool, device=device),
            )

    def tables_to(self, device: torch.device | str) -> None:
        """Makes the tables on a device, unless they are there already."""
        if self._tables.index.device != torch.device(device):
            self._tables = self._make_tables(device)

    @torch.no_grad()
    def write_resident_tables(self) -> None:
        """Updates the tables in place after a change of `resident_experts`."""
        if self._tables.index.is_meta:
            return
        for table, values in zip(self._tables, self._make_tables("cpu"), strict=True):
            table.copy_(values)

    def skip_experts(self, experts: Sequence[int]) -> None:
        """Treats these experts as not resident from now on; their weights stay in memory.

        Raises ValueError or TypeError for bad ids.
        """
        self._skipped = frozenset(resident_ids(experts, self.num_experts, "experts"))
        self.write_resident_tables()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.tables_to(fn(torch.empty(0, device=self._tables.index.device)).device)
        return self
