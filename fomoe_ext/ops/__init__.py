"""The verbs on tensors, as torch ops: `from fomoe_ext import ops` is how all others use them.

tokens has route, compact, gather and combine, experts the grouped GEMMs expand and contract and
both at once (moe_experts), rows what goes between them. Importing it makes the native ops
(`torch.ops.fomoe.*`) known to torch (native), with their fake kernels (shapes), derivatives and
flops. Stands on the ground: it knows tensors alone, neither layers nor sites.
"""

from fomoe_ext.ops.experts import (
    ACTIVATIONS,
    contract,
    expand,
    expand_rows_computed,
    is_gated,
    moe_experts,
)
from fomoe_ext.ops.rows import RowTable
from fomoe_ext.ops.tokens import (
    SCORINGS,
    TILE_ROWS,
    RouterStatistics,
    combine,
    compact,
    gather,
    measured_route,
    route,
)

__all__ = [
    "ACTIVATIONS",
    "SCORINGS",
    "TILE_ROWS",
    "RouterStatistics",
    "RowTable",
    "combine",
    "compact",
    "contract",
    "expand",
    "expand_rows_computed",
    "gather",
    "is_gated",
    "measured_route",
    "moe_experts",
    "route",
]
