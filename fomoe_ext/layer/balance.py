"""What an MoE layer measures of its routing, and the losses that balance the load of its experts.

Logits here are fp32 [T, C], a column for each of the C experts that may be chosen. Everything stays
on the device: nothing waits for a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fomoe_ext.ops.tokens import RouterStatistics

BALANCES = ("none", "switch", "entropy", "bias")


class MoEStats(NamedTuple):
    """Measurements of one forward pass, as tensors on the layer's device.

    load: int64 [E], slots that chose each expert, resident or not.
    skipped_share: fp32 scalar in 0..1, share of all T*K slots that were skipped.
    router_entropy: fp32 scalar, nats, mean over tokens of the entropy of a token's scores
        normalised to sum 1; log(C) when the router is undecided.
    rows: int32 scalar, rows that the experts computed.
    """

    load: Tensor
    skipped_share: Tensor
    router_entropy: Tensor
    rows: Tensor


def log_scores(logits: Tensor, scoring: str) -> Tensor:
    """Logarithm of the scores (softmax or sigmoid) normalised to sum 1, fp32 [T, C]."""
    if scoring == "sigmoid":
        logits = torch.nn.functional.logsigmoid(logits)
    return logits.log_softmax(dim=-1)


def expert_load(experts: Tensor, num_experts: int) -> Tensor:
    """Slots per expert, int64 [E], of the chosen experts int32 [T, K]; -1 counts nowhere."""
    # Not bincount: it waits for the device. Integer scatter_add is deterministic.
    bins = experts.reshape(-1).long() + 1
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    return counts.scatter_add(0, bins, torch.ones_like(bins))[1:]


def measure(statistics: RouterStatistics, rows: Tensor, tokens: int, slots: int) -> MoEStats:
    """The statistics of a pass over so many tokens and slots; `rows` (int32 []) were computed."""
    return MoEStats(
        load=statistics.load,
        skipped_share=1 - rows / slots if slots else torch.zeros_like(rows, dtype=torch.float32),
        router_entropy=(statistics.entropy_sum / max(tokens, 1)).float(),
        rows=rows,
    )


def switch_loss(logits: Tensor, load: Tensor, scoring: str = "softmax") -> Tensor:
    """C * sum_e f_e * P_e, the auxiliary loss of Switch Transformers (arXiv 2101.03961).

    f_e is expert e's share of the slots (`load`, int64 [C], no gradient), P_e the mean over tokens
    of its normalised score (for sigmoid as in DeepSeek-V3, arXiv 2412.19437). Logits fp32 [T, C].
    1 when load and scores are even, larger when both favour the same experts.
    """
    mean_score = log_scores(logits, scoring).exp().mean(dim=0)
    share = load / load.sum().clamp_min(1)
    return (mean_score * share).sum() * logits.shape[1]


def entropy_loss(logits: Tensor) -> Tensor:
    """Negative entropy (nats) of the mean over tokens of softmax(logits), logits fp32 [T, C].

    The regulariser of sigma-MoE (arXiv 2310.10837), with the mean taken in log space: -log(C) when
    the tokens spread evenly over the experts, 0 when all agree on one.
    """
    # Not math.log, which a compiler would fix to one number of tokens.
    tokens = logits.new_full((), logits.shape[0])
    log_mean = logits.log_softmax(dim=-1).logsumexp(dim=0) - tokens.log()
    return (log_mean.exp() * log_mean).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906), logits fp32 [T, C]."""
    return logits.logsumexp(dim=-1).square().mean()


def bias_step(load: Tensor, rate: float) -> Tensor:
    """rate * sign(mean load - load), fp32 [C]: what to add to the selection bias.

    Balancing without a loss (arXiv 2408.15664, as in DeepSeek-V3); load is int64 [C].
    """
    load = load.double()  # counts stay exact
    return rate * torch.sign(load.mean() - load).float()
