"""Statistics of an MoE layer's routing, and the losses that balance the load of its experts.

Logits here are fp32 [T, C], a column for each of the C experts that may be chosen. All results are
tensors on the device, so that the host does not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from fomoe_ext.checks import at_least, finite, one_of
from fomoe_ext.ops.tokens import RouterStatistics

BALANCES = ("none", "switch", "entropy", "bias")


class MoEStats(NamedTuple):
    """Measurements of one forward pass, as tensors on the layer's device.

    load: int64 [E], slots that chose each expert, resident or not.
    skipped_share: fp32 scalar in 0..1, share of all T*K slots that were skipped.
    router_entropy: fp32 scalar, nats: the entropy of a token's scores, normalised to sum 1, mean
        over tokens; log(C) if all scores of a token are equal.
    rows: int32 scalar, rows that the experts in this process computed.
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
    # bincount would wait for the device. Integer scatter_add is deterministic.
    bins = experts.reshape(-1).long() + 1
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    return counts.scatter_add(0, bins, torch.ones_like(bins))[1:]


def measure(
    counted: RouterStatistics, rows: Tensor, rows_here: Tensor, tokens: int, top_k: int
) -> MoEStats:
    """The statistics of a pass over `tokens` tokens of `top_k` slots each.

    rows: int32 scalar, how many of these slots were computed, on whatever rank; rows_here: int32
    scalar, rows that this process computed for tokens of all ranks.
    """
    slots = tokens * top_k
    return MoEStats(
        load=counted.load,
        skipped_share=1 - rows / slots if slots else torch.zeros_like(rows, dtype=torch.float32),
        router_entropy=(counted.entropy_sum / max(tokens, 1)).float(),
        rows=rows_here,
    )


def switch_loss(logits: Tensor, load: Tensor, scoring: str = "softmax") -> Tensor:
    """C * sum_e f_e * P_e, the auxiliary loss of Switch Transformers (arXiv 2101.03961).

    f_e is expert e's share of the slots (`load`, int64 [C], no gradient), P_e the mean over tokens
    of its normalised score (for sigmoid as in DeepSeek-V3, arXiv 2412.19437). Logits fp32 [T, C].
    The value is 1 if load and scores are even, and larger if both favour the same experts.
    """
    mean_score = log_scores(logits, scoring).exp().mean(dim=0)
    share = load / load.sum().clamp_min(1)
    return (mean_score * share).sum() * logits.shape[1]


def entropy_loss(logits: Tensor) -> Tensor:
    """Negative entropy (nats) of the mean over tokens of softmax(logits), logits fp32 [T, C].

    The regulariser of sigma-MoE (arXiv 2310.10837), with the mean taken in log space. The value is
    -log(C) if tokens are spread evenly over the experts, and 0 if all choose the same one.
    """
    # math.log of the size would make torch.compile specialise on one number of tokens.
    tokens = logits.new_full((), logits.shape[0])
    log_mean = logits.log_softmax(dim=-1).logsumexp(dim=0) - tokens.log()
    return (log_mean.exp() * log_mean).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906), logits fp32 [T, C]."""
    return logits.logsumexp(dim=-1).square().mean()


def bias_step(load: Tensor, rate: float) -> Tensor:
    """rate * sign(mean load - load), fp32 [C], to be added to the selection bias.

    Balancing without a loss (arXiv 2408.15664, as in DeepSeek-V3); load is int64 [C].
    """
    load = load.double()  # counts stay exact
    return rate * torch.sign(load.mean() - load).float()


def wants_loss(balance: str, router_z_loss_coef: float) -> bool:
    """Whether a layer with these options has an auxiliary loss."""
    return balance in ("switch", "entropy") or router_z_loss_coef != 0.0


class Balanced(nn.Module):
    """A layer that measures its routing and balances the load of its experts.

    stats, aux_loss: results of the last pass, as `MoELayer` documents them. load_since_update:
    int64 [E], slots per expert since the selection bias was last moved, counted in training for
    balance "bias"; in no state dict.
    """

    stats: MoEStats | None
    aux_loss: Tensor
    load_since_update: Tensor

    def __init__(
        self,
        num_experts: int,
        balance: str,
        balance_coef: float,
        balance_bias_rate: float,
        router_z_loss_coef: float,
        device: torch.device | str | None,
    ) -> None:
        """Options of `MoELayer`. Raises ValueError or TypeError naming the argument."""
        super().__init__()
        one_of(BALANCES, balance=balance)
        finite(0.0, balance_coef=balance_coef, router_z_loss_coef=router_z_loss_coef)
        finite(0.0, balance_bias_rate=balance_bias_rate)
        at_least(1, num_experts=num_experts)
        self.num_experts, self.balance, self.balance_coef = num_experts, balance, balance_coef
        self.router_z_loss_coef, self.balance_bias_rate = router_z_loss_coef, balance_bias_rate
        self.stats = None
        self.aux_loss = torch.zeros((), dtype=torch.float32, device=device)
        counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.register_buffer("load_since_update", counts, persistent=False)

    def _weigh(self, logits: Tensor, load: Tensor, ids: Tensor | None, scoring: str) -> None:
        """After a pass: sets `aux_loss` and counts the load.

        logits fp32 [T, E], load int64 [E]; ids int64: the experts that may be chosen, None = all.
        """
        losses = []
        if (
            self.training
            and logits.shape[0] > 0
            and wants_loss(self.balance, self.router_z_loss_coef)
        ):
            chosen = load
            if ids is not None:
                logits, chosen = logits.index_select(1, ids), load.index_select(0, ids)
            if self.balance == "switch":
                losses.append(self.balance_coef * switch_loss(logits, chosen, scoring))
            elif self.balance == "entropy":
                losses.append(self.balance_coef * entropy_loss(logits))
            if self.router_z_loss_coef:
                losses.append(self.router_z_loss_coef * z_loss(logits))
        if self.training and self.balance == "bias":
            self.load_since_update.add_(load)
        self.aux_loss = sum(losses, start=logits.new_zeros(()))

    @torch.no_grad()
    def _move_bias(self, bias: Tensor, load: Tensor | None, ids: Tensor | None) -> None:
        """One step of bias balancing, as `MoELayer.update_selection_bias`; ids as `_weigh`."""
        if load is None:
            load = self.load_since_update
        if not isinstance(load, Tensor):
            raise TypeError(f"load must be a tensor, got {type(load).__name__}")
        if load.shape != (self.num_experts,):
            raise ValueError(f"load must have shape [{self.num_experts}], got {list(load.shape)}")
        load = load.to(self.load_since_update.device)
        if ids is None:
            bias += bias_step(load, self.balance_bias_rate)
        else:
            bias.index_add_(0, ids, bias_step(load[ids], self.balance_bias_rate))
        self.load_since_update.zero_()

    def _counts_to(self, device: torch.device) -> None:
        """Moves the counted load and `aux_loss` to a device; zeros where they had no memory."""
        if self.load_since_update.device != device:
            with torch.inference_mode(False):  # they are used after the current pass, too
                self.load_since_update = _moved(self.load_since_update, device)
        if self.aux_loss.device != device:
            self.aux_loss = _moved(self.aux_loss.detach(), device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        counts = self.load_since_update
        super()._apply(fn, recurse)
        # `fn` may cast, or make memory without values (to_empty): only its device counts.
        self.load_since_update = counts
        self._counts_to(fn(torch.empty(0, device=counts.device)).device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The autograd graph of the last pass can neither be copied nor pickled.
        return self.__dict__ | {"aux_loss": self.aux_loss.detach()}


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On a device; zeros where the tensor is on meta and the device is not."""
    if tensor.is_meta and device.type != "meta":
        return torch.zeros_like(tensor, device=device)
    return tensor.to(device)
