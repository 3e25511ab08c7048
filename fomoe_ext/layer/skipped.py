"""How the combine weight of skipped slots, whose experts are not resident, is redistributed."""

from __future__ import annotations

import torch
from torch import Tensor

SKIPPED_MASS = ("drop", "rescale")

_LEAST_MASS = 1e-30
"""For a smaller sum of weights the gradients would overflow fp32."""


def rescale_skipped(weights: Tensor, experts: Tensor, resident_index: Tensor) -> Tensor:
    """Redistributes the weight of a token's skipped slots over its computed slots.

    weights[t, k] * (sum of all the token's weights) / (sum of the weights of its computed slots).
    A token without skipped slots keeps its weights and their gradients to the bit. A token whose
    computed slots weigh less than 1e-30 in total keeps their weights. A token without computed
    slots adds nothing. The factor has a gradient, through which the router also learns about
    experts that were skipped.

    Args:
        weights: fp32 [T, K], as `ops.route` returns them.
        experts: int32 [T, K], the chosen experts; -1 = none.
        resident_index: int [E], negative for an expert that is not computed.

    Returns:
        fp32 [T, K]; 0 for skipped slots.
    """
    computed = resident_index[experts.clamp_min(0).long()] >= 0
    skipped = ~computed & (experts >= 0)
    # Skipped weights are zeroed first, so that the gradient of the quotient cannot overflow.
    own = torch.where(computed, weights, 0.0)
    kept = own.sum(dim=-1, keepdim=True)
    applies = skipped.any(dim=-1, keepdim=True) & (kept >= _LEAST_MASS)
    total = weights.sum(dim=-1, keepdim=True)
    return own / torch.where(applies, kept, 1.0) * torch.where(applies, total, 1.0)
