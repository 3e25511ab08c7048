"""How the combine weight of skipped slots, whose experts are not resident, is redistributed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fomoe_ext.ops.schemas import traced

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
    if traced() or type(weights) is not Tensor:  # a subclass, e.g. a fake tensor, has its own ways
        return by_operations(weights, experts, resident_index)
    return _Rescaled.apply(weights, experts, resident_index)


def by_operations(weights: Tensor, experts: Tensor, resident_index: Tensor) -> Tensor:
    """`rescale_skipped` as autograd and torch.compile can follow it."""
    computed = resident_index[experts.clamp_min(0).long()] >= 0
    skipped = ~computed & (experts >= 0)
    # Skipped weights are zeroed first, so that the gradient of the quotient cannot overflow.
    own = torch.where(computed, weights, 0.0)
    kept = own.sum(dim=-1, keepdim=True)
    applies = skipped.any(dim=-1, keepdim=True) & (kept >= _LEAST_MASS)
    total = weights.sum(dim=-1, keepdim=True)
    return own / torch.where(applies, kept, 1.0) * torch.where(applies, total, 1.0)


class _Rescaled(torch.autograd.Function):
    """`by_operations` with one node for autograd, whose backward takes the operations that autograd
    takes for them: the same bits, with fewer calls."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, experts: Tensor, resident_index: Tensor) -> Tensor:
        absent = resident_index[experts.clamp_min(0).long()] < 0
        skipped = (experts >= 0).logical_and_(absent)
        own = weights.masked_fill(absent, 0.0)
        kept = own.sum(dim=-1, keepdim=True)
        applies = (kept >= _LEAST_MASS).logical_and_(skipped.any(dim=-1, keepdim=True))
        stays = applies.logical_not_()
        total = weights.sum(dim=-1, keepdim=True).masked_fill_(stays, 1.0)
        kept.masked_fill_(stays, 1.0)
        share = own.div_(kept)
        ctx.save_for_backward(weights, experts, resident_index, absent, stays, total, kept, share)
        return share * total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weights, experts, resident_index, absent, stays, total, kept, share = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            again = by_operations(weights, experts, resident_index)
            return *torch.autograd.grad(again, weights, grad, create_graph=True), None, None
        of_total = (grad * share).sum(dim=-1, keepdim=True).masked_fill_(stays, 0.0)
        of_share = grad * total
        of_own = of_share / kept
        of_kept = of_share.neg_().mul_(share / kept).sum(dim=-1, keepdim=True)
        of_own.add_(of_kept.masked_fill_(stays, 0.0)).masked_fill_(absent, 0.0)
        return of_own.add_(of_total), None, None
