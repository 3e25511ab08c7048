"""What the experts of a site make of a pass's slots: one call, whoever holds them.

A layer takes a `Compute` and needs not know which: `compute_here` where one process holds all of
the site's experts, `StaleExperts.compute_too` where it has frozen copies of others besides,
`Dispatch` where the ranks of a site share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn


class Computed(NamedTuple):
    """What a `Compute` returns; y [T, D] is the sum over each token's slots on the site's experts.

    beside: what `meanwhile` returned. rows, rows_here: int32 scalars, rows of this rank's tokens,
    and rows computed in this process.
    """

    y: Tensor
    beside: Tensor | None
    rows: Tensor
    rows_here: Tensor


Meanwhile: TypeAlias = Callable[[], Tensor | None]
Compute: TypeAlias = Callable[[Tensor, Tensor, Tensor, nn.Module, Meanwhile], Computed]
"""Of x [T, D], combine weights fp32 [T, K], chosen experts int32 [T, K], the module that is called
as `Experts`, and what is to be computed while others are waited for (the shared expert)."""


def compute_here(
    x: Tensor, weights: Tensor, chosen: Tensor, experts: nn.Module, meanwhile: Meanwhile
) -> Computed:
    """A `Compute` of the experts of this process alone."""
    y, table = experts(x, weights, chosen)
    rows = table.offsets[-1].clone()
    return Computed(y, meanwhile(), rows, rows)
