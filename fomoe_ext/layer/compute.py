"""The experts' part of a pass: one interface, `Compute`, whichever process holds the experts.

A layer uses `compute_here` if one process holds all of the site's experts,
`StaleExperts.compute_both` if it also has frozen copies of others, and `Dispatch` if the ranks of
the site share the experts. Shapes use the letters of `fomoe_ext.layer.moe`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn


class Computed(NamedTuple):
    """What a `Compute` returns.

    y: [T, D], the sum over each token's slots on the site's experts. beside: what `meanwhile`
    returned. rows: int32 [*], the last entry: computed slots of this rank's tokens. rows_here:
    int32 [*], the last entry: rows computed in this process for the tokens of any rank.
    """

    y: Tensor
    beside: Tensor | None
    rows: Tensor
    rows_here: Tensor


Meanwhile: TypeAlias = Callable[[], Tensor | None]
Compute: TypeAlias = Callable[[Tensor, Tensor, Tensor, nn.Module, Meanwhile], Computed]
"""Arguments: x [T, D], combine weights fp32 [T, K], chosen experts int32 [T, K], the module to call
as `Experts`, and `meanwhile`, which is called while other ranks are waited for (it computes the
shared expert)."""


def compute_here(
    x: Tensor, weights: Tensor, chosen: Tensor, experts: nn.Module, meanwhile: Meanwhile
) -> Computed:
    """A `Compute` for a process that holds all of the site's experts."""
    y, table = experts(x, weights, chosen)
    return Computed(y, meanwhile(), table.offsets, table.offsets)
