"""Definitions of the verbs in plain torch, in the dtype of the inputs; differentiable and slow.

Tests run these in float64 and compare the kernels with them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_ext.ops.rows import RowTable


def scores_of(logits: Tensor, scoring: str, allowed: Tensor | None) -> Tensor:
    """Scores [T, E]; softmax is over the allowed experts."""
    if scoring == "sigmoid":
        return torch.sigmoid(logits)
    if allowed is not None:
        logits = logits.masked_fill(~allowed.bool(), -torch.inf)
    return torch.softmax(logits, 1)


def choose(
    choice: Tensor, top_k: int, allowed: Tensor | None, num_groups: int, groups_kept: int
) -> Tensor:
    """Experts [T, K] of the best choice scores, ties to the lower index, -1 where there is none."""
    tokens, num_experts = choice.shape
    experts = torch.full((tokens, top_k), -1, dtype=torch.int32)
    size = num_experts // num_groups
    for t in range(tokens):
        values = choice[t].tolist()
        open_ = [e for e in range(num_experts) if allowed is None or bool(allowed[e])]
        best_two = lambda g: sum(sorted(values[e] for e in open_ if e // size == g)[-2:])  # noqa: B023
        groups = [g for g in range(num_groups) if any(e // size == g for e in open_)]
        kept = sorted(groups, key=lambda g: (-best_two(g), g))[:groups_kept]
        open_ = [e for e in open_ if e // size in kept]
        best = sorted(open_, key=lambda e: (-values[e], e))[:top_k]
        experts[t, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return experts


def route_weights(
    logits: Tensor,
    experts: Tensor,
    *,
    scoring: str,
    allowed: Tensor | None = None,
    renormalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Combine weights [T, K] of chosen experts; differentiable in logits."""
    scores = scores_of(logits, scoring, allowed)
    chosen = scores.gather(1, experts.clamp(min=0).long())
    chosen = torch.where(experts >= 0, chosen, torch.zeros_like(chosen))
    if renormalize:
        chosen = chosen / chosen.sum(1, keepdim=True)
    return chosen * scale


def compact(
    experts: Tensor, resident_index: Tensor, num_resident: int, tile_rows: int = 0
) -> RowTable:
    """One pass per resident expert over all slots."""
    tokens, top_k = experts.shape
    slots = [
        slot
        for r in range(num_resident)
        for slot, e in enumerate(experts.flatten().tolist())
        if e >= 0 and int(resident_index[e]) == r
    ]
    counts = [
        sum(1 for e in experts.flatten().tolist() if e >= 0 and int(resident_index[e]) == r)
        for r in range(num_resident)
    ]
    tail = [-1] * (tokens * top_k - len(slots))
    row_of_slot = torch.full((tokens * top_k,), -1, dtype=torch.int32)
    for row, slot in enumerate(slots):
        row_of_slot[slot] = row
    offsets = [sum(counts[:r]) for r in range(num_resident + 1)]
    tiles = []
    for r in sorted(range(num_resident), key=lambda r: -counts[r]):
        tiles += [(r, row) for row in range(offsets[r], offsets[r + 1], tile_rows or 1)]
    room = len(slots) + len(tail)
    room = room // tile_rows + num_resident if tile_rows else 0
    tiles = (tiles + [(-1, -1)] * room)[:room]
    int32 = lambda values: torch.tensor(values, dtype=torch.int32)
    return RowTable(
        int32([slot // top_k for slot in slots] + tail),
        int32(slots + tail),
        row_of_slot.view(tokens, top_k),
        int32(offsets),
        int32(tiles).view(-1, 2),
    )


def activate(preact: Tensor, activation: str) -> Tensor:
    """[*, G*N] -> [*, N]; the gate comes first."""
    if activation == "silu":
        return F.silu(preact)
    if activation == "relu2":
        return F.relu(preact) ** 2
    if activation == "gelu":
        return F.gelu(preact, approximate="tanh")
    gate, up = preact.chunk(2, -1)
    if activation == "swiglu":
        return F.silu(gate) * up
    if activation == "clamped_swiglu":  # of gpt-oss
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    assert activation == "geglu"
    return F.gelu(gate, approximate="tanh") * up


def expand(
    x: Tensor,
    expand_weight: Tensor,
    table: RowTable,
    activation: str,
    expand_bias: Tensor | None = None,
) -> Tensor:
    """Activation rows [S, N]; zeros past the last row."""
    gates = 1 if activation in ("silu", "relu2", "gelu") else 2
    slots, offsets = table.token_of_row.shape[0], table.offsets.tolist()
    parts = []
    for r, (begin, end) in enumerate(pairwise(offsets)):
        tokens = table.token_of_row[begin:end].long()
        preact = x[tokens] @ expand_weight[r].T
        if expand_bias is not None:
            preact = preact + expand_bias[r]
        parts.append(activate(preact, activation))
    parts.append(x.new_zeros(slots - offsets[-1], expand_weight.shape[1] // gates))
    return torch.cat(parts)


def contract(
    act: Tensor, contract_weight: Tensor, table: RowTable, contract_bias: Tensor | None = None
) -> Tensor:
    """Rows [S, D]; zeros past the last row."""
    offsets = table.offsets.tolist()
    parts = []
    for r, (begin, end) in enumerate(pairwise(offsets)):
        rows = act[begin:end] @ contract_weight[r].T
        parts.append(rows if contract_bias is None else rows + contract_bias[r])
    parts.append(act.new_zeros(act.shape[0] - offsets[-1], contract_weight.shape[1]))
    return torch.cat(parts)


def combine(rows: Tensor, weights: Tensor | None, table: RowTable) -> Tensor:
    """y [T, D], skipped slots adding nothing."""
    row_of_slot = table.row_of_slot
    if weights is None:
        weights = torch.ones(row_of_slot.shape, dtype=rows.dtype)
    computed = row_of_slot >= 0
    gathered = rows[row_of_slot.clamp(min=0).long()]
    terms = torch.where(computed[..., None], weights[..., None] * gathered, rows.new_zeros(()))
    return terms.sum(1)


def moe_experts(
    x: Tensor,
    weights: Tensor,
    table: RowTable,
    expand_weight: Tensor,
    contract_weight: Tensor,
    activation: str,
    expand_bias: Tensor | None = None,
    contract_bias: Tensor | None = None,
) -> Tensor:
    """expand, contract, combine."""
    act = expand(x, expand_weight, table, activation, expand_bias)
    return combine(contract(act, contract_weight, table, contract_bias), weights, table)
