"""The verbs on tensors as torch ops; the rest of the package uses `from fomoe_ext import ops`.

tokens has route, compact, gather and combine; experts has the grouped GEMMs expand and contract and
the fused pass of both (moe_experts); rows has the table of rows that they pass on. Importing the
folder registers the native ops `torch.ops.fomoe.*` with torch (native), with their fake kernels
(shapes), derivatives and flops; schemas has their arguments by name, saved says when a backward
pass may overwrite what was kept for it, compiled keeps caches of torch.compile apart. It may import
the table of activations and build facts, and must know neither layers nor sites.
"""

from fomoe_ext.activations import ACTIVATIONS, is_gated
from fomoe_ext.ops.compiled import tag_caches
from fomoe_ext.ops.experts import contract, expand, expand_rows_computed, moe_experts
from fomoe_ext.ops.rows import RowTable
from fomoe_ext.ops.tokens import (
    SCORINGS,
    TILE_ROWS,
    RouterStatistics,
    combine,
    compact,
    gather,
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
    "moe_experts",
    "route",
]

tag_caches()
