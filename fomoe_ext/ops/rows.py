"""Where the rows of tokens are, between `compact`, the grouped GEMMs and `combine`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowTable(NamedTuple):
    """Where the rows are: what `compact` makes of the chosen experts. All tensors int32.

    Rows are grouped by resident expert and, within one, in slot order; rows of resident r are
    offsets[r] .. offsets[r + 1] - 1. Entries past the last row are -1.
    """

    token_of_row: Tensor  # [T * K]
    slot_of_row: Tensor  # [T * K], t * K + k
    row_of_slot: Tensor  # [T, K], -1 = skipped
    offsets: Tensor  # [R + 1]
    tiles: Tensor  # [S // tile_rows + R, 2], (resident, first row); (-1, -1) past the last
