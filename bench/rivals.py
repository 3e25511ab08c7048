"""What a user has without this package: two plain-torch ways to compute an MoE layer's experts.

Both take the same routing, weights and residency as `fomoe_ext.ops.moe_experts` and drop skipped
slots before computing anything. Letters as in fomoe_ext/moe.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(preact: Tensor, activation: str) -> Tensor:
    """act [rows, N] of preact [rows, G*N]; activation as in `fomoe_ext.ops.ACTIVATIONS`."""
    if activation in ("swiglu", "geglu"):
        gate, up = preact.chunk(2, dim=-1)
        return up * (F.silu(gate) if activation == "swiglu" else F.gelu(gate, approximate="tanh"))
    if activation == "relu2":
        return F.relu(preact).square()
    return F.silu(preact) if activation == "silu" else F.gelu(preact, approximate="tanh")


def loop_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    resident_index: Tensor,
    expand_weight: Tensor,
    contract_weight: Tensor,
    activation: str = "swiglu",
) -> Tensor:
    """One expert after the other, as the eager MoE blocks of transformers do.

    x [T, D], weights fp32 [T, K], experts int32 [T, K], resident_index int32 [E], expand_weight
    [R, G*N, D], contract_weight [R, D, N] -> y [T, D] of x's dtype.
    """
    y = torch.zeros_like(x)
    rows = resident_index[experts.long()]
    with torch.no_grad():
        hit = torch.bincount(rows[rows >= 0], minlength=expand_weight.shape[0]).nonzero().flatten()
    for resident in hit.tolist():
        token, slot = torch.where(rows == resident)
        act = activate(F.linear(x[token], expand_weight[resident]), activation)
        out = F.linear(act, contract_weight[resident]) * weights[token, slot, None].to(x.dtype)
        y.index_add_(0, token, out)
    return y


def grouped_mm_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    resident_index: Tensor,
    expand_weight: Tensor,
    contract_weight: Tensor,
    activation: str = "swiglu",
) -> Tensor:
    """Sort the slots by expert, gather, two `torch.nn.functional.grouped_mm`, weighted scatter.

    Arguments and result as `loop_experts`.
    """
    rows = resident_index[experts.long()].flatten()
    with torch.no_grad():
        kept = torch.nonzero(rows >= 0).flatten()
        order = kept[torch.argsort(rows[kept], stable=True)]
        counts = torch.bincount(rows[order], minlength=expand_weight.shape[0])
        ends = counts.cumsum(0).to(torch.int32)
        token = order // experts.shape[1]
    preact = F.grouped_mm(x[token], expand_weight.transpose(1, 2), offs=ends)
    out = F.grouped_mm(activate(preact, activation), contract_weight.transpose(1, 2), offs=ends)
    out = out * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add_(0, token, out)
