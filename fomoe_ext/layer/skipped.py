"""What becomes of the share that a token gave to experts that are not resident."""

from __future__ import annotations

import torch
from torch import Tensor

SKIPPED_MASS = ("drop", "rescale")

_LEAST_MASS = 1e-30
"""Below, gradients would leave fp32's range."""


def rescale_skipped(weights: Tensor, experts: Tensor, resident_index: Tensor) -> Tensor:
    """Combine weights by which a token's computed slots carry the share of its skipped ones too.

    weights[t, k] * (sum of all the token's weights) / (sum of those of its computed slots). A token
    with no skipped slot keeps its weights and their gradients to the bit, one whose computed slots
    weigh less than 1e-30 keeps theirs, and one with no computed slot adds nothing, as ever. The
    factor has a gradient: through it the router learns of the experts that were skipped, too.

    Args:
        weights: fp32 [T, K], as `ops.route` returns them.
        experts: int32 [T, K], the chosen experts; -1 = none.
        resident_index: int [E], below 0 for an expert that is not computed.

    Returns:
        fp32 [T, K]; 0 for skipped slots.
    """
    computed = resident_index[experts.clamp_min(0).long()] >= 0
    skipped = ~computed & (experts >= 0)
    # Zeros, as what is skipped must not overflow in the quotient's gradient.
    own = torch.where(computed, weights, 0.0)
    kept = own.sum(dim=-1, keepdim=True)
    applies = skipped.any(dim=-1, keepdim=True) & (kept >= _LEAST_MASS)
    total = weights.sum(dim=-1, keepdim=True)
    return own / torch.where(applies, kept, 1.0) * torch.where(applies, total, 1.0)
